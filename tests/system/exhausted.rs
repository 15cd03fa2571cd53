//! A scheduler that may open no more files.

use std::process::Command;

use attune_proto::Client;
use attune_proto::client::Options;
use attune_proto::v1::{self, JobState};
use tokio::net::TcpStream;
use tokio::time::{Duration, Instant, sleep, timeout};

use crate::kills::prepare;
use crate::support::{Cluster, PATIENCE, SMALL, outputs};

/// For how long it may not: longer than a lease.
const SPAN: Duration = Duration::from_secs(5);

/// Lets a process that runs have this many files; how many it may have had.
fn allow(process: nix::unistd::Pid, files: &str) {
    let set = Command::new("prlimit").args(["--pid", &process.to_string(), &format!("--nofile={files}")]).output();
    assert!(set.as_ref().is_ok_and(|set| set.status.success()), "{set:?}");
}

/// F31: connections that are there go on, nobody new is answered, and everybody is again when there is room.
#[tokio::test]
async fn a_scheduler_without_files_goes_on_with_those_that_it_has() {
    let cluster = Cluster::start().await;
    let base = format!("base={}", prepare(&cluster).await);
    // It reads and stores nothing in the middle.
    let set: Vec<&str> =
        SMALL.into_iter().chain([base.as_str(), "tune.steps=1000", "tune.checkpoint.every_steps=1000"]).collect();
    let file = cluster.path("world/chat.yaml");
    let id = cluster.submit(&file, &set);
    let trains = |job: &v1::Job| job.state() == JobState::Running && job.progress.is_some();
    cluster.wait(&id, "training", trains).await;

    let scheduler = cluster.scheduler.as_ref().unwrap().id();
    let open = match std::fs::read_dir(format!("/proc/{scheduler}/fd")) {
        Ok(open) => open.count(),
        // It lets nobody look into it but root.
        Err(error) => return println!("skipped: the scheduler's open files cannot be counted: {error}"),
    };
    allow(scheduler, &format!("{}:", open + 1));
    let began = Instant::now();
    let mut waiting = Vec::new();
    let mut last = 0;
    while began.elapsed() < SPAN {
        // They stand in line at the port, and are not taken in.
        waiting.extend(TcpStream::connect(("127.0.0.1", cluster.port())).await.ok());
        let job = cluster.job(&id).await.expect("the connection that there was is answered");
        assert_eq!((job.state(), job.epoch), (JobState::Running, 1), "{job:#?}");
        let step = job.progress.map_or(0, |progress| progress.step);
        assert!(step >= last);
        last = step;
        sleep(Duration::from_millis(100)).await;
    }
    assert!(last > 0);
    // A connection that the system takes is not one that is answered.
    let asks = async || {
        let client = Client::connect(&cluster.url(), Options { retries: 0, ..Options::default() }).await.ok()?;
        let mut jobs = client.jobs();
        let asked = jobs.list_jobs(v1::ListJobsRequest::default());
        timeout(Duration::from_secs(1), asked).await.ok()?.ok()
    };
    assert!(asks().await.is_none(), "a new connection was answered");
    drop(waiting);
    allow(scheduler, "4096:");
    let deadline = Instant::now() + PATIENCE;
    while asks().await.is_none() {
        assert!(Instant::now() < deadline, "nobody is answered again\n{}", cluster.logs());
        sleep(Duration::from_millis(50)).await;
    }
    let job = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!((job.epoch, job.failed_attempts), (1, 0), "{job:#?}");
    assert!(!outputs(&job).is_empty());
    assert!(cluster.logs().contains("a connection was not taken in"), "{}", cluster.logs());
}
