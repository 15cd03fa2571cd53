//! What a process says about itself: its log, and which of its tasks failed.
//!
//! * [`logging`]: one `tracing` subscriber for the process, on standard error, as text or JSON, filtered by
//!   `ATTUNE_LOG`.
//! * [`task`]: [`TaskGroup`], the only way to start a background task. A task has a name, a cancel rule and an error
//!   rule.
//!
//! Invariant: no task ends unnoticed. An error, a panic or a task that was dropped half way is a [`TaskFailure`] in the
//! group's record, and [`TaskGroup::shutdown`] ends within its bound.
//!
//! Deliberately absent: metrics (each crate owns its own), and any decision about what to do after a failure beyond
//! "log it" and "stop the process".

mod error;
pub mod logging;
pub mod task;

pub use error::{Error, TaskFailure};
pub use logging::{Format, Logging};
pub use task::{Stop, Task, TaskGroup, TaskHandle};
