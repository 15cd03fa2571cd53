//! The job file, `version: 1`: what a person writes, how it is read, checked and resolved.
//!
//! [`JobSpec`] is what was written (fields left out have the defaults of this module, methods keep only the parameters
//! that were given); [`plan::Plan`] is what will run, with every default, digest and size in place. Lineage hashes the
//! plan.

pub mod data;
pub mod plan;
pub mod provenance;
pub mod read;
pub mod reference;
pub mod resources;
pub mod targets;
pub mod tune;

mod check;
mod params;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use data::{DataSpec, DomainSpec, Form, OnBadRow, TooLong, ValidationSpec};
pub use plan::Plan;
pub use provenance::{Provenance, ProvenanceClass};
pub use read::{ReadError, read_stage, read_value, read_yaml, set_path};
pub use reference::Reference;
pub use resources::{Bounds, Device, Limits, MergedInto, Outputs, Resources};
pub use targets::Targets;
pub use tune::{
    Activations, CheckpointSpec, EvaluateSpec, HeadPooling, HeadSpec, HeadTask, Matmul, Precision, RewardSpec,
    SlotSpec, TuneSpec,
};

use crate::FieldPath;
use crate::id::{JobId, Name, Project};
use crate::method::MethodRef;

/// The version of the job file that this build reads.
pub const VERSION: u32 = 1;

/// What a job does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    /// Trains adapters or the weights of a base on data.
    #[default]
    Tune,
    /// Makes other jobs, its stages, as a recipe says; what the file says beside it is common to them.
    Recipe,
}

/// A job, as written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(deny_unknown_fields)]
pub struct JobSpec {
    /// The version of this format: 1.
    pub version: u32,
    /// A name for people; need not be unique.
    #[schemars(with = "String")]
    pub name: Name,
    /// What the job does.
    #[serde(default)]
    pub kind: JobKind,
    /// The tenant; the server's default project when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub project: Option<Project>,
    /// Higher runs first.
    #[serde(default)]
    #[schemars(range(min = -1000, max = 1000))]
    pub priority: i32,
    /// Free text by key, to filter by.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, String>")]
    pub labels: BTreeMap<Name, String>,
    /// Jobs of the same project that must have succeeded before this one starts.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub after: Vec<JobId>,
    /// What stages the job has, if it is a recipe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<MethodRef>,
    /// The model to start from: a path, a URL, an artifact digest or a tag.
    #[schemars(with = "String")]
    pub base: Reference,
    /// What to learn from.
    pub data: DataSpec,
    /// How to learn.
    pub tune: TuneSpec,
    /// Where to run.
    #[serde(default)]
    pub resources: Resources,
    /// When to give up.
    #[serde(default)]
    pub limits: Limits,
    /// What to keep.
    #[serde(default)]
    pub outputs: Outputs,
}

impl JobSpec {
    /// The JSON Schema of the job file. Parameters of methods have schemas of their own, see [`crate::method::Catalogue`].
    pub fn schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }

    /// Every reference to something outside of the job, with its path; those in the parameters of its recipe among them.
    pub fn references(&self) -> Vec<(FieldPath, Reference)> {
        let own = self.own_references().into_iter().map(|(path, reference)| (path, reference.clone()));
        let mut found: Vec<_> = own.collect();
        if let Some(recipe) = &self.recipe {
            params::each(&recipe.params, &FieldPath::from("recipe"), &mut found);
        }
        found
    }

    /// The references of its own fields.
    pub(crate) fn own_references(&self) -> Vec<(FieldPath, &Reference)> {
        let mut found = vec![("base".into(), &self.base)];
        let data = FieldPath::from("data");
        for (index, domain) in self.data.domains.iter().enumerate() {
            found.push((data.field("domains").index(index).field("source"), &domain.source));
        }
        for (index, set) in self.data.validation.iter().enumerate() {
            found.push((data.field("validation").index(index).field("source"), &set.source));
        }
        for (path, slot) in self.tune.slots() {
            found.extend(slot.from.as_ref().map(|from| (path.field("from"), from)));
        }
        found.extend(self.tune.statistics.as_ref().map(|statistics| ("tune.statistics".into(), statistics)));
        found
    }

    /// Replaces every reference by what `replace` makes of it, as submitting does with local paths.
    ///
    /// # Errors
    /// The first error of `replace`.
    pub fn replace_references<E>(
        &mut self,
        mut replace: impl FnMut(&Reference) -> Result<Reference, E>,
    ) -> Result<(), E> {
        self.base = replace(&self.base)?;
        for domain in &mut self.data.domains {
            domain.source = replace(&domain.source)?;
        }
        for set in &mut self.data.validation {
            set.source = replace(&set.source)?;
        }
        for slot in self.tune.stack.iter_mut().chain(&mut self.tune.adapter) {
            if let Some(from) = &mut slot.from {
                *from = replace(from)?;
            }
        }
        if let Some(statistics) = &mut self.tune.statistics {
            *statistics = replace(statistics)?;
        }
        if let Some(recipe) = &mut self.recipe {
            params::replace(&mut recipe.params, &mut replace)?;
        }
        Ok(())
    }
}
