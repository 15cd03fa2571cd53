//! The point `Budget`: how are ranks shared among the sites of what trains?

use crate::adapter::{Attachment, WeightOf};
use crate::error::Result;
use crate::stats::{Stats, StatsRequest};

/// What a site gets.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// Its rank.
    pub rank: u32,
    /// What that was decided by, by name: it is kept beside the result.
    pub scores: Vec<(&'static str, f64)>,
}

/// A way to share ranks among sites before anything trains. What trains then is the slot's own method with these ranks and knows
/// nothing of it: a budget is asked once, at the first attempt of a run, and goes with any method whose sites may have ranks of
/// their own. Ranks that come and go while a component trains are its own affair ([`crate::adapter::Adapter::step_rule`]).
pub trait Budget: Send + Sync {
    /// What it wants measured at the sites, on the job's data and without what trains. Nothing for most.
    fn calibrate(&self) -> Vec<StatsRequest> {
        Vec::new()
    }

    /// What each of `at` gets, in their order, where each would have rank `mean` by itself: ranks that add up to as much, each at
    /// least 1 and none beyond what a matrix of the site's shape can have. `weight` gives the base's at each, and `stats` has what
    /// [`Budget::calibrate`] asked for. The order of the sites changes nothing.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] if no ranks are such; whatever reading a weight or a statistic raises.
    fn share(&self, mean: u32, at: &[Attachment], weight: &WeightOf<'_, '_>, stats: &Stats) -> Result<Vec<Share>>;
}
