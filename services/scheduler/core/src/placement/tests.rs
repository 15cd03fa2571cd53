//! Placements by hand, by the plain definition, and their properties.

use std::cmp::Reverse;

use super::*;
use crate::Fleet;
use crate::Wanted;
use attune_spec::id::{JobId, Project};
use std::num::NonZeroU32;

type Asked = (JobKey, Resources, BTreeSet<WorkerId>, Option<Digest>, bool, Memory, i32, u64);

fn ask((key, resources, prefer, share, gathers, memory, priority, order): &Asked) -> Ask<'_> {
    let (priority, order) = (*priority, *order);
    let (share, avoid) = (share.as_ref(), &NOBODY);
    Ask { key, priority, order, resources, prefer, avoid, share, gathers: *gathers, memory: *memory }
}

static NOBODY: BTreeSet<WorkerId> = BTreeSet::new();

/// A walk on which all jobs that wait are known.
const ALL: Extent = Extent::Waiting { least: None };

type Tenants = BTreeMap<Project, (Policy, Usage)>;

/// The projects of some jobs with these, in their order.
fn lines<'a>(asks: &'a [Asked], tenants: &Tenants) -> Vec<(Tenant, Vec<std::vec::IntoIter<Ask<'a>>>)> {
    let projects: BTreeSet<&Project> = asks.iter().map(|asked| &asked.0.project).collect();
    let line = |project: &Project| {
        let mut own: Vec<Ask<'a>> = asks.iter().filter(|asked| asked.0.project == *project).map(ask).collect();
        own.sort_by_key(|ask| (ask.resources, Reverse(ask.priority), ask.order));
        let groups = own.chunk_by(|ask, next| ask.resources == next.resources);
        let (policy, usage) = tenants.get(project).copied().unwrap_or_default();
        (Tenant { policy, usage }, groups.map(|group| Vec::from(group).into_iter()).collect())
    };
    projects.into_iter().map(line).collect()
}

/// `name:weight:most processors:processors in use`, `-` for no limit.
fn tenants(text: &str) -> Tenants {
    let tenant = |text: &str| {
        let part: Vec<&str> = text.split(':').collect();
        let used: u32 = part[3].parse().unwrap();
        let policy = Policy { weight: part[1].parse().unwrap(), max_cpu: part[2].parse().ok(), ..Policy::default() };
        (Project::new(part[0]).unwrap(), (policy, Usage::of_gang(Device::Cpu, used, 1, Memory::default())))
    };
    text.split_whitespace().map(tenant).collect()
}

const MAX_LANES: NonZeroU32 = NonZeroU32::new(3).unwrap();

/// `name:workers x devices:kind:preferred worker:zone:letter of the share key:bytes`, the last four if wanted; a `~` after
/// the letter for a job that gathers. The bytes are the job's own, beside 100 for a base. A name is `project/job!priority`, the first
/// and the last if wanted.
fn asks(text: &str) -> Vec<Asked> {
    let number = |text: &str| NonZeroU32::new(text.parse().unwrap()).unwrap();
    text.split_whitespace()
        .zip(0..)
        .map(|(ask, order)| {
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
            let (name, priority) = part[0].split_once('!').unwrap_or((part[0], "0"));
            let (project, name) = name.split_once('/').unwrap_or(("default", name));
            let key = JobKey::new(Project::new(project).unwrap(), JobId::new(name).unwrap());
            let (prefer, priority) = (prefer.into_iter().collect(), priority.parse().unwrap());
            (key, resources, prefer, share, gathers, memory, priority, order)
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
    let mut seats: Vec<Seat<'_>> = rows
        .iter()
        .map(|(worker, devices, free, memory, labels)| Seat { worker, devices: *devices, free: *free, memory, labels })
        .collect();
    seats.sort_by_key(|seat| seat.worker);
    seats
}

fn placed(queue: &str, fleet: &str) -> String {
    placed_for("", queue, fleet)
}

fn placed_for(projects: &str, queue: &str, fleet: &str) -> String {
    let (asks, rows) = (asks(queue), rows(fleet));
    let text = |p: &Placement| {
        let workers: Vec<&str> = p.workers.iter().map(WorkerId::as_str).collect();
        let jobs: Vec<&str> = p.keys.iter().map(|key| key.job.as_str()).collect();
        format!("{}={}@{}", jobs.join("+"), p.device, workers.join("+"))
    };
    place(lines(&asks, &tenants(projects)), &seats(&rows), MAX_LANES, ALL)
        .placements
        .iter()
        .map(text)
        .collect::<Vec<_>>()
        .join(" ")
}

/// The definition: all seats are looked at for each job, and all jobs for the one that is next.
fn by_definition<'a>(queue: &[Ask<'a>], tenants: &Tenants, seats: &[Seat<'_>]) -> Placed<'a> {
    let able = |ask: &Ask<'_>, kind: Device| -> Vec<usize> {
        let labels = &ask.resources.labels;
        let fits = |seat: &Seat<'_>| {
            seat.devices.of(kind) >= ask.resources.n_devices.get()
                && labels.iter().all(|(name, value)| seat.labels.get(name) == Some(value))
        };
        (0..seats.len()).filter(|&idx| fits(&seats[idx])).collect()
    };
    let (fleet, mut tenants) = (Fleet::of(seats), tenants.clone());
    let mut free: Vec<Devices> = seats.iter().map(|seat| seat.free).collect();
    let mut kept = vec![false; seats.len()];
    let mut kept_of_quota: Vec<(&Project, Device)> = Vec::new();
    let mut is_settled = vec![false; queue.len()];
    let mut placed = Placed::default();
    loop {
        let is_idle = (0..seats.len()).any(|idx| !kept[idx] && free[idx] != Devices::default());
        let next = (0..queue.len()).filter(|&at| !is_settled[at]).min_by_key(|&at| {
            let (policy, usage) = tenants.entry(queue[at].key.project.clone()).or_default();
            (Reverse(queue[at].priority), usage.share(&fleet, policy.weight), queue[at].order)
        });
        let Some(at) = next.filter(|_| is_idle) else { return placed };
        is_settled[at] = true;
        let ask = &queue[at];
        let (n_workers, n_devices) = (ask.resources.n_workers.get() as usize, ask.resources.n_devices.get());
        let (policy, usage) = tenants.entry(ask.key.project.clone()).or_default();
        let needed = ask.resources.n_workers.get() * n_devices;
        let may_have = |kind: &Device| {
            policy.max_of(*kind).is_none_or(|max| usage.devices().of(*kind) + needed <= max)
                && !kept_of_quota.contains(&(&ask.key.project, *kind))
        };
        let kinds: Vec<Device> = ask.resources.device.kinds().iter().copied().filter(may_have).collect();
        let gang = kinds.iter().find_map(|&kind| {
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
        let mut behind: Vec<usize> =
            (0..queue.len()).filter(|&other| !is_settled[other] && ask.fits(&queue[other])).collect();
        behind.sort_by_key(|&other| (Reverse(queue[other].priority), queue[other].order));
        for other in behind {
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
        if let Some((device, gang)) = gang.as_ref().filter(|_| is_gathered) {
            let device = *device;
            gang.iter().for_each(|&idx| free[idx] = free[idx].without(device, n_devices));
            let workers: Vec<WorkerId> = gang.iter().map(|&idx| seats[idx].worker.clone()).collect();
            let keys = lanes.iter().map(|&lane| queue[lane].key.clone()).collect();
            usage.add(&Usage::of_gang(device, n_devices, workers.len(), together));
            placed.placements.push(Placement { keys, device, workers });
            continue;
        }
        let is_found = gang.is_some();
        let mut keeps = false;
        for &kind in &kinds {
            let mut fit: Vec<usize> = able(ask, kind).into_iter().filter(|&idx| !kept[idx]).collect();
            if fit.len() >= n_workers {
                fit.sort_by_key(|&idx| (Reverse(free[idx].of(kind)), seats[idx].worker));
                fit[..n_workers].iter().for_each(|&idx| kept[idx] = true);
                keeps = true;
                break;
            }
        }
        placed.waiting.extend((keeps && !is_found).then_some(ask.key));
        if !keeps && !is_found {
            let may_later = |kind: &&Device| {
                let is_within = policy.max_of(**kind).is_none_or(|max| needed <= max);
                !kinds.contains(kind) && is_within && able(ask, **kind).len() >= n_workers
            };
            let later = ask.resources.device.kinds().iter().filter(may_later);
            kept_of_quota.extend(later.map(|kind| (&ask.key.project, *kind)));
        }
    }
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
        ("so many and no more", "a:1x1:cpu:::k b:1x1:cpu:::k c:1x1:cpu:::k d:1x1:cpu:::k", "w:1/1:0/0", "a+b+c=cpu@w"),
        (
            "the rest goes on",
            "a:1x1:cpu:::k b:1x1:cpu:::k c:1x1:cpu:::k d:1x1:cpu:::k",
            "w:2/2:0/0",
            "a+b+c=cpu@w d=cpu@w",
        ),
        ("they gather", "a:1x1:cpu:::k~ b:1x1:cpu:::k~", "w:1/1:0/0", ""),
        ("until one has waited", "a:1x1:cpu:::k~ b:1x1:cpu:::k", "w:1/1:0/0", "a+b=cpu@w"),
        ("or they are enough", "a:1x1:cpu:::k~ b:1x1:cpu:::k~ c:1x1:cpu:::k~", "w:1/1:0/0", "a+b+c=cpu@w"),
        ("who gathers keeps one place", "a:1x1:cpu:::k~ b:1x1:cpu:::k~ c:1x1:cpu", "v:1/1:0/0 w:1/1:0/0", "c=cpu@w"),
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
fn projects_share_the_fleet() {
    let table = [
        ("in turn, whoever came first", "", "r/a:1x1:cpu r/b:1x1:cpu s/c:1x1:cpu", "w:2/2:0/0", "a=cpu@w c=cpu@w"),
        ("who has less goes first", "r:1:-:1", "r/a:1x1:cpu s/c:1x1:cpu s/d:1x1:cpu", "w:2/8:0/0", "c=cpu@w a=cpu@w"),
        (
            "by weight",
            "r:2:-:0",
            "s/a:1x1:cpu s/b:1x1:cpu r/c:1x1:cpu r/d:1x1:cpu",
            "u:1/1:0/0 v:1/1:0/0 w:1/1:0/0",
            "a=cpu@u c=cpu@v d=cpu@w",
        ),
        ("priority before shares", "r:1:-:4", "s/a:1x1:cpu r/b!1:1x1:cpu", "w:1/8:0/0", "b=cpu@w"),
        ("no more than they may", "r:1:1:0", "r/a:1x1:cpu r/b:1x1:cpu", "w:4/4:0/0", "a=cpu@w"),
        ("with what they have", "r:1:2:1", "r/a:1x1:cpu r/b:1x1:cpu", "w:4/4:0/0", "a=cpu@w"),
        ("of a kind", "r:1:1:1", "r/a:1x1:cpu r/b:1x1:any", "w:4/4:1/1", "b=cuda@w"),
        (
            "what is left is kept for who goes first",
            "r:1:4:2",
            "r/a:1x3:cpu r/b:1x1:cpu s/c:1x1:cpu",
            "w:4/8:0/0",
            "c=cpu@w",
        ),
        ("but not for what it may never have", "r:1:4:2", "r/a:1x5:cpu r/b:1x1:cpu", "w:8/8:0/0", "b=cpu@w"),
        ("lanes are one gang", "r:1:1:0", "r/a:1x1:cpu:::k r/b:1x1:cpu:::k", "w:4/4:0/0", "a+b=cpu@w"),
    ];
    for (name, projects, queue, fleet, expected) in table {
        assert_eq!(placed_for(projects, queue, fleet), expected, "{name}");
    }
}

#[test]
fn who_keeps_workers_is_named_in_order() {
    let (asks, few) = (asks("a:2x2:cpu b:9x1:cpu c!1:1x2:cpu d:1x1:cpu"), rows("v:1/2:0/0 w:1/2:0/0 x:0/2:0/0"));
    let seats = seats(&few);
    let placed = place(lines(&asks, &Tenants::new()), &seats, MAX_LANES, ALL);
    let names: Vec<&str> = placed.waiting.iter().map(|key| key.job.as_str()).collect();
    assert_eq!((names, placed.placements), (vec!["c", "a"], Vec::new()), "nobody can have nine workers");
    // Of a full fleet only those who are more urgent than what runs there.
    let full = rows("v:0/2:0/0 w:0/2:0/0");
    let seats = self::seats(&full);
    for (least, expected) in [(None, vec![]), (Some(1), vec![]), (Some(0), vec!["c"])] {
        let placed = place(lines(&asks, &Tenants::new()), &seats, MAX_LANES, Extent::Waiting { least });
        assert_eq!(placed.waiting.iter().map(|key| key.job.as_str()).collect::<Vec<_>>(), expected);
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
        ("", "full/a:1x2:cpu", "w:4/4:0/0", Some(Blocked::OverQuota)),
        ("", "full/a:1x1:cpu", "w:4/4:0/0", None),
        ("full/b:1x2:cpu", "full/a:1x1:cpu", "w:4/4:0/0", Some(Blocked::Behind)),
        ("", "small/a:1x2:any", "w:4/4:0/0", Some(Blocked::OverQuota)),
        ("b!1:1x1:cpu", "a:1x1:cpu", "w:1/1:0/0", Some(Blocked::Behind)),
    ];
    let numbered = |(mut asked, order): (Asked, u64)| {
        asked.7 = order;
        asked
    };
    for (ahead, asked, fleet, expected) in table {
        let (ahead, asked, rows) = (asks(ahead), asks(asked), rows(fleet));
        let rows = seats(&rows);
        let all: Vec<Asked> = ahead.into_iter().chain(asked.iter().cloned()).zip(0..).map(numbered).collect();
        let tenants = tenants("small:1:1:0 full:1:2:1");
        let (policy, usage) = tenants.get(&asked[0].0.project).copied().unwrap_or_default();
        let tenant = Tenant { policy, usage };
        let found = blocked(|| lines(&all, &tenants), &ask(all.last().unwrap()), tenant, &rows, MAX_LANES);
        assert_eq!(found, expected, "{} on {fleet}", asked[0].0);
    }
}

/// Workers, devices, kind, zone, key to share by, bytes and the worker that it ran on before.
type Drawn = (u32, u32, usize, usize, usize, u64, usize);

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]
    #[test]
    fn gangs_are_whole_and_one_look_is_enough(
        queue in proptest::collection::vec(
            ((1_u32..4, 1_u32..4, 0_usize..3, 0_usize..3, 0_usize..4, 0_u64..9, 0_usize..9), 0_usize..4, 0_i32..2),
            0..9,
        ),
        projects in proptest::collection::vec((1_u32..4, 0_u32..9, 0_u32..4), 3),
        fleet in proptest::collection::vec((0_u32..5, 0_u32..5, 0_u32..3, 0_u32..3, 0_usize..2), 0..7),
    ) {
        let (kinds, zones) = (["any", "cpu", "cuda"], ["", "us", "eu"]);
        let written = |(n, (ask, project, priority)): (usize, &(Drawn, usize, i32))| {
            let (workers, devices, kind, zone, share, bytes, before) = *ask;
            let prefer = if before < 4 { format!("w{before}") } else { String::new() };
            let share = ["", ":k", ":k~", ":l~"][share];
            let bytes = if share.is_empty() { String::new() } else { format!(":{bytes}") };
            let project = ["p", "q", "r", "s"][*project];
            format!("{project}/j{n}!{priority}:{workers}x{devices}:{}:{prefer}:{}{share}{bytes}", kinds[kind], zones[zone])
        };
        let seat = |(n, &(cpu, n_cpu, cuda, n_cuda, zone)): (usize, &(u32, u32, u32, u32, usize))| {
            format!("w{n}:{}/{n_cpu}:{}/{n_cuda}:{}:109", cpu.min(n_cpu), cuda.min(n_cuda), zones[1 + zone])
        };
        let asks = asks(&queue.iter().enumerate().map(written).collect::<Vec<_>>().join(" "));
        let mut rows = rows(&fleet.iter().enumerate().map(seat).collect::<Vec<_>>().join(" "));
        let tenant = |((weight, max, used), name): (&(u32, u32, u32), &str)| {
            let max = if *max > 5 { "-".to_owned() } else { max.to_string() };
            format!("{name}:{weight}:{max}:{used}")
        };
        let mut tenants = tenants(&projects.iter().zip(["p", "q", "r"]).map(tenant).collect::<Vec<_>>().join(" "));
        let by_name = seats(&rows);
        let placed = place(lines(&asks, &tenants), &by_name, MAX_LANES, ALL);

        let all: Vec<Ask<'_>> = asks.iter().map(ask).collect();
        proptest::prop_assert_eq!(&placed, &by_definition(&all, &tenants, &by_name));
        // A short walk finds the same gangs, and what those that wait ask for.
        let short = place(lines(&asks, &tenants), &by_name, MAX_LANES, Extent::Gangs);
        let wishes = |waiting: &[&JobKey]| -> BTreeSet<(Project, Resources)> {
            let asked = asks.iter().filter(|asked| waiting.contains(&&asked.0));
            asked.map(|(key, resources, ..)| (key.project.clone(), resources.clone())).collect()
        };
        proptest::prop_assert_eq!(wishes(&short.waiting), wishes(&placed.waiting));
        let placements = placed.placements;
        proptest::prop_assert_eq!(&short.placements, &placements);
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
            let memory = memory.total();
            let taken = Usage::of_gang(*device, resources.n_devices.get(), workers.len(), Memory { own: memory, ..Memory::default() });
            let (policy, usage) = tenants.entry(lanes[0].0.project.clone()).or_default();
            usage.add(&taken);
            proptest::prop_assert!(policy.max_of(*device).is_none_or(|max| usage.devices().of(*device) <= max));
        }
        let is_left = |asked: &&Asked| placements.iter().all(|placement| !placement.keys.contains(&asked.0));
        let rest: Vec<Asked> = asks.iter().filter(is_left).cloned().collect();
        // What a project got changes who goes next.
        if asks.iter().all(|asked| asked.0.project == asks[0].0.project) {
            proptest::prop_assert_eq!(place(lines(&rest, &tenants), &seats(&rows), MAX_LANES, ALL).placements, Vec::new());
        }
    }
}
