//! What a decision costs with a large fleet and a long queue: each kind of input, one after the other, on one core.
//!
//! `cargo bench --workspace --features attune/failpoints --profile release --bench decisions [-- WORKERS JOBS]`
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench that cannot go on stops, and prints what it found"
)]
#![allow(clippy::disallowed_methods, reason = "this program measures time")]

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use attune_scheduler_core::supply::{Pool, Supply};
use attune_scheduler_core::{
    Core, Device, Devices, Effects, Input, JobKey, Outcome, Request, Resources, Session, Settings, State, Timestamp,
    Wanted,
};
use attune_spec::id::{JobId, Name, Project, WorkerId};

const ROUNDS: usize = 200;

struct Bench {
    core: Core,
    now: u64,
    beats: BTreeMap<WorkerId, u64>,
    next: usize,
}

impl Bench {
    fn step(&mut self, input: Input) -> (Effects, Duration) {
        self.now += 1;
        let begun = Instant::now();
        let effects = self.core.step(input, Timestamp::from_millis(self.now));
        (effects, begun.elapsed())
    }

    fn register(&mut self, at: usize) -> Duration {
        let worker = WorkerId::new(format!("w-{at:06}")).unwrap();
        let labels = BTreeMap::from([("zone".to_owned(), format!("z{}", at % 8))]);
        // Half of them have cards.
        let devices = Devices { n_cpu: 4, n_cuda: if at.is_multiple_of(2) { 8 } else { 0 } };
        let session = Session(at as u64 + 1);
        let (holding, memory, process) = (Vec::new(), BTreeMap::new(), None);
        self.step(Input::Register {
            worker,
            session,
            devices,
            memory,
            labels,
            process,
            outdated: false,
            draining: false,
            holding,
        })
        .1
    }

    /// Jobs of several kinds: mostly one device, some gangs, some that fit nothing here.
    fn submit(&mut self) -> Duration {
        let at = self.next;
        self.next += 1;
        let number = |n: u32| NonZeroU32::new(n).unwrap();
        let (n_workers, n_devices, device) = match at % 20 {
            0 => (8, 8, Wanted::Only(Device::Cuda)),
            1 => (2, 4, Wanted::Only(Device::Cuda)),
            2 => (1, 16, Wanted::Only(Device::Cuda)),
            3..8 => (1, 1, Wanted::Only(Device::Cuda)),
            _ => (1, 1, Wanted::Any),
        };
        let labels =
            if at % 10 == 9 { BTreeMap::from([("zone".to_owned(), "z3".to_owned())]) } else { BTreeMap::new() };
        let resources = Resources { n_workers: number(n_workers), n_devices: number(n_devices), device, labels };
        let key = JobKey::new(Project::default(), JobId::new(format!("j-{at:07}")).unwrap());
        let request = Request { priority: (at % 3) as i32, resources, ..Request::default() };
        self.step(Input::Submit { key, request, finished: BTreeMap::new() }).1
    }

    /// The end of the first attempt of a job that lives, with the grants that its devices make possible.
    fn finish(&mut self, at: usize) -> Option<Duration> {
        let live = self.core.jobs().filter(|job| job.state.is_live()).nth(at)?;
        let (key, epoch, worker) = (live.key.clone(), live.epoch, live.workers.first()?.clone());
        let cohort = live.cohort?;
        let gone: Vec<WorkerId> = live.workers.iter().cloned().collect();
        let (_, first) = self.step(Input::AttemptFinished { key, epoch, worker, outcome: Outcome::Succeeded });
        let mut longest = first;
        for worker in gone {
            let session = self.core.worker(&worker)?.session;
            longest = longest.max(self.step(Input::CohortGone { worker, session, cohort }).1);
        }
        Some(longest)
    }

    /// What a supply that just began wants of an engine that has nothing yet and may be asked for a thousand workers.
    fn supply(&self, at: u64) -> Duration {
        let pool = Pool {
            name: Name::new("cards").unwrap(),
            devices: Devices { n_cpu: 4, n_cuda: 8 },
            labels: BTreeMap::new(),
            min: 0,
            max: 1000,
            idle: Duration::from_secs(60),
            start: Duration::from_secs(600),
        };
        let listed = BTreeMap::from([(pool.name.clone(), Some(BTreeMap::new()))]);
        let mut supply = Supply::new(vec![pool]);
        let begun = Instant::now();
        let orders = supply.step(&self.core, listed, Timestamp::from_millis(self.now + at));
        let took = begun.elapsed();
        assert!(!orders.is_empty(), "jobs wait, and nobody is asked for");
        took
    }

    fn heartbeat(&mut self, at: usize) -> Duration {
        let worker = self.core.workers().nth(at).unwrap().id.clone();
        let session = self.core.worker(&worker).unwrap().session;
        let holding =
            self.core.cohorts().filter(|cohort| cohort.share(&worker).is_some()).map(|cohort| cohort.id).collect();
        let beat = self.beats.entry(worker.clone()).or_default();
        *beat += 1;
        let beat = *beat;
        self.step(Input::Heartbeat { worker, session, beat, holding }).1
    }
}

fn told(name: &str, mut took: Vec<Duration>) {
    took.sort_unstable();
    let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    println!("{name:<44} {:>9.3} {:>9.3} {:>9.3}", at(0.5), at(0.99), at(1.0));
}

/// Resident memory of this process.
fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or_default() / 1024
}

fn main() {
    let numbers: Vec<usize> = std::env::args().filter_map(|text| text.parse().ok()).collect();
    let (n_workers, n_jobs) = (numbers.first().copied().unwrap_or(10_000), numbers.get(1).copied().unwrap_or(100_000));
    let core = Core::new(Settings::default(), Timestamp::from_millis(0));
    let mut bench = Bench { core, now: 0, beats: BTreeMap::new(), next: 0 };
    println!(
        "{n_workers} workers, {n_jobs} jobs\n\n{:<44} {:>9} {:>9} {:>9}",
        "milliseconds", "median", "99 %", "longest"
    );
    let took = (0..n_jobs).map(|_| bench.submit()).collect();
    told("a job is submitted, nobody there", took);
    let took = (0..n_workers).map(|at| bench.register(at)).collect();
    told("a worker registers, and is filled", took);
    let queued = bench.core.queue().count();
    let live = bench.core.jobs().filter(|job| job.state.is_live()).count();
    let took = (0..ROUNDS).map(|_| bench.submit()).collect();
    told("a job is submitted to the full fleet", took);
    let took = (0..ROUNDS).filter_map(|at| bench.finish(at * 37 % live)).collect();
    told("an attempt ends, and others are granted", took);
    let took = (0..ROUNDS).map(|at| bench.heartbeat(at * 37 % n_workers)).collect();
    told("a heartbeat", took);
    let took = (0..ROUNDS).map(|_| bench.step(Input::Tick).1).collect();
    told("a tick", took);
    let took = (0..ROUNDS / 10).map(|at| bench.supply(at as u64));
    told("how many workers to ask an engine for", took.collect());
    let asked: Vec<JobKey> = bench.core.queue().step_by(queued.div_ceil(ROUNDS)).cloned().collect();
    let took = asked.iter().map(|key| {
        let begun = Instant::now();
        assert!(bench.core.job(key).is_some_and(|job| job.state == State::Queued));
        std::hint::black_box(bench.core.blocked(key));
        begun.elapsed()
    });
    told("why a job waits", took.collect());
    println!("\n{live} attempts alive, {queued} jobs queued, {} MiB resident", resident_mib());
}
