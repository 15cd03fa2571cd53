//! What will run: every default, digest and size in place. The lineage of a result hashes this.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::data::{Form, OnBadRow, TooLong};
use super::provenance::{Provenance, ProvenanceClass};
use super::reference::Reference;
use super::resources::{Bounds, MergedInto};
use super::targets::Targets;
use super::tune::{Activations, HeadSpec, Matmul, Precision};
use super::{JobKind, JobSpec, VERSION};
use crate::fault::{Fault, FieldPath};
use crate::id::{Digest, Name};
use crate::method::{Catalogue, MethodRef};

/// Something that the run reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Input {
    /// An artifact of the job's project.
    Artifact(Digest),
    /// An object that is read where it lies; its content digest is recorded by the run.
    Url(String),
    /// A file or folder under the server's data root, read where it lies.
    Path(String),
}

/// How long the run is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Length {
    /// Optimiser steps.
    Steps(u64),
    /// Passes over the whole mixture.
    Epochs(f64),
    /// Packed tokens.
    Tokens(u64),
}

/// A part of the training mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanDomain {
    /// Its name.
    pub name: Name,
    /// Where its rows are.
    pub input: Input,
    /// Its weight.
    pub weight: f64,
    /// How rows are to be understood; `None` lets the columns decide.
    pub form: Option<Form>,
    /// How many rows are learned from; `None` for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<u64>,
    /// Where they come from, if anybody says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provenance: Option<Provenance>,
}

/// A validation set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanValidation {
    /// Its name.
    pub name: Name,
    /// Where its rows are.
    pub input: Input,
    /// How rows are to be understood; `None` lets the columns decide.
    pub form: Option<Form>,
    /// How many rows count; `None` for all.
    pub rows: Option<u64>,
}

/// A component of the stack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanSlot {
    /// Its name.
    pub name: Name,
    /// The method with all its parameters; `None` if the adapter of `from` says it.
    pub method: Option<MethodRef>,
    /// The sites.
    pub targets: Targets,
    /// Sites that are left alone.
    pub exclude: Option<Targets>,
    /// Starting values; `None` for the method's own.
    pub init: Option<MethodRef>,
    /// An adapter to start from.
    pub from: Option<Input>,
    /// Whether it trains.
    pub train: bool,
    /// Domains beside whose documents it stands, in training alone; everything if there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<Name>,
}

/// A rule that judges the answers which the model gives by itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanReward {
    /// Its share in the reward.
    pub weight: f64,
    /// The rule with all its parameters.
    pub reward: MethodRef,
}

/// What will run. Two jobs with the same plan, code and kernel profile give the same bits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The version of the job file that it was made from.
    pub version: u32,
    /// What is done.
    pub kind: JobKind,
    /// The base model.
    pub base: Input,
    /// Whether the base's weights are random.
    pub from_scratch: bool,
    /// The classes of the head that stands in the place of the base's own; that one if there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<HeadSpec>,
    /// What is made of the base first; nothing if it trains as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub surgery: Option<MethodRef>,
    /// The training mixture.
    pub domains: Vec<PlanDomain>,
    /// The most that documents of a class may be of all that are drawn.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub caps: BTreeMap<ProvenanceClass, f64>,
    /// Which domain the next document comes from.
    pub mixing: MethodRef,
    /// The validation sets.
    pub validation: Vec<PlanValidation>,
    /// The longest document, in tokens.
    pub max_length: u32,
    /// What happens to longer ones.
    pub too_long: TooLong,
    /// What happens to rows that cannot be used.
    pub on_bad_row: OnBadRow,
    /// A chat template in place of the model's own.
    pub template: Option<String>,
    /// The components.
    pub stack: Vec<PlanSlot>,
    /// How the ranks of what trains are shared among its sites; alike if it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<MethodRef>,
    /// The loss.
    pub objective: MethodRef,
    /// What the answers are worth which the model gives by itself; none if it does not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rewards: Vec<PlanReward>,
    /// How one step uses the engine.
    pub step: MethodRef,
    /// How gradients change parameters.
    pub optimizer: MethodRef,
    /// How the learning rate runs over time.
    pub schedule: MethodRef,
    /// Tokens in one batch.
    pub batch_tokens: u32,
    /// Batches summed for one step.
    pub accumulation: u32,
    /// The length of the run.
    pub length: Length,
    /// The norm to which gradients are clipped; `None` for no clipping.
    pub max_grad_norm: Option<f64>,
    /// The number format of the frozen base.
    pub precision: Precision,
    /// In how few bits linears of the base are held; whole numbers if it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<MethodRef>,
    /// How exactly matrices of 32 bits are multiplied.
    #[serde(default, skip_serializing_if = "Matmul::is_highest")]
    pub matmul: Matmul,
    /// What a forward pass keeps for the reverse one.
    pub activations: Activations,
    /// Steps between checkpoints; `None` for on request only.
    pub checkpoint_every: Option<u64>,
    /// Steps between measurements of the validation loss; `None` for before and after only.
    pub evaluate_every: Option<u64>,
    /// Parts into which each batch is split.
    pub logical_shards: u32,
    /// The seed.
    pub seed: u64,
    /// Whether a plain model folder is made as well.
    pub merged: bool,
    /// Into which weights, where linears of the base are held in few bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merged_into: Option<MergedInto>,
    /// Statistics of the base that are there already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statistics: Option<Input>,
    /// Whether what is measured of the base is kept.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_statistics: bool,
    /// What validation sets have to come to.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gate: BTreeMap<Name, Bounds>,
}

/// The largest number of logical shards that is chosen by itself.
const SHARDS_MAX: u32 = 8;

/// The most rows that a document takes: its tokens, and those that components put before them. What an adapter that a slot starts
/// from puts there is in its folder.
pub(super) fn longest(spec: &JobSpec, catalogue: &Catalogue) -> u32 {
    let methods = spec.tune.slots().into_iter().filter_map(|(_, slot)| slot.method_ref());
    let before = methods.map(|method| catalogue.rows_before(&method)).fold(0, u32::saturating_add);
    spec.data.max_length.saturating_add(before)
}

/// The number of logical shards: as written, or as many as fit the longest document each, up to 8, as a power of two (so
/// that 2, 4 and 8 ranks divide it).
pub(super) fn logical_shards(spec: &JobSpec, catalogue: &Catalogue) -> u32 {
    spec.tune.logical_shards.unwrap_or_else(|| {
        // Both answers of a pair go into one shard, what belongs to a query, and all that the model gives to a prompt.
        let gives_vectors = spec.tune.head.as_ref().is_some_and(HeadSpec::gives_vectors);
        let is_paired = gives_vectors || spec.data.domains.iter().any(|domain| domain.form == Some(Form::Preference));
        let given = catalogue.answers(&spec.tune.objective).map(|(each, _)| each);
        let together = given.unwrap_or(if is_paired { 2 } else { 1 });
        let longest = longest(spec, catalogue).max(1).saturating_mul(together);
        let fit = (spec.tune.batch_tokens / longest).clamp(1, SHARDS_MAX);
        1 << fit.ilog2()
    })
}

/// Rows that go through the model together: enough for products to run at full speed, few enough for what a pass keeps to
/// stay small.
pub const ROWS_PER_PASS: u32 = 2048;

/// The name of the slot that trains a head over classes, where no other does.
pub(super) const HEAD: &str = "head";

/// The slot in which a head over classes trains whole, unless a slot of the job trains the base's own weights or names it.
pub(super) fn head_slot(spec: &JobSpec, catalogue: &Catalogue) -> Option<PlanSlot> {
    // A vector needs no weights of its own.
    spec.tune.head.as_ref().filter(|head| !head.gives_vectors())?;
    let document = catalogue.of_heads()?;
    let trains =
        |method: &str| catalogue.get(method).is_some_and(|other| other.trains_base || other.name == document.name);
    let mut slots = spec.tune.slots().into_iter().filter(|(_, slot)| slot.train);
    if slots.any(|(_, slot)| slot.method.as_deref().is_some_and(trains)) {
        return None;
    }
    Some(PlanSlot {
        name: Name::new(HEAD).expect("a literal name"),
        method: Some(catalogue.resolve(&MethodRef::named(&document.name))),
        targets: Targets::from(document.targets.as_str()),
        exclude: None,
        init: None,
        from: None,
        train: true,
        domains: Vec::new(),
    })
}

impl Plan {
    /// The most rows of one pass when `ranks` ranks share the shards: whole micro-batches, at least one.
    pub fn rows_at_once(&self, ranks: u32) -> u64 {
        let shard = u64::from(self.batch_tokens / self.logical_shards.max(1)).max(1);
        let micro_batches = u64::from(self.logical_shards / ranks.max(1)) * u64::from(self.accumulation);
        shard * (u64::from(ROWS_PER_PASS) / shard).clamp(1, micro_batches.max(1))
    }

    /// Resolves a checked job. `resolve` turns a reference into an input, or says why there is none.
    ///
    /// # Errors
    /// All references that cannot be resolved, with their paths.
    pub fn resolve(
        spec: &JobSpec,
        catalogue: &Catalogue,
        mut resolve: impl FnMut(&Reference) -> Result<Input, String>,
    ) -> Result<Self, Vec<Fault>> {
        let mut faults = Vec::new();
        let mut input = |path: FieldPath, reference: &Reference| {
            resolve(reference).unwrap_or_else(|message| {
                faults.push(Fault::new(path, message));
                Input::Url(String::new())
            })
        };
        let base = input("base".into(), &spec.base);
        let data = FieldPath::from("data");
        let domains = spec.data.domains.iter().enumerate().map(|(index, domain)| PlanDomain {
            name: domain.name.clone(),
            input: input(data.field("domains").index(index).field("source"), &domain.source),
            weight: domain.weight,
            form: domain.form,
            rows: domain.rows,
            provenance: domain.provenance.clone(),
        });
        let domains = domains.collect();
        let validation = spec.data.validation.iter().enumerate().map(|(index, set)| PlanValidation {
            name: set.name.clone(),
            input: input(data.field("validation").index(index).field("source"), &set.source),
            form: set.form,
            rows: set.rows,
        });
        let validation = validation.collect();
        let mut stack = Vec::new();
        for (path, slot) in spec.tune.slots() {
            let method = slot.method_ref().map(|named| catalogue.resolve(&named));
            let document = method.as_ref().and_then(|method| catalogue.get(&method.method));
            let by_method = || document.and_then(|document| Name::new(document.name.as_str()).ok());
            let name = slot.name.clone().or_else(by_method);
            stack.push(PlanSlot {
                name: name.unwrap_or_else(|| Name::new("from").expect("a literal name")),
                targets: slot.targets.clone().unwrap_or_else(|| {
                    Targets::from(document.map_or("all-linear", |document| document.targets.as_str()))
                }),
                exclude: slot.exclude.clone(),
                init: slot.init.as_ref().map(|init| catalogue.resolve(init)),
                from: slot.from.as_ref().map(|from| input(path.field("from"), from)),
                train: slot.train,
                domains: slot.domains.clone(),
                method,
            });
        }
        stack.extend(head_slot(spec, catalogue));
        let statistics = spec.tune.statistics.as_ref().map(|statistics| input("tune.statistics".into(), statistics));
        if !faults.is_empty() {
            return Err(faults);
        }
        let tune = &spec.tune;
        let length = match (tune.steps, tune.tokens) {
            (Some(steps), _) => Length::Steps(steps),
            (None, Some(tokens)) => Length::Tokens(tokens),
            (None, None) => Length::Epochs(tune.epochs.unwrap_or(1.0)),
        };
        Ok(Self {
            version: VERSION,
            kind: spec.kind,
            base,
            from_scratch: tune.from_scratch,
            head: tune.head.clone(),
            surgery: tune.surgery.as_ref().map(|surgery| catalogue.resolve(surgery)),
            domains,
            caps: spec.data.caps.clone(),
            mixing: catalogue.resolve(&spec.data.mixing),
            validation,
            max_length: spec.data.max_length,
            too_long: spec.data.too_long,
            on_bad_row: spec.data.on_bad_row,
            template: spec.data.template.clone(),
            stack,
            budget: tune.budget.as_ref().map(|budget| catalogue.resolve(budget)),
            objective: catalogue.resolve(&tune.objective),
            rewards: tune
                .rewards
                .iter()
                .map(|spec| PlanReward { weight: spec.weight, reward: catalogue.resolve(&spec.reward) })
                .collect(),
            step: catalogue.resolve(&tune.step),
            optimizer: catalogue.resolve(&tune.optimizer),
            schedule: catalogue.resolve(&tune.schedule),
            batch_tokens: tune.batch_tokens,
            accumulation: tune.accumulation,
            length,
            max_grad_norm: tune.max_grad_norm,
            precision: tune.precision,
            quantization: tune.quantization.as_ref().map(|format| catalogue.resolve(format)),
            matmul: tune.matmul,
            activations: tune.activations,
            checkpoint_every: tune.checkpoint.every_steps,
            evaluate_every: tune.evaluate.every_steps,
            logical_shards: logical_shards(spec, catalogue),
            seed: tune.seed,
            merged: spec.outputs.merged,
            merged_into: spec.outputs.merged_into,
            statistics,
            keep_statistics: spec.outputs.statistics,
            gate: spec.outputs.gate.clone(),
        })
    }

    /// The artifacts that the run reads, each once, in the order of their digests.
    pub fn artifacts(&self) -> Vec<Digest> {
        let mut digests: Vec<Digest> = self
            .inputs()
            .filter_map(|input| match input {
                Input::Artifact(digest) => Some(*digest),
                Input::Url(_) | Input::Path(_) => None,
            })
            .collect();
        digests.sort_unstable();
        digests.dedup();
        digests
    }

    /// Everything that the run reads.
    pub fn inputs(&self) -> impl Iterator<Item = &Input> {
        let domains = self.domains.iter().map(|domain| &domain.input);
        let validation = self.validation.iter().map(|set| &set.input);
        let slots = self.stack.iter().filter_map(|slot| slot.from.as_ref());
        std::iter::once(&self.base).chain(domains).chain(validation).chain(slots).chain(&self.statistics)
    }
}
