//! A change: writes that happen together or not at all.

use attune_spec::id::{Digest, Epoch, JobId, Project, Tag};
use serde_json::Value;

use crate::artifact::NewArtifact;
use crate::attempt::{Attempt, Cohort};
use crate::audit::Record;
use crate::event::{Event, NewEvent};
use crate::job::JobChange;
use crate::metric::NewPoint;
use crate::time::UtcMs;

/// One write of a change. They are carried out in order, in one transaction.
#[derive(Debug, Clone)]
pub enum Write {
    /// A transition of a job, compared with its stored version; appends its event.
    Job(Box<JobChange>),
    /// The latest report of an attempt, under its epoch. No event of its own.
    Progress {
        /// The job's project.
        project: Project,
        /// The job.
        job: JobId,
        /// The attempt's epoch.
        epoch: Epoch,
        /// The report.
        progress: Value,
        /// When.
        now: UtcMs,
    },
    /// Stores or replaces an attempt.
    Attempt(Box<Attempt>),
    /// Notes that the reports of an attempt up to a number are recorded; a smaller number changes nothing.
    Reported {
        /// The job's project.
        project: Project,
        /// The job.
        job: JobId,
        /// The attempt's epoch.
        epoch: Epoch,
        /// The number of the report.
        number: u64,
    },
    /// Stores or replaces a cohort.
    Cohort(Box<Cohort>),
    /// Appends an event.
    Event(NewEvent),
    /// Appends values under an attempt's epoch; see [`crate::metric`] for what a retried attempt replaces.
    Metrics {
        /// The job's project.
        project: Project,
        /// The job.
        job: JobId,
        /// The attempt's epoch.
        epoch: Epoch,
        /// The values.
        points: Vec<NewPoint>,
    },
    /// Makes an artifact visible, moves its tags, and appends `artifact.committed` (once per artifact and attempt) and
    /// one `tag.moved` per tag that moved.
    Artifact(Box<NewArtifact>),
    /// Moves a tag, and appends `tag.moved` unless it is there already.
    Tag {
        /// The tag's project.
        project: Project,
        /// The tag.
        tag: Tag,
        /// The artifact it names from now on.
        digest: Digest,
        /// Move it only from this artifact.
        expected: Option<Digest>,
        /// The job that moves it, if a job does.
        job: Option<JobId>,
        /// When.
        now: UtcMs,
    },
    /// Says something of a project or a worker, in place of what was said before; nothing takes it back.
    Rule {
        /// What kind of thing is said.
        kind: &'static str,
        /// Of whom.
        name: String,
        /// What.
        value: Option<Value>,
    },
    /// Appends the record of the call that asked for the change.
    Audit(Box<Record>),
    /// Raises a counter; a smaller value than the stored one is a conflict.
    Counter {
        /// Its name.
        name: &'static str,
        /// Its value.
        value: u64,
    },
}

/// What a change did.
#[derive(Debug, Clone, Default)]
pub struct Applied {
    /// The events that it appended, in order.
    pub events: Vec<Event>,
}
