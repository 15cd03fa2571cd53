//! Who may commit: the fence.

use std::collections::BTreeSet;
use std::time::Duration;

use attune_spec::id::{Digest, Epoch, Step};

use super::desk::{Desk, checkpoint, commit, failed, finished, job, running, worker};
use crate::{Action, Cause, Change, Commit, Input, JobKey, Outcome, Refusal};

#[test]
fn a_live_attempt_commits_and_its_repetition_is_recognised() {
    let (mut desk, key) = Desk::running();
    let effects = desk.step(checkpoint(&key, 1, 10));
    assert!(effects.changes.iter().any(|change| matches!(change, Change::Commit(c) if c.epoch == Epoch(1))));
    desk.repeated(checkpoint(&key, 1, 10));
    desk.done(commit(&key, 1, Commit::Output, 77));
    desk.repeated(commit(&key, 1, Commit::Output, 77));
    assert_eq!(desk.store.commits.len(), 2);
    let row = desk.row(&key);
    assert_eq!(row.checkpoint.map(|c| (c.step, c.epoch)), Some((Step(10), Epoch(1))));
    assert_eq!(row.outputs, BTreeSet::from([Digest::from_bytes([77; 32])]));
    // The answer to the last commit was lost and the job has ended meanwhile.
    desk.done(finished(&key, 1, Outcome::Succeeded));
    desk.repeated(commit(&key, 1, Commit::Output, 77));
}

#[test]
fn a_checkpoint_that_was_long_on_its_way_takes_nobody_back() {
    let (mut desk, key) = Desk::running();
    desk.done(checkpoint(&key, 1, 10));
    desk.done(checkpoint(&key, 1, 20));
    assert!(matches!(desk.refused(checkpoint(&key, 1, 10)), Refusal::OlderCheckpoint { newest: Step(20), .. }));
    assert_eq!(desk.row(&key).checkpoint.unwrap().step, Step(20));
}

/// Forged, older, future and unheard-of tokens; the counter is not advanced by any.
#[test]
fn whoever_has_not_the_live_epoch_commits_nothing() {
    type Case = (&'static str, fn(&mut Desk, &JobKey), Input);
    let key = job("j");
    let other_worker = |input| match input {
        Input::Commit { key, epoch, commit, digest, .. } => {
            Input::Commit { key, epoch, worker: worker("x"), commit, digest }
        }
        other => other,
    };
    let nothing: fn(&mut Desk, &JobKey) = |_, _| {};
    let table: Vec<Case> = vec![
        ("never granted", nothing, checkpoint(&key, 0, 1)),
        ("from the future", nothing, checkpoint(&key, 2, 1)),
        ("the largest", nothing, checkpoint(&key, u64::MAX, 1)),
        ("another worker", nothing, other_worker(checkpoint(&key, 1, 1))),
        ("another job", nothing, checkpoint(&job("k"), 1, 1)),
        ("after its failure", |d, k| drop(d.done(failed(k, 1, Cause::Hung))), checkpoint(&key, 1, 1)),
        ("after its success", |d, k| drop(d.done(finished(k, 1, Outcome::Succeeded))), checkpoint(&key, 1, 1)),
        (
            "after its end by a person",
            |d, k| {
                d.done(Input::Cancel { key: k.clone() });
                d.done(finished(k, 1, Outcome::Stopped));
            },
            commit(&key, 1, Commit::Output, 1),
        ),
        (
            "replaced by a new grant",
            |d, k| {
                d.done(failed(k, 1, Cause::Hung));
                d.wait(Duration::from_secs(3));
                assert_eq!(d.row(k).epoch, Epoch(2));
            },
            checkpoint(&key, 1, 1),
        ),
        (
            "replaced by a grant to the same worker that runs",
            |d, k| {
                d.done(failed(k, 1, Cause::Hung));
                d.wait(Duration::from_secs(3));
                d.done(running(k, 2));
            },
            commit(&key, 1, Commit::Output, 1),
        ),
        ("its worker was silent too long", |d, _| drop(d.wait(Duration::from_secs(10))), checkpoint(&key, 1, 1)),
    ];
    for (name, prepare, input) in table {
        let (mut desk, key) = Desk::running();
        prepare(&mut desk, &key);
        let epoch = desk.row(&key).epoch;
        desk.refused(input);
        assert!(desk.store.commits.is_empty(), "{name}");
        assert_eq!(desk.row(&key).epoch, epoch, "{name}");
    }
}

#[test]
fn a_stopping_attempt_commits_its_last_checkpoint() {
    let (mut desk, key) = Desk::running();
    desk.done(Input::Pause { key: key.clone() });
    desk.done(checkpoint(&key, 1, 30));
    desk.done(finished(&key, 1, Outcome::Stopped));
    assert_eq!(desk.state(&key), "paused pause_asked");
    let offer = desk.done(Input::Resume { key }).into_iter().find_map(|action| match action {
        Action::Offer(offer) => Some(offer),
        _ => None,
    });
    let granted = offer.unwrap().attempts.pop().unwrap();
    assert_eq!((granted.attempt.epoch, granted.checkpoint.unwrap().step), (Epoch(2), Step(30)));
}

#[test]
fn results_of_a_replaced_attempt_are_not_the_jobs() {
    let (mut desk, key) = Desk::running();
    desk.done(commit(&key, 1, Commit::Output, 1));
    desk.done(failed(&key, 1, Cause::Hung));
    desk.wait(Duration::from_secs(3));
    desk.done(running(&key, 2));
    assert!(desk.row(&key).outputs.is_empty());
    desk.done(commit(&key, 2, Commit::Output, 1));
    desk.done(finished(&key, 2, Outcome::Succeeded));
    assert_eq!(desk.row(&key).outputs.len(), 1);
}

/// What an attempt was to begin with is damaged: the next one begins with the checkpoint before it, and what it makes again is new.
#[test]
fn a_damaged_checkpoint_is_replaced_by_the_one_before_it() {
    let mut desk = Desk::new();
    desk.register("w", 8, Vec::new());
    let max_attempts = std::num::NonZeroU32::new(100).unwrap();
    let key = desk.submit("j", crate::Request { max_attempts, ..crate::Request::default() });
    desk.done(running(&key, 1));
    for step in [10, 20, 30] {
        desk.done(checkpoint(&key, 1, step));
    }
    let next = |desk: &mut Desk, epoch, cause| {
        desk.done(failed(&key, epoch, cause));
        desk.done(Input::Retry { key: key.clone() });
        let row = desk.row(&key);
        assert_eq!((row.epoch, row.state), (Epoch(epoch + 1), crate::State::Starting));
        row.checkpoint.map(|checkpoint| checkpoint.step)
    };
    // While it runs, damage is in what it stores, and a process that dies says nothing of its checkpoint.
    assert_eq!(next(&mut desk, 1, Cause::Corrupt), Some(Step(30)));
    assert_eq!(next(&mut desk, 2, Cause::Hung), Some(Step(30)));
    assert_eq!(next(&mut desk, 3, Cause::Corrupt), Some(Step(20)));
    // There is none before that, and the job is not taken back to its beginning.
    assert_eq!(next(&mut desk, 4, Cause::Corrupt), Some(Step(20)));
    desk.done(running(&key, 5));
    desk.done(checkpoint(&key, 5, 30));
    let row = desk.row(&key);
    let steps = [row.older, row.checkpoint].map(|checkpoint| checkpoint.map(|of| (of.step, of.epoch)));
    assert_eq!(steps, [Some((Step(20), Epoch(1))), Some((Step(30), Epoch(5)))]);
    desk.restart();
    assert_eq!(desk.row(&key).older.map(|older| older.step), Some(Step(20)));
}
