//! Keys and values of rows that were decoded before.

use attune_points::Result;
use candle_core::Tensor;

/// The cache of one block; empty for blocks that look at one row at a time, whatever its position.
#[derive(Debug, Clone, Default)]
pub struct BlockCache {
    rows: usize,
    keys_values: Option<(Tensor, Tensor)>,
}

impl BlockCache {
    /// Number of rows that it holds.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Counts `rows` new rows and returns how many there were before.
    pub(crate) fn advance(&mut self, rows: usize) -> usize {
        let before = self.rows;
        self.rows += rows;
        before
    }

    /// Appends the (rotated) keys and the values of new rows, `[T, K, W]`, and returns those of all rows.
    pub(crate) fn extend(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.advance(k.dim(0)?);
        let all = match self.keys_values.take() {
            None => (k.clone(), v.clone()),
            Some((keys, values)) => (Tensor::cat(&[&keys, k], 0)?, Tensor::cat(&[&values, v], 0)?),
        };
        self.keys_values = Some(all.clone());
        Ok(all)
    }
}
