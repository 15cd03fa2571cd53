//! Losses, and rules that judge the answers which some of them learn from.
//!
//! The one invariant: an objective says how the loss of a chunk of supervised rows is made and what the sum is divided by;
//! it never sees the logits of a whole batch and never divides by the count of a part of a step.
//!
//! Deliberately absent: models, heads, kernels; the engine computes what an objective asks for.

pub mod objectives;
pub mod rewards;

pub use objectives::OBJECTIVES;
pub use rewards::REWARDS;
