//! A job that ends every worker that takes it.

use std::collections::BTreeSet;

use attune_proto::v1::{FailureCause, JobReason, JobState};
use tokio::time::{Duration, Instant, sleep};

use crate::kills::prepare;
use crate::support::{Cluster, PATIENCE, Process, SMALL, outputs};

/// Kills the agent, as a defect would that a job of this name sets off: once all have heard that it runs.
const POISONED: [(&str, &str); 1] = [("FAILPOINTS", "worker::poisoned=return(poison)")];
/// The same before anybody has heard that its offer arrived.
const POISONED_AT_ONCE: [(&str, &str); 1] = [("FAILPOINTS", "worker::poisoned_offer=return(poison)")];
/// Workers of the fleet, each started again when it has ended, as a system does with its services.
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

/// F44: it is given up after three of them, and the fleet works on.
#[tokio::test]
async fn a_job_that_ends_every_worker_is_given_up_and_the_fleet_works_on() {
    given_up(&POISONED, FailureCause::WorkerLost).await;
}

/// F44: so is one of which nobody ever hears that it was taken.
#[tokio::test]
async fn a_job_that_ends_every_worker_before_a_word_is_given_up() {
    given_up(&POISONED_AT_ONCE, FailureCause::OfferLost).await;
}

async fn given_up(poisoned: &[(&str, &str)], cause: FailureCause) {
    let mut cluster = Cluster::start().await;
    let base = format!("base={}", prepare(&cluster).await);
    cluster.worker.take().unwrap().kill();
    let file = cluster.path("world/chat.yaml");
    let start = |name: &str| cluster.another_worker_with(name, poisoned);
    let mut fleet: Vec<(&str, Process)> = NAMES.map(|name| (name, start(name))).into();

    // One that is well runs all the while.
    let set: Vec<&str> =
        SMALL.into_iter().chain([base.as_str(), "tune.steps=400", "tune.checkpoint.every_steps=50"]).collect();
    let well = cluster.submit(&file, &set);
    cluster.wait(&well, "training", |job| job.state() == JobState::Running).await;
    let poison: Vec<&str> = set.iter().copied().chain(["name=poison", "limits.max_attempts=100"]).collect();
    let poison = cluster.submit(&file, &poison);
    let (deadline, mut ended) = (Instant::now() + PATIENCE, BTreeSet::new());
    let job = loop {
        for (name, process) in &mut fleet {
            if process.has_ended() {
                ended.insert(*name);
                *process = start(name);
            }
        }
        match cluster.job(&poison).await {
            Some(job) if job.end_time.is_some() => break job,
            job => assert!(Instant::now() < deadline, "{job:#?}\n{}", cluster.logs()),
        }
        sleep(Duration::from_millis(20)).await;
    };
    assert_eq!((job.state(), job.reason()), (JobState::Failed, JobReason::Quarantined), "{job:#?}");
    assert_eq!(job.failure.unwrap().cause(), cause);
    assert_eq!(ended.len(), 3, "{ended:?}");

    let job = cluster.ends(&well, JobState::Succeeded).await;
    assert_eq!((job.epoch, job.failed_attempts), (1, 0), "{job:#?}");
    // As many as there are workers, at once: all take work again.
    let all: Vec<String> = NAMES.iter().map(|_| cluster.submit(&file, &set)).collect();
    let mut workers = BTreeSet::new();
    for id in all {
        let again = cluster.ends(&id, JobState::Succeeded).await;
        assert_eq!(outputs(&again), outputs(&job));
        workers.insert(again.worker_id);
    }
    assert!(workers.len() > 1, "{workers:?}");
    let listed = cluster.json(["workers", "list"]);
    let states: Vec<_> = listed.as_array().unwrap().iter().map(|worker| worker["state"].clone()).collect();
    assert_eq!(states.len(), NAMES.len(), "{listed:#}");
}
