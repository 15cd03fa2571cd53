//! What methods share.

pub(crate) mod blocks;
pub(crate) mod factors;
pub(crate) mod own;
pub(crate) mod scaling;
