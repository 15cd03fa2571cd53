//! How a run is steered and heard from outside.

use attune_collective::Peer;

use crate::error::Error;
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

    /// Tells the other processes of the run where this one listens, and waits until it knows the same of all of them; none
    /// if it is asked to stop before.
    ///
    /// # Errors
    /// Nobody can be told.
    fn meet(&self, _own: &Peer) -> Result<Option<Vec<Peer>>, Error> {
        Err(Error::Meeting("nobody tells one of the others".to_owned()))
    }
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
