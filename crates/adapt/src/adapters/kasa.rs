//! Knowledge-aware adaptation in the form of a singular value decomposition: the weight's smallest singular values are taken out, and a trained product with
//! singular values of its own is put in; where a base knows much that a task has no use for.
//!
//! # Update
//! ```text
//! W_oi = Σ_k u_k σ_k v_k^T,  σ descending                                     S_or T_ri = Σ u_k σ_k v_k^T of the r smallest
//! y_to = x_ti W_oi^T + s · ((drop(x_ti) A_ri^T) ∘ d_r) B_or^T - (x_ti T_ri^T) S_or^T                       s = alpha / r
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
//! of them: its folders cannot be read for that, and ours, in our own layout, hold them. The authors' code takes nothing out where i ≥ o + r, and
//! compares A^T A with 1, which it cannot reach.
//!
//! # Paper
//! KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models. Wang, Jiang, Park, Kim, Tang, 2024.

use attune_architecture::{Architecture, Site};
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
use serde_json::{Map, Value};

use crate::parts::dropout::dropped;
use crate::parts::starts::{self, Start};
use crate::parts::{linears, own};

const A: &str = "lora_A";
const B: &str = "lora_B";
const D: &str = "lora_diag";
const LEFT: &str = "dropped_left";
const RIGHT: &str = "dropped_right";

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
}

impl Default for Config {
    /// The authors' values.
    fn default() -> Self {
        Self { rank: 8, alpha: 16.0, beta: 1e-4, gamma: 1e-3, dropout: 0.0 }
    }
}

pub(super) struct Kasa {
    config: Config,
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
        merges: Merges::Factors,
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
        Ok(Box::new(Self { config }))
    }
}

impl Kasa {
    fn scale(&self) -> f64 {
        self.config.alpha / f64::from(self.config.rank)
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
            let (r, all) = (self.config.rank as usize, o.min(i));
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
        let (all, r) = (triples.s.dim(0)?, self.config.rank as usize);
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

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let own = (tensors.get(B)?.broadcast_mul(tensors.get(D)?)? * self.scale())?;
        let left = Tensor::cat(&[own, tensors.get(LEFT)?.neg()?], 1)?;
        let right = Tensor::cat(&[tensors.get(A)?, tensors.get(RIGHT)?], 0)?;
        Ok(Merged::Factors { left, right, scale: 1.0 })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl RowMap for Kasa {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tr = ops::linear(&dropped(x_ti, self.config.dropout, cx)?, tensors.get(A)?, None)?;
        let h_tr = (h_tr.broadcast_mul(tensors.get(D)?)? * self.scale())?;
        let out_tr = ops::linear(x_ti, tensors.get(RIGHT)?, None)?;
        Ok((ops::linear(&h_tr, tensors.get(B)?, None)? - ops::linear(&out_tr, tensors.get(LEFT)?, None)?)?)
    }
}

/// Whether a configuration of PEFT's LoRA is of this kind.
pub(super) fn is_kasa(config: &Map<String, Value>) -> bool {
    config.get("kasa_config").is_some_and(|value| !value.is_null())
}

/// A folder of PEFT's own is refused.
pub(super) fn from_peft(_: &Map<String, Value>, _: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let message = "asks for KaSA, whose folders leave out what was taken out of the base. Merge it with PEFT, and read the whole model";
    Err(vec![Fault::new("kasa_config", message)])
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_tensor::autograd;
    use serde_json::json;

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
        Kasa { config: Config { rank, beta, gamma, ..Config::default() } }
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
    fn a_folder_of_peft_is_refused_with_what_to_do() {
        let config = json!({"peft_type": "LORA", "r": 4, "kasa_config": {"beta": 1e-4, "gamma": 1e-3}});
        let config = config.as_object().unwrap();
        assert!(is_kasa(config) && !is_kasa(json!({"kasa_config": null}).as_object().unwrap()));
        let faults = from_peft(config, &[]).unwrap_err();
        assert!(faults[0].to_string().contains("Merge it with PEFT"), "{}", faults[0]);
    }
}
