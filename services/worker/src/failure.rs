//! Why an attempt failed, in the words of the contract.

use attune_proto::v1::{Failure, FailureCause};
use attune_trainer::protocol::FailureClass;

use crate::child::{Exit, memory_kills};
use crate::cohort::Killed;

/// A failure for a cause.
pub(crate) fn of(cause: FailureCause, message: impl Into<String>) -> Failure {
    Failure { cause: cause as i32, message: message.into(), ..Default::default() }
}

/// The failure of an attempt that the agent ended.
pub(crate) fn of_killed(killed: Killed) -> Failure {
    match killed {
        Killed::Leaving => of(FailureCause::WorkerLost, "the worker was shut down"),
        Killed::Fenced | Killed::Released => {
            of(FailureCause::LeaseExpired, "the worker did not hear from the scheduler for a whole lease")
        }
    }
}

/// The failure of a process that ended without a word. Memory is blamed only when the kernel has killed more processes
/// for it than `memory_kills_before`.
pub(crate) fn of_silent_end(exit: Exit, memory_kills_before: u64) -> Failure {
    match exit {
        Exit::Signal(signal) => {
            let failed = if signal == 9 && memory_kills() > memory_kills_before {
                let message = "the kernel killed the training process because memory ran out; \
                               a smaller tune.batch_tokens or data.max_length needs less";
                of(FailureCause::OutOfMemory, message)
            } else {
                of(FailureCause::ChildKilled, format!("the training process was killed by signal {signal}"))
            };
            Failure { signal: Some(signal), ..failed }
        }
        Exit::Code(code) => {
            // Rust's own status for a panic that nobody caught.
            let (cause, what) = match code {
                101 => (FailureCause::ChildPanicked, "panicked"),
                _ => (FailureCause::ChildExited, "exited without a report"),
            };
            let failed = of(cause, format!("the training process {what} (status {code})"));
            Failure { exit_code: Some(code), ..failed }
        }
    }
}

/// The cause of a failure that the process reported itself.
pub(crate) fn cause(class: FailureClass, has_faults: bool) -> FailureCause {
    match class {
        FailureClass::Input if has_faults => FailureCause::SpecFault,
        FailureClass::Input => FailureCause::DataFault,
        FailureClass::NotFinite => FailureCause::NotFinite,
        FailureClass::NoGradient => FailureCause::NoGradient,
        FailureClass::Gate => FailureCause::GateMissed,
        FailureClass::Memory => FailureCause::OutOfMemory,
        FailureClass::DiskFull => FailureCause::DiskFull,
        FailureClass::Io => FailureCause::StoreUnavailable,
        FailureClass::LostRank => FailureCause::RankLost,
        FailureClass::Corrupt => FailureCause::Corrupt,
        FailureClass::Internal => FailureCause::Internal,
    }
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(source) = at {
        text.push_str(": ");
        text.push_str(&source.to_string());
        at = source.source();
    }
    text
}
