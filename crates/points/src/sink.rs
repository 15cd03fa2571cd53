//! Where gradients go: tensor by tensor, as soon as a backward pass has them.

use std::collections::BTreeMap;

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

/// The sink of an ordinary step: sums whole gradients of a given list of tensors.
#[derive(Debug, Clone, Default)]
pub struct Grads {
    sums: BTreeMap<TensorId, Option<Tensor>>,
}

impl Grads {
    /// A sink that wants exactly `tensors`.
    pub fn wanting(tensors: impl IntoIterator<Item = TensorId>) -> Self {
        Self { sums: tensors.into_iter().map(|id| (id, None)).collect() }
    }

    /// The sum for `tensor`; `None` if it is not wanted or nothing was put.
    pub fn get(&self, tensor: &TensorId) -> Option<&Tensor> {
        self.sums.get(tensor)?.as_ref()
    }

    /// Replaces the sum for a wanted tensor.
    pub fn set(&mut self, tensor: &TensorId, gradient: Tensor) {
        if let Some(sum) = self.sums.get_mut(tensor) {
            *sum = Some(gradient);
        }
    }

    /// All wanted tensors in order, with what was put.
    pub fn iter(&self) -> impl Iterator<Item = (&TensorId, Option<&Tensor>)> {
        self.sums.iter().map(|(id, sum)| (id, sum.as_ref()))
    }

    /// Adds the sums of `other`, tensor by tensor: `self + other`, in that order.
    ///
    /// # Errors
    /// A shape that does not fit.
    pub fn add(&mut self, other: &Self) -> Result<()> {
        for (id, sum) in &other.sums {
            if let Some(sum) = sum {
                self.put(id, sum)?;
            }
        }
        Ok(())
    }
}

impl GradSink for Grads {
    fn want(&self, tensor: &TensorId) -> Region<'_> {
        if self.sums.contains_key(tensor) { Region::All } else { Region::None }
    }

    fn put(&mut self, tensor: &TensorId, gradient: &Tensor) -> Result<()> {
        let Some(sum) = self.sums.get_mut(tensor) else { return Ok(()) };
        *sum = Some(match sum.take() {
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
}
