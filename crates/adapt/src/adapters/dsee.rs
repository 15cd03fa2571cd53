//! A low-rank change, and a handful of single entries where the weight itself stands out of its own low rank; for small budgets, in which entries that
//! were exceptional before are let be so in another way.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · (z_ti A_ri^T) B_or^T + Σ_k v_k z_t,q(k) e_p(k)                 z = drop(x)           s = alpha / r
//! ```
//! Places are found in the weight, before the first step: with D = 0 and R one random row,
//! ```text
//! rounds times:  twice:  L = orthonormal columns of (W - D) R^T,  R = L^T (W - D),  D = entries of W - L R of `threshold` at least
//!                R <- R, and the first rows of the triangle of W - L R - D, five more
//! (p, q)(k):     where D is largest, then where W - L R is
//! ```
//!
//! # Symbols
//! `lora_A` `A_ri` and `lora_B` `B_or`, and `values` `v_k`, f32, trained; A starts uniform in ±1/sqrt(i), B and v at 0. `indices` the flat places
//! i p(k) + q(k), i64, ascending, never trained.
//!
//! # Cost
//! `r*(i+o) + entries` parameters per linear, and places of as many as the latter beside them; `2 r (i+o) + 2 entries` extra FLOPs per token forward.
//! The search takes some `20 rounds² i o` FLOPs a weight, once.
//!
//! # Limits
//! With B = 0 and v = 0 it is the base, bit for bit. With v = 0 it is LoRA.
//!
//! # Departures
//! Of the paper's two sparsities it is the one of the change: the base is not pruned, nor are heads. The authors search for a hundred rounds; five directions a
//! round, some ten are enough where a weight is of low rank beside what stands out.
//!
//! # Paper
//! DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models. Chen, Chen, Chen, Awadallah, Wang, Cheng, 2023. The
//! search: Greedy Bilateral Sketch, Completion & Smoothing. Zhou, Tao, 2013.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::rng::Rng;
use attune_tensor::{linalg, ops};
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::sparse::{INDICES, VALUES};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, linears, own, sparse};

const A: &str = "lora_A";
const B: &str = "lora_B";

/// How many directions a round of the search adds.
const MORE: usize = 5;

/// Where the single entries are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Search {
    /// Where the weight is farthest from its own low rank.
    #[default]
    Decomposed,
    /// Where the weight is largest.
    Magnitude,
    /// Anywhere.
    Random,
}

/// Parameters of DSEE.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the low-rank part.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numerator of its scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Single entries of each weight.
    #[schemars(range(min = 1, max = 1_000_000))]
    entries: u32,
    /// Where they are.
    search: Search,
    /// Rounds of the search by a decomposition.
    #[schemars(range(min = 1, max = 200))]
    rounds: u32,
    /// The least that an entry stands out by in it.
    #[schemars(range(min = 0.0, max = 1e6))]
    threshold: f64,
}

impl Default for Config {
    /// The paper's entries and threshold, and LoRA's rank; the rounds are ours.
    fn default() -> Self {
        Self { rank: 8, alpha: 8.0, dropout: 0.0, entries: 64, search: Search::Decomposed, rounds: 10, threshold: 0.01 }
    }
}

pub(super) struct Dsee {
    config: Config,
}

impl Method for Dsee {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models",
            authors: "Xuxi Chen, Tianlong Chen, Weizhu Chen, Ahmed Hassan Awadallah, Zhangyang Wang, Yu Cheng",
            year: 2023,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o) + entries",
        merges: Merges::Weight,
        ..Card::new(
            "dsee",
            Point::Adapter,
            "A low-rank change, and a handful of single entries where the weight itself stands out of its own low rank; for small budgets, \
             in which entries that were exceptional before are let be so in another way.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Dsee {
    fn scale(&self) -> f64 {
        self.config.alpha / f64::from(self.config.rank)
    }
}

impl Config {
    /// The flat places of `count` entries of a weight, ascending.
    fn places(&self, weight: &dyn Weight, count: usize, rng: &Rng) -> attune_points::Result<Tensor> {
        let (o, i) = weight.shape();
        let scores = match self.search {
            Search::Random => return sparse::some(o * i, count, &rng.named(INDICES)),
            Search::Magnitude => weight.dense(DType::F32)?.abs()?,
            Search::Decomposed => self.standing_out(&weight.dense(DType::F64)?, &mut rng.named("directions"))?,
        };
        let scores = scores.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let mut places: Vec<i64> = sparse::largest(&scores, count).into_iter().map(|place| place as i64).collect();
        places.sort_unstable();
        Ok(Tensor::new(places, &Device::Cpu)?)
    }

    /// By how much each entry stands out of the low rank of a weight; those below the threshold come below 0, in the order of theirs.
    fn standing_out(&self, w_oi: &Tensor, rng: &mut Rng) -> attune_points::Result<Tensor> {
        let (o, i) = w_oi.dims2()?;
        let mut r_ki = rng.normal_tensor((1, i), 1.0, DType::F64)?;
        let mut d_oi = w_oi.zeros_like()?;
        let mut rest_oi = w_oi.clone();
        for round in 1..=self.rounds {
            let mut low_oi = w_oi.zeros_like()?;
            for _ in 0..2 {
                let smooth_oi = (w_oi - &d_oi)?;
                let (l_ok, _) = linalg::qr(&ops::matmul(&smooth_oi, &r_ki.t()?.contiguous()?)?)?;
                r_ki = ops::matmul(&l_ok.t()?.contiguous()?, &smooth_oi)?;
                low_oi = ops::matmul(&l_ok, &r_ki)?;
                rest_oi = (w_oi - &low_oi)?;
                let stands = rest_oi.abs()?.ge(self.threshold)?;
                d_oi = stands.where_cond(&rest_oi, &rest_oi.zeros_like()?)?;
            }
            let more = MORE.min(o.min(i) - r_ki.dim(0)?);
            if round == self.rounds || more == 0 {
                break;
            }
            // The first rows of a triangle are what the first columns span of all others.
            let left_oi = ((w_oi - low_oi)? - &d_oi)?;
            if left_oi.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()? == 0.0 {
                break;
            }
            let (first_om, _) = linalg::qr(&left_oi.narrow(1, 0, more)?.contiguous()?)?;
            r_ki = Tensor::cat(&[&r_ki, &ops::matmul(&first_om.t()?.contiguous()?, &left_oi)?], 0)?;
        }
        // Those of the sparse part come before all others, whose order is that of what they are off by.
        let beside = (rest_oi.abs()? - rest_oi.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?)?;
        let stands = d_oi.ne(0.0)?;
        Ok(stands.where_cond(&d_oi.abs()?, &(beside - 1.0)?)?)
    }
}

impl Adapter for Dsee {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let count = self.config.entries as usize;
        linears::attach(sites, |site, o, i| {
            let r = factors::within(self.config.rank, site, (o, i))?;
            if count > o * i {
                let message = format!("is {count}; {} is {o} by {i}, so {} is the most", site.id, o * i);
                return Err(Fault::new("entries", message));
            }
            Ok(vec![
                TensorSpec::trained(A, [r, i]),
                TensorSpec::trained(B, [o, r]),
                TensorSpec::trained(VALUES, [count]),
                TensorSpec::fixed(INDICES, [count]),
            ])
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let places = self.config.places(weight, self.config.entries as usize, rng)?;
        starts::each(at, rng, |spec| match spec.local {
            A => Start::kaiming(spec),
            INDICES => Start::Is(places.clone()),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let b_or = tensors.get(B)?;
        let a_ri = (tensors.get(A)? * self.scale())?;
        let low_oi = (weight.dense(b_or.dtype())? + ops::matmul(b_or, &a_ri)?)?;
        let weight = sparse::added(&low_oi, tensors.get(INDICES)?, tensors.get(VALUES)?)?;
        Ok(Merged::Weight { weight, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl RowMap for Dsee {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let z_ti = dropped(x_ti, self.config.dropout, cx)?;
        let h_tr = ops::linear(&z_ti, tensors.get(A)?, None)?;
        let y_to = ops::linear(&(h_tr * self.scale())?, tensors.get(B)?, None)?;
        let places = tensors.get(INDICES)?.to_vec1::<i64>()?;
        let width = x_ti.dim(1)? as i64;
        let of = |place: fn(i64, i64) -> i64| -> Vec<i64> { places.iter().map(|&at| place(at, width)).collect() };
        let (rows, columns) = (of(|at, width| at / width), of(|at, width| at % width));
        let (rows, columns) = (Tensor::new(rows, x_ti.device())?, Tensor::new(columns, x_ti.device())?);
        let by_entry_tk = z_ti.index_select(&columns, 1)?.broadcast_mul(tensors.get(VALUES)?)?;
        Ok(y_to.index_add(&rows, &by_entry_tk, 1)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn found(search: Search, w: &Tensor, count: usize) -> Vec<i64> {
        let config = Config { search, ..Config::default() };
        config.places(w, count, &Rng::new(3, "init")).unwrap().to_vec1::<i64>().unwrap()
    }

    #[test]
    fn what_stands_out_of_a_low_rank_is_found_and_not_by_chance() {
        let low = normal("left", &[96, 5]).matmul(&normal("right", &[5, 80])).unwrap();
        let spikes = sparse::some(96 * 80, 64, &Rng::new(5, "spikes")).unwrap();
        let sizes = (normal("signs", &[64]).sign().unwrap() * 22.0).unwrap();
        let w = sparse::added(&low, &spikes, &sizes).unwrap();
        let spikes = spikes.to_vec1::<i64>().unwrap();
        let of = |search| found(search, &w, 64).iter().filter(|place| spikes.contains(place)).count();
        let (decomposed, random) = (of(Search::Decomposed), of(Search::Random));
        assert!(decomposed >= 61, "{decomposed} of 64");
        assert!(random <= 5, "{random} of 64 by chance");
    }

    /// Spikes smaller than most entries of the low rank: the weight's size does not show them.
    #[test]
    fn what_is_small_by_itself_may_stand_out() {
        let low = (normal("left", &[48, 1]).matmul(&normal("right", &[1, 40])).unwrap() * 3.0).unwrap();
        let spikes = sparse::some(48 * 40, 12, &Rng::new(5, "spikes")).unwrap();
        let sizes = (normal("signs", &[12]).sign().unwrap() * 2.0).unwrap();
        let w = sparse::added(&low, &spikes, &sizes).unwrap();
        let spikes = spikes.to_vec1::<i64>().unwrap();
        let of = |search| found(search, &w, 12).iter().filter(|place| spikes.contains(place)).count();
        let (decomposed, magnitude) = (of(Search::Decomposed), of(Search::Magnitude));
        assert!(decomposed >= 8 && magnitude <= 1, "{decomposed} and {magnitude} of 12");
    }

    #[test]
    fn there_are_as_many_places_as_asked_for_once_each() {
        let w = (normal("w", &[6, 7]) * 1e-4).unwrap();
        for search in [Search::Decomposed, Search::Magnitude, Search::Random] {
            for count in [1, 20, 42] {
                let places = found(search, &w, count);
                assert!(places.len() == count && places.is_sorted_by(|a, b| a < b), "{search:?}");
            }
        }
        let zero = Tensor::zeros((6, 7), DType::F64, &Device::Cpu).unwrap();
        assert_eq!(found(Search::Decomposed, &zero, 3), [0, 1, 2]);
    }

    #[test]
    fn rows_go_through_factors_and_entries() {
        let dsee = Dsee { config: Config { rank: 2, alpha: 3.0, ..Config::default() } };
        let places = Tensor::new(&[1i64, 8, 9, 29], &Device::Cpu).unwrap();
        let locals =
            [(A, normal("a", &[2, 6])), (B, normal("b", &[5, 2])), (VALUES, normal("v", &[4])), (INDICES, places)];
        let locals = Locals::new("up", locals);
        let at = Attachment { site: SiteId::new("up"), tensors: Vec::new() };
        let w = normal("w", &[5, 6]);
        let Merged::Weight { weight, .. } = dsee.merge(&at, &locals, &w).unwrap() else { panic!("no weight") };
        let (x, layout) = (normal("x", &[3, 6]), attune_points::Layout::new());
        let cx = RowCx { site: &at.site, output: 5, dropout: None, layout: &layout, rows: None };
        let rows = dsee.graph(&x, &locals, &cx).unwrap();
        let by_hand = x.matmul(&(&weight - &w).unwrap().t().unwrap()).unwrap();
        assert!(largest(&(rows - by_hand).unwrap()) < 1e-12);
        let low = (locals.get(B).unwrap().matmul(locals.get(A).unwrap()).unwrap() * 1.5).unwrap();
        let single = ((weight - w).unwrap() - low).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let places: Vec<usize> = (0..30).filter(|&at| single[at].abs() > 1e-12).collect();
        assert_eq!(places, [1, 8, 9, 29]);
    }
}
