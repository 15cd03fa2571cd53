//! Every state against every input: what is legal, what is a repetition, what is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::desk::{Desk, failed, finished, gang, job, running, worker};
use crate::{Answer, Cause, EventKind, Input, JobKey, Outcome, Request, State};

const INPUTS: &str = "cancel pause resume retry preempt runs succeeded stopped hung spec crash drain silence";

/// The state after the input; `.` the same state, `=` recognised as a repetition, `!` refused.
const TABLE: &str = "
waiting:           cancelled        !              !      !      !                 !       !         !      !       !      !       .                 .
queued:            cancelled        !              !      !      !                 !       !         !      !       !      !       .                 .
starting:          stopping(cancel) stopping(pause) !     !      stopping(preempt) running succeeded queued backoff failed backoff stopping(preempt) backoff
running:           stopping(cancel) stopping(pause) !     !      stopping(preempt) =       succeeded queued backoff failed backoff stopping(preempt) backoff
stopping(preempt): stopping(cancel) stopping(pause) !     !      =                 !       queued    queued queued  queued queued  .                 queued
stopping(pause):   stopping(cancel) =              !      !      !                 !       paused    paused paused  paused paused  .                 paused
stopping(cancel):  =                !              !      !      !                 !       cancelled cancelled cancelled cancelled cancelled . cancelled
backoff:           cancelled        !              !      queued !                 !       !         !      !       !      !       .                 queued
paused:            cancelled        =              queued !      !                 !       !         !      !       !      !       .                 .
succeeded:         !                !              !      !      !                 !       =         !      !       !      !       .                 .
failed:            !                !              !      !      !                 !       !         !      !       !      !       .                 .
cancelled:         =                !              !      !      !                 !       !         !      !       !      !       .                 .
";

/// A desk whose job `j` is in this state. Its worker `w` stays occupied, so that nothing is granted afterwards.
fn desk_with(state: &str) -> (Desk, JobKey) {
    let mut desk = Desk::new();
    desk.register("w", 4, Vec::new());
    let all = Request { resources: gang(1, 4), ..Request::default() };
    if let "waiting" | "queued" = state {
        let other = desk.submit("other", all.clone());
        let after = BTreeSet::from_iter((state == "waiting").then_some(other.job));
        let key = desk.submit("j", Request { after, ..all });
        return (desk, key);
    }
    let key = desk.submit("j", all);
    let ask: Option<fn(JobKey) -> Input> = match state {
        "stopping(preempt)" => Some(|key| Input::Preempt { key }),
        "stopping(pause)" | "paused" => Some(|key| Input::Pause { key }),
        "stopping(cancel)" | "cancelled" => Some(|key| Input::Cancel { key }),
        _ => None,
    };
    if state != "starting" {
        desk.done(running(&key, 1));
    }
    if let Some(ask) = ask {
        desk.done(ask(key.clone()));
    }
    match state {
        "backoff" => drop(desk.done(failed(&key, 1, Cause::Hung))),
        "failed" => drop(desk.done(failed(&key, 1, Cause::SpecFault))),
        "paused" | "cancelled" => drop(desk.done(finished(&key, 1, Outcome::Stopped))),
        "succeeded" => drop(desk.done(finished(&key, 1, Outcome::Succeeded))),
        _ => {}
    }
    (desk, key)
}

fn feed(desk: &mut Desk, key: &JobKey, name: &str) -> Answer {
    let key = key.clone();
    let input = match name {
        "cancel" => Input::Cancel { key },
        "pause" => Input::Pause { key },
        "resume" => Input::Resume { key },
        "retry" => Input::Retry { key },
        "preempt" => Input::Preempt { key },
        "runs" => running(&key, 1),
        "succeeded" => finished(&key, 1, Outcome::Succeeded),
        "stopped" => finished(&key, 1, Outcome::Stopped),
        "hung" => failed(&key, 1, Cause::Hung),
        "spec" => failed(&key, 1, Cause::SpecFault),
        "crash" => {
            let cohort = desk.row(&key).cohort.unwrap_or_default();
            Input::CohortCrashed { worker: worker("w"), cohort, cause: Cause::ChildKilled { signal: 9 } }
        }
        "drain" => Input::Drain { worker: worker("w") },
        "silence" => {
            desk.wait(Duration::from_secs(10));
            return Answer::Done;
        }
        _ => unreachable!("{name}"),
    };
    desk.step(input).answer
}

#[test]
fn every_state_against_every_input() {
    let mut wrong = Vec::new();
    let mut n_cells = 0;
    let mut arrows: BTreeSet<(State, State)> = BTreeSet::new();
    for line in TABLE.lines().filter(|line| !line.is_empty()) {
        let (state, cells) = line.split_once(':').unwrap();
        let cells: Vec<&str> = cells.split_whitespace().collect();
        assert_eq!(cells.len(), INPUTS.split_whitespace().count(), "{state}");
        for (name, expected) in INPUTS.split_whitespace().zip(cells) {
            let (mut desk, key) = desk_with(state);
            assert_eq!(desk.row(&key).state.code(), state);
            let found = match feed(&mut desk, &key, name) {
                Answer::Repeated => "=",
                Answer::Refused(_) => "!",
                Answer::Done if desk.row(&key).state.code() == state => ".",
                Answer::Done => desk.row(&key).state.code(),
            };
            if found != expected {
                wrong.push(format!("{state} on {name}: {found}, expected {expected}"));
            }
            n_cells += 1;
            arrows.extend(desk.store.log.iter().filter_map(|event| match event.kind {
                EventKind::Moved { from, to, .. } => Some((from, to)),
                EventKind::Submitted { .. }
                | EventKind::DependencyMet { .. }
                | EventKind::Stage { .. }
                | EventKind::Committed { .. } => None,
            }));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(n_cells, 12 * 13);

    // With what happens to the jobs behind a dependency, and to those of stages, every arrow that exists has been walked.
    arrows.extend([State::Queued, State::Failed, State::Succeeded].map(|to| (State::Waiting, to)));
    let existing = State::ALL.into_iter().flat_map(|from| State::ALL.map(|to| (from, to)));
    let existing: BTreeSet<_> = existing.filter(|(from, to)| from.may_become(*to)).collect();
    assert_eq!(arrows, existing);
}

#[test]
fn a_job_that_does_not_exist_is_refused_by_name() {
    let mut desk = Desk::new();
    for name in INPUTS.split_whitespace().take(10) {
        let Answer::Refused(refusal) = ({
            let key = job("nobody");
            let input = match name {
                "cancel" => Input::Cancel { key },
                "pause" => Input::Pause { key },
                "resume" => Input::Resume { key },
                "retry" => Input::Retry { key },
                "preempt" => Input::Preempt { key },
                "runs" => running(&key, 1),
                _ => finished(&key, 1, Outcome::Succeeded),
            };
            desk.step(input).answer
        }) else {
            panic!("{name} was accepted")
        };
        assert_eq!(refusal.to_string(), "job projects/default/jobs/nobody does not exist", "{name}");
    }
}

#[test]
fn each_state_tells_why() {
    let table: &[(&str, &str, &str)] = &[
        ("waiting", "drain", "waiting dependency_pending"),
        ("queued", "drain", "queued submitted"),
        ("starting", "runs", "running started"),
        ("running", "cancel", "stopping(cancel) cancel_asked"),
        ("running", "pause", "stopping(pause) pause_asked"),
        ("running", "preempt", "stopping(preempt) preempt_asked"),
        ("running", "drain", "stopping(preempt) worker_draining"),
        ("running", "hung", "backoff failure(hung)"),
        ("running", "spec", "failed failure(spec_fault)"),
        ("running", "crash", "backoff failure(child_killed(9))"),
        ("running", "silence", "backoff failure(worker_lost)"),
        ("starting", "silence", "backoff failure(offer_lost)"),
        ("running", "succeeded", "succeeded finished"),
        ("stopping(preempt)", "stopped", "queued preempted"),
        ("stopping(pause)", "stopped", "paused pause_asked"),
        ("stopping(cancel)", "stopped", "cancelled cancel_asked"),
        ("backoff", "retry", "queued retry_asked"),
        ("backoff", "silence", "queued backoff_over"),
        ("paused", "resume", "queued resumed"),
    ];
    for (state, input, expected) in table {
        let (mut desk, key) = desk_with(state);
        feed(&mut desk, &key, input);
        assert_eq!(desk.state(&key), *expected, "{state} on {input}");
    }
}

#[test]
fn a_submission_repeated_is_one_job_and_another_under_its_name_is_refused() {
    let mut desk = Desk::new();
    let submit = |priority| Input::Submit {
        key: job("j"),
        request: Request { priority, ..Request::default() },
        finished: BTreeMap::new(),
    };
    desk.done(submit(1));
    desk.repeated(submit(1));
    assert_eq!(
        desk.refused(submit(2)).to_string(),
        "job projects/default/jobs/j exists already, with another specification"
    );
    assert_eq!(desk.core.jobs().count(), 1);
}
