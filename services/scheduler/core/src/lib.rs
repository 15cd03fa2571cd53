//! The scheduler's decisions, and nothing else: what runs where, when, and who may commit.
//!
//! ```text
//! requests, messages, timers -> Input -> Core::step(input, now) -> Effects { answer, changes, actions, wake }
//! ```
//!
//! [`Core`] holds jobs, cohorts and workers in memory. [`Core::step`] takes one thing that happened and says what follows
//! from it: what to store, in one transaction, and what to do after that. The same function is driven by the service,
//! by a model checker and by a simulation that kills everything it can.
//!
//! # The words
//! A **job** moves through ten [`State`]s along fixed arrows, each with a [`Reason`] from a closed list. When a gang of
//! workers is found for it, it is **granted**: its **epoch** grows by one, and a **cohort** is made, the set of attempts
//! that one gang of child processes runs (today one attempt). A **lease** says until when a worker may run its share
//! without a heartbeat; it is a hint to give up early, never the guard. The guard is the epoch, compared at commit.
//!
//! A job may consist of **stages**, other jobs that are submitted one after the other. What follows a stage is for the shell to
//! find out; the core says when it is **due** ([`Core::due`]), ends the job with its stages, and the stages with it.
//!
//! # The invariant
//! At most one epoch of a job is live, and only a live epoch commits. [`invariants`] writes this and its companions down
//! as named predicates; they are checked after every step in tests, and for the jobs that a step touched in release.
//!
//! # The contract with the shell
//! * One step at a time. `now` is a monotonic clock; its zero is arbitrary and no timestamp is ever stored.
//! * [`Effects::changes`] are stored in one transaction before the answer is given and before any action is performed.
//!   If that fails, this `Core` is thrown away and a new one restored.
//! * Actions may be lost or repeated. A worker learns what it missed from the answers to its registration and heartbeats.
//! * [`Input::Tick`] comes no later than [`Effects::wake`]. A gap of half a lease between two steps counts as a stall of the
//!   scheduler itself, and every worker is given a whole new lease: nobody is expired for our own silence.
//! * After a restart [`Core::restore`] takes the stored rows of unfinished jobs, live cohorts and the counters; workers come
//!   back by themselves, and nobody is expired before one lease has passed. Finished jobs may be left out or forgotten.
//!
//! How many workers there are to be is decided beside this, by [`supply`], which reads a [`Core`] and changes nothing of it.
//!
//! # What a worker owes
//! It registers with what it still holds, says of each offer whether it takes it, sends heartbeats that list its cohorts, kills its children when a lease has
//! passed by its own clock since the last answered heartbeat was sent, kills what it is told to release, confirms that
//! with `CohortGone`, and repeats the report of an ended attempt until it is answered. It holds a cohort from the offer to
//! the release, also after its own processes have ended well: a gang is over when its leader says so.
//!
//! # Absent on purpose
//! I/O, clocks, randomness, logging, `async`, hash maps. Specifications (only [`Request`] is known here), the bytes of
//! artifacts, tags, progress and metrics. A final state never changes: to run a finished job again, submit it anew.

mod time;

mod cause;
mod cohort;
mod error;
mod job;
mod reason;
mod resources;
mod state;
mod worker;

mod effect;
mod input;
mod refusal;

mod backoff;
mod lease;
mod machine;
mod plant;
mod project;
mod queue;
mod seats;
mod step;
mod timers;

pub mod invariants;
pub mod placement;
pub mod supply;

#[cfg(test)]
mod model;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod testing;

pub use backoff::Backoff;
pub use cause::{Cause, Retry};
pub use cohort::{Attempt, Cohort, Share};
pub use effect::{Action, Answer, Change, Committed, Effects, Event, EventKind, Granted, Offer};
pub use error::{ParseError, RestoreError};
pub use input::{Commit, Declined, Input, Limit, Look, Outcome};
pub use job::{Checkpoint, Job, JobKey, Request};
pub use machine::{Core, Counters, Rules, Settings};
pub use project::{Fleet, Policy, Usage};
pub use reason::Reason;
pub use refusal::{Refusal, RefusalKind};
pub use resources::{Device, Devices, Memory, Resources, Wanted};
pub use state::{State, Stop};
pub use time::Timestamp;
pub use worker::{Holding, Occupied, Session, Worker};
