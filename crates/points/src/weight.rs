//! A frozen weight of the base, however it is stored.

use std::ops::Range;

use attune_tensor::{FrozenWeight, ops};
use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::quantization::Quantization;

/// A weight of the base model, usually a matrix `w_oi` (the scale of a norm is a vector, `o` by 1): dense, memory-mapped or quantised. Readers ask for what they need and get what
/// the model computes with, of a quantised one the widened numbers; nobody keeps a widened copy of a whole model.
pub trait Weight: Send + Sync {
    /// Output and input width, `(o, i)`.
    fn shape(&self) -> (usize, usize);

    /// The rows `rows` of the matrix as a tensor of `dtype`, shape `[rows, i]`.
    ///
    /// # Errors
    /// A range outside of the matrix, or a storage that cannot be read.
    fn rows(&self, rows: Range<usize>, dtype: DType) -> Result<Tensor>;

    /// The whole weight as a tensor of `dtype`, in its own shape.
    ///
    /// # Errors
    /// As for [`Weight::rows`].
    fn dense(&self, dtype: DType) -> Result<Tensor> {
        self.rows(0..self.shape().0, dtype)
    }

    /// The bias `b_o` of the same site, if it has one.
    ///
    /// # Errors
    /// A storage that cannot be read.
    fn bias(&self, _dtype: DType) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// Whether another operator computes with the same numbers, as a head does that is tied to the table of tokens.
    fn is_tied(&self) -> bool {
        false
    }

    /// What it was before it was quantised, if it is held in few bits and that can still be read.
    fn unquantized(&self) -> Option<Unquantized<'_>> {
        None
    }
}

/// A weight before it was quantised.
pub struct Unquantized<'a> {
    /// What made few bits of it.
    pub by: &'a dyn Quantization,
    /// The numbers that it had, in the type that products are computed in.
    pub weight: Box<dyn Weight + 'a>,
    /// That type.
    pub dtype: DType,
}

impl Unquantized<'_> {
    /// What is held in few bits of the weight less `factor left_or right_ri`, two factors of 32 bits. The same bits whenever it is
    /// made.
    ///
    /// # Errors
    /// As for [`Quantization::quantize`]; factors of another shape.
    pub fn without(&self, left_or: &Tensor, right_ri: &Tensor, factor: f64) -> Result<FrozenWeight> {
        let product = (ops::linear(left_or, &right_ri.t()?, None)? * factor)?;
        let rest = (self.weight.dense(self.dtype)?.to_dtype(DType::F32)? - product)?;
        Ok(FrozenWeight::quantized(self.by.quantize(&rest, self.dtype)?, self.dtype)?)
    }
}

impl Weight for Tensor {
    fn shape(&self) -> (usize, usize) {
        match self.dims() {
            [o, i] => (*o, *i),
            _ => (self.elem_count(), 1),
        }
    }

    fn rows(&self, rows: Range<usize>, dtype: DType) -> Result<Tensor> {
        Ok(self.narrow(0, rows.start, rows.len())?.to_dtype(dtype)?)
    }
}
