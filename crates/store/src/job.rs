//! Jobs as they are stored: the specification, the state, and what a change of it must say.

use std::collections::BTreeMap;

use attune_spec::id::{Digest, Epoch, JobId, Name, Project, Seq};
use serde_json::Value;

use crate::event::NewEvent;
use crate::time::UtcMs;
use crate::words::words;

words!(
    /// The state of a job.
    State {
        /// For other jobs to end.
        Waiting = "waiting",
        /// For devices.
        Queued = "queued",
        /// Granted; the child checks inputs and rehearses.
        Starting = "starting",
        /// Training.
        Running = "running",
        /// Asked to save and stop; see [`Stop`].
        Stopping = "stopping",
        /// For the end of a delay before the next attempt.
        Backoff = "backoff",
        /// Until someone resumes it.
        Paused = "paused",
        /// Done. Final.
        Succeeded = "succeeded",
        /// Not done, and will not be. Final.
        Failed = "failed",
        /// Stopped by someone. Final.
        Cancelled = "cancelled",
    }
);

words!(
    /// What a stopping job will become.
    Stop {
        /// Cancelled.
        Cancel = "cancel",
        /// Paused.
        Pause = "pause",
        /// Queued again.
        Preempt = "preempt",
    }
);

impl State {
    /// Whether the state never changes again.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// An artifact that a job uses, by role: `base`, `data/packages`, `continue_from`, …
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Input {
    /// What the job uses it as.
    pub role: String,
    /// The artifact.
    pub digest: Digest,
}

/// That a job is a stage of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// The job that it is a stage of.
    pub parent: JobId,
    /// Its name there.
    pub name: Name,
}

/// A job to be stored for the first time.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// Its project.
    pub project: Project,
    /// Its id; ids sort by creation time.
    pub job: JobId,
    /// Its first version.
    pub version: u64,
    /// For people; not unique.
    pub name: String,
    /// The kind of job, as in the job file.
    pub kind: String,
    /// The specification as submitted.
    pub spec: Value,
    /// The specification with defaults written out and references replaced by digests.
    pub resolved: Value,
    /// The first state: waiting or queued.
    pub state: State,
    /// Why it is in that state.
    pub reason: String,
    /// The reason in words.
    pub message: String,
    /// Larger runs first.
    pub priority: i32,
    /// For filters.
    pub labels: BTreeMap<String, String>,
    /// Artifacts it uses; they must exist.
    pub inputs: Vec<Input>,
    /// What the scheduling core needs to take the job up again.
    pub core: Value,
    /// The finished job that this one repeats.
    pub retry_of: Option<JobId>,
    /// What it is a stage of.
    pub stage: Option<Stage>,
    /// How long it may run, all attempts together, in milliseconds.
    pub run_limit_ms: Option<u64>,
    /// By when it is to be done.
    pub deadline: Option<UtcMs>,
    /// When.
    pub now: UtcMs,
}

/// A limit of time that a job set itself, and that has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overdue {
    /// It has run for too long.
    RunTime,
    /// It was to be done by then.
    Deadline,
}

/// A stored job.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Its project.
    pub project: Project,
    /// Its id.
    pub job: JobId,
    /// Grows by one with each change; a change names the version it was decided on.
    pub version: u64,
    /// For people.
    pub name: String,
    /// The kind of job.
    pub kind: String,
    /// As submitted.
    pub spec: Value,
    /// With defaults and digests.
    pub resolved: Value,
    /// The state.
    pub state: State,
    /// What a stopping job will become; present exactly while stopping.
    pub stop: Option<Stop>,
    /// Why it is in that state, from the scheduling core's list.
    pub reason: String,
    /// The reason in words.
    pub message: String,
    /// The fencing token of its latest attempt; 0 before the first.
    pub epoch: Epoch,
    /// Attempts that were started.
    pub attempts: u32,
    /// Larger runs first.
    pub priority: i32,
    /// For filters.
    pub labels: BTreeMap<String, String>,
    /// The scheduling core's own state of the job.
    pub core: Value,
    /// The latest report of the attempt.
    pub progress: Option<Value>,
    /// The artifacts it made, in the order of their commits.
    pub outputs: Value,
    /// Why it failed, in detail.
    pub failure: Option<Value>,
    /// The finished job that this one repeats.
    pub retry_of: Option<JobId>,
    /// What it is a stage of.
    pub stage: Option<Stage>,
    /// The number of the newest event about it.
    pub last_event: Seq,
    /// When it was accepted.
    pub created: UtcMs,
    /// When it last changed.
    pub updated: UtcMs,
    /// When its first attempt was granted.
    pub started: Option<UtcMs>,
    /// When it reached its final state.
    pub finished: Option<UtcMs>,
}

/// A transition of a job: compared with the stored version, and logged.
#[derive(Debug, Clone)]
pub struct JobChange {
    /// Its project.
    pub project: Project,
    /// The job.
    pub job: JobId,
    /// The version the change was decided on.
    pub version: u64,
    /// The state after it.
    pub state: State,
    /// What a stopping job will become; present exactly while stopping.
    pub stop: Option<Stop>,
    /// Why.
    pub reason: String,
    /// The reason in words.
    pub message: String,
    /// The epoch after it; never smaller than the stored one.
    pub epoch: Epoch,
    /// Attempts started after it.
    pub attempts: u32,
    /// The scheduling core's own state after it.
    pub core: Value,
    /// Replaces the stored failure when given.
    pub failure: Option<Value>,
    /// Replaces the stored outputs when given.
    pub outputs: Option<Value>,
    /// What watchers are told.
    pub event: NewEvent,
    /// When.
    pub now: UtcMs,
}

/// Which jobs to list. Empty fields do not filter.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Any of these states.
    pub states: Vec<State>,
    /// This kind.
    pub kind: Option<String>,
    /// This name.
    pub name: Option<String>,
    /// Stages of this job.
    pub parent: Option<JobId>,
    /// All of these labels.
    pub labels: BTreeMap<String, String>,
    /// The order of the list.
    pub order: Order,
}

/// The order of a list by time of creation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Order {
    /// Newest first.
    #[default]
    Newest,
    /// Oldest first.
    Oldest,
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct Page<T> {
    /// The rows.
    pub items: Vec<T>,
    /// Where the next page starts; absent on the last one.
    pub next: Option<String>,
}

/// The stored answer of a request that carries an id, so that repeating it has no second effect.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The id that the client chose, unique within the project.
    pub id: String,
    /// The digest of what was asked.
    pub body: Digest,
}

/// What became of a create call.
#[derive(Debug, Clone)]
pub struct Created {
    /// The job: the new one, or the one that the same request made before.
    pub job: Job,
    /// Whether this call made it.
    pub is_new: bool,
    /// The events that were appended.
    pub events: Vec<crate::event::Event>,
}
