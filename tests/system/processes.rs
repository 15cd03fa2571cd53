//! Workers that the scheduler starts on its own machine while jobs wait, and that go when none do, or when it goes.

use attune_proto::v1::{self, JobState};
use serde_json::json;
use tokio::time::{Duration, Instant};

use crate::kills::prepare;
use crate::support::{Cluster, PATIENCE, SMALL, is_alive, outputs};

/// Waits until the scheduler has no worker any more.
async fn until_none_is_left(cluster: &Cluster) {
    let deadline = Instant::now() + PATIENCE;
    while !cluster.scheduler.as_ref().unwrap().children().is_empty() {
        assert!(Instant::now() < deadline, "{}", cluster.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn workers_come_with_jobs_and_go_without_them_and_with_their_scheduler() {
    let mut cluster = Cluster::start_with_pool(|cluster| {
        json!({
            "name": "here", "max": 1, "idle": "1s", "worker": {"grace": "5s"},
            "processes": {"work_dir": cluster.path("workers")},
        })
    })
    .await;
    assert!(cluster.scheduler.as_ref().unwrap().children().is_empty());
    let base = prepare(&cluster).await;
    let base = format!("base={base}");
    let set: Vec<&str> =
        SMALL.into_iter().chain([base.as_str(), "tune.steps=300", "tune.checkpoint.every_steps=50"]).collect();
    let chat = cluster.path("world/chat.yaml");
    let undisturbed = cluster.ends(&cluster.submit(&chat, &set), JobState::Succeeded).await;
    until_none_is_left(&cluster).await;

    // A scheduler that is killed leaves no worker behind; the next one starts another, in the same folder.
    let id = cluster.submit(&chat, &set);
    let trains = |job: &v1::Job| job.state() == JobState::Running && !job.checkpoint.is_empty();
    cluster.wait(&id, "training", trains).await;
    let [worker] = cluster.scheduler.as_ref().unwrap().children()[..] else { panic!("{}", cluster.logs()) };
    cluster.scheduler.take().unwrap().kill();
    let deadline = Instant::now() + PATIENCE;
    while is_alive(worker) {
        assert!(Instant::now() < deadline, "{}", cluster.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.start_scheduler(&[]).await;
    let job = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!(outputs(&job), outputs(&undisturbed));
    assert!(job.epoch > 1, "{job:#?}");
    let folders = std::fs::read_dir(cluster.path("workers")).unwrap().count();
    assert_eq!(folders, 1);
    until_none_is_left(&cluster).await;
}
