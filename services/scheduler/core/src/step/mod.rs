//! What each input does: one file per idea. All of them go through [`Core::move_to`], which keeps every index.

mod attempt;
mod commit;
mod expiry;
mod fleet;
mod grant;
mod offer;
mod preempt;
mod request;
mod rules;
mod stages;

use std::collections::BTreeMap;

use attune_spec::id::{CohortId, Epoch, WorkerId};

use crate::plant::Plant;
use crate::timers::Timer;
use crate::{
    Action, Answer, Attempt, Change, Cohort, Committed, Core, Counters, Effects, Event, EventKind, Input, Job, JobKey,
    Limit, Reason, Refusal, State, invariants,
};

/// What a step has done so far.
pub(crate) struct Draft {
    counters: Counters,
    /// The jobs that were touched, as they were before; nothing for a new one.
    before: BTreeMap<JobKey, Option<Job>>,
    /// The cohorts that were touched; the last form of those that are over.
    cohorts: BTreeMap<CohortId, Option<Cohort>>,
    /// What was said of projects and workers.
    rules: Vec<Change>,
    log: Vec<Event>,
    committed: Option<Committed>,
    actions: Vec<Action>,
    /// Jobs that became final.
    ended: Vec<JobKey>,
    has_room: bool,
}

impl Draft {
    pub(crate) fn new(counters: Counters) -> Self {
        Self {
            counters,
            before: BTreeMap::new(),
            cohorts: BTreeMap::new(),
            rules: Vec::new(),
            log: Vec::new(),
            committed: None,
            actions: Vec::new(),
            ended: Vec::new(),
            has_room: false,
        }
    }

    /// Whether a queued job may find a gang now that found none before.
    pub(crate) fn has_room(&self) -> bool {
        self.has_room
    }
}

impl Core {
    pub(crate) fn dispatch(&mut self, input: Input, draft: &mut Draft) -> Result<Answer, Refusal> {
        match input {
            Input::Submit { key, request, finished } => self.submit(key, request, &finished, draft),
            Input::Cancel { key } => self.cancel(&key, Reason::CancelAsked, draft),
            Input::Expire { key, limit: Limit::RunTime } => self.cancel(&key, Reason::TimeLimit, draft),
            Input::Expire { key, limit: Limit::Deadline } => self.cancel(&key, Reason::DeadlinePassed, draft),
            Input::SetPolicy { project, policy } => Ok(self.set_policy(project, policy, draft)),
            Input::Cordon { worker, on, drains } => self.cordon(&worker, on, drains, draft),
            Input::Pause { key } => self.pause(&key, draft),
            Input::Resume { key } => self.resume(&key, draft),
            Input::Retry { key } => self.retry(&key, draft),
            Input::Preempt { key } => self.preempt(&key, draft),
            Input::Forget { key } => self.forget(&key),
            Input::Looked { key, version, look } => self.looked(&key, version, look, draft),
            Input::Register { worker, session, devices, memory, labels, process, outdated, draining, holding } => {
                let registration =
                    fleet::Registration { session, devices, memory, labels, process, outdated, draining, holding };
                self.register(worker, registration, draft)
            }
            Input::OfferAccepted { worker, cohort } => self.offer_accepted(&worker, cohort),
            Input::OfferRefused { worker, cohort, why } => self.offer_refused(&worker, cohort, why, draft),
            Input::Heartbeat { worker, session, beat, holding } => {
                self.heartbeat(&worker, session, beat, &holding, draft)
            }
            Input::Drain { worker } => self.drain(&worker, draft),
            Input::Disconnect { worker, session } => self.disconnect(&worker, session, draft),
            Input::CohortGone { worker, session, cohort } => self.cohort_gone(&worker, session, cohort, draft),
            Input::CohortCrashed { worker, cohort, cause } => self.cohort_crashed(&worker, cohort, cause, draft),
            Input::AttemptRunning { key, epoch, worker } => self.attempt_running(&key, epoch, &worker, draft),
            Input::AttemptFinished { key, epoch, worker, outcome } => {
                self.attempt_finished(&key, epoch, &worker, outcome, draft)
            }
            Input::Commit { key, epoch, worker, commit, digest } => {
                self.commit(Committed { key, epoch, worker, commit, digest }, draft)
            }
            Input::Tick => Ok(self.tick(draft)),
        }
    }

    /// Makes rows, events and actions of a draft.
    pub(crate) fn finish(&mut self, draft: Draft, answer: Answer) -> Effects {
        let Draft { counters, before, cohorts, rules, log, committed, actions, ended: _, has_room: _ } = draft;
        let mut changes = rules;
        if self.counters != counters {
            changes.push(Change::Counters(self.counters));
        }
        for (key, before) in before {
            let job = self.jobs.get_mut(&key).expect("a touched job exists");
            if before.as_ref() == Some(&*job) {
                continue;
            }
            job.version += 1;
            changes.push(Change::Job(Box::new(job.clone())));
            let checked = invariants::job_is_whole(self, &key).and_then(|()| match &before {
                Some(before) => invariants::terminal_is_final(before, &self.jobs[&key]),
                None => Ok(()),
            });
            assert!(checked.is_ok() || self.is_planted(), "{checked:?}");
        }
        for (id, last) in cohorts {
            match (self.cohorts.get(&id), last) {
                (Some(_), _) if self.has(Plant::CohortUnstored) => {}
                (Some(cohort), _) => changes.push(Change::Cohort(cohort.clone())),
                (None, Some(last)) => changes.push(Change::CohortEnded(last)),
                (None, None) => {}
            }
        }
        changes.extend(committed.map(Change::Commit));
        changes.extend(log.into_iter().map(Change::Event));
        Effects { answer, changes, actions, wake: self.wake() }
    }

    /// With a planted defect it is for the observers, not for our own assertions, to find it.
    fn is_planted(&self) -> bool {
        #[cfg(test)]
        return self.plant.is_some();
        #[cfg(not(test))]
        false
    }

    /// A job's row, to be changed.
    pub(crate) fn edit(&mut self, key: &JobKey, draft: &mut Draft) -> &mut Job {
        let job = self.jobs.get_mut(key).expect("only jobs that exist are edited");
        if !draft.before.contains_key(key) {
            draft.before.insert(key.clone(), Some(job.clone()));
        }
        job
    }

    fn known(&self, key: &JobKey) -> Result<&Job, Refusal> {
        self.jobs.get(key).ok_or_else(|| Refusal::UnknownJob { key: key.clone() })
    }

    /// Moves a job along one arrow: the only place where a state changes.
    fn move_to(&mut self, key: &JobKey, to: State, reason: Reason, draft: &mut Draft) {
        let from = self.jobs[key].state;
        assert!(from.may_become(to), "legal_arrow: {key} cannot become {to} from {from}");
        assert!(to.allows(reason), "legal_reason: {key} cannot be {to} because of {reason}");
        self.leave(key, from, to, draft);
        let job = self.edit(key, draft);
        let counted = job.counts_as_queued();
        (job.state, job.reason) = (to, reason);
        let (epoch, counts) = (job.epoch, job.counts_as_queued());
        if counted != counts {
            self.accounts.change(&key.project, |account| {
                account.n_queued = account.n_queued + u32::from(counts) - u32::from(counted);
            });
        }
        self.enter(key, from, to, draft);
        draft.log.push(Event { key: key.clone(), epoch, kind: EventKind::Moved { from, to, reason } });
    }

    /// Takes a job out of the indexes of the state that it leaves.
    fn leave(&mut self, key: &JobKey, from: State, to: State, draft: &mut Draft) {
        match from {
            State::Waiting => {
                self.due.remove(key);
                for dependency in self.jobs[key].awaited() {
                    self.await_no_more(key, &dependency);
                }
            }
            State::Queued => {
                self.queue.remove(&self.jobs[key]);
                self.timers.clear(&Timer::Gather(key.clone()));
                // It may have kept workers from the jobs behind it.
                draft.has_room |= to == State::Cancelled && !self.has(Plant::KeptForgotten);
            }
            State::Backoff => self.timers.clear(&Timer::Backoff(key.clone())),
            State::Stopping(_) if !matches!(to, State::Stopping(_)) => self.timers.clear(&Timer::Stop(key.clone())),
            State::Stopping(_)
            | State::Starting
            | State::Running
            | State::Paused
            | State::Succeeded
            | State::Failed
            | State::Cancelled => {}
        }
        if from.is_live() && !to.is_live() {
            self.leave_cohort(key, draft);
        }
    }

    /// Puts a job into the indexes of its new state.
    fn enter(&mut self, key: &JobKey, from: State, to: State, draft: &mut Draft) {
        let job = &self.jobs[key];
        match to {
            State::Queued => {
                self.queue.insert(job);
                self.gather(&job.clone());
                draft.has_room = true;
            }
            State::Backoff if !self.has(Plant::BackoffForgotten) => {
                let until = self.now.plus(self.wait_after_failure(job));
                self.timers.set(Timer::Backoff(key.clone()), until);
            }
            // A stronger wish does not give more time.
            State::Stopping(_) if !matches!(from, State::Stopping(_)) && !self.has(Plant::StopForgotten) => {
                self.timers.set(Timer::Stop(key.clone()), self.now.plus(self.settings.stop_limit));
            }
            State::Succeeded | State::Failed | State::Cancelled => draft.ended.push(key.clone()),
            State::Backoff | State::Stopping(_) | State::Waiting | State::Starting | State::Running | State::Paused => {
            }
        }
    }

    /// Lets a queued job that may share a process wait for others. A restarted scheduler waits no more.
    fn gather(&mut self, job: &Job) {
        if job.shares().is_some() && self.settings.max_lanes.get() > 1 {
            self.timers.set(Timer::Gather(job.key.clone()), self.now.plus(self.settings.lane_wait));
        }
    }

    /// Takes an attempt out of its cohort; the last one ends it.
    fn leave_cohort(&mut self, key: &JobKey, draft: &mut Draft) {
        // It has less now: that may let others of its project go, or change whose turn it is, before the devices are free.
        let limited = self.policies.contains_key(&key.project) || self.queue.lines().nth(1).is_some();
        draft.has_room |= limited;
        let job = self.edit(key, draft);
        let (attempt, priority) = (Attempt { key: key.clone(), epoch: job.epoch }, job.request.priority);
        let id = job.cohort.take().expect("one_live_epoch: a live job has a cohort");
        self.uncount_cohort(id);
        if let Some(cohorts) = self.live.get_mut(&priority) {
            if let Some(count) = cohorts.get_mut(&id) {
                *count -= 1;
                if *count == 0 {
                    cohorts.remove(&id);
                }
            }
            if cohorts.is_empty() {
                self.live.remove(&priority);
            }
        }
        let cohort = self.cohorts.get_mut(&id).expect("one_live_epoch: the cohort of a live job exists");
        let last = cohort.clone();
        cohort.attempts.retain(|member| member.key != *key);
        let workers: Vec<WorkerId> = cohort.shares.iter().map(|share| share.worker.clone()).collect();
        let is_over = cohort.attempts.is_empty();
        draft.cohorts.insert(id, is_over.then_some(last));
        if is_over {
            self.cohorts.remove(&id);
            self.close_leases(id, workers.iter().cloned());
        } else {
            self.count_cohort(id);
        }
        for worker in workers {
            let Some(known) = self.workers.get_mut(&worker) else { continue };
            if !is_over {
                draft.actions.push(Action::Drop { worker, cohort: id, attempt: attempt.clone() });
                continue;
            }
            if let Some(occupied) = known.occupied.get_mut(&id) {
                occupied.releasing = true;
            }
            draft.actions.push(Action::Release { worker, cohort: id });
        }
    }

    /// Lets the jobs go on, or fail, that waited for jobs that ended in this step.
    pub(crate) fn follow_dependencies(&mut self, draft: &mut Draft) {
        while let Some(ended) = draft.ended.pop() {
            if self.has(Plant::DependantsForgotten) {
                continue;
            }
            let has_succeeded = self.jobs[&ended].state == State::Succeeded;
            let parent = self.jobs[&ended].parent();
            if !has_succeeded {
                self.end_stages(&ended, draft);
            }
            for key in self.dependants.get(&ended).cloned().unwrap_or_default() {
                if Some(&key) == parent.as_ref() {
                    self.stage_ended(&key, &ended, draft);
                    continue;
                }
                if !has_succeeded {
                    self.move_to(&key, State::Failed, Reason::DependencyFailed, draft);
                    continue;
                }
                self.await_no_more(&key, &ended);
                let job = self.edit(&key, draft);
                job.pending.remove(&ended.job);
                if job.pending.is_empty() {
                    self.move_to(&key, State::Queued, Reason::DependenciesMet, draft);
                } else {
                    let (epoch, dependency) = (job.epoch, ended.job.clone());
                    draft.log.push(Event { key, epoch, kind: EventKind::DependencyMet { dependency } });
                }
            }
        }
    }

    fn await_no_more(&mut self, key: &JobKey, dependency: &JobKey) {
        if let Some(dependants) = self.dependants.get_mut(dependency) {
            dependants.remove(key);
            if dependants.is_empty() {
                self.dependants.remove(dependency);
            }
        }
    }

    /// The job of an attempt for which a worker speaks, live or over; an older or unheard-of epoch is refused.
    fn spoken_for(&self, key: &JobKey, epoch: Epoch, worker: &WorkerId) -> Result<&Job, Refusal> {
        let job = self.known(key)?;
        let (key, newest) = (key.clone(), job.epoch);
        if self.has(Plant::EpochUnchecked) {
            return Ok(job);
        }
        if epoch < newest {
            return Err(Refusal::StaleEpoch { key, epoch, newest });
        }
        if epoch > newest || newest == Epoch(0) {
            return Err(Refusal::UnknownEpoch { key, epoch, newest });
        }
        if !job.workers.contains(worker) && !self.has(Plant::WorkerUnchecked) {
            let what = format!("epoch {epoch} of job {key}");
            return Err(Refusal::NotItsLease { worker: worker.clone(), what });
        }
        Ok(job)
    }

    /// The cohort of a live attempt for which a worker speaks.
    fn live_cohort(&self, job: &Job, worker: &WorkerId, leads: bool) -> Result<&Cohort, Refusal> {
        let over = || Refusal::AttemptOver { key: job.key.clone(), epoch: job.epoch, state: job.state };
        let cohort = job.cohort.and_then(|id| self.cohorts.get(&id)).ok_or_else(over)?;
        let is_checked = ![Plant::EpochUnchecked, Plant::LeaderUnchecked, Plant::WorkerUnchecked]
            .into_iter()
            .any(|plant| self.has(plant));
        if leads && is_checked && !cohort.is_led_by(worker) {
            return Err(Refusal::NotTheLeader { worker: worker.clone(), key: job.key.clone() });
        }
        Ok(cohort)
    }
}
