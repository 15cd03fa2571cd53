//! Points in time as the caller read them; this room has no clock.

/// Milliseconds since 1970-01-01 00:00 UTC, for people and records only: no decision depends on it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UtcMs(pub i64);
