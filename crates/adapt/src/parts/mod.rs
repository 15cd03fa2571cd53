//! What methods share.

pub(crate) mod factors;
