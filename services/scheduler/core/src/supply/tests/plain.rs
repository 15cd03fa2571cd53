//! What the queue would take, as it is defined: each walk to its end, every name and every job looked up, nothing kept from one walk to the
//! next.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;

use attune_spec::id::{Digest, JobId, Project, WorkerId};
use proptest::prelude::*;

use crate::placement::{self, Ask, Extent, Placed, Placement, Seat, Tenant};
use crate::sim::rng::Rng;
use crate::supply::need::{self, Absent, Need};
use crate::supply::{Pool, RequestId};
use crate::{
    Core, Device, Devices, Input, JobKey, Memory, Policy, Request, Resources, Session, Settings, Timestamp, Usage,
    Wanted, seats,
};

/// Walks until nothing is left that somebody could have.
const TO_THE_END: Extent = Extent::Waiting { least: None };

fn need<'c>(core: &'c Core, pools: &[&Pool], mut absent: Absent, mut more: Vec<u32>) -> Need<'c> {
    let mut asked = vec![0; pools.len()];
    loop {
        for (idx, n) in more.into_iter().enumerate() {
            asked[idx] += n;
            absent.room[idx] -= n;
            absent.coming.extend((0..n).map(|_| (idx, None)));
        }
        absent.coming.sort_by_key(|(idx, _)| *idx);
        let need = once(core, pools, &absent);
        if need.asked.iter().all(|n| *n == 0) {
            return Need { asked, ..need };
        }
        more = need.asked;
    }
}

fn once<'c>(core: &'c Core, pools: &[&Pool], Absent { coming, room }: &Absent) -> Need<'c> {
    let mut need = Need { asked: vec![0; pools.len()], ..Need::default() };
    if core.queue.is_empty() {
        return need;
    }
    let names = |kind: &str, n: usize| (0..n).map(|at| worker(&format!("{kind}-{at:08}"))).collect::<Vec<_>>();
    let more: Vec<usize> = room.iter().enumerate().flat_map(|(idx, n)| (0..*n).map(move |_| idx)).collect();
    let (coming_names, more_names) = (names("zc", coming.len()), names("zn", more.len()));
    let memory = BTreeMap::new();
    let imagined = |(worker, idx): (_, usize)| {
        let Pool { devices, ref labels, .. } = *pools[idx];
        Seat { worker, devices, free: devices, memory: &memory, labels }
    };
    let mut seats = core.seats();
    seats.extend(coming_names.iter().zip(coming.iter().map(|(idx, _)| *idx)).map(imagined));
    seats.sort_by_key(|seat| seat.worker);
    let lanes = core.settings.max_lanes;
    let first = seats.clone();
    let Placed { placements: first, waiting } = placement::place(core.lines(), &first, lanes, TO_THE_END);
    let mut waiting: Vec<JobKey> = waiting.into_iter().cloned().collect();
    let mut taken: BTreeSet<WorkerId> = first.iter().flat_map(|placement| placement.workers.clone()).collect();
    if !more.is_empty() {
        for Placement { keys, device, workers } in &first {
            let n_devices = core.ask(&keys[0]).unwrap().resources.n_devices.get();
            for seat in seats.iter_mut().filter(|seat| workers.contains(seat.worker)) {
                seat.free = seat.free.without(*device, n_devices);
            }
        }
        seats.extend(more_names.iter().zip(more.iter().copied()).map(imagined));
        seats.sort_by_key(|seat| seat.worker);
        let Placed { placements, waiting: still } = placement::place(rest(core, &first), &seats, lanes, TO_THE_END);
        waiting = still.into_iter().cloned().collect();
        taken.extend(placements.into_iter().flat_map(|placement| placement.workers));
    }
    for (name, idx) in more_names.iter().zip(more) {
        need.asked[idx] += u32::from(taken.contains(name));
    }
    for (name, (_, request)) in coming_names.iter().zip(coming) {
        need.coming.extend(request.clone().filter(|_| taken.contains(name)));
    }
    let waits_for = |seat: &Seat<'_>| {
        waiting.iter().any(|key| {
            let Resources { n_devices, device, labels, .. } = core.ask(key).unwrap().resources;
            device.kinds().iter().any(|kind| seats::is_able(seat, (*kind, n_devices.get(), labels)))
        })
    };
    let there = core.seats().into_iter().filter(|seat| taken.contains(seat.worker) || waits_for(seat));
    need.workers = there.map(|seat| seat.worker).collect();
    need
}

/// The queue without what is placed, whose projects have less left.
fn rest<'c>(core: &'c Core, placed: &[Placement]) -> Vec<(Tenant, Vec<std::vec::IntoIter<Ask<'c>>>)> {
    let mut lines = Vec::new();
    for (project, groups) in core.queue.lines() {
        let mut tenant = core.tenant(project);
        for Placement { keys, device, workers } in placed.iter().filter(|one| one.keys[0].project == *project) {
            let n_devices = core.ask(&keys[0]).unwrap().resources.n_devices.get();
            tenant.usage.add(&Usage::of_gang(*device, n_devices, workers.len(), Memory::default()));
        }
        let is_left = |ask: &Ask<'_>| placed.iter().all(|one| !one.keys.contains(ask.key));
        let asks = groups.map(|group| group.map(|queued| core.ask_at(queued)));
        lines.push((tenant, asks.map(|group| group.filter(is_left).collect::<Vec<_>>().into_iter()).collect()));
    }
    lines
}

fn worker(name: &str) -> WorkerId {
    WorkerId::new(name).unwrap()
}

fn number(n: u64) -> NonZeroU32 {
    NonZeroU32::new(n as u32).unwrap()
}

fn labels(rng: &mut Rng, permille: u64) -> BTreeMap<String, String> {
    let zone = ["eu", "us"][rng.below(2) as usize];
    rng.chance(permille).then(|| ("zone".to_owned(), zone.to_owned())).into_iter().collect()
}

fn devices(rng: &mut Rng) -> Devices {
    Devices { n_cpu: rng.below(5) as u32, n_cuda: if rng.chance(500) { rng.below(5) as u32 } else { 0 } }
}

fn request(rng: &mut Rng) -> Request {
    let (cpu, cuda) = (Wanted::Only(Device::Cpu), Wanted::Only(Device::Cuda));
    let resources = Resources {
        n_workers: number(*rng.pick(&[1, 1, 1, 2, 3]).unwrap()),
        n_devices: number(*rng.pick(&[1, 1, 1, 2, 4]).unwrap()),
        device: *rng.pick(&[Wanted::Any, cpu, cuda]).unwrap(),
        labels: labels(rng, 200),
    };
    let share = rng.chance(200).then(|| Digest::from_bytes([rng.below(2) as u8; 32]));
    let memory = Memory { base: 10, own: rng.below(60), ..Memory::default() };
    Request { priority: rng.below(3) as i32, resources, share, memory, ..Request::default() }
}

/// Some workers, and jobs of some projects. Not all that could be granted is, as some workers have only just stopped draining.
fn core(rng: &mut Rng) -> Core {
    let mut core = Core::new(Settings::default(), Timestamp::default());
    for project in ["p", "q"] {
        let most = |rng: &mut Rng| rng.chance(300).then(|| rng.below(9) as u32);
        let (weight, max_cpu, max_cuda) = (number(1 + rng.below(3)), most(rng), most(rng));
        let policy = Policy { weight, max_cpu, max_cuda, ..Policy::default() };
        let (project, policy) = (Project::new(project).unwrap(), rng.chance(500).then_some(policy));
        core.step(Input::SetPolicy { project, policy }, Timestamp::default());
    }
    for at in 0..rng.below(10) {
        // Some names stand behind those of workers that are not there.
        let name = format!("{}{at}", rng.pick(&["a", "zc-1", "zz"]).unwrap());
        let register = Input::Register {
            worker: worker(&name),
            session: Session(at + 1),
            devices: devices(rng),
            memory: rng.chance(500).then_some((Device::Cpu, 100)).into_iter().collect(),
            labels: labels(rng, 600),
            process: None,
            outdated: false,
            draining: rng.chance(500),
            holding: Vec::new(),
        };
        core.step(register, Timestamp::default());
    }
    let kinds: Vec<Request> = (0..1 + rng.below(6)).map(|_| request(rng)).collect();
    let mut now_ms = 0;
    for at in 0..rng.below(40) {
        let project = Project::new(*rng.pick(&["p", "q", "r"]).unwrap()).unwrap();
        let key = JobKey::new(project, JobId::new(format!("j{at}")).unwrap());
        let request = Request { priority: rng.below(3) as i32, ..rng.pick(&kinds).unwrap().clone() };
        core.step(Input::Submit { key, request, finished: BTreeMap::new() }, Timestamp::from_millis(now_ms));
        now_ms += rng.below(300);
    }
    core.workers.values_mut().for_each(|worker| worker.draining &= rng.chance(300));
    core
}

fn absent(rng: &mut Rng, n_pools: u64) -> Absent {
    let n_coming = rng.below(5);
    let request = |at| RequestId(format!("r{at}").parse().unwrap());
    let coming = |at| (rng.below(n_pools) as usize, rng.chance(700).then(|| request(at)));
    let mut coming: Vec<(usize, Option<RequestId>)> = (0..n_coming).map(coming).collect();
    coming.sort_by_key(|(idx, _)| *idx);
    Absent { coming, room: (0..n_pools).map(|_| rng.below(6) as u32).collect() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn short_walks_find_the_same(seed: u64) {
        let rng = &mut Rng::new(seed);
        let core = core(rng);
        let n_pools = 1 + rng.below(3);
        let pool = |at| Pool { labels: labels(rng, 500), devices: devices(rng), ..super::pool(&format!("p{at}"), 0, 0, 0) };
        let pools: Vec<Pool> = (0..n_pools).map(pool).collect();
        let pools: Vec<&Pool> = pools.iter().collect();
        let absent = absent(rng, n_pools);
        let more: Vec<u32> = absent.room.iter().map(|room| if rng.chance(300) { rng.below(u64::from(*room) + 1) as u32 } else { 0 }).collect();
        let found = need::need(&core, &pools, absent.clone(), more.clone());
        prop_assert_eq!(&found, &need(&core, &pools, absent, more));
    }
}
