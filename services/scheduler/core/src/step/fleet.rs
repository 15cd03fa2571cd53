//! Workers come, vouch for what they run, drain and go.
//!
//! A registration is a meeting: both sides know afterwards what the worker runs. Heartbeats keep it so: what one misses,
//! the next repairs.

use std::collections::{BTreeMap, BTreeSet};

use attune_spec::id::{CohortId, Name, WorkerId};

use crate::lease::Fate;
use crate::plant::Plant;
use crate::step::Draft;
use crate::step::attempt::Failure;
use crate::timers::Timer;
use crate::{
    Action, Answer, Attempt, Cause, Core, Device, Devices, Holding, Occupied, Reason, Refusal, Session, State, Stop,
    Worker,
};

/// What a worker says when it connects.
pub(super) struct Registration {
    pub(super) session: Session,
    pub(super) devices: Devices,
    pub(super) memory: BTreeMap<Device, u64>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) process: Option<Name>,
    pub(super) outdated: bool,
    pub(super) draining: bool,
    pub(super) holding: Vec<Holding>,
}

impl Core {
    pub(super) fn register(
        &mut self,
        id: WorkerId,
        registration: Registration,
        draft: &mut Draft,
    ) -> Result<Answer, Refusal> {
        let Registration { session, devices, memory, labels, process, outdated, draining, holding } = registration;
        if let Some(known) = self.workers.get(&id) {
            if session == known.session {
                return Ok(Answer::Repeated);
            }
            if session < known.session {
                return Err(Refusal::StaleSession { worker: id, session, newest: known.session });
            }
        }
        let fate = match (self.workers.get(&id).and_then(|known| known.process.as_ref()), &process) {
            (Some(before), Some(now)) if before == now => Fate::Lives,
            (Some(_), Some(_)) => Fate::Died,
            (None, _) | (_, None) => Fate::Unknown,
        };
        let leased = self.leased_to(&id);
        // Each cohort once, whatever was sent.
        let holding: BTreeMap<CohortId, Holding> = holding.into_iter().map(|held| (held.cohort, held)).collect();
        let (kept, stray): (Vec<_>, Vec<_>) = holding.into_values().partition(|held| leased.contains(&held.cohort));
        let occupied = |held: &Holding, releasing| {
            (held.cohort, Occupied { device: held.device, n_devices: held.n_devices, releasing })
        };
        let worker = Worker {
            id: id.clone(),
            session,
            connected: true,
            draining,
            devices,
            memory,
            labels,
            process,
            outdated,
            n_declined: 0,
            rests: false,
            beat: 0,
            occupied: kept.iter().map(|h| occupied(h, false)).chain(stray.iter().map(|h| occupied(h, true))).collect(),
        };
        self.workers.insert(id.clone(), worker);
        self.timers.clear(&Timer::Rest(id.clone()));
        self.timers.set(Timer::Worker(id.clone()), self.now.plus(self.settings.ttl));
        draft.has_room = true;
        let keep: Vec<CohortId> = kept.iter().map(|held| held.cohort).collect();
        let ttl = self.settings.ttl;
        draft.actions.push(Action::Welcome { worker: id.clone(), session, keep: keep.clone(), ttl });

        for held in stray {
            draft.actions.push(Action::Release { worker: id.clone(), cohort: held.cohort });
        }
        for cohort in leased.into_iter().filter(|cohort| !keep.contains(cohort)) {
            if self.has(Plant::HoldingIgnored) {
                self.renew(&id, cohort);
                continue;
            }
            // It was away and came back without the cohort: whatever ran there is dead.
            self.lose_share(&id, cohort, fate, draft);
        }
        for held in kept {
            self.reattach(&id, held, draft);
        }
        if draining {
            self.preempt_all(&id, draft);
        }
        Ok(Answer::Done)
    }

    /// A worker came back with a live cohort: compares its attempts with ours.
    fn reattach(&mut self, worker: &WorkerId, held: Holding, draft: &mut Draft) {
        self.renew(worker, held.cohort);
        let ours: BTreeSet<Attempt> = self.cohorts[&held.cohort].attempts.iter().cloned().collect();
        let theirs: BTreeSet<Attempt> = held.attempts.into_iter().collect();
        for attempt in theirs.difference(&ours) {
            let (worker, attempt) = (worker.clone(), attempt.clone());
            draft.actions.push(Action::Drop { worker, cohort: held.cohort, attempt });
        }
        for attempt in ours {
            if theirs.contains(&attempt) {
                self.repeat_stop(&attempt.key, Some(worker), draft);
            } else {
                self.fail_attempt(&attempt.key, Failure::own(Cause::WorkerLost), draft);
            }
        }
    }

    pub(super) fn heartbeat(
        &mut self,
        id: &WorkerId,
        session: Session,
        beat: u64,
        holding: &[CohortId],
        draft: &mut Draft,
    ) -> Result<Answer, Refusal> {
        let forgets = self.has(Plant::DevicesForgotten);
        let worker = self.at_session(id, session)?;
        if beat <= worker.beat {
            return Err(Refusal::StaleBeat { worker: id.clone(), beat, newest: worker.beat });
        }
        worker.beat = beat;
        let n_before = worker.occupied.len();
        worker.occupied.retain(|cohort, occupied| forgets || !occupied.releasing || holding.contains(cohort));
        draft.has_room |= worker.occupied.len() < n_before;
        self.timers.set(Timer::Worker(id.clone()), self.now.plus(self.settings.ttl));

        let leased = self.leased_to(id);
        let holding: BTreeSet<CohortId> = holding.iter().copied().collect();
        let (cohorts, stray): (Vec<_>, Vec<_>) = holding.into_iter().partition(|held| leased.contains(held));
        draft.actions.push(Action::Renewed { worker: id.clone(), session, beat, cohorts: cohorts.clone() });
        draft.actions.extend(stray.into_iter().map(|cohort| Action::Release { worker: id.clone(), cohort }));
        for cohort in cohorts {
            self.renew(id, cohort);
            for attempt in self.cohorts[&cohort].attempts.clone() {
                self.repeat_stop(&attempt.key, Some(id), draft);
            }
        }
        Ok(Answer::Done)
    }

    pub(super) fn drain(&mut self, id: &WorkerId, draft: &mut Draft) -> Result<Answer, Refusal> {
        let unknown = || Refusal::UnknownWorker { worker: id.clone() };
        let worker = self.workers.get_mut(id).ok_or_else(unknown)?;
        if std::mem::replace(&mut worker.draining, true) {
            return Ok(Answer::Repeated);
        }
        draft.has_room = true;
        self.preempt_all(id, draft);
        Ok(Answer::Done)
    }

    /// Asks all jobs of a worker to go on elsewhere, and says how many these were.
    pub(super) fn preempt_all(&mut self, worker: &WorkerId, draft: &mut Draft) -> usize {
        let mut n_asked = 0;
        for cohort in self.leased_to(worker) {
            for attempt in self.cohorts[&cohort].attempts.clone() {
                if matches!(self.jobs[&attempt.key].state, State::Starting | State::Running) {
                    self.ask_to_stop(&attempt.key, Stop::Preempt, Reason::WorkerDraining, draft);
                    n_asked += 1;
                }
            }
        }
        n_asked
    }

    pub(super) fn disconnect(&mut self, id: &WorkerId, session: Session, draft: &mut Draft) -> Result<Answer, Refusal> {
        let worker = self.at_session(id, session)?;
        if !std::mem::replace(&mut worker.connected, false) {
            return Ok(Answer::Repeated);
        }
        // A gang that was kept together may not fit any more, and then keeps nobody waiting.
        draft.has_room = true;
        Ok(Answer::Done)
    }

    pub(super) fn cohort_gone(
        &mut self,
        id: &WorkerId,
        session: Session,
        cohort: CohortId,
        draft: &mut Draft,
    ) -> Result<Answer, Refusal> {
        self.at_session(id, session)?;
        if self.leases.contains_key(&(id.clone(), cohort)) {
            // Nobody told it to let go: the processes ended and the report got lost.
            self.acknowledge(id, cohort);
            self.fail_cohort(cohort, Cause::LeaseExpired, None, draft);
        }
        if self.has(Plant::DevicesForgotten) {
            return Ok(Answer::Done);
        }
        let was_there = self.at_session(id, session)?.occupied.remove(&cohort).is_some();
        draft.has_room |= was_there;
        Ok(if was_there { Answer::Done } else { Answer::Repeated })
    }

    fn at_session(&mut self, id: &WorkerId, session: Session) -> Result<&mut Worker, Refusal> {
        let unknown = || Refusal::UnknownWorker { worker: id.clone() };
        let worker = self.workers.get_mut(id).ok_or_else(unknown)?;
        if session == worker.session {
            Ok(worker)
        } else {
            Err(Refusal::StaleSession { worker: id.clone(), session, newest: worker.session })
        }
    }
}
