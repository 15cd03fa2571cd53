//! The simulated world: a scheduler that crashes, a network that loses, and workers that die.

mod people;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use attune_spec::id::{Project, WorkerId};

use super::agent::{Agent, Alarm, Knobs, Out, digest_of};
use super::ledger::Ledger;
use super::rng::Rng;
use super::tally::Tally;
use crate::plant::Plant;
use crate::testing::{Store, checked_step};
use crate::{
    Action, Answer, Backoff, Cohort, Commit, Core, Devices, Effects, Input, Job, Outcome, Session, Settings, State,
    Timestamp,
};

pub(crate) const SETTINGS: Settings = Settings {
    ttl: Duration::from_millis(3000),
    stop_limit: Duration::from_millis(8000),
    backoff: Backoff { base: Duration::from_millis(400), factor: 2, cap: Duration::from_millis(4000) },
    quarantine_after: 3,
    max_lanes: NonZeroU32::new(3).unwrap(),
    lane_wait: Duration::from_millis(700),
    preempts: true,
};

/// Something that is about to happen.
#[derive(Debug)]
enum Next {
    ToCore { input: Input, from: Option<(usize, u64, u64)> },
    Told { agent: usize, action: Action },
    Answered { agent: usize, life: u64, ticket: u64, answer: Answer },
    Alarm { agent: usize, life: u64, alarm: Alarm },
    Tick(u64),
    StartScheduler,
    Thaw(usize),
    Revive { agent: usize, adopts: bool },
    Heal(usize),
    Person,
    Fault,
    Calm,
    Resume,
}

/// Where a crash of the scheduler strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Crash {
    /// The step is done, nothing of it is stored.
    BeforeStore,
    /// It is stored; nobody is answered and nothing is sent.
    AfterStore,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Link {
    to_core: bool,
    from_core: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Health {
    Up,
    Frozen,
    Dead,
}

/// The world.
pub(crate) struct World {
    rng: Rng,
    pub(crate) now_ms: u64,
    n_events: u64,
    next: BTreeMap<(u64, u64), Next>,
    core: Option<Core>,
    pub(crate) store: Store,
    ledger: Ledger,
    clock_offset_ms: u64,
    generation: u64,
    stalled_until_ms: u64,
    crash: Option<Crash>,
    agents: Vec<Agent>,
    health: Vec<Health>,
    cut: Vec<Link>,
    frozen: Vec<Vec<Next>>,
    n_sessions: u64,
    knobs: Knobs,
    loss: u64,
    double: u64,
    slow_ms: u64,
    is_calm: bool,
    calm_ms: u64,
    n_jobs: u64,
    max_jobs: u64,
    plant: Option<Plant>,
    pub(crate) tally: Tally,
    pub(crate) trace: Option<Vec<String>>,
}

impl World {
    /// The world of a seed: the seed decides its size, its manners and all its faults.
    pub(crate) fn new(seed: u64, plant: Option<Plant>, traced: bool) -> Self {
        let mut rng = Rng::new(seed);
        let n_agents = rng.between(2, 5) as usize;
        let devices = |n: u64| Devices { n_cpu: 4, n_cuda: if n == 0 { 2 } else { 0 } };
        let agents: Vec<Agent> =
            (0..n_agents as u64).map(|n| Agent::new(WorkerId::new(format!("w{n}")).unwrap(), devices(n))).collect();
        let devices = agents.iter().map(|agent| (agent.id.clone(), agent.devices)).collect();
        let ledger = Ledger { devices, ttl_ms: 3000, ..Ledger::default() };
        let knobs = Knobs {
            ttl_ms: 3000,
            crash: *rng.pick(&[0, 5, 20]).unwrap_or(&0),
            stubborn: *rng.pick(&[0, 200, 1000]).unwrap_or(&0),
            refuse: *rng.pick(&[0, 0, 100, 500]).unwrap_or(&0),
            fences: rng.chance(700),
        };
        let calm_ms = rng.between(15_000, 60_000);
        let mut world = Self {
            now_ms: 0,
            n_events: 0,
            next: BTreeMap::new(),
            core: None,
            store: Store::default(),
            ledger,
            clock_offset_ms: 0,
            generation: 0,
            stalled_until_ms: 0,
            crash: None,
            health: vec![Health::Up; n_agents],
            cut: vec![Link::default(); n_agents],
            frozen: agents.iter().map(|_| Vec::new()).collect(),
            agents,
            n_sessions: 0,
            knobs,
            loss: *rng.pick(&[0, 20, 150]).unwrap_or(&0),
            double: *rng.pick(&[0, 50, 300]).unwrap_or(&0),
            slow_ms: *rng.pick(&[5, 50, 1500]).unwrap_or(&0),
            is_calm: false,
            calm_ms,
            n_jobs: 0,
            max_jobs: rng.between(4, 24),
            plant,
            tally: Tally::default(),
            trace: traced.then(Vec::new),
            rng,
        };
        world.at(0, Next::StartScheduler);
        for agent in 0..n_agents {
            world.at(10, Next::Revive { agent, adopts: false });
        }
        world.at(50, Next::Person);
        world.at(1000, Next::Fault);
        world.at(calm_ms, Next::Calm);
        world
    }

    /// Lives until every job has ended.
    pub(crate) fn run(&mut self) -> Result<(), String> {
        let last_ms = self.calm_ms + 240_000;
        while let Some(((at_ms, _), next)) = self.next.pop_first() {
            self.now_ms = at_ms;
            self.happen(next)?;
            if self.is_calm && self.n_jobs >= self.max_jobs && self.open_jobs().is_empty() {
                return Ok(());
            }
            if at_ms > last_ms {
                let open: Vec<String> = self.open_jobs();
                return Err(format!("faults stopped at {} ms and these jobs never ended: {open:?}", self.calm_ms));
            }
        }
        Err("nothing will ever happen again".to_owned())
    }

    fn open_jobs(&self) -> Vec<String> {
        let open = self.store.jobs.values().filter(|job| !job.state.is_final());
        open.map(|job| format!("{} {} {}", job.key, job.state, job.reason)).collect()
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>8} {}", self.now_ms, line()));
        }
    }

    fn at(&mut self, at_ms: u64, next: Next) {
        self.n_events += 1;
        self.next.insert((at_ms.max(self.now_ms), self.n_events), next);
    }

    fn after(&mut self, wait_ms: u64, next: Next) {
        self.at(self.now_ms + wait_ms, next);
    }

    fn happen(&mut self, next: Next) -> Result<(), String> {
        if let Next::Told { agent, .. } | Next::Answered { agent, .. } | Next::Alarm { agent, .. } = &next
            && self.health[*agent] == Health::Frozen
        {
            let agent = *agent;
            self.frozen[agent].push(next);
            return Ok(());
        }
        match next {
            Next::ToCore { input, from } => self.feed(input, from)?,
            Next::Told { agent, action } => {
                if self.health[agent] == Health::Up {
                    self.note(|| format!("w{agent} is told {action:?}"));
                    let mut out = Vec::new();
                    self.agents[agent].told(action, self.knobs, &mut self.rng, &mut out);
                    self.carry_out(agent, out);
                }
            }
            Next::Answered { agent, life, ticket, answer } => {
                if self.health[agent] == Health::Up && self.agents[agent].life == life {
                    self.agents[agent].answered(ticket, &answer);
                }
            }
            Next::Alarm { agent, life, alarm } => self.alarm(agent, life, alarm),
            Next::Tick(generation) => {
                if generation == self.generation {
                    self.feed(Input::Tick, None)?;
                }
            }
            Next::StartScheduler => self.start_scheduler()?,
            Next::Thaw(agent) => self.thaw(agent)?,
            Next::Revive { agent, adopts } => self.revive(agent, adopts),
            Next::Heal(agent) => self.cut[agent] = Link::default(),
            Next::Person => self.person()?,
            Next::Fault => self.fault()?,
            Next::Calm => self.calm()?,
            Next::Resume => {
                let paused = self.store.jobs.values().filter(|job| job.state == State::Paused);
                for key in paused.map(|job| job.key.clone()).collect::<Vec<_>>() {
                    self.feed(Input::Resume { key }, None)?;
                }
                self.after(5000, Next::Resume);
            }
        }
        Ok(())
    }

    /// The scheduler takes an input: step, one transaction, then answer and actions. It may die in between.
    fn feed(&mut self, input: Input, from: Option<(usize, u64, u64)>) -> Result<(), String> {
        if self.stalled_until_ms > self.now_ms {
            self.at(self.stalled_until_ms, Next::ToCore { input, from });
            return Ok(());
        }
        let now = Timestamp::from_millis(self.now_ms + self.clock_offset_ms);
        let takes_away = match input {
            Input::Drain { .. } => true,
            Input::Cordon { on, .. } => on,
            Input::SetPolicy { policy, .. } => policy.is_some(),
            _ => false,
        };
        if self.is_calm && takes_away {
            // A wish of earlier that was held up: the fleet of the end is whole, and everybody may have it.
            return Ok(());
        }
        let Some(core) = &mut self.core else { return Ok(()) };
        let effects = checked_step(core, &input, now)?;
        self.note(|| format!("{input:?} -> {:?} {:?}", effects.answer, effects.changes));
        self.tally.step(&input, &effects);
        let crash = if effects.changes.is_empty() { None } else { self.crash.take() };
        if crash == Some(Crash::BeforeStore) {
            self.tally.fault("crash before the store");
            self.kill_scheduler(300);
            return Ok(());
        }
        self.store.apply(&effects.changes)?;
        self.ledger.observe(&input, &effects, self.now_ms)?;
        if let Some(core) = &self.core {
            self.store.check_restores(core)?;
        }
        if crash == Some(Crash::AfterStore) {
            self.tally.fault("crash after the store");
            self.kill_scheduler(300);
            return Ok(());
        }
        let Effects { answer, changes: _, actions, wake } = effects;
        if let Some((agent, life, ticket)) = from {
            self.send_to_agent(agent, |answer| Next::Answered { agent, life, ticket, answer }, answer);
        }
        for action in actions {
            let Some(agent) = self.agents.iter().position(|agent| agent.id == *action.worker()) else { continue };
            self.send_to_agent(agent, |action| Next::Told { agent, action }, action);
        }
        if let Some(wake) = wake {
            self.generation += 1;
            self.at(wake.as_millis() - self.clock_offset_ms, Next::Tick(self.generation));
        }
        Ok(())
    }

    fn start_scheduler(&mut self) -> Result<(), String> {
        if self.core.is_some() {
            return Ok(());
        }
        // A clock of its own, with another zero.
        self.clock_offset_ms = self.rng.below(1_000_000);
        (self.ledger.started_ms, self.ledger.stepped_ms) = (self.now_ms, self.now_ms);
        let now = Timestamp::from_millis(self.now_ms + self.clock_offset_ms);
        let mut core = self.store.restore(SETTINGS, now).map_err(|error| error.to_string())?;
        core.plant = self.plant;
        self.core = Some(core);
        self.note(|| "the scheduler starts".to_owned());
        self.feed(Input::Tick, None)
    }

    fn kill_scheduler(&mut self, down_ms: u64) {
        self.core = None;
        self.generation += 1;
        self.note(|| "the scheduler dies".to_owned());
        self.after(down_ms, Next::StartScheduler);
    }

    fn delay_ms(&mut self) -> u64 {
        if !self.is_calm && self.rng.chance(3) {
            return self.rng.between(5_000, 100_000);
        }
        self.rng.between(1, if self.is_calm { 5 } else { self.slow_ms })
    }

    /// How many copies of a message arrive.
    fn copies(&mut self, is_cut: bool) -> u64 {
        if self.is_calm {
            1
        } else if is_cut || self.rng.chance(self.loss) {
            self.tally.fault("lost message");
            0
        } else if self.rng.chance(self.double) {
            self.tally.fault("doubled message");
            2
        } else {
            1
        }
    }

    fn send_to_agent<T: Clone>(&mut self, agent: usize, make: impl Fn(T) -> Next, what: T) {
        for _ in 0..self.copies(self.cut[agent].from_core) {
            let delay_ms = self.delay_ms();
            self.after(delay_ms, make(what.clone()));
        }
    }

    fn carry_out(&mut self, agent: usize, out: Vec<Out>) {
        let life = self.agents[agent].life;
        for out in out {
            match out {
                Out::Send(input, ticket) => {
                    for _ in 0..self.copies(self.cut[agent].to_core) {
                        let delay_ms = self.delay_ms();
                        let from = ticket.map(|ticket| (agent, life, ticket));
                        self.after(delay_ms, Next::ToCore { input: input.clone(), from });
                    }
                }
                Out::Timer(wait_ms, alarm) => self.after(wait_ms, Next::Alarm { agent, life, alarm }),
                Out::Die => {
                    self.tally.fault("a job killed its worker");
                    self.kill_agent(agent, 1000, false);
                }
            }
        }
    }

    fn alarm(&mut self, agent: usize, life: u64, alarm: Alarm) {
        if self.health[agent] != Health::Up || self.agents[agent].life != life {
            return;
        }
        let mut out = Vec::new();
        if alarm == Alarm::Beat && self.agents[agent].is_cut_off() {
            let session = self.new_session();
            self.agents[agent].connect(session, self.now_ms, &mut out);
        }
        self.agents[agent].alarm(alarm, self.now_ms, self.knobs, &mut self.rng, &mut out);
        self.carry_out(agent, out);
    }

    fn new_session(&mut self) -> Session {
        self.n_sessions += 1;
        Session(self.n_sessions)
    }

    fn kill_agent(&mut self, agent: usize, down_ms: u64, adopts: bool) {
        if self.health[agent] == Health::Dead {
            return;
        }
        self.health[agent] = Health::Dead;
        self.frozen[agent].clear();
        self.note(|| format!("w{agent} dies"));
        self.after(down_ms, Next::Revive { agent, adopts });
    }

    fn revive(&mut self, agent: usize, adopts: bool) {
        self.health[agent] = Health::Up;
        let session = self.new_session();
        let mut out = Vec::new();
        self.agents[agent].start(session, self.now_ms, adopts, &mut out);
        self.carry_out(agent, out);
    }

    fn thaw(&mut self, agent: usize) -> Result<(), String> {
        if self.health[agent] == Health::Frozen {
            self.health[agent] = Health::Up;
            for next in std::mem::take(&mut self.frozen[agent]) {
                self.happen(next)?;
            }
        }
        Ok(())
    }

    /// Something breaks.
    fn fault(&mut self) -> Result<(), String> {
        if self.is_calm {
            return Ok(());
        }
        let wait_ms = self.rng.between(200, 3000);
        self.after(wait_ms, Next::Fault);
        let agent = self.rng.below(self.agents.len() as u64) as usize;
        let long_ms = self.rng.between(100, 9000);
        match self.rng.below(10) {
            9 => self.lie(agent)?,
            0 => {
                self.tally.fault("a worker died");
                let adopts = self.rng.chance(300);
                self.kill_agent(agent, long_ms, adopts);
            }
            1 if self.health[agent] == Health::Up => {
                self.tally.fault("a worker froze");
                self.health[agent] = Health::Frozen;
                self.after(long_ms, Next::Thaw(agent));
            }
            2 => {
                self.tally.fault("a connection broke");
                let (worker, session) = (self.agents[agent].id.clone(), self.agents[agent].session);
                self.after(1, Next::ToCore { input: Input::Disconnect { worker, session }, from: None });
                if self.health[agent] == Health::Up {
                    let session = self.new_session();
                    let mut out = Vec::new();
                    self.agents[agent].connect(session, self.now_ms, &mut out);
                    self.carry_out(agent, out);
                }
            }
            3 if self.core.is_some() => {
                self.tally.fault("the scheduler died");
                self.kill_scheduler(long_ms);
            }
            4 => {
                self.tally.fault("the scheduler stalled");
                self.stalled_until_ms = self.now_ms + long_ms / 2;
            }
            5 | 6 => {
                self.tally.fault("a partition");
                self.cut[agent] = match self.rng.below(3) {
                    0 => Link { to_core: true, from_core: false },
                    1 => Link { to_core: false, from_core: true },
                    _ => Link { to_core: true, from_core: true },
                };
                self.after(long_ms, Next::Heal(agent));
            }
            7 => self.crash = Some(Crash::BeforeStore),
            _ => self.crash = Some(Crash::AfterStore),
        }
        Ok(())
    }

    /// A worker speaks for an attempt that is not its own, or that nobody has.
    fn lie(&mut self, agent: usize) -> Result<(), String> {
        if self.stalled_until_ms > self.now_ms {
            // Until it is heard it might have become true.
            return Ok(());
        }
        let jobs: Vec<&Job> = self.store.jobs.values().filter(|job| job.state.is_live()).collect();
        let Some(job) = self.rng.pick(&jobs) else { return Ok(()) };
        let (key, epoch) = (job.key.clone(), job.epoch);
        let leads = |cohort: &Cohort| cohort.is_led_by(&self.agents[agent].id);
        if job.cohort.and_then(|id| self.store.cohorts.get(&id)).is_some_and(leads) {
            return Ok(());
        }
        self.tally.fault("a lie");
        let worker = self.agents[agent].id.clone();
        let epoch = if self.rng.chance(300) { epoch.next() } else { epoch };
        let input = if self.rng.chance(500) {
            let digest = digest_of(&key, Commit::Output);
            Input::Commit { key, epoch, worker, commit: Commit::Output, digest }
        } else {
            Input::AttemptFinished { key, epoch, worker, outcome: Outcome::Succeeded }
        };
        self.feed(input, None)
    }

    /// The faults stop, and everybody comes back.
    fn calm(&mut self) -> Result<(), String> {
        self.note(|| "the faults stop".to_owned());
        self.is_calm = true;
        self.crash = None;
        (self.knobs.crash, self.knobs.stubborn, self.knobs.refuse) = (0, 0, 0);
        self.start_scheduler()?;
        for agent in 0..self.agents.len() {
            self.cut[agent] = Link::default();
            self.thaw(agent)?;
            // Also those that were drained.
            self.kill_agent(agent, 500, true);
        }
        for project in ["red", "blue"].map(|name| Project::new(name).unwrap()) {
            self.feed(Input::SetPolicy { project, policy: None }, None)?;
        }
        for worker in self.store.rules.cordoned.clone() {
            self.feed(Input::Cordon { worker, on: false, drains: false }, None)?;
        }
        self.after(1000, Next::Resume);
        self.after(50, Next::Person);
        Ok(())
    }

    /// A number that says how it went.
    pub(crate) fn fingerprint(&self) -> String {
        format!("{:?} {} {:?}", self.store.log, self.n_events, self.tally)
    }
}
