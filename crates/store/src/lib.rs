//! What is the state of the control plane, and what has happened so far?
//!
//! The one invariant: a change is one transaction. It compares what it was decided on (a job's version, an attempt's
//! epoch) with what is stored, writes, and appends its events with the next numbers of their project's log; or it
//! leaves no trace.
//!
//! Deliberately absent: clocks (times are arguments), decisions (the scheduling core takes them; its own state passes
//! through here as documents), the bytes of artifacts, and any type of the database library. The statements keep to what
//! SQLite and PostgreSQL share, `$1` placeholders included; one suite of tests runs over both.

pub mod artifact;
pub mod attempt;
pub mod audit;
pub mod change;
pub mod database;
pub mod error;
pub mod event;
pub mod job;
pub mod metric;
pub mod time;
pub mod token;

mod sql;
mod words;

pub use database::Database;
pub use error::{Error, Result};
pub use sql::{Announced, HeldJob, Moved, Store};
pub use time::UtcMs;
