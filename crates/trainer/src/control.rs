//! How a run is steered and heard from outside.

use crate::protocol::Event;

/// The outside of a run.
pub trait Control: Sync {
    /// Whether the run should write a checkpoint after the current step and end.
    fn stop_requested(&self) -> bool;

    /// Whether the run should end after the current step without a checkpoint.
    fn leave_requested(&self) -> bool {
        false
    }

    /// Whether the run should write a checkpoint after the current step; asking takes the request.
    fn take_checkpoint_request(&self) -> bool;

    /// Takes an event.
    fn emit(&self, event: Event);
}

/// An outside that asks for nothing and hears nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Control for Quiet {
    fn stop_requested(&self) -> bool {
        false
    }

    fn take_checkpoint_request(&self) -> bool {
        false
    }

    fn emit(&self, _: Event) {}
}
