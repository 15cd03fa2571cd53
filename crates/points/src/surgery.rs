//! The point `Surgery`: one architecture and its weights to another.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site, TensorPart};
use attune_spec::Fault;
use attune_tensor::rng::Rng;
use candle_core::Tensor;

use crate::error::Result;
use crate::params::TensorName;
use crate::weight::Weight;

/// Where a tensor of the new model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Derivation {
    /// It is this tensor of the old model, as it lies.
    Kept(TensorName),
    /// It is another tensor of the new model, which is made.
    Same(TensorName),
    /// [`Surgery::tensor`] makes it of the weight of this site of the old model.
    Made(Site),
    /// [`Surgery::tensor`] makes it of nothing of the old model.
    Fresh,
}

/// Makes another model of a base, before anything trains. The sizes of the new one stand in the method's card, so that they are
/// known where no weight is: [`Architecture::after`].
pub trait Surgery: Send + Sync {
    /// Where each tensor of `to` comes from, `to` being what the card makes of `from`.
    ///
    /// # Errors
    /// What of the old model it cannot work on; paths are relative to the method.
    fn plan(
        &self,
        from: &Architecture,
        to: &Architecture,
    ) -> std::result::Result<BTreeMap<TensorName, Derivation>, Vec<Fault>>;

    /// The tensor `part` of the new model's site `at`, in 32 bits, of the weight that its [`Derivation::Made`] names.
    /// Randomness comes from `rng` alone, which is keyed by the site.
    ///
    /// # Errors
    /// A tensor that it has planned otherwise; whatever its operations raise.
    fn tensor(&self, at: &Site, part: TensorPart, of: Option<&dyn Weight>, rng: &mut Rng) -> Result<Tensor>;
}
