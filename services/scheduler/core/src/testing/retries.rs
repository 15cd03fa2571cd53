//! What happens after a failure, and when a job is given up.

use std::num::NonZeroU32;
use std::time::Duration;

use attune_spec::id::{Epoch, WorkerId};

use super::desk::{Desk, checkpoint, failed, finished, running, worker};
use crate::{Action, Cause, Input, Outcome, Refusal, Request};

fn request(max_attempts: u32) -> Request {
    Request { max_attempts: NonZeroU32::new(max_attempts).unwrap(), ..Request::default() }
}

#[test]
fn a_job_fails_as_often_as_it_may_and_no_more() {
    for max_attempts in 1..5 {
        let mut desk = Desk::new();
        desk.register("w", 4, Vec::new());
        let key = desk.submit("j", request(max_attempts));
        for n_failed in 1..max_attempts {
            desk.done(running(&key, n_failed.into()));
            desk.done(failed(&key, n_failed.into(), Cause::Hung));
            assert_eq!(desk.state(&key), "backoff failure(hung)", "{n_failed} of {max_attempts}");
            desk.done(Input::Retry { key: key.clone() });
        }
        desk.done(failed(&key, max_attempts.into(), Cause::Hung));
        assert_eq!(desk.state(&key), "failed attempts_exhausted(hung)");
    }
}

#[test]
fn progress_gives_all_attempts_back_and_repetition_of_old_steps_does_not() {
    let mut desk = Desk::new();
    desk.register("w", 4, Vec::new());
    let key = desk.submit("j", request(2));
    let mut epoch = 1;
    for step in [10, 20, 30] {
        desk.done(checkpoint(&key, epoch, step));
        desk.done(failed(&key, epoch, Cause::Hung));
        desk.done(Input::Retry { key: key.clone() });
        epoch += 1;
    }
    // A checkpoint at a step that the job had reached before is no progress.
    desk.done(checkpoint(&key, epoch, 30));
    desk.done(failed(&key, epoch, Cause::Hung));
    assert_eq!(desk.state(&key), "failed attempts_exhausted(hung)");
}

#[test]
fn waits_grow_and_end_by_themselves() {
    let mut desk = Desk::new();
    desk.register("w", 4, Vec::new());
    let key = desk.submit("j", request(9));
    let mut before = Duration::ZERO;
    for epoch in 1..6 {
        desk.done(failed(&key, epoch, Cause::Hung));
        let start_ms = desk.now_ms;
        while desk.row(&key).epoch == Epoch(epoch) {
            desk.wait(Duration::from_millis(100));
            let holding: Vec<_> = desk.row(&key).cohort.into_iter().collect();
            desk.beat("w", &holding);
        }
        let waited = Duration::from_millis(desk.now_ms - start_ms);
        let longest = Duration::from_secs(1 << epoch);
        assert!(waited > longest / 2 && waited <= longest + Duration::from_millis(100), "{epoch}: {waited:?}");
        assert!(waited >= before / 2, "{epoch}: {waited:?} after {before:?}");
        before = waited;
    }
}

#[test]
fn what_cannot_help_is_not_tried() {
    for cause in
        [Cause::OutOfMemory, Cause::SpecFault, Cause::DataFault, Cause::NotFinite, Cause::GateMissed, Cause::TimeLimit]
    {
        let (mut desk, key) = Desk::running();
        desk.done(failed(&key, 1, cause));
        assert_eq!(desk.state(&key), format!("failed failure({cause})"));
    }
}

#[test]
fn two_lost_offers_are_nobodys_fault() {
    let mut desk = Desk::new();
    desk.register("w", 4, Vec::new());
    let key = desk.submit("j", request(1));
    for n_lost in 1..=3 {
        assert_eq!(desk.state(&key), "starting granted", "{n_lost}");
        // The worker comes back and has never heard of it.
        desk.register("w", 4, Vec::new());
        if n_lost < 3 {
            assert_eq!(desk.state(&key), "backoff failure(offer_lost)", "{n_lost}");
            assert_eq!(desk.row(&key).n_failed, 0);
            desk.done(Input::Retry { key: key.clone() });
        }
    }
    assert_eq!(desk.state(&key), "failed attempts_exhausted(offer_lost)");
}

/// F44: the fleet survives a job that kills every worker it meets.
#[test]
fn a_job_that_loses_three_distinct_workers_is_quarantined() {
    let mut desk = Desk::new();
    let key = desk.submit("poison", request(100));
    for (n_lost, name) in [(1, "a"), (2, "b"), (3, "c")] {
        desk.register(name, 1, Vec::new());
        let epoch = desk.row(&key).epoch;
        assert_eq!(desk.row(&key).workers.iter().map(WorkerId::as_str).collect::<Vec<_>>(), [name]);
        desk.done(Input::AttemptRunning { key: key.clone(), epoch, worker: worker(name) });
        desk.wait(Duration::from_secs(10));
        if n_lost < 3 {
            assert_eq!(desk.state(&key), "backoff failure(worker_lost)", "{name}");
            desk.done(Input::Retry { key: key.clone() });
        }
    }
    assert_eq!(desk.state(&key), "failed quarantined(worker_lost)");
}

/// F44: where others are free, the next one to meet it is another one; where none is, one that it has met.
#[test]
fn a_job_meets_another_worker_after_it_has_lost_one() {
    let mut desk = Desk::new();
    let key = desk.submit("poison", request(100));
    let all = ["a", "b", "c", "d"];
    let mut met = Vec::new();
    for name in all {
        desk.register(name, 1, Vec::new());
    }
    for _ in 0..3 {
        let row = desk.row(&key);
        let (epoch, name) = (row.epoch, row.workers.first().unwrap().clone());
        desk.done(Input::AttemptRunning { key: key.clone(), epoch, worker: name.clone() });
        met.push(name.as_str().to_owned());
        // It comes back at once, without the attempt.
        desk.register(name.as_str(), 1, Vec::new());
        if met.len() < 3 {
            assert_eq!(desk.state(&key), "backoff failure(worker_lost)", "{met:?}");
            desk.done(Input::Retry { key: key.clone() });
        }
    }
    assert_eq!(desk.state(&key), "failed quarantined(worker_lost)");
    assert_eq!(met, all[..3], "three different ones");
}

#[test]
fn one_bad_worker_does_not_condemn_a_job() {
    let mut desk = Desk::new();
    desk.register("w", 4, Vec::new());
    let key = desk.submit("j", request(100));
    for epoch in 1..6 {
        desk.done(running(&key, epoch));
        desk.register("w", 4, Vec::new());
        assert_eq!(desk.state(&key), "backoff failure(worker_lost)", "{epoch}");
        desk.done(Input::Retry { key: key.clone() });
    }
}

/// F43: a storm of preemptions does not keep a job from getting ahead.
#[test]
fn a_job_is_not_preempted_again_before_it_has_made_progress() {
    let (mut desk, key) = Desk::running();
    let mut epoch = 1;
    for step in 1..=20 {
        desk.done(Input::Preempt { key: key.clone() });
        desk.repeated(Input::Preempt { key: key.clone() });
        // The worker's devices are free: it is granted again at once.
        desk.done(finished(&key, epoch, Outcome::Stopped));
        let holding: Vec<_> = desk.row(&key).cohort.into_iter().collect();
        desk.beat("w", &holding);
        epoch += 1;
        assert_eq!((desk.state(&key).as_str(), desk.row(&key).epoch), ("starting granted", Epoch(epoch)));
        for _ in 0..5 {
            assert!(matches!(desk.refused(Input::Preempt { key: key.clone() }), Refusal::NoProgress { .. }));
        }
        desk.done(checkpoint(&key, epoch, step));
    }
}

#[test]
fn a_failed_attempt_is_cleared_away() {
    let (mut desk, key) = Desk::running();
    let cohort = desk.row(&key).cohort.unwrap();
    let actions = desk.done(failed(&key, 1, Cause::Hung));
    assert_eq!(actions, [Action::Release { worker: worker("w"), cohort }]);
    assert_eq!(desk.core.worker(&worker("w")).unwrap().free().n_cpu, 3);
    let session = desk.core.worker(&worker("w")).unwrap().session;
    desk.done(Input::CohortGone { worker: worker("w"), session, cohort });
    desk.repeated(Input::CohortGone { worker: worker("w"), session, cohort });
    assert_eq!(desk.core.worker(&worker("w")).unwrap().free().n_cpu, 4);
}
