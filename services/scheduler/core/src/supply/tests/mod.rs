//! A fleet that comes and goes: step by step, and by chance.

mod chance;
mod plain;

use std::collections::BTreeMap;
use std::time::Duration;

use attune_spec::id::{Name, WorkerId};

use super::{Listed, Order, Pool, REQUEST_LABEL, RequestId, Standing, Supply, Why};
use crate::testing::Desk;
use crate::testing::{gang, job};
use crate::{Device, Devices, Input, JobKey, Outcome, Policy, Request, Resources, Session, State, Timestamp, Wanted};

const IDLE: u64 = 60;
const START: u64 = 120;

fn pool(name: &str, n_cpu: u32, min: u32, max: u32) -> Pool {
    Pool {
        name: name.parse().unwrap(),
        devices: Devices { n_cpu, n_cuda: 0 },
        labels: BTreeMap::new(),
        min,
        max,
        idle: Duration::from_secs(IDLE),
        start: Duration::from_secs(START),
    }
}

/// A scheduler, its supply, and engines that do as they are told, as fast as a test wants it.
struct World {
    desk: Desk,
    supply: Supply,
    engines: BTreeMap<Name, BTreeMap<RequestId, Standing>>,
    pools: BTreeMap<Name, Pool>,
    n_asked: u32,
    session: u64,
}

impl World {
    fn new(pools: Vec<Pool>) -> Self {
        Self {
            desk: Desk::new(),
            engines: pools.iter().map(|pool| (pool.name.clone(), BTreeMap::new())).collect(),
            pools: pools.iter().map(|pool| (pool.name.clone(), pool.clone())).collect(),
            supply: Supply::new(pools),
            n_asked: 0,
            session: 1000,
        }
    }

    /// One step, and what it orders is done.
    fn look(&mut self) -> Vec<Order> {
        let listed = self.engines.iter().map(|(name, engine)| (name.clone(), Some(engine.clone()))).collect();
        self.look_at(listed)
    }

    fn look_at(&mut self, listed: BTreeMap<Name, Listed>) -> Vec<Order> {
        let orders = self.supply.step(&self.desk.core, listed, Timestamp::from_millis(self.desk.now_ms));
        for order in &orders {
            match order {
                Order::Ask { pool, n } => {
                    for _ in 0..*n {
                        self.n_asked += 1;
                        let request = RequestId(format!("r{:04}", self.n_asked).parse().unwrap());
                        self.engines.get_mut(pool).unwrap().insert(request, Standing::Waiting);
                    }
                    let n_all = self.engines[pool].len() as u32;
                    assert!(n_all <= self.pools[pool].max, "{n_all} of {pool}");
                }
                Order::GiveBack { worker, .. } => {
                    let known = self.desk.core.worker(worker).unwrap();
                    assert!(known.connected && known.occupied.is_empty(), "{known:?}");
                    let actions = self.desk.done(Input::Drain { worker: worker.clone() });
                    assert!(actions.iter().all(|action| action.worker() != worker), "{actions:?}");
                }
                Order::Withdraw { pool, request, .. } => {
                    self.engines.get_mut(pool).unwrap().remove(request).unwrap();
                }
            }
        }
        orders
    }

    /// How many were asked for.
    fn asked(&mut self) -> u32 {
        let n = |order: &Order| match order {
            Order::Ask { n, .. } => *n,
            Order::GiveBack { .. } | Order::Withdraw { .. } => 0,
        };
        self.look().iter().map(n).sum()
    }

    fn worker(request: &RequestId) -> WorkerId {
        WorkerId::new(format!("w-{request}")).unwrap()
    }

    fn requests(&self) -> Vec<(Name, RequestId, Standing)> {
        let of = |(pool, engine): (&Name, &BTreeMap<RequestId, Standing>)| {
            engine.iter().map(|(id, standing)| (pool.clone(), id.clone(), *standing)).collect::<Vec<_>>()
        };
        self.engines.iter().flat_map(of).collect()
    }

    /// The engine starts a request.
    fn start(&mut self, pool: &Name, request: &RequestId) {
        self.engines.get_mut(pool).unwrap().insert(request.clone(), Standing::Running);
    }

    /// Its worker registers.
    fn come(&mut self, pool: &Name, request: &RequestId) {
        self.session += 1;
        let Pool { devices, mut labels, .. } = self.pools[pool].clone();
        labels.insert(REQUEST_LABEL.to_owned(), request.to_string());
        self.desk.done(Input::Register {
            worker: Self::worker(request),
            session: Session(self.session),
            devices,
            memory: BTreeMap::new(),
            labels,
            process: None,
            outdated: false,
            draining: false,
            holding: Vec::new(),
        });
    }

    /// All engines start what waits, and the workers come.
    fn all_come(&mut self) {
        for (pool, request, standing) in self.requests() {
            if standing == Standing::Waiting {
                self.start(&pool, &request);
                self.come(&pool, &request);
            }
        }
    }

    /// A request ends, and with it its worker, in good order or not.
    fn end(&mut self, pool: &Name, request: &RequestId) {
        self.engines.get_mut(pool).unwrap().remove(request);
        let worker = Self::worker(request);
        if let Some(known) = self.desk.core.worker(&worker).filter(|known| known.connected) {
            let session = known.session;
            self.desk.done(Input::Disconnect { worker, session });
        }
    }

    /// Time passes while the workers send heartbeats.
    fn wait(&mut self, seconds: u64) {
        let end = self.desk.now_ms + 1000 * seconds;
        while self.desk.now_ms < end {
            self.desk.wait(Duration::from_millis((end - self.desk.now_ms).min(4000)));
            let there = self.desk.core.workers().filter(|worker| worker.connected);
            let there: Vec<_> = there.map(|worker| (worker.id.clone(), worker.occupied.clone())).collect();
            for (worker, occupied) in there {
                // What they are told to let go they have let go by then.
                let held = occupied.into_iter().filter(|(_, occupied)| !occupied.releasing);
                self.desk.beat(worker.as_str(), &held.map(|(cohort, _)| cohort).collect::<Vec<_>>());
            }
        }
    }

    fn submit(&mut self, name: &str, resources: Resources) -> JobKey {
        self.desk.submit(name, Request { resources, ..Request::default() })
    }

    /// A granted job runs, ends well, and its workers let it go.
    fn finish(&mut self, key: &JobKey) {
        let (epoch, cohort) = (self.desk.row(key).epoch, self.desk.row(key).cohort.unwrap());
        let shares = self.desk.core.cohort(cohort).unwrap().shares.clone();
        let worker = shares[0].worker.clone();
        self.desk.step(Input::AttemptRunning { key: key.clone(), epoch, worker: worker.clone() });
        self.desk.done(Input::AttemptFinished { key: key.clone(), epoch, worker, outcome: Outcome::Succeeded });
        for share in shares {
            if let Some(known) = self.desk.core.worker(&share.worker).filter(|known| known.connected) {
                let session = known.session;
                self.desk.step(Input::CohortGone { worker: share.worker, session, cohort });
            }
        }
    }

    fn state(&self, key: &JobKey) -> State {
        self.desk.row(key).state
    }
}

#[test]
fn from_nothing_and_back_to_nothing() {
    let mut world = World::new(vec![pool("a", 1, 0, 4)]);
    assert_eq!(world.look(), []);
    let key = world.submit("j", gang(1, 1));
    assert_eq!(world.asked(), 1);
    // What is coming is not asked for again, however long the engine's line is.
    world.wait(10 * START);
    assert_eq!(world.look(), []);
    world.all_come();
    assert_eq!(world.look(), []);
    assert_eq!(world.state(&key), State::Starting);
    world.wait(10 * IDLE);
    assert_eq!(world.look(), []);
    world.finish(&key);
    assert_eq!(world.look(), []);
    world.wait(IDLE - 1);
    assert_eq!(world.look(), []);
    world.wait(1);
    let (name, request, _) = world.requests().remove(0);
    let worker = World::worker(&request);
    assert_eq!(world.look(), [Order::GiveBack { pool: name.clone(), request: request.clone(), worker }]);
    // Drained, it gets nothing new: another one is asked for.
    let next = world.submit("next", gang(1, 1));
    assert_eq!(world.state(&next), State::Queued);
    assert_eq!(world.asked(), 1);
    world.end(&name, &request);
    assert_eq!(world.look(), []);
    assert_eq!(world.requests().len(), 1);
}

#[test]
fn never_more_than_max_and_those_that_are_leaving_count() {
    let mut world = World::new(vec![pool("a", 2, 0, 3)]);
    let keys: Vec<JobKey> = (0..20).map(|n| world.submit(&format!("j{n}"), gang(1, 1))).collect();
    // Two jobs have room on each.
    assert_eq!(world.asked(), 3);
    world.all_come();
    assert_eq!(world.asked(), 0);
    keys.iter().filter(|key| world.state(key) == State::Queued).cloned().collect::<Vec<_>>().into_iter().for_each(
        |key| {
            world.desk.done(Input::Cancel { key });
        },
    );
    for key in keys.iter().filter(|key| world.desk.row(key).state == State::Starting).cloned().collect::<Vec<_>>() {
        world.finish(&key);
    }
    world.look();
    world.wait(IDLE);
    assert_eq!(world.look().len(), 3);
    world.submit("late", gang(1, 1));
    assert_eq!(world.asked(), 0, "three are still ending");
    let (name, request, _) = world.requests().remove(0);
    world.end(&name, &request);
    assert_eq!(world.asked(), 1);
}

#[test]
fn min_workers_are_there_without_a_job_and_stay() {
    let mut world = World::new(vec![pool("a", 1, 2, 4)]);
    assert_eq!(world.asked(), 2);
    world.all_come();
    world.wait(2 * IDLE);
    assert_eq!(world.look(), []);
    world.wait(2 * IDLE);
    assert_eq!(world.look(), []);
    let (name, request, _) = world.requests().remove(0);
    world.end(&name, &request);
    assert_eq!(world.asked(), 1, "one was lost");
}

#[test]
fn a_gang_is_asked_for_whole_or_not_at_all() {
    let mut world = World::new(vec![pool("a", 2, 0, 3)]);
    world.submit("too-many", gang(4, 1));
    world.submit("too-wide", gang(1, 3));
    assert_eq!(world.asked(), 0);
    let key = world.submit("fits", gang(3, 2));
    assert_eq!(world.asked(), 3);
    let all = world.requests();
    for (pool, request, _) in &all[..2] {
        world.start(pool, request);
        world.come(pool, request);
    }
    // Two are idle for long: they are kept for the gang.
    world.look();
    world.wait(3 * IDLE);
    assert_eq!(world.look(), []);
    let (pool, request, _) = &all[2];
    world.start(pool, request);
    world.come(pool, request);
    assert_eq!(world.state(&key), State::Starting);
    assert_eq!(world.look(), []);
}

#[test]
fn a_pool_is_chosen_by_devices_and_labels() {
    let mut zoned = pool("zoned", 1, 0, 4);
    zoned.labels.insert("zone".to_owned(), "eu".to_owned());
    let mut cards = pool("cards", 1, 0, 4);
    cards.devices.n_cuda = 2;
    let mut world = World::new(vec![pool("plain", 1, 0, 4), zoned, cards]);
    let labels = BTreeMap::from([("zone".to_owned(), "eu".to_owned())]);
    world.submit("eu", Resources { labels, ..gang(1, 1) });
    world.submit("card", Resources { device: Wanted::Only(Device::Cuda), ..gang(1, 2) });
    let mut asked = world.look();
    asked.sort_by_key(|order| format!("{order:?}"));
    let ask = |name: &str| Order::Ask { pool: name.parse().unwrap(), n: 1 };
    assert_eq!(asked, [ask("cards"), ask("zoned")]);
    world.all_come();
    assert_eq!(world.look(), []);
}

#[test]
fn what_a_project_may_not_have_is_not_asked_for() {
    let mut world = World::new(vec![pool("a", 1, 0, 9)]);
    let policy = Some(Policy { max_cpu: Some(2), ..Policy::default() });
    world.desk.done(Input::SetPolicy { project: job("j").project, policy });
    (0..5).for_each(|n| drop(world.submit(&format!("j{n}"), gang(1, 1))));
    assert_eq!(world.asked(), 2);
    world.all_come();
    assert_eq!(world.asked(), 0);
}

#[test]
fn a_request_that_never_comes_is_forgotten_and_asking_slows_down() {
    let mut world = World::new(vec![pool("a", 1, 0, 4)]);
    world.submit("j", gang(1, 1));
    let mut tries = 0;
    for _ in 0..2 * 60 * 60 {
        world.wait(1);
        for (pool, request, standing) in world.requests() {
            if standing == Standing::Waiting {
                world.start(&pool, &request);
            }
        }
        tries += world.asked();
    }
    assert!((10..=18).contains(&tries), "{tries} in two hours");
    // Once one comes, all is well again.
    while world.requests().iter().all(|(.., standing)| *standing == Standing::Running) {
        world.wait(1);
        world.look();
    }
    world.all_come();
    world.look();
    world.submit("next", gang(1, 1));
    assert_eq!(world.asked(), 1);
}

#[test]
fn an_engine_that_refuses_is_not_asked_again_at_once() {
    let mut world = World::new(vec![pool("a", 1, 0, 4)]);
    world.submit("j", gang(1, 1));
    let mut tries = 0;
    for _ in 0..60 {
        world.wait(1);
        if world.asked() > 0 {
            tries += 1;
            world.engines.values_mut().for_each(BTreeMap::clear);
            world.supply.refused(&"a".parse().unwrap(), Timestamp::from_millis(world.desk.now_ms));
        }
    }
    assert_eq!(tries, 4, "at 1, 6, 16 and 36 seconds");
}

#[test]
fn a_request_in_the_line_is_withdrawn_once_nothing_needs_it() {
    let mut world = World::new(vec![pool("a", 1, 0, 4)]);
    let key = world.submit("j", gang(1, 1));
    assert_eq!(world.asked(), 1);
    world.desk.done(Input::Cancel { key });
    assert_eq!(world.look(), []);
    world.wait(IDLE);
    let orders = world.look();
    assert!(matches!(&orders[..], [Order::Withdraw { why: Why::NotNeeded, .. }]), "{orders:?}");
    assert_eq!(world.look(), []);
    // That was nobody's failure.
    world.submit("next", gang(1, 1));
    assert_eq!(world.asked(), 1);
}

#[test]
fn a_worker_that_goes_silent_or_does_not_end_is_ended() {
    let mut world = World::new(vec![pool("a", 1, 1, 1)]);
    assert_eq!(world.asked(), 1);
    world.all_come();
    world.look();
    let (name, request, _) = world.requests().remove(0);
    let worker = World::worker(&request);
    let session = world.desk.core.worker(&worker).unwrap().session;
    world.desk.done(Input::Disconnect { worker, session });
    assert_eq!(world.look(), []);
    world.wait(START - 1);
    assert_eq!(world.look(), []);
    // It comes back in time once, and then does not.
    world.come(&name, &request);
    assert_eq!(world.look(), []);
    let worker = World::worker(&request);
    let session = world.desk.core.worker(&worker).unwrap().session;
    world.desk.done(Input::Disconnect { worker, session });
    world.look();
    world.wait(START);
    let orders = world.look();
    assert!(matches!(&orders[..], [Order::Withdraw { why: Why::Silent, .. }]), "{orders:?}");
    // The engine goes on listing it: it is told again.
    world.start(&name, &request);
    assert_eq!(world.look(), []);
    world.wait(START);
    let orders = world.look();
    assert!(matches!(&orders[..], [Order::Withdraw { why: Why::DoesNotEnd, .. }]), "{orders:?}");
}

#[test]
fn a_request_that_is_put_back_into_the_line_is_coming_again() {
    let mut world = World::new(vec![pool("a", 1, 0, 2)]);
    let key = world.submit("j", gang(1, 1));
    assert_eq!(world.asked(), 1);
    world.all_come();
    world.look();
    let (name, request, _) = world.requests().remove(0);
    world.end(&name, &request);
    world.engines.get_mut(&name).unwrap().insert(request.clone(), Standing::Waiting);
    // The lease ends, the job is queued again, and the request is what it waits for.
    for _ in 0..60 {
        world.wait(1);
        assert_eq!(world.look(), []);
    }
    assert_eq!(world.state(&key), State::Queued);
    world.start(&name, &request);
    world.come(&name, &request);
    assert_eq!(world.state(&key), State::Starting);
}

#[test]
fn an_engine_that_does_not_answer_changes_nothing() {
    let mut world = World::new(vec![pool("a", 1, 0, 2)]);
    world.submit("j", gang(1, 1));
    let silent = || BTreeMap::from([("a".parse().unwrap(), None)]);
    assert_eq!(world.look_at(silent()), []);
    assert_eq!(world.asked(), 1);
    world.all_come();
    world.wait(1);
    assert_eq!(world.look_at(silent()), []);
    assert_eq!(world.look(), []);
}

#[test]
fn a_scheduler_that_starts_anew_finds_its_requests() {
    let mut world = World::new(vec![pool("a", 1, 0, 4)]);
    let key = world.submit("j", gang(1, 1));
    world.submit("k", gang(1, 1));
    assert_eq!(world.asked(), 2);
    let (name, request, _) = world.requests().remove(0);
    world.start(&name, &request);
    world.come(&name, &request);
    assert_eq!(world.state(&key), State::Starting);
    let holding = vec![world.desk.holding(&key)];
    world.desk.restart();
    world.supply = Supply::new(world.pools.values().cloned().collect());
    assert_eq!(world.look(), []);
    // Its worker comes back with what it runs, the other one is still to come.
    world.session += 1;
    let labels = BTreeMap::from([(REQUEST_LABEL.to_owned(), request.to_string())]);
    let (worker, session) = (World::worker(&request), Session(world.session));
    let (devices, memory, process) = (Devices { n_cpu: 1, n_cuda: 0 }, BTreeMap::new(), None);
    world.desk.done(Input::Register {
        worker,
        session,
        devices,
        memory,
        labels,
        process,
        outdated: false,
        draining: false,
        holding,
    });
    assert_eq!(world.look(), []);
    assert_eq!(world.requests().len(), 2);
}

/// What is asked for because there are to be so many anyhow has room for jobs, and what else they need is asked for at once.
#[test]
fn the_least_that_is_asked_for_counts_as_coming() {
    let mut world = World::new(vec![pool("one", 2, 1, 3), pool("two", 3, 0, 2)]);
    let comes_to_nothing = |world: &mut World| {
        world.look();
        let (pool, request, _) = world.requests().remove(0);
        world.end(&pool, &request);
        world.asked()
    };
    assert_eq!((world.asked(), comes_to_nothing(&mut world)), (1, 0));
    world.submit("gang", gang(2, 3));
    assert_eq!(world.asked(), 2);
    world.submit("small", gang(1, 1));
    assert_eq!((world.asked(), comes_to_nothing(&mut world)), (0, 0));
    world.wait(16);
    // One for the gang, and the least: the small job will be there, not on what the gang needs.
    assert_eq!((world.asked(), world.asked()), (2, 0));
}
