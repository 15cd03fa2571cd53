//! The scheduler dies and starts again from its rows.

use std::time::Duration;

use attune_spec::id::{CohortId, Epoch};

use super::desk::{Desk, checkpoint, failed, finished, running, worker};
use crate::{Action, Cause, Core, Input, Outcome, Request, Rules, Settings, Timestamp};

/// F3, F8: running attempts go on, and nobody is expired before a whole lease has passed.
#[test]
fn a_restart_disturbs_nobody() {
    let (mut desk, key) = Desk::running();
    let holding = desk.holding(&key);
    desk.wait(Duration::from_secs(9));
    desk.restart();
    desk.wait(Duration::from_millis(9_900));
    assert_eq!(desk.state(&key), "running started");
    let actions = desk.register("w", 4, vec![holding.clone()]);
    let Action::Welcome { keep, .. } = &actions[0] else { panic!("{actions:?}") };
    assert_eq!((keep.as_slice(), actions.len()), ([holding.cohort].as_slice(), 1));
    desk.wait_beating(Duration::from_secs(60), "w", &[holding.cohort]);
    desk.done(checkpoint(&key, 1, 3));
    desk.done(finished(&key, 1, Outcome::Succeeded));
}

#[test]
fn a_worker_that_does_not_come_back_is_lost_after_one_lease() {
    let (mut desk, key) = Desk::running();
    desk.restart();
    desk.wait(Duration::from_millis(9_999));
    assert_eq!(desk.state(&key), "running started");
    desk.wait(Duration::from_millis(1));
    assert_eq!(desk.state(&key), "backoff failure(worker_lost)");
}

/// What the attempt says needs no registration: the rows know who it is.
#[test]
fn an_attempt_may_commit_before_its_worker_is_back() {
    let (mut desk, key) = Desk::running();
    desk.restart();
    desk.done(checkpoint(&key, 1, 3));
    desk.done(finished(&key, 1, Outcome::Succeeded));
    assert_eq!(desk.state(&key), "succeeded finished");
}

#[test]
fn epochs_and_numbers_grow_across_restarts() {
    let (mut desk, key) = Desk::running();
    for epoch in 1..5 {
        let cohort = desk.row(&key).cohort.unwrap();
        assert_eq!((desk.row(&key).epoch, cohort), (Epoch(epoch), CohortId(epoch)));
        desk.done(checkpoint(&key, epoch, u8::try_from(epoch).unwrap()));
        desk.done(failed(&key, epoch, Cause::ChildPanicked));
        desk.restart();
        desk.register("w", 4, Vec::new());
        desk.done(Input::Retry { key: key.clone() });
        desk.refused(checkpoint(&key, epoch, 99));
    }
}

#[test]
fn a_stop_and_a_wait_survive_a_restart() {
    let (mut desk, key) = Desk::running();
    let holding = desk.holding(&key);
    desk.done(Input::Cancel { key: key.clone() });
    desk.restart();
    let actions = desk.register("w", 4, vec![holding.clone()]);
    assert!(actions.iter().any(|action| matches!(action, Action::Stop { .. })), "{actions:?}");
    desk.wait_beating(Duration::from_secs(45), "w", &[holding.cohort]);
    assert_eq!(desk.state(&key), "cancelled cancel_asked");

    let (mut desk, key) = Desk::running();
    desk.done(failed(&key, 1, Cause::Hung));
    desk.restart();
    assert_eq!(desk.state(&key), "backoff failure(hung)");
    desk.wait(Duration::from_secs(2));
    assert_eq!(desk.state(&key), "queued backoff_over");
}

#[test]
fn an_offer_that_died_with_the_scheduler_is_made_again() {
    let (mut desk, key) = Desk::starting();
    desk.restart();
    desk.register("w", 4, Vec::new());
    assert_eq!(desk.state(&key), "backoff failure(offer_lost)");
    assert_eq!(desk.row(&key).n_failed, 0);
    let actions = desk.wait(Duration::from_secs(2));
    assert!(actions.iter().any(|action| matches!(action, Action::Offer(o) if o.attempts[0].attempt.epoch == Epoch(2))));
    desk.done(running(&key, 2));
}

/// A45: rows that do not fit together start no scheduler, and the message says which.
#[test]
fn rows_that_do_not_fit_are_refused() {
    let (desk, key) = Desk::running();
    let rows = || (desk.store.jobs.values().cloned(), desk.store.cohorts.values().cloned(), desk.store.counters);
    let restore = |(jobs, cohorts): (Vec<_>, Vec<_>), counters| {
        let error = Core::restore(Settings::default(), jobs, cohorts, Rules::default(), counters, Timestamp::default());
        let error = error.unwrap_err();
        (error.invariant, error.to_string())
    };
    let (jobs, cohorts, counters) = rows();
    let (name, text) = restore((jobs.collect(), Vec::new()), counters);
    assert_eq!((name, text.contains("projects/default/jobs/j")), ("one_live_epoch", true), "{text}");
    assert_eq!(restore((Vec::new(), cohorts.collect()), counters).0, "one_live_epoch");

    let (jobs, cohorts, counters) = rows();
    let older = jobs.map(|mut job| {
        job.epoch = Epoch(7);
        job
    });
    assert_eq!(restore((older.collect(), cohorts.collect()), counters).0, "one_live_epoch");

    let (jobs, cohorts, counters) = rows();
    let forgetful = crate::Counters { next_cohort: CohortId(1), ..counters };
    assert_eq!(restore((jobs.collect(), cohorts.collect()), forgetful).0, "one_live_epoch");

    let (jobs, cohorts, counters) = rows();
    let smaller = cohorts.map(|mut cohort| {
        cohort.shares.clear();
        cohort
    });
    assert_eq!(restore((jobs.collect(), smaller.collect()), counters).0, "gang_whole");
    assert_eq!(desk.row(&key).workers.first(), Some(&worker("w")));

    // A job that waits for one that is not there.
    let mut desk = Desk::new();
    let first = desk.submit("first", Request::default());
    let second = Request { after: [first.job.clone()].into(), ..Request::default() };
    desk.submit("second", second);
    let jobs: Vec<_> = desk.store.jobs.values().filter(|job| job.key != first).cloned().collect();
    assert_eq!(restore((jobs, Vec::new()), desk.store.counters).0, "no_job_lost");
}
