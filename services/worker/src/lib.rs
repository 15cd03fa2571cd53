//! The node agent: it offers a machine's devices to the scheduler, runs each attempt in a process of its own, or several
//! as lanes of one, and stores what the attempts make.
//!
//! The one invariant: **nothing runs here that the scheduler may have given to somebody else.** A lease that was not
//! renewed by this node's own clock ends its processes before it ends at the scheduler.
//!
//! Deliberately absent: training (it happens in the process that the agent starts, see `attune_trainer::attempt`),
//! decisions about jobs (the scheduler's core), and the store's keys (bytes move through the artifact service).
//!
//! Reading order: [`Config`], `agent` (the stream to the scheduler), `cohort` (one process and its lanes), `attempt` (one of
//! them), `child` (the process itself), `strays` (what it leaves behind), `upload` and [`transfer`] (artifacts).

pub mod transfer;

mod agent;
mod attempt;
mod child;
mod clock;
mod cohort;
mod config;
mod error;
mod failure;
mod log;
mod meeting;
mod node;
mod offer;
mod outbox;
mod strays;
mod upload;

pub use agent::run;
pub use child::Program;
pub use config::Config;
pub use error::Error;
