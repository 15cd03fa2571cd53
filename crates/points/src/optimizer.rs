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
    /// Where entries come and go: the update before the first of each entry, whose own count is `step - born`. All of them
    /// have been there from the start if it is `None`.
    pub born: Option<&'a [f32]>,
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

    /// What the buffers of an entry hold, a number a buffer, after `age` updates in which its gradient had this mean and this mean
    /// square; `None` if the buffers of this rule are not those of single entries.
    fn begun(&self, _age: u64, _mean: f32, _square: f32) -> Option<Vec<f32>> {
        None
    }

    /// The base learning rate.
    fn lr(&self) -> f64;
}
