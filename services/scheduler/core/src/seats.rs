//! The seats of a fleet, found by what is free of them.
//!
//! Jobs that ask for the same (a number of devices of a kind, and labels) see the same seats in the same order, so each such wish has them
//! sorted once, and a seat that changes moves in each. A look for a gang then costs what the gang is large, however large the fleet
//! is. Seats are numbered in the order of their workers' names, so that sets of them are bits and no name is compared. The sets that a
//! wish begins with are made of those of all seats by their devices, a word at a time.

use std::collections::{BTreeMap, BTreeSet};

use attune_spec::id::WorkerId;

use crate::placement::{Ask, Seat};
use crate::{Device, Devices, Fleet, Resources};

/// What jobs ask of a seat.
pub(crate) type Wish<'s> = (Device, u32, &'s BTreeMap<String, String>);

/// A set of numbers of seats.
#[derive(Debug, Default)]
struct Numbers {
    words: Vec<u64>,
    len: usize,
    /// The first word that has a bit, where one has.
    first: usize,
}

impl Numbers {
    fn insert(&mut self, number: usize) {
        let (word, bit) = (number / 64, 1 << (number % 64));
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.first = if self.len == 0 { word } else { self.first.min(word) };
        self.len += usize::from(self.words[word] & bit == 0);
        self.words[word] |= bit;
    }

    fn remove(&mut self, number: usize) -> bool {
        let was_there = self.contains(number);
        if was_there {
            self.words[number / 64] &= !(1 << (number % 64));
            self.len -= 1;
            while self.words.get(self.first) == Some(&0) {
                self.first += 1;
            }
        }
        was_there
    }

    fn of(words: Vec<u64>) -> Self {
        let len = words.iter().map(|word| word.count_ones() as usize).sum();
        let first = words.iter().position(|word| *word != 0).unwrap_or(words.len());
        Self { words, len, first }
    }

    /// Those that are in one or both.
    fn or(&self, others: &Self) -> Self {
        let n_words = self.words.len().max(others.words.len());
        Self::of((0..n_words).map(|at| self.word(at) | others.word(at)).collect())
    }

    /// Those that are in both, and not among `gone`.
    fn and(&self, others: &Self, gone: &Self) -> Self {
        Self::of((0..self.words.len()).map(|at| self.word(at) & others.word(at) & !gone.word(at)).collect())
    }

    fn word(&self, at: usize) -> u64 {
        self.words.get(at).copied().unwrap_or_default()
    }

    /// The smallest.
    fn first(&self) -> Option<usize> {
        let word = self.word(self.first);
        (word != 0).then(|| 64 * self.first + word.trailing_zeros() as usize)
    }

    fn contains(&self, number: usize) -> bool {
        self.words.get(number / 64).is_some_and(|word| word & 1 << (number % 64) != 0)
    }

    /// All of them, smallest first.
    fn iter(&self) -> impl Iterator<Item = usize> {
        let bits = |(word, mut bits): (usize, u64)| {
            std::iter::from_fn(move || {
                let bit = bits.trailing_zeros() as usize;
                (bits != 0).then(|| {
                    bits &= bits - 1;
                    64 * word + bit
                })
            })
        };
        self.words.iter().copied().enumerate().skip(self.first).flat_map(bits)
    }
}

/// The seats that a wish could have if they were empty and that nobody keeps: by what is free of its kind, then by name.
#[derive(Debug, Default)]
struct Open {
    by_free: Levels,
    len: usize,
    /// The same with those that somebody keeps.
    able: Numbers,
}

impl Open {
    fn insert(&mut self, free: u32, number: usize) {
        self.by_free.entry(free).or_default().insert(number);
        self.len += 1;
    }

    fn remove(&mut self, free: u32, number: usize) -> bool {
        let was_there = self.by_free.get_mut(&free).is_some_and(|alike| alike.remove(number));
        self.len -= usize::from(was_there);
        was_there
    }

    fn has(&self, free: u32, number: usize) -> bool {
        self.by_free.get(&free).is_some_and(|alike| alike.contains(number))
    }
}

/// The seats that are there by how many devices of a kind they have.
type Levels = BTreeMap<u32, Numbers>;

/// A fleet in which seats are taken and kept.
#[derive(Debug)]
pub(crate) struct Seats<'s> {
    /// In the order of their workers' names: a seat's number is its place here.
    seats: &'s [Seat<'s>],
    /// Those that are not there yet.
    absent: Numbers,
    /// All that the others have.
    whole: Fleet,
    free: Vec<Devices>,
    kept: Numbers,
    /// Seats of which something is free and that nobody keeps.
    n_idle: usize,
    /// The seats by all their devices of each kind, and by those that are free.
    by_devices: BTreeMap<Device, (Levels, Levels)>,
    open: BTreeMap<Wish<'s>, Open>,
}

impl<'s> Seats<'s> {
    /// A fleet of seats in the order of their workers' names.
    pub(crate) fn new(seats: &'s [Seat<'s>]) -> Self {
        Self::without(seats, |_| false)
    }

    /// The same in which some are not there yet.
    pub(crate) fn without(seats: &'s [Seat<'s>], is_absent: impl Fn(usize) -> bool) -> Self {
        debug_assert!(seats.is_sorted_by_key(|seat| seat.worker), "seats are in order");
        let mut fleet = Self {
            seats,
            absent: (0..seats.len()).filter(|at| is_absent(*at)).collect(),
            whole: Fleet::default(),
            free: seats.iter().map(|seat| seat.free).collect(),
            kept: Numbers::default(),
            n_idle: 0,
            by_devices: BTreeMap::new(),
            open: BTreeMap::new(),
        };
        let there: Vec<usize> = (0..seats.len()).filter(|at| !fleet.absent.contains(*at)).collect();
        fleet.come(&there);
        fleet
    }

    /// Those come that were not there, and nobody keeps anything any more; what is taken stays so.
    pub(crate) fn widen(&mut self) {
        self.kept = Numbers::default();
        let absent: Vec<usize> = std::mem::take(&mut self.absent).iter().collect();
        self.come(&absent);
    }

    fn come(&mut self, new: &[usize]) {
        new.iter().for_each(|number| self.whole.add(&self.seats[*number]));
        for kind in [Device::Cpu, Device::Cuda] {
            let (all, free) = self.by_devices.entry(kind).or_default();
            for &number in new {
                all.entry(self.seats[number].devices.of(kind)).or_default().insert(number);
                free.entry(self.free[number].of(kind)).or_default().insert(number);
            }
        }
        self.n_idle = (0..self.seats.len()).filter(|at| !self.absent.contains(*at) && self.is_idle_at(*at)).count();
        // Whoever looks for a wish next finds it anew.
        self.open.clear();
    }

    /// All that the seats have that are there.
    pub(crate) fn whole(&self) -> Fleet {
        self.whole
    }

    /// Whether there is a seat that a job could have.
    pub(crate) fn is_idle(&self) -> bool {
        self.n_idle > 0
    }

    /// The smallest memory of the devices of a kind of some seats, as far as it is known.
    pub(crate) fn memory(&self, kind: Device, gang: &[usize]) -> Option<u64> {
        gang.iter().filter_map(|&idx| self.seats[idx].memory.get(&kind).copied()).min()
    }

    fn open(&mut self, wish: Wish<'s>) -> &Open {
        let Self { seats, kept, by_devices, open, .. } = self;
        open.entry(wish).or_insert_with(|| {
            let (kind, n_devices, labels) = wish;
            let Some((all, free)) = by_devices.get(&kind) else { return Open::default() };
            let mut able = all.range(n_devices..).fold(Numbers::default(), |able, (_, more)| able.or(more));
            if !labels.is_empty() {
                able = able.iter().filter(|number| is_able(&seats[*number], wish)).collect();
            }
            let by_free: Levels = free.iter().map(|(n, alike)| (*n, alike.and(&able, kept))).collect();
            Open { len: by_free.values().map(|alike| alike.len).sum(), by_free, able }
        })
    }

    /// The number of a worker's seat.
    fn number(&self, worker: &WorkerId) -> Option<usize> {
        self.seats.binary_search_by(|seat| seat.worker.cmp(worker)).ok()
    }

    /// The best gang of the first of these kinds that has one: where the job ran before, then the tightest holes, then those
    /// that were lost with it.
    pub(crate) fn gang(&mut self, ask: &Ask<'s>, kinds: &[Device]) -> Option<(Device, Vec<usize>)> {
        let (n_workers, n_devices) = (ask.resources.n_workers.get() as usize, ask.resources.n_devices.get());
        kinds.iter().find_map(|&kind| {
            let before = ask.prefer.difference(ask.avoid).filter_map(|worker| self.number(worker));
            let before: BTreeSet<(u32, usize)> = before.map(|number| (self.free[number].of(kind), number)).collect();
            self.open((kind, n_devices, &ask.resources.labels));
            let open = &self.open[&(kind, n_devices, &ask.resources.labels)];
            let worker = |number: &usize| self.seats[*number].worker;
            let first = before.iter().filter(|(free, number)| *free >= n_devices && open.has(*free, *number));
            let all = || open.by_free.range(n_devices..).flat_map(|(_, alike)| alike.iter());
            let is_new = ask.prefer.is_empty() && ask.avoid.is_empty();
            let is_other =
                |number: &usize| is_new || !ask.prefer.contains(worker(number)) && !ask.avoid.contains(worker(number));
            let gang = first.map(|(_, number)| *number).chain(all().filter(is_other)).take(n_workers);
            let mut gang: Vec<usize> = gang.collect();
            if gang.len() < n_workers && !ask.avoid.is_empty() {
                let last = all().filter(|number| ask.avoid.contains(worker(number)));
                gang.extend(last.take(n_workers - gang.len()));
            }
            (gang.len() == n_workers).then_some((kind, gang))
        })
    }

    /// Whether an empty fleet could hold this job on devices of a kind.
    pub(crate) fn could_hold(&mut self, ask: &Ask<'s>, kind: Device) -> bool {
        let Resources { n_workers, n_devices, labels, .. } = ask.resources;
        self.open((kind, n_devices.get(), labels)).able.len >= n_workers.get() as usize
    }

    /// The seats that could hold a share of a job that asks for one of these if they were empty.
    pub(crate) fn able(&mut self, wanted: impl Iterator<Item = &'s Resources>) -> Vec<usize> {
        let mut able = Numbers::default();
        for Resources { n_devices, device, labels, .. } in wanted {
            for kind in device.kinds() {
                able = able.or(&self.open((*kind, n_devices.get(), labels)).able);
            }
        }
        able.iter().collect()
    }

    /// Keeps the workers that this job will get first; none when the fleet cannot hold it at all. Says whether it kept any.
    pub(crate) fn keep(&mut self, ask: &Ask<'s>, kinds: &[Device]) -> bool {
        let (n_workers, n_devices) = (ask.resources.n_workers.get() as usize, ask.resources.n_devices.get());
        for &kind in kinds {
            let wish = (kind, n_devices, &ask.resources.labels);
            if self.open(wish).len < n_workers {
                continue;
            }
            for _ in 0..n_workers {
                // The freest ones, by name where they are alike: they only get freer while they are kept, so the choice stays.
                let freest = self.open(wish).by_free.values().rev().find_map(Numbers::first);
                freest.into_iter().for_each(|number| self.keep_one(number));
            }
            return true;
        }
        false
    }

    /// Takes devices of a seat.
    pub(crate) fn take(&mut self, idx: usize, kind: Device, n_devices: u32) {
        self.change(idx, self.free[idx].without(kind, n_devices));
    }

    /// Gives devices of a seat back.
    pub(crate) fn give(&mut self, idx: usize, kind: Device, n_devices: u32) {
        self.change(idx, self.free[idx].with(kind, n_devices));
    }

    /// What is free of a seat.
    pub(crate) fn free(&self, idx: usize) -> Devices {
        self.free[idx]
    }

    fn keep_one(&mut self, number: usize) {
        self.n_idle -= usize::from(self.is_idle_at(number));
        self.kept.insert(number);
        for ((kind, ..), open) in &mut self.open {
            open.remove(self.free[number].of(*kind), number);
        }
    }

    fn change(&mut self, number: usize, free: Devices) {
        let was_idle = self.is_idle_at(number);
        let before = std::mem::replace(&mut self.free[number], free);
        self.n_idle = self.n_idle + usize::from(self.is_idle_at(number)) - usize::from(was_idle);
        for (kind, (_, by_free)) in &mut self.by_devices {
            let (before, free) = (before.of(*kind), free.of(*kind));
            if before != free && by_free.get_mut(&before).is_some_and(|alike| alike.remove(number)) {
                by_free.entry(free).or_default().insert(number);
            }
        }
        for ((kind, ..), open) in &mut self.open {
            let (before, free) = (before.of(*kind), free.of(*kind));
            if before != free && open.remove(before, number) {
                open.insert(free, number);
            }
        }
    }

    fn is_idle_at(&self, number: usize) -> bool {
        self.free[number] != Devices::default() && !self.kept.contains(number)
    }
}

impl FromIterator<usize> for Numbers {
    fn from_iter<I: IntoIterator<Item = usize>>(numbers: I) -> Self {
        let mut all = Self::default();
        numbers.into_iter().for_each(|number| all.insert(number));
        all
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

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use attune_spec::id::{JobId, Project};
    use proptest::prelude::*;

    use super::*;
    use crate::{JobKey, Memory, Wanted};

    /// The same by looking at every seat each time.
    struct Plain<'s> {
        seats: &'s [Seat<'s>],
        free: Vec<Devices>,
        kept: Vec<bool>,
    }

    impl Plain<'_> {
        fn gang(&self, ask: &Ask<'_>, kinds: &[Device]) -> Option<(Device, Vec<usize>)> {
            let Resources { n_workers, n_devices, labels, .. } = ask.resources;
            kinds.iter().find_map(|&kind| {
                let able = able(self.seats, (kind, n_devices.get(), labels));
                let has = |idx: &usize| !self.kept[*idx] && self.free[*idx].of(kind) >= n_devices.get();
                let mut gang: Vec<usize> = able.filter(has).collect();
                gang.sort_by_key(|&idx| {
                    let worker = self.seats[idx].worker;
                    let (lost, before) = (ask.avoid.contains(worker), ask.prefer.contains(worker));
                    (lost, lost || !before, self.free[idx].of(kind), worker)
                });
                gang.truncate(n_workers.get() as usize);
                (gang.len() == n_workers.get() as usize).then_some((kind, gang))
            })
        }

        fn keep(&mut self, ask: &Ask<'_>, kinds: &[Device]) -> bool {
            let Resources { n_workers, n_devices, labels, .. } = ask.resources;
            for &kind in kinds {
                let able = able(self.seats, (kind, n_devices.get(), labels));
                let mut open: Vec<usize> = able.filter(|idx| !self.kept[*idx]).collect();
                if open.len() >= n_workers.get() as usize {
                    open.sort_by_key(|&idx| (std::cmp::Reverse(self.free[idx].of(kind)), self.seats[idx].worker));
                    open[..n_workers.get() as usize].iter().for_each(|idx| self.kept[*idx] = true);
                    return true;
                }
            }
            false
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// More seats than a word has bits, in any order of names, through a long walk.
        #[test]
        fn seats_are_found_as_if_each_were_looked_at(
            fleet in proptest::collection::vec((0_u32..6, 0_u32..6, 0_u32..3, 0_u32..3, 0_u32..2), 0..200),
            order in any::<u64>(),
            asks in proptest::collection::vec((1_u32..4, 1_u32..5, 0_usize..3, 0_u32..3, 0_usize..250, 0_usize..250), 0..150),
        ) {
            let name = |idx: usize| {
                let mixed = (idx as u64 * 7919 + order % 1000) % 997;
                WorkerId::new(format!("w{mixed:03}-{idx}")).unwrap()
            };
            let mut names: Vec<WorkerId> = (0..fleet.len()).map(name).collect();
            names.sort_unstable();
            let zone = |zone: u32| BTreeMap::from([("zone".to_owned(), zone.to_string())]);
            let labels: Vec<BTreeMap<String, String>> = fleet.iter().map(|seat| zone(seat.4)).collect();
            let memory = BTreeMap::new();
            let seats: Vec<Seat<'_>> = (0..fleet.len())
                .map(|idx| {
                    let (free_cpu, n_cpu, free_cuda, n_cuda, _) = fleet[idx];
                    let free = Devices { n_cpu: free_cpu.min(n_cpu), n_cuda: free_cuda.min(n_cuda) };
                    let devices = Devices { n_cpu, n_cuda };
                    Seat { worker: &names[idx], devices, free, memory: &memory, labels: &labels[idx] }
                })
                .collect();
            let key = JobKey::new(Project::default(), JobId::new("j").unwrap());
            let wanted: Vec<_> = asks
                .iter()
                .map(|&(n_workers, n_devices, device, in_zone, before, lost)| {
                    let (n_workers, n_devices) = (NonZeroU32::new(n_workers).unwrap(), NonZeroU32::new(n_devices).unwrap());
                    let device = [Wanted::Any, Wanted::Only(Device::Cpu), Wanted::Only(Device::Cuda)][device];
                    let labels = if in_zone < 2 { zone(in_zone) } else { BTreeMap::new() };
                    let one = |at: usize| names.get(at).cloned().into_iter().collect::<BTreeSet<_>>();
                    (Resources { n_workers, n_devices, device, labels }, one(before), one(lost))
                })
                .collect();
            let mut fast = Seats::new(&seats);
            let mut plain = Plain { seats: &seats, free: seats.iter().map(|seat| seat.free).collect(), kept: vec![false; seats.len()] };
            let mut taken = Vec::new();
            for (step, (resources, prefer, avoid)) in wanted.iter().enumerate() {
                let (share, memory) = (None, Memory::default());
                let ask = Ask { key: &key, priority: 0, order: 0, resources, prefer, avoid, share, gathers: false, memory };
                let kinds = resources.device.kinds();
                let found = fast.gang(&ask, kinds);
                prop_assert_eq!(&found, &plain.gang(&ask, kinds));
                match found {
                    Some((kind, gang)) => {
                        let n = resources.n_devices.get();
                        for idx in gang {
                            fast.take(idx, kind, n);
                            plain.free[idx] = plain.free[idx].without(kind, n);
                            taken.push((idx, kind, n));
                        }
                    }
                    None if step % 3 == 0 => prop_assert_eq!(fast.keep(&ask, kinds), plain.keep(&ask, kinds)),
                    None => {
                        if let Some((idx, kind, n)) = taken.pop() {
                            fast.give(idx, kind, n);
                            plain.free[idx] = plain.free[idx].with(kind, n);
                        }
                    }
                }
                let is_idle = (0..seats.len()).any(|idx| !plain.kept[idx] && plain.free[idx] != Devices::default());
                prop_assert_eq!(fast.is_idle(), is_idle);
                for &kind in kinds {
                    let n_able = able(&seats, (kind, resources.n_devices.get(), &resources.labels)).count();
                    prop_assert_eq!(fast.could_hold(&ask, kind), n_able >= resources.n_workers.get() as usize);
                }
            }
        }
    }
}
