//! How gradients change parameters, and how the learning rate runs over time.
//!
//! The one invariant: a rule is a pure function of values, gradients, buffers and the step. Buffers belong to the engine,
//! which saves them with each checkpoint; so a resumed run goes on with the same bits.
//!
//! Deliberately absent: loops, files, tensors of a model. Values are slices of 32-bit numbers.

pub mod clip;
pub mod optimizers;
pub mod schedules;

pub use optimizers::OPTIMIZERS;
pub use schedules::SCHEDULES;
