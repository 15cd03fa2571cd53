//! The one place of this room that reads the wall clock: for times that people read, never for a decision.

/// Milliseconds since 1970.
#[expect(clippy::disallowed_methods, reason = "times of a run are facts for people; decisions use monotonic time")]
pub(crate) fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
