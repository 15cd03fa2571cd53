//! The state of the scheduler, and the one function that changes it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::time::Duration;

use attune_spec::id::{CohortId, Digest, Project, WorkerId};

use crate::job::Place;
use crate::placement::{self, Ask, Blocked, Seat, Tenant};
use crate::plant::Plant;
use crate::project::{Accounts, Policy, Usage};
use crate::queue::{Asked, Queue, Queued};
use crate::step::Draft;
use crate::timers::{Timer, Timers};
use crate::{
    Answer, Attempt, Backoff, Cohort, Devices, Effects, Input, Job, JobKey, Memory, RestoreError, State, Timestamp,
    Worker, invariants,
};

/// The limits that a scheduler works with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Settings {
    /// How long a lease lasts without a heartbeat; workers send one about every third of it.
    pub ttl: Duration,
    /// After how long a job that was asked to stop counts as stopped. Longer than the grace time of the workers, which
    /// kill first.
    pub stop_limit: Duration,
    /// The waits after failed attempts.
    pub backoff: Backoff,
    /// After how many distinct lost workers, without progress between them, a job is given up.
    pub quarantine_after: u32,
    /// The most jobs that share a process.
    pub max_lanes: NonZeroU32,
    /// How long a job that may share a process waits in the queue for others to share it with.
    pub lane_wait: Duration,
    /// Whether jobs of a lower priority are preempted for those of a higher one.
    pub preempts: bool,
}

impl Default for Settings {
    /// Leases of 10 s, 45 s to stop (workers kill after 30 s), three lost workers, eight lanes that gather for 2 s, preemption.
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(10),
            stop_limit: Duration::from_secs(45),
            backoff: Backoff::default(),
            quarantine_after: 3,
            max_lanes: NonZeroU32::MIN.saturating_add(7),
            lane_wait: Duration::from_secs(2),
            preempts: true,
        }
    }
}

/// The numbers to be given out next; stored, because a number is never given out twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Counters {
    /// The next cohort.
    pub next_cohort: CohortId,
    /// The next place in the queue.
    pub next_order: u64,
}

impl Default for Counters {
    fn default() -> Self {
        Self { next_cohort: CohortId(1), next_order: 1 }
    }
}

/// Cohorts by the priority of their attempts, with how many each has of it.
pub(crate) type Live = BTreeMap<i32, BTreeMap<CohortId, u32>>;

/// What people have said, other than of jobs; stored by the shell.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Rules {
    /// What projects may have.
    pub policies: BTreeMap<Project, Policy>,
    /// Workers that get nothing new.
    pub cordoned: BTreeSet<WorkerId>,
}

/// The scheduler's whole state.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Core {
    pub(crate) settings: Settings,
    pub(crate) now: Timestamp,
    // Stored by the shell.
    pub(crate) counters: Counters,
    pub(crate) jobs: BTreeMap<JobKey, Job>,
    pub(crate) cohorts: BTreeMap<CohortId, Cohort>,
    pub(crate) policies: BTreeMap<Project, Policy>,
    pub(crate) cordoned: BTreeSet<WorkerId>,
    // Told by the workers.
    pub(crate) workers: BTreeMap<WorkerId, Worker>,
    // Derived from the above.
    pub(crate) queue: Queue,
    pub(crate) accounts: Accounts,
    /// The cohorts of live attempts by the priority of these, with how many it has of each.
    pub(crate) live: Live,
    pub(crate) dependants: BTreeMap<JobKey, BTreeSet<JobKey>>,
    pub(crate) due: BTreeSet<JobKey>,
    pub(crate) leases: BTreeMap<(WorkerId, CohortId), crate::lease::Lease>,
    pub(crate) timers: Timers,
    #[cfg(test)]
    pub(crate) plant: Option<Plant>,
}

impl Core {
    /// A scheduler without jobs.
    pub fn new(settings: Settings, now: Timestamp) -> Self {
        Self {
            settings,
            now,
            counters: Counters::default(),
            jobs: BTreeMap::new(),
            cohorts: BTreeMap::new(),
            policies: BTreeMap::new(),
            cordoned: BTreeSet::new(),
            workers: BTreeMap::new(),
            queue: Queue::default(),
            accounts: Accounts::default(),
            live: Live::new(),
            dependants: BTreeMap::new(),
            due: BTreeSet::new(),
            leases: BTreeMap::new(),
            timers: Timers::default(),
            #[cfg(test)]
            plant: None,
        }
    }

    /// The scheduler that stored these rows, started again.
    ///
    /// `jobs` holds every job whose state is not final (others may be left out), `cohorts` every cohort that is not over, `rules` what
    /// people have said of projects and workers.
    /// Every deadline starts anew: each lease has its whole length in which its worker may come back.
    ///
    /// # Errors
    /// When the rows do not fit together.
    pub fn restore(
        settings: Settings,
        jobs: impl IntoIterator<Item = Job>,
        cohorts: impl IntoIterator<Item = Cohort>,
        rules: Rules,
        counters: Counters,
        now: Timestamp,
    ) -> Result<Self, RestoreError> {
        let mut core = Self::new(settings, now);
        core.counters = counters;
        Rules { policies: core.policies, cordoned: core.cordoned } = rules;
        core.jobs = jobs.into_iter().map(|job| (job.key.clone(), job)).collect();
        core.cohorts = cohorts.into_iter().map(|cohort| (cohort.id, cohort)).collect();
        core.build_indexes();
        invariants::all(&core)?;
        Ok(core)
    }

    fn build_indexes(&mut self) {
        for job in self.jobs.values() {
            if job.counts_as_queued() {
                self.accounts.change(&job.key.project, |account| account.n_queued += 1);
            }
            match job.state {
                State::Queued => {
                    self.queue.insert(job);
                }
                State::Waiting => {
                    // What was seen before the restart is forgotten; looking twice does no harm.
                    if job.request.is_staged {
                        self.due.insert(job.key.clone());
                    }
                    for dependency in job.awaited() {
                        self.dependants.entry(dependency).or_default().insert(job.key.clone());
                    }
                }
                State::Stopping(_) => {
                    self.timers.set(Timer::Stop(job.key.clone()), self.now.plus(self.settings.stop_limit));
                }
                State::Backoff => {
                    let wait = self.wait_after_failure(job);
                    self.timers.set(Timer::Backoff(job.key.clone()), self.now.plus(wait));
                }
                State::Starting
                | State::Running
                | State::Paused
                | State::Succeeded
                | State::Failed
                | State::Cancelled => {}
            }
        }
        for cohort in self.cohorts.keys().copied().collect::<Vec<_>>() {
            self.count_cohort(cohort);
            for attempt in &self.cohorts[&cohort].attempts {
                let priority = self.jobs.get(&attempt.key).map_or(0, |job| job.request.priority);
                *self.live.entry(priority).or_default().entry(cohort).or_default() += 1;
            }
            // An attempt that got beyond its start was on its workers; of one that starts nobody knows.
            let arrived = |attempt: &Attempt| self.jobs.get(&attempt.key).is_some_and(|j| j.state != State::Starting);
            let arrived = self.cohorts[&cohort].attempts.iter().any(arrived);
            self.open_leases(cohort, arrived);
        }
    }

    /// Takes one input and says what follows from it.
    ///
    /// # Panics
    /// When an invariant is broken, which is a defect of this crate: going on could lose work.
    pub fn step(&mut self, input: Input, now: Timestamp) -> Effects {
        self.advance(now);
        let mut draft = Draft::new(self.counters);
        let answer = self.dispatch(input, &mut draft).unwrap_or_else(Answer::Refused);
        self.follow_dependencies(&mut draft);
        if draft.has_room() {
            self.grant(&mut draft);
        }
        self.finish(draft, answer)
    }

    /// Takes the time, and spares the workers when it was this scheduler that stood still.
    pub(crate) fn advance(&mut self, now: Timestamp) {
        let now = now.max(self.now);
        let is_stall = now.since(self.now) > self.settings.ttl / 2 && !self.has(Plant::StallBlamed);
        if is_stall && self.timers.watches_workers() {
            self.timers.spare_workers_until(now.plus(self.settings.ttl));
        }
        self.now = now;
    }

    /// When the next tick is needed. While workers are watched that is at least four times per lease, so that a longer
    /// silence can be recognised as a stall of the scheduler.
    pub fn wake(&self) -> Option<Timestamp> {
        let watch = self.timers.watches_workers().then(|| self.now.plus(self.settings.ttl / 4));
        self.timers.next().into_iter().chain(watch).min()
    }

    /// The jobs whose stages somebody has to look at, see [`Input::Looked`].
    pub fn due(&self) -> impl Iterator<Item = &JobKey> {
        self.due.iter()
    }

    /// The limits that it works with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The numbers to be given out next.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// One job.
    pub fn job(&self, key: &JobKey) -> Option<&Job> {
        self.jobs.get(key)
    }

    /// All jobs, by key.
    pub fn jobs(&self) -> impl Iterator<Item = &Job> {
        self.jobs.values()
    }

    /// One cohort.
    pub fn cohort(&self, id: CohortId) -> Option<&Cohort> {
        self.cohorts.get(&id)
    }

    /// All cohorts, by number.
    pub fn cohorts(&self) -> impl Iterator<Item = &Cohort> {
        self.cohorts.values()
    }

    /// One worker.
    pub fn worker(&self, id: &WorkerId) -> Option<&Worker> {
        self.workers.get(id)
    }

    /// All registered workers, by name.
    pub fn workers(&self) -> impl Iterator<Item = &Worker> {
        self.workers.values()
    }

    /// The keys of the queued jobs, by priority and age. Among jobs of equal priority it is the shares of their projects that decide.
    pub fn queue(&self) -> impl Iterator<Item = &JobKey> {
        self.queue.in_order().into_iter().map(|place| &place.key)
    }

    /// What people have said that each project may have; of others nothing.
    pub fn policies(&self) -> &BTreeMap<Project, Policy> {
        &self.policies
    }

    /// What a project may have.
    pub fn policy(&self, project: &Project) -> Policy {
        self.policies.get(project).copied().unwrap_or_default()
    }

    /// What a project has, and how many of its jobs have neither ended nor run.
    pub fn usage(&self, project: &Project) -> (Usage, u32) {
        self.accounts.of(project).map(|account| (account.usage, account.n_queued)).unwrap_or_default()
    }

    /// The projects that have something or may not have all.
    pub fn projects(&self) -> BTreeSet<&Project> {
        self.accounts.projects().chain(self.policies.keys()).collect()
    }

    /// The workers that get nothing new because somebody said so.
    pub fn cordoned(&self) -> &BTreeSet<WorkerId> {
        &self.cordoned
    }

    /// Why a queued job is not granted; nothing for a job that is not queued.
    pub fn blocked(&self, key: &JobKey) -> Option<Blocked> {
        self.jobs.get(key).filter(|job| job.state == State::Queued)?;
        let tenant = self.tenant(&key.project);
        let (ask, seats) = (self.ask(key)?, self.seats());
        placement::blocked(|| self.lines(), &ask, tenant, &seats, self.settings.max_lanes)
    }

    /// The queue as it is walked.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (Tenant, impl Iterator<Item = impl Iterator<Item = Ask<'_>>>)> {
        self.queue.lines().map(|(project, groups)| {
            (self.tenant(project), groups.map(|group| group.map(|queued| self.ask_at(queued))))
        })
    }

    pub(crate) fn tenant(&self, project: &Project) -> Tenant {
        let policy = if self.has(Plant::QuotaIgnored) { Policy::default() } else { self.policy(project) };
        Tenant { policy, usage: self.usage(project).0 }
    }

    /// What a queued job asks for.
    pub(crate) fn ask(&self, key: &JobKey) -> Option<Ask<'_>> {
        self.queue.get(self.jobs.get(key)?).map(|queued| self.ask_at(queued))
    }

    pub(crate) fn ask_at<'a>(&'a self, (resources, place, asked): Queued<'a>) -> Ask<'a> {
        const ANY: Digest = Digest::from_bytes([0; 32]);
        let Asked { prefer, avoid, share, memory } = asked;
        let Place { priority: Reverse(priority), order, key } = place;
        let gathers = share.is_some() && self.timers.get(&Timer::Gather(key.clone())).is_some();
        Ask {
            key,
            priority: *priority,
            order: *order,
            resources,
            prefer,
            avoid,
            share: if self.has(Plant::KeyUnchecked) { Some(&ANY) } else { share.as_ref() },
            gathers,
            memory: if self.has(Plant::MemoryIgnored) { Memory::default() } else { *memory },
        }
    }

    pub(crate) fn seats(&self) -> Vec<Seat<'_>> {
        self.seats_with(Worker::free)
    }

    /// The workers that take new work, and what counts as free of each; by name.
    pub(crate) fn seats_with(&self, free: impl Fn(&Worker) -> Devices) -> Vec<Seat<'_>> {
        let takes_work = |worker: &&Worker| {
            let is_told_off = worker.draining || worker.rests || worker.outdated;
            worker.connected && !is_told_off && !self.cordoned.contains(&worker.id)
        };
        let seat = |worker| {
            let Worker { id, devices, memory, labels, .. }: &Worker = worker;
            Seat { worker: id, devices: *devices, free: free(worker), memory, labels }
        };
        self.workers.values().filter(takes_work).map(seat).collect()
    }

    pub(crate) fn wait_after_failure(&self, job: &Job) -> Duration {
        let attempt = Attempt { key: job.key.clone(), epoch: job.epoch };
        self.settings.backoff.wait(&attempt, job.n_failed.max(job.n_offers_refused))
    }

    /// Whether a test has planted this defect.
    #[cfg_attr(not(test), expect(clippy::unused_self, reason = "defects exist in tests only"))]
    pub(crate) fn has(&self, plant: Plant) -> bool {
        #[cfg(test)]
        return self.plant == Some(plant);
        #[cfg(not(test))]
        {
            let _ = plant;
            false
        }
    }
}
