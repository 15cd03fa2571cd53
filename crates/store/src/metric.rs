//! Numbers that attempts report while they run.
//!
//! Points are numbered per job in the order of their arrival; an attempt has one per name and step, so that a report
//! that is sent again changes nothing. A batch under a newer epoch first removes every point of older epochs from the
//! batch's first step on: the retried attempt resumed before those steps, so what it reports replaces what was lost.
//! Who watches by number still sees both, each under its epoch; who lists afterwards sees the ones that count. A batch
//! under an older epoch is refused like every other write of a replaced attempt.

use attune_spec::id::{Epoch, Seq, Step, Tokens};

use crate::job::Order;
use crate::time::UtcMs;

/// One value to be appended.
#[derive(Debug, Clone, PartialEq)]
pub struct NewPoint {
    /// As in the field: `train/loss`, `data/<domain>/loss`.
    pub name: String,
    /// The optimiser step it belongs to.
    pub step: Step,
    /// The value; not-a-number is kept, the infinities become the largest finite values.
    pub value: f64,
    /// Tokens seen up to that step.
    pub tokens: Tokens,
    /// When.
    pub time: UtcMs,
}

/// A stored value.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Its number within the job, from 1; numbers grow, with gaps where points were replaced.
    pub seq: Seq,
    /// The attempt that reported it.
    pub epoch: Epoch,
    /// The value.
    pub point: NewPoint,
}

/// Which metrics to list, and in which order of their numbers.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Only these names; all when empty.
    pub names: Vec<String>,
    /// Only this step and later ones.
    pub from_step: Step,
    /// Only points after this number.
    pub after: Seq,
    /// The order.
    pub order: Order,
}
