//! The only clock of the training half: it measures speed, and decides nothing.
#![expect(clippy::disallowed_methods, reason = "speed is measured here; no decision and no output depends on it")]

use std::time::{Duration, Instant};

/// A running stopwatch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stopwatch(Instant);

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}
