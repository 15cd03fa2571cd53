//! Everything that can happen to the scheduler: a closed list.

use std::collections::BTreeMap;

use attune_spec::id::{CohortId, Digest, Epoch, JobId, Name, Project, Step, WorkerId};

use crate::{Cause, Device, Devices, Holding, JobKey, Policy, Request, Session, State};

/// What an attempt commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Commit {
    /// The whole state of training after this many optimiser steps; the next attempt goes on from there.
    Checkpoint(Step),
    /// A result of the job.
    Output,
}

/// How an attempt ended, as its worker reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// All is done and committed.
    Succeeded,
    /// It was asked to stop and did, after its last checkpoint.
    Stopped,
    /// It failed.
    Failed(Cause),
    /// The process that it shared with other attempts died, and nobody knows whose fault it was.
    Crashed(Cause),
}

/// Why a worker does not want what it was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Declined {
    /// It has no room for it, or for anything.
    Full,
    /// It is about to go.
    Leaving,
    /// It cannot run such an offer.
    Unable,
}

/// What somebody saw who looked at the stages of a job and at what comes after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Look {
    /// All stages that can be made are made.
    Wait,
    /// All stages have succeeded, but for as many as may fail, and no other follows.
    Done,
    /// The next stage cannot be made.
    Broken(Cause),
}

/// A limit of time that a job sets itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Limit {
    /// How long it may run, all attempts together.
    RunTime,
    /// By when it is to be done.
    Deadline,
}

/// One thing that happened. The shell makes an input of every request, message and timer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Input {
    /// A person submits a job. Repeating it with the same request changes nothing. A key is never used again, also not
    /// after its job was forgotten: whoever makes keys sees to that.
    Submit {
        /// The new job.
        key: JobKey,
        /// What it asks for.
        request: Request,
        /// The final states, as stored, of jobs in `request.after` that the core may not hold any more.
        finished: BTreeMap<JobId, State>,
    },
    /// A person ends a job; legal from every state that is not final.
    Cancel {
        /// The job.
        key: JobKey,
    },
    /// A limit of time that the job sets itself has passed, by clocks that the shell has: it ends as if it were cancelled.
    Expire {
        /// The job.
        key: JobKey,
        /// The limit.
        limit: Limit,
    },
    /// Somebody says what a project may have from now on; without a policy, all.
    SetPolicy {
        /// The project.
        project: Project,
        /// What it may have.
        policy: Option<Policy>,
    },
    /// Somebody says whether a worker gets anything new; that outlives the worker's connections and this scheduler.
    Cordon {
        /// The worker.
        worker: WorkerId,
        /// Whether it gets nothing new from now on.
        on: bool,
        /// Whether its jobs are preempted as well.
        drains: bool,
    },
    /// A person stops a starting or running job until further notice.
    Pause {
        /// The job.
        key: JobKey,
    },
    /// A person lets a paused job queue again.
    Resume {
        /// The job.
        key: JobKey,
    },
    /// A person cuts the wait after a failed attempt short. A finished job stays finished: submit it anew.
    Retry {
        /// The job.
        key: JobKey,
    },
    /// Somebody wants the job's devices. Refused when it has made no progress since its last preemption.
    Preempt {
        /// The job.
        key: JobKey,
    },
    /// Somebody looked at a job that is due for it: one of stages, of which one was made or has succeeded since the last look.
    /// A look at a row that has changed since is refused, and the job stays due.
    Looked {
        /// The job.
        key: JobKey,
        /// The version of its row that was looked at.
        version: u64,
        /// What was seen.
        look: Look,
    },
    /// Drops a finished job from memory; its row stays where it is. Late messages about it are refused as about an
    /// unknown job from now on.
    Forget {
        /// The job.
        key: JobKey,
    },
    /// A worker connects and says what it has and what it still runs.
    Register {
        /// The worker.
        worker: WorkerId,
        /// The new connection.
        session: Session,
        /// All its devices.
        devices: Devices,
        /// Memory of each device, by kind, where it is known.
        memory: BTreeMap<Device, u64>,
        /// Its labels.
        labels: BTreeMap<String, String>,
        /// The name of its process, another after each start; nothing of a worker that does not say it.
        process: Option<Name>,
        /// Whether it finishes what it runs and gets nothing new: it is of an earlier version.
        outdated: bool,
        /// Whether it wants nothing new.
        draining: bool,
        /// The cohorts that it runs.
        holding: Vec<Holding>,
    },
    /// A worker has taken its share of a cohort.
    OfferAccepted {
        /// The worker.
        worker: WorkerId,
        /// The cohort.
        cohort: CohortId,
    },
    /// A worker does not want its share of a cohort. That is nobody's failure.
    OfferRefused {
        /// The worker.
        worker: WorkerId,
        /// The cohort.
        cohort: CohortId,
        /// Why.
        why: Declined,
    },
    /// A worker lives and vouches for the cohorts that it runs.
    Heartbeat {
        /// The worker.
        worker: WorkerId,
        /// Its connection.
        session: Session,
        /// Grows with every heartbeat of a session, from 1.
        beat: u64,
        /// The cohorts that it runs.
        holding: Vec<CohortId>,
    },
    /// A worker shall get nothing new; its jobs are preempted.
    Drain {
        /// The worker.
        worker: WorkerId,
    },
    /// A connection broke. This is not a death: leases run on.
    Disconnect {
        /// The worker.
        worker: WorkerId,
        /// The connection that broke.
        session: Session,
    },
    /// No process of this cohort is left on the worker.
    CohortGone {
        /// The worker.
        worker: WorkerId,
        /// Its connection.
        session: Session,
        /// The cohort.
        cohort: CohortId,
    },
    /// A worker's processes of this cohort died; all its attempts have failed.
    CohortCrashed {
        /// The worker that says so.
        worker: WorkerId,
        /// The cohort.
        cohort: CohortId,
        /// Why.
        cause: Cause,
    },
    /// The inputs are there, the rehearsal is over, training begins.
    AttemptRunning {
        /// The job.
        key: JobKey,
        /// The attempt's epoch.
        epoch: Epoch,
        /// The worker that says so.
        worker: WorkerId,
    },
    /// An attempt ended. Success and an orderly stop are for the leader of the gang to report.
    AttemptFinished {
        /// The job.
        key: JobKey,
        /// The attempt's epoch.
        epoch: Epoch,
        /// The worker that says so.
        worker: WorkerId,
        /// How.
        outcome: Outcome,
    },
    /// An attempt wants to make an artifact visible.
    Commit {
        /// The job.
        key: JobKey,
        /// The attempt's epoch.
        epoch: Epoch,
        /// The worker that says so.
        worker: WorkerId,
        /// What it is.
        commit: Commit,
        /// The artifact.
        digest: Digest,
    },
    /// Time passed. The only input at which deadlines end.
    Tick,
}
