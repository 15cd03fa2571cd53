//! The core's rows as the documents that the store keeps, and back.
//!
//! Closed lists are stored by the core's own codes, so that a row can be read by a person and by a later version.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;

use attune_scheduler_core as core;
use attune_scheduler_core::JobKey;
use attune_spec::id::{CohortId, Digest, Epoch, JobId, Project, Step, WorkerId};
use attune_store::change::Write;
use attune_store::job::{State, Stop};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::Error;

/// The kinds of rules.
const POLICY: &str = "policy";
const CORDON: &str = "cordon";

/// What a project may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PolicyDocument {
    weight: NonZeroU32,
    #[serde(default)]
    max_cpu: Option<u32>,
    #[serde(default)]
    max_cuda: Option<u32>,
    #[serde(default)]
    max_queued: Option<u32>,
    #[serde(default)]
    max_bytes: Option<u64>,
}

/// What is stored of what a project may have.
pub(crate) fn write_policy(project: &Project, policy: Option<&core::Policy>) -> Write {
    let document = |policy: &core::Policy| {
        let core::Policy { weight, max_cpu, max_cuda, max_queued, max_bytes } = *policy;
        json!(PolicyDocument { weight, max_cpu, max_cuda, max_queued, max_bytes })
    };
    Write::Rule { kind: POLICY, name: project.to_string(), value: policy.map(document) }
}

/// What is stored of a worker that new work is kept from.
pub(crate) fn write_cordon(worker: &WorkerId, on: bool) -> Write {
    Write::Rule { kind: CORDON, name: worker.to_string(), value: on.then(|| json!(true)) }
}

fn unknown(row: &str, error: &dyn std::error::Error) -> Error {
    Error::Restore(format!("{row} cannot be read: {error}"))
}

/// What people have said.
///
/// # Errors
/// A rule that this version does not know.
pub(crate) fn rules(stored: &[(String, String, Value)]) -> Result<core::Rules, Error> {
    let mut rules = core::Rules::default();
    for (kind, name, value) in stored {
        let row = || format!("the {kind} of {name:?}");
        match kind.as_str() {
            POLICY => {
                let project = name.parse().map_err(|error| unknown(&row(), &error))?;
                let document = PolicyDocument::deserialize(value).map_err(|error| unknown(&row(), &error))?;
                let PolicyDocument { weight, max_cpu, max_cuda, max_queued, max_bytes } = document;
                rules.policies.insert(project, core::Policy { weight, max_cpu, max_cuda, max_queued, max_bytes });
            }
            CORDON => {
                rules.cordoned.insert(name.parse().map_err(|error| unknown(&row(), &error))?);
            }
            _ => return Err(Error::Restore(format!("{} is a kind of rule that this version does not know", row()))),
        }
    }
    Ok(rules)
}

/// What the core keeps of a job, and what the shell counts beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct JobDocument {
    order: u64,
    n_workers: NonZeroU32,
    n_devices: NonZeroU32,
    device: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    max_attempts: NonZeroU32,
    #[serde(default)]
    after: BTreeSet<JobId>,
    #[serde(default)]
    share: Option<Digest>,
    #[serde(default)]
    memory: MemoryDocument,
    #[serde(default)]
    is_staged: bool,
    #[serde(default)]
    may_fail: u32,
    #[serde(default)]
    n_stages_failed: u32,
    #[serde(default)]
    parent: Option<JobId>,
    state: String,
    reason: String,
    cohort: Option<CohortId>,
    n_failed: u32,
    n_offers_lost: u32,
    #[serde(default)]
    n_offers_refused: u32,
    pub(crate) checkpoint: Option<CheckpointDocument>,
    #[serde(default)]
    pub(crate) older: Option<CheckpointDocument>,
    progress: Step,
    outputs: BTreeSet<Digest>,
    pending: BTreeSet<JobId>,
    pub(crate) workers: BTreeSet<WorkerId>,
    lost_workers: BTreeSet<WorkerId>,
    preempted_at: Option<Step>,
    #[serde(default)]
    solo: bool,
    /// Attempts that failed over the whole life of the job.
    pub(crate) failed_attempts: u32,
}

/// What the job is expected to take of a device's memory, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct MemoryDocument {
    base: u64,
    own: u64,
    pass: u64,
    full_pass: u64,
}

/// A checkpoint that the next attempt may go on from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct CheckpointDocument {
    pub(crate) digest: Digest,
    pub(crate) step: Step,
    epoch: Epoch,
}

impl From<core::Checkpoint> for CheckpointDocument {
    fn from(core::Checkpoint { digest, step, epoch }: core::Checkpoint) -> Self {
        Self { digest, step, epoch }
    }
}

impl From<CheckpointDocument> for core::Checkpoint {
    fn from(CheckpointDocument { digest, step, epoch }: CheckpointDocument) -> Self {
        Self { digest, step, epoch }
    }
}

impl JobDocument {
    /// Reads a stored document.
    pub(crate) fn read(value: &Value) -> Result<Self, Error> {
        Self::deserialize(value).map_err(|error| Error::Restore(format!("a job's row: {error}")))
    }

    /// How many attempts failed without progress between them, or came to no worker: what the wait after a failure goes by.
    pub(crate) fn n_failed(&self) -> u32 {
        self.n_failed.max(self.n_offers_refused)
    }
}

/// The document of a job.
pub(crate) fn job_document(job: &core::Job, failed_attempts: u32) -> Value {
    let resources = &job.request.resources;
    let core::Memory { base, own, pass, full_pass } = job.request.memory;
    let document = JobDocument {
        order: job.order,
        n_workers: resources.n_workers,
        n_devices: resources.n_devices,
        device: resources.device.to_string(),
        labels: resources.labels.clone(),
        max_attempts: job.request.max_attempts,
        after: job.request.after.clone(),
        share: job.request.share,
        memory: MemoryDocument { base, own, pass, full_pass },
        is_staged: job.request.is_staged,
        may_fail: job.request.may_fail,
        n_stages_failed: job.n_stages_failed,
        parent: job.request.parent.clone(),
        state: job.state.to_string(),
        reason: job.reason.to_string(),
        cohort: job.cohort,
        n_failed: job.n_failed,
        n_offers_lost: job.n_offers_lost,
        n_offers_refused: job.n_offers_refused,
        checkpoint: job.checkpoint.map(Into::into),
        older: job.older.map(Into::into),
        progress: job.progress,
        outputs: job.outputs.clone(),
        pending: job.pending.clone(),
        workers: job.workers.clone(),
        lost_workers: job.lost_workers.clone(),
        preempted_at: job.preempted_at,
        solo: job.solo,
        failed_attempts,
    };
    serde_json::to_value(document).expect("a document has text keys only")
}

/// The core's job of a stored row.
pub(crate) fn job(row: &attune_store::job::Job) -> Result<(core::Job, JobDocument), Error> {
    let document = JobDocument::read(&row.core)?;
    let read = document.clone();
    let MemoryDocument { base, own, pass, full_pass } = read.memory;
    let job = core::Job {
        key: JobKey::new(row.project.clone(), row.job.clone()),
        version: row.version,
        order: read.order,
        request: core::Request {
            priority: row.priority,
            resources: core::Resources {
                n_workers: read.n_workers,
                n_devices: read.n_devices,
                device: read.device.parse()?,
                labels: read.labels,
            },
            max_attempts: read.max_attempts,
            after: read.after,
            share: read.share,
            memory: core::Memory { base, own, pass, full_pass },
            is_staged: read.is_staged,
            may_fail: read.may_fail,
            parent: read.parent,
        },
        state: read.state.parse()?,
        reason: read.reason.parse()?,
        epoch: row.epoch,
        cohort: read.cohort,
        n_failed: read.n_failed,
        n_offers_lost: read.n_offers_lost,
        n_offers_refused: read.n_offers_refused,
        checkpoint: read.checkpoint.map(Into::into),
        older: read.older.map(Into::into),
        progress: read.progress,
        outputs: read.outputs,
        n_stages_failed: read.n_stages_failed,
        pending: read.pending,
        workers: read.workers,
        lost_workers: read.lost_workers,
        preempted_at: read.preempted_at,
        solo: read.solo,
    };
    Ok((job, document))
}

#[derive(Debug, Serialize, Deserialize)]
struct CohortDocument {
    attempts: Vec<(Project, JobId, Epoch)>,
    shares: Vec<ShareDocument>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ShareDocument {
    worker: WorkerId,
    rank: u32,
    device: String,
    n_devices: u32,
}

/// The document of a cohort.
pub(crate) fn cohort_document(cohort: &core::Cohort) -> Value {
    let attempts = cohort.attempts.iter();
    let share = |share: &core::Share| ShareDocument {
        worker: share.worker.clone(),
        rank: share.rank,
        device: share.device.to_string(),
        n_devices: share.n_devices,
    };
    let document = CohortDocument {
        attempts: attempts.map(|a| (a.key.project.clone(), a.key.job.clone(), a.epoch)).collect(),
        shares: cohort.shares.iter().map(share).collect(),
    };
    serde_json::to_value(document).expect("a document has text keys only")
}

/// The core's cohort of a stored row.
pub(crate) fn cohort(row: &attune_store::attempt::Cohort) -> Result<core::Cohort, Error> {
    let document = CohortDocument::deserialize(&row.core)
        .map_err(|error| Error::Restore(format!("the row of cohort {}: {error}", row.cohort)))?;
    let attempt = |(project, job, epoch)| core::Attempt { key: JobKey::new(project, job), epoch };
    let share = |share: ShareDocument| {
        let ShareDocument { worker, rank, device, n_devices } = share;
        Ok::<_, Error>(core::Share { worker, rank, device: device.parse()?, n_devices })
    };
    Ok(core::Cohort {
        id: row.cohort,
        attempts: document.attempts.into_iter().map(attempt).collect(),
        shares: document.shares.into_iter().map(share).collect::<Result<_, _>>()?,
    })
}

/// The core's state in the store's words.
pub(crate) const fn state(state: core::State) -> (State, Option<Stop>) {
    match state {
        core::State::Waiting => (State::Waiting, None),
        core::State::Queued => (State::Queued, None),
        core::State::Starting => (State::Starting, None),
        core::State::Running => (State::Running, None),
        core::State::Stopping(core::Stop::Cancel) => (State::Stopping, Some(Stop::Cancel)),
        core::State::Stopping(core::Stop::Pause) => (State::Stopping, Some(Stop::Pause)),
        core::State::Stopping(core::Stop::Preempt) => (State::Stopping, Some(Stop::Preempt)),
        core::State::Backoff => (State::Backoff, None),
        core::State::Paused => (State::Paused, None),
        core::State::Succeeded => (State::Succeeded, None),
        core::State::Failed => (State::Failed, None),
        core::State::Cancelled => (State::Cancelled, None),
    }
}

/// A final state of the store in the core's words; nothing for states that change.
pub(crate) const fn final_state(state: State) -> Option<core::State> {
    match state {
        State::Succeeded => Some(core::State::Succeeded),
        State::Failed => Some(core::State::Failed),
        State::Cancelled => Some(core::State::Cancelled),
        State::Waiting
        | State::Queued
        | State::Starting
        | State::Running
        | State::Stopping
        | State::Backoff
        | State::Paused => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attune_store::UtcMs;

    #[test]
    fn a_job_comes_back_as_it_was() {
        let name = |name: &str| WorkerId::new(name).unwrap();
        let digest = |n| Digest::from_bytes([n; 32]);
        let given = core::Job {
            key: JobKey::new(Project::default(), JobId::new("j-1").unwrap()),
            version: 7,
            order: 3,
            request: core::Request {
                priority: -2,
                resources: core::Resources {
                    n_devices: NonZeroU32::new(4).unwrap(),
                    device: core::Wanted::Only(core::Device::Cpu),
                    labels: BTreeMap::from([("zone".to_owned(), "eu".to_owned())]),
                    ..core::Resources::default()
                },
                after: BTreeSet::from([JobId::new("j-0").unwrap()]),
                share: Some(digest(3)),
                memory: core::Memory { base: 1, own: 2, pass: 3, full_pass: 4 },
                is_staged: true,
                may_fail: 2,
                parent: Some(JobId::new("j-00").unwrap()),
                ..core::Request::default()
            },
            state: core::State::Stopping(core::Stop::Pause),
            reason: core::Reason::PauseAsked,
            epoch: Epoch(5),
            cohort: Some(CohortId(9)),
            n_failed: 1,
            n_offers_lost: 2,
            n_offers_refused: 3,
            checkpoint: Some(core::Checkpoint { digest: digest(1), step: Step(10), epoch: Epoch(4) }),
            older: Some(core::Checkpoint { digest: digest(5), step: Step(8), epoch: Epoch(3) }),
            progress: Step(10),
            outputs: BTreeSet::from([digest(2)]),
            n_stages_failed: 1,
            pending: BTreeSet::new(),
            workers: BTreeSet::from([name("w-1")]),
            lost_workers: BTreeSet::from([name("w-0")]),
            preempted_at: Some(Step(0)),
            solo: true,
        };
        let (state, stop) = state(given.state);
        let row = attune_store::job::Job {
            project: given.key.project.clone(),
            job: given.key.job.clone(),
            version: given.version,
            name: String::new(),
            kind: String::new(),
            spec: Value::Null,
            resolved: Value::Null,
            state,
            stop,
            reason: given.reason.to_string(),
            message: String::new(),
            epoch: given.epoch,
            attempts: 5,
            priority: given.request.priority,
            labels: BTreeMap::new(),
            core: job_document(&given, 6),
            progress: None,
            outputs: Value::Null,
            failure: None,
            retry_of: None,
            stage: None,
            last_event: attune_spec::id::Seq(0),
            created: UtcMs(0),
            updated: UtcMs(0),
            started: None,
            finished: None,
        };
        let (read, document) = job(&row).unwrap();
        assert_eq!(read, given);
        assert_eq!(document.failed_attempts, 6);
    }

    #[test]
    fn a_cohort_comes_back_as_it_was() {
        let given = core::Cohort {
            id: CohortId(4),
            attempts: vec![core::Attempt {
                key: JobKey::new(Project::default(), JobId::new("j-1").unwrap()),
                epoch: Epoch(2),
            }],
            shares: vec![core::Share {
                worker: WorkerId::new("w").unwrap(),
                rank: 0,
                device: core::Device::Cuda,
                n_devices: 2,
            }],
        };
        let row = attune_store::attempt::Cohort {
            cohort: given.id,
            project: Project::default(),
            core: cohort_document(&given),
            created: UtcMs(0),
            ended: None,
        };
        assert_eq!(cohort(&row).unwrap(), given);
    }

    #[test]
    fn a_row_of_a_newer_version_is_refused_with_its_word() {
        let row = attune_store::attempt::Cohort {
            cohort: CohortId(1),
            project: Project::default(),
            core: serde_json::json!({"attempts": [], "shares": [
                {"worker": "w", "rank": 0, "device": "tpu", "n_devices": 1}]}),
            created: UtcMs(0),
            ended: None,
        };
        let error = cohort(&row).unwrap_err().to_string();
        assert!(error.contains("tpu"), "{error}");
    }
}
