//! Nested low-rank adaptation: a small trained pair of factors within a frozen pair, the leading part of the weight: as many numbers at a wide
//! linear as at a narrow one; where what a task needs is among what the base does most.
//!
//! # Update
//! ```text
//! W_oi ≈ B_or A_ri                    A = diag(√S_r) V_ri, B = U_or diag(√S_r)          or plain,  A = V_ri, B = U_or
//! y_to = x_ti W_oi^T + s · (((drop(x_ti) A_ri^T) P_qr^T) Q_rq^T) B_or^T                            s = alpha / q
//! with `reconstruct`   … - s · ((x_ti A_ri^T) E_rr) B_or^T            E = 1 in its first q places, 0 elsewhere
//! with `inputs`        U diag(S) V' = W C, V = V' C⁻¹                  C = the covariance of what is read, damped
//! ```
//!
//! # Symbols
//! `nora_inner_A` `P_qr` and `nora_inner_B` `Q_rq`, of the inner rank q, f32, trained; P starts uniform in ±1/sqrt(r), Q at 0; with `reconstruct` both as the
//! first q rows, and columns, of a unit matrix, so that their product is E. `nora_outer_A` `A_ri`
//! and `nora_outer_B` `B_or`, of the r largest singular values S, never trained. `drop` is dropout on the input.
//!
//! # Cost
//! `2 rank inner_rank` parameters per linear, whatever its widths, and `r (i+o)` numbers that never train beside them; `2 r (i+o+2 q)` extra
//! FLOPs per token forward. A decomposition of each weight before the first step.
//! Where that costs less, and nothing is dropped, a pass makes another weight in place of it, forward and in reverse, at
//! `2 q (r (i+o) + o i)` FLOPs each, and the gradient by it.
//!
//! # Limits
//! With Q = 0 it is the base, bit for bit, and with `reconstruct` where it starts. The change has rank q at most, within the span of the r leading directions on both sides. With q = r
//! it is any change within them.
//!
//! # Departures
//! The authors' code is not public: the outer pair and which factors train are the paper's, start and scaling of the inner pair are LoRA's. Directions weighed
//! by what is read are those of CorDA.
//!
//! # Paper
//! NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models. Lin, Li, Li, Zou, Xue, Guo, 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap, WeightMap};
use attune_points::forms::{AsWeight, Cost};
use attune_points::stats::{Counted, What};
use attune_points::{Error, Locals, Stats, StatsRequest, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::linalg::{self, Svd};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::starts::{self, Start};
use crate::parts::{calibration, factors, linears, own, spectral};

const P: &str = "nora_inner_A";
const Q: &str = "nora_inner_B";
const A: &str = "nora_outer_A";
const B: &str = "nora_outer_B";

/// How strong the directions of the outer pair are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Outer {
    /// As in the weight: the roots of singular values are in both factors.
    #[default]
    Weighed,
    /// All alike: orthonormal vectors, where inputs do not weigh them.
    Plain,
}

/// Parameters of NoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the outer pair, which never trains.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Rank of the inner pair, which trains: that of the change.
    #[schemars(range(min = 1, max = 4096))]
    inner_rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// How strong the directions of the outer pair are.
    outer: Outer,
    /// Rounds of a randomised decomposition, which is much faster than the exact one; exact if left out.
    #[schemars(range(min = 1, max = 64))]
    iterations: Option<u32>,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Starts the inner pair as what gives back the first directions of the outer one, which are taken out beside it.
    reconstruct: bool,
    /// Orders directions by what they matter for what is read, measured before the first step, and not by the weight alone.
    inputs: bool,
    /// How many examples of the training data say what is read.
    #[schemars(range(min = 1, max = 1_000_000))]
    examples: u64,
}

impl Default for Config {
    /// The paper's ranges.
    fn default() -> Self {
        Self {
            rank: 64,
            inner_rank: 8,
            alpha: 16.0,
            outer: Outer::Weighed,
            iterations: None,
            dropout: 0.0,
            reconstruct: false,
            inputs: false,
            examples: 256,
        }
    }
}

pub(super) struct Nora {
    config: Config,
}

impl Method for Nora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models",
            authors: "Cheng Lin, Lujun Li, Dezhi Li, Jie Zou, Wei Xue, Yike Guo",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "2*rank*inner_rank",
        input_statistics: "4*i*(i+3)*inputs",
        fixed: "rank*(i+o)",
        start_numbers: "46*o*i",
        merges: Merges::Factors,
        rules: &[Rule {
            when: "true",
            require: "inner_rank <= rank",
            message: "is more than there are directions; expected `rank` at most",
            path: "inner_rank",
        }],
        ..Card::new(
            "nora",
            Point::Adapter,
            "Nested low-rank adaptation: a small trained pair of factors within a frozen pair, the leading part of the weight: as many \
             numbers at a wide linear as at a narrow one; where what a task needs is among what the base does most.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Nora {
    fn scale(&self) -> f64 {
        self.config.alpha / f64::from(self.config.inner_rank)
    }

    /// What it wants to know of what is read.
    fn request(&self) -> StatsRequest {
        let what = What::InputCovariance { rows: Counted::Tokens, scaled: true };
        StatsRequest { what, examples: self.config.examples, domains: None }
    }

    fn start(&self, at: &Attachment, triples: &Svd, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let (a_ri, b_or) = match self.config.outer {
            Outer::Weighed => factors::balanced(triples)?,
            Outer::Plain => (triples.v.clone(), triples.u.clone()),
        };
        let (r, q) = (self.config.rank as usize, self.config.inner_rank as usize);
        let first_qr = Tensor::eye(r, DType::F32, &Device::Cpu)?.narrow(0, 0, q)?.contiguous()?;
        let again = self.config.reconstruct;
        starts::each(at, rng, |spec| match spec.local {
            A => Start::Is(a_ri.clone()),
            B => Start::Is(b_or.clone()),
            P if again => Start::Is(first_qr.clone()),
            Q if again => Start::Is(first_qr.t().unwrap_or_else(|_| first_qr.clone())),
            P => Start::kaiming(spec),
            _ => Start::Constant(0.0),
        })
    }

    /// What the outer pair's rows become between its factors: `Q P`, less what that starts as.
    fn inner(&self, tensors: &Locals) -> attune_points::Result<Tensor> {
        let inner_rr = ops::matmul(tensors.get(Q)?, tensors.get(P)?)?;
        if !self.config.reconstruct {
            return Ok(inner_rr);
        }
        let (r, q) = (inner_rr.dim(0)?, self.config.inner_rank as usize);
        let start_rr = Tensor::eye(q, inner_rr.dtype(), inner_rr.device())?;
        Ok((inner_rr - start_rr.pad_with_zeros(0, 0, r - q)?.pad_with_zeros(1, 0, r - q)?)?)
    }
}

impl Adapter for Nora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let q = self.config.inner_rank as usize;
        linears::attach(sites, |site, o, i| {
            let r = factors::within(self.config.rank, site, (o, i))?;
            Ok(vec![
                TensorSpec::trained(P, [q, r]),
                TensorSpec::trained(Q, [r, q]),
                TensorSpec::fixed(A, [r, i]),
                TensorSpec::fixed(B, [o, r]),
            ])
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        if self.config.inputs {
            let message = "directions that are ordered by what is read need it measured";
            return Err(Error::Refused(message.to_owned()));
        }
        let triples = spectral::leading(weight, self.config.rank as usize, self.config.iterations, rng)?;
        self.start(at, &triples, rng)
    }

    fn calibrate(&self) -> Vec<StatsRequest> {
        if self.config.inputs { vec![self.request()] } else { Vec::new() }
    }

    fn init_by(
        &self,
        at: &Attachment,
        weight: &dyn Weight,
        stats: &Stats,
        rng: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        if !self.config.inputs {
            return self.init(at, weight, rng);
        }
        let c_ii = calibration::damped(stats.covariance(&self.request(), &at.site)?, calibration::DAMP)?;
        let ordered_oi = weight.dense(DType::F64)?.matmul(&c_ii)?;
        let found = spectral::leading(&ordered_oi, self.config.rank as usize, self.config.iterations, rng)?;
        self.start(at, &Svd { v: found.v.matmul(&linalg::inverse(&c_ii)?)?, ..found }, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        if self.config.reconstruct {
            let left = ops::matmul(tensors.get(B)?, &self.inner(tensors)?)?;
            return Ok(Merged::Factors { left, right: tensors.get(A)?.clone(), scale: self.scale() });
        }
        let left = ops::matmul(tensors.get(B)?, tensors.get(Q)?)?;
        let right = ops::matmul(tensors.get(P)?, tensors.get(A)?)?;
        Ok(Merged::Factors { left, right, scale: self.scale() })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl RowMap for Nora {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tr = ops::linear(&dropped(x_ti, self.config.dropout, cx)?, tensors.get(A)?, None)?;
        let h_tq = (ops::linear(&h_tr, tensors.get(P)?, None)? * self.scale())?;
        let mut mixed_tr = ops::linear(&h_tq, tensors.get(Q)?, None)?;
        if self.config.reconstruct {
            // What is taken out belongs to the base: nothing is dropped of it.
            let (r, q) = (h_tr.dim(1)?, self.config.inner_rank as usize);
            let first_tq = ops::linear(x_ti, &tensors.get(A)?.narrow(0, 0, q)?.contiguous()?, None)?;
            mixed_tr = (mixed_tr - (first_tq * self.scale())?.pad_with_zeros(1, 0, r - q)?)?;
        }
        Ok(ops::linear(&mixed_tr, tensors.get(B)?, None)?)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        let (r, q) = (self.config.rank as usize, self.config.inner_rank as usize);
        let row = Cost::new(2 * q * r + r * (o + i), q);
        let weight = Cost::new(q * r * (o + i) + q * o * i, o * i);
        (self.config.dropout == 0.0).then_some(AsWeight { map: self, row, weight, product_again: false })
    }
}

impl WeightMap for Nora {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        if self.config.reconstruct {
            let left_or = (ops::matmul(tensors.get(B)?, &self.inner(tensors)?)? * self.scale())?;
            return Ok((w_oi + ops::matmul(&left_or, tensors.get(A)?)?)?);
        }
        let left_oq = (ops::matmul(tensors.get(B)?, tensors.get(Q)?)? * self.scale())?;
        let right_qi = ops::matmul(tensors.get(P)?, tensors.get(A)?)?;
        Ok((w_oi + ops::matmul(&left_oq, &right_qi)?)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::stats::{Covariance, Stat};

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    /// The component at a weight, in 64 bits, with this inner pair.
    fn with(config: Config, w: &Tensor, p: Tensor, q: Tensor) -> (Nora, Attachment, Locals) {
        let (r, inner, (o, i)) = (config.rank as usize, config.inner_rank as usize, w.dims2().unwrap());
        let tensors = vec![
            TensorSpec::trained(P, [inner, r]),
            TensorSpec::trained(Q, [r, inner]),
            TensorSpec::fixed(A, [r, i]),
            TensorSpec::fixed(B, [o, r]),
        ];
        let at = Attachment { site: SiteId::new("up"), tensors };
        let nora = Nora { config };
        let (locals, _) = nora.init(&at, w, &mut Rng::new(1, "init")).unwrap();
        let wide = |name: &str| locals.get(name).unwrap().to_dtype(DType::F64).unwrap();
        let locals = Locals::new("up", [(A, wide(A)), (B, wide(B)), (P, p), (Q, q)]);
        (nora, at, locals)
    }

    fn change(nora: &Nora, at: &Attachment, locals: &Locals) -> Tensor {
        let Merged::Factors { left, right, scale } = nora.merge(at, locals, &normal("w", &[1, 1])).unwrap() else {
            panic!("no factors")
        };
        (left.matmul(&right).unwrap() * scale).unwrap()
    }

    #[test]
    fn rows_go_through_what_is_merged_and_stay_in_the_leading_directions() {
        let w = normal("w", &[8, 6]);
        let leading = linalg::svd(&w).unwrap().truncated(4).unwrap();
        for outer in [Outer::Weighed, Outer::Plain] {
            let config = Config { rank: 4, inner_rank: 2, alpha: 3.0, outer, ..Config::default() };
            let (nora, at, locals) = with(config, &w, normal("p", &[2, 4]), normal("q", &[4, 2]));
            let change = change(&nora, &at, &locals);
            let x = normal("x", &[3, 6]);
            let layout = attune_points::Layout::new();
            let cx = RowCx { site: &at.site, output: 8, dropout: None, layout: &layout, rows: None };
            let rows = RowMap::graph(&nora, &x, &locals, &cx).unwrap();
            assert!(largest(&(rows - x.matmul(&change.t().unwrap()).unwrap()).unwrap()) < 1e-12);
            let left = leading.u.matmul(&leading.u.t().unwrap()).unwrap().matmul(&change).unwrap();
            let right = change.matmul(&leading.v.t().unwrap()).unwrap().matmul(&leading.v).unwrap();
            // The outer pair is kept in 32 bits.
            assert!(largest(&(left - &change).unwrap()) < 1e-5 && largest(&(right - &change).unwrap()) < 1e-5);
        }
    }

    /// A target within the directions and of the inner rank is a product of the pair; one beside them is not.
    #[test]
    fn a_planted_change_within_the_directions_is_reached_and_one_beside_them_is_not() {
        let w = normal("w", &[8, 6]);
        let all = linalg::svd(&w).unwrap();
        let leading = all.truncated(4).unwrap();
        let planted = |u: &Tensor, v: &Tensor| {
            u.matmul(&normal("m", &[4, 2])).unwrap().matmul(&normal("n", &[2, 4])).unwrap().matmul(v).unwrap()
        };
        let nearest = |target: &Tensor| {
            // By the directions, and then the two largest of what is between them.
            let between = leading.u.t().unwrap().matmul(target).unwrap().matmul(&leading.v.t().unwrap()).unwrap();
            let two = linalg::svd(&between).unwrap().truncated(2).unwrap();
            let (p, q) = factors::balanced(&two).unwrap();
            let config = Config { rank: 4, inner_rank: 2, alpha: 2.0, outer: Outer::Plain, ..Config::default() };
            let (nora, at, locals) = with(config, &w, p, q);
            largest(&(change(&nora, &at, &locals) - target).unwrap())
        };
        assert!(nearest(&planted(&leading.u, &leading.v)) < 1e-5);
        let (u, v) = (normal("u", &[8, 4]), normal("v", &[4, 6]));
        assert!(nearest(&planted(&u, &v)) > 0.1);
    }

    /// The inner pair starts as something, and the whole as nothing; rows and the weight agree wherever it goes.
    #[test]
    fn what_the_inner_pair_gives_back_is_taken_out_beside_it() {
        let w = normal("w", &[8, 6]);
        let config = Config { rank: 4, inner_rank: 2, alpha: 3.0, reconstruct: true, ..Config::default() };
        let first = Tensor::eye(4, DType::F64, &Device::Cpu).unwrap().narrow(0, 0, 2).unwrap().contiguous().unwrap();
        let (nora, at, locals) = with(config.clone(), &w, first.clone(), first.t().unwrap().contiguous().unwrap());
        let (started, _) = nora.init(&at, &w, &mut Rng::new(1, "init")).unwrap();
        for (local, expected) in [(P, first.clone()), (Q, first.t().unwrap().contiguous().unwrap())] {
            let own = started.get(local).unwrap().to_dtype(DType::F64).unwrap();
            assert_eq!(own.to_vec2::<f64>().unwrap(), expected.to_vec2::<f64>().unwrap());
        }
        assert_eq!(largest(&change(&nora, &at, &locals)), 0.0);
        let (nora, at, locals) = with(config, &w, normal("p", &[2, 4]), normal("q", &[4, 2]));
        let moved = change(&nora, &at, &locals);
        let made = (WeightMap::graph(&nora, &w, &locals).unwrap() - &w).unwrap();
        let (x, layout) = (normal("x", &[3, 6]), attune_points::Layout::new());
        let cx = RowCx { site: &at.site, output: 8, dropout: None, layout: &layout, rows: None };
        let rows = RowMap::graph(&nora, &x, &locals, &cx).unwrap();
        assert!(largest(&(made - &moved).unwrap()) < 1e-12);
        assert!(largest(&(rows - x.matmul(&moved.t().unwrap()).unwrap()).unwrap()) < 1e-12);
    }

    /// Of a weight whose largest direction nothing comes through, the outer pair has those that are read.
    #[test]
    fn directions_are_those_that_matter_for_what_is_read() {
        let scale = Tensor::new(&[10.0, 1.0, 1.0, 1.0, 1.0, 1.0], &Device::Cpu).unwrap();
        let w = normal("w", &[8, 6]).broadcast_mul(&scale).unwrap();
        let config = Config { rank: 2, inner_rank: 1, inputs: true, outer: Outer::Plain, ..Config::default() };
        let (nora, tensors) = (Nora { config }, [TensorSpec::trained(P, [1, 2]), TensorSpec::trained(Q, [2, 1])]);
        let fixed = [TensorSpec::fixed(A, [2, 6]), TensorSpec::fixed(B, [8, 2])];
        let at = Attachment { site: SiteId::new("up"), tensors: tensors.into_iter().chain(fixed).collect() };
        assert!(nora.init(&at, &w, &mut Rng::new(1, "init")).is_err());
        // The first input is always 0.
        let seen = Tensor::new(&[0f32, 1.0, 1.0, 1.0, 1.0, 1.0], &Device::Cpu).unwrap();
        let sum_ii = Tensor::eye(6, DType::F32, &Device::Cpu).unwrap().broadcast_mul(&seen).unwrap();
        let sum_i = Tensor::zeros(6, DType::F64, &Device::Cpu).unwrap();
        let mut stats = Stats::none();
        let found = Covariance { sum_ii, sum_i, rows: 9, documents: 1 };
        stats.insert(nora.calibrate().remove(0), at.site.clone(), Stat::Covariance(found));
        let (locals, _) = nora.init_by(&at, &w, &stats, &mut Rng::new(1, "init")).unwrap();
        let u = locals.get(B).unwrap().to_dtype(DType::F64).unwrap();
        let read = linalg::svd(&w.narrow(1, 1, 5).unwrap().contiguous().unwrap()).unwrap().truncated(2).unwrap().u;
        // As near as the damping of what is never read lets them be.
        let within = read.t().unwrap().matmul(&u).unwrap();
        let found = linalg::svd(&within).unwrap().s.to_vec1::<f64>().unwrap();
        assert!(found[1] > 0.98, "{found:?}");
        let plain = linalg::svd(&w).unwrap().truncated(2).unwrap().u;
        let other = linalg::svd(&read.t().unwrap().matmul(&plain).unwrap()).unwrap().s.to_vec1::<f64>().unwrap();
        assert!(other[1] < 0.9, "{other:?}");
    }
}
