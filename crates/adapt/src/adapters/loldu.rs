//! The diagonal between the triangles of a weight's own elimination: a number a pivot trains and nothing else; where an adapter has to be as
//! small as can be and still change the weight in many directions.
//!
//! # Update
//! ```text
//! W_oi = L_ok diag(D_k) U_ki                  rows of L in the order of the largest pivots; 1 on the diagonals of L and U
//! y_to = x_ti W_oi^T + ((x_ti U_ri^T) ∘ (sigma · z_r - alpha / r · z⁰_r)) L_or^T              of the first r pivots
//! ```
//!
//! # Symbols
//! `loldu_z` `z_r`, f32, trained, D of the first r pivots at the start, or with `start` by their mean size m: `uniform` in ±m/2, `normal` with standard
//! deviation m/2, `constant` m; `loldu_sigma`, alpha / r at the start, trained unless `train_scale` is off. `loldu_start` what their product starts as, `loldu_L` `L_or` and `loldu_U` `U_ri` never train. A
//! pivot of less than a millionth of the largest has nothing in U, and its number no effect.
//!
//! # Cost
//! `rank + 1` parameters per linear, `rank` without `train_scale`, and `r (i+o)` numbers that never train beside them; `2 r (i+o)` extra FLOPs per
//! token forward. An elimination of each weight before the first step.
//! Where that costs less, a pass makes another weight in place of it, forward and in reverse, at `2 r o i` FLOPs each, and the gradient by it.
//!
//! # Limits
//! At the start it is the base, bit for bit, whatever z starts as. The change stays between the columns of L and the rows of U.
//!
//! # Departures
//! What is taken out of the base is what z starts as; the authors' code takes out D even where z starts as something else, and moves. Numbers
//! have no weight decay: it would take the leading part out of the weight.
//!
//! # Paper
//! LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning. Shi, Wei, Wu, Ran, Sun, He, Yang,
//! 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap, WeightMap};
use attune_points::forms::{AsWeight, Cost};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::rng::Rng;
use attune_tensor::{linalg, ops};
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::starts::{self, Start};
use crate::parts::{factors, linears, own};

const Z: &str = "loldu_z";
const SIGMA: &str = "loldu_sigma";
const FROM: &str = "loldu_start";
const L: &str = "loldu_L";
const U: &str = "loldu_U";

/// A pivot below this share of the largest is none.
const LEAST: f64 = 1e-6;

/// What the numbers between the triangles start as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Numbers {
    /// The pivots.
    #[default]
    Pivots,
    /// Uniform, in half the mean size of the pivots to both sides of 0.
    Uniform,
    /// Normal, with half the mean size of the pivots as standard deviation.
    Normal,
    /// The mean size of the pivots, all of them.
    Constant,
}

/// Parameters of LoLDU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How many pivots have a number, the first ones.
    #[schemars(range(min = 1, max = 65536))]
    rank: u32,
    /// Numerator of the factor on the numbers at the start.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Trains that factor, too.
    train_scale: bool,
    /// What the numbers start as.
    start: Numbers,
}

impl Default for Config {
    /// The authors' numerator, and one of their ranks.
    fn default() -> Self {
        Self { rank: 64, alpha: 8.0, train_scale: true, start: Numbers::Pivots }
    }
}

pub(super) struct Loldu {
    config: Config,
}

impl Method for Loldu {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
            authors: "Yiming Shi, Jiwei Wei, Yujia Wu, Ran Ran, Chengwei Sun, Shiyuan He, Yang Yang",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank + train_scale",
        fixed: "rank*(i+o)",
        merges: Merges::Factors,
        ..Card::new(
            "loldu",
            Point::Adapter,
            "The diagonal between the triangles of a weight's own elimination: a number a pivot trains and nothing else; where an \
             adapter has to be as small as can be and still change the weight in many directions.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        if config.alpha == 0.0 {
            return Err(vec![Fault::new("alpha", "is 0, with which no number has an effect; expected more")]);
        }
        Ok(Box::new(Self { config }))
    }
}

impl Loldu {
    /// What is between the triangles, beyond the start.
    fn moved(tensors: &Locals) -> attune_points::Result<Tensor> {
        Ok((tensors.get(Z)?.broadcast_mul(tensors.get(SIGMA)?)? - tensors.get(FROM)?)?)
    }
}

impl Adapter for Loldu {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        linears::attach(sites, |site, o, i| {
            let r = factors::within(self.config.rank, site, (o, i))?;
            let number = |local, n: usize, train| TensorSpec { train, decay: false, ..TensorSpec::trained(local, [n]) };
            Ok(vec![
                number(Z, r, true),
                number(SIGMA, 1, self.config.train_scale),
                TensorSpec::fixed(FROM, [r]),
                TensorSpec::fixed(L, [o, r]),
                TensorSpec::fixed(U, [r, i]),
            ])
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let r = self.config.rank as usize;
        let (l_ok, u_ki) = linalg::lu(&weight.dense(DType::F64)?)?;
        let rows = u_ki.to_vec2::<f64>()?;
        let pivots: Vec<f64> = rows.iter().enumerate().map(|(k, row)| row[k]).collect();
        let most = pivots.iter().fold(0.0f64, |most, pivot| most.max(pivot.abs()));
        let by = |pivot: f64| if pivot.abs() > LEAST * most { 1.0 / pivot } else { 0.0 };
        let inverse = Tensor::new(pivots[..r].iter().map(|pivot| by(*pivot)).collect::<Vec<f64>>(), &Device::Cpu)?;
        let u_ri = u_ki.narrow(0, 0, r)?.broadcast_mul(&inverse.unsqueeze(1)?)?;
        let mean = pivots[..r].iter().map(|pivot| pivot.abs()).sum::<f64>() / r as f64;
        let z = match self.config.start {
            Numbers::Pivots => Tensor::new(&pivots[..r], &Device::Cpu)?.to_dtype(DType::F32)?,
            Numbers::Uniform => rng.named(Z).uniform_tensor(r, mean / 2.0, DType::F32)?,
            Numbers::Normal => rng.named(Z).normal_tensor(r, mean / 2.0, DType::F32)?,
            Numbers::Constant => Tensor::full(mean as f32, r, &Device::Cpu)?,
        };
        let sigma = Tensor::new(&[(self.config.alpha / r as f64) as f32], &Device::Cpu)?;
        let from = z.broadcast_mul(&sigma)?;
        let l_or = l_ok.narrow(1, 0, r)?.contiguous()?;
        starts::each(at, rng, |spec| {
            Start::Is(match spec.local {
                Z => z.clone(),
                SIGMA => sigma.clone(),
                FROM => from.clone(),
                L => l_or.clone(),
                _ => u_ri.clone(),
            })
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let left = tensors.get(L)?.broadcast_mul(&Self::moved(tensors)?)?;
        Ok(Merged::Factors { left, right: tensors.get(U)?.clone(), scale: 1.0 })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl RowMap for Loldu {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tr = ops::scale_columns(&ops::linear(x_ti, tensors.get(U)?, None)?, &Self::moved(tensors)?)?;
        Ok(ops::linear(&h_tr, tensors.get(L)?, None)?)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        let r = self.config.rank as usize;
        let (row, weight) = (Cost::new(r * (o + i), r), Cost::new(r * o * i, r * o + o * i));
        Some(AsWeight { map: self, row, weight, product_again: false })
    }
}

impl WeightMap for Loldu {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let left_or = ops::scale_columns(tensors.get(L)?, &Self::moved(tensors)?)?;
        Ok((w_oi + ops::matmul(&left_or, tensors.get(U)?)?)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;

    use super::*;

    fn started(config: Config, w: &Tensor) -> (Loldu, Attachment, Locals) {
        let (r, (o, i)) = (config.rank as usize, w.dims2().unwrap());
        let tensors = vec![
            TensorSpec::trained(Z, [r]),
            TensorSpec::trained(SIGMA, [1]),
            TensorSpec::fixed(FROM, [r]),
            TensorSpec::fixed(L, [o, r]),
            TensorSpec::fixed(U, [r, i]),
        ];
        let at = Attachment { site: SiteId::new("up"), tensors };
        let loldu = Loldu { config };
        let (locals, _) = loldu.init(&at, w, &mut Rng::new(1, "init")).unwrap();
        (loldu, at, locals)
    }

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F32).unwrap()
    }

    fn largest(x: &Tensor) -> f32 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn change(loldu: &Loldu, at: &Attachment, locals: &Locals, w: &Tensor) -> Tensor {
        let Merged::Factors { left, right, .. } = loldu.merge(at, locals, w).unwrap() else { panic!("no factors") };
        left.matmul(&right).unwrap()
    }

    fn with(locals: &Locals, name: &'static str, value: &Tensor) -> Locals {
        let own = locals.iter().map(|(local, tensor)| (local, if local == name { value } else { tensor }.clone()));
        Locals::new("up", own.collect::<Vec<_>>())
    }

    #[test]
    fn it_starts_as_the_base_whatever_its_numbers_start_as_and_on_both_sides_of_a_square() {
        for (shape, start) in [
            ([7, 5], Numbers::Pivots),
            ([5, 7], Numbers::Uniform),
            ([6, 6], Numbers::Uniform),
            ([7, 5], Numbers::Normal),
            ([5, 7], Numbers::Constant),
        ] {
            let w = normal("w", &shape);
            let (loldu, at, locals) = started(Config { rank: 4, start, ..Config::default() }, &w);
            assert_eq!(largest(&change(&loldu, &at, &locals, &w)), 0.0);
        }
    }

    #[test]
    fn numbers_start_by_the_size_of_the_pivots() {
        let w = normal("w", &[40, 40]);
        let of = |start| {
            let (_, _, locals) = started(Config { rank: 40, start, ..Config::default() }, &w);
            locals.get(Z).unwrap().to_vec1::<f32>().unwrap()
        };
        let pivots = of(Numbers::Pivots);
        let mean = pivots.iter().map(|z| z.abs()).sum::<f32>() / 40.0;
        assert!(of(Numbers::Constant).iter().all(|z| (z - mean).abs() < 1e-5 * mean));
        assert!(of(Numbers::Uniform).iter().all(|z| z.abs() <= mean / 2.0));
        let spread = (of(Numbers::Normal).iter().map(|z| z * z).sum::<f32>() / 40.0).sqrt();
        assert!((spread / mean - 0.5).abs() < 0.2, "{spread} of {mean}");
    }

    #[test]
    fn with_all_pivots_and_without_its_start_it_is_the_weight() {
        for shape in [[7, 5], [5, 7]] {
            let w = normal("w", &shape);
            let (loldu, at, locals) = started(Config { rank: 5, alpha: 5.0, ..Config::default() }, &w);
            let locals = with(&locals, FROM, &locals.get(FROM).unwrap().zeros_like().unwrap());
            assert!(largest(&(change(&loldu, &at, &locals, &w) - &w).unwrap()) < 1e-5);
        }
    }

    #[test]
    fn a_change_is_that_of_the_numbers_between_the_triangles() {
        let w = normal("w", &[7, 5]);
        let (loldu, at, locals) = started(Config { rank: 3, alpha: 6.0, ..Config::default() }, &w);
        let dz = normal("dz", &[3]);
        let moved = with(&locals, Z, &(locals.get(Z).unwrap() + &dz).unwrap());
        let by_hand = locals.get(L).unwrap().broadcast_mul(&(dz * 2.0).unwrap()).unwrap();
        let by_hand = by_hand.matmul(locals.get(U).unwrap()).unwrap();
        assert!(largest(&(change(&loldu, &at, &moved, &w) - by_hand).unwrap()) < 1e-5);
    }

    #[test]
    fn a_pivot_of_nothing_has_no_effect() {
        // The second row is the first, twice.
        let first = normal("w", &[1, 4]);
        let w = Tensor::cat(&[&first, &(&first * 2.0).unwrap(), &normal("v", &[2, 4])], 0).unwrap();
        let (loldu, at, locals) = started(Config { rank: 4, ..Config::default() }, &w);
        let u = locals.get(U).unwrap().to_vec2::<f32>().unwrap();
        assert!(u[3].iter().all(|value| *value == 0.0) && u[2].iter().any(|value| *value != 0.0));
        let moved = with(&locals, Z, &normal("z", &[4]));
        assert!(largest(&change(&loldu, &at, &moved, &w)).is_finite());
    }
}
