//! Jobs that share a process: packed together, ended one by one, charged for their own faults only.

use std::num::NonZeroU32;
use std::time::Duration;

use attune_spec::id::{CohortId, Digest, Epoch};

use super::desk::{Desk, checkpoint, failed, finished, gang, job, running, worker};
use crate::placement::Blocked;
use crate::{Action, Attempt, Cause, Input, JobKey, Memory, Offer, Outcome, Request};

/// Longer than jobs wait for others to share a process with.
const GATHERED: Duration = Duration::from_secs(3);

fn lane(key: u8) -> Request {
    Request { share: Some(Digest::from_bytes([key; 32])), resources: gang(1, 1), ..Request::default() }
}

fn offer(action: &Action) -> Option<&Offer> {
    match action {
        Action::Offer(offer) => Some(offer),
        _ => None,
    }
}

fn offers(actions: &[Action]) -> Vec<&Offer> {
    actions.iter().filter_map(offer).collect()
}

/// A worker with one device and three jobs that share it and run.
fn three() -> (Desk, [JobKey; 3], CohortId) {
    let mut desk = Desk::new();
    let keys = ["a", "b", "c"].map(|name| desk.submit(name, lane(1)));
    desk.wait(GATHERED);
    let actions = desk.register("w", 1, Vec::new());
    assert_eq!(offers(&actions).len(), 1);
    let offered: Vec<_> = offers(&actions)[0].attempts.iter().map(|granted| granted.attempt.clone()).collect();
    let expected: Vec<_> = keys.iter().map(|key| Attempt { key: key.clone(), epoch: Epoch(1) }).collect();
    assert_eq!(offered, expected);
    for key in &keys {
        desk.done(running(key, 1));
    }
    let cohort = desk.row(&keys[0]).cohort.unwrap();
    (desk, keys, cohort)
}

#[test]
fn jobs_gather_for_a_moment_and_share_one_place() {
    let mut desk = Desk::new();
    desk.register("w", 1, Vec::new());
    let first = desk.submit("a", lane(1));
    assert_eq!(
        (desk.state(&first).as_str(), desk.core.blocked(&first)),
        ("queued submitted", Some(Blocked::Gathering))
    );
    let second = desk.submit("b", lane(1));
    let other = desk.submit("c", lane(2));
    let actions = desk.wait(GATHERED);
    assert_eq!(offers(&actions).iter().map(|offer| offer.attempts.len()).collect::<Vec<_>>(), [2]);
    assert_eq!(desk.row(&first).cohort, desk.row(&second).cohort);
    assert_eq!(desk.core.blocked(&other), Some(Blocked::Occupied), "another key");
    // Whoever comes later is not added.
    let late = desk.submit("d", lane(1));
    let session = desk.core.worker(&worker("w")).unwrap().session;
    desk.wait(GATHERED);
    assert_eq!((desk.core.blocked(&late), session), (Some(Blocked::Occupied), session));
}

#[test]
fn as_many_as_may_share_do_not_wait() {
    let mut desk = Desk::new();
    desk.core.settings.max_lanes = NonZeroU32::new(2).unwrap();
    desk.register("w", 1, Vec::new());
    let first = desk.submit("a", lane(1));
    assert_eq!(desk.state(&first), "queued submitted");
    let second = desk.submit("b", lane(1));
    assert_eq!([&first, &second].map(|key| desk.state(key)), ["starting granted", "starting granted"]);
}

#[test]
fn no_more_share_a_device_than_it_holds() {
    let mut desk = Desk::new();
    let memory = Memory { base: 20, own: 30, pass: 10, full_pass: 15 };
    let keys = ["a", "b", "c"].map(|name| desk.submit(name, Request { memory, ..lane(1) }));
    // Two of them take 95 of its 100 bytes.
    desk.register("w", 1, Vec::new());
    assert_eq!(keys.each_ref().map(|key| desk.row(key).state.code()), ["starting", "starting", "queued"]);
    assert_eq!(desk.row(&keys[0]).cohort, desk.row(&keys[1]).cohort);
}

#[test]
fn what_one_lane_does_leaves_the_others_alone() {
    let (mut desk, [a, b, c], cohort) = three();
    desk.done(checkpoint(&b, 1, 7));
    let dropped = |key: &JobKey| Action::Drop {
        worker: worker("w"),
        cohort,
        attempt: Attempt { key: key.clone(), epoch: Epoch(1) },
    };
    // Its own failure is charged to it.
    assert_eq!(desk.done(failed(&a, 1, Cause::DataFault)), [dropped(&a)]);
    assert_eq!(desk.state(&a), "failed failure(data_fault)");
    desk.done(Input::Cancel { key: b.clone() });
    assert_eq!(desk.done(finished(&b, 1, Outcome::Stopped)), [dropped(&b)]);
    assert_eq!(desk.state(&c), "running started");
    assert_eq!(desk.core.worker(&worker("w")).unwrap().free().n_cpu, 0);
    // The last one ends the cohort.
    assert_eq!(desk.done(finished(&c, 1, Outcome::Succeeded)), [Action::Release { worker: worker("w"), cohort }]);
}

#[test]
fn one_lane_is_preempted_and_queues_for_others() {
    let (mut desk, [a, b, _], cohort) = three();
    desk.done(Input::Preempt { key: a.clone() });
    desk.done(finished(&a, 1, Outcome::Stopped));
    assert_eq!((desk.state(&a).as_str(), desk.row(&b).cohort), ("queued preempted", Some(cohort)));
}

#[test]
fn a_shared_process_that_dies_costs_nobody_an_attempt_and_everybody_the_company() {
    let ways: [fn(&mut Desk, &[JobKey; 3], CohortId); 4] = [
        |desk, _, cohort| {
            let cause = Cause::ChildKilled { signal: 9 };
            desk.done(Input::CohortCrashed { worker: worker("w"), cohort, cause });
        },
        // More memory than one of them needs alone.
        |desk, _, cohort| {
            desk.done(Input::CohortCrashed { worker: worker("w"), cohort, cause: Cause::OutOfMemory });
        },
        |desk, keys, _| {
            for key in keys {
                desk.done(finished(key, 1, Outcome::Crashed(Cause::ChildPanicked)));
            }
        },
        |desk, _, _| drop(desk.register("w", 1, Vec::new())),
    ];
    for way in ways {
        let (mut desk, keys, cohort) = three();
        way(&mut desk, &keys, cohort);
        for key in &keys {
            let row = desk.row(key);
            assert_eq!((row.state.code(), row.n_failed, row.solo), ("backoff", 0, true));
            assert!(row.lost_workers.is_empty());
        }
        desk.register("w", 3, Vec::new());
        for key in &keys {
            desk.done(Input::Retry { key: key.clone() });
        }
        let cohorts: std::collections::BTreeSet<_> = keys.iter().map(|key| desk.row(key).cohort).collect();
        assert_eq!(cohorts.len(), 3, "each runs alone");
        // Alone it is charged, also when its worker says that others were there.
        desk.done(finished(&keys[0], 2, Outcome::Crashed(Cause::Hung)));
        assert_eq!((desk.row(&keys[0]).n_failed, desk.state(&keys[0]).as_str()), (1, "backoff failure(hung)"));
    }
}

#[test]
fn the_last_lane_left_is_alone() {
    let (mut desk, [a, b, c], cohort) = three();
    for key in [&a, &b] {
        desk.done(finished(key, 1, Outcome::Succeeded));
    }
    desk.done(Input::CohortCrashed { worker: worker("w"), cohort, cause: Cause::Hung });
    assert_eq!((desk.row(&c).n_failed, desk.row(&c).solo), (1, false));
}

#[test]
fn an_offer_that_got_lost_is_nobodys_fault() {
    let mut desk = Desk::new();
    let keys = ["a", "b"].map(|name| desk.submit(name, lane(1)));
    desk.wait(GATHERED);
    desk.register("w", 1, Vec::new());
    desk.register("w", 1, Vec::new());
    for key in &keys {
        assert_eq!(desk.state(key), "backoff failure(offer_lost)");
        assert_eq!((desk.row(key).n_failed, desk.row(key).solo), (0, false));
        desk.done(Input::Retry { key: key.clone() });
    }
    desk.wait_beating(GATHERED, "w", &[]);
    assert_eq!(desk.row(&keys[0]).cohort, desk.row(&keys[1]).cohort);
    assert!(desk.row(&keys[0]).cohort.is_some());
}

#[test]
fn a_worker_that_comes_back_says_which_lanes_it_has() {
    let (mut desk, [a, b, c], cohort) = three();
    let mut held = desk.holding(&a);
    held.attempts.retain(|attempt| attempt.key != b);
    desk.done(finished(&c, 1, Outcome::Succeeded));
    let actions = desk.register("w", 1, vec![held]);
    let dropped = actions.iter().any(|action| matches!(action, Action::Drop { attempt, .. } if attempt.key == c));
    assert!(dropped, "it is told that one is over: {actions:?}");
    assert_eq!(desk.state(&b), "backoff failure(worker_lost)");
    assert_eq!((desk.state(&a).as_str(), desk.row(&a).cohort), ("running started", Some(cohort)));
}

#[test]
fn a_restarted_scheduler_knows_the_lanes() {
    let (mut desk, keys, cohort) = three();
    let held = desk.holding(&keys[0]);
    desk.restart();
    let actions = desk.register("w", 1, vec![held]);
    assert!(matches!(&actions[0], Action::Welcome { keep, .. } if *keep == [cohort]), "{actions:?}");
    desk.done(finished(&keys[1], 1, Outcome::Succeeded));
    assert_eq!(keys.map(|key| desk.row(&key).state.code()), ["running", "succeeded", "running"]);
    assert_eq!(desk.row(&job("a")).cohort, Some(cohort));
}
