//! A frozen weight of the base, however it is stored.

use std::ops::Range;

use candle_core::{DType, Tensor};

use crate::error::Result;

/// A weight of the base model, usually a matrix `w_oi` (the scale of a norm is a vector, `o` by 1): dense, memory-mapped or (later) quantised. Readers ask for what they need; nobody
/// keeps a widened copy of a whole model.
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
