//! The point `Quantization`: in how few bits are the frozen matrices of the base held?

use std::fmt;
use std::sync::Arc;

use attune_tensor::Quantized;
use candle_core::DType;

use crate::error::Result;
use crate::weight::Weight;

/// Makes matrices of few bits of the base's weights: those of linears within blocks, one after the other as they are read. A matrix
/// is quantised as a number format of its own: what comes of it depends on its numbers and nothing else, not on threads or on other
/// matrices.
pub trait Quantization: Send + Sync + fmt::Debug {
    /// `weight` in few bits, of its numbers as they are in `dtype`, the type that products are computed in.
    ///
    /// # Errors
    /// Numbers that are not finite; whatever reading them raises.
    fn quantize(&self, weight: &dyn Weight, dtype: DType) -> Result<Arc<dyn Quantized>>;
}
