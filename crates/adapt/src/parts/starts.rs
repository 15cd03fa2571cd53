//! What the tensors of an attachment start as.

use attune_points::adapter::{Attachment, BaseEdit};
use attune_points::{Locals, Result, TensorSpec};
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};

/// What a tensor starts as.
pub(crate) enum Start {
    /// All values the same.
    Constant(f64),
    /// Uniform in ± this.
    Uniform(f64),
    /// Normal with this standard deviation.
    Normal(f64),
    /// These values.
    Is(Tensor),
}

impl Start {
    /// Kaiming's with a = √5, as PyTorch's linears start: uniform in ±1/√i, i the last width.
    pub(crate) fn kaiming(spec: &TensorSpec) -> Self {
        Self::Uniform(1.0 / (spec.shape.last().copied().unwrap_or(1) as f64).sqrt())
    }

    /// In 32 bits; randomness by the tensor's name within `rng`.
    fn tensor(self, spec: &TensorSpec, rng: &mut Rng) -> Result<Tensor> {
        let shape = spec.shape.as_slice();
        Ok(match self {
            Self::Constant(value) => Tensor::full(value as f32, shape, &Device::Cpu)?,
            Self::Uniform(bound) => rng.named(spec.local).uniform_tensor(shape, bound, DType::F32)?,
            Self::Normal(std) => rng.named(spec.local).normal_tensor(shape, std, DType::F32)?,
            Self::Is(tensor) if tensor.dtype().is_float() => tensor.to_dtype(DType::F32)?,
            Self::Is(tensor) => tensor,
        })
    }
}

/// Starts every tensor of an attachment by what `start` says of it, beside an untouched base.
///
/// # Errors
/// Whatever making a tensor raises.
pub(crate) fn each(at: &Attachment, rng: &mut Rng, start: impl Fn(&TensorSpec) -> Start) -> Result<(Locals, BaseEdit)> {
    let tensor = |spec: &TensorSpec| Ok((spec.local, start(spec).tensor(spec, rng)?));
    let tensors = at.tensors.iter().map(tensor).collect::<Result<Vec<_>>>()?;
    Ok((Locals::new(at.site.as_str(), tensors), BaseEdit::None))
}
