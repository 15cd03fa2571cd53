//! What a step asks of the shell: changes to store, in one transaction, and then actions to perform.

use std::time::Duration;

use attune_spec::id::{CohortId, Digest, Epoch, JobId, Project, WorkerId};

use crate::{
    Attempt, Checkpoint, Cohort, Commit, Counters, Job, JobKey, Policy, Reason, Refusal, Session, Share, State, Stop,
    Timestamp,
};

/// The result of a step.
///
/// The shell stores `changes` in one transaction (nothing to store: no transaction), then gives `answer` to whoever sent
/// the input, then performs `actions` in order, and sends [`Input::Tick`](crate::Input::Tick) at `wake`. When the
/// transaction fails, the core is ahead of the store: it must be thrown away and restored.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Effects {
    /// What became of the input.
    pub answer: Answer,
    /// What to store.
    pub changes: Vec<Change>,
    /// What to do after that.
    pub actions: Vec<Action>,
    /// When to send the next tick, at the latest. Replaces the `wake` of earlier steps.
    pub wake: Option<Timestamp>,
}

/// What became of an input.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Answer {
    /// It took effect.
    Done,
    /// It had taken effect before; nothing changed now.
    Repeated,
    /// It changed nothing.
    Refused(Refusal),
}

/// A change to store. All changes of a step go into one transaction, in order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Change {
    /// Write this row. A new one has version 1; otherwise the stored row must have the version before, or another
    /// scheduler has written it and this one must stop. At least one event about the job is in the same step.
    Job(Box<Job>),
    /// Write this row.
    Cohort(Cohort),
    /// This cohort is over, with its row as it was last: remove it, or mark it as ended.
    CohortEnded(Cohort),
    /// Write the counters.
    Counters(Counters),
    /// Write what a project may have; nothing if it may have all.
    Policy(Project, Option<Policy>),
    /// Write whether a worker gets anything new.
    Cordon(WorkerId, bool),
    /// Append this to the project's event log.
    Event(Event),
    /// Make this artifact visible.
    Commit(Committed),
}

/// An artifact that becomes visible with this transaction, and only if the job's row in it has this epoch.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Committed {
    /// The job.
    pub key: JobKey,
    /// The epoch of the attempt that made it.
    pub epoch: Epoch,
    /// The worker that pushed it.
    pub worker: WorkerId,
    /// What it is.
    pub commit: Commit,
    /// The artifact.
    pub digest: Digest,
}

/// An entry of the event log.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Event {
    /// The job.
    pub key: JobKey,
    /// Its newest epoch; 0 before the first grant.
    pub epoch: Epoch,
    /// What happened.
    pub kind: EventKind,
}

/// What happened to a job.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// It was submitted.
    Submitted {
        /// Its first state.
        to: State,
        /// Why that one.
        reason: Reason,
    },
    /// It moved along one arrow.
    Moved {
        /// The state before.
        from: State,
        /// The state after.
        to: State,
        /// Why.
        reason: Reason,
    },
    /// One of the jobs that it waits for has succeeded; others have not.
    DependencyMet {
        /// The one that has.
        dependency: JobId,
    },
    /// One of the stages that it consists of was submitted or has succeeded.
    Stage {
        /// The stage.
        stage: JobId,
        /// Where the stage is now.
        state: State,
    },
    /// It committed an artifact.
    Committed {
        /// What it is.
        commit: Commit,
        /// The artifact.
        digest: Digest,
    },
}

/// Something to do once the changes are stored. Every action may be lost or repeated without harm, and carries what it
/// takes to recognise a repetition.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Offer a worker its share of a gang. A worker that knows the cohort already ignores it.
    Offer(Offer),
    /// Ask the processes of an attempt to write a checkpoint and stop; kill them after the worker's grace time.
    Stop {
        /// The worker.
        worker: WorkerId,
        /// The cohort that the attempt is in.
        cohort: CohortId,
        /// The attempt.
        attempt: Attempt,
        /// What the stop is for.
        stop: Stop,
    },
    /// This attempt is over, while others of its cohort go on: drop its lane.
    Drop {
        /// The worker.
        worker: WorkerId,
        /// The cohort that the attempt was in.
        cohort: CohortId,
        /// The attempt.
        attempt: Attempt,
    },
    /// The cohort is over: kill what is left of it and answer with `CohortGone`, also when nothing is left.
    Release {
        /// The worker.
        worker: WorkerId,
        /// The cohort.
        cohort: CohortId,
    },
    /// Answer a registration.
    Welcome {
        /// The worker.
        worker: WorkerId,
        /// Its connection.
        session: Session,
        /// The cohorts that it keeps; a `Release` follows for every other.
        keep: Vec<CohortId>,
        /// How long a lease lasts without a heartbeat.
        ttl: Duration,
    },
    /// Answer a heartbeat. The leases last until `ttl` after the heartbeat was *sent*, by the worker's own clock.
    Renewed {
        /// The worker.
        worker: WorkerId,
        /// Its connection.
        session: Session,
        /// The number of the heartbeat.
        beat: u64,
        /// The cohorts whose leases were renewed; a `Release` follows for every other.
        cohorts: Vec<CohortId>,
    },
}

impl Action {
    /// The worker that it is for.
    pub const fn worker(&self) -> &WorkerId {
        match self {
            Self::Offer(offer) => &offer.share.worker,
            Self::Stop { worker, .. }
            | Self::Drop { worker, .. }
            | Self::Release { worker, .. }
            | Self::Welcome { worker, .. }
            | Self::Renewed { worker, .. } => worker,
        }
    }
}

/// One worker's share of a gang.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Offer {
    /// The cohort.
    pub cohort: CohortId,
    /// What to run.
    pub attempts: Vec<Granted>,
    /// The part of this worker.
    pub share: Share,
    /// The workers of the whole gang, by rank.
    pub gang: Vec<WorkerId>,
    /// How long the lease lasts without a heartbeat.
    pub ttl: Duration,
}

/// An attempt in an offer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Granted {
    /// The attempt.
    pub attempt: Attempt,
    /// Where it goes on from.
    pub checkpoint: Option<Checkpoint>,
}
