//! Two schedulers on one database of PostgreSQL, of which one leads: `kill -9` of whoever leads, and of the database, and the job still
//! succeeds, once, with the adapter of an undisturbed run.
#![expect(clippy::disallowed_methods, reason = "what watches beside the test is asked for what it saw")]

use attune_proto::Client;
use attune_proto::client::Options;
use attune_proto::v1::{self, JobState};

use crate::kills::prepare;
use crate::postgres::Postgres;
use crate::support::{Cluster, PATIENCE, SMALL, attune, outputs};

/// Steps between two disturbances.
const APART: u64 = 60;

#[tokio::test]
async fn a_job_goes_on_under_whoever_stood_by() {
    let Some(mut postgres) = Postgres::start().await else { return };
    let mut cluster = Cluster::start_on(&postgres.url()).await;
    let base = format!("base={}", prepare(&cluster).await);
    let file = cluster.path("world/chat.yaml");
    let set: Vec<&str> =
        SMALL.into_iter().chain([base.as_str(), "tune.steps=400", "tune.checkpoint.every_steps=50"]).collect();
    let undisturbed = cluster.submit(&file, &set);
    let expected = outputs(&cluster.ends(&undisturbed, JobState::Succeeded).await);

    cluster.start_standby();
    let id = cluster.submit(&file, &set);
    let step = |job: &v1::Job| job.progress.as_ref().map_or(0, |progress| progress.step);
    for round in 1..=4 {
        cluster.wait(&id, "progress", |job| step(job) >= round * APART || job.end_time.is_some()).await;
        if round == 3 {
            postgres.kill().await;
            postgres.start_again().await;
            continue;
        }
        // Where the database was away, the one that stood by may lead since then, and the other has ended.
        if !cluster.is_leading() {
            cluster.fail_over();
            cluster.start_standby();
        }
        cluster.fail_over();
        // The other one answers now, for all that was acknowledged, and leads before a third could.
        cluster.until_leading().await;
        let job = cluster.wait(&id, "answer of the one that stood by", |_| true).await;
        assert!(job.epoch >= 1, "{job:#?}");
        cluster.start_standby();
    }
    let job = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!(outputs(&job), expected, "the bits of an undisturbed run");
    let events = String::from_utf8(cluster.run(["--json", "jobs", "events", &id]).stdout).unwrap();
    let numbers: Vec<u64> = events
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["sequence"].as_u64().unwrap())
        .collect();
    assert!(numbers.len() > 4 && numbers.is_sorted_by(|a, b| a < b), "{events}");
    assert_eq!(events.matches("\"to\":\"succeeded\"").count(), 1, "it ends once: {events}");
    assert_eq!(cluster.json(["jobs", "list"]).as_array().unwrap().len(), 3);
}

/// Clients that know the follower alone: the one that leads is killed while one of them watches, and another submits.
#[tokio::test]
async fn who_knows_the_follower_alone_notices_no_end_of_the_one_that_leads() {
    let Some(postgres) = Postgres::start().await else { return };
    let mut cluster = Cluster::start_on(&postgres.url()).await;
    let base = format!("base={}", prepare(&cluster).await);
    let file = cluster.path("world/chat.yaml");
    cluster.start_standby();
    let follower = cluster.other_url();
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let mut client = Client::connect(&follower, Options::default()).await;
    while client.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "no follower: {}", cluster.logs());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        client = Client::connect(&follower, Options::default()).await;
    }
    let client = client.unwrap();
    let submit = |cluster: &Cluster, steps: &str| {
        let set: Vec<&str> = SMALL.into_iter().chain([base.as_str(), steps]).collect();
        let set = set.iter().flat_map(|set| ["--set", set]);
        let mut command = attune();
        command.arg("--json").arg("submit").arg(&file).args(set).env("ATTUNE_SERVER", &follower);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}\n{}", cluster.logs());
        let job: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        job["id"].as_str().unwrap().to_owned()
    };
    let first = submit(&cluster, "tune.steps=200");
    // What it has made it sees, and watches to the end on one stream.
    let asked = v1::GetJobRequest { project: String::new(), job_id: first.clone() };
    client.jobs().get_job(asked).await.unwrap();
    let asked = v1::WatchJobRequest { project: String::new(), job_id: first.clone(), after_sequence: 0 };
    let mut stream = client.jobs().watch_job(asked).await.unwrap().into_inner();
    let watch = tokio::spawn(async move {
        let mut seen = Vec::new();
        while let Some(message) = stream.message().await? {
            seen.push(message.event.unwrap_or_default().sequence);
        }
        Ok::<_, tonic::Status>(seen)
    });
    let step = |job: &v1::Job| job.progress.as_ref().map_or(0, |progress| progress.step);
    cluster.wait(&first, "progress", |job| step(job) >= 20).await;
    cluster.kill_scheduler();
    // The command tries again until somebody leads.
    let second = submit(&cluster, "tune.steps=20");
    cluster.fail_over();
    cluster.ends(&first, JobState::Succeeded).await;
    cluster.ends(&second, JobState::Succeeded).await;
    let seen = watch.await.unwrap().unwrap();
    let asked = v1::WatchJobRequest { project: String::new(), job_id: first.clone(), after_sequence: 0 };
    let mut again = client.jobs().watch_job(asked).await.unwrap().into_inner();
    let mut all = Vec::new();
    while let Some(message) = again.message().await.unwrap() {
        all.push(message.event.unwrap_or_default().sequence);
    }
    assert_eq!(seen, all, "every event, once and in order");
    let events = String::from_utf8(cluster.run(["--json", "jobs", "events", &first]).stdout).unwrap();
    assert_eq!(events.matches("\"to\":\"succeeded\"").count(), 1, "it ends once: {events}");
}
