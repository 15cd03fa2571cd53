//! Tensors that start anew on the way: at 0, and as if no update had been made of them.

use attune_points::engine::{Engine, Job, Renewed};
use attune_points::{Error, Result, TensorId, Theta};

/// A value among the parameters.
///
/// # Errors
/// [`Error::Refused`] if it is not there.
pub(crate) fn held(theta: &Theta, id: &TensorId) -> Result<candle_core::Tensor> {
    theta.get(id).cloned().ok_or_else(|| Error::Refused(format!("{id} is not among the parameters")))
}

/// Starts all of a tensor anew, which was declared as one whose entries come and go.
///
/// # Errors
/// As for [`Engine::renew`].
pub(crate) fn whole(engine: &mut dyn Engine, id: &TensorId) -> Result<()> {
    let length = held(engine.theta(), id)?.elem_count();
    let entries: Vec<Renewed> = (0..length).map(|entry| Renewed { entry, age: 0, mean: 0.0, square: 0.0 }).collect();
    engine.renew(id, &entries)
}

/// Why the optimiser of a job cannot start tensors anew, if so.
pub(crate) fn misfit(job: &Job<'_>) -> Option<String> {
    job.optimizer.begun(0, 0.0, 0.0).is_none().then(|| {
        "is that of a component whose tensors start anew on the way; this optimiser keeps nothing entry by entry: expected one that does, \
         such as AdamW"
            .to_owned()
    })
}
