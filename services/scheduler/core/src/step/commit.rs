//! The guard: only a live epoch makes artifacts visible.

use crate::plant::Plant;
use crate::step::Draft;
use crate::{Answer, Checkpoint, Commit, Committed, Core, Event, EventKind, Refusal};

impl Core {
    pub(super) fn commit(&mut self, asked: Committed, draft: &mut Draft) -> Result<Answer, Refusal> {
        let Committed { key, epoch, worker, commit, digest } = &asked;
        let job = self.spoken_for(key, *epoch, worker)?;
        let own = job.checkpoint.filter(|checkpoint| checkpoint.epoch == *epoch);
        let is_repeated = match commit {
            Commit::Checkpoint(step) => own.is_some_and(|own| (own.step, own.digest) == (*step, *digest)),
            Commit::Output => job.outputs.contains(digest),
        };
        if is_repeated {
            return Ok(Answer::Repeated);
        }
        match self.live_cohort(job, worker, true) {
            Ok(cohort) => {
                let cohort = cohort.id;
                // An attempt goes forward: a lower step is a message that was long on its way.
                if let (Commit::Checkpoint(step), Some(own)) = (*commit, own)
                    && step <= own.step
                    && !self.has(Plant::CheckpointGoesBack)
                {
                    return Err(Refusal::OlderCheckpoint { key: key.clone(), step, newest: own.step });
                }
                self.acknowledge(worker, cohort);
            }
            Err(_) if self.has(Plant::CommitAfterEnd) => {}
            Err(refusal) => return Err(refusal),
        }
        let job = self.edit(key, draft);
        match *commit {
            Commit::Checkpoint(step) => {
                // The same bytes again are no other checkpoint to go back to.
                if let Some(before) = job.checkpoint.filter(|before| before.digest != *digest) {
                    job.older = Some(before);
                }
                job.checkpoint = Some(Checkpoint { digest: *digest, step, epoch: *epoch });
                if step > job.progress {
                    job.progress = step;
                    job.n_failed = 0;
                    job.lost_workers.clear();
                }
            }
            Commit::Output => {
                job.outputs.insert(*digest);
            }
        }
        let kind = EventKind::Committed { commit: *commit, digest: *digest };
        draft.log.push(Event { key: key.clone(), epoch: *epoch, kind });
        draft.committed = Some(asked);
        Ok(Answer::Done)
    }
}
