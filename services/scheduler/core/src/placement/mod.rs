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
mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;

use attune_spec::id::{Digest, WorkerId};
use walk::Walk;

use crate::project::{Policy, Usage};
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
}

impl Tenant {
    /// The kinds of devices, best first, of which the project may have as many more as a job asks for.
    pub fn kinds(&self, resources: &Resources) -> Vec<Device> {
        resources.device.kinds().iter().copied().filter(|kind| self.has_room(resources, *kind)).collect()
    }

    fn has_room(&self, resources: &Resources, kind: Device) -> bool {
        let used = self.usage.devices().of(kind);
        self.policy.max_of(kind).is_none_or(|max| used.saturating_add(resources.n_total()) <= max)
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

/// The same by the places of its seats in the fleet.
#[derive(Debug)]
pub(crate) struct Gang<'a> {
    /// What each of its jobs asks for.
    pub(crate) resources: &'a Resources,
    pub(crate) keys: Vec<&'a JobKey>,
    pub(crate) device: Device,
    pub(crate) seats: Vec<usize>,
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

/// How far the queue is walked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Until nobody behind can get a gang: the gangs that can be granted now, and of the jobs of a project that wait and ask for the same
    /// the first at least.
    Gangs,
    /// Until no seat is left that somebody could have, with all jobs that wait; beyond that only for those of a higher priority than
    /// `least`, that of the least urgent job that runs: some of those are to be known, as others may make way for them.
    Waiting {
        /// Jobs up to this priority are not looked at once no seat is left; none are where there is no such priority.
        least: Option<i32>,
    },
}

/// Walks the queue and returns the gangs that can be granted now. The queue is given project by project, of each the jobs that ask for the
/// same together, in the order of priority and age; the seats in the order of their workers' names.
pub fn place<'a, I: Iterator<Item = Ask<'a>>>(
    queue: impl IntoIterator<Item = (Tenant, impl IntoIterator<Item = I>)>,
    seats: &'a [Seat<'a>],
    max_lanes: NonZeroU32,
    extent: Extent,
) -> Placed<'a> {
    let (gangs, waiting) = fill(&mut Seats::new(seats), queue, max_lanes, extent);
    let placement = |Gang { keys, device, seats: gang, .. }| Placement {
        keys: keys.into_iter().cloned().collect(),
        device,
        workers: gang.into_iter().map(|idx| seats[idx].worker.clone()).collect(),
    };
    Placed {
        placements: gangs.into_iter().map(placement).collect(),
        waiting: waiting.into_iter().map(|(key, _)| key).collect(),
    }
}

/// The same on what is left of a fleet: the gangs, and the jobs that keep workers with what they ask for.
pub(crate) fn fill<'a, I: Iterator<Item = Ask<'a>>>(
    fleet: &mut Seats<'a>,
    queue: impl IntoIterator<Item = (Tenant, impl IntoIterator<Item = I>)>,
    max_lanes: NonZeroU32,
    extent: Extent,
) -> (Vec<Gang<'a>>, Vec<(&'a JobKey, &'a Resources)>) {
    Walk::new(queue, fleet, max_lanes, extent).run()
}

/// Why a job of the queue is not granted, or nothing when it would be. `tenant` is its project; `queue` gives the queue as often as it
/// is asked.
pub fn blocked<'a, Q, G, I>(
    queue: impl Fn() -> Q,
    ask: &Ask<'a>,
    tenant: Tenant,
    seats: &'a [Seat<'a>],
    max_lanes: NonZeroU32,
) -> Option<Blocked>
where
    Q: IntoIterator<Item = (Tenant, G)>,
    G: IntoIterator<Item = I>,
    I: Iterator<Item = Ask<'a>>,
{
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
        let placed = place(queue(), seats, max_lanes, Extent::Gangs);
        if placed.placements.iter().any(|placement| placement.keys.contains(ask.key)) {
            return None;
        }
        let waits = |other: Ask<'_>| other.fits(ask) && !other.gathers;
        let is_gathering = ask.gathers && !queue().into_iter().flat_map(|(_, groups)| groups).flatten().any(waits);
        Some(if is_gathering { Blocked::Gathering } else { Blocked::Behind })
    }
}
