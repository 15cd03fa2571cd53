//! What adapters that were trained one by one would add to a block, mixed row by row by an attention over them: knowledge of
//! several tasks for another one, and none of them is changed.
//!
//! # Update
//! ```text
//! z_ntd  = what adapter n would add to y_td                                frozen slots before this one, at the same block
//! s_tn   = softmax_n((Q y_t + b_Q) · (K z_nt + b_K) / τ)
//! y'_td  = y_td + Σ_n s_tn V z_ntd
//! L      = L_job + λ Σ_blocks ‖I - V‖²_F
//! ```
//!
//! # Symbols
//! `query` Q, `key` K and `value` V `[D, D]`, `query_bias` and `key_bias` `[D]`; f32, trained. Q and K start normal with standard
//! deviation 0.02, their biases at 0, V as the unit matrix with 1e-6 beside the diagonal. `temperature` is τ, `penalty` λ.
//!
//! # Cost
//! `3*i*i + 2*i` parameters a block, and every adapter that it mixes runs.
//!
//! # Limits
//! With one adapter and V = I it is that adapter. It does not depend on the order of the adapters. With none it is the base.
//!
//! # Departures
//! The temperature does not fall while it trains, the variant without V is not here, and scores are not dropped: the models at
//! hand have no dropout in their attention. It mixes whatever sits at the block, bottlenecks or others.
//!
//! # Paper
//! AdapterFusion: Non-Destructive Task Composition for Transfer Learning. Pfeiffer et al., 2021.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, MixtureMap, Peft, Port, RowCx};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{self, BuildCx, Card, Category, Merges, Method, Paper, Point};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::starts::{self, Start};
use crate::parts::{blocks, mixing, own};

const QUERY: &str = "query";
const QUERY_BIAS: &str = "query_bias";
const KEY: &str = "key";
const KEY_BIAS: &str = "key_bias";
const VALUE: &str = "value";

/// Parameters of a fusion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// What scores are divided by.
    #[schemars(range(min = 1e-3, max = 1000.0))]
    temperature: f64,
    /// Weight of the squared distance between the values' matrix and the unit matrix.
    #[schemars(range(min = 0.0, max = 1000.0))]
    penalty: f64,
}

impl Default for Config {
    /// The paper's values.
    fn default() -> Self {
        Self { temperature: 1.0, penalty: 0.01 }
    }
}

pub(super) struct Adapterfusion {
    config: Config,
}

impl Method for Adapterfusion {
    const CARD: Card = Card {
        category: Some(Category::Additive),
        aliases: &["adapter-fusion"],
        paper: Some(Paper {
            title: "AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
            authors: "Jonas Pfeiffer, Aishwarya Kamath, Andreas Rücklé, Kyunghyun Cho, Iryna Gurevych",
            year: 2021,
        }),
        applies: &[method::SiteKind::Attention, method::SiteKind::Mlp],
        targets: "mlp",
        parameters: "3*i*i + 2*i",
        moves: Some("it starts close to the mean of what it mixes"),
        merges: Merges::No,
        ..Card::new(
            "adapterfusion",
            Point::Adapter,
            "Mixes what adapters that were trained one by one would add to a block, row by row, and leaves them as they are: \
             where several tasks know something of another one.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Adapterfusion {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        blocks::attach(sites, |_, width| {
            let matrix = |local| TensorSpec::trained(local, [width, width]);
            // What all keys have in common changes no softmax.
            let quiet = Some("a shift of all keys changes no mixture");
            let bias = |local, quiet| TensorSpec { decay: false, quiet, ..TensorSpec::trained(local, [width]) };
            Ok(vec![
                matrix(QUERY),
                bias(QUERY_BIAS, None),
                matrix(KEY),
                bias(KEY_BIAS, quiet),
                TensorSpec { decay: false, ..matrix(VALUE) },
            ])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        // 1 on the diagonal and 1e-6 beside it.
        let unit = |width: usize| -> attune_points::Result<Tensor> {
            Ok(((Tensor::eye(width, DType::F32, &Device::Cpu)? * (1.0 - 1e-6))? + 1e-6)?)
        };
        let value = at.tensors.iter().find(|spec| spec.local == VALUE);
        let value = value.map(|spec| unit(spec.shape[0])).transpose()?;
        starts::each(at, rng, |spec| match &value {
            Some(value) if spec.local == VALUE => Start::Is(value.clone()),
            _ if spec.shape.len() == 2 => Start::Normal(0.02),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Mixture(self)
    }

    fn penalty(&self, _: &Attachment, tensors: &Locals) -> attune_points::Result<Option<Tensor>> {
        if self.config.penalty == 0.0 {
            return Ok(None);
        }
        let value = tensors.get(VALUE)?;
        let unit = Tensor::eye(value.dim(0)?, value.dtype(), value.device())?;
        Ok(Some(((value - unit)?.sqr()?.sum_all()? * self.config.penalty)?))
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No("each row is mixed by itself"))
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl Adapterfusion {
    /// How much of each adapter each row gets, `[T, N]`.
    fn shares(&self, y_td: &Tensor, added: &[Tensor], tensors: &Locals) -> attune_points::Result<Tensor> {
        let q_td = ops::linear(y_td, tensors.get(QUERY)?, Some(tensors.get(QUERY_BIAS)?))?;
        let (key, key_bias) = (tensors.get(KEY)?, tensors.get(KEY_BIAS)?);
        let score = |z_td: &Tensor| -> attune_points::Result<Tensor> {
            Ok((&q_td * ops::linear(z_td, key, Some(key_bias))?)?.sum_keepdim(1)?)
        };
        let scores = added.iter().map(score).collect::<Result<Vec<_>, _>>()?;
        Ok(ops::softmax(&(Tensor::cat(&scores, 1)? / self.config.temperature)?)?)
    }
}

impl MixtureMap for Adapterfusion {
    fn graph(
        &self,
        _: &Tensor,
        y_td: &Tensor,
        added: &[Tensor],
        tensors: &Locals,
        _: &RowCx<'_>,
    ) -> attune_points::Result<Tensor> {
        if added.is_empty() {
            return Ok(y_td.clone());
        }
        let s_tn = self.shares(y_td, added, tensors)?;
        // The values' map is linear: it is applied to the mixture instead of to each.
        let mixed_td = mixing::mixed(&s_tn, added)?;
        Ok((y_td + ops::linear(&mixed_td, tensors.get(VALUE)?, None)?)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::Layout;
    use candle_core::Var;

    use super::*;

    const WIDTH: usize = 6;

    fn random(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn locals(value: Tensor) -> Locals {
        let square = [WIDTH, WIDTH];
        let tensors = vec![
            (QUERY, random("q", &square)),
            (QUERY_BIAS, random("qb", &[WIDTH])),
            (KEY, random("k", &square)),
            (KEY_BIAS, random("kb", &[WIDTH])),
            (VALUE, value),
        ];
        Locals::new("block", tensors)
    }

    fn fused(added: &[&Tensor], value: Tensor) -> Tensor {
        let fusion = Adapterfusion { config: Config::default() };
        let (site, layout) = (SiteId::from("block"), Layout::new());
        let cx = RowCx { site: &site, output: 4, dropout: None, layout: &layout, rows: None };
        let added: Vec<Tensor> = added.iter().map(|z| (*z).clone()).collect();
        let y_td = random("y", &[4, WIDTH]);
        fusion.graph(&y_td, &y_td, &added, &locals(value), &cx).unwrap()
    }

    fn off(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn unit() -> Tensor {
        Tensor::eye(WIDTH, DType::F64, &Device::Cpu).unwrap()
    }

    #[test]
    fn one_adapter_by_itself_is_that_adapter_and_the_order_of_several_is_nothing() {
        let [a, b, c] = ["a", "b", "c"].map(|name| random(name, &[4, WIDTH]));
        let y_td = random("y", &[4, WIDTH]);
        assert!(off(&fused(&[&a], unit()), &(&y_td + &a).unwrap()) < 1e-12);
        assert_eq!(off(&fused(&[], unit()), &y_td), 0.0);
        let value = random("v", &[WIDTH, WIDTH]);
        let expected = fused(&[&a, &b, &c], value.clone());
        assert!(off(&fused(&[&c, &a, &b], value.clone()), &expected) < 1e-12);
        assert!(off(&fused(&[&a, &b], value), &expected) > 0.1, "each of them counts");
    }

    /// By hand: scores of single rows, their softmax, and what is left when one of two is far behind.
    #[test]
    fn rows_are_mixed_by_their_scores() {
        let [a, b] = ["a", "b"].map(|name| random(name, &[4, WIDTH]));
        let tensors = locals(unit());
        let y_td = random("y", &[4, WIDTH]);
        let map = |x: &Tensor, w: &str, bias: &str| {
            ops::linear(x, tensors.get(w).unwrap(), Some(tensors.get(bias).unwrap())).unwrap()
        };
        let rows = |x: &Tensor| -> Vec<Vec<f64>> { x.to_vec2().unwrap() };
        let (q, ka, kb) =
            (rows(&map(&y_td, QUERY, QUERY_BIAS)), rows(&map(&a, KEY, KEY_BIAS)), rows(&map(&b, KEY, KEY_BIAS)));
        let found = rows(&fused(&[&a, &b], unit()));
        let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        for t in 0..4 {
            let share = 1.0 / (1.0 + (dot(&q[t], &kb[t]) - dot(&q[t], &ka[t])).exp());
            for (d, found) in found[t].iter().enumerate() {
                let expected = rows(&y_td)[t][d] + share * rows(&a)[t][d] + (1.0 - share) * rows(&b)[t][d];
                assert!((found - expected).abs() < 1e-12, "row {t}");
            }
        }
    }

    /// Rows of two kinds, one adapter that is right for each: gradient descent on queries and keys alone finds which.
    #[test]
    fn rows_learn_which_adapter_is_theirs() {
        let fusion = Adapterfusion { config: Config::default() };
        let (site, layout) = (SiteId::from("block"), Layout::new());
        let cx = RowCx { site: &site, output: 4, dropout: None, layout: &layout, rows: None };
        let kind = |row: usize| row % 2;
        let rows = |of: &dyn Fn(usize, usize) -> f64| {
            let values: Vec<f64> =
                (0..8).flat_map(|t| (0..WIDTH).map(move |d| (t, d))).map(|(t, d)| of(t, d)).collect();
            let noise = random("noise", &[8, WIDTH]);
            (Tensor::from_vec(values, (8, WIDTH), &Device::Cpu).unwrap() + (noise * 0.1).unwrap()).unwrap()
        };
        let y_td = rows(&|t, d| f64::from(u8::from(d == kind(t))));
        let added = [2, 3].map(|own| rows(&|_, d| f64::from(u8::from(d == own))));
        let right = |n: usize| -> Tensor {
            let values: Vec<f64> = (0..8).map(|t| f64::from(u8::from(kind(t) == n))).collect();
            Tensor::from_vec(values, (8, 1), &Device::Cpu).unwrap()
        };
        let theirs = [0, 1].map(|n| added[n].broadcast_mul(&right(n)).unwrap());
        let target = (&y_td + (&theirs[0] + &theirs[1]).unwrap()).unwrap();
        let start = |name| Var::from_tensor(&(random(name, &[WIDTH, WIDTH]) * 0.02).unwrap()).unwrap();
        let (query, key) = (start("q"), start("k"));
        let none = Tensor::zeros(WIDTH, DType::F64, &Device::Cpu).unwrap();
        let tensors = || {
            let (query, key) = (query.as_tensor().clone(), key.as_tensor().clone());
            let biases = [(QUERY_BIAS, none.clone()), (KEY_BIAS, none.clone())];
            let all = [(QUERY, query), (KEY, key), (VALUE, unit())].into_iter().chain(biases);
            Locals::new("block", all)
        };
        for _ in 0..300 {
            let fused = fusion.graph(&y_td, &y_td, &added, &tensors(), &cx).unwrap();
            let loss = (fused - &target).unwrap().sqr().unwrap().sum_all().unwrap();
            let gradients = loss.backward().unwrap();
            for var in [&query, &key] {
                let step = (gradients.get(var.as_tensor()).unwrap() * 0.3).unwrap();
                var.set(&(var.as_tensor() - step).unwrap()).unwrap();
            }
        }
        let shares: Vec<Vec<f64>> = fusion.shares(&y_td, &added, &tensors()).unwrap().to_vec2().unwrap();
        for (row, shares) in shares.iter().enumerate() {
            assert!(shares[kind(row)] > 0.8, "row {row}: {shares:?}");
        }
    }

    #[test]
    fn the_penalty_is_the_squared_distance_from_the_unit_matrix() {
        let at = Attachment { site: SiteId::from("block"), tensors: Vec::new() };
        let penalty = |value: Tensor, weight: f64| {
            let fusion = Adapterfusion { config: Config { penalty: weight, ..Config::default() } };
            fusion.penalty(&at, &locals(value)).unwrap().map(|p| p.to_scalar::<f64>().unwrap())
        };
        assert_eq!(penalty(unit(), 0.5), Some(0.0));
        let moved = (unit() + 0.1).unwrap();
        assert!((penalty(moved, 0.5).unwrap() - 0.5 * 36.0 * 0.01).abs() < 1e-12);
        assert_eq!(penalty(unit(), 0.0), None);
    }
}
