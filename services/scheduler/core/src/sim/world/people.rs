//! What people ask for.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;

use attune_spec::id::{Digest, JobId, Project};

use super::{Next, World};
use crate::sim::rng::Rng;
use crate::{Device, Input, JobKey, Limit, Memory, Policy, Request, Resources, Wanted};

impl World {
    /// A person does something, sometimes twice.
    pub(super) fn person(&mut self) -> Result<(), String> {
        if self.n_jobs < self.max_jobs || !self.is_calm {
            // Some submit several at once.
            let wait_ms = if self.rng.chance(400) { 10 } else { self.rng.between(50, 2000) };
            self.after(wait_ms, Next::Person);
        }
        let submits = self.n_jobs < self.max_jobs && (self.is_calm || self.rng.chance(400));
        let input = if submits { Some(self.new_job()) } else { self.wish() };
        let Some(input) = input else { return Ok(()) };
        self.feed(input.clone(), None)?;
        if self.rng.chance(200) {
            self.feed(input, None)?;
        }
        Ok(())
    }

    fn new_job(&mut self) -> Input {
        let nature = *self.rng.pick(b"jjjjjjjjjbfpq").unwrap_or(&b'j') as char;
        let project = Project::new(*self.rng.pick(&["red", "blue"]).unwrap_or(&"red")).unwrap();
        let key = JobKey::new(project, JobId::new(format!("{nature}{}", self.n_jobs)).unwrap());
        self.n_jobs += 1;
        let n_agents = self.agents.len() as u64;
        let count = |n: u64| NonZeroU32::new(n as u32).unwrap();
        let device = match self.rng.below(4) {
            0 => Wanted::Any,
            1 => Wanted::Only(Device::Cuda),
            _ => Wanted::Only(Device::Cpu),
        };
        // Every job fits the whole fleet, so that all of them can end.
        let is_card = device == Wanted::Only(Device::Cuda);
        let resources = Resources {
            n_workers: count(if is_card || self.rng.chance(700) { 1 } else { self.rng.between(1, n_agents) }),
            n_devices: count(if is_card { self.rng.between(1, 2) } else { self.rng.between(1, 4) }),
            device,
            labels: BTreeMap::new(),
        };
        // Two kinds of jobs may share a process with their like; the others ask for whatever they want.
        let share = self.rng.chance(500).then(|| Digest::from_bytes([self.rng.below(2) as u8; 32]));
        let device = Wanted::Only(Device::Cpu);
        let resources = if share.is_some() { Resources { device, ..Resources::default() } } else { resources };
        // Two of the large ones are about what a device holds.
        let own = if self.rng.chance(300) { self.rng.between(35, 45) } else { 5 };
        let known: Vec<JobId> =
            self.store.jobs.keys().filter(|k| k.project == key.project).map(|k| k.job.clone()).collect();
        let n_after = if self.rng.chance(300) { self.rng.between(1, 2) } else { 0 };
        let after: BTreeSet<JobId> = (0..n_after).filter_map(|_| self.rng.pick(&known).cloned()).collect();
        let request = Request {
            priority: self.rng.below(3) as i32,
            resources,
            max_attempts: count(self.rng.between(2, 6)),
            after: after.clone(),
            share,
            memory: Memory { base: 10, own, pass: 5, full_pass: 8 },
            ..Request::default()
        };
        let finished = self.store.finished(&key, after);
        Input::Submit { key, request, finished }
    }

    fn new_policy(&mut self) -> Input {
        let project = Project::new(*self.rng.pick(&["red", "blue"]).unwrap_or(&"red")).unwrap();
        let limit = |rng: &mut Rng, most| rng.chance(600).then(|| rng.between(1, most) as u32);
        let policy = Policy {
            weight: NonZeroU32::new(self.rng.between(1, 3) as u32).unwrap(),
            max_cpu: limit(&mut self.rng, 9),
            max_cuda: limit(&mut self.rng, 2),
            max_queued: limit(&mut self.rng, 6),
            max_bytes: None,
        };
        Input::SetPolicy { project, policy: self.rng.chance(900).then_some(policy) }
    }

    fn wish(&mut self) -> Option<Input> {
        let keys: Vec<JobKey> = self.store.jobs.keys().cloned().collect();
        let key = self.rng.pick(&keys)?.clone();
        Some(match self.rng.below(20) {
            0 => Input::Cancel { key },
            1..=3 => Input::Pause { key },
            4..=7 => Input::Resume { key },
            8..=9 => Input::Retry { key },
            10..=13 => Input::Preempt { key },
            14 => Input::Forget { key },
            // The fleet of the end is whole.
            15..=18 if self.is_calm => return None,
            16 => self.new_policy(),
            17 => {
                let agent = self.rng.below(self.agents.len() as u64) as usize;
                let (on, drains) = (self.rng.chance(500), self.rng.chance(500));
                Input::Cordon { worker: self.agents[agent].id.clone(), on, drains }
            }
            18 if self.rng.chance(200) => Input::Expire { key, limit: Limit::RunTime },
            18 => return None,
            _ => {
                let n_agents = self.agents.len() as u64;
                Input::Drain { worker: self.agents[self.rng.below(n_agents) as usize].id.clone() }
            }
        })
    }
}
