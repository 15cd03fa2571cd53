//! What several recipes do alike.

pub(crate) mod set;
