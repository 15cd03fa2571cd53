//! Instants as milliseconds since the Unix epoch, spans as [`Duration`].

use std::time::Duration;

use prost_types::Timestamp;

/// Milliseconds since the Unix epoch as a timestamp.
pub fn timestamp(unix_ms: u64) -> Timestamp {
    let seconds = i64::try_from(unix_ms / 1000).unwrap_or(i64::MAX);
    // A remainder of 1000 is below a thousand: times a million it stays below a billion.
    Timestamp { seconds, nanos: (unix_ms % 1000) as i32 * 1_000_000 }
}

/// A timestamp as milliseconds since the Unix epoch, rounded down; before the epoch is 0.
pub fn unix_ms(time: &Timestamp) -> u64 {
    let seconds = u64::try_from(time.seconds).unwrap_or(0);
    seconds.saturating_mul(1000).saturating_add(u64::try_from(time.nanos).unwrap_or(0) / 1_000_000)
}

/// A span as a message; longer than the type can say is its largest value.
pub fn duration(span: Duration) -> prost_types::Duration {
    let seconds = i64::try_from(span.as_secs()).unwrap_or(i64::MAX);
    prost_types::Duration { seconds, nanos: span.subsec_nanos() as i32 }
}

/// A message as a span; `None` if it is absent or negative.
pub fn span(message: Option<&prost_types::Duration>) -> Option<Duration> {
    let message = message?;
    let (seconds, nanos) = (u64::try_from(message.seconds).ok()?, u32::try_from(message.nanos).ok()?);
    Some(Duration::from_secs(seconds).saturating_add(Duration::from_nanos(u64::from(nanos))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_round_trip_in_milliseconds() {
        for ms in [0, 1, 999, 1000, 1_764_100_000_123] {
            assert_eq!(unix_ms(&timestamp(ms)), ms);
        }
        assert_eq!(unix_ms(&Timestamp { seconds: -5, nanos: 0 }), 0);
    }

    #[test]
    fn spans_round_trip_and_negative_ones_are_refused() {
        for span_ in [Duration::ZERO, Duration::from_millis(2500), Duration::from_secs(u64::from(u32::MAX))] {
            assert_eq!(span(Some(&duration(span_))), Some(span_));
        }
        assert_eq!(span(Some(&prost_types::Duration { seconds: -1, nanos: 0 })), None);
        assert_eq!(span(None), None);
    }
}
