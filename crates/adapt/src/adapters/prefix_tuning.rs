//! Trained keys and values before those of every document, at each attention: steers a frozen base at the price of a few keys
//! more, and leaves its weights alone.
//!
//! # Update
//! ```text
//! o_th = softmax([q_th K_pᵀ, q_th K_tᵀ] / sqrt(W)) [V_p; V_t]         for each head, p < length, documents' rows t from position length on
//! H_ph = tanh(I_hk E_pk + i),  K_p = A_kh H_ph + a,  V_p = B_kh H_ph + b         with `hidden`
//! ```
//!
//! # Symbols
//! `keys` `K_p` and `values` `V_p`, `[length, k]` at each attention, f32, trained, started normal with standard deviation `std`. Keys
//! are compared as they are, no position turns them. With `hidden`, a perceptron makes them: `embedding` `E_pk`, started as they are
//! else, and `inner` `I_hk` with its bias are there once, `keys_weight` `A_kh` and `values_weight` `B_kh` with theirs at each attention;
//! weights and biases start as PyTorch's.
//!
//! # Cost
//! `2*length*k` parameters an attention, where keys and values of a row are `k` wide; `length` keys more for each query, no query
//! more. With `hidden`, `2*k*(hidden+1)` an attention and `length*k + hidden*(k+1)` that all share, in training alone. It does not merge.
//!
//! # Limits
//! A prefix of the keys and values of a text is that text. Keys far from all queries leave the base but for its positions. What a
//! perceptron made is a prefix without one, to the last bit.
//!
//! # Departures
//! None from PEFT, whose `prefix_projection` is `hidden`: the perceptron is not kept with an adapter, and one that is trained further
//! trains its keys and values. A sliding window does not hide them.
//!
//! # Paper
//! Prefix-Tuning: Optimizing Continuous Prompts for Generation. Li, Liang, 2021.

use attune_architecture::{Architecture, Place, Site};
use attune_points::adapter::{Adapter, Attachment, AttentionMap, BaseEdit, Merged, Peft, PeftTensors, Port};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::prompt;
use crate::parts::starts::{self, Start};

const KEYS: &str = "keys";
const VALUES: &str = "values";
const EMBEDDING: &str = "embedding";
const INNER: &str = "inner";
const INNER_BIAS: &str = "inner_bias";
/// Weight and bias of each linear that ends in the numbers of an attention.
const OUTER: [(&str, &str); 2] = [("keys_weight", "keys_bias"), ("values_weight", "values_bias")];

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
    /// Width of a perceptron that makes them in training; 0 for none.
    #[schemars(range(max = 65536))]
    hidden: u32,
}

impl Default for Config {
    /// The paper's length for table-to-text; PEFT's start.
    fn default() -> Self {
        Self { length: 10, std: 1.0, hidden: 0 }
    }
}

pub(super) struct PrefixTuning {
    config: Config,
}

impl Method for PrefixTuning {
    const CARD: Card = Card {
        category: Some(Category::Prompt),
        paper: Some(Paper {
            title: "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
            authors: "Xiang Lisa Li, Percy Liang",
            year: 2021,
        }),
        applies: &[SiteKind::Attention],
        targets: "all",
        parameters: "if(hidden < 1, 2*length*k, 2*k*(hidden + 1))",
        shared: "if(hidden < 1, 0, length*k + hidden*(k + 1))",
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

impl PrefixTuning {
    /// The tensors at an attention whose keys are `k` wide.
    fn tensors(&self, k: usize) -> Vec<TensorSpec> {
        let (length, hidden) = (self.config.length as usize, self.config.hidden as usize);
        if hidden == 0 {
            return vec![TensorSpec::trained(KEYS, [length, k]), TensorSpec::trained(VALUES, [length, k])];
        }
        let bias = |spec: TensorSpec| TensorSpec { decay: false, ..spec };
        let mut tensors = vec![
            prompt::trained(EMBEDDING, [length, k]),
            prompt::trained(INNER, [hidden, k]),
            bias(prompt::trained(INNER_BIAS, [hidden])),
        ];
        for (weight, own) in OUTER {
            tensors.push(TensorSpec::trained(weight, [k, hidden]));
            tensors.push(bias(TensorSpec::trained(own, [k])));
        }
        tensors
    }
}

impl Adapter for PrefixTuning {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let (mut faults, mut attachments) = (Vec::new(), Vec::new());
        for site in sites {
            if site.place == Place::Attention {
                let tensors = self.tensors(arch.kv_width());
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
        // A bias starts as the numbers of its linear do: by how many that reads.
        let width = |local: &str| at.tensors.iter().find(|spec| spec.local == local).and_then(|spec| spec.shape.last());
        starts::each(at, rng, |spec| {
            let of = match spec.local {
                KEYS | VALUES | EMBEDDING => return Start::Normal(self.config.std),
                INNER_BIAS => width(INNER),
                bias if OUTER.iter().any(|(_, own)| *own == bias) => width(OUTER[0].0),
                _ => spec.shape.last(),
            };
            Start::Uniform(1.0 / (of.copied().unwrap_or(1) as f64).sqrt())
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Attention(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No("keys and values are no change of a weight"))
    }

    fn peft(&self) -> Option<Peft> {
        let mut config = json!({
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "inference_mode": true,
            "num_virtual_tokens": self.config.length,
            "num_transformer_submodules": 1,
            "prefix_projection": self.config.hidden > 0,
        });
        if self.config.hidden > 0 {
            config["encoder_hidden_size"] = self.config.hidden.into();
        }
        let config = config.as_object().cloned().unwrap_or_default();
        Some(Peft { config, tensors: PeftTensors::Joined("prompt_embeddings") })
    }
}

impl AttentionMap for PrefixTuning {
    fn length(&self) -> usize {
        self.config.length as usize
    }

    fn graph(&self, tensors: &Locals) -> attune_points::Result<(Tensor, Tensor)> {
        if self.config.hidden == 0 {
            return Ok((tensors.get(KEYS)?.clone(), tensors.get(VALUES)?.clone()));
        }
        let h_ph = ops::linear(tensors.get(EMBEDDING)?, tensors.get(INNER)?, Some(tensors.get(INNER_BIAS)?))?.tanh()?;
        let made = |(weight, bias): (&str, &str)| -> attune_points::Result<Tensor> {
            Ok(ops::linear(&h_ph, tensors.get(weight)?, Some(tensors.get(bias)?))?)
        };
        Ok((made(OUTER[0])?, made(OUTER[1])?))
    }

    fn tensors(&self, keys: &Tensor, values: &Tensor) -> attune_points::Result<Option<Vec<(&'static str, Tensor)>>> {
        Ok((self.config.hidden == 0).then(|| vec![(KEYS, keys.clone()), (VALUES, values.clone())]))
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
