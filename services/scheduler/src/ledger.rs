//! From the core's changes to the store's writes: rows, events, attempts, tags, in one transaction.
//!
//! Beside the core's rows the ledger keeps what the core does not care for: the row of the running attempt, the roles of
//! results, how often a job failed in all. All of it is stored with each change and comes back with a restart.

use std::collections::BTreeMap;

use attune_proto::v1;
use attune_scheduler_core::{Cause, Change, Cohort, Commit, Committed, Event, EventKind, Job, JobKey, Reason, State};
use attune_spec::id::{Digest, IdError, JobId, Name, Project, Tag};
use attune_spec::job::JobSpec;
use attune_store::UtcMs;
use attune_store::artifact::NewArtifact;
use attune_store::attempt;
use attune_store::change::Write;
use attune_store::event::NewEvent;
use attune_store::job::{JobChange, NewJob};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::clock::Moment;
use crate::error::Error;
use crate::{log, rows};

/// What comes with an input and is none of the core's business; it is stored if the input takes effect.
#[derive(Debug, Default)]
pub(crate) struct Extra {
    /// The job to be stored for the first time; its state, version and core document are filled in here.
    pub(crate) new_job: Option<Box<NewJob>>,
    /// The artifact of a commit.
    pub(crate) artifact: Option<Box<NewArtifact>>,
    /// What that artifact is to the job.
    pub(crate) role: String,
    /// How the attempt failed, as its worker says.
    pub(crate) failure: Option<v1::Failure>,
    /// Tags that move when the job succeeds.
    pub(crate) tags: Vec<(Tag, Digest)>,
    /// Results that a job of stages takes over from one of them when it succeeds.
    pub(crate) outputs: Vec<Output>,
    /// What else is stored.
    pub(crate) writes: Vec<Write>,
}

/// A result that an attempt has committed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Output {
    /// What it is to the job.
    pub(crate) role: String,
    /// The artifact.
    pub(crate) digest: Digest,
}

/// What the ledger keeps of a job.
#[derive(Debug, Clone, Default, PartialEq)]
struct Entry {
    attempt: Option<attempt::Attempt>,
    outputs: Vec<Output>,
    failed_attempts: u32,
}

/// One transaction.
#[derive(Debug, Default)]
pub(crate) struct Transaction {
    /// The job that is stored for the first time in it.
    pub(crate) new_job: Option<Box<NewJob>>,
    /// The writes, in order.
    pub(crate) writes: Vec<Write>,
    /// The jobs that it is about.
    pub(crate) jobs: Vec<JobKey>,
    /// The jobs whose checkpoints may have become too many.
    pub(crate) to_prune: Vec<JobKey>,
    /// The jobs that become final in it.
    pub(crate) ended: Vec<JobKey>,
}

impl Transaction {
    /// Whether there is nothing to store.
    pub(crate) fn is_empty(&self) -> bool {
        self.new_job.is_none() && self.writes.is_empty()
    }
}

/// What the shell keeps beside the core.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Ledger {
    entries: BTreeMap<JobKey, Entry>,
}

impl Ledger {
    /// The ledger of the stored rows.
    pub(crate) fn restore(unfinished: &attempt::Unfinished) -> Result<Self, Error> {
        let mut entries: BTreeMap<JobKey, Entry> = BTreeMap::new();
        for row in &unfinished.jobs {
            let outputs = outputs(&row.outputs);
            let failed_attempts = rows::JobDocument::read(&row.core)?.failed_attempts;
            let key = JobKey::new(row.project.clone(), row.job.clone());
            entries.insert(key, Entry { attempt: None, outputs, failed_attempts });
        }
        for attempt in &unfinished.attempts {
            let key = JobKey::new(attempt.project.clone(), attempt.job.clone());
            entries.entry(key).or_default().attempt = Some(attempt.clone());
        }
        Ok(Self { entries })
    }

    /// What is kept of a job, for comparison.
    #[cfg(test)]
    pub(crate) fn entry(&self, key: &JobKey) -> Option<impl PartialEq + std::fmt::Debug + use<>> {
        self.entries.get(key).cloned()
    }

    /// Forgets a finished job.
    pub(crate) fn forget(&mut self, key: &JobKey) {
        self.entries.remove(key);
    }

    /// The results that the newest attempt has committed, in the order of their commits.
    pub(crate) fn outputs(&self, key: &JobKey) -> &[Output] {
        self.entries.get(key).map_or(&[], |entry| &entry.outputs)
    }

    /// Makes the transaction of a step that took effect.
    pub(crate) fn record(&mut self, changes: &[Change], extra: Extra, now: Moment) -> Transaction {
        let mut out = Transaction::default();
        let mut extra = extra;
        for change in changes {
            match change {
                Change::Counters(counters) => {
                    out.writes.push(Write::Counter { name: NEXT_COHORT, value: counters.next_cohort.0 });
                    out.writes.push(Write::Counter { name: NEXT_ORDER, value: counters.next_order });
                }
                Change::Job(job) => self.job(job, changes, &mut extra, now, &mut out),
                Change::Cohort(cohort) => out.writes.push(write_cohort(cohort, now.date, None)),
                Change::CohortEnded(cohort) => out.writes.push(write_cohort(cohort, now.date, Some(now.date))),
                Change::Commit(Committed { commit, key, .. }) => {
                    out.writes.extend(extra.artifact.take().map(Write::Artifact));
                    if matches!(commit, Commit::Checkpoint(_)) {
                        out.to_prune.push(key.clone());
                    }
                }
                Change::Policy(project, policy) => out.writes.push(rows::write_policy(project, policy.as_ref())),
                Change::Cordon(worker, on) => out.writes.push(rows::write_cordon(worker, *on)),
                // Written with the row of its job.
                Change::Event(_) => {}
            }
        }
        out.writes.append(&mut extra.writes);
        out
    }

    fn job(&mut self, job: &Job, changes: &[Change], extra: &mut Extra, moment: Moment, out: &mut Transaction) {
        let now = moment.date;
        let entry = self.entries.entry(job.key.clone()).or_default();
        let about = |change: &&Change| matches!(change, Change::Event(event) if event.key == job.key);
        let mut events: Vec<NewEvent> = Vec::new();
        let mut after = Vec::new();
        let (mut failure, mut message, mut resets_outputs) = (None, None, false);
        let mut first = None;
        for change in changes.iter().filter(about) {
            let Change::Event(event) = change else { continue };
            let mut push = |kind: &str, data: Value| events.push(new_event(event, kind, data, now));
            match &event.kind {
                EventKind::Submitted { to, reason } => first = Some((*to, *reason)),
                EventKind::Stage { stage, state } => {
                    push(log::STAGE, log::stage(stage_name(&job.key, stage), stage, *state));
                }
                EventKind::DependencyMet { dependency } => {
                    push(log::DEPENDENCY_MET, json!({"dependency": dependency}));
                }
                EventKind::Committed { commit: Commit::Checkpoint(step), digest } => {
                    push(log::CHECKPOINT, log::checkpoint(*digest, *step));
                }
                EventKind::Committed { commit: Commit::Output, digest } => {
                    entry.outputs.push(Output { role: extra.role.clone(), digest: *digest });
                    push(log::OUTPUT, log::output(&extra.role, &digest.to_string()));
                }
                EventKind::Moved { from, to, reason } => {
                    let failed = reason.cause().filter(|_| from.is_live());
                    let text = match failed {
                        Some(cause) => {
                            // A refused offer is nobody's failure.
                            let is_failure = cause != Cause::OfferRefused;
                            entry.failed_attempts = entry.failed_attempts.saturating_add(u32::from(is_failure));
                            // What was said of a refused offer is nothing to say of an attempt that had begun.
                            let fits = |told: &v1::Failure| {
                                told.cause() != v1::FailureCause::OfferRefused || cause == Cause::OfferRefused
                            };
                            let told = extra.failure.take().filter(fits).unwrap_or_else(|| log::failure_of(cause));
                            let data = log::failure(&told);
                            push(log::ATTEMPT_FAILED, data.clone());
                            failure = Some(data);
                            words(*reason, cause, &told.message)
                        }
                        None => {
                            let (told, found) = ended_by(job, *reason, changes, extra);
                            failure = found;
                            told
                        }
                    };
                    if from.is_live()
                        && !to.is_live()
                        && let Some(mut attempt) = entry.attempt.take()
                    {
                        attempt.outcome = Some(reason.to_string());
                        attempt.message.clone_from(&text);
                        attempt.ended = Some(moment.steady);
                        after.push(Write::Attempt(Box::new(attempt)));
                    }
                    let mut worker = None;
                    if *to == State::Starting {
                        let attempt = new_attempt(event, changes, moment.steady);
                        worker = attempt.workers.first().cloned();
                        entry.attempt = Some(attempt.clone());
                        entry.outputs.clear();
                        resets_outputs = true;
                        after.push(Write::Attempt(Box::new(attempt)));
                    }
                    push(log::STATE, log::state_change(*from, *to, *reason, &text, worker.as_ref()));
                    message = Some(text);
                    if to.is_final() {
                        out.ended.push(job.key.clone());
                        out.to_prune.push(job.key.clone());
                    }
                    if *to == State::Succeeded {
                        if job.request.is_staged {
                            entry.outputs = std::mem::take(&mut extra.outputs);
                        }
                        let tag = |(tag, digest): (Tag, Digest)| Write::Tag {
                            project: job.key.project.clone(),
                            tag,
                            digest,
                            expected: None,
                            job: Some(job.key.job.clone()),
                            now,
                        };
                        after.extend(std::mem::take(&mut extra.tags).into_iter().map(tag));
                    }
                }
            }
        }
        let document = rows::job_document(job, entry.failed_attempts);
        // The job that is new; others may change with it.
        if let Some((to, reason)) = first
            && let Some(mut new) = extra.new_job.take()
        {
            new.state = rows::state(to).0;
            new.reason = reason.to_string();
            new.message = reason.words();
            new.core = document.clone();
            // Further events of the same step need the row first: it comes with the version before theirs.
            new.version = if events.is_empty() { job.version } else { job.version - 1 };
            out.new_job = Some(new);
        }
        if let Some(last) = events.pop() {
            out.writes.extend(events.into_iter().map(Write::Event));
            let (state, stop) = rows::state(job.state);
            let outputs_changed = resets_outputs || !entry.outputs.is_empty();
            out.writes.push(Write::Job(Box::new(JobChange {
                project: job.key.project.clone(),
                job: job.key.job.clone(),
                version: job.version - 1,
                state,
                stop,
                reason: job.reason.to_string(),
                message: message.unwrap_or_else(|| job.reason.words()),
                epoch: job.epoch,
                attempts: u32::try_from(job.epoch.0).unwrap_or(u32::MAX),
                core: document,
                failure,
                outputs: outputs_changed.then(|| json!(entry.outputs)),
                event: last,
                now,
            })));
        }
        out.writes.append(&mut after);
        out.jobs.push(job.key.clone());
    }
}

/// The counter of cohorts.
pub(crate) const NEXT_COHORT: &str = "next_cohort";
/// The counter of places in the queue.
pub(crate) const NEXT_ORDER: &str = "next_order";

/// The results in a stored row.
pub(crate) fn outputs(stored: &Value) -> Vec<Output> {
    Vec::deserialize(stored).unwrap_or_default()
}

/// A failed job's reason in words, with what the worker said in place of the general words for the cause.
fn words(reason: Reason, cause: Cause, told: &str) -> String {
    if told.is_empty() { reason.words() } else { reason.words().replace(&cause.words(), told) }
}

/// The reason of a change that no attempt is behind, in words; and what is told of the failure behind it, if one is.
fn ended_by(job: &Job, reason: Reason, changes: &[Change], extra: &Extra) -> (String, Option<Value>) {
    let told = |cause: Cause| extra.failure.clone().unwrap_or_else(|| log::failure_of(cause));
    match reason {
        Reason::StageFailed => {
            let of_job = |stage: &&Job| stage.parent().as_ref() == Some(&job.key);
            let stages = changes.iter().filter_map(|change| match change {
                Change::Job(stage) => Some(&**stage).filter(of_job),
                _ => None,
            });
            let Some(stage) = stages.into_iter().find(|stage| matches!(stage.state, State::Failed | State::Cancelled))
            else {
                return (reason.words(), None);
            };
            let (name, failure) = (stage_name(&job.key, &stage.key.job), stage.reason.cause().map(told));
            let why = match (&failure, stage.reason.cause()) {
                (Some(failure), Some(cause)) => words(stage.reason, cause, &failure.message),
                _ => stage.reason.words(),
            };
            let what = if stage.state == State::Cancelled { "was cancelled" } else { "failed" };
            (format!("stage {name} {what}: {why}"), failure.as_ref().map(log::failure))
        }
        // A stage could not be made.
        Reason::Failure(cause) => {
            let failure = told(cause);
            (words(reason, cause, &failure.message), Some(log::failure(&failure)))
        }
        _ => (reason.words(), None),
    }
}

/// A stage's name in its job's id.
fn stage_name<'a>(parent: &JobKey, stage: &'a JobId) -> &'a str {
    let own = stage.as_str().strip_prefix(parent.job.as_str()).and_then(|rest| rest.strip_prefix('.'));
    own.unwrap_or(stage.as_str())
}

/// The id of a stage: the same whenever it is made.
pub(crate) fn stage_id(parent: &JobId, stage: &Name) -> Result<JobId, IdError> {
    JobId::new(format!("{parent}.{stage}"))
}

/// Which tags move to which results when the job succeeds.
pub(crate) fn tags(row: &attune_store::job::Job, outputs: &[Output]) -> Vec<(Tag, Digest)> {
    let Ok(spec) = serde_json::from_value::<JobSpec>(row.resolved.clone()) else { return Vec::new() };
    let of_role = |role: &str| outputs.iter().find(|output| output.role == role);
    let main = outputs.iter().find(|output| ![MERGED, REPORT].contains(&output.role.as_str()));
    let pairs = [(spec.outputs.tag, main), (spec.outputs.merged_tag, of_role(MERGED))];
    pairs.into_iter().filter_map(|(tag, output)| Some((tag?, output?.digest))).collect()
}

/// The role of a model with the adapter merged in.
const MERGED: &str = "merged";
/// The role of a report, which gets no tag.
const REPORT: &str = "report";

fn new_event(event: &Event, kind: &str, data: Value, now: UtcMs) -> NewEvent {
    NewEvent {
        project: event.key.project.clone(),
        job: Some(event.key.job.clone()),
        epoch: (event.epoch.0 > 0).then_some(event.epoch),
        kind: kind.to_owned(),
        data,
        time: now,
    }
}

/// The row of the attempt that begins with this event; its cohort is among the changes of the same step.
fn new_attempt(event: &Event, changes: &[Change], now: UtcMs) -> attempt::Attempt {
    let runs_it = |cohort: &&Cohort| cohort.attempts.iter().any(|a| a.key == event.key && a.epoch == event.epoch);
    let cohort = changes.iter().find_map(|change| match change {
        Change::Cohort(cohort) | Change::CohortEnded(cohort) => Some(cohort).filter(runs_it),
        Change::Job(_)
        | Change::Counters(_)
        | Change::Event(_)
        | Change::Commit(_)
        | Change::Policy(..)
        | Change::Cordon(..) => None,
    });
    attempt::Attempt {
        project: event.key.project.clone(),
        job: event.key.job.clone(),
        epoch: event.epoch,
        cohort: cohort.map(|cohort| cohort.id).unwrap_or_default(),
        workers: cohort.into_iter().flat_map(|c| c.shares.iter().map(|share| share.worker.clone())).collect(),
        outcome: None,
        message: String::new(),
        reported: 0,
        started: now,
        ended: None,
    }
}

fn write_cohort(cohort: &Cohort, now: UtcMs, ended: Option<UtcMs>) -> Write {
    Write::Cohort(Box::new(attempt::Cohort {
        cohort: cohort.id,
        project: cohort.attempts.first().map_or_else(Project::default, |attempt| attempt.key.project.clone()),
        core: rows::cohort_document(cohort),
        created: now,
        ended,
    }))
}
