//! How many workers to have: what to ask engines for, and what to give back to them.
//!
//! An engine (Slurm, this machine) owns machines and starts workers on them when it is asked to. All workers of a **pool** are alike. A
//! **request** is one worker that was asked for: it waits in the engine's line, runs, comes (its worker registers and names it in a
//! label, [`REQUEST_LABEL`]), and ends. What an engine says of its requests is the truth: nothing of this is stored, and a
//! scheduler that starts anew, or another one that takes over, finds its requests in the engine's list.
//!
//! [`Supply::step`] is called now and then with these lists. It lets the queue be placed ([`crate::placement`]) on the workers that are
//! there and those that are coming, then what is left on as many further ones as pools may still have: those that this
//! walk takes are asked for. So a gang is asked for whole or not at all, and what a project may not have is not asked for.
//!
//! # What it holds to
//! * Never more requests than `max`, however they end. Those that are being given back count until the engine has them no more.
//! * Only a worker that runs nothing is given back, after `idle` of it, and only if no job of the queue would be placed there, alone or as one
//!   of a gang. It is drained in the same turn of the scheduler in which this is found, so it gets nothing new.
//! * A request that the engine has started and whose worker does not come within `start` is withdrawn; so is one whose worker went
//!   silent for as long, and one that was given back and did not end. One that waits in the engine's line keeps its place there for
//!   as long as a job needs it, and `idle` beyond.
//! * After requests that came to nothing nobody asks again for a while, which doubles with each in a row.
//! * It comes to rest: of equal jobs and workers the next step asks for nothing and gives nothing back.

mod need;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use attune_spec::id::{Name, WorkerId};
use need::{Absent, Need};

use crate::{Core, Devices, Timestamp, Worker};

/// The label by which a worker names the request that it was started for.
pub const REQUEST_LABEL: &str = "attune.request";

/// The first and the longest wait after requests that came to nothing.
const WAITS: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(600));

/// One worker that an engine was asked for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub Name);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Workers of one kind that an engine starts, and how many of them there may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Its name.
    pub name: Name,
    /// The devices of each worker.
    pub devices: Devices,
    /// The labels of each worker, that of its request not among them.
    pub labels: BTreeMap<String, String>,
    /// Workers that are there even if nothing waits.
    pub min: u32,
    /// The most that may be asked for at once.
    pub max: u32,
    /// How long a worker runs nothing before it is given back.
    pub idle: Duration,
    /// How long the engine's start of a worker may be ago before the worker registers; and how long one may be silent, or take to
    /// end.
    pub start: Duration,
}

/// Where a request stands with its engine. One that has ended is not listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Standing {
    /// In the engine's line.
    Waiting,
    /// Started, or about to end.
    Running,
}

/// What an engine has, by request; nothing where it could not be asked.
pub type Listed = Option<BTreeMap<RequestId, Standing>>;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Ask the engine of a pool for so many workers more.
    Ask {
        /// The pool.
        pool: Name,
        /// How many.
        n: u32,
    },
    /// Drain a worker at once, before anything else is granted, then give it back.
    GiveBack {
        /// The pool.
        pool: Name,
        /// The request.
        request: RequestId,
        /// The worker, which runs nothing.
        worker: WorkerId,
    },
    /// End a request, whatever became of it.
    Withdraw {
        /// The pool.
        pool: Name,
        /// The request.
        request: RequestId,
        /// Why.
        why: Why,
    },
}

/// Why a request is withdrawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It waits in the engine's line, and no job needs it any more.
    NotNeeded,
    /// The engine started it, and its worker has not come.
    NeverCame,
    /// Its worker has gone silent.
    Silent,
    /// It was given back and has not ended.
    DoesNotEnd,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotNeeded => "no job needs it any more",
            Self::NeverCame => "it was started and its worker has not come",
            Self::Silent => "its worker has gone silent",
            Self::DoesNotEnd => "it was given back and has not ended",
        })
    }
}

/// Where a request is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Its worker has not come.
    Coming,
    /// Its worker is connected.
    Here,
    /// Its worker was connected and is not.
    Away,
    /// It is to end.
    Leaving,
}

#[derive(Debug, Clone)]
struct Request {
    standing: Standing,
    phase: Phase,
    /// When it came to be as it is.
    since: Timestamp,
    /// Since when nobody needs it.
    spare: Option<Timestamp>,
}

impl Request {
    fn turn(&mut self, phase: Phase, now: Timestamp) {
        if self.phase != phase {
            (self.phase, self.since, self.spare) = (phase, now, None);
        }
    }

    fn withdraw(&mut self, pool: &Pool, id: &RequestId, why: Why, now: Timestamp) -> Order {
        (self.phase, self.since, self.spare) = (Phase::Leaving, now, None);
        Order::Withdraw { pool: pool.name.clone(), request: id.clone(), why }
    }
}

/// A pool with its requests.
#[derive(Debug, Clone)]
struct Lot {
    pool: Pool,
    requests: BTreeMap<RequestId, Request>,
    /// Whether the engine could be asked in this step.
    is_known: bool,
    /// Times in a row that requests came to nothing.
    n_failed: u32,
    not_before: Timestamp,
}

/// All pools, what was asked for in each, and how it goes.
#[derive(Debug, Clone)]
pub struct Supply {
    lots: Vec<Lot>,
}

impl Supply {
    /// Pools of which nothing is known yet.
    pub fn new(pools: Vec<Pool>) -> Self {
        let lot = |pool| Lot {
            pool,
            requests: BTreeMap::new(),
            is_known: false,
            n_failed: 0,
            not_before: Timestamp::default(),
        };
        Self { lots: pools.into_iter().map(lot).collect() }
    }

    /// The pools.
    pub fn pools(&self) -> impl Iterator<Item = &Pool> {
        self.lots.iter().map(|lot| &lot.pool)
    }

    /// What is to be done, given what each pool's engine has; a pool that is not in `listed` could not be asked.
    ///
    /// Whatever it orders counts as done: [`Order::GiveBack`] must be followed before `core` takes another step.
    pub fn step(&mut self, core: &Core, mut listed: BTreeMap<Name, Listed>, now: Timestamp) -> Vec<Order> {
        let workers: BTreeMap<&str, &Worker> = core
            .workers()
            .filter(|worker| worker.connected)
            .filter_map(|worker| Some((worker.labels.get(REQUEST_LABEL)?.as_str(), worker)))
            .collect();
        let mut orders = Vec::new();
        for lot in &mut self.lots {
            let found = listed.remove(&lot.pool.name).flatten();
            lot.is_known = found.is_some();
            if let Some(found) = found {
                lot.hear(found, now);
            }
            lot.meet(&workers, now);
            if lot.is_known {
                lot.end_late(now, &mut orders);
            }
        }
        let need = self.need(core, &workers, now);
        for (lot, n_asked) in self.lots.iter_mut().zip(&need.asked) {
            if lot.is_known {
                lot.order(*n_asked, &need, &workers, now, &mut orders);
            }
        }
        orders
    }

    /// The engine of a pool refused to start a worker.
    pub fn refused(&mut self, pool: &Name, now: Timestamp) {
        for lot in self.lots.iter_mut().filter(|lot| lot.pool.name == *pool) {
            lot.fail(now);
        }
    }

    /// What the queue would take of what is there and coming, and how many more.
    fn need<'c>(&self, core: &'c Core, workers: &BTreeMap<&str, &Worker>, now: Timestamp) -> Need<'c> {
        let coming = |(idx, lot): (usize, &Lot)| {
            let coming = lot.requests.iter().filter(|(_, request)| request.phase == Phase::Coming);
            coming.map(move |(id, _)| (idx, Some(id.clone()))).collect::<Vec<_>>()
        };
        let coming = self.lots.iter().enumerate().flat_map(coming).collect();
        let room: Vec<u32> = self.lots.iter().map(|lot| lot.room(now)).collect();
        // Those that are to be there whatever waits are asked for anyhow, and jobs will be placed on them.
        let more = self.lots.iter().zip(&room).map(|(lot, room)| lot.lacking(workers).min(*room)).collect();
        need::need(core, &self.pools().collect::<Vec<_>>(), Absent { coming, room }, more)
    }
}

impl Lot {
    /// Takes what the engine has.
    fn hear(&mut self, found: BTreeMap<RequestId, Standing>, now: Timestamp) {
        let mut came_to_nothing = false;
        self.requests.retain(|id, request| {
            let is_there = found.contains_key(id);
            came_to_nothing |= !is_there && request.phase == Phase::Coming;
            is_there
        });
        if came_to_nothing {
            self.fail(now);
        }
        for (id, standing) in found {
            let new = Request { standing, phase: Phase::Coming, since: now, spare: None };
            let request = self.requests.entry(id).or_insert(new);
            match (request.standing, standing) {
                (Standing::Waiting, Standing::Running) if request.phase == Phase::Coming => request.since = now,
                // It was put back into the line, as Slurm does when a node fails.
                (Standing::Running, Standing::Waiting) if request.phase != Phase::Leaving => {
                    request.turn(Phase::Coming, now);
                }
                _ => {}
            }
            request.standing = standing;
        }
    }

    /// Takes which workers are there.
    fn meet(&mut self, workers: &BTreeMap<&str, &Worker>, now: Timestamp) {
        let (mut has_come, mut is_odd) = (false, false);
        for (id, request) in &mut self.requests {
            match (workers.get(id.0.as_str()), request.phase) {
                (_, Phase::Leaving) | (None, Phase::Coming | Phase::Away) => {}
                (None, Phase::Here) => request.turn(Phase::Away, now),
                (Some(worker), phase) => {
                    let is_new = phase == Phase::Coming;
                    has_come |= is_new;
                    is_odd |= is_new && !self.pool.is_like(worker);
                    request.turn(Phase::Here, now);
                }
            }
        }
        if is_odd {
            // A worker that is not what was asked for runs nothing of what it was asked for, and the next one would be no better.
            self.fail(now);
        } else if has_come {
            (self.n_failed, self.not_before) = (0, now);
        }
    }

    fn fail(&mut self, now: Timestamp) {
        self.n_failed = self.n_failed.saturating_add(1);
        let wait = WAITS.0.saturating_mul(1 << (self.n_failed - 1).min(16)).min(WAITS.1);
        self.not_before = now.plus(wait);
    }

    /// How many more may be asked for now.
    fn room(&self, now: Timestamp) -> u32 {
        let n = u32::try_from(self.requests.len()).unwrap_or(u32::MAX);
        if self.is_known && now >= self.not_before { self.pool.max.saturating_sub(n) } else { 0 }
    }

    /// How many are there or coming, and stay.
    fn n_alive(&self, workers: &BTreeMap<&str, &Worker>) -> u32 {
        let stays = |(id, request): &(&RequestId, &Request)| {
            request.phase != Phase::Leaving && workers.get(id.0.as_str()).is_none_or(|worker| !worker.draining)
        };
        u32::try_from(self.requests.iter().filter(stays).count()).unwrap_or(u32::MAX)
    }

    /// How many there are fewer than the least.
    fn lacking(&self, workers: &BTreeMap<&str, &Worker>) -> u32 {
        self.pool.min.saturating_sub(self.n_alive(workers))
    }

    fn order(
        &mut self,
        n_asked: u32,
        need: &Need<'_>,
        workers: &BTreeMap<&str, &Worker>,
        now: Timestamp,
        orders: &mut Vec<Order>,
    ) {
        let n_alive = self.n_alive(workers);
        if n_asked > 0 {
            orders.push(Order::Ask { pool: self.pool.name.clone(), n: n_asked });
        }
        let mut spare: Vec<(Timestamp, RequestId)> = Vec::new();
        for (id, request) in &mut self.requests {
            let is_needed = match (request.phase, workers.get(id.0.as_str())) {
                (Phase::Coming, _) => need.coming.contains(id),
                (Phase::Here, Some(worker)) => {
                    !worker.occupied.is_empty() || need.workers.binary_search(&&worker.id).is_ok()
                }
                _ => true,
            };
            request.spare = if is_needed { None } else { request.spare.or(Some(now)) };
            // What is being started comes, and goes if it stays idle.
            let is_started = request.phase == Phase::Coming && request.standing == Standing::Running;
            let since = request.spare.filter(|since| now.since(*since) >= self.pool.idle && !is_started);
            spare.extend(since.map(|since| (since, id.clone())));
        }
        // Those who were not needed for the longest time go first.
        spare.sort_unstable();
        self.end_spare(spare.into_iter().map(|(_, id)| id), n_alive, workers, now, orders);
    }

    /// Withdraws what has taken too long.
    fn end_late(&mut self, now: Timestamp, orders: &mut Vec<Order>) {
        let mut never_came = false;
        for (id, request) in &mut self.requests {
            let why = match (request.phase, request.standing) {
                (Phase::Leaving, _) => Why::DoesNotEnd,
                (Phase::Away, _) => Why::Silent,
                (Phase::Coming, Standing::Running) => Why::NeverCame,
                (Phase::Coming, Standing::Waiting) | (Phase::Here, _) => continue,
            };
            if now.since(request.since) >= self.pool.start {
                never_came |= why == Why::NeverCame;
                orders.push(request.withdraw(&self.pool, id, why, now));
            }
        }
        if never_came {
            self.fail(now);
        }
    }

    /// Gives back what nobody needs, beyond the least number; `n_alive` are there or coming.
    fn end_spare(
        &mut self,
        spare: impl Iterator<Item = RequestId>,
        mut n_alive: u32,
        workers: &BTreeMap<&str, &Worker>,
        now: Timestamp,
        orders: &mut Vec<Order>,
    ) {
        for id in spare {
            let Some(request) = self.requests.get_mut(&id) else { continue };
            let worker = workers.get(id.0.as_str()).filter(|_| request.phase == Phase::Here);
            let counts = worker.is_none_or(|worker| !worker.draining);
            if counts && n_alive <= self.pool.min {
                continue;
            }
            n_alive -= u32::from(counts);
            orders.push(match worker {
                Some(worker) => {
                    request.turn(Phase::Leaving, now);
                    let (pool, worker) = (self.pool.name.clone(), worker.id.clone());
                    Order::GiveBack { pool, request: id, worker }
                }
                None => request.withdraw(&self.pool, &id, Why::NotNeeded, now),
            });
        }
    }
}

impl Pool {
    /// Whether a worker has what one of this pool should have.
    fn is_like(&self, worker: &Worker) -> bool {
        let Devices { n_cpu, n_cuda } = self.devices;
        let has = |(name, value): (&String, &String)| worker.labels.get(name) == Some(value);
        worker.devices.n_cpu >= n_cpu && worker.devices.n_cuda >= n_cuda && self.labels.iter().all(has)
    }
}
