//! Moves values between the ranks of a run.
//!
//! The one invariant: a sum over logical shards is made in the order of the shards, whichever rank holds which shard and
//! however many ranks there are. So the bits of a run do not depend on its number of ranks.
//!
//! Deliberately absent: tensors, models, the network. Ranks are threads of one process here; ranks on several nodes join
//! behind the same [`Collective`].

pub mod error;
pub mod local;

pub use error::Error;
pub use local::{LocalRank, group};

/// What one rank sends into an exchange: the parts of the shards that it owns.
pub type Parts<T> = Vec<(u32, T)>;

/// One rank's handle to its group.
pub trait Collective<T: Clone + Send>: Send {
    /// This rank's number, from 0.
    fn rank(&self) -> u32;

    /// Number of ranks.
    fn size(&self) -> u32;

    /// Gives every rank the parts of all ranks, ordered by shard. Blocks until all ranks have called it.
    ///
    /// # Errors
    /// [`Error`] if a rank is gone, does not come in time, or sends a shard that another has sent.
    fn exchange(&mut self, parts: Parts<T>) -> Result<Parts<T>, Error>;
}

/// The logical shards that `rank` of `size` owns: a contiguous run of equal length.
///
/// # Panics
/// If `size` does not divide `shards`; the job's checks refuse that.
pub fn owned(rank: u32, size: u32, shards: u32) -> std::ops::Range<u32> {
    assert!(size > 0 && shards.is_multiple_of(size), "{size} ranks do not divide {shards} logical shards");
    let each = shards / size;
    rank * each..(rank + 1) * each
}
