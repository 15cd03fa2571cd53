//! Whatever happens to a fleet, and what is left of it in the end.

use proptest::prelude::*;

use super::{World, pool};
use crate::supply::{Order, Standing};
use crate::testing::gang;
use crate::{Input, JobKey, Resources, State};

/// What chance may do.
#[derive(Debug, Clone)]
enum Act {
    Submit { workers: u32, devices: u32 },
    Finish(usize),
    Cancel(usize),
    Start(usize),
    Come(usize),
    Die(usize),
    Wait(u64),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (1..4_u32, 1..4_u32).prop_map(|(workers, devices)| Act::Submit { workers, devices }),
        3 => any::<usize>().prop_map(Act::Finish),
        1 => any::<usize>().prop_map(Act::Cancel),
        3 => any::<usize>().prop_map(Act::Start),
        3 => any::<usize>().prop_map(Act::Come),
        1 => any::<usize>().prop_map(Act::Die),
        3 => (1..40_u64).prop_map(Act::Wait),
    ]
}

impl World {
    fn act(&mut self, act: &Act, n: usize) {
        let pick = |len: usize, at: usize| (len > 0).then(|| at % len.max(1));
        let of_state = |world: &Self, fits: fn(State) -> bool| {
            world.desk.core.jobs().filter(|job| fits(job.state)).map(|job| job.key.clone()).collect::<Vec<_>>()
        };
        match *act {
            Act::Submit { workers, devices } => drop(self.submit(&format!("j{n}"), gang(workers, devices))),
            Act::Finish(at) => {
                let live = of_state(self, |state| matches!(state, State::Starting | State::Running));
                if let Some(at) = pick(live.len(), at) {
                    self.finish(&live[at]);
                }
            }
            Act::Cancel(at) => {
                let queued = of_state(self, |state| state == State::Queued);
                if let Some(at) = pick(queued.len(), at) {
                    self.desk.done(Input::Cancel { key: queued[at].clone() });
                }
            }
            Act::Start(at) | Act::Come(at) | Act::Die(at) => {
                let all = self.requests();
                let Some(at) = pick(all.len(), at) else { return };
                let (pool, request, standing) = &all[at];
                match (act, standing) {
                    (Act::Start(_), Standing::Waiting) => self.start(pool, request),
                    (Act::Come(_), Standing::Running) if self.desk.core.worker(&Self::worker(request)).is_none() => {
                        self.come(pool, request);
                    }
                    (Act::Die(_), _) => self.end(pool, request),
                    _ => {}
                }
            }
            Act::Wait(seconds) => self.wait(seconds),
        }
    }

    /// Engines and workers do what they should, jobs run at once to their end, until nothing changes for long.
    fn settle(&mut self) -> u32 {
        let mut n_asked = 0;
        for _ in 0..60 {
            loop {
                self.all_come();
                for (pool, request, _) in self.requests() {
                    match self.desk.core.worker(&Self::worker(&request)) {
                        None => self.come(&pool, &request),
                        Some(worker) if worker.draining => self.end(&pool, &request),
                        Some(_) => {}
                    }
                }
                let live: Vec<JobKey> =
                    self.desk.core.jobs().filter(|job| job.state.is_live()).map(|job| job.key.clone()).collect();
                if live.is_empty() {
                    break;
                }
                live.iter().for_each(|key| self.finish(key));
            }
            n_asked = self.asked();
            self.wait(30);
        }
        n_asked
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens: never more than the most (the world asserts it with each step), nothing that runs is given back (it asserts that
    /// too). Then, when all goes well for long: every job that the pools could hold has run, and no more workers are left than the least.
    #[test]
    fn it_comes_to_rest_at_the_least(
        acts in proptest::collection::vec(act(), 0..60),
        least in 0..2_u32,
    ) {
        let mut world = World::new(vec![pool("one", 2, least, 3), pool("two", 3, 0, 2)]);
        for (n, act) in acts.iter().enumerate() {
            world.act(act, n);
            // Where an engine lets go of something at once, there is room for more at once.
            let has_ended = world.look().iter().any(|order| matches!(order, Order::Withdraw { .. }));
            let again = world.asked();
            prop_assert!(again == 0 || has_ended, "asked twice after {:?}", act);
        }
        let n_asked = world.settle();
        prop_assert_eq!(n_asked, 0);
        // All five workers have two devices, two have three.
        let fits = |resources: &Resources| {
            let able = match resources.n_devices.get() { 1 | 2 => 5, 3 => 2, _ => 0 };
            resources.n_workers.get() <= able
        };
        for row in world.desk.core.jobs() {
            let waits = row.state == State::Queued;
            prop_assert_eq!(waits, !row.state.is_final(), "{:?}", row);
            prop_assert_eq!(waits, waits && !fits(&row.request.resources), "{:?}", row);
        }
        prop_assert_eq!(world.requests().len() as u32, least);
    }
}
