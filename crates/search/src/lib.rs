//! Searches: which jobs of a grid that is too large to run are worth running, by what came of those that ran.
//!
//! ```text
//! Space, Tried… -> Search::next -> places -> jobs -> Tried… -> Search::next -> …       front(): those that no other one beats
//! ```
//!
//! Every job has two outcomes, both to be made small, such as its validation loss and the parameters that it trains. There is no
//! best one of two, only those that no other is better than in both: the front. A search spends its jobs on the front.
//!
//! The one invariant: a search is a pure function of the space and of what was tried, in the order in which it asked for it. So one
//! that was cut off goes on as if it had not been.
//!
//! Deliberately absent: job files, servers, files. Who runs the jobs keeps what came of them.

pub mod front;
mod gaussian;
mod searches;
pub mod space;

pub use searches::SEARCHES;
pub use space::{Axis, Place, Space, Tried};

/// Which jobs next?
pub trait Search: Send + Sync {
    /// How many jobs it runs in all, if the space has as many.
    fn evaluations(&self) -> usize;

    /// Places to try next, when all that it asked for before have ended: `tried`, in the order in which it asked. Empty when it has
    /// run what it may, or when nothing is left. `fits` says whether there is a job at a place; only places where there is are
    /// given, none of them for the second time.
    fn next(&self, space: &Space, tried: &[Tried], fits: &mut dyn FnMut(&Place) -> bool) -> Vec<Place>;
}
