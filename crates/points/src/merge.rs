//! The point `Merge`: what do several sets of weights become together?

use candle_core::Tensor;

use crate::error::Result;

/// Makes one tensor of several that stand for the same thing in several sets of weights: a factor, or a change of a weight.
pub trait Merge: Send + Sync {
    /// The tensor in the place of all of `of`, which have one shape; there is one or more. What is drawn at random comes from `keeps`
    /// alone.
    ///
    /// # Errors
    /// Shapes that differ; numbers that are not finite.
    fn combine(&self, of: &[Weighted<'_>], keeps: &mut dyn Keeps) -> Result<Tensor>;

    /// Whether it is the sum of the tensors times their weights, and nothing else: products of factors then add up without being formed.
    fn is_sum(&self) -> bool {
        false
    }
}

/// A tensor and its weight among others.
#[derive(Debug, Clone, Copy)]
pub struct Weighted<'a> {
    /// The tensor.
    pub tensor: &'a Tensor,
    /// The weight, of either sign.
    pub weight: f64,
}

/// Says which entries of tensors are kept.
pub trait Keeps {
    /// For each entry of the tensor `of` a merge's, by its place among them, whether it is kept; each is with the probability `share`.
    ///
    /// # Errors
    /// Whatever finding that out raises.
    fn keep(&mut self, of: usize, entries: usize, share: f64) -> Result<Vec<bool>>;
}
