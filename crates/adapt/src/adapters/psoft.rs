//! Turns the leading part of a weight within itself, in the space of its largest singular values: rows keep their lengths and angles from far fewer
//! numbers than a turn of all inputs has; where a model shall learn a task and keep what it knows.
//!
//! # Update
//! ```text
//! W_oi ≈ B_or A_ri               A = V_ri, B = U_or diag(S_r)        or balanced,  A = diag(√S_r) V_ri, B = U_or diag(√S_r)
//! y_to = x_ti W_oi^T + ((x_ti A_ri^T) (R - 1)_rr^T) B_or^T
//! R    = diag(beta_r) Q diag(alpha_r)
//! Q    = (1 + K)(1 - K)⁻¹        or 1 + 2 K + 2 K² + … + K^(terms-1) with terms > 0           K = U - U^T
//! ```
//!
//! # Symbols
//! `psoft_R`, the entries of U above its diagonal, row after row, `r (r - 1) / 2` of them, 0 at the start, or without `orthogonal` all of Q, 1 at
//! the start; `psoft_alpha` and `psoft_beta`, 1 at the start; f32, trained. `psoft_A` `A_ri` and `psoft_B` `B_or` of the r largest singular values
//! S, never trained. With `bound`, K is made shorter where it is longer than that.
//!
//! # Cost
//! `r (r-1)/2 + 2 r` parameters per linear, whatever its width, and `r (i+o)` numbers that never train beside them; `2 r (i+o+r)` extra FLOPs
//! per token forward. The inverse takes some `6 r³` FLOPs a pass. A decomposition of each weight before the first step.
//! Where that costs less, and nothing is dropped, a pass makes another weight in place of it, forward and in reverse, at
//! `2 r o (r + i)` FLOPs each, and the gradient by it.
//!
//! # Limits
//! With U = 0 it is the base, bit for bit. Without alpha, beta and `terms`, `W' W'^T = W W^T`, unless the split is balanced. Without
//! `orthogonal` it is any change within both spans, as LoRA-XS makes.
//!
//! # Departures
//! Computes what PEFT does, whose `psoft_alpha` cancels out. PEFT does not keep A and B: it decomposes the base again, and the signs of
//! singular vectors are those of its library. Its folders cannot be read for that; ours keep both, in our own layout.
//!
//! # Paper
//! Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation. Wu, Hu, Min, Wang, 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap, WeightMap};
use attune_points::forms::{AsWeight, Cost};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::parts::dropout::dropped;
use crate::parts::starts::{self, Start};
use crate::parts::{factors, linears, orthogonal, own, spectral};

const R: &str = "psoft_R";
const ALPHA: &str = "psoft_alpha";
const BETA: &str = "psoft_beta";
const A: &str = "psoft_A";
const B: &str = "psoft_B";

/// How singular values are shared between the factors that never train.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Split {
    /// All in B: rows of A are orthonormal, and a turn between them keeps what rows of the weight are to each other.
    #[default]
    Orthonormal,
    /// Their roots in both.
    Balanced,
}

/// Parameters of PSOFT.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How many singular directions turn.
    #[schemars(range(min = 2, max = 4096))]
    rank: u32,
    /// Turns alone; else any matrix between the directions.
    orthogonal: bool,
    /// Trains a scale of each direction as it comes in.
    scale_in: bool,
    /// Trains a scale of each direction as it goes out.
    scale_out: bool,
    /// Terms of the series in place of the inverse; 0 for the inverse itself, which is exact.
    #[schemars(range(min = 0, max = 64))]
    terms: u32,
    /// The most that the entries of K may come to, as the root of the sum of their squares, so that the series is good; none if left out.
    #[schemars(range(min = 0.0, max = 1.0))]
    bound: Option<f64>,
    /// How singular values are shared between the factors that never train.
    split: Split,
    /// Rounds of a randomised decomposition, which is much faster than the exact one; exact if left out.
    #[schemars(range(min = 1, max = 64))]
    iterations: Option<u32>,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self {
            rank: 32,
            orthogonal: true,
            scale_in: true,
            scale_out: true,
            terms: 0,
            bound: None,
            split: Split::Orthonormal,
            iterations: None,
            dropout: 0.0,
        }
    }
}

pub(super) struct Psoft {
    config: Config,
}

impl Method for Psoft {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation",
            authors: "Fei Wu, Jia Hu, Geyong Min, Shiqiang Wang",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "if(orthogonal, rank*(rank - 1)/2, rank*rank) + rank*(scale_in + scale_out)",
        fixed: "rank*(i+o)",
        start_numbers: "42*o*i",
        merges: Merges::Factors,
        rules: &[
            Rule {
                when: "true",
                require: "terms != 1",
                message: "is 1, with which nothing turns; expected 0, or 2 and more",
                path: "terms",
            },
            Rule {
                when: "not orthogonal",
                require: "terms == 0",
                message: "is for turns; expected 0, or `orthogonal`",
                path: "terms",
            },
        ],
        ..Card::new(
            "psoft",
            Point::Adapter,
            "Turns the leading part of a weight within itself, in the space of its largest singular values: rows keep their lengths \
             and angles from far fewer numbers than a turn of all inputs has; where a model shall learn a task and keep what it \
             knows.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        if config.bound == Some(0.0) {
            return Err(vec![Fault::new("bound", "is 0, with which nothing turns; expected more")]);
        }
        if config.bound.is_some() && config.terms == 0 {
            return Err(vec![Fault::new("bound", "is for a series; expected `terms` of 2 and more, or no bound")]);
        }
        Ok(Box::new(Self { config }))
    }
}

impl Psoft {
    /// `R - 1`, `[r, r]`.
    fn turn(&self, tensors: &Locals) -> attune_points::Result<Tensor> {
        let Config { orthogonal, terms, bound, scale_in, scale_out, rank, .. } = self.config;
        let (own, r) = (tensors.get(R)?, rank as usize);
        let mut q_rr = if orthogonal {
            let k_1rr = orthogonal::skew(&own.unsqueeze(0)?, r)?;
            match terms {
                0 => orthogonal::cayley(&k_1rr.neg()?)?,
                terms => orthogonal::series(&bounded(&k_1rr, bound)?, terms)?,
            }
            .squeeze(0)?
        } else {
            own.clone()
        };
        if scale_out {
            q_rr = q_rr.broadcast_mul(&tensors.get(BETA)?.unsqueeze(1)?)?;
        }
        if scale_in {
            q_rr = q_rr.broadcast_mul(tensors.get(ALPHA)?)?;
        }
        Ok((&q_rr - Tensor::eye(r, q_rr.dtype(), q_rr.device())?)?)
    }
}

/// A matrix, made shorter where its length is more than `bound`.
fn bounded(k_1rr: &Tensor, bound: Option<f64>) -> attune_points::Result<Tensor> {
    let Some(bound) = bound else { return Ok(k_1rr.clone()) };
    let squares = k_1rr.sqr()?.sum_all()?;
    if squares.to_dtype(DType::F64)?.to_scalar::<f64>()?.sqrt() <= bound {
        return Ok(k_1rr.clone());
    }
    Ok((k_1rr.broadcast_div(&squares.sqrt()?)? * bound)?)
}

impl Adapter for Psoft {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { rank, orthogonal, scale_in, scale_out, .. } = self.config;
        linears::attach(sites, |site, o, i| {
            let r = factors::within(rank, site, (o, i))?;
            // Decay of what starts as 1 would take the leading part out of the weight.
            let from_one = |local, shape: Vec<usize>| TensorSpec { decay: false, ..TensorSpec::trained(local, shape) };
            let mut tensors =
                vec![if orthogonal { TensorSpec::trained(R, [r * (r - 1) / 2]) } else { from_one(R, vec![r, r]) }];
            tensors.extend(scale_in.then(|| from_one(ALPHA, vec![r])));
            tensors.extend(scale_out.then(|| from_one(BETA, vec![r])));
            tensors.extend([TensorSpec::fixed(A, [r, i]), TensorSpec::fixed(B, [o, r])]);
            Ok(tensors)
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let (r, iterations) = (self.config.rank as usize, self.config.iterations);
        let triples = spectral::leading(weight, r, iterations, rng)?;
        let (a_ri, b_or) = match self.config.split {
            Split::Orthonormal => (triples.v.clone(), triples.u.broadcast_mul(&triples.s)?),
            Split::Balanced => factors::balanced(&triples)?,
        };
        let one_rr = Tensor::eye(r, DType::F32, &Device::Cpu)?;
        starts::each(at, rng, |spec| match spec.local {
            A => Start::Is(a_ri.clone()),
            B => Start::Is(b_or.clone()),
            R if spec.shape.len() == 2 => Start::Is(one_rr.clone()),
            R => Start::Constant(0.0),
            _ => Start::Constant(1.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let left = ops::matmul(tensors.get(B)?, &self.turn(tensors)?)?;
        Ok(Merged::Factors { left, right: tensors.get(A)?.clone(), scale: 1.0 })
    }

    fn peft(&self) -> Option<Peft> {
        let mut peft = own::peft(Self::CARD.name, &self.config);
        // PEFT has a method of this name, and would read the folder as one of its own.
        peft.config.insert("peft_type".to_owned(), "ATTUNE_PSOFT".into());
        Some(peft)
    }
}

impl RowMap for Psoft {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tr = ops::linear(&dropped(x_ti, self.config.dropout, cx)?, tensors.get(A)?, None)?;
        Ok(ops::linear(&ops::linear(&h_tr, &self.turn(tensors)?, None)?, tensors.get(B)?, None)?)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        let r = self.config.rank as usize;
        let (row, weight) = (Cost::new(r * (o + r + i), 0), Cost::new(r * o * (r + i), o * i));
        (self.config.dropout == 0.0).then_some(AsWeight { map: self, row, weight, product_again: false })
    }
}

impl WeightMap for Psoft {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let left_or = ops::matmul(tensors.get(B)?, &self.turn(tensors)?)?;
        Ok((w_oi + ops::matmul(&left_or, tensors.get(A)?)?)?)
    }
}

/// A folder of PEFT's own is refused.
pub(super) fn from_peft(_: &Map<String, Value>, _: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let message = "is \"PSOFT\", whose folders leave out the singular vectors that their numbers are about, with signs that depend on the \
                   library that found them. Merge it with PEFT, or convert it to LoRA there (`convert_to_lora`)";
    Err(vec![Fault::new("peft_type", message)])
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use serde_json::json;

    use super::*;

    fn normal(name: &str, shape: &[usize], std: f64) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, std, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    /// With its factors in 64 bits, and trained tensors of this spread.
    fn moved(config: Config, w: &Tensor, std: f64) -> (Psoft, Locals) {
        let r = config.rank as usize;
        let triples = attune_tensor::linalg::svd(w).unwrap().truncated(r).unwrap();
        let (a, b) = match config.split {
            Split::Orthonormal => (triples.v.clone(), triples.u.broadcast_mul(&triples.s).unwrap()),
            Split::Balanced => factors::balanced(&triples).unwrap(),
        };
        let upper = if config.orthogonal { normal("u", &[r * (r - 1) / 2], std) } else { normal("u", &[r, r], std) };
        let locals =
            [(R, upper), (A, a), (B, b), (ALPHA, normal("alpha", &[r], 1.0)), (BETA, normal("beta", &[r], 1.0))];
        (Psoft { config }, Locals::new("up", locals))
    }

    fn strict(rank: u32, split: Split) -> Config {
        Config { rank, split, scale_in: false, scale_out: false, ..Config::default() }
    }

    fn change(psoft: &Psoft, locals: &Locals) -> Tensor {
        let at = Attachment { site: SiteId::new("up"), tensors: Vec::new() };
        let base = Tensor::zeros((0, 0), DType::F32, &Device::Cpu).unwrap();
        let Merged::Factors { left, right, .. } = psoft.merge(&at, locals, &base).unwrap() else {
            panic!("no factors")
        };
        left.matmul(&right).unwrap()
    }

    #[test]
    fn rows_keep_their_products_where_the_right_factor_is_orthonormal_and_not_where_it_is_balanced() {
        let w = normal("w", &[7, 6], 1.0);
        let gram = |w: &Tensor| w.matmul(&w.t().unwrap()).unwrap();
        let off = |split| {
            let (psoft, locals) = moved(strict(4, split), &w, 0.5);
            let made = (&w + change(&psoft, &locals)).unwrap();
            assert!(largest(&(&made - &w).unwrap()) > 0.1);
            largest(&(gram(&made) - gram(&w)).unwrap())
        };
        assert!(off(Split::Orthonormal) < 1e-12);
        assert!(off(Split::Balanced) > 0.1);
    }

    #[test]
    fn a_change_is_within_the_leading_directions_on_both_sides() {
        let w = normal("w", &[7, 6], 1.0);
        let triples = attune_tensor::linalg::svd(&w).unwrap().truncated(3).unwrap();
        for orthogonal in [true, false] {
            let (psoft, locals) = moved(Config { rank: 3, orthogonal, ..Config::default() }, &w, 0.5);
            let change = change(&psoft, &locals);
            let left = triples.u.matmul(&triples.u.t().unwrap()).unwrap().matmul(&change).unwrap();
            let right = change.matmul(&triples.v.t().unwrap()).unwrap().matmul(&triples.v).unwrap();
            assert!(largest(&(left - &change).unwrap()) < 1e-12 && largest(&(right - &change).unwrap()) < 1e-12);
        }
    }

    #[test]
    fn rows_go_through_what_is_merged() {
        let w = normal("w", &[7, 6], 1.0);
        let x = normal("x", &[3, 6], 1.0);
        for config in [
            Config { rank: 4, ..Config::default() },
            Config { rank: 4, terms: 5, bound: Some(0.3), scale_in: false, ..Config::default() },
            Config { rank: 4, orthogonal: false, scale_out: false, ..Config::default() },
        ] {
            let (psoft, locals) = moved(config, &w, 0.5);
            let (site, layout) = (SiteId::new("up"), attune_points::Layout::new());
            let cx = RowCx { site: &site, output: 7, dropout: None, layout: &layout, rows: None };
            let rows = RowMap::graph(&psoft, &x, &locals, &cx).unwrap();
            let merged = x.matmul(&change(&psoft, &locals).t().unwrap()).unwrap();
            assert!(largest(&(rows - merged).unwrap()) < 1e-12);
        }
    }

    #[test]
    fn more_terms_are_nearer_to_the_inverse_and_a_bound_keeps_what_is_short() {
        let w = normal("w", &[7, 6], 1.0);
        let made = |terms, bound, std| {
            let (psoft, locals) = moved(Config { terms, bound, ..strict(4, Split::Orthonormal) }, &w, std);
            psoft.turn(&locals).unwrap()
        };
        let exact = made(0, None, 0.1);
        let off = |terms| largest(&(made(terms, None, 0.1) - &exact).unwrap());
        assert!(off(3) > off(5) && off(5) > off(8) && off(8) < 1e-3, "{} {} {}", off(3), off(5), off(8));
        assert_eq!(largest(&(made(5, Some(0.9), 0.1) - made(5, None, 0.1)).unwrap()), 0.0);
        let k = bounded(&normal("k", &[1, 4, 4], 1.0), Some(0.5)).unwrap();
        let length = k.sqr().unwrap().sum_all().unwrap().sqrt().unwrap().to_scalar::<f64>().unwrap();
        assert!((length - 0.5).abs() < 1e-12);
    }

    #[test]
    fn a_folder_of_peft_is_refused_with_what_to_do() {
        let faults = from_peft(json!({"peft_type": "PSOFT"}).as_object().unwrap(), &[]).unwrap_err();
        assert!(faults[0].to_string().contains("Merge it with PEFT"), "{}", faults[0]);
    }
}
