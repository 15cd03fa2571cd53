//! Executions of jobs, and the cohorts that they run in.

use attune_spec::id::{CohortId, Epoch, JobId, Project, WorkerId};
use serde_json::Value;

use crate::time::UtcMs;

/// One execution of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Attempt {
    /// The job's project.
    pub project: Project,
    /// The job.
    pub job: JobId,
    /// The fencing token; names the attempt within its job.
    pub epoch: Epoch,
    /// The gang that runs it.
    pub cohort: CohortId,
    /// The workers of the gang, by rank.
    pub workers: Vec<WorkerId>,
    /// How it ended, from the scheduling core's list; absent while it may be alive.
    pub outcome: Option<String>,
    /// The outcome in words.
    pub message: String,
    /// The number of the last report of it that was recorded; storing an attempt again never lowers it.
    pub reported: u64,
    /// When it was granted.
    pub started: UtcMs,
    /// When the control plane saw its end.
    pub ended: Option<UtcMs>,
}

/// A gang of child processes; what it consists of is the scheduling core's own document.
#[derive(Debug, Clone, PartialEq)]
pub struct Cohort {
    /// Its number, unique in the control plane.
    pub cohort: CohortId,
    /// The project of its jobs.
    pub project: Project,
    /// The scheduling core's state of it.
    pub core: Value,
    /// When it was granted.
    pub created: UtcMs,
    /// When its last lease ended.
    pub ended: Option<UtcMs>,
}

/// All that a scheduler needs to carry on after a restart.
#[derive(Debug, Clone, Default)]
pub struct Unfinished {
    /// Jobs that have not ended, by project and id.
    pub jobs: Vec<crate::job::Job>,
    /// Cohorts that have not ended, by number.
    pub cohorts: Vec<Cohort>,
    /// Attempts of unfinished jobs that have not ended.
    pub attempts: Vec<Attempt>,
    /// Counters by name, such as the next cohort number.
    pub counters: std::collections::BTreeMap<String, u64>,
    /// What was said of projects and workers: what kind of thing, of whom, and what.
    pub rules: Vec<(String, String, serde_json::Value)>,
}
