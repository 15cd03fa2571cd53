//! Preemption: jobs of a lower priority make way for one of a higher that waits for what they occupy.
//!
//! Whoever makes way writes a checkpoint first and queues again. No more than will do are asked, the least urgent first, of these the
//! youngest; none that has made no progress since it last made way, and none while what is coming free by itself is enough.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

use attune_spec::id::{CohortId, Project};

use crate::placement::{Seat, Tenant};
use crate::plant::Plant;
use crate::seats::{self, Seats, Wish};
use crate::step::Draft;
use crate::timers::Timer;
use crate::{Attempt, Cohort, Core, Device, Job, JobKey, Occupied, Reason, Resources, Share, State, Stop, Usage};

/// After a look in vain, how long nobody looks again: what comes to yield meanwhile does so a little later.
const WAIT: Duration = Duration::from_secs(1);

/// A cohort that can be asked to make way.
struct Candidate {
    id: CohortId,
    /// The priority of its most urgent job.
    priority: i32,
    /// Its seats, with how many devices of which kind it has there.
    places: Vec<(usize, Device, u32)>,
}

/// Those who can be asked, the least urgent first and of these the youngest, read as far as they are looked at.
struct Candidates<I> {
    rest: I,
    seen: Vec<Candidate>,
}

impl<I: Iterator<Item = Candidate>> Candidates<I> {
    fn get(&mut self, at: usize) -> Option<&Candidate> {
        while self.seen.len() <= at {
            self.seen.push(self.rest.next()?);
        }
        self.seen.get(at)
    }
}

/// What a job asks for of one kind.
struct Wanted<'a> {
    priority: i32,
    n_workers: usize,
    wish: Wish<'a>,
}

impl Core {
    /// Makes way for jobs that wait for what others occupy, in this order.
    pub(super) fn make_way(&mut self, waiting: &[JobKey], draft: &mut Draft) {
        let Some(least) = self.least_urgent().filter(|_| self.may_make_way()) else { return };
        let equals_too = self.has(Plant::EqualsPreempted);
        let is_urgent = |key: &JobKey| self.jobs[key].request.priority > least || equals_too;
        let Some(last) = waiting.iter().rposition(is_urgent) else { return };
        let seats = self.soon();
        let mut fleet = Seats::new(&seats);
        let mut candidates: BTreeMap<Device, Candidates<_>> = BTreeMap::new();
        let mut tenants: BTreeMap<&Project, Tenant> = BTreeMap::new();
        let mut asked = BTreeSet::new();
        // What was looked for in vain will be for whoever is no more urgent.
        let (mut in_vain, mut is_in_vain): (HashSet<&Resources>, _) = (HashSet::new(), false);
        // Those before the last urgent one have what comes free, urgent or not.
        for ask in waiting[..=last].iter().filter_map(|key| self.ask(key)) {
            if in_vain.contains(ask.resources) {
                continue;
            }
            let project = &ask.key.project;
            let tenant = tenants.entry(project).or_insert_with(|| self.tenant(project));
            let kinds = tenant.kinds(ask.resources);
            let Resources { n_workers, n_devices, ref labels, .. } = *ask.resources;
            let n_devices = n_devices.get();
            let gang = fleet.gang(&ask, &kinds).or_else(|| {
                kinds.iter().find_map(|&kind| {
                    let wish = (kind, n_devices, labels);
                    let of_kind = || Candidates { rest: self.candidates(&seats, kind), seen: Vec::new() };
                    let candidates = candidates.entry(kind).or_insert_with(of_kind);
                    let wanted = Wanted { priority: ask.priority, n_workers: n_workers.get() as usize, wish };
                    for at in self.way_for(&wanted, (&seats, &fleet), candidates, &asked)? {
                        let Candidate { id, ref places, .. } = candidates.seen[at];
                        places.iter().for_each(|&(idx, kind, n)| fleet.give(idx, kind, n));
                        asked.insert(id);
                    }
                    fleet.gang(&ask, &[kind])
                })
            });
            let Some((kind, gang)) = gang else {
                is_in_vain = true;
                // What its project may not have is no sign for others.
                if kinds == ask.resources.device.kinds() {
                    in_vain.insert(ask.resources);
                }
                continue;
            };
            tenant.usage.add(&Usage::of_gang(kind, n_devices, gang.len(), ask.memory));
            gang.into_iter().for_each(|idx| fleet.take(idx, kind, n_devices));
        }
        drop((fleet, candidates));
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

    /// Whether anybody may be asked to make way now.
    pub(super) fn may_make_way(&self) -> bool {
        self.settings.preempts && self.timers.get(&Timer::Way).is_none()
    }

    /// The priority of the least urgent job that runs.
    pub(super) fn least_urgent(&self) -> Option<i32> {
        self.live.keys().next().copied()
    }

    /// The seats, with what is free of them and will be without anybody being asked any more.
    fn soon(&self) -> Vec<Seat<'_>> {
        let stopping = self.timers.iter().filter_map(|(timer, _)| match timer {
            Timer::Stop(key) => self.jobs.get(key)?.cohort,
            _ => None,
        });
        let leaving: BTreeSet<CohortId> =
            stopping.filter(|id| self.staying(&self.cohorts[id]).next().is_none()).collect();
        let leaves = |(id, used): &(&CohortId, &Occupied)| used.releasing || leaving.contains(id);
        self.seats_with(|worker| {
            let left = worker.occupied.iter().filter(leaves);
            left.fold(worker.free(), |free, (_, used)| free.with(used.device, used.n_devices))
        })
    }

    /// The jobs of a cohort that are not being stopped.
    fn staying(&self, cohort: &Cohort) -> impl Iterator<Item = &Job> {
        let jobs = cohort.attempts.iter().filter_map(|attempt| self.jobs.get(&attempt.key));
        jobs.filter(|job| !matches!(job.state, State::Stopping(_)))
    }

    /// Who can be asked to make way on devices of a kind.
    fn candidates<'a>(&'a self, seats: &'a [Seat<'a>], kind: Device) -> impl Iterator<Item = Candidate> + use<'a> {
        let by_urgency =
            self.live.iter().flat_map(|(priority, cohorts)| cohorts.keys().rev().map(|id| (*priority, *id)));
        by_urgency.filter_map(move |(priority, id)| {
            let cohort = &self.cohorts[&id];
            // Most that run may be of another kind: what they run is not looked up.
            if cohort.shares.iter().all(|share| share.device != kind) {
                return None;
            }
            let has_moved = |job: &Job| job.preempted_at != Some(job.progress);
            // One of several priorities stands with the highest.
            let is_here = self.staying(cohort).map(|job| job.request.priority).max() == Some(priority);
            if !is_here || !self.staying(cohort).all(has_moved) {
                return None;
            }
            let place = |share: &Share| {
                let idx = seats.binary_search_by(|seat| seat.worker.cmp(&share.worker)).ok()?;
                Some((idx, share.device, share.n_devices))
            };
            Some(Candidate { id, priority, places: cohort.shares.iter().filter_map(place).collect() })
        })
    }

    /// Which candidates have to make way for a job to have a gang of a kind of devices; `asked` have been asked already.
    fn way_for(
        &self,
        wanted: &Wanted<'_>,
        (seats, fleet): (&[Seat<'_>], &Seats<'_>),
        candidates: &mut Candidates<impl Iterator<Item = Candidate>>,
        asked: &BTreeSet<CohortId>,
    ) -> Option<Vec<usize>> {
        let &Wanted { priority, n_workers, wish } = wanted;
        let (kind, n_devices, _) = wish;
        let mut given: BTreeMap<usize, u32> = BTreeMap::new();
        let free = |idx: usize| fleet.free(idx).of(kind);
        let has = |given: &BTreeMap<usize, u32>, idx: usize| {
            free(idx).saturating_add(given.get(&idx).copied().unwrap_or_default()) >= n_devices
        };
        // What comes free by itself counts.
        let mut enough: BTreeSet<usize> =
            seats::able(seats, wish).filter(|&idx| free(idx) >= n_devices).take(n_workers).collect();
        let mut chosen: Vec<usize> = Vec::new();
        for at in 0.. {
            if enough.len() >= n_workers {
                break;
            }
            let is_less = |candidate: &Candidate| {
                candidate.priority < priority || candidate.priority == priority && self.has(Plant::EqualsPreempted)
            };
            let candidate = candidates.get(at).filter(|candidate| is_less(candidate))?;
            let lacks = |idx: usize| free(idx) < n_devices && seats::is_able(&seats[idx], wish);
            let here: Vec<(usize, u32)> = (candidate.places.iter())
                .filter(|(idx, of, _)| *of == kind && lacks(*idx))
                .map(|&(idx, _, n)| (idx, n))
                .collect();
            if here.is_empty() || asked.contains(&candidate.id) {
                continue;
            }
            chosen.push(at);
            for (idx, n) in here {
                *given.entry(idx).or_default() += n;
                if has(&given, idx) {
                    enough.insert(idx);
                }
            }
        }
        // Whoever is not needed for these seats stays: the most urgent are looked at first.
        for at in (0..chosen.len()).rev() {
            let mut rest = given.clone();
            for (idx, _, n) in candidates.seen[chosen[at]].places.iter().filter(|(_, of, _)| *of == kind) {
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
