//! `tune:` — how to learn.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::data::Form;
use super::reference::Reference;
use super::targets::Targets;
use crate::fault::FieldPath;
use crate::id::Name;
use crate::method::{Catalogue, MethodRef};

/// One component of the stack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SlotSpec {
    /// Its name; the method's name when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// The method; read from the adapter when `from` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// The sites; the method's own default when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub targets: Option<Targets>,
    /// Sites that `targets` names and that are left alone all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclude: Option<Targets>,
    /// Starting values in place of the method's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<MethodRef>,
    /// An adapter to start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Reference>,
    /// Whether it trains.
    #[serde(default = "yes")]
    pub train: bool,
    /// Domains beside whose documents a frozen adapter stands, in training alone; beside everything when it is left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<Name>,
    /// The method's parameters.
    #[serde(flatten)]
    pub params: Map<String, Value>,
}

impl SlotSpec {
    /// The fields that every slot has; all others are parameters of the method.
    pub const FIELDS: [&str; 8] = ["name", "method", "targets", "exclude", "init", "from", "train", "domains"];

    /// What it is called, where that is known without an adapter that it starts from.
    pub(crate) fn called(&self) -> Option<String> {
        let name = self.name.as_ref().map(ToString::to_string);
        name.or_else(|| Some(Catalogue::embedded().get(self.method.as_deref()?)?.name.clone()))
    }

    /// The slot's method with its parameters, where it names one.
    pub fn method_ref(&self) -> Option<MethodRef> {
        self.method.clone().map(|method| MethodRef { method, params: self.params.clone() })
    }
}

// A hand-written schema: `flatten` over a map accepts any further field, which is then checked against the method's own.
impl JsonSchema for SlotSpec {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "SlotSpec".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let targets = generator.subschema_for::<Targets>();
        let method = generator.subschema_for::<MethodRef>();
        schemars::json_schema!({
            "type": "object",
            "properties": {
                "name": { "type": "string", "description": "Its name; the method's name when it is left out." },
                "method": { "type": "string", "description": "A method of the point adapter." },
                "targets": targets,
                "exclude": targets,
                "init": method,
                "from": { "type": "string", "description": "An adapter to start from." },
                "train": { "type": "boolean", "description": "Whether it trains.", "default": true },
                "domains": {
                    "type": "array", "items": { "type": "string" },
                    "description": "Domains beside whose documents a frozen adapter stands, in training alone.",
                },
            },
            "additionalProperties": true,
        })
    }
}

/// A rule that judges the answers which the model gives by itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RewardSpec {
    /// Its share in the reward.
    #[serde(default = "one")]
    pub weight: f64,
    /// The rule.
    #[serde(flatten)]
    pub reward: MethodRef,
}

impl RewardSpec {
    /// The field that every reward has beside its method's parameters.
    pub const WEIGHT: &'static str = "weight";
}

// A hand-written schema, as that of a slot.
impl JsonSchema for RewardSpec {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "RewardSpec".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "object",
            "properties": {
                "weight": {
                    "type": "number", "minimum": -1e6, "maximum": 1e6, "default": 1,
                    "description": "Its share in the reward.",
                },
                "method": { "type": "string", "description": "A method of the point reward." },
            },
            "required": ["method"],
            "additionalProperties": true,
        })
    }
}

/// The number format of the frozen base. What trains always has f32 values, optimiser state and reductions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// The base is held in 32 bits.
    #[default]
    F32,
    /// The base is held in bfloat16, and products take both factors in it.
    Bf16,
}

/// How exactly matrices of 32 bits are multiplied, as in PyTorch's `set_float32_matmul_precision`. What is held, summed and updated
/// has 32 bits all the same, and so do graphs of components.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Matmul {
    /// In 32 bits.
    #[default]
    Highest,
    /// In fewer where that is faster: as three products of parts of bf16 on processors with AMX (sixteen bits of a number's
    /// twenty-four), in TF32 on NVIDIA devices (eleven); elsewhere as `highest`.
    High,
}

impl Matmul {
    /// Whether it is what a job has that says nothing.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub(crate) fn is_highest(&self) -> bool {
        *self == Self::Highest
    }
}

/// What a forward pass keeps for the reverse one. It changes memory and time, and no bit of a result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Activations {
    /// Whichever the free memory of the machine allows when the run starts.
    #[default]
    Auto,
    /// All that the reverse of each block needs.
    Keep,
    /// The input of each block; the block is run again in reverse. About a third more time.
    Recompute,
}

/// What a head tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HeadTask {
    /// Documents: one class each.
    Classification,
    /// Words: each has a class.
    TokenClassification,
    /// Documents: one vector each, near to those of what belongs to it.
    Embedding,
}

impl HeadTask {
    /// The form of rows that it learns from.
    pub const fn form(self) -> Form {
        match self {
            Self::Classification => Form::Classification,
            Self::TokenClassification => Form::TokenClassification,
            Self::Embedding => Form::Retrieval,
        }
    }
}

/// How the rows of a document become its vector.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HeadPooling {
    /// Their mean.
    #[default]
    Mean,
    /// The first one, where encoders have their `[CLS]`.
    First,
    /// The last one, the only one that has seen a whole document where rows see those before them.
    Last,
}

/// A head over classes, in the place of the base's own, which starts from the base's, if that has one of as many classes, and at random
/// otherwise; or no weights at all, but a vector per document.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(deny_unknown_fields)]
pub struct HeadSpec {
    /// What has a class or a vector.
    pub task: HeadTask,
    /// The names of the classes, in the order of their numbers; none of a head that gives vectors.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 2, max = 65_536), inner(length(min = 1, max = 256)))]
    pub labels: Vec<String>,
    /// How rows become a vector, of a head that gives such; their mean when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pooling: Option<HeadPooling>,
    /// Whether rows of a decoder see those after them as well, of a head that gives vectors.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bidirectional: bool,
}

impl HeadSpec {
    /// A head that tells these classes apart.
    pub const fn of_classes(task: HeadTask, labels: Vec<String>) -> Self {
        Self { task, labels, pooling: None, bidirectional: false }
    }

    /// A head that gives a vector of each document.
    pub const fn of_vectors(pooling: Option<HeadPooling>, bidirectional: bool) -> Self {
        Self { task: HeadTask::Embedding, labels: Vec::new(), pooling, bidirectional }
    }

    /// Whether it gives vectors, and not classes.
    pub const fn gives_vectors(&self) -> bool {
        matches!(self.task, HeadTask::Embedding)
    }
}

/// When the whole state of the run is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub struct CheckpointSpec {
    /// Steps between checkpoints; `null` for none but on request.
    #[schemars(range(min = 1))]
    pub every_steps: Option<u64>,
    /// How many of the latest are kept.
    #[schemars(range(min = 1, max = 100))]
    pub keep: u32,
}

impl Default for CheckpointSpec {
    /// Every hundred steps, the latest kept: a run that is cut off loses minutes, not everything.
    fn default() -> Self {
        Self { every_steps: Some(100), keep: 1 }
    }
}

/// When the validation loss is measured, beside before the first and after the last step.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub struct EvaluateSpec {
    /// Steps between measurements; only before and after when it is left out.
    #[schemars(range(min = 1))]
    pub every_steps: Option<u64>,
}

/// How to learn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub struct TuneSpec {
    /// The components, in the order in which they apply at a site.
    pub stack: Vec<SlotSpec>,
    /// Shorthand for a stack of one.
    pub adapter: Option<SlotSpec>,
    /// Starts from random weights: the base needs a configuration and a tokenizer only.
    pub from_scratch: bool,
    /// Classes that the model tells apart, in the place of what the base gives: such a head trains whole beside adapters, and is kept
    /// in the folder of the first. Or vectors of documents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head: Option<HeadSpec>,
    /// Another model that is made of the base first, and trains in its place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub surgery: Option<MethodRef>,
    /// Statistics that another job kept (`outputs.statistics`): what components want to know of the base before they start is
    /// taken from there, and only what is not there is measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub statistics: Option<Reference>,
    /// How the ranks of what trains are shared among its sites; each has the same when it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<MethodRef>,
    /// The loss.
    pub objective: MethodRef,
    /// What the answers are worth which the model gives by itself, where the objective learns from such: the sum of these.
    pub rewards: Vec<RewardSpec>,
    /// How one step uses the engine.
    pub step: MethodRef,
    /// How gradients change parameters.
    pub optimizer: MethodRef,
    /// How the learning rate runs over time.
    pub schedule: MethodRef,
    /// Tokens in one batch, packed; at least `logical_shards × data.max_length`.
    #[schemars(range(min = 2, max = 268_435_456))]
    pub batch_tokens: u32,
    /// Batches whose gradients are summed for one step.
    #[schemars(range(min = 1, max = 65_536))]
    pub accumulation: u32,
    /// Length of the run in steps. Exactly one of `steps`, `epochs` and `tokens`.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub steps: Option<u64>,
    /// Length of the run in passes over the whole mixture.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub epochs: Option<f64>,
    /// Length of the run in packed tokens.
    #[schemars(range(min = 1))]
    pub tokens: Option<u64>,
    /// Gradients whose norm is larger are scaled down to it; `null` for no clipping.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub max_grad_norm: Option<f64>,
    /// The number format of the frozen base.
    pub precision: Precision,
    /// In how few bits the linears of the frozen base's blocks are held; products with them are in `precision`. All of them have
    /// whole numbers when it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization: Option<MethodRef>,
    /// How exactly matrices of 32 bits are multiplied.
    pub matmul: Matmul,
    /// What a forward pass keeps for the reverse one.
    pub activations: Activations,
    /// When the state of the run is kept.
    pub checkpoint: CheckpointSpec,
    /// When the validation loss is measured.
    pub evaluate: EvaluateSpec,
    /// Parts into which each batch is split for good; any number of ranks that divides it gives the same bits. As many as
    /// `batch_tokens` allows, up to 8, when it is left out.
    #[schemars(range(min = 1, max = 4096))]
    pub logical_shards: Option<u32>,
    /// The seed of everything random.
    pub seed: u64,
}

impl Default for TuneSpec {
    fn default() -> Self {
        Self {
            stack: Vec::new(),
            adapter: None,
            from_scratch: false,
            head: None,
            surgery: None,
            statistics: None,
            budget: None,
            objective: MethodRef::named("sft"),
            rewards: Vec::new(),
            step: MethodRef::named("plain"),
            optimizer: MethodRef::named("adamw"),
            schedule: MethodRef::named("cosine"),
            batch_tokens: 4096,
            accumulation: 1,
            steps: None,
            epochs: None,
            tokens: None,
            max_grad_norm: Some(1.0),
            quantization: None,
            matmul: Matmul::default(),
            precision: Precision::F32,
            activations: Activations::Auto,
            checkpoint: CheckpointSpec::default(),
            evaluate: EvaluateSpec::default(),
            logical_shards: None,
            seed: 0,
        }
    }
}

impl TuneSpec {
    /// The slots with their paths, the shorthand included.
    pub fn slots(&self) -> Vec<(FieldPath, &SlotSpec)> {
        let tune = FieldPath::from("tune");
        let stack = self.stack.iter().enumerate().map(|(i, slot)| (tune.field("stack").index(i), slot));
        stack.chain(self.adapter.iter().map(|slot| (tune.field("adapter"), slot))).collect()
    }
}

const fn one() -> f64 {
    1.0
}

const fn yes() -> bool {
    true
}
