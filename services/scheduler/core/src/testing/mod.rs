//! What tests of the core share: a store in memory, a step that is checked from all sides, a desk to sit at.

mod desk;
mod store;

mod commits;
mod dependencies;
mod fleet;
mod gangs;
mod lanes;
mod offers;
mod projects;
mod restarts;
mod retries;
mod stages;
mod transitions;

pub(crate) use desk::{Desk, gang, job};
pub(crate) use store::Store;

use crate::{Answer, Core, Effects, Input, JobKey, Timestamp, invariants};

/// The job that an input speaks of.
pub(crate) fn job_of(input: &Input) -> Option<&JobKey> {
    match input {
        Input::Submit { key, .. }
        | Input::Cancel { key }
        | Input::Pause { key }
        | Input::Resume { key }
        | Input::Retry { key }
        | Input::Preempt { key }
        | Input::Expire { key, .. }
        | Input::Forget { key }
        | Input::Looked { key, .. }
        | Input::AttemptRunning { key, .. }
        | Input::AttemptFinished { key, .. }
        | Input::Commit { key, .. } => Some(key),
        Input::Register { .. }
        | Input::Heartbeat { .. }
        | Input::OfferAccepted { .. }
        | Input::OfferRefused { .. }
        | Input::Drain { .. }
        | Input::Disconnect { .. }
        | Input::CohortGone { .. }
        | Input::CohortCrashed { .. }
        | Input::SetPolicy { .. }
        | Input::Cordon { .. }
        | Input::Tick => None,
    }
}

/// One step, with everything checked that can be checked without knowing what it should do.
pub(crate) fn checked_step(core: &mut Core, input: &Input, now: Timestamp) -> Result<Effects, String> {
    let mut before = core.clone();
    let effects = core.step(input.clone(), now);
    let broken = |broken: invariants::Broken| format!("{broken}, after {input:?}");
    invariants::all(core).map_err(broken)?;
    invariants::changes_are_logged(&effects).map_err(broken)?;
    let job_before = job_of(input).and_then(|key| before.job(key));
    invariants::stale_epoch_commits_nothing(job_before, input, &effects).map_err(broken)?;
    for job in core.jobs() {
        match before.job(&job.key) {
            Some(earlier) if earlier != job => invariants::terminal_is_final(earlier, job).map_err(broken)?,
            _ => {}
        }
    }
    if effects.answer != Answer::Done {
        before.advance(now);
        if before != *core {
            return Err(format!("{input:?} was {:?} and changed the state", effects.answer));
        }
    }
    Ok(effects)
}
