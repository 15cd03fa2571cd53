//! Everything at once: jobs of one worker and of two, and faults of every kind, one after the other, until all jobs have ended.
//!
//! A short sample runs with all tests. `ATTUNE_CHAOS_FAULTS` and `ATTUNE_CHAOS_JOBS` say how many there are, `ATTUNE_CHAOS_SEED`
//! in which order.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use attune_artifacts::{Causes, Kind};
use attune_proto::v1::{self, JobState};
use attune_tensor::Rng;
use attune_worker::transfer::{self, PushError};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

use crate::kills::prepare;
use crate::postgres::Postgres;
use crate::proxy::{Proxy, Weather};
use crate::support::{Cluster, Process, SMALL, attune, outputs};
use crate::surroundings::{Calendar, Disk};

/// Longer than a lease, which lasts three seconds here.
const LONGER_THAN_A_LEASE: Duration = Duration::from_millis(4500);
/// Jobs that wait or run at once.
const AT_ONCE: usize = 6;
/// How long all jobs have to end once nothing happens any more.
const PATIENCE: Duration = Duration::from_secs(600);

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// `kill -9` of a training process.
    KillProcess,
    /// A training process is stopped, for a moment or until it counts as hung.
    StopProcess,
    /// `kill -9` of a worker.
    KillWorker,
    /// A worker is stopped for longer than a lease, and goes on.
    StopWorker,
    /// `kill -9` of the scheduler.
    KillScheduler,
    /// The scheduler is stopped and goes on.
    StopScheduler,
    /// All connections of the workers break.
    CutNetwork,
    /// What workers say arrives after their leases have ended.
    HoldNetwork,
    /// Everything arrives late.
    SlowNetwork,
    /// A third of what the artifact store is asked for fails.
    StoreErrors,
    /// What an attempt that is over has once committed arrives again.
    Replay,
    /// `kill -9` of the database, as a power cut.
    KillDatabase,
    /// The calendar of all processes jumps by an hour or a day, and stays there.
    JumpCalendar,
    /// The disk of the artifact store is full for a while.
    FullStore,
    /// The disk of a worker is full for a while.
    FullWorker,
}

const FAULTS: [Fault; 15] = [
    Fault::KillProcess,
    Fault::StopProcess,
    Fault::KillWorker,
    Fault::StopWorker,
    Fault::KillScheduler,
    Fault::StopScheduler,
    Fault::CutNetwork,
    Fault::HoldNetwork,
    Fault::SlowNetwork,
    Fault::StoreErrors,
    Fault::Replay,
    Fault::KillDatabase,
    Fault::JumpCalendar,
    Fault::FullStore,
    Fault::FullWorker,
];

/// How far calendars jump.
const AWAY: [&str; 5] = ["-1d", "-1h", "+0", "+1h", "+1d"];
/// The workers, which have a folder each.
const WORKERS: [&str; 2] = ["w0", "w1"];

struct Chaos {
    cluster: Cluster,
    postgres: Option<Postgres>,
    proxy: Proxy,
    calendar: Option<Calendar>,
    /// That of the artifact store and those of the workers.
    disks: Option<[Disk; 3]>,
    workers: Vec<Option<Process>>,
    rng: Rng,
    base: String,
    /// Steps of each job.
    steps: u32,
    /// Variables of the scheduler: what is planted in it.
    planted: Option<&'static str>,
    jobs: Vec<String>,
    /// Those of them that have ended.
    ended: BTreeSet<String>,
    /// A commit of an attempt, and its bytes, kept for a replay.
    kept: Option<(PathBuf, v1::AttemptCommit)>,
    /// How often each fault happened, and how often to a job that ran.
    done: BTreeMap<Fault, (usize, usize)>,
    stale_taken: usize,
    stale_refused: usize,
}

impl Chaos {
    async fn start(seed: u64, steps: u32, planted: Option<&'static str>) -> (Self, BTreeMap<String, String>) {
        let postgres = Postgres::start().await;
        let (mut calendar, mut disks) = (None, None);
        let mut cluster = Cluster::start_prepared(postgres.as_ref().map(Postgres::url), |cluster| {
            disks = Disk::mount(["artifacts", WORKERS[0], WORKERS[1]].map(|name| cluster.path(name)));
            calendar = Calendar::make(cluster.folder.path());
            calendar.as_ref().map(Calendar::variables).unwrap_or_default()
        })
        .await;
        let base = prepare(&cluster).await;
        let proxy = Proxy::start(cluster.port()).await;
        let mut chaos = {
            let undisturbed = cluster.submit(&cluster.path("world/chat.yaml"), &refs(&job(&base, 1, steps)));
            let expected = outputs(&cluster.ends(&undisturbed, JobState::Succeeded).await);
            // From here on workers speak through the network that breaks.
            cluster.worker.take().unwrap().kill();
            let rng = Rng::new(seed, "chaos");
            let (workers, jobs, ended) = (Vec::new(), Vec::new(), BTreeSet::new());
            let (kept, done) = (None, BTreeMap::new());
            let (stale_taken, stale_refused) = (0, 0);
            let made = Self {
                cluster,
                postgres,
                proxy,
                calendar,
                disks,
                workers,
                rng,
                base,
                steps,
                planted,
                jobs,
                ended,
                kept,
                done,
                stale_taken,
                stale_refused,
            };
            (made, expected)
        };
        if planted.is_some() {
            chaos.0.restart_scheduler("").await;
        }
        for number in 0..WORKERS.len() {
            let worker = chaos.0.worker(number);
            chaos.0.workers.push(Some(worker));
        }
        chaos
    }

    fn worker(&self, number: usize) -> Process {
        let name = WORKERS[number];
        let mut command = attune();
        command
            .args(["worker", "--server", &self.proxy.url(), "--name", name, "--devices", "2", "--work-dir"])
            .arg(self.cluster.path(name))
            .envs(self.calendar.iter().flat_map(Calendar::variables))
            .env("RAYON_NUM_THREADS", "1");
        Process::start(&mut command, &self.cluster.path("worker.log"))
    }

    async fn restart_scheduler(&mut self, faults: &str) {
        if let Some(scheduler) = self.cluster.scheduler.take() {
            scheduler.kill();
        }
        let points: Vec<&str> = self.planted.into_iter().chain([faults]).filter(|points| !points.is_empty()).collect();
        let points = points.join(";");
        let variables = [("FAILPOINTS", points.as_str())];
        self.cluster.start_scheduler(if points.is_empty() { &[] } else { &variables }).await;
    }

    /// Jobs that have not ended.
    async fn open(&mut self) -> Vec<v1::Job> {
        let mut open = Vec::new();
        for id in self.jobs.clone().into_iter().filter(|id| !self.ended.contains(id)).collect::<Vec<_>>() {
            let job = self.cluster.wait(&id, "answer", |_| true).await;
            if attune_proto::words::state_words(job.state()).is_some_and(|words| words.is_final) {
                self.ended.insert(id);
            } else {
                open.push(job);
            }
        }
        open
    }

    /// One fault, while some job runs.
    async fn fault(&mut self, fault: Fault) {
        let deadline = Instant::now() + PATIENCE;
        let running = loop {
            let open = self.open().await;
            if open.is_empty() {
                // All have ended before the faults have: one more.
                self.submit(self.jobs.len());
            }
            let running = open.into_iter().find(|job| job.state() == JobState::Running && !job.checkpoint.is_empty());
            if running.is_some() || Instant::now() >= deadline {
                break running;
            }
            sleep(Duration::from_millis(20)).await;
        };
        if let Some(job) = running.as_ref().filter(|_| self.kept.is_none()) {
            self.keep(job).await;
        }
        sleep(Duration::from_millis(self.rng.below(150))).await;
        let worker = self.rng.below(self.workers.len() as u64) as usize;
        match fault {
            Fault::KillProcess | Fault::StopProcess => {
                let all: Vec<i32> = self.workers.iter().flatten().flat_map(Process::children).collect();
                let chosen = self.rng.below(all.len().max(1) as u64) as usize;
                if let Some(process) = all.get(chosen).copied().map(Pid::from_raw) {
                    let signal = if fault == Fault::KillProcess { Signal::SIGKILL } else { Signal::SIGSTOP };
                    // It may have ended meanwhile.
                    let _ = kill(process, signal);
                    if signal == Signal::SIGSTOP && self.rng.below(2) == 0 {
                        sleep(Duration::from_millis(800)).await;
                        let _ = kill(process, Signal::SIGCONT);
                    }
                }
            }
            Fault::KillWorker => {
                self.workers[worker].take().unwrap().kill();
                self.workers[worker] = Some(self.worker(worker));
            }
            Fault::StopWorker => {
                let process = self.workers[worker].as_ref().unwrap().id();
                kill(process, Signal::SIGSTOP).unwrap();
                sleep(LONGER_THAN_A_LEASE).await;
                kill(process, Signal::SIGCONT).unwrap();
            }
            Fault::KillScheduler => self.restart_scheduler("").await,
            Fault::StopScheduler => {
                let process = self.cluster.scheduler.as_ref().unwrap().id();
                kill(process, Signal::SIGSTOP).unwrap();
                sleep(Duration::from_millis(500 + self.rng.below(4000))).await;
                kill(process, Signal::SIGCONT).unwrap();
            }
            Fault::CutNetwork => {
                let lasts = Duration::from_millis(200 + self.rng.below(2000));
                self.weather(Weather::Cut, lasts).await;
            }
            Fault::HoldNetwork => self.weather(Weather::Held, LONGER_THAN_A_LEASE).await,
            Fault::SlowNetwork => self.weather(Weather::Slow, Duration::from_secs(2)).await,
            Fault::StoreErrors => {
                self.restart_scheduler("artifacts::blob_stored=33%return;artifacts::before_manifest=33%return").await;
                sleep(Duration::from_secs(2)).await;
                self.restart_scheduler("").await;
            }
            Fault::Replay => self.replay().await,
            Fault::KillDatabase => {
                let Some(postgres) = &mut self.postgres else { return };
                postgres.kill().await;
                sleep(Duration::from_millis(300)).await;
                postgres.start_again().await;
            }
            Fault::JumpCalendar => {
                let away = AWAY[self.rng.below(AWAY.len() as u64) as usize];
                self.calendar.as_ref().unwrap().jump(away);
                sleep(Duration::from_millis(self.rng.below(1000))).await;
            }
            Fault::FullStore | Fault::FullWorker => {
                let [store, own @ ..] = self.disks.as_ref().unwrap();
                let disk = if fault == Fault::FullStore { store } else { &own[worker] };
                disk.fill();
                sleep(Duration::from_millis(500 + self.rng.below(2000))).await;
                disk.clear();
            }
        }
        let (all, on_running) = self.done.entry(fault).or_default();
        *all += 1;
        *on_running += usize::from(running.is_some());
    }

    async fn weather(&self, weather: Weather, lasts: Duration) {
        self.proxy.turn(weather);
        sleep(lasts).await;
        self.proxy.turn(Weather::Fair);
    }

    /// Keeps the bytes of a job's checkpoint, and under which attempt they are committed.
    async fn keep(&mut self, job: &v1::Job) {
        let folder = self.cluster.path(&format!("kept-{}", self.stale_refused + self.stale_taken));
        let pulled = self.cluster.run(["artifacts", "pull", &job.checkpoint, folder.to_str().unwrap()]);
        if pulled.status.success() {
            let commit = v1::AttemptCommit {
                job_id: job.job_id.clone(),
                epoch: job.epoch,
                worker_id: job.worker_id.clone(),
                commit: Some(v1::attempt_commit::Commit::CheckpointStep(1_000_000)),
                facts: None,
            };
            self.kept = Some((folder, commit));
        }
    }

    /// What was kept arrives once more, after its attempt is over.
    async fn replay(&mut self) {
        let Some((folder, commit)) = self.kept.take() else { return };
        let id = commit.job_id.clone();
        let job = self.cluster.wait(&id, "answer", |_| true).await;
        if job.epoch == commit.epoch && job.state() == JobState::Running {
            // It is not over: make it so.
            let all: Vec<i32> = self.workers.iter().flatten().flat_map(Process::children).collect();
            for process in all {
                let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
            }
        }
        let over = |job: &v1::Job| job.epoch > commit.epoch || job.end_time.is_some();
        self.cluster.wait(&id, "end of the attempt", over).await;
        let again = |job: &v1::Job| job.state() == JobState::Running || job.end_time.is_some();
        self.cluster.wait(&id, "next attempt", again).await;
        let client = self.cluster.client();
        match transfer::push(&client, &folder, Some(Kind::Checkpoint), Causes::default(), Some(commit), Vec::new())
            .await
        {
            Ok(_) => self.stale_taken += 1,
            Err(PushError::Server(_)) => self.stale_refused += 1,
            Err(error) => panic!("{error}"),
        }
    }

    fn submit(&mut self, number: usize) {
        let workers = if number % 5 == 4 { 2 } else { 1 };
        let id =
            self.cluster.submit(&self.cluster.path("world/chat.yaml"), &refs(&job(&self.base, workers, self.steps)));
        self.jobs.push(id);
    }

    /// What must hold whatever happened, and does not.
    async fn broken(&mut self, expected: &BTreeMap<String, String>) -> Vec<String> {
        let mut broken = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while !self.open().await.is_empty() && Instant::now() < deadline {
            sleep(Duration::from_millis(200)).await;
        }
        for id in self.jobs.clone() {
            let job = self.cluster.wait(&id, "answer", |_| true).await;
            if job.state() != JobState::Succeeded {
                broken.push(format!("{id} is lost: {:?}, {}", job.state(), job.message));
                continue;
            }
            if outputs(&job) != *expected {
                broken.push(format!("{id} has other results: {:?}", outputs(&job)));
            }
            let events = String::from_utf8(self.cluster.run(["--json", "jobs", "events", &id]).stdout).unwrap();
            let told: Vec<serde_json::Value> = events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            let numbers: Vec<u64> = told.iter().filter_map(|event| event["sequence"].as_u64()).collect();
            if !numbers.is_sorted_by(|a, b| a < b) {
                broken.push(format!("{id} has events out of order: {numbers:?}"));
            }
            if events.matches("\"to\":\"succeeded\"").count() != 1 {
                broken.push(format!("{id} does not end once"));
            }
            let (results, mut newest, mut committed) = (outputs(&job), 0, BTreeSet::new());
            for event in &told {
                let epoch = event["epoch"].as_u64().unwrap_or_default();
                if let Some(digest) = results.values().find(|digest| event.to_string().contains(*digest)) {
                    committed.insert(digest);
                    if epoch < newest {
                        broken.push(format!("{id}: attempt {epoch} commits {digest} after attempt {newest} began"));
                    }
                }
                newest = newest.max(epoch);
            }
            if committed.len() != results.len() {
                broken.push(format!("{id} names results that nobody committed: {results:?}"));
            }
        }
        for digest in expected.values() {
            let folder = self.cluster.path(&format!("pulled-{}", digest.replace(':', "-")));
            let pulled = self.cluster.run(["artifacts", "pull", digest, folder.to_str().unwrap()]);
            if !pulled.status.success() {
                broken.push(format!("{digest} cannot be read: {pulled:?}"));
            }
        }
        if self.stale_taken > 0 {
            broken.push(format!("{} commits of attempts that were over were taken", self.stale_taken));
        }
        broken
    }
}

/// A tune with checkpoints on its way.
fn job(base: &str, workers: u32, steps: u32) -> Vec<String> {
    let fixed = ["tune.checkpoint.every_steps=30", "limits.max_attempts=1000", "limits.stall_seconds=8"];
    let own = [format!("base={base}"), format!("resources.workers={workers}"), format!("tune.steps={steps}")];
    SMALL.into_iter().chain(fixed).map(str::to_owned).chain(own).collect()
}

fn refs(set: &[String]) -> Vec<&str> {
    set.iter().map(String::as_str).collect()
}

fn from_environment(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// Runs jobs under faults, of each kind as often as of any other; what does not hold afterwards.
async fn chaos(
    (n_faults, n_jobs, steps): (usize, usize, u32),
    kinds: &[Fault],
    planted: Option<&'static str>,
) -> Vec<String> {
    let seed = from_environment("ATTUNE_CHAOS_SEED", 20_261_128) as u64;
    let (mut chaos, expected) = Chaos::start(seed, steps, planted).await;
    let is_possible = |kind: &Fault| match kind {
        Fault::KillDatabase => chaos.postgres.is_some(),
        Fault::JumpCalendar => chaos.calendar.is_some(),
        Fault::FullStore | Fault::FullWorker => chaos.disks.is_some(),
        _ => true,
    };
    let kinds: Vec<Fault> = kinds.iter().copied().filter(is_possible).collect();
    let mut order: Vec<Fault> = kinds.iter().copied().cycle().take(n_faults).collect();
    chaos.rng.shuffle(&mut order);
    for (number, fault) in order.into_iter().enumerate() {
        // Jobs come as faults go, and some always run.
        let due = (n_jobs * (number + 1)).div_ceil(n_faults);
        while chaos.jobs.len() < n_jobs.min(due) && chaos.open().await.len() < AT_ONCE {
            chaos.submit(chaos.jobs.len());
        }
        chaos.fault(fault).await;
    }
    while chaos.jobs.len() < n_jobs {
        chaos.submit(chaos.jobs.len());
    }
    let broken = chaos.broken(&expected).await;
    println!("seed {seed}: {} jobs\nfault            times  while a job with a checkpoint ran", chaos.jobs.len());
    for (fault, (all, running)) in &chaos.done {
        println!("{:<16} {all:>5}  {running}", format!("{fault:?}"));
    }
    println!("stale commits: {} refused, {} taken", chaos.stale_refused, chaos.stale_taken);
    println!("broken: {}", if broken.is_empty() { "nothing".to_owned() } else { broken.join("; ") });
    broken
}

#[tokio::test]
async fn jobs_end_with_their_bits_whatever_goes_wrong() {
    let (n_faults, n_jobs) = (from_environment("ATTUNE_CHAOS_FAULTS", 6), from_environment("ATTUNE_CHAOS_JOBS", 3));
    let broken = chaos((n_faults, n_jobs, 120), &FAULTS, None).await;
    assert!(broken.is_empty(), "{broken:#?}");
}

/// The same finds a scheduler that takes a commit of an old epoch for one of the newest.
#[tokio::test]
async fn a_missing_check_of_epochs_is_found() {
    let kinds = [Fault::KillProcess, Fault::Replay];
    let broken = chaos((4, 1, 500), &kinds, Some("scheduler::epoch_unchecked=return")).await;
    assert!(!broken.is_empty(), "the defect was not found");
}
