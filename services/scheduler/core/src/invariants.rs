//! What is always true, as named predicates.
//!
//! Tests, the model and the simulation check all of them after every step; a release build checks [`job_is_whole`] and
//! [`terminal_is_final`] for the jobs that a step touched.

use std::collections::{BTreeMap, BTreeSet};

use attune_spec::id::{CohortId, WorkerId};

use crate::machine::Live;
use crate::project::Accounts;
use crate::queue::Queue;
use crate::timers::Timer;
use crate::{Answer, Change, Core, Effects, Input, Job, JobKey, RestoreError, State, Stop, placement};

/// An invariant that does not hold.
pub type Broken = RestoreError;

fn holds(invariant: &'static str, truth: bool, detail: impl FnOnce() -> String) -> Result<(), Broken> {
    if truth { Ok(()) } else { Err(Broken { invariant, detail: detail() }) }
}

/// All predicates over a state.
///
/// # Errors
/// The first one that does not hold.
pub fn all(core: &Core) -> Result<(), Broken> {
    one_live_epoch(core)?;
    no_job_lost(core)?;
    gang_whole(core)?;
    stages_belong(core)?;
    lanes_fit(core)?;
    accounts_balance(core)?;
    queue_is_served(core)?;
    indexes_agree(core)
}

/// A job has a cohort exactly while it is live, that cohort runs it under its newest epoch, and no other cohort runs it.
///
/// # Errors
/// When it does not hold.
pub fn one_live_epoch(core: &Core) -> Result<(), Broken> {
    const NAME: &str = "one_live_epoch";
    let mut run_by: BTreeMap<&JobKey, CohortId> = BTreeMap::new();
    for cohort in core.cohorts() {
        holds(NAME, !cohort.attempts.is_empty(), || format!("cohort {} runs nothing", cohort.id))?;
        holds(NAME, cohort.id < core.counters.next_cohort, || format!("cohort {} is not numbered yet", cohort.id))?;
        for attempt in &cohort.attempts {
            let earlier = run_by.insert(&attempt.key, cohort.id);
            holds(NAME, earlier.is_none(), || format!("{} is run by {earlier:?} and {}", attempt.key, cohort.id))?;
            let job = core.job(&attempt.key);
            let is_live = job.is_some_and(|job| job.is_live(attempt.epoch) && job.cohort == Some(cohort.id));
            holds(NAME, is_live, || format!("cohort {} runs a dead epoch of {}", cohort.id, attempt.key))?;
        }
    }
    core.jobs().try_for_each(|job| job_is_whole(core, &job.key))
}

/// One job: it has a cohort exactly while it is live, that cohort runs it under its newest epoch, its reason is one of its
/// state's.
///
/// # Errors
/// When it does not hold.
pub fn job_is_whole(core: &Core, key: &JobKey) -> Result<(), Broken> {
    const NAME: &str = "one_live_epoch";
    let Some(job) = core.job(key) else { return holds(NAME, false, || format!("{key} does not exist")) };
    holds(NAME, job.state.allows(job.reason), || format!("{key} is {} because of {}", job.state, job.reason))?;
    holds(NAME, job.state.is_live() == job.cohort.is_some(), || format!("{key} is {}: {:?}", job.state, job.cohort))?;
    holds(NAME, job.order < core.counters.next_order, || format!("{key} has place {} already", job.order))?;
    let Some(id) = job.cohort else { return Ok(()) };
    let runs = |cohort: &crate::Cohort| cohort.attempts.iter().any(|a| a.key == *key && a.epoch == job.epoch);
    holds(NAME, core.cohort(id).is_some_and(runs), || format!("cohort {id} does not run epoch {} of {key}", job.epoch))
}

/// Every job that is not final has something that will move it: a place in the queue, a timer, an unfinished dependency or
/// stage, somebody who will look at its stages, a lease, or a person.
///
/// # Errors
/// When it does not hold.
pub fn no_job_lost(core: &Core) -> Result<(), Broken> {
    for job in core.jobs() {
        let key = &job.key;
        let has = |timer: Timer| core.timers.get(&timer).is_some();
        let is_leased = || {
            let shares = job.cohort.and_then(|id| core.cohort(id)).map(|cohort| cohort.shares.as_slice());
            let id = job.cohort.unwrap_or_default();
            shares.unwrap_or_default().iter().all(|share| has(Timer::Lease(id, share.worker.clone())))
        };
        let is_kept = match job.state {
            State::Waiting => {
                let is_open = |key: JobKey| core.job(&key).is_some_and(|job| !job.state.is_final());
                let moves = !job.pending.is_empty() || core.due.contains(key);
                moves && job.awaited().into_iter().all(is_open)
            }
            State::Queued => core.queue.get(job).is_some(),
            State::Starting | State::Running => is_leased(),
            State::Stopping(_) => is_leased() && has(Timer::Stop(key.clone())),
            State::Backoff => has(Timer::Backoff(key.clone())),
            State::Paused | State::Succeeded | State::Failed | State::Cancelled => true,
        };
        holds("no_job_lost", is_kept, || format!("nothing will ever move {key}, which is {}", job.state))?;
    }
    Ok(())
}

/// A cohort has as many distinct workers, each with as many devices, as its jobs ask for, ranked from 0; and no worker
/// gives more devices than it has.
///
/// # Errors
/// When it does not hold.
pub fn gang_whole(core: &Core) -> Result<(), Broken> {
    const NAME: &str = "gang_whole";
    for cohort in core.cohorts() {
        let workers: BTreeSet<&WorkerId> = cohort.shares.iter().map(|share| &share.worker).collect();
        let ranks = cohort.shares.iter().map(|share| share.rank);
        holds(NAME, ranks.eq(0..workers.len() as u32), || format!("cohort {} is {:?}", cohort.id, cohort.shares))?;
        for job in cohort.attempts.iter().filter_map(|attempt| core.job(&attempt.key)) {
            let asked = &job.request.resources;
            let is_whole = workers.len() == asked.n_workers.get() as usize
                && cohort.shares.iter().all(|share| {
                    share.n_devices == asked.n_devices.get() && asked.device.kinds().contains(&share.device)
                });
            holds(NAME, is_whole, || format!("cohort {} is not what {} asks for", cohort.id, job.key))?;
        }
    }
    Ok(())
}

/// A job of stages is never granted and goes on while no more of them have failed than may, and a stage runs only while the job that it belongs to is not final, but for the time that
/// stopping takes.
///
/// # Errors
/// When it does not hold.
pub fn stages_belong(core: &Core) -> Result<(), Broken> {
    const NAME: &str = "stages_belong";
    for job in core.jobs() {
        let holds_nothing =
            !job.request.is_staged || (job.epoch.0 == 0 && (job.state == State::Waiting || job.state.is_final()));
        holds(NAME, holds_nothing, || format!("{} has stages and is {}", job.key, job.state))?;
        let may_go_on = job.state.is_final() || job.n_stages_failed <= job.request.may_fail;
        holds(NAME, may_go_on, || format!("{} goes on, {} of its stages having failed", job.key, job.n_stages_failed))?;
        let Some(parent) = job.parent().filter(|_| !job.state.is_final()) else { continue };
        let is_open =
            core.job(&parent).is_some_and(|parent| !parent.state.is_final() && parent.pending.contains(&job.key.job));
        let is_ending = job.state == State::Stopping(Stop::Cancel);
        holds(NAME, is_open || is_ending, || format!("{} goes on without {parent}", job.key))?;
    }
    Ok(())
}

/// Attempts that share a cohort are of jobs of one project that may share a process, with one key; no more than the limit.
///
/// # Errors
/// When it does not hold.
pub fn lanes_fit(core: &Core) -> Result<(), Broken> {
    const NAME: &str = "lanes_fit";
    for cohort in core.cohorts().filter(|cohort| cohort.attempts.len() > 1) {
        let n_lanes = cohort.attempts.len();
        holds(NAME, n_lanes <= core.settings.max_lanes.get() as usize, || {
            format!("cohort {} has {n_lanes}", cohort.id)
        })?;
        let first = &cohort.attempts[0].key;
        let key = core.job(first).and_then(Job::shares);
        for attempt in &cohort.attempts {
            let is_same = key.is_some() && core.job(&attempt.key).and_then(Job::shares) == key;
            let fits = is_same && attempt.key.project == first.project;
            holds(NAME, fits, || format!("{} shares cohort {} with {first}", attempt.key, cohort.id))?;
        }
    }
    Ok(())
}

/// What is counted of projects is what their jobs and cohorts say.
///
/// # Errors
/// When it does not hold.
pub fn accounts_balance(core: &Core) -> Result<(), Broken> {
    const NAME: &str = "accounts_balance";
    let (mut accounts, mut live) = (Accounts::default(), Live::new());
    for job in core.jobs().filter(|job| job.counts_as_queued()) {
        accounts.change(&job.key.project, |account| account.n_queued += 1);
    }
    for cohort in core.cohorts() {
        if let Some((project, usage)) = core.usage_of(cohort) {
            accounts.change(&project, |account| account.usage.add(&usage));
        }
        for job in cohort.attempts.iter().filter_map(|attempt| core.job(&attempt.key)) {
            *live.entry(job.request.priority).or_default().entry(cohort.id).or_default() += 1;
        }
    }
    holds(NAME, accounts == core.accounts, || format!("{:?} instead of {accounts:?}", core.accounts))?;
    holds(NAME, live == core.live, || format!("{:?}", core.live))
}

/// No queued job could be granted: whatever makes room for one is followed by a look at the queue.
///
/// # Errors
/// When it does not hold.
pub fn queue_is_served(core: &Core) -> Result<(), Broken> {
    let seats = core.seats();
    let placements =
        placement::place(core.lines(), &seats, core.settings.max_lanes, placement::Extent::Gangs).placements;
    holds("queue_is_served", placements.is_empty(), || format!("nobody granted {placements:?}"))
}

/// The indexes are what the rows say.
///
/// # Errors
/// When it does not hold.
pub fn indexes_agree(core: &Core) -> Result<(), Broken> {
    const NAME: &str = "indexes_agree";
    let queue: Queue = core.jobs().filter(|job| job.state == State::Queued).collect();
    holds(NAME, queue == core.queue, || "the queue".to_owned())?;
    let mut dependants: BTreeMap<JobKey, BTreeSet<JobKey>> = BTreeMap::new();
    for job in core.jobs().filter(|job| job.state == State::Waiting) {
        for dependency in job.awaited() {
            dependants.entry(dependency).or_default().insert(job.key.clone());
        }
    }
    holds(NAME, dependants == core.dependants, || "the dependants".to_owned())?;
    let has_stages =
        |key: &JobKey| core.job(key).is_some_and(|job| job.state == State::Waiting && job.request.is_staged);
    holds(NAME, core.due.iter().all(has_stages), || "what is due".to_owned())?;
    let leases: BTreeSet<_> = core
        .cohorts()
        .flat_map(|cohort| cohort.shares.iter().map(move |share| (share.worker.clone(), cohort.id)))
        .collect();
    holds(NAME, core.leases.keys().eq(leases.iter()), || "the leases".to_owned())?;
    for worker in core.workers() {
        let occupied = worker.occupied.iter().filter(|(_, occupied)| !occupied.releasing).map(|(id, _)| *id);
        holds(NAME, occupied.eq(core.leased_to(&worker.id)), || format!("what occupies {}", worker.id))?;
    }
    holds(NAME, core.timers.is_consistent() && timers_fit(core), || "the timers".to_owned())
}

/// Every timer belongs to something that exists and can use it.
fn timers_fit(core: &Core) -> bool {
    core.timers.iter().all(|(timer, _)| match timer {
        Timer::Lease(cohort, worker) => core.leases.contains_key(&(worker.clone(), *cohort)),
        Timer::Worker(worker) => core.worker(worker).is_some(),
        Timer::Stop(key) => core.job(key).is_some_and(|job| matches!(job.state, State::Stopping(_))),
        Timer::Backoff(key) => core.job(key).is_some_and(|job| job.state == State::Backoff),
        Timer::Way => true,
        Timer::Rest(worker) => core.worker(worker).is_some_and(|worker| worker.rests),
        Timer::Gather(key) => core.job(key).is_some_and(|job| job.state == State::Queued && job.shares().is_some()),
    })
}

/// A final job stays as it is, and an epoch never goes back.
///
/// # Errors
/// When it does not hold between the row before a step and the row after it.
pub fn terminal_is_final(before: &Job, after: &Job) -> Result<(), Broken> {
    const NAME: &str = "terminal_is_final";
    holds(NAME, !before.state.is_final(), || format!("{} was {} and changed", before.key, before.state))?;
    holds(NAME, before.epoch <= after.epoch, || format!("{} went back to epoch {}", before.key, after.epoch))
}

/// A commit takes effect only under the epoch that was live before the step, and whatever is refused changes nothing.
///
/// # Errors
/// When it does not hold for the step that took `input` with `before` as the row of its job.
pub fn stale_epoch_commits_nothing(before: Option<&Job>, input: &Input, effects: &Effects) -> Result<(), Broken> {
    const NAME: &str = "stale_epoch_commits_nothing";
    let commits = effects.changes.iter().any(|change| matches!(change, Change::Commit(_)));
    let may_commit = match input {
        Input::Commit { epoch, .. } => before.is_some_and(|job| job.is_live(*epoch)),
        _ => false,
    };
    holds(NAME, !commits || may_commit, || format!("{input:?} committed against {before:?}"))?;
    let is_idle = effects.answer == Answer::Done || effects.changes.is_empty();
    holds(NAME, is_idle, || format!("{input:?} was {:?} and changed {:?}", effects.answer, effects.changes))
}

/// Every changed job has an event in the same step, so that watchers miss nothing.
///
/// # Errors
/// When it does not hold.
pub fn changes_are_logged(effects: &Effects) -> Result<(), Broken> {
    let logged =
        |key: &JobKey| effects.changes.iter().any(|change| matches!(change, Change::Event(e) if e.key == *key));
    for change in &effects.changes {
        let Change::Job(job) = change else { continue };
        holds("changes_are_logged", logged(&job.key), || format!("{} changed silently", job.key))?;
    }
    Ok(())
}
