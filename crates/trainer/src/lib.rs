//! One run: from a resolved plan to its artifacts.

pub mod protocol;
