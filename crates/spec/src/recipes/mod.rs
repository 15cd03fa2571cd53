//! Recipes: jobs that make other jobs. One file each, and one line in the list.
//!
//! A recipe is a pure function from a job, and from what its stages have made so far, to the stages that it has. It holds no
//! state: whoever asks again with the same outcomes gets the same stages. One that has a single stage is a preset: a name for a stack
//! of other methods.

mod parts;

mod asymmetric_lora;
mod autopeft_stack;
mod mam;
mod pipeline;
mod prereq_tune;
mod sweep;

use crate::fault::{Fault, FieldPath};
use crate::id::Name;
use crate::job::JobSpec;
use crate::method::{Point, Registry, entry};
use crate::stages::{Outcome, StageSpec};

/// Which jobs, in which order, make this result?
pub trait Recipe: Send + Sync {
    /// The stages that are known from the job alone, each after those that it awaits. What the job says beside its recipe is
    /// theirs where the recipe does not say otherwise; its tags are not.
    ///
    /// # Errors
    /// Everything that is wrong with the stages, with paths of the job file.
    fn expand(&self, job: &JobSpec) -> Result<Vec<StageSpec>, Vec<Fault>>;

    /// The stages that follow from those that have succeeded, in whatever order these come. With more outcomes it gives again what
    /// it gave with fewer.
    ///
    /// # Errors
    /// As [`expand`](Self::expand).
    fn next(&self, job: &JobSpec, done: &[Outcome]) -> Result<Vec<StageSpec>, Vec<Fault>> {
        let _ = (job, done);
        Ok(Vec::new())
    }

    /// The stage that the recipe names as the one whose results are the job's.
    fn named_result(&self) -> Option<&Name> {
        None
    }

    /// The stage whose results are the job's, when all of `stages` have ended: the one that is named, or the last.
    fn result(&self, stages: &[StageSpec], done: &[Outcome]) -> Option<Name> {
        let _ = done;
        self.named_result().or_else(|| stages.last().map(|stage| &stage.name)).cloned()
    }

    /// The most stages that wait or run at a time.
    fn at_once(&self) -> usize {
        usize::MAX
    }

    /// How many stages may fail or be cancelled while the others go on.
    fn may_fail(&self) -> u32 {
        0
    }

    /// Whether it asks for the losses of stages that have succeeded, when all have ended.
    fn compares_losses(&self) -> bool {
        false
    }

    /// Where in the job file that stands which is at `path` in a stage's job; `name` and `after` are the stage's own.
    fn place(&self, stage: &Name, path: &FieldPath) -> FieldPath;
}

/// All recipes.
pub static RECIPES: Registry<dyn Recipe> = Registry::new(
    Point::Recipe,
    &[
        entry::<asymmetric_lora::AsymmetricLora>(),
        entry::<autopeft_stack::AutoPeftStack>(),
        entry::<mam::Mam>(),
        entry::<pipeline::Pipeline>(),
        entry::<prereq_tune::PrereqTune>(),
        entry::<sweep::Sweep>(),
    ],
);
