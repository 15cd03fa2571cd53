//! Where the time of a pass goes. The only clock of the training half: it measures speed, and decides nothing.
#![expect(clippy::disallowed_methods, reason = "speed is measured here; no decision and no output depends on it")]

use std::cell::Cell;
use std::time::{Duration, Instant};

/// A running stopwatch.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts it.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// The time since the start.
    pub fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

/// What time is spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Products with weights.
    Gemm,
    /// Scores, softmax and their gradients.
    Attention,
    /// Norms, rotation, activation functions, copies.
    Elementwise,
    /// What components add beyond the products that they are fused into.
    Adapter,
    /// The last norm, the head and the loss.
    Head,
    /// Waiting, at the end of a pass, for a device to do what it was told.
    Device,
}

impl Work {
    /// All of them, in the order of [`Times`]'s fields.
    pub const ALL: [Self; 6] =
        [Self::Gemm, Self::Attention, Self::Elementwise, Self::Adapter, Self::Head, Self::Device];

    /// The word for it in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gemm => "gemm",
            Self::Attention => "attention",
            Self::Elementwise => "elementwise",
            Self::Adapter => "adapter",
            Self::Head => "head",
            Self::Device => "device",
        }
    }
}

/// Time spent by a pass, by kind of work. On a device it is that of telling it what to do, and [`Work::Device`] what it takes longer;
/// who looks at a result before waits within the work that this is part of or beside them all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Times([Duration; Work::ALL.len()]);

impl Times {
    /// The time spent on one kind.
    pub const fn of(&self, work: Work) -> Duration {
        self.0[work as usize]
    }
}

impl std::ops::AddAssign for Times {
    fn add_assign(&mut self, other: Self) {
        for (sum, part) in self.0.iter_mut().zip(other.0) {
            *sum += part;
        }
    }
}

/// Adds up the times of a pass.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    times: Cell<Times>,
    /// Whether time is already being counted, as a whole.
    whole: Cell<bool>,
}

impl From<Times> for Meter {
    /// One that goes on from these times.
    fn from(times: Times) -> Self {
        Self { times: Cell::new(times), whole: Cell::default() }
    }
}

impl Meter {
    /// Does `f` and counts its time as `work`.
    pub(crate) fn time<R>(&self, work: Work, f: impl FnOnce() -> R) -> R {
        if self.whole.get() {
            return f();
        }
        let watch = Stopwatch::start();
        let result = f();
        self.add(work, watch.elapsed());
        result
    }

    /// Does `f` and counts all its time as `work`, whatever it is spent on.
    pub(crate) fn whole<R>(&self, work: Work, f: impl FnOnce() -> R) -> R {
        let watch = Stopwatch::start();
        self.whole.set(true);
        let result = f();
        self.whole.set(false);
        self.add(work, watch.elapsed());
        result
    }

    fn add(&self, work: Work, time: Duration) {
        let mut times = self.times.get();
        times.0[work as usize] += time;
        self.times.set(times);
    }

    /// The sums so far.
    pub(crate) fn times(&self) -> Times {
        self.times.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_to_its_kind() {
        let meter = Meter::default();
        assert_eq!(meter.time(Work::Attention, || 3), 3);
        let mut sum = meter.times();
        assert_eq!(sum.of(Work::Gemm), Duration::ZERO);
        let once = sum.of(Work::Attention);
        meter.whole(Work::Head, || meter.time(Work::Attention, || ()));
        assert_eq!(meter.times().of(Work::Attention), once);
        sum += sum;
        assert_eq!(sum.of(Work::Attention), 2 * once);
    }
}
