//! The scheduler is known by a name, which stands for nothing for a while, and then for another address.

use std::path::Path;

use attune_proto::v1::{self, JobState};
use tokio::time::{Duration, Instant, sleep};

use crate::kills::prepare;
use crate::proxy::{Proxy, Weather};
use crate::support::{Cluster, PATIENCE, Process, SMALL, outputs};

/// What the scheduler is called.
const NAME: &str = "scheduler.attune.test";

fn lines_with(path: &Path, words: &str) -> usize {
    std::fs::read_to_string(path).unwrap_or_default().lines().filter(|line| line.contains(words)).count()
}

/// F19: nobody knows the name, then somebody does, then nobody again, then it stands for another address.
#[tokio::test]
async fn a_worker_follows_the_name_of_its_scheduler() {
    let mut cluster = Cluster::start().await;
    let base = format!("base={}", prepare(&cluster).await);
    let set: Vec<&str> =
        SMALL.into_iter().chain([base.as_str(), "tune.steps=300", "tune.checkpoint.every_steps=50"]).collect();
    let file = cluster.path("world/chat.yaml");
    let undisturbed = cluster.submit(&file, &set);
    let expected = outputs(&cluster.ends(&undisturbed, JobState::Succeeded).await);
    cluster.worker.take().unwrap().kill();

    // Two ways to the scheduler on one port, at two addresses.
    let here = Proxy::start_at(([127, 0, 0, 2], 0).into(), cluster.port()).await;
    let port = here.address().port();
    let there = Proxy::start_at(([127, 0, 0, 3], port).into(), cluster.port()).await;
    // Written in place: the file itself is what is mounted.
    let hosts = cluster.path("hosts");
    let name = |address: Option<&str>| {
        let own = address.map(|address| format!("{address} {NAME}\n")).unwrap_or_default();
        std::fs::write(&hosts, format!("127.0.0.1 localhost\n{own}")).unwrap();
    };
    name(None);
    let Some(mut command) = Cluster::attune_with_hosts(&hosts) else {
        return eprintln!("skipped: nobody may have a mount namespace of one's own here");
    };
    let log = cluster.path("named.log");
    command.args(["worker", "--server", &format!("http://{NAME}:{port}"), "--name", "named", "--work-dir"]);
    let began = Instant::now();
    let _worker = Process::start(command.arg(cluster.path("named")), &log);
    let fails = async |n: usize| {
        let deadline = Instant::now() + PATIENCE;
        while lines_with(&log, "no connection to the scheduler; trying again") < n {
            assert!(Instant::now() < deadline, "{}", std::fs::read_to_string(&log).unwrap());
            sleep(Duration::from_millis(10)).await;
        }
    };
    fails(5).await;
    // Each wait is half of 100, 200, 400 and 800 ms at least.
    assert!(began.elapsed() > Duration::from_millis(750), "it waits longer and longer: {:?}", began.elapsed());
    name(Some("127.0.0.2"));
    let id = cluster.submit(&file, &set);
    let trains = |job: &v1::Job| job.state() == JobState::Running && !job.checkpoint.is_empty();
    cluster.wait(&id, "training", trains).await;

    let before = lines_with(&log, "no connection to the scheduler; trying again");
    name(None);
    here.turn(Weather::Cut);
    fails(before + 3).await;
    name(Some("127.0.0.3"));
    let ended = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!(outputs(&ended), expected);
    assert!(ended.failed_attempts <= 1, "{ended:#?}");
    assert_eq!(lines_with(&log, "registered with the scheduler"), 2);
    drop(there);
}
