//! Jobs that come after others.

use std::collections::{BTreeMap, BTreeSet};

use super::desk::{Desk, failed, finished, job};
use crate::{Answer, Cause, EventKind, Input, JobKey, Outcome, Refusal, Request, State};

fn after(names: &[&str]) -> Request {
    Request { after: names.iter().map(|name| job(name).job).collect(), ..Request::default() }
}

fn submit(desk: &mut Desk, name: &str, names: &[&str]) -> JobKey {
    desk.submit(name, after(names))
}

fn end(desk: &mut Desk, key: &JobKey, outcome: Outcome) {
    let epoch = desk.row(key).epoch.0;
    desk.done(finished(key, epoch, outcome));
}

#[test]
fn a_job_waits_for_all_and_each_is_told() {
    let mut desk = Desk::new();
    desk.register("w", 9, Vec::new());
    let (a, b) = (submit(&mut desk, "a", &[]), submit(&mut desk, "b", &[]));
    let c = submit(&mut desk, "c", &["a", "b"]);
    assert_eq!(desk.state(&c), "waiting dependency_pending");
    end(&mut desk, &a, Outcome::Succeeded);
    assert_eq!(desk.state(&c), "waiting dependency_pending");
    assert_eq!(desk.store.log.last().map(|e| &e.kind), Some(&EventKind::DependencyMet { dependency: a.job.clone() }));
    // A restart in between, without the row of the one that has succeeded.
    desk.restart();
    desk.register("w", 9, vec![desk.holding(&b)]);
    end(&mut desk, &b, Outcome::Succeeded);
    assert_eq!(desk.state(&c), "starting granted");
    assert!(desk.row(&c).pending.is_empty());
}

#[test]
fn a_failure_runs_down_the_whole_chain() {
    for outcome in [Outcome::Failed(Cause::SpecFault), Outcome::Stopped] {
        let mut desk = Desk::new();
        desk.register("w", 9, Vec::new());
        let a = submit(&mut desk, "a", &[]);
        let b = submit(&mut desk, "b", &["a"]);
        let c = submit(&mut desk, "c", &["a", "b"]);
        let d = submit(&mut desk, "d", &["c"]);
        if outcome == Outcome::Stopped {
            desk.done(Input::Cancel { key: a.clone() });
        }
        end(&mut desk, &a, outcome);
        for key in [&b, &c, &d] {
            assert_eq!(desk.state(key), "failed dependency_failed", "{key}");
        }
        // Whoever comes later to what has failed fails at once.
        let late = submit(&mut desk, "late", &["d"]);
        assert_eq!(desk.state(&late), "failed dependency_failed");
        assert!(desk.core.dependants.is_empty());
    }
}

#[test]
fn cancelling_a_waiting_job_frees_the_one_it_waits_for() {
    let mut desk = Desk::new();
    let a = submit(&mut desk, "a", &[]);
    let b = submit(&mut desk, "b", &["a"]);
    desk.done(Input::Cancel { key: b.clone() });
    assert!(desk.core.dependants.is_empty());
    desk.register("w", 1, Vec::new());
    end(&mut desk, &a, Outcome::Succeeded);
    assert_eq!(desk.state(&b), "cancelled cancel_asked");
}

/// A42: what does not exist yet, itself included, cannot be waited for; so there are no cycles.
#[test]
fn nobody_waits_for_what_does_not_exist() {
    let mut desk = Desk::new();
    for missing in ["nobody", "j"] {
        let input = Input::Submit { key: job("j"), request: after(&[missing]), finished: BTreeMap::new() };
        assert!(matches!(desk.refused(input), Refusal::UnknownDependency { .. }), "{missing}");
    }
    let other = attune_spec::id::Project::new("other").unwrap();
    submit(&mut desk, "a", &[]);
    let key = JobKey::new(other, job("j").job);
    let input = Input::Submit { key, request: after(&["a"]), finished: BTreeMap::new() };
    assert!(matches!(desk.refused(input), Refusal::UnknownDependency { .. }), "a job of another project");
    assert_eq!(desk.core.counters().next_order, 2);
}

#[test]
fn a_forgotten_job_is_known_from_its_row() {
    let mut desk = Desk::new();
    desk.register("w", 9, Vec::new());
    let (a, b) = (submit(&mut desk, "a", &[]), submit(&mut desk, "b", &[]));
    assert!(matches!(desk.refused(Input::Forget { key: a.clone() }), Refusal::WrongState { .. }));
    end(&mut desk, &a, Outcome::Succeeded);
    desk.done(failed(&b, 1, Cause::SpecFault));
    for key in [&a, &b] {
        desk.done(Input::Forget { key: key.clone() });
        desk.repeated(Input::Forget { key: key.clone() });
        assert!(matches!(desk.refused(finished(key, 1, Outcome::Succeeded)), Refusal::UnknownJob { .. }));
    }
    let mut submit_after = |name: &str, names: &[&str]| {
        let request = after(names);
        let key = job(name);
        let finished = desk.store.finished(&key, request.after.clone());
        let effects = desk.step(Input::Submit { key: key.clone(), request, finished });
        assert_eq!(effects.answer, Answer::Done);
        desk.row(&key).state
    };
    assert_eq!(submit_after("c", &["a"]), State::Starting);
    assert_eq!(submit_after("d", &["a", "b"]), State::Failed);
    // A state that is not final is not taken for an end.
    let request = after(&["gone"]);
    let finished = BTreeMap::from([(job("gone").job, State::Running)]);
    desk.refused(Input::Submit { key: job("e"), request, finished });
    let names: BTreeSet<_> = desk.core.jobs().map(|row| row.key.job.as_str()).collect();
    assert_eq!(names, BTreeSet::from(["c", "d"]));
}
