//! Tensors of one shape, entry by entry.

use attune_points::merge::Weighted;
use attune_points::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};

/// The numbers of several tensors of one shape.
pub(crate) struct Stacked {
    shape: Shape,
    dtype: DType,
    weights: Vec<f64>,
    /// Those of each tensor.
    pub(crate) numbers: Vec<Vec<f64>>,
}

impl Stacked {
    pub(crate) fn of(of: &[Weighted<'_>]) -> Result<Self> {
        let Some(first) = of.first() else { return Err(Error::Refused("there is nothing to combine".to_owned())) };
        let (shape, dtype) = (first.tensor.shape().clone(), first.tensor.dtype());
        let mut numbers = Vec::with_capacity(of.len());
        for one in of {
            if *one.tensor.shape() != shape {
                let message = format!("tensors of shapes {shape:?} and {:?} do not combine", one.tensor.shape());
                return Err(Error::Refused(message));
            }
            let values: Vec<f64> = one.tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
            if values.iter().any(|value| !value.is_finite()) {
                return Err(Error::Refused("has numbers that are not finite".to_owned()));
            }
            numbers.push(values);
        }
        Ok(Self { shape, dtype, weights: of.iter().map(|one| one.weight).collect(), numbers })
    }

    /// The tensor whose entries `entry` makes of those of all tensors, each with the tensor's weight.
    pub(crate) fn each(&self, entry: impl Fn(&[(f64, f64)]) -> f64) -> Result<Tensor> {
        let mut entries: Vec<(f64, f64)> = self.weights.iter().map(|weight| (0.0, *weight)).collect();
        let count = self.numbers.first().map_or(0, Vec::len);
        let made: Vec<f64> = (0..count)
            .map(|at| {
                for (entry, numbers) in entries.iter_mut().zip(&self.numbers) {
                    entry.0 = numbers[at];
                }
                entry(&entries)
            })
            .collect();
        Ok(Tensor::from_vec(made, self.shape.clone(), &Device::Cpu)?.to_dtype(self.dtype)?)
    }

    /// The sum of the tensors times their weights.
    pub(crate) fn sum(&self) -> Result<Tensor> {
        self.each(|entries| entries.iter().map(|(number, weight)| number * weight).sum())
    }
}
