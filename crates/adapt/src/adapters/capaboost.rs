//! Boosted capacity: several low-rank changes that are the same two factors under different masks, drawn once and kept; a multiple of
//! LoRA's rank for LoRA's numbers, at a multiple of its time.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · Σ_n (drop(x_ti) (A ∘ M_n)_ri^T) (B ∘ N_n)_or^T             n = 1 … branches           s = alpha / r
//! ```
//!
//! # Symbols
//! `lora_A` `A_ri` and `lora_B` `B_or`, f32, trained; A starts uniform in ±1/sqrt(i), B at 0. `mask_A` the `M_n` under each other, `[branches r,
//! i]`, and `mask_B` the `N_n` beside each other, `[o, branches r]`, of 0 and 1, never trained. `drop` is dropout on the input.
//!
//! # Cost
//! `r (i + o)` parameters per linear, as LoRA's, and masks of `branches` times as many values beside them; `2 branches r (i + o)`
//! extra FLOPs per token forward: no kernel here skips what is masked.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. With one branch that keeps all it is LoRA. Entries that no mask keeps never train.
//!
//! # Departures
//! Masks are kept with the adapter, not drawn anew from their seed: whoever reads it needs no generator. `two_of_four` keeps the two
//! of each four neighbours along a row by chance.
//!
//! # Paper
//! Increasing Model Capacity for Free: A Simple Strategy for Parameter Efficient Fine-tuning. Song, Zhao, Majumder, Lin, 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::starts::{self, Start};
use crate::parts::{factors, own};

const A: &str = "lora_A";
const B: &str = "lora_B";
const MASK_A: &str = "mask_A";
const MASK_B: &str = "mask_B";

/// Parameters of CapaBoost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the factors; their sum has up to `branches` times as much.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Number of masked changes.
    #[schemars(range(min = 1, max = 64))]
    branches: u32,
    /// Share of a factor's entries that a mask keeps.
    #[schemars(range(min = 0.01, max = 1.0))]
    keep: f64,
    /// How masks are drawn.
    pattern: Pattern,
}

/// How masks are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Pattern {
    /// Entries of the whole factor, all alike.
    Uniform,
    /// Two of each four neighbours along a row, which sparse kernels like; `keep` is 0.5.
    TwoOfFour,
}

impl Default for Config {
    /// The paper's values.
    fn default() -> Self {
        Self { rank: 8, alpha: 8.0, dropout: 0.0, branches: 2, keep: 0.5, pattern: Pattern::Uniform }
    }
}

pub(super) struct Capaboost {
    config: Config,
}

impl Method for Capaboost {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Increasing Model Capacity for Free: A Simple Strategy for Parameter Efficient Fine-tuning",
            authors: "Haobo Song, Hao Zhao, Soumajit Majumder, Tao Lin",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o)",
        fixed: "branches*rank*(i+o)",
        graph_numbers: "2*rows*(i+o) + 2*o*i",
        merges: Merges::Factors,
        rules: &[Rule {
            when: r#"pattern == "two_of_four""#,
            require: "keep == 0.5",
            message: "is not what `pattern` keeps; expected 0.5 with two_of_four",
            path: "keep",
        }],
        ..Card::new(
            "capaboost",
            Point::Adapter,
            "Boosted capacity: several low-rank changes that are the same two factors under different masks, drawn once and kept; \
             a multiple of LoRA's rank for LoRA's numbers, at a multiple of its time.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Capaboost {
    fn scale(&self) -> f64 {
        self.config.alpha / f64::from(self.config.rank)
    }

    /// The factors of all branches: `[branches r, i]` and `[o, branches r]`.
    fn masked(&self, tensors: &Locals) -> attune_points::Result<(Tensor, Tensor)> {
        let branches = self.config.branches as usize;
        let a = tensors.get(A)?.repeat((branches, 1))?.mul(tensors.get(MASK_A)?)?;
        let b = tensors.get(B)?.repeat((1, branches))?.mul(tensors.get(MASK_B)?)?;
        Ok((a, b))
    }
}

impl Adapter for Capaboost {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { rank, branches, pattern, .. } = self.config;
        let mut attachments = factors::attach(sites, A, B, |_| rank)?;
        let (mut faults, all) = (Vec::new(), (branches * rank) as usize);
        for at in &mut attachments {
            let Ok((a, b)) = factors::pair(at) else { continue };
            let (input, output) = (a.shape[1], b.shape[0]);
            if pattern == Pattern::TwoOfFour && !(input.is_multiple_of(4) && rank.is_multiple_of(4)) {
                let message = format!(
                    "is two_of_four, but {rank}, the rank, or {input}, the input width of {}, has no fours",
                    at.site
                );
                faults.push(Fault::new("pattern", message));
            }
            at.tensors.push(TensorSpec::fixed(MASK_A, [all, input]));
            at.tensors.push(TensorSpec::fixed(MASK_B, [output, all]));
        }
        if faults.is_empty() { Ok(attachments) } else { Err(faults) }
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let Config { rank, branches, keep, pattern, .. } = self.config;
        let rank = rank as usize;
        let masks = |spec: &TensorSpec, rows: usize, cols: usize, dim: usize| -> attune_points::Result<Tensor> {
            let stream = rng.named(spec.local);
            let mask = |branch: u32| {
                let values = match pattern {
                    Pattern::Uniform => uniform(rows * cols, keep, &mut stream.sub(u64::from(branch))),
                    Pattern::TwoOfFour => two_of_four(rows * cols, &mut stream.sub(u64::from(branch))),
                };
                Tensor::from_vec(values, (rows, cols), &Device::Cpu)
            };
            Ok(Tensor::cat(&(0..branches).map(mask).collect::<candle_core::Result<Vec<_>>>()?, dim)?)
        };
        let made = |spec: &TensorSpec| match (spec.local, spec.shape.as_slice()) {
            (MASK_A, &[_, input]) => masks(spec, rank, input, 0).map(Some),
            (MASK_B, &[output, _]) => masks(spec, output, rank, 1).map(Some),
            _ => Ok(None),
        };
        let made = at.tensors.iter().map(|spec| Ok((spec.local, made(spec)?)));
        let made = made.collect::<attune_points::Result<Vec<_>>>()?;
        let mask_of = |local: &str| made.iter().find(|(name, _)| *name == local).and_then(|(_, mask)| mask.clone());
        starts::each(at, rng, |spec| match (mask_of(spec.local), spec.local) {
            (Some(mask), _) => Start::Is(mask),
            (None, A) => Start::kaiming(spec),
            (None, _) => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let (right, left) = self.masked(tensors)?;
        Ok(Merged::Factors { left, right, scale: self.scale() })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

/// 1 at exactly `⌊keep n⌋` of n places.
fn uniform(n: usize, keep: f64, rng: &mut Rng) -> Vec<f32> {
    let mut values = vec![0.0; n];
    rng.permutation(n).into_iter().take((keep * n as f64) as usize).for_each(|at| values[at] = 1.0);
    values
}

/// 1 at two of each four places.
fn two_of_four(n: usize, rng: &mut Rng) -> Vec<f32> {
    let mut values = vec![0.0; n];
    for four in values.chunks_mut(4) {
        rng.permutation(four.len()).into_iter().take(2).for_each(|at| four[at] = 1.0);
    }
    values
}

impl RowMap for Capaboost {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let (a, b) = self.masked(tensors)?;
        let h = (ops::linear(&dropped(x_ti, self.config.dropout, cx)?, &a, None)? * self.scale())?;
        Ok(ops::linear(&h, &b, None)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    fn started(config: &Config, seed: u64) -> Locals {
        let rank = config.rank as usize;
        let all = (config.branches as usize) * rank;
        let tensors = vec![
            TensorSpec::trained(A, [rank, 12]),
            TensorSpec::trained(B, [8, rank]),
            TensorSpec::fixed(MASK_A, [all, 12]),
            TensorSpec::fixed(MASK_B, [8, all]),
        ];
        let at = Attachment { site: attune_architecture::SiteId::new("q_proj"), tensors };
        let base = Tensor::zeros((0, 0), DType::F32, &Device::Cpu).unwrap();
        let capaboost = Capaboost { config: config.clone() };
        capaboost.init(&at, &base, &mut Rng::new(seed, "init")).unwrap().0
    }

    fn branch(locals: &Locals, branch: usize, rank: usize) -> (Vec<f32>, Vec<f32>) {
        let values = |mask: Tensor| mask.contiguous().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let a = locals.get(MASK_A).unwrap().narrow(0, branch * rank, rank).unwrap();
        let b = locals.get(MASK_B).unwrap().narrow(1, branch * rank, rank).unwrap();
        (values(a), values(b))
    }

    #[test]
    fn masks_keep_exact_counts_and_differ_between_branches() {
        let config = Config { rank: 3, branches: 3, keep: 0.3, ..Config::default() };
        let locals = started(&config, 1);
        let masks: Vec<_> = (0..3).map(|n| branch(&locals, n, 3)).collect();
        for (a, b) in &masks {
            assert!(a.iter().chain(b).all(|value| [0.0, 1.0].contains(value)));
            // Of 36 and 24 entries.
            assert_eq!((a.iter().sum::<f32>(), b.iter().sum::<f32>()), (10.0, 7.0));
        }
        assert!(masks[0] != masks[1] && masks[1] != masks[2] && masks[0] != masks[2]);
        assert_eq!(branch(&started(&config, 1), 1, 3), masks[1]);
        assert_ne!(branch(&started(&config, 2), 1, 3), masks[1]);
    }

    #[test]
    fn two_of_four_keeps_two_of_each_four_neighbours() {
        let locals = started(&Config { rank: 4, pattern: Pattern::TwoOfFour, ..Config::default() }, 1);
        for n in 0..2 {
            let (a, b) = branch(&locals, n, 4);
            assert!(a.chunks(4).chain(b.chunks(4)).all(|four| four.iter().sum::<f32>() == 2.0));
        }
    }

    #[test]
    fn one_branch_that_keeps_all_is_lora() {
        let config = Config { rank: 3, alpha: 6.0, branches: 1, keep: 1.0, ..Config::default() };
        let masks = started(&config, 1);
        let normal =
            |name: &str, shape: [usize; 2]| Rng::new(1, name).normal_tensor(&shape[..], 1.0, DType::F64).unwrap();
        let (a, b, x) = (normal("a", [3, 12]), normal("b", [8, 3]), normal("x", [5, 12]));
        let mask = |name: &str| masks.get(name).unwrap().to_dtype(DType::F64).unwrap();
        let (mask_a, mask_b) = (mask(MASK_A), mask(MASK_B));
        let locals = Locals::new("q_proj", [(A, a.clone()), (B, b.clone()), (MASK_A, mask_a), (MASK_B, mask_b)]);
        let (site, layout) = (attune_architecture::SiteId::new("q_proj"), attune_points::Layout::new());
        let cx = RowCx { site: &site, output: 0, dropout: None, layout: &layout, rows: None };
        let found = Capaboost { config }.graph(&x, &locals, &cx).unwrap();
        let lora = x.matmul(&a.t().unwrap()).unwrap().matmul(&(b.t().unwrap() * 2.0).unwrap()).unwrap();
        let off = (found - lora).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        assert!(off.to_scalar::<f64>().unwrap() < 1e-12);
    }
}
