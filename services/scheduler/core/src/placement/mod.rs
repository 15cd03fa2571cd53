//! Which jobs go where: one pure function.
//!
//! Jobs of a higher priority go first. Of equal ones the next is that of the project with the smallest dominant share of the fleet
//! over its weight ([`Usage::share`]: dominant-resource fairness over devices and their memory), which grows with each gang that it
//! gets; within a project the oldest. A gang gets all its workers or none. A job that fits the fleet but not
//! what is free keeps the workers that it is waiting for: nobody behind it is placed there, so a large gang is never
//! starved by small ones, while the rest of the fleet goes on working. A job that fits no fleet of today blocks nobody. What a project may
//! have is kept for the first of its jobs that waits for it in the same way: jobs of its own behind it do not get the rest.
//! Jobs that may share a process are placed together: the first of them takes along those behind it, up to a limit and to
//! what the device's memory is expected to hold. They wait a moment for one another first; meanwhile they keep their place
//! like any job that waits.
//! Among workers that will do, one that ran the job before is taken first (it has the inputs on its disk), then the one
//! with the fewest free devices of the kind, so that large holes stay for large shares. One that was lost while it ran the
//! job is taken when no other will do: it may be the worker's fault, and if it is the job's it shows by a few of them.

mod line;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::num::NonZeroU32;

use attune_spec::id::{Digest, WorkerId};
use line::Line;

use crate::project::{Fleet, Policy, Usage};
use crate::seats::{self, Seats};
use crate::{Device, Devices, JobKey, Memory, Resources};

/// A job that waits for a gang.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// The job.
    pub key: &'a JobKey,
    /// Higher goes first.
    pub priority: i32,
    /// Its place among jobs of equal priority.
    pub order: u64,
    /// What it asks for.
    pub resources: &'a Resources,
    /// The workers that ran it last.
    pub prefer: &'a BTreeSet<WorkerId>,
    /// The workers that were lost while they ran it: others are taken before them.
    pub avoid: &'a BTreeSet<WorkerId>,
    /// Jobs of one project with the same key and the same resources may be placed together.
    pub share: Option<&'a Digest>,
    /// Whether it still waits for others to be placed with.
    pub gathers: bool,
    /// What it takes of a device's memory.
    pub memory: Memory,
}

impl Ask<'_> {
    /// Whether both may be lanes of one process.
    fn fits(&self, other: &Self) -> bool {
        let is_shared = self.share.is_some() && self.share == other.share;
        is_shared && self.key.project == other.key.project && self.resources == other.resources
    }
}

/// A project with jobs in the queue.
#[derive(Debug, Clone, Copy)]
pub struct Tenant {
    /// What it may have.
    pub policy: Policy,
    /// What it has.
    pub usage: Usage,
    /// How many different things its queued jobs ask for, at most: its line is walked no further once each was looked for in vain.
    pub n_wishes: usize,
}

impl Tenant {
    /// The kinds of devices, best first, of which the project may have as many more as a job asks for.
    pub fn kinds(&self, resources: &Resources) -> Vec<Device> {
        let has_room = |kind: &Device| {
            let used = self.usage.devices().of(*kind);
            self.policy.max_of(*kind).is_none_or(|max| used.saturating_add(resources.n_total()) <= max)
        };
        resources.device.kinds().iter().copied().filter(has_room).collect()
    }
}

/// A worker that takes new work. Draining, disconnected and lost ones have no seat.
#[derive(Debug, Clone)]
pub struct Seat<'a> {
    /// The worker.
    pub worker: &'a WorkerId,
    /// All its devices.
    pub devices: Devices,
    /// Those that nothing occupies.
    pub free: Devices,
    /// Memory of each device, by kind, where it is known.
    pub memory: &'a BTreeMap<Device, u64>,
    /// Its labels.
    pub labels: &'a BTreeMap<String, String>,
}

/// A gang that was found: whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The jobs, in the order of the queue: one, or several that share a process.
    pub keys: Vec<JobKey>,
    /// The kind of all devices.
    pub device: Device,
    /// The workers, by rank.
    pub workers: Vec<WorkerId>,
}

/// What a walk through the queue finds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placed<'a> {
    /// The gangs that can be granted now.
    pub placements: Vec<Placement>,
    /// The jobs that keep workers because others occupy these, in the order in which they go.
    pub waiting: Vec<&'a JobKey>,
}

/// Why a queued job is not granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Blocked {
    /// No worker is there that takes new work.
    NoWorkers,
    /// No worker has enough devices of the kind, or the labels.
    NoSuchWorker,
    /// Some have, but fewer than the gang needs.
    TooFewWorkers,
    /// With it its project would have more devices than it may.
    OverQuota,
    /// The fleet is large enough; other jobs occupy it.
    Occupied,
    /// Enough is free, but it is kept for a job that goes first.
    Behind,
    /// Enough is free; it waits a moment for jobs to share a process with.
    Gathering,
}

/// How many jobs that ask for the same are looked for, once nothing is free, that others may make way for: the next look finds the next
/// ones.
const MAX_WAITING: usize = 64;

/// Walks the queue, given project by project, each in the order of priority and age, and returns the gangs that can be granted now. It
/// goes no further once no seat is left that somebody could have, but for jobs of a higher priority than `least`, that of the least urgent
/// job that runs: some of those are to be known, as others may make way for them.
pub fn place<'a, I: Iterator<Item = Ask<'a>>>(
    queue: impl IntoIterator<Item = (Tenant, I)>,
    seats: &'a [Seat<'a>],
    max_lanes: NonZeroU32,
    least: Option<i32>,
) -> Placed<'a> {
    let (mut fleet, whole) = (Seats::new(seats), Fleet::of(seats));
    let mut lines: Vec<Line<'a, I>> = queue.into_iter().map(|(tenant, rest)| Line::new(tenant, rest, &whole)).collect();
    let mut heads: BTreeSet<(Reverse<i32>, u64, u64, &JobKey, usize)> = BTreeSet::new();
    let push = |heads: &mut BTreeSet<_>, lines: &mut [Line<'a, I>], idx: usize| {
        let line = &mut lines[idx];
        if let Some(ask) = line.head() {
            heads.insert((Reverse(ask.priority), line.share(), ask.order, ask.key, idx));
        }
    };
    (0..lines.len()).for_each(|idx| push(&mut heads, &mut lines, idx));
    let mut placed = Placed::default();
    // What found no gang and kept no worker will not later in this walk either: seats only get fewer.
    let mut hopeless: HashSet<&Resources> = HashSet::new();
    let mut n_waiting: HashMap<&Resources, usize> = HashMap::new();
    while let Some((Reverse(priority), .., idx)) = heads.pop_first() {
        let is_idle = fleet.is_idle();
        if !is_idle && least.is_none_or(|least| priority <= least) {
            break;
        }
        let line = &mut lines[idx];
        let Some((at, ask)) = line.take() else { continue };
        if hopeless.contains(ask.resources) {
            line.give_up(ask.resources);
        }
        let kinds = line.kinds(ask.resources);
        if line.hopes(ask.resources) {
            let gang = fleet.gang(&ask, &kinds);
            let memory = |(device, gang): &(Device, Vec<usize>)| {
                gang.iter().filter_map(|&idx| seats[idx].memory.get(device).copied()).min()
            };
            let limit = gang.as_ref().and_then(memory).unwrap_or(u64::MAX);
            let lanes = line.lanes(at, max_lanes, limit);
            let is_found = gang.is_some();
            if let Some((device, gang)) = gang.filter(|_| lanes.is_gathered) {
                let n_devices = ask.resources.n_devices.get();
                gang.iter().for_each(|&idx| fleet.take(idx, device, n_devices));
                let workers: Vec<WorkerId> = gang.into_iter().map(|idx| seats[idx].worker.clone()).collect();
                line.charge(&Usage::of_gang(device, n_devices, workers.len(), lanes.memory), &whole);
                placed.placements.push(Placement { keys: lanes.keys, device, workers });
            } else if fleet.keep(&ask, &kinds) {
                placed.waiting.extend((!is_found).then_some(ask.key));
                let n_waiting = n_waiting.entry(ask.resources).or_default();
                *n_waiting += 1;
                if !is_idle && *n_waiting >= MAX_WAITING {
                    line.give_up(ask.resources);
                }
            } else if !is_found {
                line.give_up(ask.resources);
                if kinds == ask.resources.device.kinds() {
                    hopeless.insert(ask.resources);
                }
                // What its project may not have now it may have later.
                let others = ask.resources.device.kinds().iter().filter(|kind| !kinds.contains(kind));
                others.filter(|kind| fleet.could_hold(&ask, **kind)).for_each(|kind| line.keep(ask.resources, *kind));
            }
        }
        push(&mut heads, &mut lines, idx);
    }
    placed
}

/// Why a job of the queue is not granted, or nothing when it would be. `tenant` is its project; `queue` gives the queue as often as it
/// is asked.
pub fn blocked<'a, Q: IntoIterator<Item = (Tenant, I)>, I: Iterator<Item = Ask<'a>>>(
    queue: impl Fn() -> Q,
    ask: &Ask<'a>,
    tenant: Tenant,
    seats: &'a [Seat<'a>],
    max_lanes: NonZeroU32,
) -> Option<Blocked> {
    let needed = ask.resources.n_workers.get() as usize;
    let Resources { n_devices, device, labels, .. } = ask.resources;
    let able = |kind: &Device| seats::able(seats, (*kind, n_devices.get(), labels)).count();
    let most = device.kinds().iter().map(able).max().unwrap_or(0);
    let kinds = tenant.kinds(ask.resources);
    if seats.is_empty() {
        Some(Blocked::NoWorkers)
    } else if most == 0 {
        Some(Blocked::NoSuchWorker)
    } else if most < needed {
        Some(Blocked::TooFewWorkers)
    } else if kinds.iter().all(|kind| able(kind) < needed) {
        Some(Blocked::OverQuota)
    } else if Seats::new(seats).gang(ask, &kinds).is_none() {
        Some(Blocked::Occupied)
    } else {
        let placed = place(queue(), seats, max_lanes, None);
        if placed.placements.iter().any(|placement| placement.keys.contains(ask.key)) {
            return None;
        }
        let waits = |other: Ask<'_>| other.fits(ask) && !other.gathers;
        let is_gathering = ask.gathers && !queue().into_iter().flat_map(|(_, line)| line).any(waits);
        Some(if is_gathering { Blocked::Gathering } else { Blocked::Behind })
    }
}
