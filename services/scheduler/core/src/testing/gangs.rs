//! Gangs: whole or not at all, and one failure for all ranks.

use attune_spec::id::{Epoch, WorkerId};

use super::desk::{Desk, gang, job, worker};
use crate::placement::Blocked;
use crate::{Action, Cause, Commit, Input, JobKey, Outcome, Refusal, Request};

fn of(workers: u32, devices: u32) -> Request {
    Request { resources: gang(workers, devices), ..Request::default() }
}

fn two() -> (Desk, JobKey) {
    let mut desk = Desk::new();
    desk.register("a", 2, Vec::new());
    desk.register("b", 2, Vec::new());
    let key = desk.submit("j", of(2, 2));
    (desk, key)
}

#[test]
fn a_gang_waits_until_it_is_whole() {
    let mut desk = Desk::new();
    let key = desk.submit("j", of(2, 2));
    assert_eq!(desk.core.blocked(&key), Some(Blocked::NoWorkers));
    assert!(!desk.register("a", 2, Vec::new()).iter().any(|action| matches!(action, Action::Offer(_))));
    assert_eq!(desk.core.blocked(&key), Some(Blocked::TooFewWorkers));
    let offer = |action| match action {
        Action::Offer(offer) => Some((offer.share.rank, offer.share.worker, offer.gang)),
        _ => None,
    };
    let offers: Vec<_> = desk.register("b", 2, Vec::new()).into_iter().filter_map(offer).collect();
    let names = vec![worker("a"), worker("b")];
    assert_eq!(offers, [(0, worker("a"), names.clone()), (1, worker("b"), names)]);
    assert_eq!((desk.core.blocked(&key), desk.state(&key).as_str()), (None, "starting granted"));
}

/// F9: one rank's death is one failure of the attempt, and the other ranks are killed.
#[test]
fn the_crash_of_one_rank_ends_the_attempt_once() {
    let (mut desk, key) = two();
    let cohort = desk.row(&key).cohort.unwrap();
    let crash =
        |name: &str| Input::CohortCrashed { worker: worker(name), cohort, cause: Cause::ChildKilled { signal: 11 } };
    let actions = desk.done(crash("b"));
    let release = |name: &str| Action::Release { worker: worker(name), cohort };
    assert_eq!(actions, [release("a"), release("b")]);
    assert!(matches!(desk.refused(crash("a")), Refusal::CohortOver { .. }));
    assert_eq!(desk.row(&key).n_failed, 1);
}

#[test]
fn only_the_leader_speaks_for_the_gang() {
    let (mut desk, key) = two();
    let says = |name: &str, outcome| Input::AttemptFinished {
        key: key.clone(),
        epoch: Epoch(1),
        worker: worker(name),
        outcome,
    };
    let digest = attune_spec::id::Digest::from_bytes([1; 32]);
    let commits = |name: &str| Input::Commit {
        key: key.clone(),
        epoch: Epoch(1),
        worker: worker(name),
        commit: Commit::Output,
        digest,
    };
    for input in [says("b", Outcome::Succeeded), says("b", Outcome::Stopped), commits("b")] {
        assert!(matches!(desk.refused(input), Refusal::NotTheLeader { .. }));
    }
    desk.done(commits("a"));
    desk.done(says("a", Outcome::Succeeded));
    assert_eq!(desk.state(&key), "succeeded finished");
}

#[test]
fn a_large_gang_is_not_starved_and_holds_nobody_up_once_it_is_cancelled() {
    let mut desk = Desk::new();
    desk.register("a", 2, Vec::new());
    desk.register("b", 2, Vec::new());
    let first = desk.submit("first", of(1, 1));
    let large = desk.submit("large", of(2, 2));
    let small = desk.submit("small", of(1, 1));
    assert_eq!(desk.state(&first), "starting granted");
    assert_eq!(desk.core.blocked(&large), Some(Blocked::Occupied));
    // Devices are free for the small one, but the large one goes first.
    assert_eq!(desk.core.blocked(&small), Some(Blocked::Behind));
    desk.done(Input::Cancel { key: large });
    assert_eq!(desk.state(&small), "starting granted");
}

#[test]
fn a_gang_that_no_longer_fits_the_fleet_holds_nobody_up() {
    let ways: [fn(&mut Desk); 2] = [
        |desk| drop(desk.done(Input::Drain { worker: worker("b") })),
        |desk| {
            let session = desk.core.worker(&worker("b")).unwrap().session;
            desk.done(Input::Disconnect { worker: worker("b"), session });
            desk.repeated(Input::Disconnect { worker: worker("b"), session });
        },
    ];
    for way in ways {
        let mut desk = Desk::new();
        desk.register("a", 2, Vec::new());
        desk.register("b", 2, Vec::new());
        desk.submit("first", of(1, 1));
        desk.submit("large", of(2, 2));
        let small = desk.submit("small", of(1, 1));
        assert_eq!(desk.state(&small), "queued submitted");
        way(&mut desk);
        assert_eq!(desk.state(&small), "starting granted");
    }
}

#[test]
fn priority_goes_first_then_age() {
    let mut desk = Desk::new();
    for (name, priority) in [("old", 0), ("young", 0), ("urgent", 9), ("idle", -1)] {
        desk.submit(name, Request { priority, ..of(1, 1) });
    }
    let order: Vec<_> = desk.core.queue().map(|key| key.job.as_str().to_owned()).collect();
    assert_eq!(order, ["urgent", "old", "young", "idle"]);
    desk.register("w", 2, Vec::new());
    let states = ["urgent", "old", "young", "idle"].map(|name| desk.row(&job(name)).state.code());
    assert_eq!(states, ["starting", "starting", "queued", "queued"]);
}

#[test]
fn a_job_goes_back_to_where_it_ran() {
    let mut desk = Desk::new();
    desk.register("a", 1, Vec::new());
    desk.register("b", 9, Vec::new());
    let on = |desk: &Desk, key: &JobKey| desk.row(key).workers.iter().map(WorkerId::to_string).collect::<Vec<_>>();
    let (first, second) = (desk.submit("first", of(1, 1)), desk.submit("second", of(1, 1)));
    assert_eq!((on(&desk, &first), on(&desk, &second)), (vec!["a".to_owned()], vec!["b".to_owned()]));
    let crashed = desk.row(&second).cohort.unwrap();
    desk.done(Input::CohortCrashed { worker: worker("b"), cohort: crashed, cause: Cause::Hung });
    desk.done(Input::CohortCrashed {
        worker: worker("a"),
        cohort: desk.row(&first).cohort.unwrap(),
        cause: Cause::Hung,
    });
    let session = desk.core.worker(&worker("a")).unwrap().session;
    desk.done(Input::Heartbeat { worker: worker("a"), session, beat: 1, holding: Vec::new() });
    desk.done(Input::Retry { key: second.clone() });
    assert_eq!(on(&desk, &second), ["b"]);
}
