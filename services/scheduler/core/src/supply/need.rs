//! Which workers the queue would take, of those that are there, those that are coming, and those that could be asked for.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashSet};

use attune_spec::id::{Project, WorkerId};

use super::{Pool, RequestId};
use crate::placement::{self, Ask, Extent, Gang, Seat, Tenant};
use crate::queue::Queued;
use crate::seats::Seats;
use crate::{Core, Device, JobKey, Memory, Resources, Usage};

/// What the queue would take.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Need<'c> {
    /// For each pool, how many more workers.
    pub(super) asked: Vec<u32>,
    /// Workers that are there, and that a job would run on or waits for; by name.
    pub(super) workers: Vec<&'c WorkerId>,
    /// Requests whose workers would run something once they come.
    pub(super) coming: BTreeSet<RequestId>,
}

/// The workers that are not there.
#[derive(Debug, Clone)]
pub(super) struct Absent {
    /// Of each that is coming its pool and its request, if that was made.
    pub(super) coming: Vec<(usize, Option<RequestId>)>,
    /// For each pool, how many more may be asked for.
    pub(super) room: Vec<u32>,
}

impl Absent {
    /// Asks for more of each pool. Each stands beside the others of its pool, as the next step will see it.
    fn ask(&mut self, more: &[u32]) {
        for ((idx, n), room) in more.iter().enumerate().zip(&mut self.room) {
            *room -= n;
            self.coming.extend((0..*n).map(|_| (idx, None)));
        }
        self.coming.sort_by_key(|(idx, _)| *idx);
    }

    /// Names for them, behind those of most real workers, and those that are coming before those that could be asked for.
    fn names(&self) -> Vec<WorkerId> {
        let n_more: u32 = self.room.iter().sum();
        let named = |kind, n| (0..n).filter_map(move |number| WorkerId::new(format!("{kind}-{number:08}")).ok());
        named("zc", self.coming.len()).chain(named("zn", n_more as usize)).collect()
    }
}

/// Lets the queue of `core` be placed on the workers that there are and the absent ones; so many `more` are asked for whatever waits.
///
/// Where more workers are to come, jobs would be placed otherwise: so that the next step does not ask again, those count as coming until
/// nothing is missing.
pub(super) fn need<'c>(core: &'c Core, pools: &[&Pool], mut absent: Absent, mut more: Vec<u32>) -> Need<'c> {
    let mut need = Need { asked: vec![0; pools.len()], ..Need::default() };
    let (there, memory) = (core.seats(), BTreeMap::new());
    loop {
        need.asked.iter_mut().zip(&more).for_each(|(asked, n)| *asked += n);
        absent.ask(&more);
        if core.queue.is_empty() {
            return need;
        }
        let names = absent.names();
        let (seats, origins) = seats(&there, pools, &absent, (&names, &memory));
        let (mut fleet, waiting) = fill(core, &seats, &origins);
        let taken: Vec<bool> = seats.iter().enumerate().map(|(at, seat)| fleet.free(at) != seat.free).collect();
        more = vec![0; pools.len()];
        for (origin, is_taken) in origins.iter().zip(&taken) {
            if let Origin::More(idx) = origin {
                more[*idx] += u32::from(*is_taken);
            }
        }
        if more.iter().any(|n| *n > 0) {
            continue;
        }
        // A gang that waits for others to end keeps those that are free for it.
        let mut needed = taken.clone();
        fleet.able(waiting.into_iter()).into_iter().for_each(|at| needed[at] = true);
        for (at, origin) in origins.iter().enumerate() {
            match origin {
                Origin::There(worker) if needed[at] => need.workers.push(worker),
                Origin::Coming(request) if taken[at] => need.coming.extend(request.cloned()),
                Origin::There(_) | Origin::Coming(_) | Origin::More(_) => {}
            }
        }
        return need;
    }
}

/// Where the worker of a seat is.
enum Origin<'c, 'r> {
    There(&'c WorkerId),
    /// It comes, for this request if that was made.
    Coming(Option<&'r RequestId>),
    /// It could be asked for, of this pool.
    More(usize),
}

/// All seats, the absent ones as if they were there, in the order of their names.
fn seats<'c: 's, 's, 'r>(
    there: &[Seat<'c>],
    pools: &[&'s Pool],
    absent: &'r Absent,
    (names, memory): (&'s [WorkerId], &'s BTreeMap<Device, u64>),
) -> (Vec<Seat<'s>>, Vec<Origin<'c, 'r>>) {
    let coming = absent.coming.iter().map(|(idx, request)| (*idx, Origin::Coming(request.as_ref())));
    let more = absent.room.iter().enumerate().flat_map(|(idx, n)| (0..*n).map(move |_| (idx, Origin::More(idx))));
    let imagined = |(worker, (idx, origin)): (_, (usize, _))| {
        let Pool { devices, labels, .. } = pools[idx];
        (Seat { worker, devices: *devices, free: *devices, memory, labels }, origin)
    };
    let mut seats: Vec<Seat<'s>> = there.to_vec();
    let mut origins: Vec<Origin<'c, 'r>> = there.iter().map(|seat| Origin::There(seat.worker)).collect();
    for (seat, origin) in names.iter().zip(coming.chain(more)).map(imagined) {
        seats.push(seat);
        origins.push(origin);
    }
    // Workers may have any name.
    if there.last().is_some_and(|last| names.first().is_some_and(|first| first < last.worker)) {
        let mut both: Vec<_> = seats.into_iter().zip(origins).collect();
        both.sort_by_key(|(seat, _)| seat.worker);
        return both.into_iter().unzip();
    }
    (seats, origins)
}

/// The seats as they are once the queue is placed, and what the jobs ask for that wait. What finds a place on the workers that are there or
/// coming has it; the rest sees what is left of them, and what could be asked for.
fn fill<'s>(core: &'s Core, seats: &'s [Seat<'s>], origins: &[Origin<'_, '_>]) -> (Seats<'s>, BTreeSet<&'s Resources>) {
    let is_more = |at: usize| matches!(origins[at], Origin::More(_));
    let (mut fleet, lanes) = (Seats::without(seats, is_more), core.settings.max_lanes);
    let (gangs, mut waiting) = placement::fill(&mut fleet, core.lines(), lanes, Extent::Gangs);
    if (0..seats.len()).any(is_more) {
        fleet.widen();
        let sure = Sure::of(&gangs);
        (_, waiting) = placement::fill(&mut fleet, sure.lines(core), lanes, Extent::Gangs);
    }
    (fleet, waiting.into_iter().map(|(_, resources)| resources).collect())
}

/// The jobs that have a place for sure.
#[derive(Default)]
struct Sure<'p> {
    keys: HashSet<&'p JobKey>,
    /// How many of them nobody has met on a walk: they stand in front, and behind the last of them nobody is looked up.
    n_unmet: Cell<usize>,
    usage: BTreeMap<&'p Project, Usage>,
}

impl<'p> Sure<'p> {
    fn of(gangs: &[Gang<'p>]) -> Self {
        let mut sure = Self::default();
        for Gang { resources, keys, device, seats } in gangs {
            // Limits of projects are in devices.
            let usage = Usage::of_gang(*device, resources.n_devices.get(), seats.len(), Memory::default());
            if let Some(key) = keys.first() {
                sure.usage.entry(&key.project).or_default().add(&usage);
            }
            sure.keys.extend(keys);
        }
        sure.n_unmet.set(sure.keys.len());
        sure
    }

    /// Whether a job of the queue is one of them.
    fn meets(&self, key: &JobKey) -> bool {
        let is_met = self.n_unmet.get() > 0 && self.keys.contains(key);
        self.n_unmet.update(|n| n - usize::from(is_met));
        is_met
    }

    /// The queue without them, to be walked once.
    fn lines<'c>(
        &self,
        core: &'c Core,
    ) -> impl Iterator<Item = (Tenant, impl Iterator<Item = impl Iterator<Item = Ask<'c>>>)> {
        core.queue.lines().map(move |(project, groups)| {
            let mut tenant = core.tenant(project);
            if let Some(usage) = self.usage.get(project) {
                tenant.usage.add(usage);
            }
            let rest = |(_, place, _): &Queued<'_>| !self.meets(&place.key);
            (tenant, groups.map(move |group| group.filter(rest).map(|queued| core.ask_at(queued))))
        })
    }
}
