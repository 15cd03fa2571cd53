//! Weight-decomposed low-rank adaptation: a low-rank change gives the direction of each row of a weight, and a vector its
//! length; where LoRA falls short of full fine-tuning at small ranks, at a higher price a step.
//!
//! # Update
//! ```text
//! V_oi = W_oi + s · B_or A_ri           W'_oi = m_o / ‖V_o‖ · V_oi           y_to = x_ti W'_oi^T
//! s    = alpha / r        or, with rslora,  alpha / sqrt(r)
//! ```
//!
//! # Symbols
//! `lora_A` `A_ri`, `lora_B` `B_or` and `lora_magnitude_vector` `m_o`, f32, trained. A starts uniform in ±1/sqrt(i), B at 0,
//! m at the lengths ‖W_o‖ of the rows of the base's weight. `‖V_o‖` is a constant for gradients, unless `norm_gradient`.
//!
//! # Cost
//! `r*(i+o) + o` parameters per linear. Each pass makes `W'` twice (forward and reverse), some ten passes over `i*o` values,
//! and the gradient by it, `2 i o` FLOPs per token beyond LoRA's.
//!
//! # Limits
//! With B = 0 and m untouched it is the base, bit for bit. Rows of `W'` have the lengths `|m_o|` whatever A and B are.
//!
//! # Departures
//! none; agrees with PEFT, whose dropout of the low-rank path it does not have: its input goes through one weight.
//!
//! # Paper
//! DoRA: Weight-Decomposed Low-Rank Adaptation. Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen, 2024.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site};
use attune_artifacts::formats::peft::LoraConfig;
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{D, DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::parts::factors;
use crate::parts::scaling::{self, Scaling};
use crate::parts::starts::{self, Start};

const A: &str = "lora_A";
const B: &str = "lora_B";
const MAGNITUDE: &str = "lora_magnitude_vector";

/// Parameters of DoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the change of direction.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Scales by `alpha / sqrt(rank)` instead of `alpha / rank`.
    rslora: bool,
    /// Takes gradients through the lengths of rows as well, which the paper leaves out: exact, and one more pass over the
    /// weight.
    norm_gradient: bool,
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
            rslora: false,
            norm_gradient: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

pub(super) struct Dora {
    scaling: Scaling,
    /// The map of each site that has a scaling of its own.
    own: BTreeMap<String, Decomposed>,
    /// The map of all others.
    map: Decomposed,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Decomposed {
    scale: f64,
    norm_gradient: bool,
}

impl Method for Dora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "DoRA: Weight-Decomposed Low-Rank Adaptation",
            authors: "Shih-Yang Liu, Chien-Yi Wang, Hongxu Yin, Pavlo Molchanov, Yu-Chiang Frank Wang, Kwang-Ting Cheng, Min-Hung Chen",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o) + o",
        graph_numbers: "rows*(i+o) + 19*o*i",
        merges: Merges::Weight,
        peft_type: Some("LORA"),
        ..Card::new(
            "dora",
            Point::Adapter,
            "Weight-decomposed low-rank adaptation: a low-rank change gives the direction of each row of a weight, and a \
             vector its length; where LoRA falls short of full fine-tuning at small ranks, at a higher price a step.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let Config { rank, alpha, rslora, norm_gradient, rank_pattern, alpha_pattern } = config;
        let scaling = Scaling { rank, alpha, rslora, ranks: rank_pattern, alphas: alpha_pattern };
        let faults = scaling.faults();
        if !faults.is_empty() {
            return Err(faults);
        }
        let map = |scale| Decomposed { scale, norm_gradient };
        Ok(Box::new(Self { own: scaling.own(map), map: map(scaling.factor()), scaling }))
    }
}

impl Dora {
    fn map_at(&self, site: &str) -> &Decomposed {
        self.own.get(site).unwrap_or(&self.map)
    }
}

impl Adapter for Dora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let mut attachments = factors::attach(sites, A, B, |site| self.scaling.rank_at(site))?;
        for at in &mut attachments {
            if let Ok((_, b)) = factors::pair(at) {
                let (o, quiet) = (b.shape[0], b.quiet);
                // Decay would pull a row towards no length at all.
                let length = TensorSpec { decay: false, quiet, ..TensorSpec::trained(MAGNITUDE, [o]) };
                at.tensors.push(length);
            }
        }
        Ok(attachments)
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let lengths_o = lengths(&weight.dense(DType::F32)?)?.squeeze(1)?;
        starts::each(at, rng, |spec| match spec.local {
            A => Start::kaiming(spec),
            B => Start::Constant(0.0),
            _ => Start::Is(lengths_o.clone()),
        })
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        Port::Weight(self.map_at(at.site.as_str()))
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(MAGNITUDE)?.dtype())?;
        Ok(Merged::Weight { weight: self.map_at(at.site.as_str()).graph(&w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let config = LoraConfig { use_dora: true, ..self.scaling.lora_config() };
        Some(scaling::peft(&config, vec![(A, "lora_A.weight"), (B, "lora_B.weight"), (MAGNITUDE, MAGNITUDE)]))
    }
}

impl WeightMap for Decomposed {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        // The scaling goes on the smaller factor, and the sum into the product's own tensor is one pass fewer.
        let change_oi = ops::matmul(&(tensors.get(B)? * self.scale)?, tensors.get(A)?)?;
        let v_oi = (w_oi + change_oi)?;
        let lengths_o1 = if self.norm_gradient { lengths(&v_oi)? } else { lengths(&v_oi.detach())? };
        let factor_o1 = (tensors.get(MAGNITUDE)?.unsqueeze(1)? / lengths_o1)?;
        Ok(v_oi.broadcast_mul(&factor_o1)?)
    }
}

/// The lengths of the rows, `[o, 1]`.
fn lengths(w_oi: &Tensor) -> attune_points::Result<Tensor> {
    Ok(w_oi.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)
}

/// Whether a configuration of PEFT's LoRA is DoRA's.
pub(super) fn is_dora(config: &Map<String, Value>) -> bool {
    config.get("use_dora").and_then(Value::as_bool).unwrap_or_default()
}

/// What `adapter_config.json` of a PEFT DoRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let (config, params) = scaling::from_peft(config, modules, Some("use_dora"))?;
    if config.lora_dropout != 0.0 {
        let message = format!(
            "is {}; DoRA has no dropout here. Set it to 0 in the file: it changes nothing about what the adapter computes",
            config.lora_dropout
        );
        return Err(vec![Fault::new("lora_dropout", message)]);
    }
    Ok((MethodRef { method: Dora::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use attune_tensor::autograd;

    use super::*;

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn locals(a_ri: &Tensor, b_or: &Tensor, m_o: &Tensor) -> Locals {
        Locals::new("q_proj", [(A, a_ri.clone()), (B, b_or.clone()), (MAGNITUDE, m_o.clone())])
    }

    #[test]
    fn rows_have_the_lengths_of_the_vector_and_the_directions_of_the_sum() {
        let (w_oi, a_ri, b_or, m_o) =
            (tensor("w", &[3, 4]), tensor("a", &[2, 4]), tensor("b", &[3, 2]), tensor("m", &[3]));
        let made_oi =
            Decomposed { scale: 2.0, norm_gradient: false }.graph(&w_oi, &locals(&a_ri, &b_or, &m_o)).unwrap();
        let v_oi = (&w_oi + (b_or.matmul(&a_ri).unwrap() * 2.0).unwrap()).unwrap().to_vec2::<f64>().unwrap();
        let m_o = m_o.to_vec1::<f64>().unwrap();
        for ((made, v), m) in made_oi.to_vec2::<f64>().unwrap().iter().zip(&v_oi).zip(&m_o) {
            let length = v.iter().map(|v| v * v).sum::<f64>().sqrt();
            for (made, v) in made.iter().zip(v) {
                assert!((made - m * v / length).abs() < 1e-12);
            }
        }
    }

    /// The paper's equation 11: the gradient by V is m/‖V‖ times the one by W'.
    #[test]
    fn the_length_is_a_constant_of_gradients_unless_it_is_asked_for() {
        let (w_oi, a_ri, m_o) = (tensor("w", &[3, 4]), tensor("a", &[2, 4]), tensor("m", &[3]));
        let (dmade_oi, b_or) = (tensor("dw", &[3, 4]), autograd::leaf(&tensor("b", &[3, 2])).unwrap());
        let gradient = |norm_gradient: bool| {
            let map = Decomposed { scale: 1.0, norm_gradient };
            let made_oi = map.graph(&w_oi, &locals(&a_ri, b_or.as_tensor(), &m_o)).unwrap();
            autograd::pull(&[&b_or], &[(&made_oi, &dmade_oi)]).unwrap().remove(0).unwrap()
        };
        let v_oi = (&w_oi + b_or.matmul(&a_ri).unwrap()).unwrap();
        let factor_o1 = (m_o.unsqueeze(1).unwrap() / lengths(&v_oi).unwrap()).unwrap();
        let expected = dmade_oi.broadcast_mul(&factor_o1).unwrap().matmul(&a_ri.t().unwrap()).unwrap();
        let largest = |x: Tensor| x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap();
        assert!(largest((gradient(false) - &expected).unwrap()) < 1e-12);
        assert!(largest((gradient(true) - &expected).unwrap()) > 1e-3);
    }

    #[test]
    fn a_folder_with_dropout_is_refused_with_what_to_do() {
        let config = serde_json::json!({"peft_type": "LORA", "r": 4, "use_dora": true, "lora_dropout": 0.1});
        let config = config.as_object().unwrap();
        assert!(is_dora(config));
        let faults = from_peft(config, &["q_proj".to_owned()]).unwrap_err();
        assert!(faults[0].to_string().starts_with("`lora_dropout` is 0.1; DoRA has no dropout here"), "{}", faults[0]);
    }
}
