//! The point `Optimizer`: gradients to update.

use attune_spec::id::Step;

use crate::error::Result;

/// What an update may know beside the values.
#[derive(Debug, Clone, Copy)]
pub struct UpdateCx<'a> {
    /// The number of this update, from 1.
    pub step: Step,
    /// The learning rate of this update for this tensor: base rate × schedule × the tensor's own factor.
    pub lr: f64,
    /// Whether weight decay applies to this tensor.
    pub decay: bool,
    /// The tensor's shape.
    pub shape: &'a [usize],
}

/// A rule that changes values by their gradients. The rule itself holds no state: its buffers are the engine's, which
/// saves them with each checkpoint and may shard them.
pub trait Optimizer: Send + Sync {
    /// Name and length of each buffer that a tensor of this shape needs; they start at 0.
    fn buffers(&self, shape: &[usize]) -> Vec<(&'static str, usize)>;

    /// Changes `value` in place. `buffers` are in the order of [`Optimizer::buffers`].
    ///
    /// # Errors
    /// A shape that this rule has no update for.
    fn update(&self, cx: &UpdateCx<'_>, value: &mut [f32], gradient: &[f32], buffers: &mut [Vec<f32>]) -> Result<()>;

    /// The base learning rate.
    fn lr(&self) -> f64;
}
