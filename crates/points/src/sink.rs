//! Where gradients go: tensor by tensor, as soon as a backward pass has them.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Tensor;

use crate::error::{Context as _, Result};
use crate::params::TensorId;

/// Which part of a tensor's gradient is wanted. A backward pass computes no more than that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region<'a> {
    /// Nothing.
    None,
    /// The whole tensor.
    All,
    /// Some rows.
    Rows(&'a [u32]),
    /// Some columns.
    Cols(&'a [u32]),
    /// Some rows by some columns.
    Cross(&'a [u32], &'a [u32]),
    /// Single entries, by flat index.
    Entries(&'a [u64]),
}

/// Receives gradients. A tensor may be put several times in one pass (a tied weight, a shared factor): contributions add.
pub trait GradSink {
    /// Which part of the gradient of `tensor` is wanted. Frozen tensors of the base are asked about as well.
    fn want(&self, tensor: &TensorId) -> Region<'_>;

    /// Takes a contribution, which has the shape of the wanted region.
    ///
    /// # Errors
    /// Whatever adding it up raises.
    fn put(&mut self, tensor: &TensorId, gradient: &Tensor) -> Result<()>;
}

/// Single entries of tensors, by flat index.
pub type Entries = BTreeMap<TensorId, Arc<[u64]>>;

/// The sink of an ordinary step: sums gradients of a given list of tensors, whole ones or single entries.
#[derive(Debug, Clone, Default)]
pub struct Grads {
    sums: BTreeMap<TensorId, Sum>,
}

#[derive(Debug, Clone, Default)]
struct Sum {
    /// Which entries; all of them if `None`.
    entries: Option<Arc<[u64]>>,
    value: Option<Tensor>,
}

impl Grads {
    /// A sink that wants exactly `tensors`, whole.
    pub fn wanting(tensors: impl IntoIterator<Item = TensorId>) -> Self {
        Self { sums: tensors.into_iter().map(|id| (id, Sum::default())).collect() }
    }

    /// The same that wants these entries as well.
    #[must_use]
    pub fn and_entries(mut self, entries: &Entries) -> Self {
        let more = entries.iter().map(|(id, of)| (id.clone(), Sum { entries: Some(Arc::clone(of)), value: None }));
        self.sums.extend(more);
        self
    }

    /// Wants what `other` wants as well.
    pub fn widen(&mut self, other: &Self) {
        for (id, sum) in &other.sums {
            self.sums.entry(id.clone()).or_insert_with(|| Sum { entries: sum.entries.clone(), value: None });
        }
    }

    /// The sum for `tensor`; `None` if it is not wanted or nothing was put.
    pub fn get(&self, tensor: &TensorId) -> Option<&Tensor> {
        self.sums.get(tensor)?.value.as_ref()
    }

    /// Takes the sum for `tensor` out: it is not wanted any more.
    pub fn take(&mut self, tensor: &TensorId) -> Option<Tensor> {
        self.sums.remove(tensor)?.value
    }

    /// Replaces the sum for a wanted tensor.
    pub fn set(&mut self, tensor: &TensorId, gradient: Tensor) {
        if let Some(sum) = self.sums.get_mut(tensor) {
            sum.value = Some(gradient);
        }
    }

    /// All wanted tensors in order, with what was put.
    pub fn iter(&self) -> impl Iterator<Item = (&TensorId, Option<&Tensor>)> {
        self.sums.iter().map(|(id, sum)| (id, sum.value.as_ref()))
    }

    /// Adds the sums of `other`, tensor by tensor: `self + other`, in that order.
    ///
    /// # Errors
    /// A shape that does not fit.
    pub fn add(&mut self, other: &Self) -> Result<()> {
        for (id, sum) in &other.sums {
            if let Some(sum) = &sum.value {
                self.put(id, sum)?;
            }
        }
        Ok(())
    }
}

impl GradSink for Grads {
    fn want(&self, tensor: &TensorId) -> Region<'_> {
        match self.sums.get(tensor) {
            None => Region::None,
            Some(Sum { entries: None, .. }) => Region::All,
            Some(Sum { entries: Some(entries), .. }) => Region::Entries(entries),
        }
    }

    fn put(&mut self, tensor: &TensorId, gradient: &Tensor) -> Result<()> {
        let Some(Sum { value, .. }) = self.sums.get_mut(tensor) else { return Ok(()) };
        *value = Some(match value.take() {
            None => gradient.clone(),
            Some(sum) => (&sum + gradient).context(|| format!("adding up the gradient of {tensor}"))?,
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::params::{Owner, TensorName};

    #[test]
    fn contributions_add_and_unwanted_tensors_are_ignored() {
        let id = |name| TensorId { owner: Owner::Base, name: TensorName::from_path(name) };
        let tensor = |value: f32| Tensor::new(&[value, 1.0], &Device::Cpu).unwrap();
        let mut grads = Grads::wanting([id("a")]);
        assert_eq!((grads.want(&id("a")), grads.want(&id("b"))), (Region::All, Region::None));
        grads.put(&id("a"), &tensor(1.0)).unwrap();
        grads.put(&id("a"), &tensor(2.0)).unwrap();
        grads.put(&id("b"), &tensor(2.0)).unwrap();
        assert_eq!(grads.get(&id("a")).unwrap().to_vec1::<f32>().unwrap(), [3.0, 2.0]);
        assert!(grads.get(&id("b")).is_none());
    }

    #[test]
    fn entries_add_beside_whole_tensors_and_can_be_taken_out() {
        let id = |name| TensorId { owner: Owner::Base, name: TensorName::from_path(name) };
        let some: Entries = BTreeMap::from([(id("w"), Arc::from([5u64, 2]))]);
        let mut grads = Grads::wanting([id("a")]).and_entries(&some);
        assert_eq!(grads.want(&id("w")), Region::Entries(&[5, 2]));
        let tensor = |value: f32| Tensor::new(&[value, 1.0], &Device::Cpu).unwrap();
        grads.put(&id("w"), &tensor(3.0)).unwrap();
        let mut sum = Grads::wanting([id("a")]);
        sum.widen(&grads);
        sum.add(&grads).unwrap();
        sum.add(&grads).unwrap();
        assert_eq!(sum.take(&id("w")).unwrap().to_vec1::<f32>().unwrap(), [6.0, 2.0]);
        assert_eq!((sum.want(&id("w")), sum.iter().count()), (Region::None, 1));
    }
}
