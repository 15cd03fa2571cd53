//! What people say of projects and workers, and what is counted of projects to hold to it.

use attune_spec::id::{CohortId, Project, WorkerId};

use crate::project::{Policy, Usage};
use crate::step::Draft;
use crate::{Answer, Change, Cohort, Core, JobKey, Memory, Refusal, Request};

impl Core {
    pub(super) fn set_policy(&mut self, project: Project, policy: Option<Policy>, draft: &mut Draft) -> Answer {
        let before = match policy {
            Some(policy) => self.policies.insert(project.clone(), policy),
            None => self.policies.remove(&project),
        };
        if before == policy {
            return Answer::Repeated;
        }
        draft.rules.push(Change::Policy(project, policy));
        draft.has_room = true;
        Answer::Done
    }

    pub(super) fn cordon(
        &mut self,
        worker: &WorkerId,
        on: bool,
        drains: bool,
        draft: &mut Draft,
    ) -> Result<Answer, Refusal> {
        // One that is away can be let in again, and not be told off: its name may be a wrong one.
        if !self.workers.contains_key(worker) && !self.cordoned.contains(worker) {
            return Err(Refusal::UnknownWorker { worker: worker.clone() });
        }
        let is_new = if on { self.cordoned.insert(worker.clone()) } else { self.cordoned.remove(worker) };
        if is_new {
            draft.rules.push(Change::Cordon(worker.clone(), on));
            draft.has_room = true;
        }
        let n_asked = if on && drains { self.preempt_all(worker, draft) } else { 0 };
        Ok(if is_new || n_asked > 0 { Answer::Done } else { Answer::Repeated })
    }

    /// Whether a project may have one more job, and such a one.
    pub(super) fn within_quota(&self, key: &JobKey, request: &Request) -> Result<(), Refusal> {
        let policy = self.policy(&key.project);
        // A stage is part of a job that is there already.
        if let (Some(max), None) = (policy.max_queued, &request.parent)
            && self.usage(&key.project).1 >= max
        {
            return Err(Refusal::QueueFull { project: key.project.clone(), max });
        }
        if request.is_staged {
            return Ok(());
        }
        let resources = &request.resources;
        let asked = resources.n_total();
        let mut beyond = None;
        for &device in resources.device.kinds() {
            match policy.max_of(device).filter(|max| asked > *max) {
                Some(max) => beyond = Some(Refusal::BeyondQuota { key: key.clone(), device, asked, max }),
                None => return Ok(()),
            }
        }
        beyond.map_or(Ok(()), Err)
    }

    /// What a cohort occupies, and for whom.
    pub(crate) fn usage_of(&self, cohort: &Cohort) -> Option<(Project, Usage)> {
        let (first, share) = (cohort.attempts.first()?, cohort.shares.first()?);
        let jobs = cohort.attempts.iter().filter_map(|attempt| self.jobs.get(&attempt.key));
        let memory = jobs.map(|job| job.request.memory).fold(Memory::default(), Memory::with);
        Some((first.key.project.clone(), Usage::of_gang(share.device, share.n_devices, cohort.shares.len(), memory)))
    }

    /// Adds what a cohort occupies to its project's account.
    pub(crate) fn count_cohort(&mut self, id: CohortId) {
        if let Some((project, usage)) = self.cohorts.get(&id).and_then(|cohort| self.usage_of(cohort)) {
            self.accounts.change(&project, |account| account.usage.add(&usage));
        }
    }

    /// Takes it away again.
    pub(crate) fn uncount_cohort(&mut self, id: CohortId) {
        if let Some((project, usage)) = self.cohorts.get(&id).and_then(|cohort| self.usage_of(cohort)) {
            self.accounts.change(&project, |account| account.usage.remove(&usage));
        }
    }
}
