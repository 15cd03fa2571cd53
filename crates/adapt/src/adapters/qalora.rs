//! LoRA that reads sums over groups of neighbouring inputs: for a base whose weight is quantised group by group, into whose zero points
//! what was trained merges without a number more.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · (G Σ_{i in group g} drop(x_ti) / n)_tg A_rg^T B_or^T         G groups of n inputs, i = G n
//! s    = alpha / r        or, with rslora,  alpha / sqrt(r)
//! W'_oi = W_oi + s G / n (B A)_og(i)         merged: the same number for all inputs of a group
//! ```
//!
//! # Symbols
//! `lora_A` `A_rg`, `[r, G]`, uniform in ±1/sqrt(G) at first (Kaiming with a = sqrt(5)); `lora_B` `B_or`, 0 at first; both f32 and
//! trained. `n` is `group_size`, `drop` dropout on the component's input.
//!
//! # Cost
//! `r*(i/group_size + o)` parameters per linear; `2 r (i/group_size + o)` extra FLOPs per token forward, and `i` for the sums.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. With groups of one input it is LoRA whose input is scaled by its width. Its rank is at most
//! the number of groups.
//!
//! # Departures
//! none; agrees with PEFT, which scales means by their number where the paper takes sums: here the rate that both leave to the learning
//! rate is PEFT's. PEFT has it on linears of GPTQ alone and merges nowhere; here bases are not quantised, and what it merges to is the
//! weight that a quantised base's zero points would make of it: of group g at output o they move by `s G / n (B A)_og` over the group's
//! step.
//!
//! # Paper
//! QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models. Xu, Xie, Gu, Chen, Chang, Zhang, Chen, Zhang, Tian, 2023.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site};
use attune_artifacts::formats::peft::LoraConfig;
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{D, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::dropout::dropped;
use crate::parts::scaling::{self, Scaling};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, keys, linears};

const A: &str = "lora_A";
const B: &str = "lora_B";

/// The key of PEFT's configuration that asks for it, and that of its groups.
const OWN: &str = "use_qalora";
const GROUP_SIZE: &str = "qalora_group_size";

/// Parameters of QA-LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the change.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Scales by `alpha / sqrt(rank)` instead of `alpha / rank`.
    rslora: bool,
    /// Inputs of a group, which divides the width of every linear: that of the base's quantisation.
    #[schemars(range(min = 1, max = 65536))]
    group_size: u32,
    /// Rank at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    rank_pattern: BTreeMap<String, u32>,
    /// Alpha at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    alpha_pattern: BTreeMap<String, f64>,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 8.0,
            dropout: 0.0,
            rslora: false,
            group_size: 16,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

pub(super) struct Qalora {
    scaling: Scaling,
    dropout: f64,
    group_size: u32,
    /// The map of each site that has a scaling of its own.
    own: BTreeMap<String, Rows>,
    /// The map of all others.
    rows: Rows,
}

#[derive(Debug, Clone, Copy)]
struct Rows {
    scale: f64,
    dropout: f64,
    group_size: usize,
}

impl Method for Qalora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        aliases: &["qa-lora"],
        paper: Some(Paper {
            title: "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models",
            authors: "Yuhui Xu, Lingxi Xie, Xiaotao Gu, Xin Chen, Heng Chang, Hengheng Zhang, Zhengsu Chen, Xiaopeng Zhang, Qi Tian",
            year: 2023,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i/group_size + o)",
        merges: Merges::Factors,
        peft_type: Some("LORA"),
        ..Card::new(
            "qalora",
            Point::Adapter,
            "LoRA that reads sums over groups of neighbouring inputs: for a base whose weight is quantised group by group, into whose \
             zero points what was trained merges without a number more.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let qalora = Self::new(config);
        let faults = qalora.scaling.faults();
        if faults.is_empty() { Ok(Box::new(qalora)) } else { Err(faults) }
    }
}

impl Qalora {
    fn new(config: Config) -> Self {
        let Config { rank, alpha, dropout, rslora, group_size, rank_pattern, alpha_pattern } = config;
        let scaling = Scaling { rank, alpha, rslora, ranks: rank_pattern, alphas: alpha_pattern };
        let rows = |scale| Rows { scale, dropout, group_size: group_size as usize };
        Self { own: scaling.own(rows), rows: rows(scaling.factor()), scaling, dropout, group_size }
    }

    fn rows_at(&self, site: &str) -> &Rows {
        self.own.get(site).unwrap_or(&self.rows)
    }
}

impl Adapter for Qalora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let size = self.group_size as usize;
        linears::attach(sites, |site, output, input| {
            if !input.is_multiple_of(size) {
                let message = format!("is {size}, which does not divide {input}, the width of {}", site.id);
                return Err(Fault::new("group_size", message));
            }
            let groups = input / size;
            let r = factors::within(self.scaling.rank_at(site.id.as_str()), site, (output, groups))?;
            Ok(vec![TensorSpec::trained(A, [r, groups]), TensorSpec::trained(B, [output, r])])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| if spec.local == A { Start::kaiming(spec) } else { Start::Constant(0.0) })
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        Port::Delta(self.rows_at(at.site.as_str()))
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let Rows { scale, group_size, .. } = *self.rows_at(at.site.as_str());
        let (a_rg, left) = (tensors.get(A)?, tensors.get(B)?.clone());
        let (r, groups) = a_rg.dims2()?;
        let right = a_rg.unsqueeze(2)?.broadcast_as((r, groups, group_size))?.contiguous()?;
        let right = right.reshape((r, groups * group_size))?;
        Ok(Merged::Factors { left, right, scale: scale * groups as f64 / group_size as f64 })
    }

    fn peft(&self) -> Option<Peft> {
        let config = LoraConfig { lora_dropout: self.dropout, ..self.scaling.lora_config() };
        let mut peft = scaling::peft(&config, vec![(A, "lora_A.weight"), (B, "lora_B.weight")]);
        peft.config.insert(OWN.to_owned(), json!(true));
        peft.config.insert(GROUP_SIZE.to_owned(), json!(self.group_size));
        Some(peft)
    }
}

impl RowMap for Rows {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let (t, input) = x_ti.dims2()?;
        let groups = input / self.group_size;
        let x_tgn = dropped(x_ti, self.dropout, cx)?.reshape((t, groups, self.group_size))?;
        let sums_tg = x_tgn.sum(D::Minus1)?;
        let h_tr = ops::linear(&sums_tg, tensors.get(A)?, None)?;
        let scale = self.scale * groups as f64 / self.group_size as f64;
        Ok(ops::linear(&(h_tr * scale)?, tensors.get(B)?, None)?)
    }
}

/// Whether a configuration of PEFT's LoRA is QA-LoRA's.
pub(super) fn is_qalora(config: &Map<String, Value>) -> bool {
    config.get(OWN) == Some(&Value::Bool(true))
}

/// What `adapter_config.json` of a PEFT QA-LoRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let modules = keys::without_inner(modules, "lora_");
    let (lora, mut params) = scaling::from_peft(config, &modules, Some(OWN))?;
    let size = config.get(GROUP_SIZE).filter(|size| !size.is_null()).cloned().unwrap_or_else(|| json!(16));
    if size.as_u64().is_none_or(|size| size == 0) {
        return Err(vec![Fault::new(GROUP_SIZE, format!("is {size}; expected 1 or more"))]);
    }
    params.insert("dropout".to_owned(), json!(lora.lora_dropout));
    params.insert("group_size".to_owned(), size);
    Ok((MethodRef { method: Qalora::CARD.name.to_owned(), params }, Targets::Many(modules)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_have_to_divide_the_width_of_a_linear() {
        let architecture = Architecture::from_json(
            br#"{"model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 11, "max_position_embeddings": 8,
                "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false}"#,
        );
        let architecture = architecture.unwrap();
        let sites: Vec<Site> =
            architecture.sites().into_iter().filter(|site| site.id.as_str().contains("mlp.")).collect();
        let faults = |config: Config| -> Vec<String> {
            Qalora::new(config).attach(&architecture, &sites).unwrap_err().iter().map(ToString::to_string).collect()
        };
        let found = faults(Config { group_size: 12, rank: 2, ..Config::default() });
        assert_eq!(found, ["`group_size` is 12, which does not divide 40, the width of model.layers.0.mlp.down_proj"]);
        // Of three groups there are three directions.
        let found = faults(Config { group_size: 8, rank: 4, ..Config::default() });
        assert!(found[0].contains("so its rank is at most 3"), "{found:?}");
    }

    #[test]
    fn a_folder_says_how_large_groups_are() {
        let modules = ["h.0.q_proj".to_owned()];
        let read = |more: Value| {
            let mut config = json!({"peft_type": "LORA", "r": 2, "use_qalora": true});
            config.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
            from_peft(config.as_object().unwrap(), &modules)
        };
        assert_eq!(read(json!({})).unwrap().0.params["group_size"], 16);
        assert_eq!(read(json!({"qalora_group_size": 4})).unwrap().0.params["group_size"], 4);
        assert!(read(json!({"qalora_group_size": 0})).unwrap_err()[0].to_string().contains("expected 1 or more"));
        assert!(read(json!({"use_dora": true})).is_err(), "one of both");
        assert!(!is_qalora(json!({"use_qalora": false}).as_object().unwrap()));
    }
}
