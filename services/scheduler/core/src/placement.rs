//! Which jobs go where: one pure function.
//!
//! The queue is walked by priority, then by age. A gang gets all its workers or none. A job that fits the fleet but not
//! what is free keeps the workers that it is waiting for: nobody behind it is placed there, so a large gang is never
//! starved by small ones, while the rest of the fleet goes on working. A job that fits no fleet of today blocks nobody.
//! Jobs that may share a process are placed together: the first of them takes along those behind it, up to a limit and to
//! what the device's memory is expected to hold. They wait a moment for one another first; meanwhile they keep their place
//! like any job that waits.
//! Among workers that will do, one that ran the job before is taken first (it has the inputs on its disk), then the one
//! with the fewest free devices of the kind, so that large holes stay for large shares.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::num::NonZeroU32;

use attune_spec::id::{Digest, WorkerId};

use crate::seats::{self, Seats};
use crate::{Device, Devices, JobKey, Memory, Resources};

/// A job that waits for a gang.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// The job.
    pub key: &'a JobKey,
    /// What it asks for.
    pub resources: &'a Resources,
    /// The workers that ran it last.
    pub prefer: &'a BTreeSet<WorkerId>,
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

/// Why a queued job is not granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Blocked {
    /// No worker is there that takes new work.
    NoWorkers,
    /// No worker has enough devices of the kind, or the labels.
    NoSuchWorker,
    /// Some have, but fewer than the gang needs.
    TooFewWorkers,
    /// The fleet is large enough; other jobs occupy it.
    Occupied,
    /// Enough is free, but it is kept for a job that goes first.
    Behind,
    /// Enough is free; it waits a moment for jobs to share a process with.
    Gathering,
}

/// Walks the queue, first job first, and returns the gangs that can be granted now. Its jobs ask for at most `n_wishes` different
/// things: it walks no further once each was looked for in vain, or no seat is left that somebody could have.
pub fn place<'a>(
    queue: impl IntoIterator<Item = Ask<'a>>,
    n_wishes: usize,
    seats: &'a [Seat<'a>],
    max_lanes: NonZeroU32,
) -> Vec<Placement> {
    let mut fleet = Seats::new(seats);
    let mut queue = Walk { rest: queue.into_iter(), seen: Vec::new(), is_settled: Vec::new() };
    let mut placements = Vec::new();
    // What found no gang and kept no worker will not later in this walk either: seats only get fewer.
    let mut hopeless: HashSet<&Resources> = HashSet::new();
    let mut at = 0;
    while fleet.is_idle() && hopeless.len() < n_wishes {
        let Some(ask) = queue.get(at) else { break };
        at += 1;
        if queue.is_settled[at - 1] || hopeless.contains(ask.resources) {
            continue;
        }
        let gang = fleet.gang(&ask);
        let memory = |(device, gang): &(Device, Vec<usize>)| {
            gang.iter().filter_map(|&idx| seats[idx].memory.get(device).copied()).min()
        };
        let limit = gang.as_ref().and_then(memory).unwrap_or(u64::MAX);
        let (lanes, is_full) = queue.lanes(at - 1, max_lanes, limit);
        lanes.iter().for_each(|&lane| queue.is_settled[lane] = true);
        // They wait for no more once one of them has waited long enough, or no more of them can be placed together.
        let is_gathered = is_full || lanes.iter().any(|&lane| !queue.seen[lane].gathers);
        let is_found = gang.is_some();
        if let Some((device, gang)) = gang.filter(|_| is_gathered) {
            for &idx in &gang {
                fleet.take(idx, device, ask.resources.n_devices.get());
            }
            let workers = gang.into_iter().map(|idx| seats[idx].worker.clone()).collect();
            let keys = lanes.into_iter().map(|lane| queue.seen[lane].key.clone()).collect();
            placements.push(Placement { keys, device, workers });
        } else if !fleet.keep(&ask) && !is_found {
            hopeless.insert(ask.resources);
        }
    }
    placements
}

/// A queue that is read as far as it is looked at.
struct Walk<'a, I> {
    rest: I,
    seen: Vec<Ask<'a>>,
    is_settled: Vec<bool>,
}

impl<'a, I: Iterator<Item = Ask<'a>>> Walk<'a, I> {
    fn get(&mut self, at: usize) -> Option<Ask<'a>> {
        while self.seen.len() <= at {
            self.seen.push(self.rest.next()?);
            self.is_settled.push(false);
        }
        Some(self.seen[at])
    }

    /// A job that is not settled with those behind it that may share its process and fit `limit` bytes with it, and
    /// whether there is no place for another. The first is placed even where it alone is expected to take more.
    fn lanes(&mut self, first: usize, max_lanes: NonZeroU32, limit: u64) -> (Vec<usize>, bool) {
        let ask = self.seen[first];
        let (mut lanes, mut memory, mut is_full) = (vec![first], ask.memory, false);
        let mut at = first;
        // Who shares with nobody looks no further.
        while lanes.len() < max_lanes.get() as usize && ask.share.is_some() {
            at += 1;
            let Some(other) = self.get(at) else { break };
            if self.is_settled[at] || !ask.fits(&other) {
                continue;
            }
            let together = memory.with(other.memory);
            if together.total() > limit {
                is_full = true;
                continue;
            }
            memory = together;
            lanes.push(at);
        }
        is_full |= lanes.len() == max_lanes.get() as usize;
        (lanes, is_full)
    }
}

/// Why the job at the end of `ahead` is not granted, or nothing when it would be.
pub fn blocked<'a>(
    ahead: impl IntoIterator<Item = Ask<'a>>,
    ask: Ask<'a>,
    seats: &'a [Seat<'a>],
    max_lanes: NonZeroU32,
) -> Option<Blocked> {
    let needed = ask.resources.n_workers.get() as usize;
    let Resources { n_devices, device, labels, .. } = ask.resources;
    let able = |kind: &Device| seats::able(seats, (*kind, n_devices.get(), labels)).count();
    let most = device.kinds().iter().map(able).max().unwrap_or(0);
    if seats.is_empty() {
        Some(Blocked::NoWorkers)
    } else if most == 0 {
        Some(Blocked::NoSuchWorker)
    } else if most < needed {
        Some(Blocked::TooFewWorkers)
    } else if Seats::new(seats).gang(&ask).is_none() {
        Some(Blocked::Occupied)
    } else {
        let queue: Vec<Ask<'a>> = ahead.into_iter().chain([ask]).collect();
        let placed = place(queue.iter().copied(), usize::MAX, seats, max_lanes);
        if placed.iter().any(|placement| placement.keys.contains(ask.key)) {
            return None;
        }
        let waits = |other: &Ask<'_>| other.fits(&ask) && !other.gathers;
        let is_gathering = ask.gathers && !queue.iter().any(waits);
        Some(if is_gathering { Blocked::Gathering } else { Blocked::Behind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Wanted;
    use attune_spec::id::{JobId, Project};
    use std::num::NonZeroU32;

    type Asked = (JobKey, Resources, BTreeSet<WorkerId>, Option<Digest>, bool, Memory);

    fn ask((key, resources, prefer, share, gathers, memory): &Asked) -> Ask<'_> {
        Ask { key, resources, prefer, share: share.as_ref(), gathers: *gathers, memory: *memory }
    }

    fn n_wishes(asks: &[Asked]) -> usize {
        asks.iter().map(|ask| &ask.1).collect::<BTreeSet<_>>().len()
    }

    const MAX_LANES: NonZeroU32 = NonZeroU32::new(3).unwrap();

    /// `name:workers x devices:kind:preferred worker:zone:letter of the share key:bytes`, the last four if wanted; a `~` after
    /// the letter for a job that gathers. The bytes are the job's own, beside 100 for a base.
    fn asks(text: &str) -> Vec<Asked> {
        let number = |text: &str| NonZeroU32::new(text.parse().unwrap()).unwrap();
        text.split_whitespace()
            .map(|ask| {
                let part: Vec<&str> = ask.split(':').collect();
                let (n_workers, n_devices) = part[1].split_once('x').unwrap();
                let resources = Resources {
                    n_workers: number(n_workers),
                    n_devices: number(n_devices),
                    device: part[2].parse::<Wanted>().unwrap(),
                    labels: part
                        .get(4)
                        .filter(|zone| !zone.is_empty())
                        .map(|zone| ("zone".to_owned(), (*zone).to_owned()))
                        .into_iter()
                        .collect(),
                };
                let prefer = part.get(3).filter(|p| !p.is_empty()).map(|p| WorkerId::new(*p).unwrap());
                let share = part.get(5).map(|share| Digest::from_bytes([share.as_bytes()[0]; 32]));
                let gathers = part.get(5).is_some_and(|share| share.ends_with('~'));
                let bytes = part.get(6).map(|own| own.parse().unwrap());
                let memory = bytes.map(|own| Memory { base: 100, own, ..Memory::default() }).unwrap_or_default();
                let key = JobKey::new(Project::default(), JobId::new(part[0]).unwrap());
                (key, resources, prefer.into_iter().collect(), share, gathers, memory)
            })
            .collect()
    }

    type Row = (WorkerId, Devices, Devices, BTreeMap<Device, u64>, BTreeMap<String, String>);

    /// `name:cpu free/cpu:cuda free/cuda`, or with `:zone` and `:bytes of a processor's device` after it.
    fn rows(text: &str) -> Vec<Row> {
        let pair = |text: &str| {
            let (free, all) = text.split_once('/').unwrap();
            (free.parse::<u32>().unwrap(), all.parse::<u32>().unwrap())
        };
        text.split_whitespace()
            .map(|seat| {
                let part: Vec<&str> = seat.split(':').collect();
                let ((cpu_free, n_cpu), (cuda_free, n_cuda)) = (pair(part[1]), pair(part[2]));
                let labels = part.get(3).map(|zone| ("zone".to_owned(), (*zone).to_owned())).into_iter().collect();
                let memory = part.get(4).map(|bytes| (Device::Cpu, bytes.parse().unwrap())).into_iter().collect();
                let worker = WorkerId::new(part[0]).unwrap();
                (worker, Devices { n_cpu, n_cuda }, Devices { n_cpu: cpu_free, n_cuda: cuda_free }, memory, labels)
            })
            .collect()
    }

    fn seats(rows: &[Row]) -> Vec<Seat<'_>> {
        rows.iter()
            .map(|(worker, devices, free, memory, labels)| Seat {
                worker,
                devices: *devices,
                free: *free,
                memory,
                labels,
            })
            .collect()
    }

    fn placed(queue: &str, fleet: &str) -> String {
        let (asks, rows) = (asks(queue), rows(fleet));
        let text = |p: &Placement| {
            let workers: Vec<&str> = p.workers.iter().map(WorkerId::as_str).collect();
            let jobs: Vec<&str> = p.keys.iter().map(|key| key.job.as_str()).collect();
            format!("{}={}@{}", jobs.join("+"), p.device, workers.join("+"))
        };
        place(asks.iter().map(ask), n_wishes(&asks), &seats(&rows), MAX_LANES)
            .iter()
            .map(text)
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// The definition: all seats are looked at for each job.
    fn by_definition(queue: &[Ask<'_>], seats: &[Seat<'_>]) -> Vec<Placement> {
        let able = |ask: &Ask<'_>, kind: Device| -> Vec<usize> {
            let labels = &ask.resources.labels;
            let fits = |seat: &Seat<'_>| {
                seat.devices.of(kind) >= ask.resources.n_devices.get()
                    && labels.iter().all(|(name, value)| seat.labels.get(name) == Some(value))
            };
            (0..seats.len()).filter(|&idx| fits(&seats[idx])).collect()
        };
        let mut free: Vec<Devices> = seats.iter().map(|seat| seat.free).collect();
        let mut kept = vec![false; seats.len()];
        let mut is_settled = vec![false; queue.len()];
        let mut placements = Vec::new();
        for at in 0..queue.len() {
            let ask = &queue[at];
            if is_settled[at] {
                continue;
            }
            let (n_workers, n_devices) = (ask.resources.n_workers.get() as usize, ask.resources.n_devices.get());
            let gang = ask.resources.device.kinds().iter().find_map(|&kind| {
                let of = |idx: usize| if kept[idx] { 0 } else { free[idx].of(kind) };
                let mut fit: Vec<usize> = able(ask, kind).into_iter().filter(|&idx| of(idx) >= n_devices).collect();
                fit.sort_by_key(|&idx| (!ask.prefer.contains(seats[idx].worker), of(idx), seats[idx].worker));
                fit.truncate(n_workers);
                (fit.len() == n_workers).then_some((kind, fit))
            });
            let memory = |(device, gang): &(Device, Vec<usize>)| {
                gang.iter().filter_map(|&idx| seats[idx].memory.get(device).copied()).min()
            };
            let limit = gang.as_ref().and_then(memory).unwrap_or(u64::MAX);
            let (mut lanes, mut together, mut is_full) = (vec![at], ask.memory, false);
            for other in (at + 1..queue.len()).filter(|&other| !is_settled[other] && ask.fits(&queue[other])) {
                if lanes.len() == MAX_LANES.get() as usize {
                    break;
                }
                let more = together.with(queue[other].memory);
                if more.total() > limit {
                    is_full = true;
                } else {
                    together = more;
                    lanes.push(other);
                }
            }
            is_full |= lanes.len() == MAX_LANES.get() as usize;
            lanes.iter().for_each(|&lane| is_settled[lane] = true);
            let is_gathered = is_full || lanes.iter().any(|&lane| !queue[lane].gathers);
            if let Some((device, gang)) = gang.filter(|_| is_gathered) {
                gang.iter().for_each(|&idx| free[idx] = free[idx].without(device, n_devices));
                let workers = gang.iter().map(|&idx| seats[idx].worker.clone()).collect();
                let keys = lanes.iter().map(|&lane| queue[lane].key.clone()).collect();
                placements.push(Placement { keys, device, workers });
                continue;
            }
            for &kind in ask.resources.device.kinds() {
                let mut fit: Vec<usize> = able(ask, kind).into_iter().filter(|&idx| !kept[idx]).collect();
                if fit.len() >= n_workers {
                    fit.sort_by_key(|&idx| (std::cmp::Reverse(free[idx].of(kind)), seats[idx].worker));
                    fit[..n_workers].iter().for_each(|&idx| kept[idx] = true);
                    break;
                }
            }
        }
        placements
    }

    #[test]
    fn placements() {
        let table = [
            ("an empty fleet takes nothing", "a:1x1:any", "", ""),
            ("first come, first placed", "a:1x1:any b:1x1:any", "w:1/1:0/0", "a=cpu@w"),
            ("cards before processors", "a:1x1:any", "w:4/4:1/1", "a=cuda@w"),
            ("processors when cards are taken", "a:1x1:any", "w:4/4:0/1", "a=cpu@w"),
            ("the kind asked for", "a:1x1:cpu", "w:4/4:1/1", "a=cpu@w"),
            ("a gang has distinct workers", "a:2x1:cpu", "w:4/4:0/0", ""),
            ("a gang whole", "a:2x2:cpu", "v:2/2:0/0 w:2/2:0/0", "a=cpu@v+w"),
            ("a gang of one kind", "a:2x1:any", "v:0/1:1/1 w:1/1:0/1", ""),
            ("where it ran before", "a:1x1:cpu:w", "v:1/1:0/0 w:9/9:0/0", "a=cpu@w"),
            ("the tightest hole", "a:1x1:cpu", "v:4/4:0/0 w:2/4:0/0", "a=cpu@w"),
            ("nobody overtakes onto kept workers", "a:2x2:cpu b:1x1:cpu", "v:1/2:0/0 w:2/2:0/0", ""),
            ("others work on", "a:2x2:cpu b:1x1:cpu", "u:1/1:0/0 v:1/2:0/0 w:2/2:0/0", "b=cpu@u"),
            ("what fits no fleet blocks nobody", "a:3x1:cpu b:1x1:cpu", "v:1/1:0/0 w:1/1:0/0", "b=cpu@v"),
            ("labels", "a:1x1:cpu::eu", "v:1/1:0/0:us w:1/1:0/0:eu", "a=cpu@w"),
            ("lanes take one place", "a:1x1:cpu:::k b:1x1:cpu c:1x1:cpu:::k", "w:2/2:0/0", "a+c=cpu@w b=cpu@w"),
            ("keys are kept apart", "a:1x1:cpu:::k b:1x1:cpu:::l", "w:1/1:0/0", "a=cpu@w"),
            ("and resources", "a:1x1:cpu:::k b:1x1:any:::k", "w:1/1:0/0", "a=cpu@w"),
            (
                "so many and no more",
                "a:1x1:cpu:::k b:1x1:cpu:::k c:1x1:cpu:::k d:1x1:cpu:::k",
                "w:1/1:0/0",
                "a+b+c=cpu@w",
            ),
            (
                "the rest goes on",
                "a:1x1:cpu:::k b:1x1:cpu:::k c:1x1:cpu:::k d:1x1:cpu:::k",
                "w:2/2:0/0",
                "a+b+c=cpu@w d=cpu@w",
            ),
            ("they gather", "a:1x1:cpu:::k~ b:1x1:cpu:::k~", "w:1/1:0/0", ""),
            ("until one has waited", "a:1x1:cpu:::k~ b:1x1:cpu:::k", "w:1/1:0/0", "a+b=cpu@w"),
            ("or they are enough", "a:1x1:cpu:::k~ b:1x1:cpu:::k~ c:1x1:cpu:::k~", "w:1/1:0/0", "a+b+c=cpu@w"),
            (
                "who gathers keeps one place",
                "a:1x1:cpu:::k~ b:1x1:cpu:::k~ c:1x1:cpu",
                "v:1/1:0/0 w:1/1:0/0",
                "c=cpu@w",
            ),
            (
                "no more than memory holds",
                "a:1x1:cpu:::k:5 b:1x1:cpu:::k:6 c:1x1:cpu:::k:4",
                "w:2/2:0/0::109",
                "a+c=cpu@w b=cpu@w",
            ),
            ("which they wait for no longer", "a:1x1:cpu:::k~:5 b:1x1:cpu:::k~:5", "w:1/1:0/0::109", "a=cpu@w"),
            ("one alone tries", "a:1x1:cpu:::k:50", "w:1/1:0/0::109", "a=cpu@w"),
            ("of memory that is unknown there is enough", "a:1x1:cpu:::k:50 b:1x1:cpu:::k:9", "w:1/1:0/0", "a+b=cpu@w"),
        ];
        for (name, queue, fleet, expected) in table {
            assert_eq!(placed(queue, fleet), expected, "{name}");
        }
    }

    #[test]
    fn the_reason_for_waiting_is_named() {
        let table = [
            ("", "a:1x1:any", "", Some(Blocked::NoWorkers)),
            ("", "a:1x1:cuda", "w:4/4:0/0", Some(Blocked::NoSuchWorker)),
            ("", "a:2x1:cpu", "w:4/4:0/0", Some(Blocked::TooFewWorkers)),
            ("", "a:1x2:cpu", "w:1/4:0/0", Some(Blocked::Occupied)),
            ("b:1x4:cpu", "a:1x2:cpu", "w:4/4:0/0", Some(Blocked::Behind)),
            ("b:1x2:cpu", "a:1x2:cpu", "w:4/4:0/0", None),
            ("", "a:1x1:cpu:::k~", "w:1/1:0/0", Some(Blocked::Gathering)),
            ("b:1x1:cpu:::k~", "a:1x1:cpu:::k~", "w:1/1:0/0", Some(Blocked::Gathering)),
            ("b:1x1:cpu:::k", "a:1x1:cpu:::k~", "w:1/1:0/0", None),
            ("b:1x2:cpu", "a:1x1:cpu:::k", "w:1/2:0/0", Some(Blocked::Behind)),
        ];
        for (ahead, asked, fleet, expected) in table {
            let (ahead, asked, rows) = (asks(ahead), asks(asked), rows(fleet));
            let found = blocked(ahead.iter().map(ask), ask(&asked[0]), &seats(&rows), MAX_LANES);
            assert_eq!(found, expected, "{} on {fleet}", asked[0].0);
        }
    }

    /// Workers, devices, kind, zone, key to share by, bytes and the worker that it ran on before.
    type Drawn = (u32, u32, usize, usize, usize, u64, usize);

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]
        #[test]
        fn gangs_are_whole_and_one_look_is_enough(
            queue in proptest::collection::vec((1_u32..4, 1_u32..4, 0_usize..3, 0_usize..3, 0_usize..4, 0_u64..9, 0_usize..9), 0..9),
            fleet in proptest::collection::vec((0_u32..5, 0_u32..5, 0_u32..3, 0_u32..3, 0_usize..2), 0..7),
        ) {
            let (kinds, zones) = (["any", "cpu", "cuda"], ["", "us", "eu"]);
            let written = |(n, ask): (usize, &Drawn)| {
                let (workers, devices, kind, zone, share, bytes, before) = *ask;
                let prefer = if before < 4 { format!("w{before}") } else { String::new() };
                let share = ["", ":k", ":k~", ":l~"][share];
                let bytes = if share.is_empty() { String::new() } else { format!(":{bytes}") };
                format!("j{n}:{workers}x{devices}:{}:{prefer}:{}{share}{bytes}", kinds[kind], zones[zone])
            };
            let seat = |(n, &(cpu, n_cpu, cuda, n_cuda, zone)): (usize, &(u32, u32, u32, u32, usize))| {
                format!("w{n}:{}/{n_cpu}:{}/{n_cuda}:{}:109", cpu.min(n_cpu), cuda.min(n_cuda), zones[1 + zone])
            };
            let asks = asks(&queue.iter().enumerate().map(written).collect::<Vec<_>>().join(" "));
            let mut rows = rows(&fleet.iter().enumerate().map(seat).collect::<Vec<_>>().join(" "));
            let queue = || asks.iter().map(ask);
            let placements = place(queue(), n_wishes(&asks), &seats(&rows), MAX_LANES);

            let all: Vec<Ask<'_>> = queue().collect();
            proptest::prop_assert_eq!(&placements, &by_definition(&all, &seats(&rows)));
            // The order in which workers are listed decides nothing.
            let reversed: Vec<Row> = rows.iter().rev().cloned().collect();
            proptest::prop_assert_eq!(&placements, &place(queue(), usize::MAX, &seats(&reversed), MAX_LANES));
            for Placement { keys, device, workers } in &placements {
                let lanes: Vec<&Asked> = asks.iter().filter(|(asked, ..)| keys.contains(asked)).collect();
                let (_, resources, _, share, ..) = lanes[0];
                proptest::prop_assert!(lanes.len() == keys.len() && keys.len() <= MAX_LANES.get() as usize);
                proptest::prop_assert!(lanes.len() == 1 || share.is_some());
                proptest::prop_assert!(lanes.iter().all(|lane| (&lane.1, &lane.3) == (resources, share)));
                let memory = lanes.iter().map(|lane| lane.5).reduce(Memory::with).unwrap_or_default();
                proptest::prop_assert!(lanes.len() == 1 || *device != Device::Cpu || memory.total() <= 109);
                let distinct: BTreeSet<_> = workers.iter().collect();
                proptest::prop_assert_eq!((workers.len(), distinct.len()), (resources.n_workers.get() as usize, workers.len()));
                proptest::prop_assert!(resources.device.kinds().contains(device));
                for (worker, _, free, _, labels) in &mut rows {
                    if workers.contains(worker) {
                        proptest::prop_assert!(free.of(*device) >= resources.n_devices.get());
                        proptest::prop_assert!(resources.labels.iter().all(|(name, value)| labels.get(name) == Some(value)));
                        *free = free.without(*device, resources.n_devices.get());
                    }
                }
            }
            let rest = queue().filter(|ask| placements.iter().all(|placement| !placement.keys.contains(ask.key)));
            proptest::prop_assert_eq!(place(rest, n_wishes(&asks), &seats(&rows), MAX_LANES), Vec::new());
        }
    }
}
