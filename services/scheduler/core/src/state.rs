//! The ten states of a job and the arrows between them.

use std::fmt;
use std::str::FromStr;

use crate::{ParseError, Reason};

/// What a job that is being stopped becomes. Ordered by strength: a stronger wish replaces a weaker one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stop {
    /// It gives its devices back and queues again.
    Preempt,
    /// It waits until somebody resumes it.
    Pause,
    /// It ends.
    Cancel,
}

impl Stop {
    /// The state after the stop.
    pub const fn target(self) -> State {
        match self {
            Self::Preempt => State::Queued,
            Self::Pause => State::Paused,
            Self::Cancel => State::Cancelled,
        }
    }
}

/// Where a job is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// Other jobs must succeed first: those that it comes after, or the stages that it consists of.
    Waiting,
    /// Ready for a gang of workers.
    Queued,
    /// Granted; inputs are fetched and checked, the rehearsal runs.
    Starting,
    /// It does its work.
    Running,
    /// Asked to write a checkpoint and stop.
    Stopping(Stop),
    /// An attempt failed; the next one waits.
    Backoff,
    /// Stopped by a person, until a person resumes it.
    Paused,
    /// Done. Final.
    Succeeded,
    /// Given up. Final.
    Failed,
    /// Ended by a person. Final.
    Cancelled,
}

impl State {
    /// Every state, in the order of a job's life.
    pub const ALL: [Self; 12] = [
        Self::Waiting,
        Self::Queued,
        Self::Starting,
        Self::Running,
        Self::Stopping(Stop::Preempt),
        Self::Stopping(Stop::Pause),
        Self::Stopping(Stop::Cancel),
        Self::Backoff,
        Self::Paused,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// Whether a job in this state never changes again.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// Whether an attempt runs, so that its epoch may commit.
    pub const fn is_live(self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Stopping(_))
    }

    /// Whether the arrow `self -> next` exists.
    pub fn may_become(self, next: Self) -> bool {
        use State::{Backoff, Cancelled, Failed, Paused, Queued, Running, Starting, Stopping, Succeeded, Waiting};
        match (self, next) {
            // A failed dependency fails the job that waits for it; a job of stages ends with the last of them.
            (Waiting, Queued | Succeeded | Failed)
            | (Queued, Starting)
            | (Starting, Running)
            | (Running, Succeeded)
            | (Starting | Running, Stopping(_) | Backoff | Failed)
            | (Backoff | Paused, Queued)
            // Cancel is legal from every state that is neither final nor live.
            | (Waiting | Queued | Backoff | Paused, Cancelled) => true,
            (Stopping(now), Stopping(stronger)) => now < stronger,
            (Stopping(stop), next) => next == stop.target(),
            _ => false,
        }
    }

    /// Whether `reason` can stand beside this state.
    pub fn allows(self, reason: Reason) -> bool {
        match reason {
            Reason::DependencyPending | Reason::StagesPending => self == Self::Waiting,
            Reason::Submitted
            | Reason::DependenciesMet
            | Reason::Resumed
            | Reason::Preempted
            | Reason::BackoffOver
            | Reason::RetryAsked => self == Self::Queued,
            Reason::Granted => self == Self::Starting,
            Reason::Started => self == Self::Running,
            Reason::PreemptAsked | Reason::WorkerDraining => self == Self::Stopping(Stop::Preempt),
            Reason::PauseAsked => matches!(self, Self::Stopping(Stop::Pause) | Self::Paused),
            Reason::CancelAsked | Reason::ParentEnded | Reason::TimeLimit | Reason::DeadlinePassed => {
                matches!(self, Self::Stopping(Stop::Cancel) | Self::Cancelled)
            }
            Reason::Failure(_) => matches!(self, Self::Backoff | Self::Failed),
            Reason::AttemptsExhausted(_) | Reason::Quarantined(_) | Reason::DependencyFailed | Reason::StageFailed => {
                self == Self::Failed
            }
            Reason::Finished => self == Self::Succeeded,
        }
    }

    /// The state's stored name.
    pub const fn code(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Queued => "queued",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping(Stop::Preempt) => "stopping(preempt)",
            Self::Stopping(Stop::Pause) => "stopping(pause)",
            Self::Stopping(Stop::Cancel) => "stopping(cancel)",
            Self::Backoff => "backoff",
            Self::Paused => "paused",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

impl FromStr for State {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        Self::ALL.into_iter().find(|state| state.code() == text).ok_or_else(|| ParseError::new("state", text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The design's arrows, written out once more and by hand; everything else is illegal.
    const ARROWS: &[(&str, &[&str])] = &[
        ("waiting", &["queued", "succeeded", "failed", "cancelled"]),
        ("queued", &["starting", "cancelled"]),
        ("starting", &["running", "stopping(preempt)", "stopping(pause)", "stopping(cancel)", "backoff", "failed"]),
        ("running", &["stopping(preempt)", "stopping(pause)", "stopping(cancel)", "backoff", "succeeded", "failed"]),
        ("stopping(preempt)", &["queued", "stopping(pause)", "stopping(cancel)"]),
        ("stopping(pause)", &["stopping(cancel)", "paused"]),
        ("stopping(cancel)", &["cancelled"]),
        ("backoff", &["queued", "cancelled"]),
        ("paused", &["queued", "cancelled"]),
        ("succeeded", &[]),
        ("failed", &[]),
        ("cancelled", &[]),
    ];

    #[test]
    fn the_arrows_are_the_designs_and_no_other() {
        assert_eq!(ARROWS.len(), State::ALL.len());
        for (from, to) in ARROWS {
            let from: State = from.parse().unwrap();
            for next in State::ALL {
                assert_eq!(from.may_become(next), to.contains(&next.code()), "{from} -> {next}");
            }
            assert_eq!(from.is_final(), to.is_empty(), "{from}");
        }
    }

    #[test]
    fn codes_round_trip() {
        for state in State::ALL {
            assert_eq!(state.code().parse::<State>().unwrap(), state);
        }
        assert!("stopping".parse::<State>().is_err());
    }
}
