//! The point `Quantization`: in how few bits are the frozen matrices of the base held?

use std::fmt;
use std::sync::Arc;

use attune_tensor::Quantized;
use attune_tensor::mapped::Stored;
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

    /// The matrix of this shape that a model folder of Hugging Face's holds in few bits already; `part` gives what the folder has
    /// under the weight's name and a further one, such as `.absmax`, and under the weight's name itself by an empty text.
    ///
    /// # Errors
    /// Another format, or other parameters than this one's, with those that would do; parts that are missing or do not fit.
    fn stored<'f>(
        &self,
        shape: (usize, usize),
        part: &dyn Fn(&str) -> Option<Stored<'f>>,
    ) -> Result<Arc<dyn Quantized>>;
}
