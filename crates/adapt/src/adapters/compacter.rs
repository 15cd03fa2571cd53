//! Bottlenecks after attention and MLP whose weights are sums of Kronecker products with matrices that all layers share:
//! the fewest parameters of all bottlenecks, for many small adapters over one base.
//!
//! # Update
//! ```text
//! y'_td = y_td + up(gelu(down(y_td)))             down: D to r, up: r to D, r = D / reduction
//! phm(x_ti) = x_ti H_io + b_o                     H_io = Σ_n C_nab ⊗ (s_nip t_npo), a, b < factors
//! ```
//!
//! # Symbols
//! `phm_rule` `C_nab`, `[factors, factors, factors]`, one for the whole slot; of each site and of both maps `s_nip`
//! `[factors, i / factors, phm_rank]`, `t_npo` `[factors, phm_rank, o / factors]` and `b_o`; f32, trained. C starts normal with standard deviation
//! 0.01, s and t uniform by Glorot, b at 0. The activation is GELU's approximation by a hyperbolic tangent.
//!
//! # Cost
//! `2*phm_rank*(i + i/reduction) + i/reduction + i` parameters a block and `factors^3` for all; H is never made: a row costs
//! some `2 phm_rank factors (i + r + 2 factors)` multiply-adds a map. It has an activation, so it does not merge.
//!
//! # Limits
//! With `factors` 1 and C = 1 the maps are those of a plain bottleneck of rank `phm_rank`. With C = 0 and b = 0 it is the base.
//!
//! # Departures
//! Norms and a head are not trained along with it. With targets `mlp` alone it is Compacter++.
//!
//! # Paper
//! Compacter: Efficient Low-Rank Hypercomplex Adapter Layers. Karimi Mahabadi, Henderson, Ruder, 2021.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, BranchMap, Merged, Peft, Port, RowCx};
use attune_points::params::Scope;
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{self, BuildCx, Card, Category, Merges, Method, Paper, Point};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::starts::{self, Start};
use crate::parts::{blocks, own};

const RULE: &str = "phm_rule";
const DOWN: [&str; 3] = ["down_s", "down_t", "down_bias"];
const UP: [&str; 3] = ["up_s", "up_t", "up_bias"];

/// Parameters of Compacter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How many times narrower than the stream the bottleneck is.
    #[schemars(range(min = 1, max = 4096))]
    reduction: u32,
    /// Kronecker products of a sum, and the width of their shared factors; divides both widths.
    #[schemars(range(min = 1, max = 64))]
    factors: u32,
    /// Rank of the factors that are not shared.
    #[schemars(range(min = 1, max = 64))]
    phm_rank: u32,
}

impl Default for Config {
    /// The paper's values.
    fn default() -> Self {
        Self { reduction: 32, factors: 4, phm_rank: 1 }
    }
}

pub(super) struct Compacter {
    config: Config,
}

impl Method for Compacter {
    const CARD: Card = Card {
        category: Some(Category::Additive),
        paper: Some(Paper {
            title: "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers",
            authors: "Rabeeh Karimi Mahabadi, James Henderson, Sebastian Ruder",
            year: 2021,
        }),
        applies: &[method::SiteKind::Attention, method::SiteKind::Mlp],
        targets: "all",
        parameters: "2*phm_rank*(i + i/reduction) + i/reduction + i",
        shared: "factors*factors*factors",
        moves: Some("all of its factors start away from 0, else none would have a gradient"),
        merges: Merges::No,
        ..Card::new(
            "compacter",
            Point::Adapter,
            "Bottlenecks after attention and MLP whose weights are sums of Kronecker products with matrices that all layers \
             share: the fewest parameters of all bottlenecks, for many small adapters over one base.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Compacter {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { reduction, factors, phm_rank } = self.config;
        let (n, rank) = (factors as usize, phm_rank as usize);
        blocks::attach(sites, |site, width| {
            let inner = width / reduction as usize;
            if !width.is_multiple_of(reduction as usize) {
                let message = format!("is {reduction}, which does not divide {width}, the width of {}", site.id);
                return Err(Fault::new("reduction", message));
            }
            if inner == 0 || !inner.is_multiple_of(n) || !width.is_multiple_of(n) {
                let message = format!("is {n}, which does not divide the widths {width} and {inner} of {}", site.id);
                return Err(Fault::new("factors", message));
            }
            let rule = TensorSpec { scope: Scope::Model, ..TensorSpec::trained(RULE, [n, n, n]) };
            let map = |[s, t, bias]: [&'static str; 3], i: usize, o: usize| {
                let bias = TensorSpec { decay: false, ..TensorSpec::trained(bias, [o]) };
                [TensorSpec::trained(s, [n, i / n, rank]), TensorSpec::trained(t, [n, rank, o / n]), bias]
            };
            let own = map(DOWN, width, inner).into_iter().chain(map(UP, inner, width));
            Ok(std::iter::once(rule).chain(own).collect())
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| match *spec.shape.as_slice() {
            _ if spec.local == RULE => Start::Normal(0.01),
            [_, rows, cols] => Start::Uniform((6.0 / (rows + cols) as f64).sqrt()),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Branch(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No("an activation stands between its two maps"))
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl BranchMap for Compacter {
    fn graph(&self, _: &Tensor, y_td: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let rule = tensors.get(RULE)?;
        let map = |x: &Tensor, [s, t, bias]: [&'static str; 3]| -> attune_points::Result<Tensor> {
            Ok(phm(x, rule, tensors.get(s)?, tensors.get(t)?)?.broadcast_add(tensors.get(bias)?)?)
        };
        Ok((y_td + map(&ops::gelu_tanh(&map(y_td, DOWN)?)?, UP)?)?)
    }
}

/// `x H` for `H = Σ_n C_n ⊗ (s_n t_n)`, factor by factor: `x [T, i]`, `C [N, N, N]`, `s [N, i/N, P]`, `t [N, P, o/N]`.
fn phm(x_ti: &Tensor, rule: &Tensor, s: &Tensor, t: &Tensor) -> attune_points::Result<Tensor> {
    let (rows, i) = x_ti.dims2()?;
    let (n, _, rank) = s.dims3()?;
    let o = n * t.dim(2)?;
    // Numbers a of x by numbers a of C: [T a, i/N] [i/N, n p].
    let s = s.permute((1, 0, 2))?.contiguous()?.reshape((i / n, n * rank))?;
    let u = ops::matmul(&x_ti.reshape((rows * n, i / n))?, &s)?;
    // To [n, T p, a], times C_n: [n, T p, b].
    let u = u.reshape((rows, n, n, rank))?.permute((2, 0, 3, 1))?.contiguous()?.reshape((n, rows * rank, n))?;
    let v = ops::matmul(&u, rule)?;
    // To [T b, n p], times t.
    let v = v.reshape((n, rows, rank, n))?.permute((1, 3, 0, 2))?.contiguous()?.reshape((rows * n, n * rank))?;
    Ok(ops::matmul(&v, &t.reshape((n * rank, o / n))?)?.reshape((rows, o))?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    /// The sum of Kronecker products, entry by entry.
    fn explicit(rule: &Tensor, s: &Tensor, t: &Tensor) -> Tensor {
        let (rule, s, t) = (rule.to_vec3::<f64>().unwrap(), s.to_vec3::<f64>().unwrap(), t.to_vec3::<f64>().unwrap());
        let (n, inner, outer) = (rule.len(), s[0].len(), t[0][0].len());
        let mut h = vec![0.0; n * inner * n * outer];
        for (m, factor) in rule.iter().enumerate() {
            for (a, b, p, q) in (0..n).flat_map(|a| {
                (0..n).flat_map(move |b| (0..inner).flat_map(move |p| (0..outer).map(move |q| (a, b, p, q))))
            }) {
                let product: f64 = s[m][p].iter().zip(&t[m]).map(|(s, t)| s * t[q]).sum();
                h[(a * inner + p) * n * outer + b * outer + q] += factor[a][b] * product;
            }
        }
        Tensor::from_vec(h, (n * inner, n * outer), &Device::Cpu).unwrap()
    }

    #[test]
    fn the_map_is_the_sum_of_kronecker_products() {
        for rank in [1, 2] {
            let (rule, s, t) = (tensor("c", &[3, 3, 3]), tensor("s", &[3, 4, rank]), tensor("t", &[3, rank, 2]));
            let x = tensor("x", &[5, 12]);
            let expected = x.matmul(&explicit(&rule, &s, &t)).unwrap();
            assert!(difference(&phm(&x, &rule, &s, &t).unwrap(), &expected) < 1e-12);
        }
    }

    #[test]
    fn with_one_factor_of_full_rank_it_is_a_linear() {
        let (s, t, x) = (tensor("s", &[1, 4, 3]), tensor("t", &[1, 3, 3]), tensor("x", &[5, 4]));
        let one = Tensor::ones((1, 1, 1), DType::F64, &Device::Cpu).unwrap();
        let w = s.squeeze(0).unwrap().matmul(&t.squeeze(0).unwrap()).unwrap();
        assert!(difference(&phm(&x, &one, &s, &t).unwrap(), &x.matmul(&w).unwrap()) < 1e-12);
    }
}
