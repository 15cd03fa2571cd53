//! Sums of gradients by frozen weights.

use std::collections::BTreeMap;

use attune_architecture::SiteId;
use attune_points::error::Context as _;
use attune_points::{GradSink, Region, Result, TensorId};
use candle_core::Tensor;

/// Adds gradients as a backward pass comes to them: beside the sums, which are the result, there is one gradient at a time.
#[derive(Debug, Default)]
pub(crate) struct Gradients {
    wanted: BTreeMap<TensorId, SiteId>,
    sums: BTreeMap<SiteId, Tensor>,
}

impl Gradients {
    /// Wants the gradient by a site's weight.
    pub(crate) fn add(&mut self, weight: TensorId, site: SiteId) {
        self.wanted.insert(weight, site);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    /// The sums by site; none where nothing came.
    pub(crate) fn found(self) -> BTreeMap<SiteId, Tensor> {
        self.sums
    }
}

impl GradSink for Gradients {
    fn want(&self, tensor: &TensorId) -> Region<'_> {
        if self.wanted.contains_key(tensor) { Region::All } else { Region::None }
    }

    fn put(&mut self, tensor: &TensorId, gradient: &Tensor) -> Result<()> {
        let Some(site) = self.wanted.get(tensor) else { return Ok(()) };
        let sum = match self.sums.remove(site) {
            None => gradient.clone(),
            Some(sum) => (sum + gradient).context(|| format!("adding up the gradient of {tensor}"))?,
        };
        self.sums.insert(site.clone(), sum);
        Ok(())
    }
}
