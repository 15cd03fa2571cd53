//! Grants: a queued job or several that share a process, a whole gang, a new epoch each.

use attune_spec::id::{CohortId, WorkerId};

use crate::placement::{self, Extent, Placed, Placement};
use crate::plant::Plant;
use crate::step::Draft;
use crate::{Action, Attempt, Cohort, Core, Granted, JobKey, Occupied, Offer, Reason, Share, State};

impl Core {
    /// Grants every job that finds a gang now.
    pub(crate) fn grant(&mut self, draft: &mut Draft) {
        if self.queue.is_empty() {
            return;
        }
        loop {
            // Who waits matters only to whoever makes way.
            let may_make_way = self.may_make_way();
            let extent = if may_make_way { Extent::Waiting { least: self.least_urgent() } } else { Extent::Gangs };
            let seats = self.seats();
            let Placed { placements, waiting } =
                placement::place(self.lines(), &seats, self.settings.max_lanes, extent);
            let waiting: Vec<JobKey> = waiting.into_iter().cloned().collect();
            // What a project gets changes who goes next, and what it may still have, and so what is kept for whom.
            let is_shared = self.queue.lines().nth(1).is_some() || !self.policies.is_empty();
            let may_change = !placements.is_empty() && is_shared;
            for placement in placements {
                self.grant_one(placement, draft);
            }
            if !may_change {
                return self.make_way(&waiting, draft);
            }
        }
    }

    fn grant_one(&mut self, placement: Placement, draft: &mut Draft) {
        let Placement { keys, device, workers } = placement;
        let id = self.counters.next_cohort;
        self.counters.next_cohort = id.next();
        let attempts: Vec<Granted> = keys.iter().map(|key| self.grant_attempt(key, id, &workers, draft)).collect();
        // They are placed together because they ask for the same.
        let n_devices = self.jobs[&keys[0]].request.resources.n_devices.get();
        let share = |(rank, worker): (u32, &WorkerId)| Share { worker: worker.clone(), rank, device, n_devices };
        let shares: Vec<Share> = (0..).zip(&workers).map(share).collect();
        for share in &shares {
            let worker = self.workers.get_mut(&share.worker).expect("gang_whole: a placed worker is registered");
            worker.occupied.insert(id, Occupied { device, n_devices, releasing: false });
            draft.actions.push(Action::Offer(Offer {
                cohort: id,
                attempts: attempts.clone(),
                share: share.clone(),
                gang: workers.clone(),
                ttl: self.settings.ttl,
            }));
        }
        let attempts = attempts.into_iter().map(|granted| granted.attempt).collect();
        self.cohorts.insert(id, Cohort { id, attempts, shares });
        self.count_cohort(id);
        draft.cohorts.insert(id, None);
        self.open_leases(id, false);
    }

    /// Gives a job its next epoch, in this cohort.
    fn grant_attempt(&mut self, key: &JobKey, cohort: CohortId, workers: &[WorkerId], draft: &mut Draft) -> Granted {
        let is_raised = !self.has(Plant::EpochReused) || self.jobs[key].epoch.0 == 0;
        let starts_over = self.has(Plant::OfferFromScratch);
        let job = self.edit(key, draft);
        if is_raised {
            job.epoch = job.epoch.next();
        }
        job.cohort = Some(cohort);
        job.outputs.clear();
        job.workers = workers.iter().cloned().collect();
        let priority = job.request.priority;
        let attempt = Attempt { key: key.clone(), epoch: job.epoch };
        let checkpoint = job.checkpoint.filter(|_| !starts_over);
        *self.live.entry(priority).or_default().entry(cohort).or_default() += 1;
        self.move_to(key, State::Starting, Reason::Granted, draft);
        Granted { attempt, checkpoint }
    }
}
