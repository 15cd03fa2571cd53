//! What merges share.

pub(crate) mod election;
pub(crate) mod pruning;
pub(crate) mod stacked;
