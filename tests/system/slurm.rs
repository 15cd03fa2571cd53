//! Workers that are jobs of a real Slurm.

use std::process::Command;

use attune_proto::v1::{self, JobState};
use serde_json::json;
use tokio::time::{Duration, Instant};

use crate::kills::prepare;
use crate::support::{Cluster, PATIENCE, SMALL, outputs};

/// What a program of Slurm answers.
fn slurm(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The jobs that have not ended: numbers and states.
fn queue() -> Vec<(String, String)> {
    let text = slurm("squeue", &["--noheader", "--name=attune-test", "--format=%i|%T"]);
    let jobs = text.lines().filter_map(|line| line.trim().split_once('|'));
    jobs.map(|(number, state)| (number.to_owned(), state.to_owned())).collect()
}

async fn until_the_queue_is_empty(cluster: &Cluster) {
    let deadline = Instant::now() + PATIENCE;
    while !queue().is_empty() {
        assert!(Instant::now() < deadline, "{:?}\n{}", queue(), cluster.logs());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn slurm_is_asked_for_workers_that_train_and_are_given_back_and_may_be_killed() {
    if std::env::var_os("ATTUNE_TEST_SLURM").is_none() {
        eprintln!("skipped: ATTUNE_TEST_SLURM is not set; tests/services/slurm.sh starts a Slurm and sets it");
        return;
    }
    let cluster = Cluster::start_with_pool(|cluster| {
        json!({
            "name": "test", "max": 2, "idle": "3s", "start": "60s", "look": "1s",
            "worker": {"grace": "5s", "labels": {"from": "slurm"}},
            "server": cluster.url(),
            "slurm": {
                "memory": "1500M", "cpus": 1, "time": "1h", "work_dir": cluster.path("nodes"),
                "output": cluster.path("worker.log"), "options": ["--open-mode=append"],
            },
        })
    })
    .await;
    assert_eq!(queue(), []);
    let base = prepare(&cluster).await;
    let base = format!("base={base}");
    let own = [base.as_str(), "tune.steps=300", "tune.checkpoint.every_steps=50", "resources.labels={from: slurm}"];
    let set: Vec<&str> = SMALL.into_iter().chain(own).collect();
    let chat = cluster.path("world/chat.yaml");
    let id = cluster.submit(&chat, &set);
    cluster.wait(&id, "training", |job| job.state() == JobState::Running).await;
    assert!(matches!(&queue()[..], [(_, state)] if state == "RUNNING"), "{:?}", queue());
    let undisturbed = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!((undisturbed.epoch, undisturbed.failed_attempts), (1, 0), "{undisturbed:#?}");

    // It idles and is given back; its folder goes with it.
    until_the_queue_is_empty(&cluster).await;
    assert_eq!(std::fs::read_dir(cluster.path("nodes")).unwrap().count(), 0);
    assert!(cluster.logs().contains("is given back"), "{}", cluster.logs());

    // Slurm kills a worker in the middle, at once and in its own order: another one is asked for, the bits are the same.
    for options in [&["--signal=KILL", "--full"][..], &[]] {
        let id = cluster.submit(&chat, &set);
        let trains = |job: &v1::Job| job.state() == JobState::Running && !job.checkpoint.is_empty();
        cluster.wait(&id, "training", trains).await;
        // What was killed before may still be there, completing.
        let queue = queue();
        let mut running = queue.iter().filter(|(_, state)| state == "RUNNING");
        let (Some((number, _)), None) = (running.next(), running.next()) else { panic!("{queue:?}") };
        slurm("scancel", &[options, &[number.as_str()]].concat());
        let job = cluster.ends(&id, JobState::Succeeded).await;
        assert_eq!(outputs(&job), outputs(&undisturbed));
        assert!(job.epoch > 1, "{job:#?}");
    }
    until_the_queue_is_empty(&cluster).await;
    let workers = cluster.json(["workers", "list"]);
    assert!(
        workers.as_array().is_none_or(|workers| workers.iter().all(|worker| worker["state"] != "ready")),
        "{workers}"
    );
}
