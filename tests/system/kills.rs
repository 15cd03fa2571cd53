//! `kill -9` of the training process, the worker and the scheduler at random moments: the job still succeeds, with the
//! adapter of an undisturbed run.

use std::collections::BTreeMap;
use std::time::Duration;

use attune_proto::v1::JobState;
use attune_tensor::Rng;
use tokio::time::Instant;

use crate::support::{Cluster, PATIENCE, SMALL, outputs, world};

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Child,
    Worker,
    Scheduler,
}

/// One kill: who, whether the job had a checkpoint, and by which fail point, if not at a random moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Kill {
    role: Role,
    after_checkpoint: bool,
    fail_point: Option<&'static str>,
}

/// Kills of each role before and after the first checkpoint.
const EACH: usize = 3;
/// Longest random wait between the moment at which a role can be killed and the kill.
const WAIT_MS: u64 = 250;

const ROLES: [Role; 3] = [Role::Child, Role::Worker, Role::Scheduler];
const COMMITS: [(Role, &str); 3] = [
    (Role::Worker, "worker::before_push"),
    (Role::Worker, "worker::after_push"),
    (Role::Scheduler, "scheduler::before_artifact_row"),
];

/// Holds a training process before its first checkpoint is there, however fast it came to it.
const HELD: [(&str, &str); 1] = [("FAILPOINTS", "trainer::checkpoint_written=pause")];

/// The kills in the order of this seed: those before the first checkpoint first, everything else shuffled.
fn plan(seed: u64) -> Vec<Kill> {
    let mut rng = Rng::new(seed, "order of kills");
    let mut shuffled = |mut kills: Vec<Kill>| {
        rng.shuffle(&mut kills);
        kills
    };
    let random = |after_checkpoint| {
        let of = move |role| (0..EACH).map(move |_| Kill { role, after_checkpoint, fail_point: None });
        ROLES.into_iter().flat_map(of)
    };
    let commits = COMMITS.map(|(role, name)| Kill { role, after_checkpoint: true, fail_point: Some(name) });
    let mut kills = shuffled(random(false).collect());
    kills.extend(shuffled(random(true).chain(commits).collect()));
    kills
}

/// The first seed; further ones follow it when `ATTUNE_KILL_SEEDS` asks for several.
const SEED: u64 = 20_261_126;

#[tokio::test]
async fn a_job_survives_kills_of_every_role_with_the_bits_of_an_undisturbed_run() {
    let quiet = Cluster::start().await;
    let base = prepare(&quiet).await;
    let undisturbed = quiet.submit(&quiet.path("world/chat.yaml"), &job(&base));
    let expected = outputs(&quiet.ends(&undisturbed, JobState::Succeeded).await);
    drop(quiet);

    let n_seeds = std::env::var("ATTUNE_KILL_SEEDS").map_or(1, |text| text.parse().expect("a number of seeds"));
    for seed in SEED..SEED + n_seeds {
        let found = disturbed(seed, &base).await;
        assert_eq!(found, expected, "the bits of an undisturbed run, seed {seed}");
    }
}

/// Runs the job under the kills of a seed and gives its results.
async fn disturbed(seed: u64, base: &str) -> BTreeMap<String, String> {
    let mut cluster = Cluster::start().await;
    let again = prepare(&cluster).await;
    assert_eq!(again, base, "the base itself is reproducible");
    restart_worker(&mut cluster, &HELD);
    let id = cluster.submit(&cluster.path("world/chat.yaml"), &job(base));
    let mut held = true;
    let mut rng = Rng::new(seed, "moments of kills");
    let mut done: BTreeMap<Kill, usize> = BTreeMap::new();
    println!("seed {seed}\nrole       first checkpoint  fail point                      at step");
    for kill in plan(seed) {
        if held && kill.after_checkpoint {
            held = false;
            let epoch = cluster.job(&id).await.map_or(0, |job| job.epoch);
            restart_worker(&mut cluster, &[]);
            cluster.wait(&id, "next attempt", |job| job.epoch > epoch || job.state() == JobState::Backoff).await;
        }
        let step = match kill.fail_point {
            None => at_random(&mut cluster, &id, kill, Duration::from_millis(rng.below(WAIT_MS))).await,
            Some(name) => at_fail_point(&mut cluster, &id, kill.role, name).await,
        };
        let when = if kill.after_checkpoint { "after" } else { "before" };
        let role = format!("{:?}", kill.role);
        println!("{role:<10} {when:<17} {:<31} {step}", kill.fail_point.unwrap_or("-"));
        *done.entry(kill).or_default() += 1;
    }
    let job = cluster.ends(&id, JobState::Succeeded).await;
    println!("{} attempts, {} of them failed; {:?}", job.epoch, job.failed_attempts, outputs(&job));

    let count =
        |fits: &dyn Fn(&Kill) -> bool| done.iter().filter(|(kill, _)| fits(kill)).map(|(_, n)| n).sum::<usize>();
    for role in ROLES {
        let all = count(&|kill| kill.role == role);
        let after = count(&|kill| kill.role == role && kill.after_checkpoint);
        assert!(all >= 5 && after * 2 >= all, "{role:?}: {all} kills, {after} of them after the first checkpoint");
    }
    assert!(count(&|kill| kill.fail_point.is_some()) >= 3);
    // Kills of the child and the worker cost an attempt each.
    assert!(job.epoch > 2 * EACH as u64, "attempts: {}", job.epoch);
    outputs(&job)
}

/// The demonstration's world and a base that was trained on it for a few steps; gives the base's digest.
pub(crate) async fn prepare(cluster: &Cluster) -> String {
    world(&cluster.path("world"));
    let set = SMALL.into_iter().chain(["tune.steps=4"]).collect::<Vec<_>>();
    let id = cluster.submit(&cluster.path("world/text.yaml"), &set);
    let job = cluster.ends(&id, JobState::Succeeded).await;
    outputs(&job)["model"].clone()
}

/// What is changed in the chat job: long enough for all kills, with a late first checkpoint.
fn job(base: &str) -> Vec<&str> {
    // Leaked once a process, for a test that runs once.
    let base: &'static str = Box::leak(format!("base={base}").into_boxed_str());
    SMALL
        .into_iter()
        .chain([base, "tune.steps=1000", "tune.checkpoint.every_steps=100", "limits.max_attempts=1000"])
        .collect()
}

/// Kills a role after `wait`, once there is something to kill and the job has a checkpoint if it must have one.
async fn at_random(cluster: &mut Cluster, id: &str, kill: Kill, wait: Duration) -> u64 {
    let started = cluster
        .wait(id, "attempt", |job| {
            matches!(job.state(), JobState::Starting | JobState::Running)
                && (!kill.after_checkpoint || !job.checkpoint.is_empty())
        })
        .await;
    if !kill.after_checkpoint {
        assert!(started.checkpoint.is_empty(), "a checkpoint is there before the first one");
    }
    tokio::time::sleep(wait).await;
    let step = cluster.job(id).await.and_then(|job| job.progress).map_or(0, |progress| progress.step);
    match kill.role {
        Role::Child => {
            let deadline = Instant::now() + PATIENCE;
            loop {
                if let [child] = cluster.worker.as_ref().unwrap().children()[..] {
                    let child = nix::unistd::Pid::from_raw(child);
                    nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
                    break;
                }
                assert!(Instant::now() < deadline, "no training process\n{}", cluster.logs());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let epoch = started.epoch;
            cluster.wait(id, "next attempt", |job| job.epoch > epoch || job.state() == JobState::Backoff).await;
        }
        Role::Worker => {
            restart_worker(cluster, if kill.after_checkpoint { &[] } else { &HELD });
            let epoch = started.epoch;
            cluster.wait(id, "next attempt", |job| job.epoch > epoch || job.state() == JobState::Backoff).await;
        }
        Role::Scheduler => {
            cluster.scheduler.take().unwrap().kill();
            cluster.start_scheduler(&[]).await;
        }
    }
    step
}

/// Kills the worker, and with it the training process, and starts another one.
fn restart_worker(cluster: &mut Cluster, variables: &[(&str, &str)]) {
    cluster.worker.take().unwrap().kill();
    cluster.start_worker(variables);
}

/// Restarts a role with a fail point that kills it in the middle of its next commit, and waits for that.
async fn at_fail_point(cluster: &mut Cluster, id: &str, role: Role, name: &str) -> u64 {
    let point = format!("{name}=return(kill)");
    let variables = [("FAILPOINTS", point.as_str())];
    match role {
        Role::Scheduler => {
            cluster.scheduler.take().unwrap().kill();
            cluster.start_scheduler(&variables).await;
        }
        Role::Worker | Role::Child => {
            restart_worker(cluster, &variables);
        }
    }
    let deadline = Instant::now() + PATIENCE;
    let mut step = 0;
    loop {
        let process = if role == Role::Scheduler { &mut cluster.scheduler } else { &mut cluster.worker };
        if process.as_mut().unwrap().has_ended() {
            break;
        }
        if let Some(progress) = cluster.job(id).await.and_then(|job| job.progress) {
            step = progress.step;
        }
        assert!(Instant::now() < deadline, "{name} was not reached\n{}", cluster.logs());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    match role {
        Role::Scheduler => cluster.start_scheduler(&[]).await,
        Role::Worker | Role::Child => cluster.start_worker(&[]),
    }
    step
}
