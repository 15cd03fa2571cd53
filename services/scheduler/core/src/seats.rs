//! The seats of a fleet, found by what is free of them.
//!
//! Jobs that ask for the same (a number of devices of a kind, and labels) see the same seats in the same order, so each such wish has them
//! sorted once, and a seat that changes moves in each. A look for a gang then costs what the gang is large, however large the fleet
//! is.

use std::collections::{BTreeMap, BTreeSet};

use attune_spec::id::WorkerId;

use crate::placement::{Ask, Seat};
use crate::{Device, Devices, Resources};

/// What jobs ask of a seat.
pub(crate) type Wish<'s> = (Device, u32, &'s BTreeMap<String, String>);

/// The seats that a wish could have if they were empty and that nobody keeps: by what is free of its kind, then by name.
#[derive(Debug, Default)]
struct Open<'s> {
    by_free: BTreeMap<u32, BTreeMap<&'s WorkerId, usize>>,
    len: usize,
    /// The same with those that somebody keeps.
    n_able: usize,
}

impl<'s> Open<'s> {
    fn insert(&mut self, free: u32, worker: &'s WorkerId, idx: usize) {
        self.len += usize::from(self.by_free.entry(free).or_default().insert(worker, idx).is_none());
    }

    fn remove(&mut self, free: u32, worker: &'s WorkerId) -> bool {
        let Some(alike) = self.by_free.get_mut(&free) else { return false };
        let was_there = alike.remove(worker).is_some();
        if alike.is_empty() {
            self.by_free.remove(&free);
        }
        self.len -= usize::from(was_there);
        was_there
    }

    fn has(&self, free: u32, worker: &WorkerId) -> bool {
        self.by_free.get(&free).is_some_and(|alike| alike.contains_key(worker))
    }
}

/// A fleet in which seats are taken and kept.
#[derive(Debug)]
pub(crate) struct Seats<'s> {
    seats: &'s [Seat<'s>],
    by_worker: BTreeMap<&'s WorkerId, usize>,
    free: Vec<Devices>,
    kept: Vec<bool>,
    /// Seats of which something is free and that nobody keeps.
    n_idle: usize,
    open: BTreeMap<Wish<'s>, Open<'s>>,
}

impl<'s> Seats<'s> {
    pub(crate) fn new(seats: &'s [Seat<'s>]) -> Self {
        let free: Vec<Devices> = seats.iter().map(|seat| seat.free).collect();
        Self {
            seats,
            by_worker: seats.iter().enumerate().map(|(idx, seat)| (seat.worker, idx)).collect(),
            n_idle: free.iter().filter(|free| **free != Devices::default()).count(),
            kept: vec![false; seats.len()],
            free,
            open: BTreeMap::new(),
        }
    }

    /// Whether there is a seat that a job could have.
    pub(crate) fn is_idle(&self) -> bool {
        self.n_idle > 0
    }

    fn open(&mut self, wish: Wish<'s>) -> &Open<'s> {
        let (seats, free, kept) = (self.seats, &self.free, &self.kept);
        self.open.entry(wish).or_insert_with(|| {
            let mut open = Open::default();
            for idx in able(seats, wish) {
                open.n_able += 1;
                if !kept[idx] {
                    open.insert(free[idx].of(wish.0), seats[idx].worker, idx);
                }
            }
            open
        })
    }

    /// The best gang of the first of these kinds that has one: where the job ran before, then the tightest holes, then those
    /// that were lost with it.
    pub(crate) fn gang(&mut self, ask: &Ask<'s>, kinds: &[Device]) -> Option<(Device, Vec<usize>)> {
        let (n_workers, n_devices) = (ask.resources.n_workers.get() as usize, ask.resources.n_devices.get());
        kinds.iter().find_map(|&kind| {
            let before = ask.prefer.difference(ask.avoid).filter_map(|worker| self.by_worker.get(worker).copied());
            let before: BTreeSet<(u32, &WorkerId, usize)> =
                before.map(|idx| (self.free[idx].of(kind), self.seats[idx].worker, idx)).collect();
            let open = self.open((kind, n_devices, &ask.resources.labels));
            let first = before.iter().filter(|(free, worker, _)| *free >= n_devices && open.has(*free, worker));
            let all = || open.by_free.range(n_devices..).flat_map(|(_, alike)| alike.iter());
            let is_other = |worker: &WorkerId| !ask.prefer.contains(worker) && !ask.avoid.contains(worker);
            let rest = all().filter(|(worker, _)| is_other(worker)).map(|(_, idx)| *idx);
            let gang = first.map(|seat| seat.2).chain(rest).take(n_workers);
            let mut gang: Vec<usize> = gang.collect();
            if gang.len() < n_workers && !ask.avoid.is_empty() {
                let last = all().filter(|(worker, _)| ask.avoid.contains(**worker)).map(|(_, idx)| *idx);
                gang.extend(last.take(n_workers - gang.len()));
            }
            (gang.len() == n_workers).then_some((kind, gang))
        })
    }

    /// Whether an empty fleet could hold this job on devices of a kind.
    pub(crate) fn could_hold(&mut self, ask: &Ask<'s>, kind: Device) -> bool {
        let Resources { n_workers, n_devices, labels, .. } = ask.resources;
        self.open((kind, n_devices.get(), labels)).n_able >= n_workers.get() as usize
    }

    /// Keeps the workers that this job will get first; none when the fleet cannot hold it at all. Says whether it kept any.
    pub(crate) fn keep(&mut self, ask: &Ask<'s>, kinds: &[Device]) -> bool {
        let (n_workers, n_devices) = (ask.resources.n_workers.get() as usize, ask.resources.n_devices.get());
        for &kind in kinds {
            let open = self.open((kind, n_devices, &ask.resources.labels));
            if open.len < n_workers {
                continue;
            }
            // The freest ones, by name where they are alike: they only get freer while they are kept, so the choice stays.
            let chosen = open.by_free.values().rev().flat_map(|alike| alike.values().copied());
            let chosen: Vec<usize> = chosen.take(n_workers).collect();
            for idx in chosen {
                self.change(idx, |seats| seats.kept[idx] = true);
            }
            return true;
        }
        false
    }

    /// Takes devices of a seat.
    pub(crate) fn take(&mut self, idx: usize, kind: Device, n_devices: u32) {
        self.change(idx, |seats| seats.free[idx] = seats.free[idx].without(kind, n_devices));
    }

    /// Gives devices of a seat back.
    pub(crate) fn give(&mut self, idx: usize, kind: Device, n_devices: u32) {
        self.change(idx, |seats| seats.free[idx] = seats.free[idx].with(kind, n_devices));
    }

    /// What is free of a seat.
    pub(crate) fn free(&self, idx: usize) -> Devices {
        self.free[idx]
    }

    fn change(&mut self, idx: usize, change: impl FnOnce(&mut Self)) {
        let was_idle = self.is_idle_at(idx);
        let before = self.free[idx];
        change(self);
        self.n_idle = self.n_idle + usize::from(self.is_idle_at(idx)) - usize::from(was_idle);
        let (free, is_kept, worker) = (self.free[idx], self.kept[idx], self.seats[idx].worker);
        for ((kind, ..), open) in &mut self.open {
            if open.remove(before.of(*kind), worker) && !is_kept {
                open.insert(free.of(*kind), worker, idx);
            }
        }
    }

    fn is_idle_at(&self, idx: usize) -> bool {
        !self.kept[idx] && self.free[idx] != Devices::default()
    }
}

/// The seats that could hold a share of such a job if they were empty.
pub(crate) fn able<'s>(
    seats: &'s [Seat<'s>],
    (kind, n_devices, labels): Wish<'s>,
) -> impl Iterator<Item = usize> + use<'s> {
    (0..seats.len()).filter(move |&idx| is_able(&seats[idx], (kind, n_devices, labels)))
}

/// Whether a seat could hold a share of such a job if it were empty.
pub(crate) fn is_able(seat: &Seat<'_>, (kind, n_devices, labels): Wish<'_>) -> bool {
    seat.devices.of(kind) >= n_devices && labels.iter().all(|(name, value)| seat.labels.get(name) == Some(value))
}
