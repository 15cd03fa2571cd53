//! The log of what happened: per project, numbered from 1 without gaps, appended in the transaction that it reports.

use attune_spec::id::{Epoch, JobId, Project, Seq};
use serde_json::Value;

use crate::time::UtcMs;

/// An event to be appended; the store gives it its number.
#[derive(Debug, Clone, PartialEq)]
pub struct NewEvent {
    /// Its project.
    pub project: Project,
    /// The job it is about, if it is about one.
    pub job: Option<JobId>,
    /// The attempt it is about.
    pub epoch: Option<Epoch>,
    /// What happened, as `noun.verb`: `job.state`, `artifact.committed`, `tag.moved`.
    pub kind: String,
    /// The details.
    pub data: Value,
    /// When.
    pub time: UtcMs,
}

/// A logged event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its place in the project's log.
    pub seq: Seq,
    /// What happened.
    pub event: NewEvent,
}
