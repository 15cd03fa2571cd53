//! The point `Init`: given base weight and statistics, what are the starting tensors?

use attune_tensor::rng::Rng;

use crate::adapter::{Adapter, Attachment, BaseEdit};
use crate::error::Result;
use crate::params::Locals;
use crate::stats::{Stats, StatsRequest};
use crate::weight::Weight;

/// Starting values for an adapter's tensors, in place of the adapter's own.
pub trait Init: Send + Sync {
    /// What it wants measured at its sites, on the job's data and without what it starts. Nothing for most.
    fn calibrate(&self) -> Vec<StatsRequest> {
        Vec::new()
    }

    /// Whether it takes something out of the base, at all of its sites ([`BaseEdit::Beside`]).
    fn takes_out(&self) -> bool {
        false
    }

    /// Whether it has weights of the base quantised anew, at all of its sites ([`BaseEdit::Requantized`]).
    fn requantizes(&self) -> bool {
        false
    }

    /// Starting values of the tensors of `of` at `at`, and what has to happen to the base weight for them. `stats` has what
    /// [`Init::calibrate`] asked for. Randomness comes from `rng` alone, which is keyed by the site.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] if the adapter's tensors are not of the kind that this initialisation knows.
    fn init(
        &self,
        of: &dyn Adapter,
        at: &Attachment,
        weight: &dyn Weight,
        stats: &Stats,
        rng: &mut Rng,
    ) -> Result<(Locals, BaseEdit)>;
}
