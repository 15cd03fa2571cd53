//! Where the time of steps went.

use std::time::Duration;

use attune_models::pass::{Times, Work};

/// Where the time of steps went.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Spent {
    pub(crate) passes: Times,
    pub(crate) data: Duration,
    pub(crate) collective: Duration,
    pub(crate) optimizer: Duration,
    pub(crate) answers: Duration,
    /// Floating-point operations that gradients needed.
    pub(crate) flops: f64,
}

impl Spent {
    /// Every kind of work by its name in metrics; what is left of `whole` is `other`.
    pub(crate) fn shares(&self, whole: Duration) -> Vec<(&'static str, Duration)> {
        let has = |work: &Work| *work != Work::Device || self.passes.of(*work) > Duration::ZERO;
        let passes = Work::ALL.into_iter().filter(has).map(|work| (work.name(), self.passes.of(work)));
        let rest = [("optimizer", self.optimizer), ("data", self.data), ("collective", self.collective)];
        let rest = rest.into_iter().chain((self.answers > Duration::ZERO).then_some(("answers", self.answers)));
        let mut all: Vec<_> = passes.chain(rest).collect();
        let known: Duration = all.iter().map(|(_, time)| *time).sum();
        all.push(("other", whole.saturating_sub(known)));
        all
    }
}

impl std::ops::AddAssign for Spent {
    fn add_assign(&mut self, other: Self) {
        self.passes += other.passes;
        self.data += other.data;
        self.collective += other.collective;
        self.optimizer += other.optimizer;
        self.answers += other.answers;
        self.flops += other.flops;
    }
}

/// Shares of the time of all steps in words, the largest first; what is below half a percent is left out.
pub(crate) fn where_time_went(spent: &Spent, whole: Duration) -> Option<String> {
    let mut shares = spent.shares(whole);
    shares.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
    let percent = |time: Duration| 100.0 * time.as_secs_f64() / whole.as_secs_f64().max(1e-9);
    let words = shares.into_iter().filter(|(_, time)| percent(*time) >= 0.5);
    let words: Vec<String> = words.map(|(work, time)| format!("{work} {:.0} %", percent(time))).collect();
    (!words.is_empty()).then(|| format!("of {:.1} s in steps: {}", whole.as_secs_f64(), words.join(", ")))
}
