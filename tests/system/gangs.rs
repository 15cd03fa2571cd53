//! Jobs that several workers train together: the same bits as on one, and one failed attempt when a rank is lost.

use std::collections::BTreeMap;

use attune_proto::v1::{self, JobState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::kills::prepare;
use crate::support::{Cluster, SMALL, outputs};

/// Long enough to be hit in the middle, with checkpoints on the way.
fn job(base: &str, workers: u32) -> Vec<String> {
    let fixed = ["tune.steps=300", "tune.checkpoint.every_steps=50"];
    let own = [format!("base={base}"), format!("resources.workers={workers}")];
    SMALL.into_iter().chain(fixed).map(str::to_owned).chain(own).collect()
}

fn submit(cluster: &Cluster, job: &[String]) -> String {
    cluster.submit(&cluster.path("world/chat.yaml"), &job.iter().map(String::as_str).collect::<Vec<_>>())
}

#[tokio::test]
async fn a_job_on_two_workers_has_the_bits_of_one_and_outlives_the_loss_of_a_rank() {
    let cluster = Cluster::start().await;
    let base = prepare(&cluster).await;
    let alone = submit(&cluster, &job(&base, 1));
    let expected: BTreeMap<String, String> = outputs(&cluster.ends(&alone, JobState::Succeeded).await);

    let waits = submit(&cluster, &job(&base, 2));
    let queued = cluster.wait(&waits, "reason", |job| job.state() == JobState::Queued && !job.message.is_empty()).await;
    assert!(queued.message.contains("worker"), "{}", queued.message);
    let second = cluster.another_worker("two");
    let ended = cluster.ends(&waits, JobState::Succeeded).await;
    assert_eq!((ended.epoch, ended.failed_attempts, outputs(&ended)), (1, 0, expected.clone()));

    // A rank dies: one failed attempt, told by the worker that knows why; a rank that says nothing more is the same.
    let id = submit(&cluster, &job(&base, 2));
    let hit = [(&second, Signal::SIGKILL), (cluster.worker.as_ref().unwrap(), Signal::SIGSTOP)];
    for (epoch, (worker, signal)) in (1..).zip(hit) {
        let trains =
            |job: &v1::Job| job.epoch == epoch && job.state() == JobState::Running && !job.checkpoint.is_empty();
        cluster.wait(&id, "training", trains).await;
        kill(Pid::from_raw(worker.children()[0]), signal).unwrap();
        cluster.wait(&id, "next attempt", |job| job.epoch == epoch + 1).await;
    }
    let ended = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!((ended.epoch, ended.failed_attempts), (3, 2), "{ended:#?}");
    assert_eq!(outputs(&ended), expected);
    let events = String::from_utf8(cluster.run(["jobs", "events", &id]).stdout).unwrap();
    assert!(events.contains("of 2: the training process was killed by signal 9"), "the rank is named: {events}");

    // A worker is lost with its rank.
    let id = submit(&cluster, &job(&base, 2));
    cluster.wait(&id, "training", |job| job.state() == JobState::Running && !job.checkpoint.is_empty()).await;
    second.kill();
    cluster.wait(&id, "end of the attempt", |job| job.state() != JobState::Running).await;
    let _again = cluster.another_worker("two");
    let ended = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!(outputs(&ended), expected);
}

#[tokio::test]
async fn a_job_on_two_workers_is_paused_resumed_and_cancelled_as_one() {
    let cluster = Cluster::start().await;
    let base = prepare(&cluster).await;
    let _second = cluster.another_worker("two");
    let id = submit(&cluster, &job(&base, 2));
    let trains = |job: &v1::Job| job.state() == JobState::Running && job.progress.is_some();
    cluster.wait(&id, "training", trains).await;
    assert!(cluster.run(["jobs", "pause", &id]).status.success());
    let paused = cluster.wait(&id, "pause", |job| job.state() == JobState::Paused).await;
    assert!(!paused.checkpoint.is_empty() && paused.failed_attempts == 0, "{paused:#?}");
    assert!(cluster.run(["jobs", "resume", &id]).status.success());
    let resumed = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!((resumed.epoch, resumed.failed_attempts), (2, 0));

    let id = submit(&cluster, &job(&base, 2));
    cluster.wait(&id, "training", trains).await;
    assert!(cluster.run(["jobs", "cancel", &id]).status.success());
    cluster.ends(&id, JobState::Cancelled).await;
    // Both workers are free again.
    let last = submit(&cluster, &job(&base, 2));
    assert_eq!(outputs(&cluster.ends(&last, JobState::Succeeded).await), outputs(&resumed));
}
