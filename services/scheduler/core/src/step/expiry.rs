//! Deadlines: the only place where time itself changes anything.

use attune_spec::id::WorkerId;

use crate::lease::Fate;
use crate::plant::Plant;
use crate::step::Draft;
use crate::timers::Timer;
use crate::{Answer, Core, Reason, State};

impl Core {
    pub(super) fn tick(&mut self, draft: &mut Draft) -> Answer {
        while let Some(timer) = self.timers.pop_due(self.now) {
            match timer {
                Timer::Lease(..) | Timer::Worker(_) if self.has(Plant::LeaseEndless) => {}
                Timer::Lease(cohort, worker) => {
                    // A worker that is not here has not come back since the restart: one that is silent is given up itself.
                    let fate = if self.workers.contains_key(&worker) { Fate::Lives } else { Fate::Unknown };
                    self.lose_share(&worker, cohort, fate, draft);
                }
                Timer::Rest(worker) => {
                    if let Some(known) = self.workers.get_mut(&worker) {
                        known.rests = false;
                    }
                    draft.has_room = true;
                }
                Timer::Gather(_) | Timer::Way => draft.has_room = true,
                Timer::Worker(worker) => self.give_up(&worker, draft),
                Timer::Stop(key) => {
                    if let State::Stopping(stop) = self.jobs[&key].state {
                        self.settle_stop(&key, stop, draft);
                    }
                }
                Timer::Backoff(key) => self.move_to(&key, State::Queued, Reason::BackoffOver, draft),
            }
        }
        Answer::Done
    }

    /// Forgets a silent worker and fails what it ran.
    fn give_up(&mut self, worker: &WorkerId, draft: &mut Draft) {
        self.workers.remove(worker);
        self.timers.clear(&Timer::Rest(worker.clone()));
        draft.has_room = true;
        for cohort in self.leased_to(worker) {
            self.lose_share(worker, cohort, Fate::Died, draft);
        }
    }
}
