//! Low-rank multiplicative adaptation: multiplies a weight by a matrix near 1 made of two thin factors, instead of adding to it; a
//! change in what the weight already spans, or, inflated, one of any rank.
//!
//! # Update
//! ```text
//! W'_oi = T_oo W_oi      with side output                  W'_oi = W_oi T_ii      with side input               d = o or i
//! T_dd  = 1 + s · B_dr A_rd                                                       with kind plus
//! T_dd  = s · shift(B_dr A_rd)        shift(M)_jk = M_j,(k - j) mod d             with kind shift
//! T_dd  = s · B_dr A_rd                                                           with kind plain
//! T_dd  = 1 + D_dd                                                                with kind complete
//! y_to  = x_ti W'_oi^T                                                            s = alpha / r
//! ```
//!
//! # Symbols
//! `lorma_A` `A_rd` and `lorma_B` `B_dr`, f32, trained. With plus A starts uniform in ±1/sqrt(d), B at 0. With shift B starts uniform in
//! ±1/sqrt(r) but for a first column of 1, A at 0 but for a first entry of 1, and both over sqrt(s). With plain B starts uniform in ±1/sqrt(r), A as its
//! pseudo-inverse over s: T is a projection. `lorma_D` `D_dd`, trained, 0 at the start, stands in place of both with complete.
//!
//! # Cost
//! `2 r d` parameters per linear, `d²` with complete. Each pass makes `W'` twice, forward and reverse: at `4 r o i` FLOPs with plus and plain, whose
//! products never have d by d values, at `2 d o i` with shift and complete; and the gradient by it, `2 i o` FLOPs per token.
//!
//! # Limits
//! All but plain start as the base, shift bit for bit where s is 1; plain starts as what a projection of rank r leaves of it. With plus the change is `s B (A W)`, or `s (W B) A`: of rank r, in the
//! space of rows, or of columns, of W. With shift T has any rank, and merges to a weight.
//!
//! # Departures
//! none; plain and complete are the paper's comparisons.
//!
//! # Paper
//! LoRMA: Low-Rank Multiplicative Adaptation for LLMs. Bihany, Patel, Modi, 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::rng::Rng;
use attune_tensor::{linalg, ops};
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::starts::{self, Start};
use crate::parts::{linears, own};

const A: &str = "lorma_A";
const B: &str = "lorma_B";
const D: &str = "lorma_D";

/// Parameters of LoRMA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the product of the factors.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// On which side the weight is multiplied.
    side: Side,
    /// How the factors make a matrix that starts as 1.
    kind: Kind,
}

/// On which side the weight is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Side {
    /// From the left: outputs are mixed.
    Output,
    /// From the right: inputs are mixed.
    Input,
}

/// How the factors make a matrix that starts as 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// 1 plus their product.
    Plus,
    /// Their product with row j rotated by j places, which has any rank.
    Shift,
    /// Their product alone, which starts as a projection: what is left of the base has their rank.
    Plain,
    /// 1 plus a whole matrix, and no factors.
    Complete,
}

impl Default for Config {
    /// The paper's values.
    fn default() -> Self {
        Self { rank: 8, alpha: 8.0, side: Side::Output, kind: Kind::Plus }
    }
}

pub(super) struct Lorma {
    config: Config,
}

impl Method for Lorma {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "LoRMA: Low-Rank Multiplicative Adaptation for LLMs",
            authors: "Harsh Bihany, Shubham Patel, Ashutosh Modi",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: r#"if(kind == "complete", if(side == "output", o*o, i*i), 2*rank*if(side == "output", o, i))"#,
        graph_numbers: "16*o*i",
        merges: Merges::Factors,
        rules: &[Rule {
            when: r#"kind == "shift" or kind == "plain""#,
            require: "alpha > 0",
            message: "is 0, with which nothing is left of the weight; expected more with kinds shift and plain",
            path: "alpha",
        }],
        ..Card::new(
            "lorma",
            Point::Adapter,
            "Low-rank multiplicative adaptation: multiplies a weight by a matrix near 1 made of two thin factors, instead of \
             adding to it; a change in what the weight already spans, or, inflated, one of any rank.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Lorma {
    fn scale(&self) -> f64 {
        self.config.alpha / f64::from(self.config.rank)
    }

    /// The change of a weight by `1 + s B A` as factors, `[o, r]` and `[r, i]`.
    fn factors(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<(Tensor, Tensor)> {
        let (a_rd, b_dr) = (tensors.get(A)?, tensors.get(B)?);
        Ok(match self.config.side {
            Side::Output => (b_dr.clone(), ops::matmul(a_rd, w_oi)?),
            Side::Input => (ops::matmul(w_oi, b_dr)?, a_rd.clone()),
        })
    }
}

impl Adapter for Lorma {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let rank = self.config.rank as usize;
        linears::attach(sites, |site, output, input| {
            let d = match self.config.side {
                Side::Output => output,
                Side::Input => input,
            };
            if self.config.kind == Kind::Complete {
                return Ok(vec![TensorSpec::trained(D, [d, d])]);
            }
            if rank > d {
                let message = format!("is {rank}; {} is multiplied on a side of {d}, which is the most", site.id);
                return Err(Fault::new("rank", message));
            }
            Ok(vec![TensorSpec::trained(A, [rank, d]), TensorSpec::trained(B, [d, rank])])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        if matches!(self.config.kind, Kind::Plus | Kind::Complete) {
            return starts::each(
                at,
                rng,
                |spec| if spec.local == A { Start::kaiming(spec) } else { Start::Constant(0.0) },
            );
        }
        let rank = self.config.rank as usize;
        let d = at.tensors.first().map_or(0, |spec| spec.shape[1]);
        if self.config.kind == Kind::Plain {
            let b_dr = rng.named(B).uniform_tensor((d, rank), 1.0 / (rank as f64).sqrt(), DType::F32)?;
            // B has as many columns as its rank, but for chance: (B^T B)⁻¹ B^T.
            let wide = b_dr.to_dtype(DType::F64)?;
            let turned = wide.t()?.contiguous()?;
            let a_rd = (ops::matmul(&linalg::inverse(&ops::matmul(&turned, &wide)?)?, &turned)? / self.scale())?;
            return starts::each(at, rng, |spec| Start::Is(if spec.local == A { a_rd.clone() } else { b_dr.clone() }));
        }
        // The product's first column is 1, which the shift makes the diagonal.
        let bound = 1.0 / (rank as f64).sqrt();
        let rest = rng.named(B).uniform_tensor((d, rank - 1), bound, DType::F32)?;
        let b_dr = Tensor::cat(&[Tensor::ones((d, 1), DType::F32, &Device::Cpu)?, rest], 1)?;
        let mut first = vec![0f32; rank * d];
        first[0] = 1.0;
        let a_rd = Tensor::from_vec(first, (rank, d), &Device::Cpu)?;
        let over = 1.0 / self.scale().sqrt();
        let (a_rd, b_dr) = ((a_rd * over)?, (b_dr * over)?);
        starts::each(at, rng, |spec| Start::Is(if spec.local == A { a_rd.clone() } else { b_dr.clone() }))
    }

    fn truncates(&self) -> bool {
        self.config.kind == Kind::Plain
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let own = if self.config.kind == Kind::Complete { D } else { A };
        let w_oi = weight.dense(tensors.get(own)?.dtype())?;
        match self.config.kind {
            Kind::Plus => {
                let (left, right) = self.factors(&w_oi, tensors)?;
                Ok(Merged::Factors { left, right, scale: self.scale() })
            }
            Kind::Shift | Kind::Plain | Kind::Complete => {
                Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
            }
        }
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl WeightMap for Lorma {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let with = |t_dd: &Tensor| match self.config.side {
            Side::Output => ops::matmul(t_dd, w_oi),
            Side::Input => ops::matmul(w_oi, t_dd),
        };
        let product = || {
            let (left, right) = self.factors(w_oi, tensors)?;
            Ok::<_, attune_points::Error>((ops::matmul(&left, &right)? * self.scale())?)
        };
        Ok(match self.config.kind {
            Kind::Plus => (w_oi + product()?)?,
            Kind::Plain => product()?,
            Kind::Shift => with(&(shift(&ops::matmul(tensors.get(B)?, tensors.get(A)?)?)? * self.scale())?)?,
            Kind::Complete => (w_oi + with(tensors.get(D)?)?)?,
        })
    }
}

/// A square matrix with row j rotated to the right by j places.
fn shift(m_dd: &Tensor) -> attune_points::Result<Tensor> {
    let d = m_dd.dim(0)?;
    let from = (0..d).flat_map(|j| (0..d).map(move |k| ((k + d - j) % d) as u32)).collect::<Vec<_>>();
    Ok(m_dd.contiguous()?.gather(&Tensor::from_vec(from, (d, d), m_dd.device())?, 1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(name: &str, shape: [usize; 2]) -> Tensor {
        Rng::new(1, name).normal_tensor(&shape[..], 1.0, DType::F64).unwrap()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        let off = (a.to_dtype(DType::F64).unwrap() - b.to_dtype(DType::F64).unwrap()).unwrap().abs().unwrap();
        off.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn started(config: &Config, d: usize) -> Locals {
        let rank = config.rank as usize;
        let tensors = vec![TensorSpec::trained(A, [rank, d]), TensorSpec::trained(B, [d, rank])];
        let at = Attachment { site: attune_architecture::SiteId::new("q_proj"), tensors };
        let base = Tensor::zeros((0, 0), DType::F32, &Device::Cpu).unwrap();
        Lorma { config: config.clone() }.init(&at, &base, &mut Rng::new(1, "init")).unwrap().0
    }

    #[test]
    fn a_shift_moves_each_entry_once_and_a_first_column_to_the_diagonal() {
        let values = Tensor::arange(0f64, 16.0, &Device::Cpu).unwrap().reshape((4, 4)).unwrap();
        let mut moved = shift(&values).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(moved[4..8], [7.0, 4.0, 5.0, 6.0]);
        moved.sort_by(f64::total_cmp);
        assert_eq!(moved, values.flatten_all().unwrap().to_vec1::<f64>().unwrap());
        let ones = Tensor::ones((4, 1), DType::F64, &Device::Cpu).unwrap();
        let first = Tensor::cat(&[ones, Tensor::zeros((4, 3), DType::F64, &Device::Cpu).unwrap()], 1).unwrap();
        assert_eq!(difference(&shift(&first).unwrap(), &Tensor::eye(4, DType::F64, &Device::Cpu).unwrap()), 0.0);
    }

    #[test]
    fn both_kinds_start_as_the_base_on_both_sides() {
        for (kind, alpha, bound) in [(Kind::Plus, 8.0, 0.0), (Kind::Shift, 2.0, 0.0), (Kind::Shift, 5.0, 1e-6)] {
            for (side, d) in [(Side::Output, 4), (Side::Input, 6)] {
                let config = Config { rank: 2, alpha, side, kind };
                let w = normal("w", [4, 6]).to_dtype(DType::F32).unwrap();
                let made = Lorma { config: config.clone() }.graph(&w, &started(&config, d)).unwrap();
                assert!(difference(&made, &w) <= bound, "{config:?}: {}", difference(&made, &w));
            }
        }
    }

    /// `T W` and `W T` by a whole T.
    #[test]
    fn plus_is_a_product_with_one_plus_the_factors() {
        for (side, d) in [(Side::Output, 4), (Side::Input, 6)] {
            let (w, a, b) = (normal("w", [4, 6]), normal("a", [2, d]), normal("b", [d, 2]));
            let lorma = Lorma { config: Config { rank: 2, alpha: 6.0, side, ..Config::default() } };
            let made = lorma.graph(&w, &Locals::new("q_proj", [(A, a.clone()), (B, b.clone())])).unwrap();
            let one = Tensor::eye(d, DType::F64, &Device::Cpu).unwrap();
            let t = (one + (b.matmul(&a).unwrap() * 3.0).unwrap()).unwrap();
            let by_hand = if side == Side::Output { t.matmul(&w) } else { w.matmul(&t) }.unwrap();
            assert!(difference(&made, &by_hand) < 1e-12);
        }
    }

    #[test]
    fn shift_merges_to_a_weight_and_plus_to_factors() {
        let w = normal("w", [4, 6]);
        let at = Attachment { site: attune_architecture::SiteId::new("q_proj"), tensors: Vec::new() };
        let locals = Locals::new("q_proj", [(A, normal("a", [2, 4])), (B, normal("b", [4, 2]))]);
        for kind in [Kind::Plus, Kind::Shift] {
            let lorma = Lorma { config: Config { rank: 2, kind, ..Config::default() } };
            let made = lorma.graph(&w, &locals).unwrap();
            let merged = match lorma.merge(&at, &locals, &w).unwrap() {
                Merged::Factors { left, right, scale } if kind == Kind::Plus => {
                    (&w + (left.matmul(&right).unwrap() * scale).unwrap()).unwrap()
                }
                Merged::Weight { weight, .. } if kind == Kind::Shift => weight,
                other => panic!("{other:?}"),
            };
            assert!(difference(&made, &merged) < 1e-12);
        }
    }

    /// `T W` of a projection: it starts away from the base, by what is beyond its rank, and does nothing more when done twice.
    #[test]
    fn plain_starts_as_a_projection_and_not_as_the_base() {
        for (side, d) in [(Side::Output, 4), (Side::Input, 6)] {
            let config = Config { rank: 2, alpha: 3.0, side, kind: Kind::Plain };
            let (lorma, locals) = (Lorma { config: config.clone() }, started(&config, d));
            assert!(lorma.truncates());
            let w = normal("w", [4, 6]).to_dtype(DType::F32).unwrap();
            let once = lorma.graph(&w, &locals).unwrap();
            assert!(difference(&once, &w) > 0.1 && difference(&lorma.graph(&once, &locals).unwrap(), &once) < 1e-5);
            let values = linalg::svd(&once).unwrap().s.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
            assert!(values[1] > 0.1 && values[2] < 1e-5, "{values:?}");
        }
    }

    #[test]
    fn complete_is_any_matrix_and_starts_as_the_base() {
        for (side, d) in [(Side::Output, 4), (Side::Input, 6)] {
            let lorma = Lorma { config: Config { side, kind: Kind::Complete, ..Config::default() } };
            let (w, t) = (normal("w", [4, 6]), normal("t", [d, d]));
            let one = Tensor::eye(d, DType::F64, &Device::Cpu).unwrap();
            let of = |change: Tensor| lorma.graph(&w, &Locals::new("q_proj", [(D, change)])).unwrap();
            let by_hand = if side == Side::Output { t.matmul(&w) } else { w.matmul(&t) }.unwrap();
            assert!(difference(&of((&t - &one).unwrap()), &by_hand) < 1e-12);
            assert_eq!(difference(&of(t.zeros_like().unwrap()), &w), 0.0);
        }
    }
}
