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

    /// The stage whose results are the job's; the last one if it names none.
    fn result(&self) -> Option<&Name> {
        None
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
    ],
);
