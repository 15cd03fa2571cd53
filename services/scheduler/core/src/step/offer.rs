//! What workers say to an offer.
//!
//! Whoever refuses one has not failed anybody. The jobs queue again after a wait that grows while nobody takes them, and meet
//! other workers first; the worker gets nothing while it is likely to have no room still.

use attune_spec::id::{CohortId, WorkerId};

use crate::step::Draft;
use crate::timers::Timer;
use crate::{Answer, Cause, Cohort, Core, Declined, Refusal};

impl Core {
    pub(super) fn offer_accepted(&mut self, worker: &WorkerId, cohort: CohortId) -> Result<Answer, Refusal> {
        self.shared_with(worker, cohort)?;
        if self.is_acknowledged(worker, cohort) {
            return Ok(Answer::Repeated);
        }
        self.acknowledge(worker, cohort);
        Ok(Answer::Done)
    }

    pub(super) fn offer_refused(
        &mut self,
        worker: &WorkerId,
        cohort: CohortId,
        why: Declined,
        draft: &mut Draft,
    ) -> Result<Answer, Refusal> {
        self.shared_with(worker, cohort)?;
        // What was taken, and is not wanted any more, has failed: or a job could be made to begin anew without end.
        if self.is_acknowledged(worker, cohort) {
            self.fail_cohort(cohort, Cause::LeaseExpired, None, draft);
            return Ok(Answer::Done);
        }
        self.fail_cohort(cohort, Cause::OfferRefused, None, draft);
        match why {
            Declined::Full => {
                self.rest(worker);
                // A gang that was kept together may not fit any more, and then keeps nobody waiting.
                draft.has_room = true;
            }
            // The word that it leaves may be on its way, or have got lost.
            Declined::Leaving if self.workers.contains_key(worker) => drop(self.drain(worker, draft)?),
            Declined::Leaving | Declined::Unable => {}
        }
        Ok(Answer::Done)
    }

    /// A cohort of which a worker has a share.
    pub(super) fn shared_with(&self, worker: &WorkerId, cohort: CohortId) -> Result<&Cohort, Refusal> {
        let known = self.cohorts.get(&cohort).ok_or(Refusal::CohortOver { cohort })?;
        let stranger = || Refusal::NotItsLease { worker: worker.clone(), what: format!("cohort {cohort}") };
        known.share(worker).map(|_| known).ok_or_else(stranger)
    }

    /// Offers a worker nothing for a while, longer each time that it had no room.
    fn rest(&mut self, worker: &WorkerId) {
        let Some(known) = self.workers.get_mut(worker) else { return };
        known.n_declined = known.n_declined.saturating_add(1);
        known.rests = true;
        let until = self.now.plus(self.settings.backoff.longest(known.n_declined));
        self.timers.set(Timer::Rest(worker.clone()), until);
    }
}
