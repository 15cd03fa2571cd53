//! Components with parameters of their own, and what they start from.
//!
//! The one invariant: a method is one file and one line. Its equations stand in a `graph` of differentiable operations; it
//! takes part in a model only through the ports of `points`, and its tensors are values that it is handed.
//!
//! Deliberately absent: models, loops, optimisers. The battery in `tests/battery.rs` runs over the whole list: joining the
//! list means passing it.

pub mod error;

pub mod adapters;
pub mod budgets;
pub mod inits;
mod parts;

mod fused;
pub mod headed;
pub mod held;
pub mod joined;
pub mod peft;
pub mod slot;

pub use adapters::ADAPTERS;
pub use budgets::BUDGETS;
pub use error::Error;
pub use inits::INITS;
