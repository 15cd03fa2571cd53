//! Jobs that share a base in one process: one is cancelled or paused, the process or its worker is killed, one of them
//! crashes again and again, and the others end with the results that they have alone.

use std::collections::BTreeMap;

use attune_proto::v1::job_event::Event;
use attune_proto::v1::{self, JobState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::kills::prepare;
use crate::support::{Cluster, SMALL, outputs};

/// What the jobs differ in.
const JOBS: [&[&str]; 3] = [
    &["tune.adapter.rank=2", "tune.adapter.targets=[q_proj, v_proj]", "tune.seed=1", "tune.steps=90"],
    &["tune.adapter.dropout=0.2", "tune.batch_tokens=512", "tune.seed=2", "tune.steps=60"],
    &["tune.adapter.rank=16", "tune.optimizer.lr=0.001", "tune.schedule.method=linear", "tune.seed=3", "tune.steps=75"],
];

/// A job among others.
fn submit(cluster: &Cluster, base: &str, own: &[&str], shares: bool) -> String {
    let (base, share) = (format!("base={base}"), format!("resources.share_base={shares}"));
    let set = [&base, &share, "tune.checkpoint.every_steps=20", "limits.max_attempts=1"];
    let set: Vec<&str> = SMALL.into_iter().chain(set).chain(own.iter().copied()).collect();
    cluster.submit(&cluster.path("world/chat.yaml"), &set)
}

/// The jobs, each alone: the base and what they give.
async fn alone(cluster: &Cluster) -> (String, Vec<BTreeMap<String, String>>) {
    let base = prepare(cluster).await;
    let mut expected = Vec::new();
    for own in JOBS {
        let id = submit(cluster, &base, own, false);
        expected.push(outputs(&cluster.ends(&id, JobState::Succeeded).await));
    }
    (base, expected)
}

fn child(cluster: &Cluster) -> i32 {
    let children = cluster.worker.as_ref().unwrap().children();
    let [child] = children[..] else { panic!("not one training process: {children:?}\n{}", cluster.logs()) };
    child
}

fn is_on_its_way(job: &v1::Job) -> bool {
    job.progress.as_ref().is_some_and(|progress| progress.step > 0)
}

/// Waits until a job has made steps that it had not made when this was called.
async fn goes_on(cluster: &Cluster, id: &str) {
    let step = cluster.job(id).await.and_then(|job| job.progress).map_or(0, |progress| progress.step);
    cluster.wait(id, "further step", |job| job.progress.as_ref().is_some_and(|p| p.step > step)).await;
}

/// The states that a job has had, in order.
async fn states(cluster: &Cluster, id: &str) -> Vec<JobState> {
    let asked = v1::WatchJobRequest { job_id: id.to_owned(), ..Default::default() };
    let mut stream = cluster.client().jobs().watch_job(asked).await.unwrap().into_inner();
    let mut states = Vec::new();
    while let Some(answer) = stream.message().await.unwrap() {
        if let Some(Event::StateChange(change)) = answer.event.and_then(|event| event.event) {
            states.push(change.to());
        }
    }
    states
}

#[tokio::test]
async fn jobs_share_a_process_and_end_with_the_results_that_they_have_alone() {
    let mut cluster = Cluster::start().await;
    let (base, expected) = alone(&cluster).await;

    // All of them are in the queue before a worker comes.
    cluster.worker.take().unwrap().kill();
    let ids = JOBS.map(|own| submit(&cluster, &base, own, true));
    let fourth = submit(&cluster, &base, &["tune.steps=100000"], true);
    cluster.start_worker(&[]);
    cluster.wait(&fourth, "step", is_on_its_way).await;
    let process = child(&cluster);
    for id in &ids {
        let job = cluster.wait(id, "step", is_on_its_way).await;
        assert_eq!((job.state(), job.epoch), (JobState::Running, 1), "{job:#?}");
    }

    let cancel = v1::CancelJobRequest { project: String::new(), job_id: fourth.clone() };
    cluster.client().jobs().cancel_job(cancel).await.unwrap();
    cluster.ends(&fourth, JobState::Cancelled).await;
    for id in &ids {
        goes_on(&cluster, id).await;
    }
    assert_eq!(child(&cluster), process, "the others go on in the same process");

    kill(Pid::from_raw(process), Signal::SIGKILL).unwrap();
    for (id, expected) in ids.iter().zip(&expected) {
        let job = cluster.ends(id, JobState::Succeeded).await;
        // Nobody knows whose fault it was: it costs none of them its only attempt, and each goes on alone.
        assert_eq!((job.epoch, job.failed_attempts), (2, 1), "{job:#?}");
        assert_eq!(outputs(&job), *expected, "the results of the job alone");
    }
}

#[tokio::test]
async fn one_lane_is_paused_and_a_worker_that_dies_between_two_ends_loses_and_doubles_none() {
    let mut cluster = Cluster::start().await;
    let (base, expected) = alone(&cluster).await;
    cluster.worker.take().unwrap().kill();
    let ids = JOBS.map(|own| submit(&cluster, &base, &[own, &["limits.max_attempts=2"]].concat(), true));
    // The ends of the paused lane and of the first that is done are told; the worker dies before the third.
    cluster.start_worker(&[("FAILPOINTS", "worker::before_finished=2*off->return(kill)")]);
    let [first, paused, last] = &ids;
    for id in &ids {
        cluster.wait(id, "step", is_on_its_way).await;
    }
    let process = child(&cluster);
    let pause = v1::PauseJobRequest { project: String::new(), job_id: paused.clone() };
    cluster.client().jobs().pause_job(pause).await.unwrap();
    let job = cluster.wait(paused, "pause", |job| job.state() == JobState::Paused).await;
    assert!(!job.checkpoint.is_empty(), "{job:#?}");
    for id in [first, last] {
        goes_on(&cluster, id).await;
    }
    assert_eq!(child(&cluster), process, "the others go on in the same process");

    let deadline = tokio::time::Instant::now() + crate::support::PATIENCE;
    while !cluster.worker.as_mut().unwrap().has_ended() {
        assert!(tokio::time::Instant::now() < deadline, "the worker lives\n{}", cluster.logs());
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let resume = v1::ResumeJobRequest { project: String::new(), job_id: paused.clone() };
    cluster.client().jobs().resume_job(resume).await.unwrap();
    cluster.start_worker(&[]);
    for (id, expected) in ids.iter().zip(&expected) {
        let job = cluster.ends(id, JobState::Succeeded).await;
        assert_eq!(outputs(&job), *expected, "the results of the job alone");
        let states = states(&cluster, id).await;
        let n_ends = states.iter().filter(|state| **state == JobState::Succeeded).count();
        assert_eq!(n_ends, 1, "{states:?}");
    }
}

#[tokio::test]
async fn a_lane_that_crashes_costs_its_own_attempts_only() {
    let mut cluster = Cluster::start().await;
    let (base, expected) = alone(&cluster).await;
    cluster.worker.take().unwrap().kill();
    let ids = JOBS.map(|own| submit(&cluster, &base, own, true));
    // It kills whatever process it runs in, at the only evaluation between first and last step that any of them makes.
    let own = ["tune.evaluate.every_steps=45", "tune.steps=80", "limits.max_attempts=2"];
    let culprit = submit(&cluster, &base, &own, true);
    cluster.start_worker(&[("FAILPOINTS", "trainer::before_evaluation=return(abort)")]);
    let job = cluster.ends(&culprit, JobState::Failed).await;
    // The first crash is nobody's; it is charged for those that it had alone.
    assert_eq!((job.epoch, job.failed_attempts), (3, 3), "{job:#?}");
    for (id, expected) in ids.iter().zip(&expected) {
        let job = cluster.ends(id, JobState::Succeeded).await;
        assert_eq!((job.epoch, job.failed_attempts), (2, 1), "{job:#?}");
        assert_eq!(outputs(&job), *expected, "the results of the job alone");
    }
}
