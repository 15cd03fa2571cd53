//! Stored text that is not what it should be.

/// A stored text that names no member of a closed list; the row was written by another version, or by hand.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("stored {what} {value:?} is not known; was the row written by a newer version?")]
pub struct ParseError {
    /// What was to be read, such as `state`.
    pub what: &'static str,
    /// The text as stored.
    pub value: String,
}

impl ParseError {
    pub(crate) fn new(what: &'static str, value: &str) -> Self {
        Self { what, value: value.to_owned() }
    }
}

/// Stored rows that do not fit together, so that no scheduler can be started from them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the stored state breaks the invariant {invariant:?}: {detail}")]
pub struct RestoreError {
    /// Name of the invariant, a function of [`invariants`](crate::invariants).
    pub invariant: &'static str,
    /// Which rows break it.
    pub detail: String,
}
