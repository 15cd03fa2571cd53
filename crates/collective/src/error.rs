//! Why an exchange did not happen.

use std::fmt;
use std::time::Duration;

/// What bytes on a wire hash to: enough to find that they are others than were sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Checksum(pub [u8; 16]);

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checksum({self})")
    }
}

/// An exchange that did not happen. The group is of no further use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A rank left the group: it ended, or failed.
    #[error("rank {rank} left the group at exchange {exchange}")]
    Gone {
        /// The rank that left.
        rank: u32,
        /// The exchange, counted from 0, that it did not come to.
        exchange: u64,
    },
    /// A rank did not come in time.
    #[error("rank {rank} did not come to exchange {exchange} within {within:?}")]
    Late {
        /// The first rank that is missing.
        rank: u32,
        /// The exchange, counted from 0.
        exchange: u64,
        /// How long the others waited.
        within: Duration,
    },
    /// A rank's process does not even say that it lives: it hangs, or the network between is cut.
    #[error("nothing was heard of rank {rank} for {within:?}, at exchange {exchange}")]
    Silent {
        /// The rank.
        rank: u32,
        /// The exchange, counted from 0.
        exchange: u64,
        /// For how long.
        within: Duration,
    },
    /// Bytes are not those that were sent: a bit was lost in a memory or on the way.
    #[error(
        "what rank {rank} sent with digest {sent} came with digest {came}, at exchange {exchange}: it has lost a bit"
    )]
    Damaged {
        /// The rank that sent them.
        rank: u32,
        /// The exchange, counted from 0.
        exchange: u64,
        /// What they hashed to where they were sent.
        sent: Checksum,
        /// What they hash to here.
        came: Checksum,
    },
    /// What carries long letters between devices has failed, while all processes live.
    #[error("{link} failed at exchange {exchange}: {what}")]
    Link {
        /// Its name.
        link: &'static str,
        /// The exchange, counted from 0.
        exchange: u64,
        /// What it says.
        what: String,
    },
    /// A group did not come together.
    #[error("rank {rank} was not met within {within:?}: {why}")]
    Unmet {
        /// The first rank that is missing.
        rank: u32,
        /// How long was tried.
        within: Duration,
        /// What came of the last try.
        why: String,
    },
    /// Two ranks sent the same shard.
    #[error("shard {shard} was sent twice to exchange {exchange}")]
    Twice {
        /// The shard.
        shard: u32,
        /// The exchange, counted from 0.
        exchange: u64,
    },
    /// What a rank sent is not what is due.
    #[error("rank {rank} sent something else than was due: {what}")]
    Unexpected {
        /// The rank.
        rank: u32,
        /// What is wrong with it.
        what: String,
    },
}

impl Error {
    /// Whether it only says that some other rank is not there any more: why, that rank knows.
    pub const fn is_of_a_lost_rank(&self) -> bool {
        match self {
            Self::Gone { .. } | Self::Late { .. } | Self::Silent { .. } | Self::Unmet { .. } => true,
            Self::Damaged { .. } | Self::Link { .. } | Self::Twice { .. } | Self::Unexpected { .. } => false,
        }
    }
}
