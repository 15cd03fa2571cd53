//! The point `Schedule`: how the learning rate runs over time.

use attune_spec::id::Step;

/// A factor on the learning rate, a pure function of the step.
pub trait Schedule: Send + Sync {
    /// The factor for the update that follows `done` finished updates, of `total` in all. The first update asks for
    /// `done = 0`, as the schedulers of `transformers` do.
    fn factor(&self, done: Step, total: Step) -> f64;
}
