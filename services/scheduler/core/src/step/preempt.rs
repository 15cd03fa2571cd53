//! Preemption: jobs of a lower priority make way for one of a higher that waits for what they occupy.
//!
//! Whoever makes way writes a checkpoint first and queues again. No more than will do are asked, the least urgent first, of these the
//! youngest; none that has made no progress since it last made way, and none while what is coming free by itself is enough.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use attune_spec::id::CohortId;

use crate::placement::{Ask, Seat};
use crate::plant::Plant;
use crate::seats::{self, Seats};
use crate::step::Draft;
use crate::timers::Timer;
use crate::{Attempt, Cohort, Core, Device, Job, JobKey, Occupied, Reason, State, Stop};

/// After a look in vain, how long nobody looks again: what comes to yield meanwhile does so a little later.
const WAIT: Duration = Duration::from_secs(1);

/// How many cohorts are looked at in one step for those that can make way: the next step looks again.
const MAX_LOOKED_AT: usize = 2000;

impl Core {
    /// Makes way for jobs that wait for what others occupy, in this order.
    pub(super) fn make_way(&mut self, waiting: &[JobKey], draft: &mut Draft) {
        let Some(least) = self.least_urgent() else { return };
        let equals_too = self.has(Plant::EqualsPreempted);
        let is_urgent = |key: &JobKey| self.jobs[key].request.priority > least || equals_too;
        let Some(last) = waiting.iter().rposition(is_urgent) else { return };
        let seats = self.soon();
        let mut fleet = Seats::new(&seats);
        let (mut asked, mut left, mut is_in_vain) = (BTreeSet::new(), MAX_LOOKED_AT, false);
        // Those before the last urgent one have what comes free, urgent or not.
        for ask in waiting[..=last].iter().filter_map(|key| self.ask(key)) {
            let kinds = self.may_have(&ask);
            let gang = fleet.gang(&ask, &kinds).or_else(|| {
                kinds.into_iter().find_map(|kind| {
                    let yielding = self.way_for(&ask, kind, (&seats, &fleet), &asked, &mut left)?;
                    for id in &yielding {
                        for share in &self.cohorts[id].shares {
                            if let Some(idx) = fleet.of(&share.worker) {
                                fleet.give(idx, share.device, share.n_devices);
                            }
                        }
                    }
                    asked.extend(yielding);
                    fleet.gang(&ask, &[kind])
                })
            });
            let Some((kind, gang)) = gang else {
                is_in_vain = true;
                continue;
            };
            let n_devices = ask.resources.n_devices.get();
            gang.into_iter().for_each(|idx| fleet.take(idx, kind, n_devices));
        }
        drop(fleet);
        if is_in_vain && asked.is_empty() {
            self.timers.set(Timer::Way, self.now.plus(WAIT));
        }
        let attempts = asked.iter().flat_map(|id| self.cohorts[id].attempts.iter().cloned());
        for Attempt { key, .. } in attempts.collect::<Vec<_>>() {
            if matches!(self.jobs[&key].state, State::Starting | State::Running) {
                self.yield_devices(&key, draft);
            }
        }
    }

    /// The priority of the least urgent job that runs, if others may be asked to make way now.
    pub(super) fn least_urgent(&self) -> Option<i32> {
        let may = self.settings.preempts && self.timers.get(&Timer::Way).is_none();
        self.live.keys().next().copied().filter(|_| may)
    }

    /// The seats, with what is free of them and will be without anybody being asked any more.
    fn soon(&self) -> Vec<Seat<'_>> {
        let stopping = self.timers.iter().filter_map(|(timer, _)| match timer {
            Timer::Stop(key) => self.jobs.get(key)?.cohort,
            _ => None,
        });
        let leaving: BTreeSet<CohortId> =
            stopping.filter(|id| self.staying(&self.cohorts[id]).next().is_none()).collect();
        let mut seats = self.seats();
        for seat in &mut seats {
            let leaves = |(id, used): &(&CohortId, &Occupied)| used.releasing || leaving.contains(id);
            for (_, used) in self.workers[seat.worker].occupied.iter().filter(leaves) {
                seat.free = seat.free.with(used.device, used.n_devices);
            }
        }
        seats
    }

    /// The jobs of a cohort that are not being stopped.
    fn staying(&self, cohort: &Cohort) -> impl Iterator<Item = &Job> {
        let jobs = cohort.attempts.iter().filter_map(|attempt| self.jobs.get(&attempt.key));
        jobs.filter(|job| !matches!(job.state, State::Stopping(_)))
    }

    /// Whether a cohort can be asked to make way for a job of this priority.
    fn yields(&self, cohort: &Cohort, priority: i32) -> bool {
        let may = |job: &Job| {
            let is_less = job.request.priority < priority || self.has(Plant::EqualsPreempted);
            is_less && job.preempted_at != Some(job.progress)
        };
        let mut jobs = self.staying(cohort).peekable();
        jobs.peek().is_some() && jobs.all(may)
    }

    /// The kinds of devices, best first, of which a job's project may have as many more.
    fn may_have(&self, ask: &Ask<'_>) -> Vec<Device> {
        let tenant = self.tenant(&ask.key.project, 0);
        let needed = ask.resources.n_workers.get().saturating_mul(ask.resources.n_devices.get());
        let has_room = |kind: &Device| {
            let used = tenant.usage.devices().of(*kind);
            tenant.policy.max_of(*kind).is_none_or(|max| used.saturating_add(needed) <= max)
        };
        ask.resources.device.kinds().iter().copied().filter(has_room).collect()
    }

    /// Who has to make way for a job to have a gang of a kind of devices. `asked` have been asked already, and `left` more are looked at.
    fn way_for(
        &self,
        ask: &Ask<'_>,
        kind: Device,
        (seats, fleet): (&[Seat<'_>], &Seats<'_>),
        asked: &BTreeSet<CohortId>,
        left: &mut usize,
    ) -> Option<Vec<CohortId>> {
        let (n_workers, n_devices) = (ask.resources.n_workers.get() as usize, ask.resources.n_devices.get());
        let wish = (kind, n_devices, &ask.resources.labels);
        let mut given: BTreeMap<usize, u32> = BTreeMap::new();
        let has = |given: &BTreeMap<usize, u32>, idx: usize| {
            fleet.free(idx).of(kind).saturating_add(given.get(&idx).copied().unwrap_or_default()) >= n_devices
        };
        // What comes free by itself counts.
        let mut enough: BTreeSet<usize> =
            seats::able(seats, wish).filter(|&idx| fleet.free(idx).of(kind) >= n_devices).take(n_workers).collect();
        let mut chosen: Vec<CohortId> = Vec::new();
        let up_to = if self.has(Plant::EqualsPreempted) { ask.priority } else { ask.priority.checked_sub(1)? };
        let by_urgency = self.live.range(..=up_to).flat_map(|(_, cohorts)| cohorts.keys().map(|id| Reverse(*id)).rev());
        for Reverse(id) in by_urgency {
            if enough.len() >= n_workers || *left == 0 {
                break;
            }
            *left -= 1;
            let cohort = &self.cohorts[&id];
            let places = || {
                cohort.shares.iter().filter(|share| share.device == kind).filter_map(|share| {
                    let idx = fleet.of(&share.worker).filter(|&idx| seats::is_able(&seats[idx], wish))?;
                    (!has(&BTreeMap::new(), idx)).then_some((idx, share.n_devices))
                })
            };
            if asked.contains(&id)
                || chosen.contains(&id)
                || places().next().is_none()
                || !self.yields(cohort, ask.priority)
            {
                continue;
            }
            chosen.push(id);
            for (idx, n) in places() {
                *given.entry(idx).or_default() += n;
                if has(&given, idx) {
                    enough.insert(idx);
                }
            }
        }
        if enough.len() < n_workers {
            return None;
        }
        let enough: Vec<usize> = enough.into_iter().collect();
        // Whoever is not needed for these seats stays: the most urgent are looked at first.
        for at in (0..chosen.len()).rev() {
            let shares = |id: CohortId| self.cohorts[&id].shares.iter().filter(|share| share.device == kind);
            let without: Vec<(usize, u32)> =
                shares(chosen[at]).filter_map(|share| Some((fleet.of(&share.worker)?, share.n_devices))).collect();
            let mut rest = given.clone();
            for (idx, n) in &without {
                if let Some(given) = rest.get_mut(idx) {
                    *given = given.saturating_sub(*n);
                }
            }
            if enough.iter().all(|&idx| has(&rest, idx)) {
                given = rest;
                chosen.remove(at);
            }
        }
        Some(chosen)
    }

    /// Asks a job to make way.
    pub(super) fn yield_devices(&mut self, key: &JobKey, draft: &mut Draft) {
        let job = self.edit(key, draft);
        job.preempted_at = Some(job.progress);
        self.ask_to_stop(key, Stop::Preempt, Reason::PreemptAsked, draft);
    }
}
