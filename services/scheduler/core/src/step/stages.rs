//! Jobs that consist of other jobs: a stage joins its parent, its end moves the parent, the parent's end ends it.
//!
//! Which stage follows is not decided here. A parent is *due* when one of its stages was made or has ended, until somebody has
//! looked at its row as it then was: a look that something overtook changes nothing, so that no stage's end is missed.

use crate::step::Draft;
use crate::{Answer, Core, Event, EventKind, JobKey, Look, Reason, Refusal, Request, State, Stop};

impl Core {
    /// Whether the job that this one is to be a stage of takes one more.
    pub(super) fn takes_stage(&self, key: &JobKey, request: &Request) -> Result<(), Refusal> {
        let Some(parent) = &request.parent else { return Ok(()) };
        let parent = self.known(&JobKey::new(key.project.clone(), parent.clone()))?;
        if !parent.request.is_staged || parent.state.is_final() {
            let wanted = "only a job of stages that has not ended takes one more";
            return Err(Refusal::WrongState { key: parent.key.clone(), state: parent.state, wanted });
        }
        Ok(())
    }

    /// Joins a stage that was just submitted to its parent.
    pub(super) fn add_stage(&mut self, key: &JobKey, draft: &mut Draft) {
        let Some(parent) = self.jobs[key].parent() else { return };
        let state = self.jobs[key].state;
        self.dependants.entry(key.clone()).or_default().insert(parent.clone());
        self.edit(&parent, draft).pending.insert(key.job.clone());
        self.due.insert(parent.clone());
        self.tell_stage(&parent, key, state, draft);
    }

    /// Moves a parent, one of whose stages has ended.
    pub(super) fn stage_ended(&mut self, parent: &JobKey, stage: &JobKey, draft: &mut Draft) {
        let state = self.jobs[stage].state;
        let failed = u32::from(state != State::Succeeded);
        let job = self.edit(parent, draft);
        job.n_stages_failed = job.n_stages_failed.saturating_add(failed);
        if job.n_stages_failed > job.request.may_fail {
            return self.move_to(parent, State::Failed, Reason::StageFailed, draft);
        }
        job.pending.remove(&stage.job);
        self.await_no_more(parent, stage);
        self.due.insert(parent.clone());
        self.tell_stage(parent, stage, state, draft);
    }

    /// Ends the stages of a job that ended without success; nothing for other jobs.
    pub(super) fn end_stages(&mut self, parent: &JobKey, draft: &mut Draft) {
        if !self.jobs[parent].request.is_staged {
            return;
        }
        for stage in self.jobs[parent].awaited() {
            match self.jobs.get(&stage).map(|job| job.state) {
                Some(State::Starting | State::Running | State::Stopping(Stop::Pause | Stop::Preempt)) => {
                    self.ask_to_stop(&stage, Stop::Cancel, Reason::ParentEnded, draft);
                }
                Some(State::Waiting | State::Queued | State::Backoff | State::Paused) => {
                    self.move_to(&stage, State::Cancelled, Reason::ParentEnded, draft);
                }
                None | Some(State::Stopping(Stop::Cancel) | State::Succeeded | State::Failed | State::Cancelled) => {}
            }
        }
    }

    pub(super) fn looked(
        &mut self,
        key: &JobKey,
        version: u64,
        look: Look,
        draft: &mut Draft,
    ) -> Result<Answer, Refusal> {
        let job = self.known(key)?;
        let wrong = |wanted| Err(Refusal::WrongState { key: key.clone(), state: job.state, wanted });
        if job.state.is_final() || !job.request.is_staged {
            return wrong("only at a job of stages that has not ended can be looked");
        }
        if job.version != version {
            return Err(Refusal::JobChanged { key: key.clone(), version });
        }
        match look {
            Look::Wait if job.pending.is_empty() => return wrong("it has no stage to wait for"),
            Look::Done if !job.pending.is_empty() => return wrong("its stages have not all ended"),
            Look::Wait if !self.due.remove(key) => return Ok(Answer::Repeated),
            Look::Wait => {}
            Look::Done => self.move_to(key, State::Succeeded, Reason::Finished, draft),
            Look::Broken(cause) => self.move_to(key, State::Failed, Reason::Failure(cause), draft),
        }
        Ok(Answer::Done)
    }

    fn tell_stage(&self, parent: &JobKey, stage: &JobKey, state: State, draft: &mut Draft) {
        let kind = EventKind::Stage { stage: stage.job.clone(), state };
        draft.log.push(Event { key: parent.clone(), epoch: self.jobs[parent].epoch, kind });
    }
}
