//! What people ask for: submit, cancel, pause, resume, retry, preempt.

use std::collections::BTreeMap;

use attune_spec::id::{JobId, WorkerId};

use crate::step::Draft;
use crate::{Action, Answer, Attempt, Core, Event, EventKind, Job, JobKey, Reason, Refusal, Request, State, Stop};

impl Core {
    pub(super) fn submit(
        &mut self,
        key: JobKey,
        request: Request,
        finished: &BTreeMap<JobId, State>,
        draft: &mut Draft,
    ) -> Result<Answer, Refusal> {
        if let Some(job) = self.jobs.get(&key) {
            let is_same = job.request == request;
            return if is_same { Ok(Answer::Repeated) } else { Err(Refusal::JobExists { key }) };
        }
        self.takes_stage(&key, &request)?;
        self.within_quota(&key, &request)?;
        let order = self.counters.next_order;
        let mut job = new_job(key.clone(), request, order);
        let mut is_hopeless = false;
        for dependency in &job.request.after {
            let held = self.jobs.get(&JobKey::new(key.project.clone(), dependency.clone())).map(|job| job.state);
            let stored = finished.get(dependency).copied().filter(|state| state.is_final());
            match held.or(stored) {
                None => return Err(Refusal::UnknownDependency { key, dependency: dependency.clone() }),
                Some(State::Succeeded) => {}
                Some(state) => {
                    is_hopeless |= state.is_final();
                    job.pending.insert(dependency.clone());
                }
            }
        }
        if job.request.is_staged {
            (job.state, job.reason) = (State::Waiting, Reason::StagesPending);
            self.due.insert(key.clone());
        } else if job.pending.is_empty() {
            self.queue.insert(&job);
            self.gather(&job);
            draft.has_room = true;
        } else {
            (job.state, job.reason) = (State::Waiting, Reason::DependencyPending);
            for dependency in job.awaited() {
                self.dependants.entry(dependency).or_default().insert(key.clone());
            }
        }
        self.counters.next_order += 1;
        let kind = EventKind::Submitted { to: job.state, reason: job.reason };
        draft.log.push(Event { key: key.clone(), epoch: job.epoch, kind });
        draft.before.insert(key.clone(), None);
        if job.counts_as_queued() {
            self.accounts.change(&key.project, |account| account.n_queued += 1);
        }
        self.jobs.insert(key.clone(), job);
        self.add_stage(&key, draft);
        if is_hopeless {
            self.move_to(&key, State::Failed, Reason::DependencyFailed, draft);
        }
        Ok(Answer::Done)
    }

    pub(super) fn forget(&mut self, key: &JobKey) -> Result<Answer, Refusal> {
        let Some(job) = self.jobs.get(key) else { return Ok(Answer::Repeated) };
        if !job.state.is_final() {
            return Err(wrong(key, job.state, "only a finished job can be forgotten"));
        }
        self.jobs.remove(key);
        Ok(Answer::Done)
    }

    /// Ends a job without success, for this reason.
    pub(super) fn cancel(&mut self, key: &JobKey, reason: Reason, draft: &mut Draft) -> Result<Answer, Refusal> {
        match self.known(key)?.state {
            State::Cancelled | State::Stopping(Stop::Cancel) => Ok(Answer::Repeated),
            state @ (State::Succeeded | State::Failed) => Err(wrong(key, state, "a final state never changes")),
            State::Starting | State::Running | State::Stopping(Stop::Pause | Stop::Preempt) => {
                self.ask_to_stop(key, Stop::Cancel, reason, draft);
                Ok(Answer::Done)
            }
            State::Waiting | State::Queued | State::Backoff | State::Paused => {
                self.move_to(key, State::Cancelled, reason, draft);
                Ok(Answer::Done)
            }
        }
    }

    pub(super) fn pause(&mut self, key: &JobKey, draft: &mut Draft) -> Result<Answer, Refusal> {
        match self.known(key)?.state {
            State::Paused | State::Stopping(Stop::Pause) => Ok(Answer::Repeated),
            State::Starting | State::Running | State::Stopping(Stop::Preempt) => {
                self.ask_to_stop(key, Stop::Pause, Reason::PauseAsked, draft);
                Ok(Answer::Done)
            }
            state @ (State::Waiting
            | State::Queued
            | State::Backoff
            | State::Stopping(Stop::Cancel)
            | State::Succeeded
            | State::Failed
            | State::Cancelled) => Err(wrong(key, state, "only a job that starts or runs can be paused")),
        }
    }

    pub(super) fn resume(&mut self, key: &JobKey, draft: &mut Draft) -> Result<Answer, Refusal> {
        let job = self.known(key)?;
        match (job.state, job.reason) {
            (State::Paused, _) => {
                self.move_to(key, State::Queued, Reason::Resumed, draft);
                Ok(Answer::Done)
            }
            (State::Queued, Reason::Resumed) => Ok(Answer::Repeated),
            (state, _) => Err(wrong(key, state, "only a paused job can be resumed")),
        }
    }

    pub(super) fn retry(&mut self, key: &JobKey, draft: &mut Draft) -> Result<Answer, Refusal> {
        let job = self.known(key)?;
        match (job.state, job.reason) {
            (State::Backoff, _) => {
                self.move_to(key, State::Queued, Reason::RetryAsked, draft);
                Ok(Answer::Done)
            }
            (State::Queued, Reason::RetryAsked) => Ok(Answer::Repeated),
            (state, _) if state.is_final() => {
                Err(wrong(key, state, "a final state never changes; submit the job anew"))
            }
            (state, _) => Err(wrong(key, state, "only a job that waits after a failure can be retried")),
        }
    }

    pub(super) fn preempt(&mut self, key: &JobKey, draft: &mut Draft) -> Result<Answer, Refusal> {
        let job = self.known(key)?;
        match job.state {
            State::Stopping(Stop::Preempt) => Ok(Answer::Repeated),
            State::Starting | State::Running if job.preempted_at == Some(job.progress) => {
                Err(Refusal::NoProgress { key: key.clone() })
            }
            State::Starting | State::Running => {
                self.yield_devices(key, draft);
                Ok(Answer::Done)
            }
            state => Err(wrong(key, state, "only a job that starts or runs can be preempted")),
        }
    }

    /// Asks a live attempt to stop. If it does not, a timer ends it.
    pub(super) fn ask_to_stop(&mut self, key: &JobKey, stop: Stop, reason: Reason, draft: &mut Draft) {
        self.move_to(key, State::Stopping(stop), reason, draft);
        self.repeat_stop(key, None, draft);
    }

    /// Sends the request to stop to the workers of a stopping job, or to one of them; nothing for other jobs.
    pub(super) fn repeat_stop(&self, key: &JobKey, only: Option<&WorkerId>, draft: &mut Draft) {
        let job = &self.jobs[key];
        let (State::Stopping(stop), Some(id)) = (job.state, job.cohort) else { return };
        let attempt = Attempt { key: key.clone(), epoch: job.epoch };
        let is_meant = |worker| only.is_none_or(|only| only == worker) && self.workers.contains_key(worker);
        for share in self.cohorts[&id].shares.iter().filter(|share| is_meant(&share.worker)) {
            let worker = share.worker.clone();
            draft.actions.push(Action::Stop { worker, cohort: id, attempt: attempt.clone(), stop });
        }
    }
}

fn wrong(key: &JobKey, state: State, wanted: &'static str) -> Refusal {
    Refusal::WrongState { key: key.clone(), state, wanted }
}

fn new_job(key: JobKey, request: Request, order: u64) -> Job {
    Job {
        key,
        version: 0,
        order,
        request,
        state: State::Queued,
        reason: Reason::Submitted,
        epoch: Default::default(),
        cohort: None,
        n_failed: 0,
        n_offers_lost: 0,
        n_offers_refused: 0,
        checkpoint: None,
        older: None,
        progress: Default::default(),
        outputs: Default::default(),
        n_stages_failed: 0,
        pending: Default::default(),
        workers: Default::default(),
        lost_workers: Default::default(),
        preempted_at: None,
        solo: false,
    }
}
