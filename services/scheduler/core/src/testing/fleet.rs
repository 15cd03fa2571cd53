//! Workers that come, go, stall, lie and return.

use std::collections::BTreeMap;
use std::time::Duration;

use attune_spec::id::{CohortId, Epoch};

use super::desk::{Desk, checkpoint, finished, gang, job, running, worker};
use crate::{
    Action, Attempt, Device, Devices, Holding, Input, JobKey, Outcome, Refusal, RefusalKind, Request, Session, Stop,
    Timestamp,
};

const SECOND: Duration = Duration::from_secs(1);

fn session(desk: &Desk) -> Session {
    desk.core.worker(&worker("w")).unwrap().session
}

#[test]
fn heartbeats_keep_a_lease_for_hours() {
    let (mut desk, key) = Desk::running();
    let cohort = desk.row(&key).cohort.unwrap();
    for _ in 0..1000 {
        desk.wait(Duration::from_secs(9));
        let actions = desk.beat("w", &[cohort]);
        let Action::Renewed { cohorts, .. } = &actions[0] else { panic!("{actions:?}") };
        assert_eq!((cohorts.as_slice(), actions.len()), ([cohort].as_slice(), 1));
    }
    assert_eq!(desk.state(&key), "running started");
}

#[test]
fn a_worker_that_lives_but_drops_a_cohort_loses_its_lease() {
    let (mut desk, key) = Desk::running();
    desk.wait_beating(Duration::from_secs(9), "w", &[]);
    assert_eq!(desk.state(&key), "running started");
    desk.wait_beating(SECOND, "w", &[]);
    assert_eq!(desk.state(&key), "backoff failure(lease_expired)");
}

/// F5: a worker is stopped for three leases and wakes up in the belief that nothing happened.
#[test]
fn a_zombie_is_refused_in_every_word() {
    let (mut desk, key) = Desk::running();
    let old = session(&desk);
    let cohort = desk.row(&key).cohort.unwrap();
    desk.wait(Duration::from_secs(30));
    assert_eq!(desk.state(&key), "queued backoff_over");
    desk.refused(checkpoint(&key, 1, 1));
    assert_eq!(desk.refused(running(&key, 1)).kind(), RefusalKind::AttemptOver);
    assert_eq!(desk.refused(finished(&key, 1, Outcome::Succeeded)).kind(), RefusalKind::AttemptOver);
    let beat = Input::Heartbeat { worker: worker("w"), session: old, beat: 9, holding: vec![cohort] };
    assert_eq!(desk.refused(beat).kind(), RefusalKind::Unregistered);
    // It registers with what it believes to run, is told to let go, and gets the job anew.
    let attempts = vec![Attempt { key: key.clone(), epoch: Epoch(1) }];
    let held = Holding { cohort, attempts, device: Device::Cpu, n_devices: 1 };
    let actions = desk.register("w", 4, vec![held]);
    let Action::Welcome { keep, .. } = &actions[0] else { panic!("{actions:?}") };
    assert!(keep.is_empty());
    assert_eq!(actions[1], Action::Release { worker: worker("w"), cohort });
    assert_eq!((desk.state(&key).as_str(), desk.row(&key).epoch), ("starting granted", Epoch(2)));
    assert_eq!(desk.core.worker(&worker("w")).unwrap().free().n_cpu, 2);
}

#[test]
fn a_broken_connection_is_not_a_death() {
    let (mut desk, key) = Desk::running();
    let holding = desk.holding(&key);
    let broken = Input::Disconnect { worker: worker("w"), session: session(&desk) };
    desk.done(broken.clone());
    desk.repeated(broken.clone());
    let other = desk.submit("other", Request::default());
    assert_eq!(desk.state(&other), "queued submitted");
    desk.wait(Duration::from_secs(5));
    let actions = desk.register("w", 4, vec![holding.clone()]);
    let Action::Welcome { keep, .. } = &actions[0] else { panic!("{actions:?}") };
    assert_eq!(*keep, [holding.cohort]);
    assert_eq!((desk.state(&key).as_str(), desk.state(&other).as_str()), ("running started", "starting granted"));
    assert!(matches!(desk.refused(broken), Refusal::StaleSession { .. }));
}

#[test]
fn old_connections_and_old_heartbeats_are_refused() {
    let (mut desk, key) = Desk::running();
    let (old, cohort) = (session(&desk), desk.row(&key).cohort.unwrap());
    desk.register("w", 4, vec![desk.holding(&key)]);
    let new = session(&desk);
    let beat = |session, beat| Input::Heartbeat { worker: worker("w"), session, beat, holding: vec![cohort] };
    let register = |session| Input::Register {
        worker: worker("w"),
        session,
        devices: Devices { n_cpu: 4, n_cuda: 0 },
        memory: BTreeMap::new(),
        labels: BTreeMap::new(),
        process: None,
        outdated: false,
        draining: false,
        holding: Vec::new(),
    };
    desk.done(beat(new, 7));
    desk.repeated(register(new));
    assert!(matches!(desk.refused(beat(new, 7)), Refusal::StaleBeat { newest: 7, .. }));
    assert!(matches!(desk.refused(beat(new, 6)), Refusal::StaleBeat { .. }));
    assert!(matches!(desk.refused(beat(old, 8)), Refusal::StaleSession { .. }));
    assert!(matches!(desk.refused(register(old)), Refusal::StaleSession { .. }));
    let gone = Input::CohortGone { worker: worker("w"), session: old, cohort };
    assert!(matches!(desk.refused(gone), Refusal::StaleSession { .. }));
    assert_eq!(desk.state(&key), "running started");
}

#[test]
fn a_worker_that_returns_without_its_attempt_has_lost_it() {
    let (mut desk, key) = Desk::running();
    let actions = desk.register("w", 4, Vec::new());
    assert!(actions.iter().any(|action| matches!(action, Action::Release { .. })));
    assert_eq!(desk.state(&key), "backoff failure(worker_lost)");
}

#[test]
fn a_returning_worker_keeps_what_is_live_and_drops_what_is_not() {
    let (mut desk, key) = Desk::running();
    let kept = desk.holding(&key);
    let stray = Holding { cohort: CohortId(77), ..kept.clone() };
    // Sent twice, as a hostile worker might.
    let actions = desk.register("w", 4, vec![kept.clone(), stray.clone(), kept.clone()]);
    let Action::Welcome { keep, .. } = &actions[0] else { panic!("{actions:?}") };
    assert_eq!(*keep, [kept.cohort]);
    assert_eq!(actions[1..], [Action::Release { worker: worker("w"), cohort: stray.cohort }]);
    // The stray one occupies a device until it is gone.
    assert_eq!(desk.core.worker(&worker("w")).unwrap().free().n_cpu, 2);
    desk.beat("w", &[kept.cohort]);
    assert_eq!(desk.core.worker(&worker("w")).unwrap().free().n_cpu, 3);
    // The right cohort with the wrong epoch is not the attempt.
    let attempts = vec![Attempt { key: key.clone(), epoch: Epoch(9) }];
    let actions = desk.register("w", 4, vec![Holding { attempts: attempts.clone(), ..kept }]);
    let (worker, attempt) = (worker("w"), attempts[0].clone());
    assert!(actions.contains(&Action::Drop { worker, cohort: kept.cohort, attempt }));
    assert_eq!(desk.state(&key), "backoff failure(worker_lost)");
}

/// F40: a worker drains: nothing new, and what runs is asked to stop and goes elsewhere.
#[test]
fn a_draining_worker_gives_its_jobs_away() {
    let (mut desk, key) = Desk::running();
    let cohort = desk.row(&key).cohort.unwrap();
    let actions = desk.done(Input::Drain { worker: worker("w") });
    let attempt = Attempt { key: key.clone(), epoch: Epoch(1) };
    let stop = Action::Stop { worker: worker("w"), cohort, attempt, stop: Stop::Preempt };
    assert_eq!(actions, std::slice::from_ref(&stop));
    desk.repeated(Input::Drain { worker: worker("w") });
    // The request to stop was lost: the next heartbeat repeats it.
    assert!(desk.beat("w", &[cohort]).contains(&stop));
    let other = desk.submit("other", Request::default());
    assert_eq!(desk.state(&other), "queued submitted");
    desk.done(checkpoint(&key, 1, 5));
    desk.done(finished(&key, 1, Outcome::Stopped));
    assert_eq!(desk.state(&key), "queued preempted");
    desk.register("v", 1, Vec::new());
    assert_eq!((desk.state(&key).as_str(), desk.row(&key).epoch), ("starting granted", Epoch(2)));
}

#[test]
fn a_worker_that_stops_of_its_own_accord_gets_nothing_new() {
    let (mut desk, key) = Desk::running();
    desk.done(finished(&key, 1, Outcome::Stopped));
    assert_eq!(desk.state(&key), "queued preempted");
    assert!(desk.core.worker(&worker("w")).unwrap().draining);
    desk.register("w", 4, Vec::new());
    assert_eq!((desk.state(&key).as_str(), desk.row(&key).epoch), ("starting granted", Epoch(2)));
}

#[test]
fn a_job_that_ignores_the_request_to_stop_is_given_up() {
    type Ask = fn(JobKey) -> Input;
    let asks: [(Ask, &str); 3] = [
        (|key| Input::Cancel { key }, "cancelled cancel_asked"),
        (|key| Input::Pause { key }, "paused pause_asked"),
        (|key| Input::Preempt { key }, "starting granted"),
    ];
    for (ask, after) in asks {
        let (mut desk, key) = Desk::running();
        let cohort = desk.row(&key).cohort.unwrap();
        desk.done(ask(key.clone()));
        desk.wait_beating(Duration::from_secs(44), "w", &[cohort]);
        assert!(desk.state(&key).starts_with("stopping"), "{}", desk.state(&key));
        let mut actions = desk.wait(SECOND);
        assert_eq!(desk.state(&key), after);
        actions.retain(|action| matches!(action, Action::Release { .. }));
        assert_eq!(actions, [Action::Release { worker: worker("w"), cohort }]);
    }
}

#[test]
fn a_stronger_wish_gives_no_more_time() {
    let (mut desk, key) = Desk::running();
    let cohort = desk.row(&key).cohort.unwrap();
    desk.done(Input::Pause { key: key.clone() });
    desk.wait_beating(Duration::from_secs(40), "w", &[cohort]);
    desk.done(Input::Cancel { key: key.clone() });
    desk.wait_beating(Duration::from_secs(5), "w", &[cohort]);
    assert_eq!(desk.state(&key), "cancelled cancel_asked");
}

/// F7: the scheduler itself stands still for longer than a lease. Nobody is to blame but itself.
#[test]
fn a_stalled_scheduler_expires_nobody() {
    for stall in [6, 10, 60, 3600] {
        let (mut desk, key) = Desk::running();
        let cohort = desk.row(&key).cohort.unwrap();
        desk.now_ms += stall * 1000;
        desk.step(Input::Tick);
        assert_eq!(desk.state(&key), "running started", "{stall}");
        // Late heartbeats count.
        desk.wait(Duration::from_millis(9_900));
        desk.beat("w", &[cohort]);
        desk.wait(Duration::from_secs(9));
        assert_eq!(desk.state(&key), "running started", "{stall}");
        // And a silent worker is lost as always.
        desk.wait(SECOND);
        assert_eq!(desk.state(&key), "backoff failure(worker_lost)", "{stall}");
    }
}

/// F20, F21: a clock that goes back changes nothing.
#[test]
fn time_never_goes_back() {
    let (mut desk, key) = Desk::running();
    let cohort = desk.row(&key).cohort.unwrap();
    desk.now_ms = 3;
    desk.beat("w", &[cohort]);
    assert!(desk.core.wake().unwrap() > Timestamp::from_millis(1_000_000));
    assert_eq!(desk.state(&key), "running started");
}

#[test]
fn a_worker_speaks_for_its_own_cohorts_only() {
    let (mut desk, key) = Desk::running();
    desk.register("x", 4, Vec::new());
    let cohort = desk.row(&key).cohort.unwrap();
    let crash = Input::CohortCrashed { worker: worker("x"), cohort, cause: crate::Cause::Hung };
    assert!(matches!(desk.refused(crash), Refusal::NotItsLease { .. }));
    let runs = Input::AttemptRunning { key: key.clone(), epoch: Epoch(1), worker: worker("x") };
    assert!(matches!(desk.refused(runs), Refusal::NotItsLease { .. }));
    // Vouching for somebody else's cohort earns an order to drop it, and keeps nobody alive.
    let actions = desk.beat("x", &[cohort]);
    assert_eq!(actions[1], Action::Release { worker: worker("x"), cohort });
    for _ in 0..10 {
        desk.wait(SECOND);
        desk.beat("x", &[cohort]);
    }
    // The job was lost with its own worker and queues; `x` may get it by now, under a new epoch.
    assert!(desk.row(&key).epoch > Epoch(1) || !desk.row(&key).state.is_live(), "{}", desk.state(&key));
}

/// F41: a whole fleet returns in the same second after a restart.
#[test]
fn ten_thousand_workers_reconnect_at_once() {
    let mut desk = Desk::new();
    let n_workers = 10_000;
    let register = |n: u64, session| Input::Register {
        worker: worker(&format!("w{n}")),
        session: Session(session),
        devices: Devices { n_cpu: 1, n_cuda: 0 },
        memory: BTreeMap::new(),
        labels: BTreeMap::new(),
        process: None,
        outdated: false,
        draining: false,
        holding: Vec::new(),
    };
    let now = Timestamp::from_millis(desk.now_ms);
    for n in 0..n_workers {
        desk.core.step(register(n, n + 1), now);
    }
    for n in 0..20 {
        let (key, request) = (job(&format!("j{n}")), Request { resources: gang(1, 1), ..Request::default() });
        desk.core.step(Input::Submit { key, request, finished: BTreeMap::new() }, now);
    }
    for n in 0..n_workers {
        desk.core.step(register(n, n_workers + n + 1), now);
    }
    assert_eq!(desk.core.workers().count() as u64, n_workers);
    // Whoever came back without its attempt has lost the offer; the attempt is tried again, and nobody else is hurt.
    crate::invariants::all(&desk.core).unwrap();
    let live = desk.core.jobs().filter(|job| job.state.is_live() || job.state == crate::State::Backoff).count();
    assert_eq!(live, 20);
}
