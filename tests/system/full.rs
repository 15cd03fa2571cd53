//! What is full: the disk of a worker, of the database, of the artifacts; and memory. It is named, costs nothing that was there before,
//! and is over when there is room again.

use std::collections::BTreeSet;

use attune_proto::v1::{self, FailureCause, JobState};
use tokio::time::{Duration, Instant, sleep};

use crate::kills::prepare;
use crate::support::{Cluster, PATIENCE, SMALL, outputs};
use crate::surroundings::{Disk, Memory};

/// A cluster, with a disk of its own at one of its folders.
async fn cluster_with_a_disk(at: &str) -> Option<(Cluster, Disk)> {
    let mut disk = None;
    let cluster = Cluster::start_prepared(None, |cluster| {
        disk = Disk::mount([cluster.path(at)]);
        Vec::new()
    })
    .await;
    let [disk] = disk?;
    Some((cluster, disk))
}

fn trains(job: &v1::Job) -> bool {
    job.state() == JobState::Running && !job.checkpoint.is_empty()
}

/// Fills the disk, and what room the job makes on it, until it fails for that. A job that removes what it has handed over would go
/// on in the room of that.
async fn fails_on(cluster: &Cluster, id: &str, disk: &Disk) -> v1::Job {
    let fails = |job: &v1::Job| {
        disk.fill();
        job.failure.is_some()
    };
    let failed = cluster.wait(id, "failure", fails).await;
    let failure = failed.failure.as_ref().unwrap();
    assert_eq!(failure.cause(), FailureCause::DiskFull, "{failure:#?}");
    failed
}

fn errors(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What is changed in the chat job: long enough to be hit in the middle.
fn set(base: &str) -> Vec<&str> {
    let fixed = ["tune.steps=400", "tune.checkpoint.every_steps=20", "limits.max_attempts=1000"];
    SMALL.into_iter().chain(fixed).chain([base]).collect()
}

#[tokio::test]
async fn a_full_disk_of_a_worker_costs_attempts_and_no_checkpoint() {
    let Some((cluster, disk)) = cluster_with_a_disk("worker").await else { return };
    let base = format!("base={}", prepare(&cluster).await);
    let (file, set) = (cluster.path("world/chat.yaml"), set(&base));
    let undisturbed = cluster.submit(&file, &set);
    let expected = outputs(&cluster.ends(&undisturbed, JobState::Succeeded).await);

    let id = cluster.submit(&file, &set);
    cluster.wait(&id, "checkpoint", trains).await;
    let failed = fails_on(&cluster, &id, &disk).await;
    // The last checkpoint is whole.
    let pulled = cluster.run(["artifacts", "pull", &failed.checkpoint, "pulled"]);
    assert!(pulled.status.success(), "{pulled:?}");
    disk.clear();
    let job = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!(outputs(&job), expected);
    assert!(job.failed_attempts > 0, "{job:#?}");
    let deadline = Instant::now() + PATIENCE;
    while disk.files().iter().any(|file| file.contains("checkpoint-") || file.contains("partial")) {
        assert!(Instant::now() < deadline, "something half-written is left: {:?}", disk.files());
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_full_disk_of_the_database_refuses_changes_and_answers_questions() {
    let Some((mut cluster, disk)) = cluster_with_a_disk("database").await else { return };
    let base = format!("base={}", prepare(&cluster).await);
    let (file, set) = (cluster.path("world/chat.yaml"), set(&base));
    let undisturbed = cluster.submit(&file, &set);
    let expected = outputs(&cluster.ends(&undisturbed, JobState::Succeeded).await);

    let id = cluster.submit(&file, &set);
    cluster.wait(&id, "checkpoint", trains).await;
    let process = cluster.scheduler.as_ref().unwrap().id();
    let changes = set.iter().flat_map(|set| ["--set", set]);
    let arguments = ["submit", file.to_str().unwrap()].into_iter().chain(changes);
    // What of the log is there already still has room for a little.
    let deadline = Instant::now() + PATIENCE;
    let mut taken = BTreeSet::new();
    let refused = loop {
        disk.fill();
        let output = cluster.run(arguments.clone());
        if !output.status.success() {
            break output;
        }
        taken.insert(String::from_utf8(output.stdout).unwrap().trim().to_owned());
        assert!(Instant::now() < deadline, "everything is taken");
    };
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let said = errors(&refused);
    assert!(said.contains("database") && said.contains("unavailable") && said.contains("full"), "{said}");
    let listed = cluster.json(["jobs", "list"]);
    assert!(listed.as_array().unwrap().len() >= 3 + taken.len(), "reads go on: {listed}");
    disk.clear();
    let again = cluster.submit(&file, &set);
    for id in taken.iter().chain([&id, &again]) {
        let job = cluster.ends(id, JobState::Succeeded).await;
        assert_eq!(outputs(&job), expected, "{id}");
    }
    assert!(!cluster.scheduler.as_mut().unwrap().has_ended());
    assert_eq!(cluster.scheduler.as_ref().unwrap().id(), process, "nobody started it anew");
}

#[tokio::test]
async fn a_full_disk_of_the_artifacts_leaves_nothing_half_written() {
    let Some((cluster, disk)) = cluster_with_a_disk("artifacts").await else { return };
    let base = format!("base={}", prepare(&cluster).await);
    let (file, set) = (cluster.path("world/chat.yaml"), set(&base));
    let undisturbed = cluster.submit(&file, &set);
    let expected = outputs(&cluster.ends(&undisturbed, JobState::Succeeded).await);

    let id = cluster.submit(&file, &set);
    cluster.wait(&id, "checkpoint", trains).await;
    fails_on(&cluster, &id, &disk).await;
    // Rows that are not there yet: equal bytes need no room.
    std::fs::write(cluster.path("rows.jsonl"), "{\"text\": \"Rows of nobody else.\"}\n".repeat(1000)).unwrap();
    let output = cluster.run(["artifacts", "push", "rows.jsonl", "--tag", "rows"]);
    assert!(output.status.code() == Some(1) && errors(&output).contains("full"), "{output:?}");
    disk.clear();
    assert!(cluster.run(["artifacts", "push", "rows.jsonl", "--tag", "rows"]).status.success());
    assert_eq!(outputs(&cluster.ends(&id, JobState::Succeeded).await), expected);
    // Everything that can be seen can be read.
    for artifact in cluster.json(["artifacts", "list"]).as_array().unwrap() {
        let digest = artifact["digest"].as_str().unwrap();
        let pulled = cluster.run(["artifacts", "pull", digest, &digest.replace(':', "-")]);
        assert!(pulled.status.success(), "{artifact}: {pulled:?}");
    }
}

#[tokio::test]
async fn a_disk_that_may_have_lost_a_write_ends_the_scheduler() {
    let mut cluster = Cluster::start().await;
    let base = format!("base={}", prepare(&cluster).await);
    cluster.scheduler.take().unwrap().kill();
    cluster.start_scheduler(&[("FAILPOINTS", "scheduler::before_transaction=return(lost)")]).await;
    // Whoever writes first meets it: the worker that comes back, or this job.
    let (file, set) = (cluster.path("world/chat.yaml"), SMALL.into_iter().chain(["tune.steps=4", &base]));
    let arguments = ["submit".to_owned(), file.display().to_string()].into_iter();
    let output = cluster.run(arguments.chain(set.clone().flat_map(|set| ["--set".to_owned(), set.to_owned()])));
    assert!(!output.status.success(), "{output:?}");
    let deadline = Instant::now() + PATIENCE;
    while !cluster.scheduler.as_mut().unwrap().has_ended() {
        assert!(Instant::now() < deadline, "it goes on\n{}", cluster.logs());
        sleep(Duration::from_millis(20)).await;
    }
    assert!(cluster.logs().contains("may have lost a write"), "{}", cluster.logs());
    cluster.start_scheduler(&[]).await;
    let id = cluster.submit(&file, &set.collect::<Vec<_>>());
    cluster.ends(&id, JobState::Succeeded).await;
}

#[tokio::test]
async fn a_process_for_which_there_is_no_memory_is_named_and_not_tried_again() {
    let Some(memory) = Memory::make("worker") else { return };
    let cluster = Cluster::start().await;
    let base = format!("base={}", prepare(&cluster).await);
    let (file, mut set) = (cluster.path("world/chat.yaml"), set(&base));
    set.push("tune.batch_tokens=4096");
    // What the agent has is counted elsewhere; what it starts from now on is counted here.
    memory.enclose(cluster.worker.as_ref().unwrap().id());
    memory.limit(LITTLE);
    let id = cluster.submit(&file, &set);
    let job = cluster.ends(&id, JobState::Failed).await;
    let failure = job.failure.unwrap();
    assert_eq!(failure.cause(), FailureCause::OutOfMemory, "{failure:#?}");
    assert_eq!((job.epoch, failure.signal), (1, Some(9)), "{failure:#?}");
}

/// Memory that an agent can go on with and no process can train with.
const LITTLE: u64 = 28 << 20;
