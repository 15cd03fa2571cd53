//! Calendars that jump by hours and days, on every node: nothing that runs is given up for it, nothing that is lost is waited for, and
//! what is numbered goes on being numbered upwards.
//!
//! How long a job has run does not depend on it either. What people state as a date follows the calendar and is no part of this: the end of a token or a certificate, a job's deadline.

use attune_proto::v1::{self, FailureCause, JobState};
use tokio::time::{Duration, Instant};

use crate::kills::prepare;
use crate::support::{Cluster, SMALL, outputs};
use crate::surroundings::Calendar;

/// Steps between two jumps.
const APART: u64 = 25;
/// How long it may take until a lost worker is missed: far beyond a lease of three seconds, far below an hour.
const MISSED: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_calendar_that_jumps_decides_nothing() {
    let mut calendar = None;
    let mut cluster = Cluster::start_prepared(None, |cluster| {
        calendar = Calendar::make(cluster.folder.path());
        calendar.as_ref().map(Calendar::variables).unwrap_or_default()
    })
    .await;
    let Some(calendar) = calendar else { return };
    let base = format!("base={}", prepare(&cluster).await);
    let file = cluster.path("world/chat.yaml");
    let mut set: Vec<&str> =
        SMALL.into_iter().chain([base.as_str(), "tune.steps=300", "tune.checkpoint.every_steps=50"]).collect();
    // An hour passes for the calendar, and a few seconds for the job.
    set.push("limits.run_seconds=1800");
    calendar.jump("+1d");
    let undisturbed = cluster.submit(&file, &set);
    let expected = outputs(&cluster.ends(&undisturbed, JobState::Succeeded).await);

    let id = cluster.submit(&file, &set);
    let step = |job: &v1::Job| job.progress.as_ref().map_or(0, |progress| progress.step);
    for (round, away) in (1..).zip(["+1h", "-1h", "+1d", "-1d", "+0", "-1d"]) {
        cluster.wait(&id, "progress", |job| step(job) >= round * APART || job.end_time.is_some()).await;
        calendar.jump(away);
    }
    // A scheduler that starts two days before the newest job was made: ids and epochs go on from what is stored.
    let before = cluster.wait(&id, "answer", |_| true).await;
    assert_eq!((before.state(), before.epoch), (JobState::Running, 1), "{before:#?}");
    cluster.scheduler.take().unwrap().kill();
    cluster.start_scheduler(&[]).await;
    let later = cluster.submit(&file, &set);
    assert!(undisturbed < id && id < later, "{undisturbed} {id} {later}");
    let listed = cluster.json(["jobs", "list"]);
    assert_eq!(listed[0]["id"], later.as_str(), "the newest comes first: {listed}");
    let job = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!((job.epoch, job.failed_attempts, outputs(&job)), (1, 0, expected.clone()), "{job:#?}");

    // A worker that is really gone is missed in time, although the calendar has gone back a day.
    let trains = |job: &v1::Job| job.state() == JobState::Running && !job.checkpoint.is_empty();
    cluster.wait(&later, "training", trains).await;
    calendar.jump("-2d");
    cluster.worker.take().unwrap().kill();
    let killed = Instant::now();
    let lost = cluster.wait(&later, "loss", |job| job.failure.is_some()).await;
    assert!(killed.elapsed() < MISSED, "{:?}", killed.elapsed());
    assert_eq!(lost.failure.unwrap().cause(), FailureCause::WorkerLost);
    cluster.start_worker(&[]);
    let job = cluster.ends(&later, JobState::Succeeded).await;
    assert_eq!((job.epoch, outputs(&job)), (2, expected), "{job:#?}");
}
