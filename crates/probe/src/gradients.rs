//! Sums of gradients by frozen weights, and of the squares of those of single examples.

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

/// Adds the squares of gradients, example by example: beside the sums there are the gradients of one example.
#[derive(Debug, Default)]
pub(crate) struct Squares {
    wanted: BTreeMap<TensorId, SiteId>,
    sums: BTreeMap<SiteId, Tensor>,
    /// How many examples it has seen.
    pub(crate) examples: u64,
}

impl Squares {
    /// Wants the squares of the gradients by a site's weight.
    pub(crate) fn add(&mut self, weight: TensorId, site: SiteId) {
        self.wanted.insert(weight, site);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    /// What takes the gradients of the next example.
    pub(crate) fn example(&self) -> Gradients {
        Gradients { wanted: self.wanted.clone(), sums: BTreeMap::new() }
    }

    /// Adds the squares of an example's gradients: of its sums, where a weight was used more than once.
    pub(crate) fn end(&mut self, of: Gradients) -> Result<()> {
        self.examples += 1;
        for (site, gradient) in of.sums {
            let squares = || format!("squaring the gradient at {site}");
            let own = gradient.sqr().context(squares)?;
            let sum = match self.sums.remove(&site) {
                None => own,
                Some(sum) => (sum + own).context(squares)?,
            };
            self.sums.insert(site, sum);
        }
        Ok(())
    }

    /// The sums by site; none where nothing came.
    pub(crate) fn found(self) -> BTreeMap<SiteId, Tensor> {
        self.sums
    }
}
