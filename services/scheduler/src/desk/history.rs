//! Random histories through the desk and a real database: after every step, a desk that started from the database would
//! know exactly what this one knows.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use attune_scheduler_core::{Cause, Commit, Device, Devices, Holding, Input, Look, Outcome, Request, Session, State};
use attune_spec::id::{CohortId, Digest, JobId, Project, Step, WorkerId};
use attune_store::Database;
use attune_store::artifact::{Maker, NewArtifact};
use attune_store::job::{NewJob, Stage};
use serde_json::json;

use super::*;

/// The numbers of a history: splitmix64.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % sides
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        let sides = from.len() as u64;
        (sides > 0).then(|| from[self.roll(sides) as usize].clone())
    }
}

fn worker(n: u64) -> WorkerId {
    WorkerId::new(format!("w-{n}")).unwrap()
}

struct History {
    desk: Desk,
    dice: Dice,
    n_jobs: u64,
    n_sessions: u64,
    beats: BTreeMap<WorkerId, u64>,
    _prune: mpsc::Receiver<JobKey>,
}

impl History {
    async fn begin(folder: &tempfile::TempDir, database: Option<Database>, seed: u64) -> Self {
        let mut config = Config::in_folder(folder.path());
        config.database = database.unwrap_or(config.database);
        config.timings.lease_ttl = Duration::from_millis(40);
        config.timings.stop_limit = Duration::from_millis(60);
        config.timings.backoff_base = Duration::from_millis(10);
        config.timings.backoff_cap = Duration::from_millis(20);
        config.limits.finished_jobs = 3;
        let store = Store::open(&config.database).await.unwrap();
        let (prune, to_prune) = mpsc::channel(1000);
        let desk = Desk::open(&config, store, Hub::default(), Clock::start(), prune, Arc::default()).await.unwrap();
        let beats = BTreeMap::new();
        Self { desk, dice: Dice(seed), n_jobs: 0, n_sessions: 0, beats, _prune: to_prune }
    }

    /// Something happens.
    async fn happen(&mut self) {
        let keys: Vec<JobKey> = self.desk.core.jobs().map(|job| job.key.clone()).collect();
        let key = self.dice.pick(&keys);
        let n = self.dice.roll(3);
        match (self.dice.roll(17), key) {
            (0 | 1, _) | (5..=15, None) => self.submit().await,
            (2, _) => self.register(n).await,
            (3, _) => self.heartbeat(n).await,
            (4, _) => self.wait().await,
            (5, Some(key)) => self.take(Input::Cancel { key }).await,
            (6, Some(key)) => self.take(Input::Pause { key }).await,
            (7, Some(key)) => self.take(Input::Resume { key }).await,
            (8, Some(key)) => self.take(Input::Retry { key }).await,
            (9, Some(key)) => self.take(Input::Preempt { key }).await,
            (10, Some(_)) => self.take(Input::Drain { worker: worker(n) }).await,
            (11 | 12, Some(key)) => self.commit(key).await,
            (13, Some(key)) => {
                let (epoch, worker) = self.spoken_for(&key);
                self.take(Input::AttemptRunning { key, epoch, worker }).await;
            }
            (16, Some(key)) => self.look(key).await,
            (_, Some(key)) => self.finish(key).await,
            (16.., _) => {}
        }
    }

    fn spoken_for(&mut self, key: &JobKey) -> (attune_spec::id::Epoch, WorkerId) {
        let job = self.desk.core.job(key).unwrap();
        (job.epoch, job.workers.first().cloned().unwrap_or_else(|| worker(0)))
    }

    async fn take(&mut self, input: Input) {
        self.take_with(input, Extra::default()).await;
    }

    async fn take_with(&mut self, input: Input, extra: Extra) {
        let told = format!("{input:?}");
        let answer = self.desk.step(input, extra).await.unwrap();
        assert!(answer.is_ok(), "{told}: {answer:?}");
    }

    /// Somebody looks at the stages of a job, and sees this or that.
    async fn look(&mut self, key: JobKey) {
        let looks = [Look::Wait, Look::Done, Look::Done, Look::Broken(Cause::SpecFault)];
        let (version, look) = (self.desk.core.job(&key).unwrap().version, self.dice.pick(&looks).unwrap());
        self.take(Input::Looked { key, version, look }).await;
    }

    async fn submit(&mut self) {
        self.n_jobs += 1;
        let open = self.desk.core.jobs().filter(|job| job.request.is_staged && !job.state.is_final());
        let open: Vec<JobId> = open.map(|job| job.key.job.clone()).collect();
        let parent = self.dice.pick(&open).filter(|_| self.dice.roll(2) == 0);
        let is_staged = parent.is_none() && self.dice.roll(4) == 0;
        let after = self.n_jobs.checked_sub(2).filter(|n| *n > 0 && self.dice.roll(3) == 0);
        let id = |n: u64| JobId::new(format!("j-{n:04}")).unwrap();
        let job = NewJob {
            project: Project::default(),
            job: id(self.n_jobs),
            version: 1,
            name: "job".to_owned(),
            kind: "tune".to_owned(),
            spec: json!({}),
            resolved: json!({}),
            state: attune_store::job::State::Queued,
            reason: String::new(),
            message: String::new(),
            priority: 0,
            labels: BTreeMap::new(),
            inputs: Vec::new(),
            core: json!(null),
            retry_of: None,
            stage: parent.clone().map(|parent| Stage { parent, name: "one".parse().unwrap() }),
            run_limit_ms: None,
            deadline: None,
            now: Clock::utc(),
        };
        let after = after.filter(|_| !is_staged).map(id).into_iter().collect();
        let request = Request { after, is_staged, parent, ..Request::default() };
        let id = attune_store::job::Request { id: format!("r-{}", self.n_jobs), body: Digest::from_bytes([0; 32]) };
        let submission = Submission { job: Box::new(job), request, id: Some(id), record: None };
        let (row, _) = self.desk.submit(submission).await.unwrap().unwrap();
        assert_eq!(row.job.as_str(), format!("j-{:04}", self.n_jobs));
    }

    async fn register(&mut self, n: u64) {
        self.n_sessions += 1;
        let id = worker(n);
        let mut holding: Vec<Holding> = Vec::new();
        let cohorts: Vec<_> = self.desk.core.cohorts().cloned().collect();
        for cohort in cohorts {
            if cohort.share(&id).is_some() && self.dice.roll(4) > 0 {
                let attempts = cohort.attempts;
                holding.push(Holding { cohort: cohort.id, attempts, device: Device::Cpu, n_devices: 1 });
            }
        }
        self.beats.insert(id.clone(), 0);
        let devices = Devices { n_cpu: 2, n_cuda: 0 };
        let (session, memory, labels) = (Session(self.n_sessions), BTreeMap::new(), BTreeMap::new());
        let (worker, process, outdated, draining) = (id, None, false, false);
        self.take(Input::Register { worker, session, devices, memory, labels, process, outdated, draining, holding })
            .await;
    }

    async fn heartbeat(&mut self, n: u64) {
        let id = worker(n);
        let Some(known) = self.desk.core.worker(&id) else { return };
        let session = known.session;
        let cohorts = self.desk.core.cohorts().filter(|cohort| cohort.share(&id).is_some());
        let holding: Vec<CohortId> = cohorts.map(|cohort| cohort.id).collect();
        let beat = self.beats.entry(id.clone()).or_default();
        *beat += 1;
        let beat = *beat;
        self.take(Input::Heartbeat { worker: id, session, beat, holding }).await;
    }

    /// Leases, stops and waits may end: in small steps, so that it does not look like a stall.
    async fn wait(&mut self) {
        for _ in 0..6 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            self.take(Input::Tick).await;
        }
    }

    async fn commit(&mut self, key: JobKey) {
        let (epoch, worker) = self.spoken_for(&key);
        let step = self.dice.roll(20);
        let is_checkpoint = self.dice.roll(2) == 0;
        let commit = if is_checkpoint { Commit::Checkpoint(Step(step)) } else { Commit::Output };
        let mut bytes = [u8::try_from(step).unwrap(); 32];
        bytes[0] = u8::from(is_checkpoint);
        let digest = Digest::from_bytes(bytes);
        let artifact = NewArtifact {
            project: key.project.clone(),
            digest,
            kind: if is_checkpoint { "checkpoint" } else { "adapter" }.to_owned(),
            size_bytes: 0,
            files: Vec::new(),
            causes: Vec::new(),
            maker: Some(Maker { job: key.job.clone(), epoch, record: json!({}) }),
            tags: Vec::new(),
            now: Clock::utc(),
        };
        let extra = Extra { artifact: Some(Box::new(artifact)), role: "adapter".to_owned(), ..Extra::default() };
        self.take_with(Input::Commit { key, epoch, worker, commit, digest }, extra).await;
    }

    async fn finish(&mut self, key: JobKey) {
        let (epoch, worker) = self.spoken_for(&key);
        let causes = [Cause::Hung, Cause::ChildKilled { signal: 9 }, Cause::DataFault];
        let outcome = match self.dice.roll(4) {
            0 => Outcome::Stopped,
            1 => Outcome::Failed(self.dice.pick(&causes).unwrap()),
            _ => Outcome::Succeeded,
        };
        let input = Input::AttemptFinished { key, epoch, worker, outcome };
        if outcome == Outcome::Succeeded {
            self.desk.succeed(input, Extra::default(), Vec::new()).await.unwrap().unwrap();
        } else {
            self.take(input).await;
        }
    }

    /// What is stored is what is known.
    async fn check(&self, seen: &mut BTreeSet<&'static str>) {
        seen.extend(self.desk.core.jobs().map(|job| job.state.code()));
        let (core, ledger) = restore(&self.desk.store, self.desk.settings, self.desk.clock).await.unwrap();
        let known: Vec<_> = self.desk.core.jobs().filter(|job| !job.state.is_final()).collect();
        assert_eq!(core.jobs().collect::<Vec<_>>(), known);
        assert_eq!(core.cohorts().collect::<Vec<_>>(), self.desk.core.cohorts().collect::<Vec<_>>());
        assert_eq!(core.counters(), self.desk.core.counters());
        for job in known {
            assert_eq!(ledger.entry(&job.key), self.desk.ledger.entry(&job.key), "{}", job.key);
        }
        for job in self.desk.core.jobs() {
            let row = self.desk.store.job(&job.key.project, &job.key.job).await.unwrap();
            assert_eq!((row.state, row.stop), rows::state(job.state), "{}", job.key);
            assert_eq!((row.epoch, row.version), (job.epoch, job.version), "{}", job.key);
            assert_eq!(row.reason, job.reason.to_string(), "{}", job.key);
            let attempts = self.desk.store.attempts(&job.key.project, &job.key.job).await.unwrap();
            assert_eq!(attempts.len() as u64, job.epoch.0, "{}", job.key);
            let alive = attempts.iter().filter(|attempt| attempt.ended.is_none()).count();
            assert_eq!(alive, usize::from(job.state.is_live()), "{} {}", job.key, job.state);
        }
    }
}

/// A history of some length; the states that its jobs were in.
async fn live(seed: u64, database: Option<Database>, seen: &mut BTreeSet<&'static str>) {
    let folder = tempfile::tempdir().unwrap();
    let mut history = History::begin(&folder, database, seed).await;
    history.register(0).await;
    for _ in 0..70 {
        history.happen().await;
        history.check(seen).await;
    }
    // And it does go on.
    history.desk.reload().await.unwrap();
    history.check(seen).await;
    history.desk.store.close().await;
}

/// The same over PostgreSQL, where a server is named (`tests/services/postgres.sh` starts one).
#[tokio::test]
async fn whatever_happens_over_postgresql_a_restart_knows_the_same() {
    use sqlx::{Connection as _, Executor as _};

    let Ok(server) = std::env::var("ATTUNE_TEST_POSTGRES") else {
        eprintln!("skipped: ATTUNE_TEST_POSTGRES names no server");
        return;
    };
    let (head, query) = server.split_once('?').unwrap_or((&server, ""));
    let (place, _) = head.rsplit_once('/').unwrap();
    let mut seen = BTreeSet::new();
    for seed in 0..3 {
        let name = format!("history_{}_{seed}", std::process::id());
        let mut connection = sqlx::PgConnection::connect(&server).await.unwrap();
        connection.execute(sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"))).await.unwrap();
        live(seed, Some(format!("{place}/{name}?{query}").parse().unwrap()), &mut seen).await;
    }
    assert!(seen.len() > 5, "{seen:?}");
}

#[tokio::test]
async fn whatever_happens_a_restart_knows_the_same() {
    let mut seen = BTreeSet::new();
    for seed in 0..12 {
        live(seed, None, &mut seen).await;
    }
    let all: BTreeSet<_> = State::ALL.into_iter().map(State::code).collect();
    assert_eq!(seen, all, "states that no history reached");
}
