//! Why an input changed nothing.

use attune_spec::id::{CohortId, Epoch, JobId, Project, Step, WorkerId};

use crate::{Device, JobKey, Session, State};

/// Why an input was refused. A refused input has changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// There is no such job.
    #[error("job {key} does not exist")]
    UnknownJob {
        /// The job asked for.
        key: JobKey,
    },
    /// The job exists with another request.
    #[error("job {key} exists already, with another specification")]
    JobExists {
        /// The job.
        key: JobKey,
    },
    /// A job that it should come after does not exist.
    #[error("job {key} comes after {dependency:?}, which does not exist in its project")]
    UnknownDependency {
        /// The job submitted.
        key: JobKey,
        /// The missing one.
        dependency: JobId,
    },
    /// Its project has as many waiting jobs as it may.
    #[error(
        "project {project} has {max} jobs that wait, which is as many as it may have; wait until some have run, or cancel some"
    )]
    QueueFull {
        /// The project.
        project: Project,
        /// How many it may have.
        max: u32,
    },
    /// It asks for more than its project may ever have.
    #[error("job {key} asks for {asked} devices of the kind {device}; its project may have {max} at a time")]
    BeyondQuota {
        /// The job.
        key: JobKey,
        /// The kind of device.
        device: Device,
        /// How many it asks for.
        asked: u32,
        /// How many its project may have.
        max: u32,
    },
    /// The arrow asked for does not exist.
    #[error("job {key} is {state}; {wanted}")]
    WrongState {
        /// The job.
        key: JobKey,
        /// Where it is.
        state: State,
        /// What would have been needed.
        wanted: &'static str,
    },
    /// The job has changed since it was looked at.
    #[error("job {key} has changed since version {version}; look again")]
    JobChanged {
        /// The job.
        key: JobKey,
        /// The version that was looked at.
        version: u64,
    },
    /// The job was preempted before and has committed no further checkpoint.
    #[error(
        "job {key} has made no progress since its last preemption; it is not preempted again before its next checkpoint"
    )]
    NoProgress {
        /// The job.
        key: JobKey,
    },
    /// The message is from an attempt that was replaced.
    #[error("epoch {epoch} of job {key} is stale: the newest is {newest}")]
    StaleEpoch {
        /// The job.
        key: JobKey,
        /// The epoch of the message.
        epoch: Epoch,
        /// The epoch of the newest grant.
        newest: Epoch,
    },
    /// The message names an epoch that was never granted.
    #[error("epoch {epoch} of job {key} was never granted: the newest is {newest}")]
    UnknownEpoch {
        /// The job.
        key: JobKey,
        /// The epoch of the message.
        epoch: Epoch,
        /// The epoch of the newest grant.
        newest: Epoch,
    },
    /// The attempt is over.
    #[error("the attempt with epoch {epoch} of job {key} is over: the job is {state}")]
    AttemptOver {
        /// The job.
        key: JobKey,
        /// The epoch of the message.
        epoch: Epoch,
        /// Where the job is.
        state: State,
    },
    /// The attempt has committed a later checkpoint already.
    #[error("checkpoint at step {step} of job {key} came after the one at step {newest} of the same attempt")]
    OlderCheckpoint {
        /// The job.
        key: JobKey,
        /// The step of the message.
        step: Step,
        /// The step of the attempt's newest checkpoint.
        newest: Step,
    },
    /// The worker is not in the gang that it speaks for.
    #[error("worker {worker} holds no lease for {what}")]
    NotItsLease {
        /// The worker.
        worker: WorkerId,
        /// The attempt or cohort.
        what: String,
    },
    /// Only rank 0 of a gang says this.
    #[error("worker {worker} is not the leader of the gang of job {key}")]
    NotTheLeader {
        /// The worker.
        worker: WorkerId,
        /// The job.
        key: JobKey,
    },
    /// The cohort is over, or never was.
    #[error("cohort {cohort} is over")]
    CohortOver {
        /// The cohort.
        cohort: CohortId,
    },
    /// The worker has to register first.
    #[error("worker {worker} is not registered; register again")]
    UnknownWorker {
        /// The worker.
        worker: WorkerId,
    },
    /// The message is from a connection that was replaced, or from none that was announced.
    #[error("connection {} of worker {worker} is not its newest, which is {}", session.0, newest.0)]
    StaleSession {
        /// The worker.
        worker: WorkerId,
        /// The connection of the message.
        session: Session,
        /// The newest connection.
        newest: Session,
    },
    /// A later heartbeat came first.
    #[error("heartbeat {beat} of worker {worker} came after heartbeat {newest}")]
    StaleBeat {
        /// The worker.
        worker: WorkerId,
        /// The number of the heartbeat.
        beat: u64,
        /// The number of the newest.
        newest: u64,
    },
}

/// What whoever was refused can do: a closed list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RefusalKind {
    /// Nothing of that name is known. A worker lets go of the attempt.
    NotFound,
    /// The name is taken.
    Exists,
    /// Wait for another state, or ask for something else.
    Precondition,
    /// The worker lets go of the attempt: it is over, or was never its own.
    AttemptOver,
    /// Nothing: something newer has arrived before.
    Superseded,
    /// The worker registers again.
    Unregistered,
    /// Its project may have no more.
    OverQuota,
}

impl Refusal {
    /// What whoever was refused can do.
    pub const fn kind(&self) -> RefusalKind {
        match self {
            Self::UnknownJob { .. } => RefusalKind::NotFound,
            Self::JobExists { .. } => RefusalKind::Exists,
            Self::UnknownDependency { .. } | Self::WrongState { .. } | Self::NoProgress { .. } => {
                RefusalKind::Precondition
            }
            Self::QueueFull { .. } | Self::BeyondQuota { .. } => RefusalKind::OverQuota,
            Self::StaleEpoch { .. }
            | Self::UnknownEpoch { .. }
            | Self::AttemptOver { .. }
            | Self::NotItsLease { .. }
            | Self::NotTheLeader { .. }
            | Self::CohortOver { .. } => RefusalKind::AttemptOver,
            Self::OlderCheckpoint { .. } | Self::StaleBeat { .. } | Self::JobChanged { .. } => RefusalKind::Superseded,
            Self::UnknownWorker { .. } | Self::StaleSession { .. } => RefusalKind::Unregistered,
        }
    }
}
