//! All deadlines, in one place and in two orders.
//!
//! Nothing here is stored: a timestamp means nothing to the next scheduler. Restoring sets each timer anew.

use std::collections::{BTreeMap, BTreeSet};

use attune_spec::id::{CohortId, WorkerId};

use crate::{JobKey, Timestamp};

/// What happens at a deadline. Of two at the same time, the one written first here ends first: a silent worker is lost
/// itself, before its leases could be said to have run out one by one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Timer {
    /// A worker that stayed silent is given up.
    Worker(WorkerId),
    /// The lease of one share of a cohort ends.
    Lease(CohortId, WorkerId),
    /// A job that ignores the request to stop is killed.
    Stop(JobKey),
    /// A failed job queues again.
    Backoff(JobKey),
    /// A queued job has waited long enough for others to share a process with.
    Gather(JobKey),
    /// A worker that had no room gets offers again.
    Rest(WorkerId),
    /// After a look in vain: those who could make way for more urgent jobs are looked for again.
    Way,
}

/// A set of timers, each set at most once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Timers {
    at: BTreeMap<Timer, Timestamp>,
    by_time: BTreeSet<(Timestamp, Timer)>,
}

impl Timers {
    /// Sets a timer, or moves it.
    pub(crate) fn set(&mut self, timer: Timer, at: Timestamp) {
        self.clear(&timer);
        self.by_time.insert((at, timer.clone()));
        self.at.insert(timer, at);
    }

    /// Takes a timer away; nothing when it was not set.
    pub(crate) fn clear(&mut self, timer: &Timer) {
        if let Some(at) = self.at.remove(timer) {
            self.by_time.remove(&(at, timer.clone()));
        }
    }

    /// When the timer ends.
    pub(crate) fn get(&self, timer: &Timer) -> Option<Timestamp> {
        self.at.get(timer).copied()
    }

    /// The earliest deadline.
    pub(crate) fn next(&self) -> Option<Timestamp> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Takes away the first timer that is due, earliest first.
    pub(crate) fn pop_due(&mut self, now: Timestamp) -> Option<Timer> {
        let (at, _) = self.by_time.first()?;
        if *at > now {
            return None;
        }
        let (_, timer) = self.by_time.pop_first()?;
        self.at.remove(&timer);
        Some(timer)
    }

    /// Whether anything is watched that a silent scheduler must not judge: a worker or a lease.
    pub(crate) fn watches_workers(&self) -> bool {
        self.at.keys().next().is_some_and(|first| matches!(first, Timer::Lease(..) | Timer::Worker(_)))
    }

    /// Moves every deadline of a lease or worker that is earlier than `at` to `at`.
    pub(crate) fn spare_workers_until(&mut self, at: Timestamp) {
        let watched = |timer: &Timer| matches!(timer, Timer::Lease(..) | Timer::Worker(_));
        let early: Vec<Timer> = self
            .by_time
            .iter()
            .take_while(|(due, _)| *due < at)
            .map(|(_, t)| t)
            .filter(|t| watched(t))
            .cloned()
            .collect();
        for timer in early {
            self.set(timer, at);
        }
    }

    /// Every timer with its deadline.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Timer, Timestamp)> {
        self.at.iter().map(|(timer, at)| (timer, *at))
    }

    /// Whether both orders hold the same.
    pub(crate) fn is_consistent(&self) -> bool {
        self.at.len() == self.by_time.len() && self.by_time.iter().all(|(at, timer)| self.at.get(timer) == Some(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(name: &str) -> Timer {
        Timer::Worker(WorkerId::new(name).unwrap())
    }

    #[test]
    fn timers_come_out_by_time_and_a_moved_one_once() {
        let at = Timestamp::from_millis;
        let mut timers = Timers::default();
        timers.set(worker("a"), at(30));
        timers.set(worker("b"), at(10));
        timers.set(worker("a"), at(20));
        timers.set(worker("c"), at(40));
        timers.clear(&worker("c"));
        assert!(timers.is_consistent());
        assert_eq!((timers.next(), timers.pop_due(at(9))), (Some(at(10)), None));
        assert_eq!(timers.pop_due(at(25)), Some(worker("b")));
        assert_eq!(timers.pop_due(at(25)), Some(worker("a")));
        assert_eq!((timers.pop_due(at(99)), timers.next()), (None, None));
    }

    #[test]
    fn sparing_moves_early_deadlines_only() {
        let at = Timestamp::from_millis;
        let mut timers = Timers::default();
        timers.set(worker("a"), at(10));
        timers.set(worker("b"), at(90));
        timers.spare_workers_until(at(50));
        assert_eq!((timers.get(&worker("a")), timers.get(&worker("b"))), (Some(at(50)), Some(at(90))));
        assert!(timers.is_consistent() && timers.watches_workers());
    }
}
