//! Bits that flip where artifacts are kept: found before they are used, and gone round.

use attune_proto::v1::{self, FailureCause, JobState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::kills::prepare;
use crate::support::{Cluster, SMALL, outputs};

/// Flips a bit in the middle of the largest file of an artifact, where the scheduler keeps it.
fn flip(cluster: &Cluster, digest: &str) {
    let project = cluster.path("artifacts/projects/default");
    let path = |kind: &str, digest: &str| {
        let hex = digest.rsplit(':').next().unwrap();
        project.join(kind).join(&hex[..2]).join(hex)
    };
    let manifest = std::fs::read(path("manifests", digest)).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let files = manifest["files"].as_array().unwrap();
    let largest = files.iter().max_by_key(|file| file["size_bytes"].as_u64()).unwrap();
    let blob = path("blobs", largest["digest"].as_str().unwrap());
    let mut bytes = std::fs::read(&blob).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(blob, bytes).unwrap();
}

#[tokio::test]
async fn a_damaged_checkpoint_is_found_and_the_one_before_it_gone_on_from() {
    let cluster = Cluster::start().await;
    let base = format!("base={}", prepare(&cluster).await);
    let file = cluster.path("world/chat.yaml");
    let set: Vec<&str> =
        SMALL.into_iter().chain([base.as_str(), "tune.steps=600", "tune.checkpoint.every_steps=200"]).collect();
    let undisturbed = cluster.submit(&file, &set);
    let expected = outputs(&cluster.ends(&undisturbed, JobState::Succeeded).await);

    let id = cluster.submit(&file, &set);
    let mut digests = Vec::new();
    // From the second checkpoint on there is one to go back to, and there is no third that could be stored meanwhile.
    cluster
        .wait(&id, "checkpoints", |job| {
            if !job.checkpoint.is_empty() && digests.last() != Some(&job.checkpoint) {
                digests.push(job.checkpoint.clone());
            }
            digests.len() > 1
        })
        .await;
    let child = Pid::from_raw(cluster.worker.as_ref().unwrap().children()[0]);
    kill(child, Signal::SIGSTOP).unwrap();
    let waits = cluster.wait(&id, "answer", |_| true).await;
    flip(&cluster, &waits.checkpoint);
    kill(child, Signal::SIGKILL).unwrap();
    let is_found = |job: &v1::Job| {
        job.failure.as_ref().is_some_and(|failure| failure.cause() == FailureCause::Corrupt) || job.end_time.is_some()
    };
    let found = cluster.wait(&id, "the damage", is_found).await;
    let failure = found.failure.clone().unwrap();
    assert_eq!(failure.cause(), FailureCause::Corrupt, "{found:#?}");
    assert!(failure.message.contains(&waits.checkpoint), "it is named: {}", failure.message);
    let job = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!((job.epoch, job.failed_attempts, outputs(&job)), (3, 2, expected), "{job:#?}");
}
