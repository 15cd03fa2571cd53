//! A scheduler with its store and a hand to feed it: for tests that say step by step what happens.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use attune_spec::id::{CohortId, Digest, Epoch, JobId, Project, Step, WorkerId};

use super::{Store, checked_step};
use crate::{
    Action, Answer, Cause, Commit, Core, Device, Devices, Effects, Holding, Input, Job, JobKey, Outcome, Refusal,
    Request, Resources, Session, Settings, Timestamp, Wanted,
};

/// A job of the default project.
pub(crate) fn job(name: &str) -> JobKey {
    JobKey::new(Project::default(), JobId::new(name).unwrap())
}

/// A worker.
pub(crate) fn worker(name: &str) -> WorkerId {
    WorkerId::new(name).unwrap()
}

/// `devices` processors on each of `workers` workers.
pub(crate) fn gang(workers: u32, devices: u32) -> Resources {
    Resources {
        n_workers: NonZeroU32::new(workers).unwrap(),
        n_devices: NonZeroU32::new(devices).unwrap(),
        device: Wanted::Only(Device::Cpu),
        labels: BTreeMap::new(),
    }
}

/// A scheduler, its store and the time.
pub(crate) struct Desk {
    pub(crate) core: Core,
    pub(crate) store: Store,
    pub(crate) now_ms: u64,
    pub(crate) session: u64,
}

impl Desk {
    /// A scheduler without jobs and workers.
    pub(crate) fn new() -> Self {
        let now_ms = 1_000_000;
        let core = Core::new(Settings::default(), Timestamp::from_millis(now_ms));
        Self { core, store: Store::default(), now_ms, session: 0 }
    }

    /// One step; every check of [`checked_step`] and of the store must pass.
    #[expect(clippy::needless_pass_by_value, reason = "inputs are written down where they are fed")]
    pub(crate) fn step(&mut self, input: Input) -> Effects {
        let effects = checked_step(&mut self.core, &input, Timestamp::from_millis(self.now_ms)).unwrap();
        self.store.apply(&effects.changes).unwrap();
        self.store.check_restores(&self.core).unwrap();
        effects
    }

    /// A step that must take effect; what is to be done then.
    #[expect(clippy::needless_pass_by_value, reason = "inputs are written down where they are fed")]
    pub(crate) fn done(&mut self, input: Input) -> Vec<Action> {
        let effects = self.step(input.clone());
        assert_eq!(effects.answer, Answer::Done, "{input:?}");
        effects.actions
    }

    /// A step that must be refused.
    #[expect(clippy::needless_pass_by_value, reason = "inputs are written down where they are fed")]
    pub(crate) fn refused(&mut self, input: Input) -> Refusal {
        let effects = self.step(input.clone());
        assert!(effects.changes.is_empty() && effects.actions.is_empty(), "{effects:?}");
        match effects.answer {
            Answer::Refused(refusal) => refusal,
            answer @ (Answer::Done | Answer::Repeated) => panic!("{input:?} was {answer:?}"),
        }
    }

    /// A step that must be recognised as a repetition.
    #[expect(clippy::needless_pass_by_value, reason = "inputs are written down where they are fed")]
    pub(crate) fn repeated(&mut self, input: Input) {
        let effects = self.step(input.clone());
        assert!(effects.changes.is_empty() && effects.actions.is_empty(), "{effects:?}");
        assert_eq!(effects.answer, Answer::Repeated, "{input:?}");
    }

    /// Time passes, with a tick whenever one is asked for; all that is to be done meanwhile.
    pub(crate) fn wait(&mut self, wait: Duration) -> Vec<Action> {
        let end = Timestamp::from_millis(self.now_ms).plus(wait);
        let mut actions = Vec::new();
        while let Some(wake) = self.core.wake().filter(|wake| *wake <= end) {
            self.now_ms = wake.as_millis();
            actions.extend(self.step(Input::Tick).actions);
        }
        self.now_ms = end.as_millis();
        actions.extend(self.step(Input::Tick).actions);
        actions
    }

    /// The scheduler is killed and started again.
    pub(crate) fn restart(&mut self) {
        self.now_ms = 5;
        self.core = self.store.restore(*self.core.settings(), Timestamp::from_millis(5)).unwrap();
    }

    /// A job's row.
    pub(crate) fn row(&self, key: &JobKey) -> &Job {
        self.core.job(key).unwrap()
    }

    /// A job's state and reason, as they are stored.
    pub(crate) fn state(&self, key: &JobKey) -> String {
        let row = self.row(key);
        format!("{} {}", row.state, row.reason)
    }

    /// A new job with default settings.
    pub(crate) fn submit(&mut self, name: &str, request: Request) -> JobKey {
        let key = job(name);
        self.done(Input::Submit { key: key.clone(), request, finished: BTreeMap::new() });
        key
    }

    /// A new connection of a worker with `n_cpu` devices, and what it holds.
    pub(crate) fn register(&mut self, name: &str, n_cpu: u32, holding: Vec<Holding>) -> Vec<Action> {
        self.register_as(name, n_cpu, holding, None)
    }

    /// The same of a worker that says which process it is.
    pub(crate) fn register_as(
        &mut self,
        name: &str,
        n_cpu: u32,
        holding: Vec<Holding>,
        process: Option<&str>,
    ) -> Vec<Action> {
        self.session += 1;
        self.done(Input::Register {
            worker: worker(name),
            session: Session(self.session),
            devices: Devices { n_cpu, n_cuda: 0 },
            memory: BTreeMap::from([(Device::Cpu, 100)]),
            labels: BTreeMap::new(),
            process: process.map(|process| process.parse().unwrap()),
            outdated: false,
            draining: false,
            holding,
        })
    }

    /// What a worker that runs the newest attempt of a job says about its cohort.
    pub(crate) fn holding(&self, key: &JobKey) -> Holding {
        let cohort = self.row(key).cohort.unwrap();
        let attempts = self.core.cohort(cohort).unwrap().attempts.clone();
        Holding { cohort, attempts, device: Device::Cpu, n_devices: 1 }
    }

    /// The next heartbeat of a worker.
    pub(crate) fn beat(&mut self, name: &str, holding: &[CohortId]) -> Vec<Action> {
        let known = self.core.worker(&worker(name)).unwrap();
        let (session, beat) = (known.session, known.beat + 1);
        self.done(Input::Heartbeat { worker: worker(name), session, beat, holding: holding.to_vec() })
    }

    /// Time passes while a worker sends heartbeats.
    pub(crate) fn wait_beating(&mut self, wait: Duration, name: &str, holding: &[CohortId]) {
        for _ in 0..wait.as_secs() {
            self.wait(Duration::from_secs(1));
            self.beat(name, holding);
        }
    }

    /// A desk with worker `w` (4 processors) and a job `j` that was granted to it.
    pub(crate) fn starting() -> (Self, JobKey) {
        let mut desk = Self::new();
        desk.register("w", 4, Vec::new());
        let key = desk.submit("j", Request::default());
        assert_eq!(desk.state(&key), "starting granted");
        (desk, key)
    }

    /// The same, and the job runs.
    pub(crate) fn running() -> (Self, JobKey) {
        let (mut desk, key) = Self::starting();
        desk.done(running(&key, 1));
        (desk, key)
    }
}

/// The attempt runs, says `w`.
pub(crate) fn running(key: &JobKey, epoch: u64) -> Input {
    Input::AttemptRunning { key: key.clone(), epoch: Epoch(epoch), worker: worker("w") }
}

/// The attempt ended, says `w`.
pub(crate) fn finished(key: &JobKey, epoch: u64, outcome: Outcome) -> Input {
    Input::AttemptFinished { key: key.clone(), epoch: Epoch(epoch), worker: worker("w"), outcome }
}

/// The attempt failed, says `w`.
pub(crate) fn failed(key: &JobKey, epoch: u64, cause: Cause) -> Input {
    finished(key, epoch, Outcome::Failed(cause))
}

/// `w` commits a checkpoint whose digest is made of `step`.
pub(crate) fn checkpoint(key: &JobKey, epoch: u64, step: u8) -> Input {
    commit(key, epoch, Commit::Checkpoint(Step(step.into())), step)
}

/// `w` commits something whose digest is made of `seed`.
pub(crate) fn commit(key: &JobKey, epoch: u64, commit: Commit, seed: u8) -> Input {
    let digest = Digest::from_bytes([seed; 32]);
    Input::Commit { key: key.clone(), epoch: Epoch(epoch), worker: worker("w"), commit, digest }
}
