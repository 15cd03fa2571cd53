//! The point `Init`: given the base weight, what are the starting tensors?

use attune_tensor::rng::Rng;

use crate::adapter::{Adapter, Attachment, BaseEdit};
use crate::error::Result;
use crate::params::Locals;
use crate::weight::Weight;

/// Starting values for an adapter's tensors, in place of the adapter's own.
pub trait Init: Send + Sync {
    /// Starting values of the tensors of `of` at `at`, and what has to happen to the base weight for them. Randomness comes from
    /// `rng` alone, which is keyed by the site.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] if the adapter's tensors are not of the kind that this initialisation knows.
    fn init(&self, of: &dyn Adapter, at: &Attachment, weight: &dyn Weight, rng: &mut Rng)
    -> Result<(Locals, BaseEdit)>;
}
