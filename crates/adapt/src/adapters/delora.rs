//! A low-rank change of which a trained number alone says how large it is: factors give directions only; for long runs and high
//! learning rates that must not carry a model away.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + Σ_r s_r ((x_ti w_i) · A_ri) B_or            s_r = λ / (r ‖A_r‖ ‖B_r‖)
//! ```
//!
//! # Symbols
//! `delora_A` `A_ri`, `delora_B` `B_or` and `delora_lambda` λ, `[1]`; f32, trained. A starts uniform in ±1/sqrt(i), B at 0, λ at `lambda`.
//! `delora_w_norm` `w_i`, fixed: the lengths of the columns of the base's weight. No length counts as less than 1e-4. Dropout on the
//! component's input.
//!
//! # Cost
//! `r*(i+o) + 1` parameters per linear; `2 r (i+o)` extra FLOPs per token, as for LoRA.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. The change is at most λ long for weights with columns of length 1: ‖ΔW diag(1/w)‖ ≤ λ,
//! whatever A and B are.
//!
//! # Departures
//! none from PEFT, which does not have it for transposed linears, as GPT-2's are, and starts B at 0 where the paper takes a copy of
//! the first change away from the base. Its `rank_pattern` and `lambda_pattern` name whole paths.
//!
//! # Paper
//! Decoupling Angles and Strength in Low-rank Adaptation. Bini, Girrbach, Akata, 2025.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, RowCx, RowMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::dropout::dropped;
use crate::parts::keys::{self, Keys};
use crate::parts::scaling::{self, Scaling};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, linears};

const A: &str = "delora_A";
const B: &str = "delora_B";
const LAMBDA: &str = "delora_lambda";
const LENGTHS: &str = "delora_w_norm";

/// Below it a length is this: a factor that starts at 0 has a gradient.
const LENGTH_MIN: f64 = 1e-4;

/// Parameters of DeLoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the change.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// How large the change is to begin with, against the columns of the weight.
    #[schemars(range(min = 0.0, max = 1e6))]
    lambda: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Rank at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    rank_pattern: BTreeMap<String, u32>,
    /// Lambda at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    lambda_pattern: BTreeMap<String, f64>,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { rank: 8, lambda: 15.0, dropout: 0.0, rank_pattern: BTreeMap::new(), lambda_pattern: BTreeMap::new() }
    }
}

pub(super) struct Delora {
    config: Config,
}

impl Method for Delora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Decoupling Angles and Strength in Low-rank Adaptation",
            authors: "Massimo Bini, Leander Girrbach, Zeynep Akata",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o) + 1",
        merges: Merges::Factors,
        peft_type: Some("DELORA"),
        ..Card::new(
            "delora",
            Point::Adapter,
            "A low-rank change of which a trained number alone says how large it is: factors give directions only; for long runs and \
             high learning rates that must not carry a model away.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let ranks = Scaling::faults_of("rank_pattern", &config.rank_pattern, 1..=4096);
        let lambdas = Scaling::faults_of("lambda_pattern", &config.lambda_pattern, 0.0..=1e6);
        let faults: Vec<Fault> = ranks.into_iter().chain(lambdas).collect();
        if faults.is_empty() { Ok(Box::new(Self { config })) } else { Err(faults) }
    }
}

impl Adapter for Delora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { rank, ref rank_pattern, .. } = self.config;
        linears::attach(sites, |site, o, i| {
            let rank = rank_pattern.get(site.id.as_str()).copied().unwrap_or(rank);
            let r = factors::within(rank, site, (o, i))?;
            Ok(vec![
                TensorSpec::trained(A, [r, i]),
                TensorSpec::trained(B, [o, r]),
                // Decay would pull the change towards none at all, whatever is learnt.
                TensorSpec { decay: false, ..TensorSpec::trained(LAMBDA, [1]) },
                TensorSpec::fixed(LENGTHS, [i]),
            ])
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let Config { lambda, ref lambda_pattern, .. } = self.config;
        let lambda = lambda_pattern.get(at.site.as_str()).copied().unwrap_or(lambda);
        let lengths_i = weight.dense(DType::F32)?.sqr()?.sum(0)?.sqrt()?;
        starts::each(at, rng, |spec| match spec.local {
            A => Start::kaiming(spec),
            B => Start::Constant(0.0),
            LAMBDA => Start::Constant(lambda),
            _ => Start::Is(lengths_i.clone()),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let left = tensors.get(B)?.broadcast_mul(&scales(tensors)?)?;
        let right = tensors.get(A)?.broadcast_mul(tensors.get(LENGTHS)?)?;
        Ok(Merged::Factors { left, right, scale: 1.0 })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, lambda, dropout, ref rank_pattern, ref lambda_pattern } = self.config;
        let config = keys::written(
            Self::CARD.peft_type.unwrap_or_default(),
            [
                ("r", json!(rank)),
                ("delora_lambda", keys::number(lambda)),
                ("module_dropout", json!(dropout)),
                ("rank_pattern", json!(rank_pattern)),
                ("lambda_pattern", keys::numbers(lambda_pattern)),
                ("bias", json!("none")),
                ("init_weights", json!(true)),
            ],
        );
        Some(Peft { config, tensors: PeftTensors::Each(Vec::new()) })
    }
}

/// `λ / (r ‖A_r‖ ‖B_r‖)`, `[r]`.
fn scales(tensors: &Locals) -> attune_points::Result<Tensor> {
    let (a_ri, b_or) = (tensors.get(A)?, tensors.get(B)?);
    // The bound goes under the root, where a factor of 0 would have no gradient but not-a-number.
    let length = |sum: Tensor| sum.maximum(LENGTH_MIN * LENGTH_MIN)?.sqrt();
    let lengths_r = (length(a_ri.sqr()?.sum(1)?)? * length(b_or.sqr()?.sum(0)?)?)?;
    Ok((tensors.get(LAMBDA)? / a_ri.dim(0)? as f64)?.broadcast_div(&lengths_r)?)
}

impl RowMap for Delora {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let x_ti = dropped(x_ti, self.config.dropout, cx)?.broadcast_mul(tensors.get(LENGTHS)?)?;
        let h_tr = ops::linear(&x_ti, tensors.get(A)?, None)?.broadcast_mul(&scales(tensors)?)?;
        Ok(ops::linear(&h_tr, tensors.get(B)?, None)?)
    }
}

/// What `adapter_config.json` of a PEFT DeLoRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let mut params = scaling::from_keys(&mut keys, (8, 15.0), ["delora_lambda", "lambda_pattern"], modules);
    for (from, to) in [("alpha", "lambda"), ("alpha_pattern", "lambda_pattern")] {
        if let Some(value) = params.remove(from) {
            params.insert(to.to_owned(), value);
        }
    }
    params.insert("dropout".to_owned(), json!(keys.get("module_dropout", 0.0)));
    keys.finish()?;
    Ok((MethodRef { method: Delora::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_tensor::autograd;

    use super::*;

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn change(a: Tensor, b: Tensor) -> Tensor {
        let lambda = Tensor::new(&[6.0f64], a.device()).unwrap();
        let lengths = tensor("w", &[5]).abs().unwrap();
        let locals = Locals::new("up", [(A, a), (B, b), (LAMBDA, lambda), (LENGTHS, lengths)]);
        let at = Attachment { site: SiteId::new("up"), tensors: vec![] };
        let delora = Delora { config: Config::default() };
        let none = Tensor::zeros((4, 5), DType::F64, &candle_core::Device::Cpu).unwrap();
        let Merged::Factors { left, right, .. } = delora.merge(&at, &locals, &none).unwrap() else { panic!() };
        left.matmul(&right).unwrap()
    }

    fn length(x: &Tensor) -> f64 {
        x.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
    }

    #[test]
    fn a_change_is_no_longer_than_lambda_and_as_long_where_its_parts_agree() {
        let lengths = tensor("w", &[5]).abs().unwrap();
        let of_unit_columns = |change: Tensor| length(&change.broadcast_div(&lengths).unwrap());
        let found = of_unit_columns(change(tensor("a", &[3, 5]), tensor("b", &[4, 3])));
        assert!(found < 6.0, "{found}");
        let same = |name: &str, dim: usize, shape: &[usize]| {
            let one = tensor(name, shape);
            Tensor::cat(&[&one, &one, &one], dim).unwrap()
        };
        let found = of_unit_columns(change(same("a", 0, &[1, 5]), same("b", 1, &[4, 1])));
        assert!((found - 6.0).abs() < 1e-12, "{found}");
    }

    #[test]
    fn a_factor_of_zero_has_a_finite_gradient() {
        let b = autograd::leaf(&Tensor::zeros((4, 3), DType::F64, &candle_core::Device::Cpu).unwrap()).unwrap();
        let made = change(tensor("a", &[3, 5]), b.as_tensor().clone());
        assert_eq!(length(&made), 0.0);
        let gradient = autograd::pull(&[&b], &[(&made, &tensor("dw", &[4, 5]))]).unwrap().remove(0).unwrap();
        assert!(length(&gradient).is_finite() && length(&gradient) > 0.0);
    }
}
