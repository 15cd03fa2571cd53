//! A seeded simulation of the core among workers, people and a network that do their worst.
//!
//! Every step is checked by all invariants, by a strict store, by restoring a scheduler from the rows, and by an observer
//! that sees only what is stored and sent. After a while the faults stop; then every job must end.
//!
//! `ATTUNE_SIM_SEEDS=20000` runs that many seeds; `ATTUNE_SIM_SEED=17` runs one and prints what happens.

mod agent;
mod ledger;
pub(crate) mod rng;
mod tally;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use tally::Tally;
use world::World;

use crate::plant::Plant;

/// Seeds of an ordinary run.
const N_SEEDS: u64 = 1000;

/// Runs one world; a panic is a failure like any other.
fn run(seed: u64, plant: Option<Plant>, traced: bool) -> (Result<(), String>, World) {
    let mut world = World::new(seed, plant, traced);
    let outcome = catch_unwind(AssertUnwindSafe(|| world.run()));
    let outcome = outcome.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("panicked: {}", text.unwrap_or("without a message")))
    });
    (outcome, world)
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Runs the seeds on two threads and adds up what they met.
fn run_all(seeds: std::ops::Range<u64>) -> Tally {
    let run_some = |from: u64| {
        let mut tally = Tally::default();
        for seed in seeds.clone().skip(from as usize).step_by(2) {
            let (outcome, world) = run(seed, None, false);
            if let Err(why) = outcome {
                panic!(
                    "seed {seed} broke at {} ms: {why}\nreplay: ATTUNE_SIM_SEED={seed} cargo test -p attune-scheduler-core \
                     sim::the_core_holds -- --nocapture",
                    world.now_ms
                );
            }
            tally.add(&world.tally);
        }
        tally
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| run_some(1));
        let mut tally = run_some(0);
        match other.join() {
            Ok(theirs) => tally.add(&theirs),
            Err(panic) => std::panic::resume_unwind(panic),
        }
        tally
    })
}

#[test]
fn the_core_holds() {
    if let Some(seed) = setting("ATTUNE_SIM_SEED") {
        let (outcome, world) = run(seed, None, true);
        for line in world.trace.iter().flatten() {
            println!("{line}");
        }
        return outcome.unwrap();
    }
    let tally = run_all(0..setting("ATTUNE_SIM_SEEDS").unwrap_or(N_SEEDS));
    println!("{tally:#?}");
    for fault in [
        "a connection broke",
        "a job killed its worker",
        "a lie",
        "a partition",
        "a worker died",
        "a worker froze",
        "crash after the store",
        "crash before the store",
        "doubled message",
        "lost message",
        "the scheduler died",
        "the scheduler stalled",
    ] {
        assert!(tally.faults.contains_key(fault), "{fault:?} never happened");
    }
    for lanes in ["2 lanes", "3 lanes"] {
        assert!(tally.arrows.get(lanes).is_some_and(|n| *n > 20), "cohorts of {lanes} are rare");
    }
    for (arrow, least) in [
        ("running -> stopping(preempt) preempt_asked", 50),
        ("stopping(cancel) -> cancelled time_limit", 1),
        ("running -> failed quarantined", 20),
        ("starting -> failed quarantined", 20),
    ] {
        assert!(tally.arrows.get(arrow).is_some_and(|n| *n > least), "{arrow} is rare");
    }
    for refusal in [
        "BeyondQuota",
        "QueueFull",
        "commit: AttemptOver",
        "commit: NotItsLease",
        "commit: NotTheLeader",
        "commit: OlderCheckpoint",
        "commit: StaleEpoch",
        "commit: UnknownEpoch",
        "NoProgress",
        "StaleBeat",
        "StaleSession",
        "UnknownWorker",
    ] {
        assert!(tally.refusals.contains_key(refusal), "nobody was refused for {refusal}");
    }
}

#[test]
fn a_seed_repeats_itself() {
    for seed in 0..5 {
        let fingerprint = |_| run(seed, None, false).1.fingerprint();
        let [first, second] = [1, 2].map(fingerprint);
        assert_eq!(first, second, "seed {seed}");
    }
}

/// A simulation is worth what it finds: each planted defect must be caught.
#[test]
fn planted_defects_are_caught() {
    let mut missed = Vec::new();
    for plant in Plant::ALL {
        let caught = (0..3000).find_map(|seed| run(seed, Some(plant), false).0.err().map(|why| (seed, why)));
        match caught {
            Some((seed, why)) => println!("{plant:?}: seed {seed}: {why}"),
            None => missed.push(plant),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
