//! Why an attempt failed: a closed list. Whether trying again can help is a property of the cause.

use std::fmt;
use std::str::FromStr;

use crate::ParseError;

/// Whether another attempt can end differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Retry {
    /// The world was at fault, or may have been.
    Yes,
    /// The same specification on the same data fails again.
    No,
}

/// Why an attempt failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// The child process was killed by a signal that nobody of ours sent.
    ChildKilled {
        /// Number of the signal.
        signal: i32,
    },
    /// The child process exited by itself without a report.
    ChildExited {
        /// Its exit status.
        code: i32,
    },
    /// The child process panicked.
    ChildPanicked,
    /// The child process was killed because memory ran out. The same shape would run out again.
    OutOfMemory,
    /// The worker was silent for longer than a lease, or came back without the attempt.
    WorkerLost,
    /// The worker lives, but stopped vouching for the attempt.
    LeaseExpired,
    /// The offer never reached the worker, as far as anybody knows.
    OfferLost,
    /// The worker did not want the offer: it had no room, was leaving, or could not run such a one.
    OfferRefused,
    /// No progress within the limit.
    Hung,
    /// The artifact store could not be reached for too long.
    StoreUnavailable,
    /// A disk was full.
    DiskFull,
    /// Bytes did not match their digest.
    Corrupt,
    /// The job's specification is at fault.
    SpecFault,
    /// The job's data is at fault.
    DataFault,
    /// A loss, gradient or weight was not finite.
    NotFinite,
    /// A tensor that should train got no gradient.
    NoGradient,
    /// A validation set did not come to what the job asks of it.
    GateMissed,
    /// The job ran for longer than it may.
    TimeLimit,
    /// Another process of the gang is gone or says nothing, and nobody knows why.
    RankLost,
    /// A defect of Attune itself.
    Internal,
}

const PLAIN: [Cause; 18] = [
    Cause::ChildPanicked,
    Cause::OutOfMemory,
    Cause::WorkerLost,
    Cause::LeaseExpired,
    Cause::OfferLost,
    Cause::OfferRefused,
    Cause::Hung,
    Cause::StoreUnavailable,
    Cause::DiskFull,
    Cause::Corrupt,
    Cause::SpecFault,
    Cause::DataFault,
    Cause::NotFinite,
    Cause::NoGradient,
    Cause::GateMissed,
    Cause::TimeLimit,
    Cause::RankLost,
    Cause::Internal,
];

impl Cause {
    /// Whether another attempt can end differently.
    pub const fn retry(self) -> Retry {
        match self {
            Self::ChildKilled { .. }
            | Self::ChildExited { .. }
            | Self::ChildPanicked
            | Self::WorkerLost
            | Self::LeaseExpired
            | Self::OfferLost
            | Self::OfferRefused
            | Self::Hung
            | Self::StoreUnavailable
            | Self::DiskFull
            | Self::Corrupt
            | Self::RankLost
            | Self::Internal => Retry::Yes,
            Self::OutOfMemory
            | Self::SpecFault
            | Self::DataFault
            | Self::NotFinite
            | Self::NoGradient
            | Self::GateMissed
            | Self::TimeLimit => Retry::No,
        }
    }

    /// The name of the cause, without its number; one of a closed list, fit for a metric's label.
    pub const fn code(self) -> &'static str {
        match self {
            Self::ChildKilled { .. } => "child_killed",
            Self::ChildExited { .. } => "child_exited",
            Self::ChildPanicked => "child_panicked",
            Self::OutOfMemory => "out_of_memory",
            Self::WorkerLost => "worker_lost",
            Self::LeaseExpired => "lease_expired",
            Self::OfferLost => "offer_lost",
            Self::OfferRefused => "offer_refused",
            Self::Hung => "hung",
            Self::StoreUnavailable => "store_unavailable",
            Self::DiskFull => "disk_full",
            Self::Corrupt => "corrupt",
            Self::SpecFault => "spec_fault",
            Self::DataFault => "data_fault",
            Self::NotFinite => "not_finite",
            Self::NoGradient => "no_gradient",
            Self::GateMissed => "gate_missed",
            Self::TimeLimit => "time_limit",
            Self::RankLost => "rank_lost",
            Self::Internal => "internal",
        }
    }
}

impl Cause {
    /// The cause in words, for people; lower case, no full stop.
    pub fn words(self) -> String {
        let text = match self {
            Self::ChildKilled { signal } => return format!("the training process was killed by signal {signal}"),
            Self::ChildExited { code } => return format!("the training process exited with status {code}"),
            Self::ChildPanicked => "the training process panicked",
            Self::OutOfMemory => "memory ran out; a smaller batch_tokens or max_length needs less",
            Self::WorkerLost => "the worker was not heard of for a whole lease, or came back without the attempt",
            Self::LeaseExpired => "the worker stopped reporting the attempt",
            Self::OfferLost => "the worker never received the attempt",
            Self::OfferRefused => "the worker refused the attempt: it had no room, was leaving, or could not run it",
            Self::Hung => "the training process made no progress within its limit",
            Self::StoreUnavailable => "the artifact store could not be reached",
            Self::DiskFull => "a disk is full",
            Self::Corrupt => "bytes did not match their digest",
            Self::SpecFault => "the job's specification is at fault",
            Self::DataFault => "the job's data is at fault",
            Self::NotFinite => "a loss, gradient or weight was not finite; a lower learning rate may help",
            Self::NoGradient => "a tensor that should train got no gradient",
            Self::GateMissed => "a validation set did not come to what the job asks of it",
            Self::TimeLimit => "the job ran for longer than it may",
            Self::RankLost => "another process of the gang is gone or says nothing",
            Self::Internal => "an internal error",
        };
        text.to_owned()
    }
}

/// The stored form: the code, with the signal or exit status in parentheses where there is one.
impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ChildKilled { signal: number } | Self::ChildExited { code: number } => {
                write!(f, "{}({number})", self.code())
            }
            _ => f.write_str(self.code()),
        }
    }
}

impl FromStr for Cause {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = || ParseError::new("cause", text);
        if let Some(plain) = PLAIN.into_iter().find(|cause| cause.code() == text) {
            return Ok(plain);
        }
        let (code, rest) = text.split_once('(').ok_or_else(error)?;
        let number: i32 = rest.strip_suffix(')').ok_or_else(error)?.parse().map_err(|_| error())?;
        match code {
            "child_killed" => Ok(Self::ChildKilled { signal: number }),
            "child_exited" => Ok(Self::ChildExited { code: number }),
            _ => Err(error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_round_trips() {
        let numbered = [Cause::ChildKilled { signal: 9 }, Cause::ChildExited { code: -1 }];
        for cause in PLAIN.into_iter().chain(numbered) {
            assert_eq!(cause.to_string().parse::<Cause>().unwrap(), cause);
        }
        for bad in ["", "child_killed", "child_killed()", "child_killed(x)", "hung(1)"] {
            assert!(bad.parse::<Cause>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn what_the_user_wrote_and_what_does_not_fit_is_not_tried_again() {
        let refused: Vec<_> = PLAIN.into_iter().filter(|cause| cause.retry() == Retry::No).map(Cause::code).collect();
        let expected =
            ["out_of_memory", "spec_fault", "data_fault", "not_finite", "no_gradient", "gate_missed", "time_limit"];
        assert_eq!(refused, expected);
    }
}
