//! Trained keys and values before those of every document, at each attention: steers a frozen base at the price of a few keys
//! more, and leaves its weights alone.
//!
//! # Update
//! ```text
//! o_th = softmax([q_th K_pᵀ, q_th K_tᵀ] / sqrt(W)) [V_p; V_t]         for each head, p < length, documents' rows t from position length on
//! ```
//!
//! # Symbols
//! `keys` `K_p` and `values` `V_p`, `[length, k]` at each attention, f32, trained, started normal with standard deviation `std`. Keys
//! are compared as they are, no position turns them.
//!
//! # Cost
//! `2*length*k` parameters an attention, where keys and values of a row are `k` wide; `length` keys more for each query, no query
//! more. It does not merge.
//!
//! # Limits
//! A prefix of the keys and values of a text is that text. Keys far from all queries leave the base but for its positions.
//!
//! # Departures
//! Keys and values are trained themselves, not made by a perceptron (PEFT's `prefix_projection: false`). A sliding window does not
//! hide them.
//!
//! # Paper
//! Prefix-Tuning: Optimizing Continuous Prompts for Generation. Li, Liang, 2021.

use attune_architecture::{Architecture, Place, Site};
use attune_points::adapter::{Adapter, Attachment, AttentionMap, BaseEdit, Merged, Peft, PeftTensors, Port};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::starts::{self, Start};

const KEYS: &str = "keys";
const VALUES: &str = "values";

/// Parameters of prefix tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Keys and values at each attention.
    #[schemars(range(min = 1, max = 4096))]
    length: u32,
    /// Standard deviation that they start with.
    #[schemars(range(min = 0.0, max = 10.0))]
    std: f64,
}

impl Default for Config {
    /// The paper's length for table-to-text; PEFT's start.
    fn default() -> Self {
        Self { length: 10, std: 1.0 }
    }
}

pub(super) struct PrefixTuning {
    config: Config,
}

impl Method for PrefixTuning {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
            authors: "Xiang Lisa Li, Percy Liang",
            year: 2021,
        }),
        applies: &[SiteKind::Attention],
        targets: "all",
        parameters: "2*length*k",
        moves: Some("its keys and values start at random, and documents begin at a later position"),
        merges: Merges::No,
        peft_type: Some("PREFIX_TUNING"),
        ..Card::new(
            "prefix-tuning",
            Point::Adapter,
            "Trained keys and values before those of every document, at each attention: steers a frozen base at the price of a \
             few keys more, and leaves its weights alone.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for PrefixTuning {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let (mut faults, mut attachments) = (Vec::new(), Vec::new());
        let shape = [self.config.length as usize, arch.kv_width()];
        for site in sites {
            if site.place == Place::Attention {
                let tensors = vec![TensorSpec::trained(KEYS, shape), TensorSpec::trained(VALUES, shape)];
                attachments.push(Attachment { site: site.id.clone(), tensors });
            } else {
                let message = format!("names {}, which is a {}; expected attentions", site.id, site.kind.name());
                faults.push(Fault::new("targets", message));
            }
        }
        if u64::from(self.config.length) >= arch.max_position {
            let message = format!("is {}; the base has {} positions in all", self.config.length, arch.max_position);
            faults.push(Fault::new("length", message));
        }
        if faults.is_empty() { Ok(attachments) } else { Err(faults) }
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |_| Start::Normal(self.config.std))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Attention(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No("keys and values are no change of a weight"))
    }

    fn peft(&self) -> Option<Peft> {
        let config = json!({
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "inference_mode": true,
            "num_virtual_tokens": self.config.length,
            "num_transformer_submodules": 1,
            "prefix_projection": false,
        });
        let config = config.as_object().cloned().unwrap_or_default();
        Some(Peft { config, tensors: PeftTensors::Joined { name: "prompt_embeddings", locals: &[KEYS, VALUES] } })
    }
}

impl AttentionMap for PrefixTuning {
    fn length(&self) -> usize {
        self.config.length as usize
    }

    fn graph(&self, tensors: &Locals) -> attune_points::Result<(Tensor, Tensor)> {
        Ok((tensors.get(KEYS)?.clone(), tensors.get(VALUES)?.clone()))
    }
}

/// What `adapter_config.json` of a PEFT prefix says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, _: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    // With a projection PEFT keeps what it made, so that reading needs no perceptron.
    let length = config.get("num_virtual_tokens").and_then(Value::as_u64).filter(|length| (1..=4096).contains(length));
    let Some(length) = length else {
        let message = format!("is {}; expected 1 to 4096", config.get("num_virtual_tokens").unwrap_or(&Value::Null));
        return Err(vec![Fault::new("num_virtual_tokens", message)]);
    };
    let params = Map::from_iter([("length".to_owned(), json!(length))]);
    Ok((MethodRef { method: PrefixTuning::CARD.name.to_owned(), params }, Targets::from(PrefixTuning::CARD.targets)))
}
