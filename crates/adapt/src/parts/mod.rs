//! What methods share.

pub(crate) mod factors;
pub(crate) mod scaling;
