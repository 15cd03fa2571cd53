//! Leases: until when a worker may run its share of a cohort without a word.
//!
//! A lease that ends makes the scheduler give the attempt up and grant the job again. It proves nothing about the
//! worker, which may run on; what such a worker commits is refused by its epoch.

use attune_spec::id::{CohortId, WorkerId};

use crate::plant::Plant;
use crate::step::Draft;
use crate::timers::Timer;
use crate::{Cause, Core};

/// The lease of one share. Its deadline is a timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Lease {
    /// Whether the worker has given any sign that the offer arrived.
    pub(crate) acknowledged: bool,
}

/// What is known of a worker that does not vouch for a cohort any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The same process speaks for it.
    Lives,
    /// Another process speaks for it, or it was silent for a whole lease.
    Died,
    /// Nobody has seen it since the scheduler started, or it does not say which process it is.
    Unknown,
}

impl Core {
    /// Opens the leases of all shares of a cohort, each for its whole length.
    pub(crate) fn open_leases(&mut self, cohort: CohortId, acknowledged: bool) {
        let shares = self.cohorts.get(&cohort).map(|cohort| cohort.shares.clone()).unwrap_or_default();
        for share in shares {
            let until = if self.has(Plant::NoGrace) { self.now } else { self.now.plus(self.settings.ttl) };
            self.timers.set(Timer::Lease(cohort, share.worker.clone()), until);
            self.leases.insert((share.worker, cohort), Lease { acknowledged });
        }
    }

    /// Ends the leases of all shares of a cohort.
    pub(crate) fn close_leases(&mut self, cohort: CohortId, workers: impl IntoIterator<Item = WorkerId>) {
        for worker in workers {
            self.timers.clear(&Timer::Lease(cohort, worker.clone()));
            self.leases.remove(&(worker, cohort));
        }
    }

    /// The cohorts for which a worker holds a lease.
    pub(crate) fn leased_to(&self, worker: &WorkerId) -> Vec<CohortId> {
        let all = (worker.clone(), CohortId(0))..=(worker.clone(), CohortId(u64::MAX));
        self.leases.range(all).map(|((_, cohort), _)| *cohort).collect()
    }

    /// Renews a lease for its whole length, because the worker vouches for the cohort.
    pub(crate) fn renew(&mut self, worker: &WorkerId, cohort: CohortId) {
        self.timers.set(Timer::Lease(cohort, worker.clone()), self.now.plus(self.settings.ttl));
        self.acknowledge(worker, cohort);
    }

    /// Notes a sign of life from a share. Says nothing about the others and renews nothing: it may have been long on
    /// its way.
    pub(crate) fn acknowledge(&mut self, worker: &WorkerId, cohort: CohortId) {
        let Some(lease) = self.leases.get_mut(&(worker.clone(), cohort)) else { return };
        if !std::mem::replace(&mut lease.acknowledged, true)
            && let Some(known) = self.workers.get_mut(worker)
        {
            known.n_declined = 0;
        }
    }

    /// Whether a worker has given any sign that the offer of a cohort arrived.
    pub(crate) fn is_acknowledged(&self, worker: &WorkerId, cohort: CohortId) -> bool {
        self.leases.get(&(worker.clone(), cohort)).is_some_and(|lease| lease.acknowledged)
    }

    /// Fails what was on a share whose worker does not vouch for it any more.
    ///
    /// A job that kills its worker may do so before anybody hears that the offer arrived. So a death counts against the job in
    /// either case; but that an offer came to nothing while its worker lives, or while nobody knows, was the network's doing.
    pub(crate) fn lose_share(&mut self, worker: &WorkerId, cohort: CohortId, fate: Fate, draft: &mut Draft) {
        let (cause, is_suspect) = match (self.is_acknowledged(worker, cohort), fate) {
            (false, Fate::Lives | Fate::Unknown) => (Cause::OfferLost, false),
            (false, Fate::Died) => (Cause::OfferLost, true),
            (true, Fate::Lives) => (Cause::LeaseExpired, false),
            (true, Fate::Died | Fate::Unknown) => (Cause::WorkerLost, true),
        };
        self.fail_cohort(cohort, cause, is_suspect.then_some(worker), draft);
    }
}
