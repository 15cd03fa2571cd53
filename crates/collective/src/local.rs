//! Ranks that are threads of one process.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::Error;
use crate::{Collective, Parts, in_order};

/// What the ranks share.
struct State<T> {
    /// The exchange that is being filled.
    exchange: u64,
    /// What each rank sent to it.
    sent: Vec<Option<Parts<T>>>,
    /// The result of the exchange before, until every rank has taken it.
    result: Option<Result<Parts<T>, Error>>,
    /// Ranks that have still to take it.
    waiting: u32,
    /// Ranks that are gone, by number.
    gone: Vec<bool>,
    /// What joins this process to others.
    outer: Option<Box<dyn Collective<T>>>,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    deadline: Duration,
    /// The process's number among those of the run, and how many they are.
    process: (u32, u32),
}

/// One rank of a group of threads. Dropping it tells the others that it is gone.
pub struct LocalRank<T> {
    shared: Arc<Shared<T>>,
    rank: u32,
    size: u32,
}

/// A group of `size` ranks whose exchanges have to be complete within `deadline` of the first rank's coming.
pub fn group<T: Clone + Send>(size: u32, deadline: Duration) -> Vec<LocalRank<T>> {
    group_within(size, deadline, None)
}

/// The same as a part of a larger group: `outer` joins this process, with the parts of all its ranks, to others that have
/// as many. It may take as long as it likes: its own limits hold for it.
pub fn group_within<T: Clone + Send>(
    size: u32,
    deadline: Duration,
    outer: Option<Box<dyn Collective<T>>>,
) -> Vec<LocalRank<T>> {
    let sent = (0..size).map(|_| None).collect();
    let process = outer.as_ref().map_or((0, 1), |outer| (outer.rank(), outer.size()));
    let state = State { exchange: 0, sent, result: None, waiting: 0, gone: vec![false; size as usize], outer };
    let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), deadline, process });
    (0..size).map(|rank| LocalRank { shared: Arc::clone(&shared), rank, size }).collect()
}

impl<T> Shared<T> {
    /// A rank that panicked while holding the lock left only complete values behind: each change is one assignment.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`; `None` when the deadline passes first.
    fn wait_until<'a>(
        &'a self,
        state: MutexGuard<'a, State<T>>,
        mut done: impl FnMut(&State<T>) -> bool,
    ) -> (MutexGuard<'a, State<T>>, bool) {
        let waited = self.changed.wait_timeout_while(state, self.deadline, |state| !done(state));
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        (state, !timeout.timed_out())
    }
}

impl<T> LocalRank<T> {
    /// The number among the ranks of all processes of one of this process's.
    fn global(&self, rank: usize) -> u32 {
        self.shared.process.0 * self.size + rank as u32
    }
}

impl<T: Clone + Send> Collective<T> for LocalRank<T> {
    fn rank(&self) -> u32 {
        self.shared.process.0 * self.size + self.rank
    }

    fn size(&self) -> u32 {
        self.shared.process.1 * self.size
    }

    fn exchange(&mut self, parts: Parts<T>) -> Result<Parts<T>, Error> {
        let mut state = self.shared.lock();
        // Whoever is fast waits here until the slow ones have taken the result before.
        let (waited, in_time) = self.shared.wait_until(state, |state| state.waiting == 0);
        state = waited;
        let exchange = state.exchange;
        if !in_time {
            let rank = self.global(state.sent.iter().position(Option::is_none).unwrap_or(0));
            return Err(Error::Late { rank, exchange, within: self.shared.deadline });
        }
        state.sent[self.rank as usize] = Some(parts);
        if state.sent.iter().all(Option::is_some) {
            let sent: Parts<T> = state.sent.iter_mut().filter_map(Option::take).flatten().collect();
            let whole = in_order(sent, exchange);
            // The others wait for the result, and find it when the lock is theirs again.
            let whole = match &mut state.outer {
                Some(outer) => whole.and_then(|parts| outer.exchange(parts)),
                None => whole,
            };
            state.result = Some(whole);
            state.waiting = self.size;
            state.exchange += 1;
            self.shared.changed.notify_all();
        } else {
            self.shared.changed.notify_all();
            let done = |state: &State<T>| state.exchange > exchange || missing_and_gone(state).is_some();
            let (waited, in_time) = self.shared.wait_until(state, done);
            state = waited;
            if state.exchange == exchange {
                return Err(match missing_and_gone(&state) {
                    Some(rank) => Error::Gone { rank: self.global(rank), exchange },
                    None => {
                        debug_assert!(!in_time, "the wait ends by an exchange, a lost rank or the deadline");
                        let rank = self.global(state.sent.iter().position(Option::is_none).unwrap_or(0));
                        Error::Late { rank, exchange, within: self.shared.deadline }
                    }
                });
            }
        }
        state.waiting -= 1;
        let result = if state.waiting == 0 { state.result.take() } else { state.result.clone() };
        self.shared.changed.notify_all();
        result.unwrap_or(Err(Error::Gone { rank: self.rank(), exchange }))
    }

    /// Those of the process, for the first of its ranks that asks.
    fn take_waits(&mut self) -> Vec<Duration> {
        self.shared.lock().outer.as_mut().map(|outer| outer.take_waits()).unwrap_or_default()
    }
}

/// The first rank that has sent nothing and never will.
fn missing_and_gone<T>(state: &State<T>) -> Option<usize> {
    state.sent.iter().zip(&state.gone).position(|(sent, gone)| sent.is_none() && *gone)
}

impl<T> Drop for LocalRank<T> {
    fn drop(&mut self) {
        self.shared.lock().gone[self.rank as usize] = true;
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::owns;

    fn run<R: Send>(size: u32, deadline_ms: u64, work: impl Fn(LocalRank<f32>) -> R + Sync) -> Vec<R> {
        let ranks = group(size, Duration::from_millis(deadline_ms));
        std::thread::scope(|scope| {
            let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(|| work(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// Sums whose result depends on the order: large and small numbers of both signs.
    fn value(shard: u32, round: u64) -> f32 {
        let sign = if shard.is_multiple_of(2) { 1.0 } else { -1.0 };
        sign * 10f32.powi((shard as i32 * 3 + round as i32) % 8) / 3.0
    }

    #[test]
    fn sums_over_shards_have_the_same_bits_for_any_number_of_ranks() {
        let sums = |size: u32| {
            let work = |mut rank: LocalRank<f32>| {
                (0..20)
                    .map(|round| {
                        let mine = (0..8).filter(|shard| owns(rank.rank(), size, *shard));
                        let mine = mine.map(|shard| (shard, value(shard, round))).collect();
                        rank.exchange(mine).unwrap().iter().fold(0.0f32, |sum, (_, part)| sum + part).to_bits()
                    })
                    .collect::<Vec<u32>>()
            };
            let mut all = run(size, 10_000, work);
            let first = all.remove(0);
            assert!(all.iter().all(|other| *other == first));
            first
        };
        let one = sums(1);
        for size in [2, 4, 8] {
            assert_eq!(sums(size), one, "{size} ranks");
        }
    }

    #[test]
    fn a_rank_that_leaves_ends_the_others_at_once() {
        let results = run(3, 60_000, |mut rank| {
            rank.exchange(vec![(rank.rank(), 0.0)]).unwrap();
            if rank.rank() == 1 {
                return None;
            }
            Some(rank.exchange(vec![(rank.rank(), 0.0)]).unwrap_err())
        });
        assert_eq!(
            results,
            [Some(Error::Gone { rank: 1, exchange: 1 }), None, Some(Error::Gone { rank: 1, exchange: 1 })]
        );
    }

    #[test]
    fn a_rank_that_does_not_come_is_named_after_the_deadline() {
        let mut ranks = group::<f32>(2, Duration::from_millis(50));
        let _silent = ranks.pop();
        let error = ranks[0].exchange(vec![(0, 1.0)]).unwrap_err();
        assert_eq!(error, Error::Late { rank: 1, exchange: 0, within: Duration::from_millis(50) });
    }

    #[test]
    fn a_shard_that_two_ranks_send_is_refused_on_both() {
        let results = run(2, 10_000, |mut rank| rank.exchange(vec![(5, 1.0)]).unwrap_err());
        assert_eq!(results, vec![Error::Twice { shard: 5, exchange: 0 }; 2]);
    }
}
