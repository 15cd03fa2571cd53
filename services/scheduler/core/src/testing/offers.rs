//! What becomes of offers that nobody takes: refused, lost on their way, or open while their worker dies.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use attune_spec::id::WorkerId;

use super::desk::{Desk, finished, gang, running, worker};
use crate::{Action, Declined, Devices, Input, JobKey, Outcome, Request, Session, State};

/// A job that is given up after one failure.
fn once() -> Request {
    Request { max_attempts: NonZeroU32::MIN, ..Request::default() }
}

fn refused(desk: &Desk, key: &JobKey, why: Declined) -> Input {
    let cohort = desk.row(key).cohort.unwrap();
    Input::OfferRefused { worker: desk.core.cohort(cohort).unwrap().shares[0].worker.clone(), cohort, why }
}

fn accepted(desk: &Desk, key: &JobKey) -> Input {
    let cohort = desk.row(key).cohort.unwrap();
    Input::OfferAccepted { worker: desk.core.cohort(cohort).unwrap().shares[0].worker.clone(), cohort }
}

fn workers(desk: &Desk, key: &JobKey) -> Vec<String> {
    desk.row(key).workers.iter().map(ToString::to_string).collect()
}

#[test]
fn a_refused_offer_costs_a_job_nothing_and_the_worker_is_left_alone_for_ever_longer() {
    let mut desk = Desk::new();
    desk.register("w", 4, Vec::new());
    let key = desk.submit("j", once());
    let mut waits = Vec::new();
    for n in 1..=12 {
        assert_eq!(desk.state(&key), "starting granted", "{n}");
        let asked_ms = desk.now_ms;
        desk.done(refused(&desk, &key, Declined::Full));
        assert_eq!(desk.state(&key), "backoff failure(offer_refused)", "{n}");
        assert_eq!((desk.row(&key).n_failed, desk.row(&key).n_offers_refused), (0, n));
        // Others are not offered to it either.
        let other = desk.submit(&format!("other-{n}"), Request::default());
        assert_eq!(desk.state(&other), "queued submitted");
        desk.done(Input::Cancel { key: other });
        while desk.row(&key).state != State::Starting {
            desk.wait(Duration::from_millis(500));
            desk.beat("w", &[]);
        }
        waits.push((desk.now_ms - asked_ms).div_ceil(1000));
    }
    assert_eq!(waits, [2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300]);
    // Once it has taken one it is trusted again, and so is the job.
    desk.done(accepted(&desk, &key));
    assert_eq!(desk.core.worker(&worker("w")).unwrap().n_declined, 0);
    let epoch = desk.row(&key).epoch.0;
    desk.done(running(&key, epoch));
    assert_eq!((desk.row(&key).n_failed, desk.row(&key).n_offers_refused), (0, 0));
}

#[test]
fn whoever_refused_is_the_last_to_be_asked_again() {
    let mut desk = Desk::new();
    for name in ["a", "b", "c"] {
        desk.register(name, 4, Vec::new());
    }
    let key = desk.submit("j", once());
    let mut met = workers(&desk, &key);
    for _ in 0..2 {
        desk.done(refused(&desk, &key, Declined::Unable));
        desk.done(Input::Retry { key: key.clone() });
        met.extend(workers(&desk, &key));
    }
    assert_eq!(met[0..2], ["a", "b"]);
    assert_ne!(met[2], "b");
    // What it cannot run says nothing of others.
    let all = desk.core.workers().filter(|worker| worker.rests || worker.draining).count();
    assert_eq!(all, 0);
}

#[test]
fn one_that_leaves_gets_nothing_more_and_lets_go_of_what_it_has() {
    let (mut desk, key) = Desk::running();
    let next = desk.submit("next", once());
    desk.done(refused(&desk, &next, Declined::Leaving));
    assert_eq!(desk.state(&next), "backoff failure(offer_refused)");
    assert_eq!(desk.state(&key), "stopping(preempt) worker_draining");
    desk.done(Input::Retry { key: next.clone() });
    assert_eq!(desk.state(&next), "queued retry_asked");
    desk.register("other", 1, Vec::new());
    assert_eq!(desk.state(&next), "starting granted");
}

#[test]
fn one_of_a_gang_that_refuses_frees_the_others() {
    let mut desk = Desk::new();
    desk.register("a", 1, Vec::new());
    desk.register("b", 1, Vec::new());
    let key = desk.submit("j", Request { resources: gang(2, 1), ..once() });
    let cohort = desk.row(&key).cohort.unwrap();
    let actions = desk.done(refused(&desk, &key, Declined::Full));
    let released = |name| Action::Release { worker: worker(name), cohort };
    assert_eq!(actions, [released("a"), released("b")]);
    assert_eq!(desk.row(&key).n_failed, 0);
}

#[test]
fn what_was_taken_cannot_be_refused_for_nothing() {
    let (mut desk, key) = Desk::starting();
    desk.done(accepted(&desk, &key));
    desk.repeated(accepted(&desk, &key));
    desk.done(refused(&desk, &key, Declined::Full));
    assert_eq!((desk.state(&key).as_str(), desk.row(&key).n_failed), ("backoff failure(lease_expired)", 1));
    let late = Input::OfferRefused { worker: worker("w"), cohort: attune_spec::id::CohortId(1), why: Declined::Full };
    desk.refused(late);
}

/// F44: nobody ever hears that the job runs, or that its offer arrived.
#[test]
fn a_job_that_kills_three_workers_before_a_word_is_quarantined() {
    let mut desk = Desk::new();
    let all = ["a", "b", "c", "d"];
    for name in all {
        desk.register_as(name, 1, Vec::new(), Some("before"));
    }
    let key = desk.submit("poison", Request { max_attempts: NonZeroU32::new(100).unwrap(), ..Request::default() });
    for n_lost in 1..=3 {
        let name = all[n_lost - 1];
        assert_eq!(workers(&desk, &key), [name]);
        // It is started again, or nothing is heard of it for a lease.
        match n_lost {
            2 => {
                for _ in 0..10 {
                    desk.wait(Duration::from_secs(1));
                    ["a", "c", "d"].iter().for_each(|other| drop(desk.beat(other, &[])));
                }
            }
            _ => drop(desk.register_as(name, 1, Vec::new(), Some("after"))),
        }
        let known: Vec<&str> = desk.row(&key).lost_workers.iter().map(WorkerId::as_str).collect();
        assert_eq!(known, all[..n_lost], "{name}");
        if n_lost < 3 {
            assert_eq!(desk.state(&key), "backoff failure(offer_lost)", "{name}");
            assert_eq!(desk.row(&key).n_failed, 0, "it may be the worker's own doing");
            desk.done(Input::Retry { key: key.clone() });
        }
    }
    assert_eq!(desk.state(&key), "failed quarantined(offer_lost)");
}

/// F44: what is known of a worker decides whether its job is suspected.
#[test]
fn an_offer_that_came_to_nothing_is_charged_by_what_is_known() {
    // What is told, the process before and after, whether the offer was taken, the cause, and whether the job is suspected.
    type Known = (&'static str, Option<&'static str>, Option<&'static str>, bool, &'static str, bool);
    let table: [Known; 6] = [
        ("the connection broke", Some("p"), Some("p"), false, "offer_lost", false),
        ("it does not say who it is", None, None, false, "offer_lost", false),
        ("it was started again", Some("p"), Some("q"), false, "offer_lost", true),
        ("it was fenced, and lives", Some("p"), Some("p"), true, "lease_expired", false),
        ("it died with the job", Some("p"), Some("q"), true, "worker_lost", true),
        ("it lost the job, and does not say how", None, None, true, "worker_lost", true),
    ];
    for (name, before, after, is_taken, cause, is_suspect) in table {
        let mut desk = Desk::new();
        desk.register_as("w", 1, Vec::new(), before);
        let key = desk.submit("j", Request::default());
        if is_taken {
            desk.done(accepted(&desk, &key));
        }
        desk.register_as("w", 1, Vec::new(), after);
        assert_eq!(desk.state(&key), format!("backoff failure({cause})"), "{name}");
        assert_eq!(!desk.row(&key).lost_workers.is_empty(), is_suspect, "{name}");
        assert_eq!(desk.row(&key).n_failed, u32::from(is_taken), "{name}");
    }
}

/// F39: a worker of an earlier version goes on with what it has, and gets nothing else.
#[test]
fn one_that_is_outdated_finishes_what_it_runs() {
    let (mut desk, key) = Desk::running();
    let holding = vec![desk.holding(&key)];
    desk.restart();
    let register = |holding| Input::Register {
        worker: worker("w"),
        session: Session(2),
        devices: Devices { n_cpu: 4, n_cuda: 0 },
        memory: BTreeMap::new(),
        labels: BTreeMap::new(),
        process: None,
        outdated: true,
        draining: false,
        holding,
    };
    desk.done(register(holding));
    let next = desk.submit("next", once());
    assert_eq!((desk.state(&key).as_str(), desk.state(&next).as_str()), ("running started", "queued submitted"));
    desk.done(finished(&key, 1, Outcome::Succeeded));
    desk.beat("w", &[]);
    assert_eq!((desk.state(&key).as_str(), desk.state(&next).as_str()), ("succeeded finished", "queued submitted"));
    // The same one, renewed.
    desk.session = 2;
    desk.register("w", 4, Vec::new());
    assert_eq!(desk.state(&next), "starting granted");
}

/// After a restart of the scheduler nobody knows whether its offers went out.
#[test]
fn an_offer_that_a_restart_swallowed_is_nobodys_fault() {
    for comes_back in [true, false] {
        let mut desk = Desk::new();
        desk.register_as("w", 1, Vec::new(), Some("p"));
        let key = desk.submit("j", once());
        desk.restart();
        if comes_back {
            desk.register_as("w", 1, Vec::new(), Some("q"));
        } else {
            desk.wait(Duration::from_secs(10));
        }
        assert_eq!(desk.state(&key), "backoff failure(offer_lost)");
        assert!(desk.row(&key).lost_workers.is_empty());
    }
}
