//! Rotary tables for the rows of a batch.

use std::ops::Range;

use attune_architecture::Architecture;
use candle_core::{DType, Device, Result, Tensor};

/// `cos` and `sin`, each `[T, 1, head_dim / 2]`, one row of angles for each row of the batch.
#[derive(Debug, Clone)]
pub(crate) struct RopeTables {
    pub(crate) cos: Tensor,
    pub(crate) sin: Tensor,
}

impl RopeTables {
    /// Tables for documents whose rows have these positions. Angles are computed in f64: a position of some thousands times a frequency near
    /// 1 loses all its digits in f32. The frequencies of dynamic scaling depend on the last position of the document. `None` where
    /// positions are learned.
    pub(crate) fn new(architecture: &Architecture, places: &[Range<usize>], dtype: DType) -> Result<Option<Self>> {
        let Some(rope) = architecture.positions.rope() else { return Ok(None) };
        let half = architecture.head_dim / 2;
        let factor = rope.attention_factor();
        let rows: usize = places.iter().map(Range::len).sum();
        let (mut cos, mut sin) = (Vec::with_capacity(rows * half), Vec::with_capacity(rows * half));
        let mut frequencies = (usize::MAX, Vec::new());
        for positions in places {
            if frequencies.0 != positions.end {
                frequencies = (positions.end, rope.frequencies(architecture.head_dim, positions.end));
            }
            for position in positions.clone() {
                for frequency in &frequencies.1 {
                    let angle = position as f64 * frequency;
                    cos.push(angle.cos() * factor);
                    sin.push(angle.sin() * factor);
                }
            }
        }
        let table = |values: Vec<f64>| Tensor::from_vec(values, (rows, 1, half), &Device::Cpu)?.to_dtype(dtype);
        Ok(Some(Self { cos: table(cos)?, sin: table(sin)? }))
    }
}
