//! Which workers the queue would take, of those that are there, those that are coming, and those that could be asked for.

use std::collections::{BTreeMap, BTreeSet};

use attune_spec::id::{Project, WorkerId};

use super::{Pool, RequestId};
use crate::placement::{self, Ask, Placed, Placement, Seat, Tenant};
use crate::{Core, JobKey, Memory, Usage, seats};

/// What the queue would take.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Need {
    /// For each pool, how many more workers.
    pub(super) asked: Vec<u32>,
    /// Workers that are there, and that a job would run on or waits for.
    pub(super) workers: BTreeSet<WorkerId>,
    /// Requests whose workers would run something once they come.
    pub(super) coming: BTreeSet<RequestId>,
}

/// Lets the queue of `core` be placed. `coming` names the pool of each request that has not come, or will be made, `room` how many more
/// each pool may have.
pub(super) fn need(core: &Core, pools: &[&Pool], coming: &[(usize, Option<RequestId>)], room: &[u32]) -> Need {
    let mut need = Need { asked: vec![0; pools.len()], ..Need::default() };
    if core.queue.is_empty() {
        return need;
    }
    let more: Vec<usize> = room.iter().enumerate().flat_map(|(idx, n)| (0..*n).map(move |_| idx)).collect();
    // Behind the names of real workers, and those that are coming before those that would have to be asked for.
    let (coming_names, more_names) = (names("zc", coming.len()), names("zn", more.len()));
    let memory = BTreeMap::new();
    let imagined = |(worker, idx): (_, usize)| {
        let Pool { devices, ref labels, .. } = *pools[idx];
        Seat { worker, devices, free: devices, memory: &memory, labels }
    };
    let mut seats = core.seats();
    seats.extend(coming_names.iter().zip(coming.iter().map(|(idx, _)| *idx)).map(imagined));
    let lanes = core.settings.max_lanes;
    let Placed { placements: first, waiting } = placement::place(core.lines(), &seats, lanes, None);
    let mut waiting: Vec<JobKey> = waiting.into_iter().cloned().collect();
    let mut taken: BTreeSet<WorkerId> = first.iter().flat_map(|placement| placement.workers.iter().cloned()).collect();
    if !more.is_empty() {
        // What found a place has it; the rest sees what is left, and what could be asked for.
        let occupied = Occupied::by(core, &first);
        for seat in &mut seats {
            for (device, n_devices) in occupied.devices.get(seat.worker).into_iter().flatten() {
                seat.free = seat.free.without(*device, *n_devices);
            }
        }
        seats.extend(more_names.iter().zip(more.iter().copied()).map(imagined));
        let Placed { placements, waiting: still } = placement::place(occupied.rest(core), &seats, lanes, None);
        waiting = still.into_iter().cloned().collect();
        taken.extend(placements.into_iter().flat_map(|placement| placement.workers));
    }
    for (name, idx) in more_names.iter().zip(more) {
        need.asked[idx] += u32::from(taken.remove(name));
    }
    for (name, (_, request)) in coming_names.iter().zip(coming) {
        if taken.remove(name) {
            need.coming.extend(request.clone());
        }
    }
    need.workers = taken;
    // A gang that waits for others to end keeps those that are free for it. Of long queues most jobs wish for the same.
    let asks = waiting.iter().filter_map(|key| core.ask(key));
    let wishes: BTreeSet<seats::Wish<'_>> = asks
        .flat_map(|ask| {
            let (kinds, n_devices) = (ask.resources.device.kinds(), ask.resources.n_devices.get());
            kinds.iter().map(move |kind| (*kind, n_devices, &ask.resources.labels))
        })
        .collect();
    let mut kept = vec![false; seats.len()];
    for wish in wishes {
        seats::able(&seats, wish).for_each(|idx| kept[idx] = true);
    }
    let kept = seats.iter().zip(kept).filter(|(_, is_kept)| *is_kept);
    need.workers.extend(kept.map(|(seat, _)| seat.worker.clone()));
    need
}

/// Names for workers that are not there.
fn names(kind: &str, n: usize) -> Vec<WorkerId> {
    (0..n).filter_map(|number| WorkerId::new(format!("{kind}-{number:08}")).ok()).collect()
}

/// What placements would occupy.
#[derive(Default)]
struct Occupied<'p> {
    keys: BTreeSet<&'p JobKey>,
    devices: BTreeMap<&'p WorkerId, Vec<(crate::Device, u32)>>,
    usage: BTreeMap<&'p Project, Usage>,
}

impl<'p> Occupied<'p> {
    fn by(core: &Core, placements: &'p [Placement]) -> Self {
        let mut occupied = Self::default();
        for Placement { keys, device, workers } in placements {
            // They are placed together because they ask for the same.
            let [first, ..] = keys.as_slice() else { continue };
            let Some(ask) = core.ask(first) else { continue };
            let n_devices = ask.resources.n_devices.get();
            // Limits of projects are in devices.
            let usage = Usage::of_gang(*device, n_devices, workers.len(), Memory::default());
            occupied.usage.entry(&first.project).or_default().add(&usage);
            occupied.keys.extend(keys);
            for worker in workers {
                occupied.devices.entry(worker).or_default().push((*device, n_devices));
            }
        }
        occupied
    }

    /// The queue without what is placed.
    fn rest<'a>(
        &'a self,
        core: &'a Core,
    ) -> impl Iterator<Item = (Tenant, impl Iterator<Item = Ask<'a>>)> + use<'a, 'p> {
        core.queue.lines().map(move |(project, places, n_wishes)| {
            let mut tenant = core.tenant(project, n_wishes);
            if let Some(usage) = self.usage.get(project) {
                tenant.usage.add(usage);
            }
            let rest = places.iter().filter(|(place, _)| !self.keys.contains(&place.key));
            (tenant, rest.map(|(place, asked)| core.ask_at(place, asked)))
        })
    }
}
