//! Why a job is in its state: a closed list.

use std::fmt;
use std::str::FromStr;

use crate::{Cause, ParseError};

/// Why a job is in its state. [`State::allows`](crate::State::allows) says which reason goes with which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// A job that it comes after has not succeeded yet.
    DependencyPending,
    /// The stages that it consists of have not all succeeded yet.
    StagesPending,
    /// It was just submitted.
    Submitted,
    /// All jobs that it comes after have succeeded.
    DependenciesMet,
    /// A person resumed it.
    Resumed,
    /// It was preempted and waits for its next turn.
    Preempted,
    /// The wait after a failed attempt is over.
    BackoffOver,
    /// A person cut the wait after a failed attempt short.
    RetryAsked,
    /// A gang was found.
    Granted,
    /// The attempt said that it runs.
    Started,
    /// Its devices are wanted for something else.
    PreemptAsked,
    /// A worker of its gang is being drained.
    WorkerDraining,
    /// A person asked for a pause.
    PauseAsked,
    /// A person cancelled it.
    CancelAsked,
    /// The job that it is a stage of failed or was cancelled.
    ParentEnded,
    /// It has run for as long as it may.
    TimeLimit,
    /// The time by which it was to be done has passed.
    DeadlinePassed,
    /// An attempt failed, or a stage could not be made.
    Failure(Cause),
    /// As many attempts failed, without a new checkpoint, as the job allows; the last one for this cause.
    AttemptsExhausted(Cause),
    /// Several distinct workers were lost while they ran it; the last one for this cause.
    Quarantined(Cause),
    /// A job that it comes after failed or was cancelled.
    DependencyFailed,
    /// One of the stages that it consists of failed or was cancelled.
    StageFailed,
    /// The attempt said that all is done and committed, or the last stage has succeeded.
    Finished,
}

const PLAIN: [Reason; 20] = [
    Reason::DependencyPending,
    Reason::StagesPending,
    Reason::Submitted,
    Reason::DependenciesMet,
    Reason::Resumed,
    Reason::Preempted,
    Reason::BackoffOver,
    Reason::RetryAsked,
    Reason::Granted,
    Reason::Started,
    Reason::PreemptAsked,
    Reason::WorkerDraining,
    Reason::PauseAsked,
    Reason::CancelAsked,
    Reason::ParentEnded,
    Reason::TimeLimit,
    Reason::DeadlinePassed,
    Reason::DependencyFailed,
    Reason::StageFailed,
    Reason::Finished,
];

impl Reason {
    /// The name of the reason, without its cause; one of a closed list, fit for a metric's label.
    pub const fn code(self) -> &'static str {
        match self {
            Self::DependencyPending => "dependency_pending",
            Self::StagesPending => "stages_pending",
            Self::Submitted => "submitted",
            Self::DependenciesMet => "dependencies_met",
            Self::Resumed => "resumed",
            Self::Preempted => "preempted",
            Self::BackoffOver => "backoff_over",
            Self::RetryAsked => "retry_asked",
            Self::Granted => "granted",
            Self::Started => "started",
            Self::PreemptAsked => "preempt_asked",
            Self::WorkerDraining => "worker_draining",
            Self::PauseAsked => "pause_asked",
            Self::CancelAsked => "cancel_asked",
            Self::ParentEnded => "parent_ended",
            Self::TimeLimit => "time_limit",
            Self::DeadlinePassed => "deadline_passed",
            Self::Failure(_) => "failure",
            Self::AttemptsExhausted(_) => "attempts_exhausted",
            Self::Quarantined(_) => "quarantined",
            Self::DependencyFailed => "dependency_failed",
            Self::StageFailed => "stage_failed",
            Self::Finished => "finished",
        }
    }

    /// The reason in words, for people; lower case, no full stop.
    pub fn words(self) -> String {
        let text = match self {
            Self::DependencyPending => "a job that it comes after has not succeeded yet",
            Self::StagesPending => "its stages have not all ended yet",
            Self::Submitted => "submitted",
            Self::DependenciesMet => "all jobs that it comes after have succeeded",
            Self::Resumed => "resumed",
            Self::Preempted => "preempted; it waits for its next turn",
            Self::BackoffOver => "the wait after a failed attempt is over",
            Self::RetryAsked => "the wait after a failed attempt was cut short",
            Self::Granted => "granted to its workers",
            Self::Started => "training",
            Self::PreemptAsked => "its devices are wanted for another job",
            Self::WorkerDraining => "one of its workers is being drained",
            Self::PauseAsked => "paused on request",
            Self::CancelAsked => "cancelled on request",
            Self::ParentEnded => "the job that it is a stage of failed or was cancelled",
            Self::TimeLimit => "it has run for as long as `limits.run_seconds` allows",
            Self::DeadlinePassed => "the time by which it was to be done has passed",
            Self::DependencyFailed => "a job that it comes after failed or was cancelled",
            Self::StageFailed => "one of its stages failed or was cancelled",
            Self::Finished => "done",
            Self::Failure(cause) => return cause.words(),
            Self::AttemptsExhausted(cause) => {
                return format!("no attempts are left; the last failed: {}", cause.words());
            }
            Self::Quarantined(cause) => {
                return format!("several workers were lost while they ran it, the last like this: {}", cause.words());
            }
        };
        text.to_owned()
    }

    /// The cause of the failure that this reason reports, if it reports one.
    pub const fn cause(self) -> Option<Cause> {
        match self {
            Self::Failure(cause) | Self::AttemptsExhausted(cause) | Self::Quarantined(cause) => Some(cause),
            Self::DependencyPending
            | Self::StagesPending
            | Self::Submitted
            | Self::DependenciesMet
            | Self::Resumed
            | Self::Preempted
            | Self::BackoffOver
            | Self::RetryAsked
            | Self::Granted
            | Self::Started
            | Self::PreemptAsked
            | Self::WorkerDraining
            | Self::PauseAsked
            | Self::CancelAsked
            | Self::ParentEnded
            | Self::TimeLimit
            | Self::DeadlinePassed
            | Self::DependencyFailed
            | Self::StageFailed
            | Self::Finished => None,
        }
    }
}

/// The stored form: the code, with the cause in parentheses where there is one.
impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cause() {
            Some(cause) => write!(f, "{}({cause})", self.code()),
            None => f.write_str(self.code()),
        }
    }
}

impl FromStr for Reason {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = || ParseError::new("reason", text);
        if let Some(plain) = PLAIN.into_iter().find(|reason| reason.code() == text) {
            return Ok(plain);
        }
        let (code, rest) = text.split_once('(').ok_or_else(error)?;
        let cause: Cause = rest.strip_suffix(')').ok_or_else(error)?.parse().map_err(|_| error())?;
        match code {
            "failure" => Ok(Self::Failure(cause)),
            "attempts_exhausted" => Ok(Self::AttemptsExhausted(cause)),
            "quarantined" => Ok(Self::Quarantined(cause)),
            _ => Err(error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::State;

    #[test]
    fn every_reason_round_trips_and_stands_beside_some_state() {
        let cause = Cause::ChildKilled { signal: 9 };
        let with_cause = [Reason::Failure(cause), Reason::AttemptsExhausted(cause), Reason::Quarantined(cause)];
        for reason in PLAIN.into_iter().chain(with_cause) {
            assert_eq!(reason.to_string().parse::<Reason>().unwrap(), reason);
            assert!(State::ALL.iter().any(|state| state.allows(reason)), "{reason}");
            assert!(!reason.words().is_empty() && !reason.words().ends_with('.'), "{reason}");
        }
        assert_eq!(with_cause[0].to_string(), "failure(child_killed(9))");
        for bad in ["", "failure", "failure(", "failure(rust)", "submitted(hung)", "failure(hung))"] {
            assert!(bad.parse::<Reason>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn every_state_has_a_reason() {
        let failure = Reason::Failure(Cause::Hung);
        for state in State::ALL {
            assert!(PLAIN.into_iter().chain([failure]).any(|reason| state.allows(reason)), "{state}");
        }
    }
}
