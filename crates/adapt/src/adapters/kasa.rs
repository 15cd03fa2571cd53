//! Knowledge-aware adaptation in the form of a singular value decomposition: the weight's smallest singular values are taken out, and a trained product with
//! singular values of its own is put in; where a base knows much that a task has no use for.
//!
//! # Update
//! ```text
//! W_oi = Σ_k u_k σ_k v_k^T,  σ descending                                     S_or T_ri = Σ u_k σ_k v_k^T of the r smallest
//! y_to = x_ti W_oi^T + s · ((drop(x_ti) A_ri^T) ∘ d_r) B_or^T - (x_ti T_ri^T) S_or^T        s = alpha / r, or alpha / sqrt(r)
//! loss + beta · ‖d‖² + gamma · (‖B^T B - 1‖ + ‖A A^T - 1‖)                    at each linear
//! ```
//!
//! # Symbols
//! `lora_A` `A_ri`, `lora_B` `B_or` and `lora_diag` `d_r`, f32, trained; A starts uniform in ±1/sqrt(i), B at 0, d normal with standard deviation 1.
//! `dropped_left` `S_or` and `dropped_right` `T_ri` are what is taken out, never trained; the base itself is left as it is. `drop` is dropout
//! on the trained product's input.
//!
//! # Cost
//! `r*(i+o) + r` parameters per linear, and as many numbers that never train beside them; `4 r (i+o)` extra FLOPs per token forward. A
//! decomposition of each weight before the first step.
//!
//! # Limits
//! It starts as the base without its smallest singular values, which is not the base. Beside another component that takes something out of the same linear it
//! is refused: it would take the same out twice. With all d the same, no losses of its own and nothing taken out it would be LoRA.
//!
//! # Departures
//! Computes what PEFT does, and its losses over all linears. PEFT takes the values out of the base in place, so that what it saves says nothing
//! of them: they are found again where its folders are read, by a decomposition of each weight. Ours have them beside what PEFT reads. The
//! authors' code takes nothing out where i ≥ o + r, and compares A^T A with 1, which it cannot reach.
//!
//! # Paper
//! KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models. Wang, Jiang, Park, Kim, Tang, 2024.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site, SiteId};
use attune_artifacts::formats::peft::LoraConfig;
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::rng::Rng;
use attune_tensor::{linalg, ops};
use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::dropout::dropped;
use crate::parts::linears;
use crate::parts::scaling::{self, Scaling};
use crate::parts::starts::{self, Start};

const A: &str = "lora_A";
const B: &str = "lora_B";
const D: &str = "lora_diag";
const LEFT: &str = "dropped_left";
const RIGHT: &str = "dropped_right";
/// The key of PEFT's configuration of LoRA.
const OWN: &str = "kasa_config";

/// Parameters of KaSA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the change, and how many singular values are taken out.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Weight of the loss on the change's own singular values.
    #[schemars(range(min = 0.0, max = 1e3))]
    beta: f64,
    /// Weight of the loss on what is missing for orthonormal vectors.
    #[schemars(range(min = 0.0, max = 1e3))]
    gamma: f64,
    /// Share of the trained product's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Scales by `alpha / sqrt(rank)` instead of `alpha / rank`.
    rslora: bool,
    /// Rank at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    rank_pattern: BTreeMap<String, u32>,
    /// Alpha at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    alpha_pattern: BTreeMap<String, f64>,
}

impl Default for Config {
    /// The authors' values.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            beta: 1e-4,
            gamma: 1e-3,
            dropout: 0.0,
            rslora: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

pub(super) struct Kasa {
    config: Config,
    scaling: Scaling,
    /// The factors on the product at sites that have one of their own.
    factors: BTreeMap<String, f64>,
}

impl Method for Kasa {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models",
            authors: "Fan Wang, Juyong Jiang, Chansung Park, Sunghun Kim, Jing Tang",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o) + rank",
        moves: Some("the smallest singular values of each weight are taken out"),
        fixed: "rank*(i+o)",
        start_numbers: "40*o*i",
        merges: Merges::Factors,
        peft_type: Some("LORA"),
        ..Card::new(
            "kasa",
            Point::Adapter,
            "Knowledge-aware adaptation in the form of a singular value decomposition: the weight's smallest singular values are taken \
             out, and a trained product with singular values of its own is put in; where a base knows much that a task has no use for.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let made = Self::new(config);
        let faults = made.scaling.faults();
        if faults.is_empty() { Ok(Box::new(made)) } else { Err(faults) }
    }
}

impl Kasa {
    fn new(config: Config) -> Self {
        let (ranks, alphas) = (config.rank_pattern.clone(), config.alpha_pattern.clone());
        let scaling = Scaling { rank: config.rank, alpha: config.alpha, rslora: config.rslora, ranks, alphas };
        Self { factors: scaling.own(|factor| factor), scaling, config }
    }

    /// The factor on the product at a site.
    fn scale(&self, site: &SiteId) -> f64 {
        self.factors.get(site.as_str()).copied().unwrap_or_else(|| self.scaling.factor())
    }
}

/// How far the rows of a matrix are from orthonormal ones: the length of `m m^T - 1`. None where they are: it has no slope there.
fn skewness(m_rk: &Tensor) -> attune_points::Result<Option<Tensor>> {
    let one_rr = Tensor::eye(m_rk.dim(0)?, m_rk.dtype(), m_rk.device())?;
    let square = (ops::matmul(m_rk, &m_rk.t()?)? - one_rr)?.sqr()?.sum_all()?;
    let is_zero = square.to_dtype(DType::F64)?.to_scalar::<f64>()? == 0.0;
    Ok(if is_zero { None } else { Some(square.sqrt()?) })
}

impl Adapter for Kasa {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        linears::attach(sites, |site, o, i| {
            let (r, all) = (self.scaling.rank_at(site.id.as_str()) as usize, o.min(i));
            if r >= all {
                let message = format!(
                    "is {r}, and {} is {o} by {i}: none of its {all} singular values would be left; expected less than {all}",
                    site.id
                );
                return Err(Fault::new("rank", message));
            }
            Ok(vec![
                TensorSpec::trained(A, [r, i]),
                TensorSpec::trained(B, [o, r]),
                TensorSpec::trained(D, [r]),
                TensorSpec::fixed(LEFT, [o, r]),
                TensorSpec::fixed(RIGHT, [r, i]),
            ])
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let triples = linalg::svd(&weight.dense(DType::F64)?)?;
        let (all, r) = (triples.s.dim(0)?, self.scaling.rank_at(at.site.as_str()) as usize);
        let smallest = triples.triples(all - r, r)?;
        let left = smallest.u.broadcast_mul(&smallest.s)?;
        starts::each(at, rng, |spec| match spec.local {
            A => Start::kaiming(spec),
            B => Start::Constant(0.0),
            D => Start::Normal(1.0),
            LEFT => Start::Is(left.clone()),
            _ => Start::Is(smallest.v.clone()),
        })
    }

    fn truncates(&self) -> bool {
        true
    }

    fn said_by_base(&self) -> &'static [&'static str] {
        &[LEFT, RIGHT]
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn penalty(&self, _: &Attachment, tensors: &Locals) -> attune_points::Result<Option<Tensor>> {
        let Config { beta, gamma, .. } = self.config;
        let mut terms = Vec::new();
        if beta > 0.0 {
            terms.push((tensors.get(D)?.sqr()?.sum_all()? * beta)?);
        }
        if gamma > 0.0 {
            for rows in [tensors.get(A)?.clone(), tensors.get(B)?.t()?.contiguous()?] {
                terms.extend(skewness(&rows)?.map(|length| length * gamma).transpose()?);
            }
        }
        let sum = terms.into_iter().map(Ok).reduce(|sum, term| sum? + term?);
        Ok(sum.transpose()?)
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let own = (tensors.get(B)?.broadcast_mul(tensors.get(D)?)? * self.scale(&at.site))?;
        let left = Tensor::cat(&[own, tensors.get(LEFT)?.neg()?], 1)?;
        let right = Tensor::cat(&[tensors.get(A)?, tensors.get(RIGHT)?], 0)?;
        Ok(Merged::Factors { left, right, scale: 1.0 })
    }

    fn peft(&self) -> Option<Peft> {
        let config = LoraConfig { lora_dropout: self.config.dropout, ..self.scaling.lora_config() };
        let mut peft = scaling::peft(&config, vec![(A, "lora_A.weight"), (B, "lora_B.weight")]);
        let Config { beta, gamma, .. } = self.config;
        peft.config.insert(OWN.to_owned(), json!({"beta": beta, "gamma": gamma}));
        Some(peft)
    }
}

impl RowMap for Kasa {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tr = ops::linear(&dropped(x_ti, self.config.dropout, cx)?, tensors.get(A)?, None)?;
        let h_tr = (h_tr.broadcast_mul(tensors.get(D)?)? * self.scale(cx.site))?;
        let out_tr = ops::linear(x_ti, tensors.get(RIGHT)?, None)?;
        Ok((ops::linear(&h_tr, tensors.get(B)?, None)? - ops::linear(&out_tr, tensors.get(LEFT)?, None)?)?)
    }
}

/// Whether a configuration of PEFT's LoRA is of this kind.
pub(super) fn is_kasa(config: &Map<String, Value>) -> bool {
    config.get(OWN).is_some_and(|value| !value.is_null())
}

/// The adapter that PEFT's configuration describes, by the modules that tensors speak of.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let (lora, mut params) = scaling::from_peft(config, modules, Some(OWN))?;
    let own = config.get(OWN).and_then(Value::as_object);
    for key in ["beta", "gamma"] {
        let said = own.and_then(|own| own.get(key));
        let number = said.map(|said| (said.as_f64(), said));
        match number {
            None => {}
            Some((Some(number), _)) => {
                params.insert(key.to_owned(), json!(number));
            }
            Some((None, said)) => return Err(vec![Fault::new(OWN, format!("has {key} {said}; expected a number"))]),
        }
    }
    params.insert("dropout".to_owned(), json!(lora.lora_dropout));
    Ok((MethodRef { method: Kasa::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use attune_tensor::autograd;

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn attachment(o: usize, i: usize, r: usize) -> Attachment {
        let tensors = vec![
            TensorSpec::trained(A, [r, i]),
            TensorSpec::trained(B, [o, r]),
            TensorSpec::trained(D, [r]),
            TensorSpec::fixed(LEFT, [o, r]),
            TensorSpec::fixed(RIGHT, [r, i]),
        ];
        Attachment { site: SiteId::new("up"), tensors }
    }

    fn of(rank: u32, beta: f64, gamma: f64) -> Kasa {
        Kasa::new(Config { rank, beta, gamma, ..Config::default() })
    }

    #[test]
    fn it_starts_as_the_weight_without_its_smallest_singular_values() {
        for (o, i) in [(7, 5), (5, 9)] {
            let (w, kasa) = (normal("w", &[o, i]), of(2, 0.0, 0.0));
            let (locals, _) = kasa.init(&attachment(o, i, 2), &w, &mut Rng::new(1, "init")).unwrap();
            let Merged::Factors { left, right, .. } = kasa.merge(&attachment(o, i, 2), &locals, &w).unwrap() else {
                panic!("no factors")
            };
            let made = (&w + left.matmul(&right).unwrap().to_dtype(DType::F64).unwrap()).unwrap();
            let before = linalg::svd(&w).unwrap().s.to_vec1::<f64>().unwrap();
            let after = linalg::svd(&made).unwrap().s.to_vec1::<f64>().unwrap();
            let all = o.min(i);
            assert!((0..all - 2).all(|k| (before[k] - after[k]).abs() < 1e-5));
            assert!((all - 2..all).all(|k| after[k] < 1e-5 && before[k] > 1e-3));
            let square = |w: &Tensor| w.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            let dropped: f64 = before[all - 2..].iter().map(|s| s * s).sum();
            assert!((square(&(&w - made).unwrap()) - dropped).abs() < 1e-5);
        }
    }

    #[test]
    fn the_loss_is_that_of_its_definition_and_none_for_orthonormal_factors() {
        let (a, b, d) = (normal("a", &[2, 5]), normal("b", &[7, 2]), normal("d", &[2]));
        let locals = |a: &Tensor, b: &Tensor| Locals::new("up", [(A, a.clone()), (B, b.clone()), (D, d.clone())]);
        let loss = |kasa: &Kasa, locals: &Locals| {
            let loss = kasa.penalty(&attachment(7, 5, 2), locals).unwrap();
            loss.map_or(0.0, |loss| loss.to_scalar::<f64>().unwrap())
        };
        let length = |m: &Tensor| {
            let off = (m - Tensor::eye(2, DType::F64, m.device()).unwrap()).unwrap().sqr().unwrap();
            off.sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
        };
        let squares = d.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        let apart = length(&a.matmul(&a.t().unwrap()).unwrap()) + length(&b.t().unwrap().matmul(&b).unwrap());
        assert!((loss(&of(2, 0.5, 0.25), &locals(&a, &b)) - 0.5 * squares - 0.25 * apart).abs() < 1e-12);
        assert!(of(2, 0.0, 0.0).penalty(&attachment(7, 5, 2), &locals(&a, &b)).unwrap().is_none());
        let (v, u) = (linalg::svd(&a).unwrap().v, linalg::svd(&b).unwrap().u);
        assert!(loss(&of(2, 0.0, 1.0), &locals(&v, &u)) < 1e-12);
    }

    #[test]
    fn the_loss_on_singular_values_pulls_by_twice_their_size() {
        let leaf = autograd::leaf(&normal("d", &[2])).unwrap();
        let tensors = [(A, normal("a", &[2, 5])), (B, normal("b", &[7, 2])), (D, leaf.as_tensor().clone())];
        let loss = of(2, 0.5, 0.25).penalty(&attachment(7, 5, 2), &Locals::new("up", tensors)).unwrap().unwrap();
        let pulled = autograd::pull(&[&leaf], &[(&loss, &loss.ones_like().unwrap())]).unwrap().remove(0).unwrap();
        let off = (pulled - leaf.as_tensor()).unwrap().abs().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap();
        assert!(off < 1e-12);
    }

    #[test]
    fn what_peft_says_is_what_we_say_and_ranks_of_single_modules_are_theirs() {
        let module = "model.layers.0.self_attn.q_proj".to_owned();
        let config = json!({
            "peft_type": "LORA", "r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2}, "use_rslora": true,
            "kasa_config": {"beta": 0.5, "gamma": 0.25},
        });
        let config = config.as_object().unwrap();
        assert!(is_kasa(config) && !is_kasa(json!({"kasa_config": null}).as_object().unwrap()));
        let (method, _) = from_peft(config, std::slice::from_ref(&module)).unwrap();
        let read: Config = serde_json::from_value(Value::Object(method.params)).unwrap();
        assert_eq!((read.rank, read.alpha, read.beta, read.gamma), (4, 6.0, 0.5, 0.25));
        let kasa = Kasa::new(read);
        assert!((kasa.scale(&SiteId::new(module.as_str())) - 6.0 / 2f64.sqrt()).abs() < 1e-12);
        assert!((kasa.scale(&SiteId::new("other")) - 3.0).abs() < 1e-12);
        assert_eq!(kasa.peft().unwrap().config["kasa_config"], config["kasa_config"]);
        let wrong = json!({"peft_type": "LORA", "r": 4, "kasa_config": {"beta": "much"}});
        let faults = from_peft(wrong.as_object().unwrap(), &[]).unwrap_err();
        assert!(faults[0].to_string().contains("has beta \"much\"; expected a number"), "{}", faults[0]);
    }

    #[test]
    fn what_was_taken_out_is_found_again_by_the_weight() {
        let (w, kasa) = (normal("w", &[7, 5]), of(2, 0.0, 0.0));
        let at = attachment(7, 5, 2);
        let found = |seed| kasa.init(&at, &w, &mut Rng::new(seed, "any")).unwrap().0;
        for local in kasa.said_by_base() {
            let off = (found(1).get(local).unwrap() - found(2).get(local).unwrap()).unwrap();
            assert_eq!(off.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
        }
    }
}
