//! Moves values between the ranks of a run.
//!
//! The one invariant: a sum over logical shards is made in the order of the shards, whichever rank holds which shard and
//! however many ranks there are. So the bits of a run do not depend on its number of ranks.
//!
//! Ranks are threads of one process ([`local`]), processes on one or several nodes that are joined by a [`mesh`] of
//! connections, or threads of such processes. Between NVIDIA devices long letters go over a link of their own
//! ([`carried`]; [`way`] says when); who lives and what is due the mesh knows there as well.
//!
//! Deliberately absent: tensors and models. What crosses the network is bytes here; who sends them knows what they mean.

pub mod carried;
pub mod error;
pub mod local;
pub mod mesh;
#[cfg(feature = "cuda")]
mod nccl;
pub mod way;

pub use carried::{Carried, Link};
pub use error::{Checksum, Error};
pub use local::{LocalRank, group, group_within};
pub use mesh::{Listening, Mesh, Patience, Peer};

use std::borrow::Cow;
use std::time::Duration;

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

    /// How long this process has waited for each process of the group since it was last asked, by number; empty where the
    /// group is one process.
    fn take_waits(&mut self) -> Vec<Duration> {
        Vec::new()
    }
}

/// What one process sends into an exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Letters {
    /// To each process what stands at its number.
    Each(Vec<Vec<u8>>),
    /// To all processes the same.
    All(Vec<u8>),
}

impl Letters {
    /// What is for a process, which is asked for once: nobody keeps what is sent.
    fn take(&mut self, number: usize) -> Cow<'_, [u8]> {
        match self {
            Self::Each(each) => Cow::Owned(each.get_mut(number).map(std::mem::take).unwrap_or_default()),
            Self::All(all) => Cow::Borrowed(all),
        }
    }

    /// The length of the longest.
    fn longest(&self) -> usize {
        match self {
            Self::Each(each) => each.iter().map(Vec::len).max().unwrap_or_default(),
            Self::All(all) => all.len(),
        }
    }

    /// What is for each of `size` processes.
    fn take_all(&mut self, size: usize) -> Vec<Cow<'_, [u8]>> {
        match self {
            Self::Each(each) => {
                each.resize_with(size, Vec::new);
                each.drain(..).map(Cow::Owned).collect()
            }
            Self::All(all) => vec![Cow::Borrowed(all.as_slice()); size],
        }
    }
}

/// What came of an exchange between processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    /// What each process sent here, by number.
    pub letters: Vec<Vec<u8>>,
    /// How long each process's letter was waited for after this process's own were sent; nothing for one that had come
    /// before.
    pub waits: Vec<Duration>,
}

/// One process's handle to the processes of its run.
pub trait Wire: Send {
    /// This process's number, from 0.
    fn rank(&self) -> u32;

    /// Number of processes.
    fn size(&self) -> u32;

    /// Sends letters, and returns what each process sent here, by number; what is for this one comes back as it is. Blocks
    /// until all processes have called it.
    ///
    /// # Errors
    /// [`Error`] if a process is gone, says nothing any more, does not come in time, or if what it sent came as something
    /// else. The wire is of no further use then.
    fn exchange(&mut self, letters: Letters) -> Result<Heard, Error>;
}

/// Whether the micro-batch `part` is of `rank` of `size`. Ranks take turns: what is computed at one time is added up one after the
/// other, so that nobody keeps many parts for their turn to come.
pub const fn owns(rank: u32, size: u32, part: u32) -> bool {
    part % size == rank
}

/// Parts in the order of their shards.
///
/// # Errors
/// [`Error::Twice`] if two ranks sent the same one.
pub fn in_order<T>(mut parts: Parts<T>, exchange: u64) -> Result<Parts<T>, Error> {
    parts.sort_by_key(|(shard, _)| *shard);
    match parts.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        None => Ok(parts),
        Some(pair) => Err(Error::Twice { shard: pair[0].0, exchange }),
    }
}
