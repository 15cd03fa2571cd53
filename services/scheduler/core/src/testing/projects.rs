//! Projects: their shares, what they may have, who makes way for whom; limits of time; workers that are told off.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use attune_spec::id::{JobId, Project};

use super::desk::{Desk, checkpoint, gang, running, worker};
use crate::placement::Blocked;
use crate::{Action, Device, Input, JobKey, Limit, Outcome, Policy, Refusal, Request, Stop};

fn of(workers: u32, devices: u32, priority: i32) -> Request {
    Request { priority, resources: gang(workers, devices), ..Request::default() }
}

fn key(project: &str, name: &str) -> JobKey {
    JobKey::new(Project::new(project).unwrap(), JobId::new(name).unwrap())
}

fn submit(project: &str, name: &str, request: Request) -> Input {
    Input::Submit { key: key(project, name), request, finished: BTreeMap::new() }
}

fn policy(project: &str, policy: Policy) -> Input {
    Input::SetPolicy { project: Project::new(project).unwrap(), policy: Some(policy) }
}

fn code(desk: &Desk, key: &JobKey) -> &'static str {
    desk.row(key).state.code()
}

/// The job's processes are gone from `w`, and then from the scheduler's books.
fn end(desk: &mut Desk, key: &JobKey, outcome: Outcome) {
    let (row, session) = (desk.row(key).clone(), desk.core.worker(&worker("w")).unwrap().session);
    let (epoch, cohort) = (row.epoch, row.cohort.unwrap());
    desk.done(Input::AttemptFinished { key: key.clone(), epoch, worker: worker("w"), outcome });
    desk.done(Input::CohortGone { worker: worker("w"), session, cohort });
}

/// A41: one project submits a hundred jobs first; another's turn comes with the next device.
#[test]
fn a_project_that_has_less_goes_first_whoever_came_first() {
    let mut desk = Desk::new();
    desk.register("w", 4, Vec::new());
    for at in 0..100 {
        desk.done(submit("many", &format!("m{at}"), of(1, 1, 0)));
    }
    for name in ["f0", "f1", "f2"] {
        desk.done(submit("few", name, of(1, 1, 0)));
    }
    assert_eq!(desk.core.jobs().filter(|job| job.state.is_live()).count(), 4);
    let waits = desk.core.blocked(&key("few", "f0"));
    assert_eq!(waits, Some(Blocked::Occupied));
    end(&mut desk, &key("many", "m0"), Outcome::Succeeded);
    assert_eq!(code(&desk, &key("few", "f0")), "starting");
    end(&mut desk, &key("many", "m1"), Outcome::Succeeded);
    assert_eq!(code(&desk, &key("few", "f1")), "starting");
    // Now it is the other way round.
    end(&mut desk, &key("many", "m2"), Outcome::Succeeded);
    assert_eq!((code(&desk, &key("few", "f2")), code(&desk, &key("many", "m4"))), ("queued", "starting"));
    end(&mut desk, &key("few", "f1"), Outcome::Succeeded);
    assert_eq!(code(&desk, &key("few", "f2")), "starting");
}

#[test]
fn a_project_runs_no_more_than_it_may_and_is_told_so() {
    let mut desk = Desk::new();
    desk.register("w", 4, Vec::new());
    desk.done(policy("red", Policy { max_cpu: Some(2), max_queued: Some(2), ..Policy::default() }));
    desk.repeated(policy("red", Policy { max_cpu: Some(2), max_queued: Some(2), ..Policy::default() }));
    for name in ["a", "b", "c", "d"] {
        desk.done(submit("red", name, of(1, 1, 0)));
    }
    assert_eq!(["a", "b", "c"].map(|name| code(&desk, &key("red", name))), ["starting", "starting", "queued"]);
    assert_eq!(desk.core.blocked(&key("red", "c")), Some(Blocked::OverQuota));
    // Two wait, which is as many as may.
    let full = desk.refused(submit("red", "e", of(1, 1, 0)));
    assert!(matches!(full, Refusal::QueueFull { max: 2, .. }), "{full}");
    let large = desk.refused(submit("red", "f", of(1, 3, 0)));
    assert!(matches!(large, Refusal::QueueFull { .. }), "{large}");
    desk.done(Input::Cancel { key: key("red", "d") });
    let large = desk.refused(submit("red", "f", of(3, 1, 0)));
    assert!(matches!(large, Refusal::BeyondQuota { asked: 3, max: 2, device: Device::Cpu, .. }), "{large}");
    // What is over counts no more, before its devices are free.
    let row = desk.row(&key("red", "a")).clone();
    let ended = Outcome::Succeeded;
    desk.done(Input::AttemptFinished { key: row.key, epoch: row.epoch, worker: worker("w"), outcome: ended });
    assert_eq!(code(&desk, &key("red", "c")), "starting");
    // What was said of projects outlives the scheduler.
    desk.done(submit("red", "g", of(1, 1, 0)));
    desk.restart();
    assert_eq!(desk.core.policy(&Project::new("red").unwrap()).max_cpu, Some(2));
    let (usage, n_queued) = desk.core.usage(&Project::new("red").unwrap());
    assert_eq!((usage.devices().n_cpu, n_queued), (2, 1));
    desk.register("w", 4, Vec::new());
    desk.done(Input::SetPolicy { project: Project::new("red").unwrap(), policy: None });
    assert_eq!(code(&desk, &key("red", "g")), "starting");
}

#[test]
fn weights_say_how_much_more_a_project_gets() {
    let mut desk = Desk::new();
    desk.done(policy("heavy", Policy { weight: NonZeroU32::new(3).unwrap(), ..Policy::default() }));
    for at in 0..8 {
        desk.done(submit("light", &format!("l{at}"), of(1, 1, 0)));
        desk.done(submit("heavy", &format!("h{at}"), of(1, 1, 0)));
    }
    desk.register("w", 8, Vec::new());
    let live = |project: &str| {
        desk.core.jobs().filter(|job| job.state.is_live() && job.key.project.as_str() == project).count()
    };
    assert_eq!((live("light"), live("heavy")), (2, 6));
}

#[test]
fn the_least_urgent_make_way_and_go_on_later() {
    let mut desk = Desk::new();
    desk.register("w", 4, Vec::new());
    let (old, young, better) = (desk.submit("old", of(1, 1, 0)), desk.submit("young", of(1, 1, 0)), of(1, 2, 1));
    let better = desk.submit("better", better);
    for key in [&old, &young, &better] {
        desk.done(running(key, 1));
    }
    // It needs two: both of the least urgent. The more urgent one, as it has two as well, would do, and stays.
    let urgent = desk.submit("urgent", of(1, 2, 5));
    let states = [&old, &young, &better, &urgent].map(|key| code(&desk, key));
    assert_eq!(states, ["stopping(preempt)", "stopping(preempt)", "running", "queued"]);
    // Nobody else is asked while these write their checkpoints.
    desk.submit("idle", of(1, 1, -1));
    assert_eq!(code(&desk, &better), "running");
    desk.done(checkpoint(&young, 1, 7));
    for key in [&young, &old] {
        end(&mut desk, key, Outcome::Stopped);
    }
    assert_eq!(desk.state(&urgent), "starting granted");
    assert_eq!((desk.state(&old), desk.state(&young)), ("queued preempted".to_owned(), "queued preempted".to_owned()));
    end(&mut desk, &urgent, Outcome::Succeeded);
    assert_eq!((code(&desk, &old), code(&desk, &young)), ("starting", "starting"));
}

#[test]
fn no_more_than_will_do_are_asked_the_youngest_first() {
    let mut desk = Desk::new();
    desk.register("w", 4, Vec::new());
    let jobs = ["a", "b", "c", "d"].map(|name| desk.submit(name, of(1, 1, 0)));
    desk.submit("urgent", of(1, 1, 1));
    assert_eq!(jobs.each_ref().map(|key| code(&desk, key)), ["starting", "starting", "starting", "stopping(preempt)"]);
    // On each worker of a gang the youngest; one that is on both makes way on both.
    let mut desk = Desk::new();
    desk.register("v", 2, Vec::new());
    desk.register("w", 2, Vec::new());
    let wide = desk.submit("wide", of(2, 1, 0));
    let [on_v, on_w] = ["x", "y"].map(|name| desk.submit(name, of(1, 1, 0)));
    desk.submit("urgent", of(2, 1, 1));
    assert_eq!(
        [&wide, &on_v, &on_w].map(|key| code(&desk, key)),
        ["starting", "stopping(preempt)", "stopping(preempt)"]
    );
    desk.submit("more", of(1, 2, 2));
    assert_eq!(code(&desk, &wide), "stopping(preempt)");
}

#[test]
fn nobody_makes_way_in_vain() {
    // For an equal.
    let (mut desk, key) = Desk::running();
    desk.submit("equal", of(1, 4, 0));
    assert_eq!(code(&desk, &key), "running");
    // For one that the fleet cannot hold.
    desk.submit("huge", of(1, 5, 9));
    assert_eq!(code(&desk, &key), "running");
    // For one whose project may not have it.
    desk.done(policy("red", Policy { max_cpu: Some(4), ..Policy::default() }));
    desk.done(submit("red", "first", of(1, 1, 9)));
    desk.done(submit("red", "second", of(1, 4, 9)));
    assert_eq!(code(&desk, &key), "running");
    // Twice without progress between.
    let (mut desk, key) = Desk::running();
    desk.done(Input::Preempt { key: key.clone() });
    end(&mut desk, &key, Outcome::Stopped);
    assert_eq!(code(&desk, &key), "starting");
    let urgent = desk.submit("urgent", of(1, 4, 9));
    assert_eq!(code(&desk, &key), "starting");
    desk.done(running(&key, 2));
    desk.done(checkpoint(&key, 2, 1));
    // A look in vain is repeated after a second, and finds that it has got somewhere.
    assert_eq!(code(&desk, &key), "running");
    let held = desk.row(&key).cohort.unwrap();
    desk.wait_beating(Duration::from_secs(1), "w", &[held]);
    assert_eq!((code(&desk, &key), code(&desk, &urgent)), ("stopping(preempt)", "queued"));
}

/// Whoever cannot make way hides nobody who can, and a project's own limit counts for all that make way for it at once.
#[test]
fn all_who_could_make_way_are_looked_at() {
    let mut desk = Desk::new();
    desk.register("w", 40, Vec::new());
    let jobs: Vec<JobKey> = (0..40).map(|at| desk.submit(&format!("j{at}"), of(1, 1, 0))).collect();
    // The oldest is looked at last; all others have made way before and got nowhere since.
    for key in &jobs[1..] {
        desk.done(Input::Preempt { key: key.clone() });
        end(&mut desk, key, Outcome::Stopped);
    }
    assert!(jobs.iter().all(|key| code(&desk, key) == "starting"));
    desk.done(policy("red", Policy { max_cpu: Some(1), ..Policy::default() }));
    desk.done(submit("red", "first", of(1, 1, 5)));
    assert_eq!(code(&desk, &jobs[0]), "stopping(preempt)");
    desk.done(checkpoint(&jobs[7], 2, 3));
    desk.done(submit("red", "second", of(1, 1, 5)));
    assert_eq!(code(&desk, &jobs[7]), "starting", "one is what it may have");
}

#[test]
fn a_job_whose_time_is_over_ends_as_if_cancelled() {
    let (mut desk, key) = Desk::running();
    let actions = desk.done(Input::Expire { key: key.clone(), limit: Limit::RunTime });
    assert!(actions.iter().any(|action| matches!(action, Action::Stop { stop: Stop::Cancel, .. })));
    assert_eq!(desk.state(&key), "stopping(cancel) time_limit");
    desk.repeated(Input::Expire { key: key.clone(), limit: Limit::RunTime });
    desk.done(checkpoint(&key, 1, 3));
    end(&mut desk, &key, Outcome::Stopped);
    assert_eq!(desk.state(&key), "cancelled time_limit");
    desk.repeated(Input::Expire { key, limit: Limit::Deadline });
    let waiting = desk.submit("waiting", of(1, 9, 0));
    desk.done(Input::Expire { key: waiting.clone(), limit: Limit::Deadline });
    assert_eq!(desk.state(&waiting), "cancelled deadline_passed");
}

#[test]
fn a_worker_that_is_told_off_gets_nothing_new_until_it_is_let_in_again() {
    let (mut desk, key) = Desk::running();
    let cordon = |on, drains| Input::Cordon { worker: worker("w"), on, drains };
    desk.done(cordon(true, false));
    desk.repeated(cordon(true, false));
    assert_eq!(code(&desk, &key), "running", "what runs goes on");
    let next = desk.submit("next", of(1, 1, 0));
    assert_eq!(desk.core.blocked(&next), Some(Blocked::NoWorkers));
    // Also when worker and scheduler come back.
    let held = desk.holding(&key);
    desk.restart();
    desk.register("w", 4, vec![held]);
    assert_eq!((code(&desk, &key), code(&desk, &next)), ("running", "queued"));
    desk.done(cordon(true, true));
    assert_eq!(desk.state(&key), "stopping(preempt) worker_draining");
    desk.done(cordon(false, false));
    assert_eq!(code(&desk, &next), "starting");
    let unknown = desk.refused(Input::Cordon { worker: worker("nobody"), on: true, drains: false });
    assert!(matches!(unknown, Refusal::UnknownWorker { .. }));
}

#[test]
fn a_worker_that_does_not_hear_it_is_drained_all_the_same() {
    let (mut desk, key) = Desk::running();
    let session = desk.core.worker(&worker("w")).unwrap().session;
    desk.done(Input::Cordon { worker: worker("w"), on: true, drains: false });
    desk.done(Input::Disconnect { worker: worker("w"), session });
    // Nobody can be told now; the next heartbeat is answered with it.
    desk.done(Input::Cordon { worker: worker("w"), on: true, drains: true });
    assert_eq!(desk.state(&key), "stopping(preempt) worker_draining");
    desk.repeated(Input::Cordon { worker: worker("w"), on: true, drains: true });
}
