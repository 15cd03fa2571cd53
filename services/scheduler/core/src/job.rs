//! A job as the scheduler keeps it: one row.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fmt;
use std::num::NonZeroU32;

use attune_spec::id::{CohortId, Digest, Epoch, JobId, Project, Step, WorkerId};

use crate::{Memory, Reason, Resources, State};

/// The key of a job: its project is always part of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobKey {
    /// The tenant.
    pub project: Project,
    /// The job, unique in its project.
    pub job: JobId,
}

impl JobKey {
    /// The key of `job` in `project`.
    pub const fn new(project: Project, job: JobId) -> Self {
        Self { project, job }
    }
}

impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "projects/{}/jobs/{}", self.project, self.job)
    }
}

/// What the scheduler must know of a specification. It never changes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Request {
    /// Higher goes first.
    pub priority: i32,
    /// The gang it needs.
    pub resources: Resources,
    /// After how many failed attempts without a new checkpoint between them the job is given up.
    pub max_attempts: NonZeroU32,
    /// Jobs of the same project that must succeed first.
    pub after: BTreeSet<JobId>,
    /// Jobs of one project with the same key and the same resources may run as lanes of one process; without a key, alone.
    pub share: Option<Digest>,
    /// What it takes of a device's memory: no more jobs share a process than the device holds.
    pub memory: Memory,
    /// Whether it consists of other jobs, its stages: it holds no device, and ends when somebody has seen that the last one has
    /// succeeded, or when one has not.
    pub is_staged: bool,
    /// How many of its stages may fail or be cancelled while the others go on.
    pub may_fail: u32,
    /// The job of the same project that it is a stage of.
    pub parent: Option<JobId>,
}

impl Default for Request {
    /// One device, three attempts, no dependency.
    fn default() -> Self {
        Self {
            priority: 0,
            resources: Resources::default(),
            max_attempts: NonZeroU32::MIN.saturating_add(2),
            after: BTreeSet::new(),
            share: None,
            memory: Memory::default(),
            is_staged: false,
            may_fail: 0,
            parent: None,
        }
    }
}

/// A committed state of training from which the next attempt goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Checkpoint {
    /// The artifact.
    pub digest: Digest,
    /// The optimiser steps in it.
    pub step: Step,
    /// The epoch of the attempt that committed it.
    pub epoch: Epoch,
}

/// A job's row. The core hands out whole rows; a store writes them as they are and reads them back on restart.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Job {
    /// Its key.
    pub key: JobKey,
    /// Grows by one with every change of the row: the value to compare with when the row is written.
    pub version: u64,
    /// Its place among jobs of equal priority: the number of its submission.
    pub order: u64,
    /// What it asks for.
    pub request: Request,
    /// Where it is.
    pub state: State,
    /// Why it is there.
    pub reason: Reason,
    /// The epoch of its newest grant; 0 when it was never granted.
    pub epoch: Epoch,
    /// The cohort of its live attempt; some exactly while the state is live.
    pub cohort: Option<CohortId>,
    /// Failed attempts since the last progress.
    pub n_failed: u32,
    /// Lost offers since an attempt last ran or failed otherwise. The first two are nobody's fault.
    pub n_offers_lost: u32,
    /// Offers in a row that workers refused. They are no failures; the wait after one grows with them.
    pub n_offers_refused: u32,
    /// The newest committed checkpoint.
    pub checkpoint: Option<Checkpoint>,
    /// The one before it, which the job goes on from when the newest turns out to be damaged.
    pub older: Option<Checkpoint>,
    /// The highest step of any committed checkpoint. A higher one is progress.
    pub progress: Step,
    /// What the attempt of this epoch committed as results.
    pub outputs: BTreeSet<Digest>,
    /// The jobs that it comes after, or the stages that it has so far, which have not succeeded yet and may still; of a job without
    /// stages empty exactly when it has left `Waiting` for the queue.
    pub pending: BTreeSet<JobId>,
    /// Stages that have ended without success; no more than may fail while it has not ended.
    pub n_stages_failed: u32,
    /// The workers of its newest gang, which have its inputs on their disks.
    pub workers: BTreeSet<WorkerId>,
    /// Workers that died while they ran it, or while nobody knew whether its offer had reached them, since the last progress.
    pub lost_workers: BTreeSet<WorkerId>,
    /// The progress at its last preemption on request; it is not preempted again without more.
    pub preempted_at: Option<Step>,
    /// Whether it runs alone from now on: a process that it shared with other jobs died, and nobody knows whose fault it was.
    pub solo: bool,
}

impl Job {
    /// Whether `epoch` is the one whose commits are accepted.
    pub fn is_live(&self, epoch: Epoch) -> bool {
        self.state.is_live() && self.epoch == epoch
    }

    /// The key of the jobs that it may share a process with, if it may.
    pub fn shares(&self) -> Option<&Digest> {
        self.request.share.as_ref().filter(|_| !self.solo)
    }

    /// Whether it is one of the jobs that its project has which have neither ended nor run; a stage is part of another.
    pub(crate) fn counts_as_queued(&self) -> bool {
        !self.state.is_final() && !self.state.is_live() && self.request.parent.is_none()
    }

    /// The key of the job that it is a stage of.
    pub fn parent(&self) -> Option<JobKey> {
        self.request.parent.clone().map(|parent| JobKey::new(self.key.project.clone(), parent))
    }

    /// Its place in the queue: priority, then submission.
    pub(crate) fn place(&self) -> Place {
        Place { priority: Reverse(self.request.priority), order: self.order, key: self.key.clone() }
    }

    /// The keys of the jobs that it still waits for.
    pub(crate) fn awaited(&self) -> Vec<JobKey> {
        self.pending.iter().map(|job| JobKey::new(self.key.project.clone(), job.clone())).collect()
    }
}

/// Where a job stands in the queue; the smallest goes first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Place {
    pub(crate) priority: Reverse<i32>,
    pub(crate) order: u64,
    pub(crate) key: JobKey,
}
