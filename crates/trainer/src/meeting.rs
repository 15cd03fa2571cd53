//! Where lanes meet: each that has come brings a piece of work and waits until every lane that is there has brought one or
//! has left; then one of them does all pieces together, and each goes on with its own result.
//!
//! What a piece of work gives must not depend on which others are done with it: who meets whom depends on who is there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A meeting of lanes that bring `W` and take `R`.
#[derive(Debug)]
pub(crate) struct Meeting<W, R> {
    state: Mutex<State<W, R>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<W, R> {
    /// The lanes that have come and not left.
    present: BTreeSet<usize>,
    /// What was brought and is not being done.
    brought: BTreeMap<usize, W>,
    /// What was done and is not taken; nothing for a piece whose doer died.
    done: BTreeMap<usize, Option<R>>,
}

impl<W, R> Meeting<W, R> {
    /// A meeting to which nobody has come.
    pub(crate) fn new() -> Self {
        let state = State { present: BTreeSet::new(), brought: BTreeMap::new(), done: BTreeMap::new() };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State<W, R>> {
        // Nothing is half changed where a lane could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the others who are there, and gives the result of this lane's piece. One of the lanes calls its `work` with
    /// all pieces, in the order of lanes, and it returns their results in that order. Nothing comes back when that lane
    /// panicked.
    pub(crate) fn bring(&self, lane: usize, piece: W, work: impl FnOnce(Vec<W>) -> Vec<R>) -> Option<R> {
        let mut state = self.state();
        state.brought.insert(lane, piece);
        loop {
            if let Some(result) = state.done.remove(&lane) {
                return result;
            }
            let is_whole = state.present.iter().all(|present| state.brought.contains_key(present));
            if is_whole && state.brought.contains_key(&lane) {
                break;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let (lanes, pieces): (Vec<usize>, Vec<W>) = std::mem::take(&mut state.brought).into_iter().unzip();
        drop(state);
        let mut doing = Doing { meeting: self, lanes, results: Vec::new() };
        doing.results = work(pieces);
        drop(doing);
        self.state().done.remove(&lane).flatten()
    }

    /// A lane comes: the others wait for it from now on.
    pub(crate) fn enter(&self, lane: usize) {
        self.state().present.insert(lane);
    }

    /// A lane goes, if it is there: nobody waits for it any more.
    pub(crate) fn leave(&self, lane: usize) {
        self.state().present.remove(&lane);
        self.changed.notify_all();
    }
}

/// Work that is being done; tells those who wait when it is over, also by a panic.
struct Doing<'a, W, R> {
    meeting: &'a Meeting<W, R>,
    lanes: Vec<usize>,
    results: Vec<R>,
}

impl<W, R> Drop for Doing<'_, W, R> {
    fn drop(&mut self) {
        let mut results = std::mem::take(&mut self.results).into_iter();
        let mut state = self.meeting.state();
        state.done.extend(self.lanes.iter().map(|lane| (*lane, results.next())));
        drop(state);
        self.meeting.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Brings `n_rounds` pieces from each lane and leaves; how many pieces were done at a time.
    fn meet(n_rounds: &[u64]) -> Vec<usize> {
        let meeting: Meeting<u64, u64> = Meeting::new();
        (0..n_rounds.len()).for_each(|lane| meeting.enter(lane));
        let sizes = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for (lane, n_rounds) in n_rounds.iter().copied().enumerate() {
                let (meeting, sizes) = (&meeting, &sizes);
                scope.spawn(move || {
                    for round in 0..n_rounds {
                        let piece = lane as u64 * 1000 + round;
                        let all = |pieces: Vec<u64>| {
                            sizes.lock().unwrap().push(pieces.len());
                            assert!(pieces.is_sorted(), "in the order of lanes");
                            pieces.iter().map(|piece| piece * piece).collect()
                        };
                        assert_eq!(meeting.bring(lane, piece, all), Some(piece * piece));
                    }
                    meeting.leave(lane);
                });
            }
        });
        sizes.into_inner().unwrap()
    }

    #[test]
    fn all_who_are_there_work_together() {
        assert_eq!(meet(&[3]), [1, 1, 1]);
        assert_eq!(meet(&[4, 4, 4]), [3; 4]);
        for _ in 0..50 {
            assert_eq!(meet(&[5, 2, 0, 7]), [3, 3, 2, 2, 2, 1, 1]);
        }
    }

    #[test]
    fn nobody_waits_for_who_has_not_come() {
        let meeting: Meeting<u64, u64> = Meeting::new();
        let double = |pieces: Vec<u64>| pieces.iter().map(|piece| 2 * piece).collect();
        meeting.enter(0);
        assert_eq!(meeting.bring(0, 1, double), Some(2));
        meeting.enter(1);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| meeting.bring(0, 3, double));
            assert_eq!(meeting.bring(1, 5, double), Some(10));
            assert_eq!(first.join().unwrap(), Some(6));
        });
        meeting.leave(0);
        meeting.leave(0);
        assert_eq!(meeting.bring(1, 7, double), Some(14));
    }

    #[test]
    fn the_panic_of_one_leaves_nobody_waiting() {
        let meeting: Meeting<(), ()> = Meeting::new();
        (0..3).for_each(|lane| meeting.enter(lane));
        let (n_panics, n_none) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for lane in 0..3 {
                let (meeting, n_panics, n_none) = (&meeting, &n_panics, &n_none);
                scope.spawn(move || {
                    let brought = AssertUnwindSafe(|| meeting.bring(lane, (), |_| panic!("a stumble")));
                    match catch_unwind(brought) {
                        Ok(None) => n_none.fetch_add(1, Ordering::Relaxed),
                        Ok(Some(())) => panic!("a result without work"),
                        Err(_) => n_panics.fetch_add(1, Ordering::Relaxed),
                    };
                    meeting.leave(lane);
                });
            }
        });
        assert_eq!((n_panics.into_inner(), n_none.into_inner()), (1, 2));
    }
}
