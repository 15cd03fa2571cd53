//! Deadlines: the only place where time itself changes anything.

use attune_spec::id::WorkerId;

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
                    // A worker that is not here has not come back since the restart, or is given up itself.
                    let lives = self.workers.contains_key(&worker);
                    let cause = self.loss(&worker, cohort, lives);
                    self.fail_cohort(cohort, cause, Some(&worker), draft);
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
        draft.has_room = true;
        for cohort in self.leased_to(worker) {
            let cause = self.loss(worker, cohort, false);
            self.fail_cohort(cohort, cause, Some(worker), draft);
        }
    }
}
