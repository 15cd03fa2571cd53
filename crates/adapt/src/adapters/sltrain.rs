//! A low-rank change and a sparse one at once: factors for what rows have in common, and single entries at random places for what they
//! have not; where much is learned, as in continued pre-training, and a low rank alone stays behind.
//!
//! # Update
//! ```text
//! W'_oi = W_oi + s · B_or A_ri + Σ_k v_k e_p(k) e_q(k)^T          k = 1 … ⌊density i o⌋                    s = alpha / r
//! y_to  = x_ti W'_oi^T                                                   with `replaces`, W'_oi without W_oi
//! ```
//!
//! # Symbols
//! `lora_A` `A_ri` and `lora_B` `B_or`, and `values` `v_k`, f32, trained; A starts uniform in ±1/sqrt(i), B and v at 0, with `replaces` v as A. `indices` the flat places
//! i p(k) + q(k), i64, drawn once without repeats, ascending, never trained.
//!
//! # Cost
//! `r*(i+o) + density*i*o` parameters per linear, and places of as many as the latter beside them. Each pass makes `W'` twice, forward and
//! reverse, at `2 r o i` FLOPs each, and the gradient by it, `2 i o` FLOPs per token; no more than one linear's is there at a time.
//!
//! # Limits
//! With B = 0 and v = 0 it is the base, bit for bit. With v = 0 it is LoRA; with B = 0 a fixed sparse change. With `replaces` nothing is left of the base at its
//! sites: that is for models from nothing.
//!
//! # Departures
//! The paper trains the sum in place of the weight, from nothing: that is `replaces`; else the weight stays, frozen, and entries start at 0.
//!
//! # Paper
//! SLTrain: A Sparse Plus Low-Rank Approach for Parameter and Memory Efficient Pretraining. Han, Li, Huang, Hong, Takeda, Jawanpuria,
//! Mishra, 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::sparse::{INDICES, VALUES};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, linears, own, sparse};

const A: &str = "lora_A";
const B: &str = "lora_B";

/// Parameters of SLTrain.
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
    /// Share of the entries of a weight that train by themselves; one at least.
    #[schemars(range(min = 0.0, max = 1.0))]
    density: f64,
    /// Stands in the place of the weight, and not beside it: for a model that is trained from nothing.
    replaces: bool,
}

impl Default for Config {
    /// The paper's share of entries and LoRA's rank, beside the weight.
    fn default() -> Self {
        Self { rank: 8, alpha: 8.0, density: 0.03, replaces: false }
    }
}

pub(super) struct Sltrain {
    config: Config,
}

impl Method for Sltrain {
    const CARD: Card = Card {
        category: Some(Category::Hybrid),
        paper: Some(Paper {
            title: "SLTrain: A Sparse Plus Low-Rank Approach for Parameter and Memory Efficient Pretraining",
            authors: "Andi Han, Jiaxiang Li, Wei Huang, Mingyi Hong, Akiko Takeda, Pratik Jawanpuria, Bamdev Mishra",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o) + max(1, floor(density*i*o))",
        fixed: "max(1, floor(density*i*o))",
        merges: Merges::Weight,
        ..Card::new(
            "sltrain",
            Point::Adapter,
            "A low-rank change and a sparse one at once: factors for what rows have in common, and single entries at random places for \
             what they have not; where much is learned, as in continued pre-training, and a low rank alone stays behind.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Sltrain {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { rank, density, .. } = self.config;
        linears::attach(sites, |site, o, i| {
            let r = factors::within(rank, site, (o, i))?;
            let count = ((density * i as f64 * o as f64).floor() as usize).max(1);
            Ok(vec![
                TensorSpec::trained(A, [r, i]),
                TensorSpec::trained(B, [o, r]),
                TensorSpec::trained(VALUES, [count]),
                TensorSpec::fixed(INDICES, [count]),
            ])
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let (o, i) = weight.shape();
        let count = at.tensors.iter().find(|spec| spec.local == VALUES).map_or(0, |spec| spec.shape[0]);
        let places = sparse::some(o * i, count, &rng.named(INDICES))?;
        starts::each(at, rng, |spec| match spec.local {
            A => Start::kaiming(spec),
            INDICES => Start::Is(places.clone()),
            VALUES if self.config.replaces => Start::Uniform(1.0 / (i as f64).sqrt()),
            _ => Start::Constant(0.0),
        })
    }

    fn truncates(&self) -> bool {
        self.config.replaces
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(A)?.dtype())?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl WeightMap for Sltrain {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        // The scaling goes on the thin side.
        let a_ri = (tensors.get(A)? * (self.config.alpha / f64::from(self.config.rank)))?;
        let product_oi = ops::matmul(tensors.get(B)?, &a_ri)?;
        let low_oi = if self.config.replaces { product_oi } else { (w_oi + product_oi)? };
        sparse::added(&low_oi, tensors.get(INDICES)?, tensors.get(VALUES)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_tensor::autograd;
    use candle_core::{DType, Device};

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn locals(indices: &[i64], values: &Tensor) -> Locals {
        let places = Tensor::new(indices, &Device::Cpu).unwrap();
        let (a, b) = (normal("a", &[2, 6]), normal("b", &[5, 2]));
        Locals::new("up", [(A, a), (B, b), (INDICES, places), (VALUES, values.clone())])
    }

    fn of(alpha: f64) -> Sltrain {
        Sltrain { config: Config { rank: 2, alpha, density: 0.2, replaces: false } }
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn both_parts_are_added_and_either_alone_is_what_it_is_by_itself() {
        let (w, values) = (normal("w", &[5, 6]), normal("v", &[3]));
        let tensors = locals(&[1, 8, 29], &values);
        let low = (tensors.get(B).unwrap().matmul(tensors.get(A).unwrap()).unwrap() * 1.5).unwrap();
        let mut entries = vec![0.0; 30];
        let values = values.to_vec1::<f64>().unwrap();
        [1, 8, 29].iter().zip(&values).for_each(|(at, value)| entries[*at] = *value);
        let entries = Tensor::from_vec(entries, (5, 6), &Device::Cpu).unwrap();
        let change = (of(3.0).graph(&w, &tensors).unwrap() - &w).unwrap();
        assert!(largest(&(change - (&low + &entries).unwrap()).unwrap()) < 1e-12);
        let sparse_alone = (of(0.0).graph(&w, &tensors).unwrap() - &w).unwrap();
        assert!(largest(&(sparse_alone - entries).unwrap()) < 1e-12);
        let nothing = Tensor::zeros(3, DType::F64, &Device::Cpu).unwrap();
        let low_alone = (of(3.0).graph(&w, &locals(&[1, 8, 29], &nothing)).unwrap() - &w).unwrap();
        assert!(largest(&(low_alone - low).unwrap()) < 1e-12);
    }

    #[test]
    fn the_gradient_of_entries_is_that_of_the_weight_at_their_places() {
        let (w, dw) = (normal("w", &[5, 6]), normal("dw", &[5, 6]));
        let leaf = autograd::leaf(&normal("v", &[3])).unwrap();
        let made = of(3.0).graph(&w, &locals(&[1, 8, 29], leaf.as_tensor())).unwrap();
        let found = autograd::pull(&[&leaf], &[(&made, &dw)]).unwrap().remove(0).unwrap().to_vec1::<f64>().unwrap();
        let dw = dw.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(found, [dw[1], dw[8], dw[29]]);
    }

    #[test]
    fn places_are_distinct_and_the_same_for_one_seed() {
        let at = Attachment {
            site: SiteId::new("up"),
            tensors: vec![
                TensorSpec::trained(A, [2, 6]),
                TensorSpec::trained(B, [5, 2]),
                TensorSpec::trained(VALUES, [9]),
                TensorSpec::fixed(INDICES, [9]),
            ],
        };
        let drawn = |seed: u64| {
            let (locals, _) = of(1.0).init(&at, &normal("w", &[5, 6]), &mut Rng::new(seed, "init")).unwrap();
            locals.get(INDICES).unwrap().to_vec1::<i64>().unwrap()
        };
        assert!(drawn(1).is_sorted_by(|a, b| a < b) && drawn(1).iter().all(|place| (0..30).contains(place)));
        assert!(drawn(1) == drawn(1) && drawn(1) != drawn(2));
    }

    #[test]
    fn in_the_place_of_the_weight_it_is_the_same_sum_without_it_and_starts_sparse() {
        let (w, values) = (normal("w", &[5, 6]), normal("v", &[3]));
        let alone = Sltrain { config: Config { replaces: true, ..of(3.0).config } };
        let tensors = locals(&[1, 8, 29], &values);
        let beside = (of(3.0).graph(&w, &tensors).unwrap() - &w).unwrap();
        assert!(largest(&(alone.graph(&w, &tensors).unwrap() - beside).unwrap()) < 1e-12);
        let specs = [TensorSpec::trained(A, [2, 6]), TensorSpec::trained(B, [5, 2])].into_iter();
        let sparse = [TensorSpec::trained(VALUES, [9]), TensorSpec::fixed(INDICES, [9])];
        let at = Attachment { site: SiteId::new("up"), tensors: specs.chain(sparse).collect() };
        let (started, _) = alone.init(&at, &w, &mut Rng::new(1, "init")).unwrap();
        let made = alone.graph(&w.to_dtype(DType::F32).unwrap(), &started).unwrap().flatten_all().unwrap();
        let made = made.to_vec1::<f32>().unwrap();
        let (zeros, bound) = (made.iter().filter(|entry| **entry == 0.0).count(), 1.0 / 6f32.sqrt());
        assert!(zeros == 21 && made.iter().all(|entry| entry.abs() <= bound), "{made:?}");
    }
}
