//! Jobs that share a base in one process: one is cancelled, the process is killed, and the others end with the results
//! that they have alone.

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

/// A job among others; its process may fail no attempt of its own.
fn submit(cluster: &Cluster, base: &str, own: &[&str], shares: bool) -> String {
    let (base, share) = (format!("base={base}"), format!("resources.share_base={shares}"));
    let set = [&base, &share, "tune.checkpoint.every_steps=20", "limits.max_attempts=1"];
    let set: Vec<&str> = SMALL.into_iter().chain(set).chain(own.iter().copied()).collect();
    cluster.submit(&cluster.path("world/chat.yaml"), &set)
}

fn child(cluster: &Cluster) -> i32 {
    let children = cluster.worker.as_ref().unwrap().children();
    let [child] = children[..] else { panic!("not one training process: {children:?}\n{}", cluster.logs()) };
    child
}

#[tokio::test]
async fn jobs_share_a_process_and_end_with_the_results_that_they_have_alone() {
    let mut cluster = Cluster::start().await;
    let base = prepare(&cluster).await;
    let mut expected = Vec::new();
    for own in JOBS {
        let id = submit(&cluster, &base, own, false);
        expected.push(outputs(&cluster.ends(&id, JobState::Succeeded).await));
    }

    // All of them are in the queue before a worker comes.
    cluster.worker.take().unwrap().kill();
    let ids = JOBS.map(|own| submit(&cluster, &base, own, true));
    let fourth = submit(&cluster, &base, &["tune.steps=100000"], true);
    cluster.start_worker(&[]);
    let is_on_its_way = |job: &v1::Job| job.progress.as_ref().is_some_and(|progress| progress.step > 0);
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
        let step = cluster.job(id).await.unwrap().progress.unwrap().step;
        cluster.wait(id, "step after the cancel", |job| job.progress.as_ref().is_some_and(|p| p.step > step)).await;
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
