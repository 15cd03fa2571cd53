//! Preemption: jobs of a lower priority make way for one of a higher that waits for what they occupy.
//!
//! Whoever makes way writes a checkpoint first and queues again. No more than will do are asked, the least urgent first, of these the
//! youngest; none that has made no progress since it last made way, and none while what is coming free by itself is enough.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use attune_spec::id::{CohortId, WorkerId};

use crate::placement::Seat;
use crate::plant::Plant;
use crate::seats;
use crate::step::Draft;
use crate::{Attempt, Core, Device, Devices, Job, JobKey, State, Stop};

/// What a cohort does about its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Occupant {
    /// It gives them back by itself.
    Leaves,
    /// It can be asked to; its most urgent job has this priority.
    Yields(i32),
    /// It stays.
    Stays,
}

/// What is free of each worker's devices, and will be without anybody being asked any more.
type Soon = BTreeMap<WorkerId, Devices>;

impl Core {
    /// Makes way for jobs that wait for what others occupy, in this order.
    pub(super) fn make_way(&mut self, waiting: &[JobKey], draft: &mut Draft) {
        let Some((&least, _)) = self.live_priorities.first_key_value() else { return };
        let is_urgent = |key: &JobKey| self.jobs[key].request.priority > least || self.has(Plant::EqualsPreempted);
        let Some(last) = waiting.iter().rposition(is_urgent).filter(|_| self.settings.preempts) else { return };
        let mut soon = self.soon();
        let mut asked: Vec<Attempt> = Vec::new();
        // Those before it have what comes free, urgent or not.
        for key in &waiting[..=last] {
            let found = self.way_for(key, &soon);
            let Some((kind, workers, yielding)) = found else { continue };
            for cohort in yielding {
                asked.extend(self.cohorts[&cohort].attempts.iter().cloned());
                self.give_back(cohort, &mut soon);
            }
            let n_devices = self.jobs[key].request.resources.n_devices.get();
            for worker in workers {
                let left = soon.entry(worker).or_default();
                *left = left.without(kind, n_devices);
            }
        }
        for Attempt { key, .. } in asked {
            if matches!(self.jobs[&key].state, State::Starting | State::Running) {
                self.yield_devices(&key, draft);
            }
        }
    }

    fn soon(&self) -> Soon {
        let seats: BTreeSet<&WorkerId> = self.seats().iter().map(|seat| seat.worker).collect();
        let workers = self.workers.values().filter(|worker| seats.contains(&worker.id));
        let of = |worker: &crate::Worker| {
            let leaving = worker.occupied.iter().filter(|(id, _)| self.occupant(**id) == Occupant::Leaves);
            leaving.fold(worker.free(), |soon, (_, used)| soon.with(used.device, used.n_devices))
        };
        workers.map(|worker| (worker.id.clone(), of(worker))).collect()
    }

    fn occupant(&self, id: CohortId) -> Occupant {
        // One that is over is being killed.
        let Some(cohort) = self.cohorts.get(&id) else { return Occupant::Leaves };
        let jobs = cohort.attempts.iter().filter_map(|attempt| self.jobs.get(&attempt.key));
        let staying: Vec<&Job> = jobs.filter(|job| !matches!(job.state, State::Stopping(_))).collect();
        let has_moved = |job: &&Job| job.preempted_at != Some(job.progress);
        match staying.iter().map(|job| job.request.priority).max() {
            None => Occupant::Leaves,
            Some(priority) if staying.iter().all(has_moved) => Occupant::Yields(priority),
            Some(_) => Occupant::Stays,
        }
    }

    fn give_back(&self, id: CohortId, soon: &mut Soon) {
        for share in &self.cohorts[&id].shares {
            if let Some(devices) = soon.get_mut(&share.worker) {
                *devices = devices.with(share.device, share.n_devices);
            }
        }
    }

    /// The gang that a job gets when these cohorts have made way: the kind of its devices, its workers, the cohorts, of which there are
    /// none where enough comes free by itself.
    fn way_for(&self, key: &JobKey, soon: &Soon) -> Option<(Device, Vec<WorkerId>, Vec<CohortId>)> {
        let request = &self.jobs[key].request;
        let resources = &request.resources;
        let (n_workers, n_devices) = (resources.n_workers.get() as usize, resources.n_devices.get());
        let needed = resources.n_workers.get().saturating_mul(n_devices);
        let tenant = self.tenant(&key.project, 0);
        let may_have = |kind: Device| {
            let used = tenant.usage.devices().of(kind);
            tenant.policy.max_of(kind).is_none_or(|max| used.saturating_add(needed) <= max)
        };
        let kinds: Vec<Device> = resources.device.kinds().iter().copied().filter(|kind| may_have(*kind)).collect();
        let seats = self.seats();
        let able = |kind: Device| -> Vec<&Seat<'_>> {
            seats::able(&seats, (kind, n_devices, &resources.labels)).map(|idx| &seats[idx]).collect()
        };
        let fitting = |kind: Device, able: &[&Seat<'_>], soon: &Soon| -> Vec<WorkerId> {
            let free = |seat: &&&Seat<'_>| soon.get(seat.worker).copied().unwrap_or_default().of(kind);
            let mut fit: Vec<&&Seat<'_>> = able.iter().filter(|seat| free(seat) >= n_devices).collect();
            fit.sort_by_key(|seat| (free(seat), seat.worker));
            fit.into_iter().take(n_workers).map(|seat| seat.worker.clone()).collect()
        };
        for &kind in &kinds {
            let workers = fitting(kind, &able(kind), soon);
            if workers.len() == n_workers {
                return Some((kind, workers, Vec::new()));
            }
        }
        kinds.into_iter().find_map(|kind| {
            let free = |worker: &WorkerId| soon.get(worker).copied().unwrap_or_default().of(kind);
            let able = able(kind);
            // What it costs to have each seat: the most urgent of those who have to go, and how many these are.
            let costs = able.iter().filter_map(|seat| {
                let (mut free, mut gone) = (free(seat.worker), Vec::new());
                for (priority, Reverse(id), n) in self.yielding(seat.worker, kind, request.priority) {
                    if free >= n_devices {
                        break;
                    }
                    free = free.saturating_add(n);
                    gone.push((priority, id));
                }
                let cost = (gone.last().map(|(priority, _)| *priority), gone.len(), seat.worker);
                (free >= n_devices).then_some((cost, gone))
            });
            let mut costs: Vec<_> = costs.collect();
            costs.sort_by(|a, b| a.0.cmp(&b.0));
            costs.truncate(n_workers);
            if costs.len() < n_workers {
                return None;
            }
            let workers: Vec<&WorkerId> = costs.iter().map(|((.., worker), _)| *worker).collect();
            // Whoever makes way on one seat may do so on others.
            let mut chosen: BTreeSet<(i32, Reverse<CohortId>)> = costs
                .iter()
                .flat_map(|(_, gone)| gone.iter().map(|(priority, id)| (*priority, Reverse(*id))))
                .collect();
            let is_enough = |chosen: &BTreeSet<(i32, Reverse<CohortId>)>| {
                workers.iter().all(|worker| {
                    let shares = chosen.iter().filter_map(|(_, Reverse(id))| self.cohorts[id].share(worker));
                    let given = shares.filter(|share| share.device == kind).map(|share| share.n_devices);
                    given.fold(free(worker), u32::saturating_add) >= n_devices
                })
            };
            for cohort in chosen.clone().into_iter().rev() {
                chosen.remove(&cohort);
                if !is_enough(&chosen) {
                    chosen.insert(cohort);
                }
            }
            let workers = workers.into_iter().cloned().collect();
            Some((kind, workers, chosen.into_iter().map(|(_, Reverse(id))| id).collect()))
        })
    }

    /// Who can be asked to give back devices of a kind on a worker for a job of this priority, and how many: the least urgent first, of
    /// these the youngest.
    fn yielding(&self, worker: &WorkerId, kind: Device, priority: i32) -> Vec<(i32, Reverse<CohortId>, u32)> {
        let occupied = self.workers.get(worker).into_iter().flat_map(|worker| &worker.occupied);
        let yields = occupied.filter(|(_, used)| used.device == kind).filter_map(|(id, used)| {
            let Occupant::Yields(own) = self.occupant(*id) else { return None };
            let is_less = own < priority || self.has(Plant::EqualsPreempted);
            is_less.then_some((own, Reverse(*id), used.n_devices))
        });
        let mut yields: Vec<_> = yields.collect();
        yields.sort_unstable();
        yields
    }

    /// Asks a job to make way.
    pub(super) fn yield_devices(&mut self, key: &JobKey, draft: &mut Draft) {
        let job = self.edit(key, draft);
        job.preempted_at = Some(job.progress);
        self.ask_to_stop(key, Stop::Preempt, crate::Reason::PreemptAsked, draft);
    }
}
