//! Householder reflection adaptation: a chain of reflections of the inputs of a weight, a change of low rank that keeps the lengths of
//! its rows and the angles between them; what a turn of narrow blocks cannot reach, for as few numbers as half a LoRA's.
//!
//! # Update
//! ```text
//! W'_oi = W_oi H_1 … H_r            H_k = 1 - 2 û_k û_k^T          û_k = u_k / ‖u_k‖          y_to = x_ti W'_oi^T
//! W'_oi = W_oi (1 - 2 Û (Û^T Û)⁻¹ Û^T)                                                      with gram_schmidt
//! ```
//! Both are `W - (W Û) T Û^T`: T is the inverse of half the unit matrix with what stands above the diagonal of Û^T Û, or twice
//! that of Û^T Û.
//!
//! # Symbols
//! `hra_u` `U_ir`, the columns u_k, f32, trained. They start uniform in ±sqrt(2/r), each twice side by side, so that pairs of
//! reflections undo each other; all different where the rank is odd or with `gram_schmidt`.
//!
//! # Cost
//! `r i` parameters per linear. Each pass makes `W'` twice, forward and reverse, at `4 o i r` FLOPs, and the gradient by it,
//! `2 i o` FLOPs per token. T takes some `r³`.
//!
//! # Limits
//! With pairs of equal columns it is the base, up to rounding. Whatever U is, `W' W'^T = W W^T`, and the change has rank r at most.
//!
//! # Departures
//! none; agrees with PEFT. With `gram_schmidt` the columns start all different: equal ones have nothing left to be made
//! orthogonal, which PEFT divides by. Reflections along orthogonal directions are one along the space of U, so no direction is made
//! orthogonal by itself. The loss that pulls U towards orthogonal columns is not here.
//!
//! # Paper
//! Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation. Yuan, Liu, Xu, 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap};
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

use crate::parts::starts::{self, Start};
use crate::parts::{foreign, linears, orthogonal};

const U: &str = "hra_u";
const PEFT_TYPE: &str = "HRA";

/// Parameters of HRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Number of reflections; even, or the model starts away from the base.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Reflects along orthogonal directions, which the columns are made to be; the model starts away from the base then.
    gram_schmidt: bool,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { rank: 8, gram_schmidt: false }
    }
}

pub(super) struct Hra {
    config: Config,
}

impl Method for Hra {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
            authors: "Shen Yuan, Haotian Liu, Hongteng Xu",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*i",
        moves: Some("pairs of reflections undo each other up to rounding"),
        graph_numbers: "18*o*i",
        merges: Merges::Factors,
        peft_type: Some(PEFT_TYPE),
        ..Card::new(
            "hra",
            Point::Adapter,
            "Householder reflection adaptation: a chain of reflections of the inputs of a weight, a change of low rank that keeps \
             the lengths of its rows and the angles between them; what a turn of narrow blocks cannot reach, for as few numbers as \
             half a LoRA's.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Hra {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let rank = self.config.rank as usize;
        linears::attach(sites, |site, _, input| {
            if rank > input {
                let message = format!("is {rank}; {} has {input} inputs, which is the most", site.id);
                return Err(Fault::new("rank", message));
            }
            Ok(vec![TensorSpec::trained(U, [input, rank])])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let Config { rank, gram_schmidt } = self.config;
        let alike = if rank.is_multiple_of(2) && !gram_schmidt { 2 } else { 1 };
        let columns = (rank / alike) as usize;
        let input = at.tensors.first().map_or(0, |spec| spec.shape[0]);
        let bound = 1.0 / (columns as f64).sqrt();
        let u = rng.named(U).uniform_tensor((input, columns, 1), bound, DType::F32)?;
        let u_ir = u.broadcast_as((input, columns, alike as usize))?.reshape((input, rank as usize))?;
        starts::each(at, rng, |_| Start::Is(u_ir.clone()))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let (left, right) = self.factors(&weight.dense(tensors.get(U)?.dtype())?, tensors)?;
        Ok(Merged::Factors { left, right, scale: -1.0 })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, gram_schmidt } = self.config;
        let layout = Layout { r: rank, apply_gs: gram_schmidt, ..Layout::default() };
        Some(foreign::peft(PEFT_TYPE, &layout, vec![(U, U)]))
    }
}

impl Hra {
    /// What W loses: `(W Û) [o, r]` times `T Û^T [r, i]`.
    fn factors(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<(Tensor, Tensor)> {
        let u_ir = tensors.get(U)?;
        let rank = u_ir.dim(1)?;
        let u_ir = u_ir.broadcast_div(&u_ir.sqr()?.sum_keepdim(0)?.sqrt()?)?;
        let back_ri = u_ir.t()?.contiguous()?;
        let gram_rr = ops::matmul(&back_ri, &u_ir)?;
        let t_rr = if self.config.gram_schmidt {
            (orthogonal::inverse(&gram_rr.unsqueeze(0)?)? * 2.0)?
        } else {
            let one_rr = Tensor::eye(rank, u_ir.dtype(), u_ir.device())?;
            let above_rr = (Tensor::triu2(rank, u_ir.dtype(), u_ir.device())? - &one_rr)?;
            orthogonal::inverse(&((gram_rr * above_rr)? + (one_rr * 0.5)?)?.unsqueeze(0)?)?
        };
        Ok((ops::matmul(w_oi, &u_ir)?, ops::matmul(&t_rr.squeeze(0)?, &back_ri)?))
    }
}

impl WeightMap for Hra {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (left, right) = self.factors(w_oi, tensors)?;
        Ok((w_oi - ops::matmul(&left, &right)?)?)
    }
}

/// The keys of `adapter_config.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct Layout {
    r: u32,
    #[serde(rename = "apply_GS")]
    apply_gs: bool,
    bias: String,
    init_weights: bool,
}

impl Default for Layout {
    fn default() -> Self {
        Self { r: 8, apply_gs: false, bias: "none".to_owned(), init_weights: true }
    }
}

/// What `adapter_config.json` of a PEFT HRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let layout: Layout = foreign::parse(config)?;
    let params = json!({"rank": layout.r, "gram_schmidt": layout.apply_gs});
    let params = params.as_object().cloned().unwrap_or_default();
    Ok((MethodRef { method: Hra::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        let off = (a.to_dtype(DType::F64).unwrap() - b.to_dtype(DType::F64).unwrap()).unwrap().abs().unwrap();
        off.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn made(gram_schmidt: bool, w: &Tensor, u: &Tensor) -> Tensor {
        let hra = Hra { config: Config { gram_schmidt, ..Config::default() } };
        hra.graph(w, &Locals::new("q_proj", [(U, u.clone())])).unwrap()
    }

    /// `w (1 - 2 u u^T)` for a column of length 1.
    fn reflected(w: &Tensor, u: &Tensor) -> Tensor {
        (w - (w.matmul(u).unwrap().matmul(&u.t().unwrap()).unwrap() * 2.0).unwrap()).unwrap()
    }

    fn unit(u: &Tensor) -> Tensor {
        u.broadcast_div(&u.sqr().unwrap().sum_all().unwrap().sqrt().unwrap()).unwrap()
    }

    #[test]
    fn it_is_one_reflection_after_the_other() {
        for rank in [1, 2, 5] {
            let (w, u) = (normal("w", &[4, 6]), normal("u", &[6, rank]));
            let by_hand = (0..rank).fold(w.clone(), |w, k| reflected(&w, &unit(&u.narrow(1, k, 1).unwrap())));
            assert!(difference(&made(false, &w, &u), &by_hand) < 1e-12, "{rank}");
        }
    }

    #[test]
    fn with_gram_schmidt_it_is_a_reflection_along_each_direction_of_the_space() {
        let (w, u) = (normal("w", &[4, 6]), normal("u", &[6, 3]));
        let mut directions: Vec<Tensor> = Vec::new();
        let mut by_hand = w.clone();
        for k in 0..3 {
            let mut column = u.narrow(1, k, 1).unwrap();
            for direction in &directions {
                let share = direction.t().unwrap().matmul(&column).unwrap();
                column = (&column - direction.matmul(&share).unwrap()).unwrap();
            }
            directions.push(unit(&column));
            by_hand = reflected(&by_hand, &directions[k]);
        }
        assert!(difference(&made(true, &w, &u), &by_hand) < 1e-12);
    }

    #[test]
    fn rows_keep_their_lengths_and_angles() {
        let (w, u) = (normal("w", &[4, 6]), normal("u", &[6, 3]));
        let gram = |w: &Tensor| w.matmul(&w.t().unwrap()).unwrap();
        for gram_schmidt in [false, true] {
            let made = made(gram_schmidt, &w, &u);
            assert!(difference(&made, &w) > 0.1);
            assert!(difference(&gram(&made), &gram(&w)) < 1e-12);
        }
    }

    #[test]
    fn pairs_of_columns_start_alike_and_undo_each_other() {
        let started = |config: Config| {
            let at = Attachment {
                site: attune_architecture::SiteId::new("q_proj"),
                tensors: vec![TensorSpec::trained(U, [6, config.rank as usize])],
            };
            let base = Tensor::zeros((0, 0), DType::F32, &Device::Cpu).unwrap();
            let (locals, _) = Hra { config }.init(&at, &base, &mut Rng::new(1, "init")).unwrap();
            locals.get(U).unwrap().clone()
        };
        let w = normal("w", &[4, 6]).to_dtype(DType::F32).unwrap();
        let u = started(Config { rank: 4, ..Config::default() });
        let columns = u.t().unwrap().to_vec2::<f32>().unwrap();
        assert!(columns[0] == columns[1] && columns[2] == columns[3] && columns[0] != columns[2]);
        assert!(difference(&made(false, &w, &u), &w) < 1e-5);
        for config in [Config { rank: 3, ..Config::default() }, Config { rank: 2, gram_schmidt: true }] {
            let columns = started(config).t().unwrap().to_vec2::<f32>().unwrap();
            assert_ne!(columns[0], columns[1]);
        }
    }
}
