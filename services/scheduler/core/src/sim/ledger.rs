//! What an observer knows who sees only what is stored and sent: it shares no code with the core's own checks.

use std::collections::{BTreeMap, BTreeSet};

use attune_spec::id::{CohortId, Digest, Epoch, Project, Step, WorkerId};

use super::agent::DEVICE_BYTES;
use crate::{
    Action, Answer, Attempt, Cause, Change, Cohort, Commit, Effects, Event, EventKind, Input, JobKey, Memory, Outcome,
    Policy, Reason, State,
};

#[derive(Debug, Default)]
pub(crate) struct History {
    granted: Epoch,
    cohort: CohortId,
    leader: Option<WorkerId>,
    max_attempts: u32,
    ended: Option<State>,
    is_live: bool,
    /// Failures since the last progress, without and with lost offers.
    n_failed: (u32, u32),
    /// Whether it was spared the charge for the death of a process that it shared: once at most.
    spared: bool,
    share: Option<Digest>,
    priority: i32,
    memory: Memory,
    best: Step,
    newest: Option<(Epoch, Step, Digest)>,
    output: Option<Epoch>,
}

/// The observer.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    pub(crate) jobs: BTreeMap<JobKey, History>,
    pub(crate) cohorts: BTreeMap<CohortId, Cohort>,
    pub(crate) vouched_ms: BTreeMap<(WorkerId, CohortId), u64>,
    /// When each worker was last heard of.
    pub(crate) heard_ms: BTreeMap<WorkerId, u64>,
    /// What projects may have.
    pub(crate) policies: BTreeMap<Project, Policy>,
    /// Workers that get nothing new.
    pub(crate) cordoned: BTreeSet<WorkerId>,
    /// Devices of each worker.
    pub(crate) devices: BTreeMap<WorkerId, crate::Devices>,
    /// When the scheduler was last started.
    pub(crate) started_ms: u64,
    pub(crate) ttl_ms: u64,
    /// When the scheduler last took an input.
    pub(crate) stepped_ms: u64,
}

impl Ledger {
    /// Looks at one step whose changes are stored.
    pub(crate) fn observe(&mut self, input: &Input, effects: &Effects, now_ms: u64) -> Result<(), String> {
        if now_ms > self.stepped_ms + self.ttl_ms / 2 {
            // It stood still itself, which is as good as a new start.
            self.started_ms = now_ms;
        }
        self.stepped_ms = now_ms;
        if let Input::Submit { key, request, .. } = input
            && effects.answer == Answer::Done
        {
            let (max_attempts, share, memory) = (request.max_attempts.get(), request.share, request.memory);
            let priority = request.priority;
            self.jobs.insert(key.clone(), History { max_attempts, share, priority, memory, ..History::default() });
        }
        for change in &effects.changes {
            if let Change::Commit(commit) = change {
                let history = self.history(&commit.key)?;
                // Judged by the grants of earlier steps: a grant in this one comes after its commits.
                if !history.is_live || history.granted != commit.epoch {
                    return Err(format!("two live epochs: {commit:?} was accepted; the newest is {}", history.granted));
                }
                if history.leader.as_ref() != Some(&commit.worker) {
                    return Err(format!("{commit:?} was accepted from somebody who does not lead"));
                }
                if commit.commit == Commit::Output {
                    history.output = Some(commit.epoch);
                }
            }
        }
        for change in &effects.changes {
            if let Change::Event(event) = change {
                self.event(event, input, now_ms)?;
            }
        }
        for change in &effects.changes {
            match change {
                Change::Cohort(cohort) => self.cohort(cohort, now_ms)?,
                Change::CohortEnded(cohort) => drop(self.cohorts.remove(&cohort.id)),
                Change::Policy(project, policy) => {
                    self.policies.insert(project.clone(), policy.unwrap_or_default());
                }
                Change::Cordon(worker, on) => {
                    self.cordoned.remove(worker);
                    self.cordoned.extend(on.then(|| worker.clone()));
                }
                Change::Job(_) | Change::Counters(_) | Change::Event(_) | Change::Commit(_) => {}
            }
        }
        self.check_devices()?;
        self.vouch(input, effects, now_ms);
        for action in &effects.actions {
            self.action(action)?;
        }
        Ok(())
    }

    fn history(&mut self, key: &JobKey) -> Result<&mut History, String> {
        self.jobs.get_mut(key).ok_or_else(|| format!("{key} was never submitted"))
    }

    fn event(&mut self, event: &Event, input: &Input, now_ms: u64) -> Result<(), String> {
        if let EventKind::Moved { reason: Reason::PreemptAsked, .. } = event.kind {
            self.check_preemption(&event.key, input)?;
        }
        let cohort = self.jobs.get(&event.key).and_then(|history| self.cohorts.get(&history.cohort));
        let is_shared = cohort.is_some_and(|cohort| cohort.attempts.len() > 1);
        let history = self.history(&event.key)?;
        if let Some(ended) = history.ended {
            return Err(format!("a final state changed: {} was {ended}, then {event:?}", event.key));
        }
        match event.kind {
            EventKind::Moved { to, reason, .. } => {
                history.is_live = to.is_live();
                if to.is_final() {
                    history.ended = Some(to);
                }
                if to == State::Succeeded && history.output != Some(event.epoch) {
                    return Err(format!("{} succeeded without a result of epoch {}", event.key, event.epoch));
                }
                if let Some(cause) = reason.cause() {
                    if let Input::AttemptFinished { key, .. } = input
                        && *key != event.key
                    {
                        return Err(format!("{} failed because of {key}", event.key));
                    }
                    // Who says of a lane that it failed by itself means that lane; whatever else ends several is spared.
                    let is_death = match input {
                        Input::AttemptFinished { outcome: Outcome::Crashed(_), .. } => history.share.is_some(),
                        Input::AttemptFinished { .. } => false,
                        Input::Register { holding, .. } => {
                            is_shared && holding.iter().all(|held| held.cohort != history.cohort)
                        }
                        _ => is_shared,
                    };
                    let is_offer = matches!(cause, Cause::OfferLost | Cause::OfferRefused);
                    if is_death && !history.spared && !is_offer {
                        history.spared = true;
                        if to != State::Backoff {
                            return Err(format!("{} is {to} because a process died that it shared", event.key));
                        }
                    } else {
                        history.count(&event.key, to, reason, cause)?;
                    }
                    if *input == Input::Tick {
                        let cohort = history.cohort;
                        self.check_expiry(&event.key, cohort, now_ms)?;
                    }
                }
            }
            EventKind::Committed { commit: Commit::Checkpoint(step), digest } => {
                if history.newest.is_some_and(|(epoch, newest, _)| epoch == event.epoch && step <= newest) {
                    return Err(format!("{} went back to its checkpoint at step {step}", event.key));
                }
                history.newest = Some((event.epoch, step, digest));
                if step > history.best {
                    (history.best, history.n_failed) = (step, (0, 0));
                }
            }
            EventKind::Submitted { .. }
            | EventKind::DependencyMet { .. }
            | EventKind::Stage { .. }
            | EventKind::Committed { .. } => {}
        }
        Ok(())
    }

    /// A lease may only be called over when nobody vouched for it, or its worker was silent, for its whole length, and the
    /// scheduler has run for as long.
    fn check_expiry(&self, key: &JobKey, cohort: CohortId, now_ms: u64) -> Result<(), String> {
        let Some(cohort) = self.cohorts.get(&cohort) else { return Err(format!("{key} lost a cohort that is over")) };
        let is_over = |worker: &WorkerId| {
            let vouched_ms = self.vouched_ms.get(&(worker.clone(), cohort.id)).copied().unwrap_or_default();
            let heard_ms = self.heard_ms.get(worker).copied().unwrap_or_default();
            now_ms >= vouched_ms.min(heard_ms).max(self.started_ms) + self.ttl_ms
        };
        if cohort.shares.iter().any(|share| is_over(&share.worker)) {
            return Ok(());
        }
        Err(format!("{key} was expired at {now_ms} ms although its lease was not over"))
    }

    fn cohort(&mut self, cohort: &Cohort, now_ms: u64) -> Result<(), String> {
        if self.cohorts.insert(cohort.id, cohort.clone()).is_some() {
            return Ok(());
        }
        if let Some(share) = cohort.shares.iter().find(|share| self.cordoned.contains(&share.worker)) {
            return Err(format!("cohort {} is on {}, which is cordoned", cohort.id, share.worker));
        }
        self.check_quota(cohort)?;
        for share in &cohort.shares {
            self.vouched_ms.insert((share.worker.clone(), cohort.id), now_ms);
        }
        let of_first =
            cohort.attempts.first().map(|first| (&first.key.project, self.jobs.get(&first.key).map(|h| h.share)));
        let of_first = of_first.map(|(project, share)| (project.clone(), share.flatten()));
        let memory = |attempt: &Attempt| self.jobs.get(&attempt.key).map(|history| history.memory);
        let memory = cohort.attempts.iter().filter_map(memory).reduce(Memory::with).unwrap_or_default();
        if cohort.attempts.len() > 1 && memory.total() > DEVICE_BYTES {
            return Err(format!("cohort {} takes more memory than its device has: {memory:?}", cohort.id));
        }
        for attempt in &cohort.attempts {
            let history = self.history(&attempt.key)?;
            if cohort.attempts.len() > 1 {
                let own = (attempt.key.project.clone(), history.share);
                if history.share.is_none() || history.spared || of_first.as_ref() != Some(&own) {
                    return Err(format!("{} must not share cohort {}", attempt.key, cohort.id));
                }
            }
            if attempt.epoch <= history.granted {
                return Err(format!("epoch {} of {} was granted twice", attempt.epoch, attempt.key));
            }
            (history.granted, history.cohort) = (attempt.epoch, cohort.id);
            history.leader = cohort.shares.first().map(|share| share.worker.clone());
        }
        Ok(())
    }

    /// A grant takes a project to what it may have and no further.
    fn check_quota(&self, granted: &Cohort) -> Result<(), String> {
        let project = |cohort: &Cohort| cohort.attempts.first().map(|attempt| attempt.key.project.clone());
        let Some(own) = project(granted) else { return Ok(()) };
        let Some(policy) = self.policies.get(&own) else { return Ok(()) };
        for kind in [crate::Device::Cpu, crate::Device::Cuda] {
            let cohorts = self.cohorts.values().filter(|cohort| project(cohort).as_ref() == Some(&own));
            let used: u32 =
                cohorts.flat_map(|cohort| &cohort.shares).filter(|s| s.device == kind).map(|s| s.n_devices).sum();
            let takes = granted.shares.iter().any(|share| share.device == kind);
            if takes && policy.max_of(kind).is_some_and(|max| used > max) {
                return Err(format!("{own} has {used} of {kind} with cohort {}, and may not", granted.id));
            }
        }
        Ok(())
    }

    /// Nobody makes way but on request, or for somebody more urgent.
    fn check_preemption(&self, key: &JobKey, input: &Input) -> Result<(), String> {
        if matches!(input, Input::Preempt { key: asked } if asked == key) {
            return Ok(());
        }
        let own = self.jobs.get(key).map_or(0, |history| history.priority);
        let waits = |history: &History| history.ended.is_none() && !history.is_live && history.priority > own;
        if self.jobs.values().any(waits) { Ok(()) } else { Err(format!("{key} made way for nobody more urgent")) }
    }

    fn check_devices(&self) -> Result<(), String> {
        for (worker, devices) in &self.devices {
            for kind in [crate::Device::Cpu, crate::Device::Cuda] {
                let shares = self.cohorts.values().flat_map(|cohort| &cohort.shares);
                let used: u32 = shares.filter(|s| s.worker == *worker && s.device == kind).map(|s| s.n_devices).sum();
                if used > devices.of(kind) {
                    return Err(format!("{worker} has {} of {kind} and gives {used}", devices.of(kind)));
                }
            }
        }
        Ok(())
    }

    fn vouch(&mut self, input: &Input, effects: &Effects, now_ms: u64) {
        if effects.answer != Answer::Done {
            return;
        }
        if let Input::Heartbeat { worker, .. } | Input::Register { worker, .. } = input {
            self.heard_ms.insert(worker.clone(), now_ms);
        }
        match input {
            Input::Heartbeat { worker, holding, .. } => {
                for cohort in holding {
                    self.vouched_ms.insert((worker.clone(), *cohort), now_ms);
                }
            }
            Input::Register { worker, holding, .. } => {
                for held in holding {
                    self.vouched_ms.insert((worker.clone(), held.cohort), now_ms);
                }
            }
            _ => {}
        }
    }

    /// An offer is for the newest grant, and goes on from the newest checkpoint.
    fn action(&mut self, action: &Action) -> Result<(), String> {
        let Action::Offer(offer) = action else { return Ok(()) };
        for granted in &offer.attempts {
            let history = self.history(&granted.attempt.key)?;
            let newest = history.newest;
            let offered = granted.checkpoint.map(|c| (c.epoch, c.step, c.digest));
            if history.granted != granted.attempt.epoch || offered != newest {
                return Err(format!("{offer:?} is not epoch {} from {newest:?}", history.granted));
            }
        }
        Ok(())
    }
}

impl History {
    fn count(&mut self, key: &JobKey, to: State, reason: Reason, cause: Cause) -> Result<(), String> {
        self.n_failed.0 += u32::from(!matches!(cause, Cause::OfferLost | Cause::OfferRefused));
        self.n_failed.1 += u32::from(cause != Cause::OfferRefused);
        let (surely, at_most) = self.n_failed;
        if to == State::Backoff && surely >= self.max_attempts {
            return Err(format!("{key} failed {surely} times of {} and goes on", self.max_attempts));
        }
        if matches!(reason, Reason::AttemptsExhausted(_)) && at_most < self.max_attempts {
            return Err(format!("{key} was given up after {at_most} failures of {}", self.max_attempts));
        }
        Ok(())
    }
}
