//! Micro-batches side by side: results are those of one after the other, for each is computed alone.
//!
//! The matrix library's own threads wait for each other by spinning, several times in each operation; on a machine that
//! does something else besides, that costs more than it brings. Whole micro-batches in parallel wait once in a step. So a
//! process that trains is started with few threads for the library ([`variable`]), and the lanes use the others.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Micro-batches that a step usually has, and at most so many lanes that each has work.
const USUAL_SHARDS: usize = 8;

/// The environment variable that a process that trains should be started with, unless its user has set it: what the matrix
/// library may use of the processors when micro-batches run side by side.
pub fn variable() -> (&'static str, String) {
    ("RAYON_NUM_THREADS", (processors() / USUAL_SHARDS).max(1).to_string())
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// How many micro-batches are computed at a time when `ranks` ranks share the machine: as many as the processors that the
/// matrix library and the other ranks leave.
pub(crate) fn lanes(ranks: u32) -> usize {
    (processors() / candle_core::utils::get_num_threads().max(1) / (ranks as usize).max(1)).max(1)
}

/// `work` on each item, at most `lanes` at a time; the results in the order of the items.
pub(crate) fn each<T: Sync, R: Send>(lanes: usize, items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let lanes = lanes.min(items.len());
    if lanes <= 1 {
        return items.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let lane = || {
        let mut done = Vec::new();
        while let Some((index, item)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, items.get(i)?)))
        {
            done.push((index, work(item)));
        }
        done
    };
    let mut results: Vec<(usize, R)> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..lanes).map(|_| scope.spawn(lane)).collect();
        let mut results = lane();
        for other in others {
            // A lane's panic goes on in the rank, which reports it.
            results.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        results
    });
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_each_item_once() {
        let items: Vec<u32> = (0..50).collect();
        let squares: Vec<u32> = items.iter().map(|item| item * item).collect();
        for lanes in [0, 1, 3, 80] {
            assert_eq!(each(lanes, &items, |item| item * item), squares, "{lanes} lanes");
        }
        assert_eq!(each(4, &[] as &[u32], |item| *item), [0; 0]);
    }

    #[test]
    fn a_panic_is_not_lost() {
        let items: Vec<u32> = (0..20).collect();
        let panic = std::panic::catch_unwind(|| each(3, &items, |item| assert!(*item != 7, "seven"))).unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"seven"));
    }

    #[test]
    fn there_is_always_one_lane_and_one_thread() {
        assert!(variable().1.parse::<usize>().unwrap() >= 1);
        assert!(lanes(1) >= 1);
        assert_eq!(lanes(u32::MAX), 1);
    }
}
