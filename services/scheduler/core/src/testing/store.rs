//! A store in memory that is as strict as the real one.

use std::collections::BTreeMap;

use attune_spec::id::{CohortId, JobId};

use crate::timers::Timer;
use crate::{
    Change, Cohort, Committed, Core, Counters, Event, EventKind, Job, JobKey, RestoreError, Rules, Settings, State,
    Timestamp,
};

/// The rows, and a log.
#[derive(Debug, Clone, Default)]
pub(crate) struct Store {
    pub(crate) jobs: BTreeMap<JobKey, Job>,
    pub(crate) cohorts: BTreeMap<CohortId, Cohort>,
    pub(crate) counters: Counters,
    pub(crate) rules: Rules,
    pub(crate) log: Vec<Event>,
    pub(crate) commits: Vec<Committed>,
}

impl Store {
    /// Carries out one transaction.
    pub(crate) fn apply(&mut self, changes: &[Change]) -> Result<(), String> {
        for change in changes {
            match change {
                Change::Job(job) => self.put_job(job)?,
                Change::Cohort(cohort) => {
                    self.cohorts.insert(cohort.id, cohort.clone());
                }
                Change::CohortEnded(cohort) => {
                    let known = self.cohorts.remove(&cohort.id);
                    if known.is_none() {
                        return Err(format!("cohort {} ended and was not stored", cohort.id));
                    }
                }
                Change::Counters(counters) => {
                    if counters.next_cohort < self.counters.next_cohort
                        || counters.next_order < self.counters.next_order
                    {
                        return Err(format!("counters went back from {:?} to {counters:?}", self.counters));
                    }
                    self.counters = *counters;
                }
                Change::Policy(project, Some(policy)) => {
                    self.rules.policies.insert(project.clone(), *policy);
                }
                Change::Policy(project, None) => {
                    self.rules.policies.remove(project);
                }
                Change::Cordon(worker, true) => {
                    self.rules.cordoned.insert(worker.clone());
                }
                Change::Cordon(worker, false) => {
                    self.rules.cordoned.remove(worker);
                }
                Change::Event(event) => self.append(event)?,
                Change::Commit(commit) => {
                    let job = self.jobs.get(&commit.key).ok_or_else(|| format!("{} is not stored", commit.key))?;
                    if job.epoch != commit.epoch || job.state.is_final() {
                        return Err(format!("{commit:?} against epoch {} in {}", job.epoch, job.state));
                    }
                    self.commits.push(commit.clone());
                }
            }
        }
        Ok(())
    }

    fn put_job(&mut self, job: &Job) -> Result<(), String> {
        let key = &job.key;
        let version = self.jobs.get(key).map_or(0, |stored| stored.version);
        if job.version != version + 1 {
            return Err(format!("{key} is stored with version {version} and written with {}", job.version));
        }
        if let Some(stored) = self.jobs.get(key) {
            if stored.state.is_final() {
                return Err(format!("{key} was {} and is written again", stored.state));
            }
            if job.epoch < stored.epoch {
                return Err(format!("{key} went back from epoch {} to {}", stored.epoch, job.epoch));
            }
        }
        self.jobs.insert(key.clone(), job.clone());
        Ok(())
    }

    /// The events of a job form a chain: each begins where the one before ended.
    fn append(&mut self, event: &Event) -> Result<(), String> {
        if let EventKind::Moved { from, .. } = event.kind {
            let moved = self.log.iter().rev().filter(|earlier| earlier.key == event.key);
            let last = moved.filter_map(|earlier| state_after(&earlier.kind)).next();
            if last != Some(from) {
                return Err(format!("{event:?} does not follow {last:?}"));
            }
        }
        self.log.push(event.clone());
        Ok(())
    }

    /// The states of finished jobs, as a shell looks them up for a submission.
    pub(crate) fn finished(&self, key: &JobKey, after: impl IntoIterator<Item = JobId>) -> BTreeMap<JobId, State> {
        let state = |job: &JobId| self.jobs.get(&JobKey::new(key.project.clone(), job.clone())).map(|job| job.state);
        let pair = |job: JobId| state(&job).filter(|state| state.is_final()).map(|state| (job, state));
        after.into_iter().filter_map(pair).collect()
    }

    /// A scheduler that starts from the rows, with nothing but what it needs.
    pub(crate) fn restore(&self, settings: Settings, now: Timestamp) -> Result<Core, RestoreError> {
        let unfinished = self.jobs.values().filter(|job| !job.state.is_final()).cloned();
        let cohorts = self.cohorts.values().cloned();
        Core::restore(settings, unfinished, cohorts, self.rules.clone(), self.counters, now)
    }

    /// Whether a scheduler that started now from the rows would know what this one knows.
    pub(crate) fn check_restores(&self, core: &Core) -> Result<(), String> {
        let restored = self.restore(core.settings, core.now).map_err(|error| error.to_string())?;
        let differs = |what: &str| Err(format!("{what} restored is not {what} in memory"));
        if !core.jobs().filter(|job| !job.state.is_final()).eq(restored.jobs()) {
            return differs("what jobs are");
        }
        if !core.jobs().filter(|job| job.state.is_final()).all(|job| self.jobs.get(&job.key) == Some(job)) {
            return differs("what a finished job is");
        }
        if core.cohorts != restored.cohorts || core.counters != restored.counters {
            return differs("a cohort or counter");
        }
        if core.policies != restored.policies || core.cordoned != restored.cordoned {
            return differs("what was said of projects or workers");
        }
        if core.accounts != restored.accounts || core.live != restored.live {
            return differs("what is counted of projects");
        }
        if core.queue != restored.queue || core.dependants != restored.dependants {
            return differs("the queue");
        }
        let timers = |core: &Core| -> Vec<Timer> {
            core.timers
                .iter()
                .map(|(timer, _)| timer.clone())
                .filter(|t| !matches!(t, Timer::Worker(_) | Timer::Rest(_) | Timer::Gather(_) | Timer::Way))
                .collect()
        };
        if !core.leases.keys().eq(restored.leases.keys()) || timers(core) != timers(&restored) {
            return differs("a lease or timer");
        }
        Ok(())
    }
}

/// The state of a job after an event that has one.
pub(crate) fn state_after(kind: &EventKind) -> Option<State> {
    match kind {
        EventKind::Submitted { to, .. } | EventKind::Moved { to, .. } => Some(*to),
        EventKind::Committed { .. } | EventKind::DependencyMet { .. } | EventKind::Stage { .. } => None,
    }
}
