//! Why an exchange did not happen.

use std::time::Duration;

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
    /// Two ranks sent the same shard.
    #[error("shard {shard} was sent twice to exchange {exchange}")]
    Twice {
        /// The shard.
        shard: u32,
        /// The exchange, counted from 0.
        exchange: u64,
    },
}
