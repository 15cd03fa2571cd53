//! Two schedulers on one database of PostgreSQL, of which one leads: `kill -9` of whoever leads, and of the database, and the job still
//! succeeds, once, with the adapter of an undisturbed run.

use attune_proto::v1::{self, JobState};

use crate::kills::prepare;
use crate::postgres::Postgres;
use crate::support::{Cluster, SMALL, outputs};

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
        cluster.fail_over();
        // The other one answers now, for all that was acknowledged.
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
