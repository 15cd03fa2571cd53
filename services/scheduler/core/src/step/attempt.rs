//! What workers report about attempts: that one runs, how one ended, that a cohort crashed.

use attune_spec::id::{CohortId, Epoch, WorkerId};

use crate::plant::Plant;
use crate::step::Draft;
use crate::{Answer, Cause, Core, JobKey, Outcome, Reason, Refusal, Retry, State, Stop};

/// How an attempt failed.
#[derive(Clone, Copy)]
pub(super) struct Failure<'a> {
    pub(super) cause: Cause,
    /// The worker that died with it, or just before it was heard of, if one did: the job may be to blame.
    pub(super) lost: Option<&'a WorkerId>,
    /// Whether it died with a process that others shared, so that nobody knows whose fault it was.
    pub(super) is_shared: bool,
}

impl Failure<'_> {
    /// A failure of this attempt and no other.
    pub(super) const fn own(cause: Cause) -> Self {
        Self { cause, lost: None, is_shared: false }
    }
}

/// Lost offers in a row that are not charged to the job: a broken connection is not its fault.
const FREE_LOST_OFFERS: u32 = 2;

impl Core {
    pub(super) fn attempt_running(
        &mut self,
        key: &JobKey,
        epoch: Epoch,
        worker: &WorkerId,
        draft: &mut Draft,
    ) -> Result<Answer, Refusal> {
        let job = self.spoken_for(key, epoch, worker)?;
        let (state, cohort) = (job.state, self.live_cohort(job, worker, true)?.id);
        match state {
            State::Starting => {
                self.acknowledge(worker, cohort);
                let job = self.edit(key, draft);
                (job.n_offers_lost, job.n_offers_refused) = (0, 0);
                self.move_to(key, State::Running, Reason::Started, draft);
                Ok(Answer::Done)
            }
            State::Running => Ok(Answer::Repeated),
            _ => Err(Refusal::WrongState { key: key.clone(), state, wanted: "only a starting job begins to run" }),
        }
    }

    pub(super) fn attempt_finished(
        &mut self,
        key: &JobKey,
        epoch: Epoch,
        worker: &WorkerId,
        outcome: Outcome,
        draft: &mut Draft,
    ) -> Result<Answer, Refusal> {
        let job = self.spoken_for(key, epoch, worker)?;
        if (job.state, outcome) == (State::Succeeded, Outcome::Succeeded) {
            return Ok(Answer::Repeated);
        }
        let is_failure = matches!(outcome, Outcome::Failed(_) | Outcome::Crashed(_));
        let (state, cohort) = (job.state, self.live_cohort(job, worker, !is_failure)?.id);
        self.acknowledge(worker, cohort);
        match (outcome, state) {
            (Outcome::Failed(cause), _) if self.has(Plant::LanesEndTogether) => {
                self.fail_cohort(cohort, cause, None, draft);
            }
            (Outcome::Failed(cause), _) => self.fail_attempt(key, Failure::own(cause), draft),
            (Outcome::Crashed(cause), _) => {
                self.fail_attempt(key, Failure { cause, lost: None, is_shared: true }, draft);
            }
            // Whoever asked for the stop was first: it is carried out, also when the attempt had just reached its end.
            (Outcome::Stopped | Outcome::Succeeded, State::Stopping(stop)) => self.settle_stop(key, stop, draft),
            (Outcome::Succeeded, _) => {
                if state == State::Starting {
                    self.move_to(key, State::Running, Reason::Started, draft);
                }
                self.move_to(key, State::Succeeded, Reason::Finished, draft);
            }
            // The worker is going away and has asked its children itself. It gets nothing new until it registers again,
            // or the job would go straight back to it.
            (Outcome::Stopped, _) => {
                if let Some(worker) = self.workers.get_mut(worker) {
                    worker.draining = true;
                }
                self.move_to(key, State::Stopping(Stop::Preempt), Reason::WorkerDraining, draft);
                self.settle_stop(key, Stop::Preempt, draft);
            }
        }
        Ok(Answer::Done)
    }

    pub(super) fn cohort_crashed(
        &mut self,
        worker: &WorkerId,
        cohort: CohortId,
        cause: Cause,
        draft: &mut Draft,
    ) -> Result<Answer, Refusal> {
        self.shared_with(worker, cohort)?;
        self.acknowledge(worker, cohort);
        self.fail_cohort(cohort, cause, None, draft);
        Ok(Answer::Done)
    }

    /// A stopping job becomes what the stop was for.
    pub(super) fn settle_stop(&mut self, key: &JobKey, stop: Stop, draft: &mut Draft) {
        let reason = match stop {
            Stop::Preempt => Reason::Preempted,
            Stop::Pause => Reason::PauseAsked,
            // On request, or because what it is a stage of has ended.
            Stop::Cancel => self.jobs[key].reason,
        };
        self.move_to(key, stop.target(), reason, draft);
    }

    /// Fails every attempt of a cohort. `lost` is the worker that died, if one did.
    pub(crate) fn fail_cohort(&mut self, cohort: CohortId, cause: Cause, lost: Option<&WorkerId>, draft: &mut Draft) {
        let attempts = self.cohorts.get(&cohort).map(|cohort| cohort.attempts.clone()).unwrap_or_default();
        let failure = Failure { cause, lost, is_shared: attempts.len() > 1 };
        for attempt in attempts {
            self.fail_attempt(&attempt.key, failure, draft);
        }
    }

    /// Fails an attempt. What died with a shared process costs its job nothing, whatever the cause, but it runs alone from
    /// now on: that happens once at most, and shows whose fault it was.
    pub(super) fn fail_attempt(&mut self, key: &JobKey, failure: Failure<'_>, draft: &mut Draft) {
        let Failure { cause, lost, is_shared } = failure;
        let state = self.jobs[key].state;
        if let State::Stopping(stop) = state {
            // It was to end anyway; what it had committed is there.
            return self.settle_stop(key, stop, draft);
        }
        let is_counted = !self.has(Plant::FailuresUncounted);
        let quarantine_after = self.settings.quarantine_after as usize;
        let (is_spared, is_packed_again) = (!self.has(Plant::InnocentsCharged), self.has(Plant::SoloForgotten));
        let charges_refusals = self.has(Plant::RefusalsCharged);
        let job = self.edit(key, draft);
        // What it was to begin with is damaged. That may be an input, but then the older checkpoint costs little.
        if (state, cause) == (State::Starting, Cause::Corrupt)
            && let Some(older) = job.older.take()
        {
            job.checkpoint = Some(older);
        }
        // An offer that nobody took has ended no process; one whose worker died may have.
        let is_death = match cause {
            Cause::OfferLost => lost.is_some(),
            Cause::OfferRefused => false,
            _ => true,
        };
        if is_shared && is_spared && is_death && job.shares().is_some() {
            job.solo = !is_packed_again;
            (job.n_offers_lost, job.n_offers_refused) = (0, 0);
            return self.move_to(key, State::Backoff, Reason::Failure(cause), draft);
        }
        let is_free = match cause {
            Cause::OfferLost => job.n_offers_lost < FREE_LOST_OFFERS,
            Cause::OfferRefused => !charges_refusals,
            _ => false,
        };
        (job.n_offers_lost, job.n_offers_refused) = match cause {
            Cause::OfferLost => (job.n_offers_lost.saturating_add(1), 0),
            // Neither of the two says anything of the other.
            Cause::OfferRefused => (job.n_offers_lost, job.n_offers_refused.saturating_add(1)),
            _ => (0, 0),
        };
        if !is_free && is_counted {
            job.n_failed = job.n_failed.saturating_add(1);
        }
        if is_counted {
            job.lost_workers.extend(lost.cloned());
        }
        let (state, reason) = if cause.retry() == Retry::No {
            (State::Failed, Reason::Failure(cause))
        } else if job.lost_workers.len() >= quarantine_after {
            (State::Failed, Reason::Quarantined(cause))
        } else if job.n_failed >= job.request.max_attempts.get() {
            (State::Failed, Reason::AttemptsExhausted(cause))
        } else {
            (State::Backoff, Reason::Failure(cause))
        };
        self.move_to(key, state, reason, draft);
    }
}
