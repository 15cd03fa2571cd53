//! Circular convolution adaptation: a change made of circulant blocks, each one row that is rotated from row to row; a change of full
//! rank for the numbers of a thin LoRA.
//!
//! # Update
//! ```text
//! y_to  = x_ti (W_oi + C_oi)^T
//! C_oi[m b + k, n b + l] = K[m, n, (l - k) mod b] / i                blocks m of the output, n of the input, of width b
//! ```
//! On rows it is computed frequency by frequency, `Y_mj = Σ_n X_nj conj(K_mnj) / i`.
//!
//! # Symbols
//! `c3a_kernel` `K`, `[o/b, i/b, b]`, f32, trained; uniform in ±sqrt(6/(i+o)) at the start, or as `start` says. X, K and Y with j are
//! Fourier transforms of blocks.
//!
//! # Cost
//! `i o / b` parameters per linear. The transforms are products with tables of b by b/2 + 1: some `2 (i + o) b + 4 i o / b` FLOPs
//! per token forward, no fast transform, against `2 i o` for a weight. Where it costs less, as for blocks far smaller than the widths, a
//! pass makes `C` in place of it, forward and in reverse, and the gradient by it; the estimate is of `block_size`, at sites of other
//! blocks too.
//!
//! # Limits
//! With K = 0 it is the base, bit for bit. With b = 1 it is any change of the weight, over i.
//!
//! # Departures
//! none; agrees with PEFT but for gradients below: PEFT 0.21 takes those by the rows `x` of another kernel, these are exact.
//! `block_size_pattern` names whole paths, not patterns: reading a PEFT folder resolves its patterns.
//!
//! # Paper
//! Parameter-Efficient Fine-Tuning via Circular Convolution. Chen, Cheng, Liu, Gao, Tsung, Li, Li, 2024.

use std::collections::BTreeMap;
use std::f64::consts::TAU;

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap, WeightMap};
use attune_points::forms::{AsWeight, Cost};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::starts::{self, Start};
use crate::parts::{foreign, linears};

const KERNEL: &str = "c3a_kernel";
const PEFT_TYPE: &str = "C3A";

/// Parameters of C3A.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Width of a block, which divides input and output width; wider ones have fewer parameters.
    #[schemars(range(min = 1, max = 65536))]
    block_size: u32,
    /// Width of blocks at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    block_size_pattern: BTreeMap<String, u32>,
    /// What kernels start as.
    start: Kernels,
}

/// What kernels start as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Kernels {
    /// Uniform in ±sqrt(6/(i+o)).
    Xavier,
    /// Uniform in ±1/sqrt(i).
    Kaiming,
    /// Normal with standard deviation 1.
    Gaussian,
    /// 0, so that the model starts as the base.
    Zero,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { block_size: 256, block_size_pattern: BTreeMap::new(), start: Kernels::Xavier }
    }
}

pub(super) struct C3a {
    config: Config,
}

impl Method for C3a {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Parameter-Efficient Fine-Tuning via Circular Convolution",
            authors: "Aochuan Chen, Jiashun Cheng, Zijing Liu, Ziqi Gao, Fugee Tsung, Yu Li, Jia Li",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "i*o/block_size",
        moves: Some("kernels start at random, unless `start` is `zero`"),
        merges: Merges::Weight,
        peft_type: Some(PEFT_TYPE),
        ..Card::new(
            "c3a",
            Point::Adapter,
            "Circular convolution adaptation: a change made of circulant blocks, each one row that is rotated from row to row; a \
             change of full rank for the numbers of a thin LoRA.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let wrong = config.block_size_pattern.iter().filter(|(_, size)| !(1..=65536).contains(*size));
        let fault = |(site, size): (&String, &u32)| {
            Fault::new("block_size_pattern", format!("has {size} for {site:?}; expected 1 to 65536"))
        };
        let faults: Vec<Fault> = wrong.map(fault).collect();
        if faults.is_empty() { Ok(Box::new(Self { config })) } else { Err(faults) }
    }
}

impl Adapter for C3a {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        linears::attach(sites, |site, output, input| {
            let own = self.config.block_size_pattern.get(site.id.as_str());
            let (field, b) = match own {
                Some(&size) => ("block_size_pattern", size as usize),
                None => ("block_size", self.config.block_size as usize),
            };
            if !input.is_multiple_of(b) || !output.is_multiple_of(b) {
                let message = format!("is {b}, which does not divide both widths of {}, {output} by {input}", site.id);
                return Err(Fault::new(field, message));
            }
            Ok(vec![TensorSpec::trained(KERNEL, [output / b, input / b, b])])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| {
            let (o, i) = match *spec.shape.as_slice() {
                [m, n, b] => ((m * b) as f64, (n * b) as f64),
                _ => (1.0, 1.0),
            };
            match self.config.start {
                Kernels::Xavier => Start::Uniform((6.0 / (i + o)).sqrt()),
                Kernels::Kaiming => Start::Uniform(1.0 / i.sqrt()),
                Kernels::Gaussian => Start::Normal(1.0),
                Kernels::Zero => Start::Constant(0.0),
            }
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let kernel = tensors.get(KERNEL)?;
        let weight = (weight.dense(kernel.dtype())? + change(kernel)?)?;
        Ok(Merged::Weight { weight, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let start = match self.config.start {
            Kernels::Xavier => InitWeights::Named(Distribution::XavierUniform),
            Kernels::Kaiming => InitWeights::Named(Distribution::KaimingUniform),
            Kernels::Gaussian => InitWeights::Named(Distribution::Gaussian),
            Kernels::Zero => InitWeights::Flag(true),
        };
        let Config { block_size, block_size_pattern, .. } = self.config.clone();
        let layout = Layout { block_size, block_size_pattern, init_weights: start, ..Layout::default() };
        Some(foreign::peft(PEFT_TYPE, &layout, vec![(KERNEL, KERNEL)]))
    }
}

/// The whole change `[o, i]`.
fn change(kernel: &Tensor) -> attune_points::Result<Tensor> {
    let (_, n, b) = kernel.dims3()?;
    Ok(ops::circulant(&(kernel / (n * b) as f64)?)?)
}

/// Cosines and sines of the angles of frequencies: `[b, f]` each, f = b/2 + 1.
fn tables(b: usize, dtype: DType) -> attune_points::Result<(Tensor, Tensor)> {
    let f = b / 2 + 1;
    let table = |of: fn(f64) -> f64| {
        // Of b angles, for whole turns are taken off as whole numbers.
        let turns: Vec<f64> = (0..b).map(|turn| of(TAU * turn as f64 / b as f64)).collect();
        let values = (0..b * f).map(|at| turns[at / f * (at % f) % b]).collect::<Vec<_>>();
        Tensor::from_vec(values, (b, f), &Device::Cpu)?.to_dtype(dtype)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

impl RowMap for C3a {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let kernel = tensors.get(KERNEL)?;
        let (m, n, b) = kernel.dims3()?;
        let (rows, i) = x_ti.dims2()?;
        let (cos_bf, sin_bf) = tables(b, x_ti.dtype())?;
        let f = cos_bf.dim(1)?;
        // Real and imaginary parts of X [f, T, n] and K [f, n, m].
        let x = x_ti.contiguous()?.reshape((rows * n, b))?;
        let of_rows = |part: Tensor| part.reshape((rows, n, f))?.permute((2, 0, 1))?.contiguous();
        let (x_re, x_im) = (of_rows(ops::matmul(&x, &cos_bf)?)?, of_rows(ops::matmul(&x, &sin_bf)?.neg()?)?);
        let kernel = kernel.reshape((m * n, b))?;
        let of_kernel = |part: Tensor| part.reshape((m, n, f))?.permute((2, 1, 0))?.contiguous();
        let (k_re, k_im) =
            (of_kernel(ops::matmul(&kernel, &cos_bf)?)?, of_kernel(ops::matmul(&kernel, &sin_bf)?.neg()?)?);
        // (X_re + i X_im)(K_re - i K_im).
        let y_re = (ops::matmul(&x_re, &k_re)? + ops::matmul(&x_im, &k_im)?)?;
        let y_im = (ops::matmul(&x_im, &k_re)? - ops::matmul(&x_re, &k_im)?)?;
        // Back: frequencies that stand for their mirror image as well count twice.
        let count = |j: usize| if j == 0 || 2 * j == b { 1.0 } else { 2.0 };
        let counts: Vec<f64> = (0..f).map(|j| count(j) / (b * i) as f64).collect();
        let counts_f1 = Tensor::from_vec(counts, (f, 1), &Device::Cpu)?.to_dtype(x_ti.dtype())?;
        let back = |table_bf: &Tensor| table_bf.t()?.contiguous()?.broadcast_mul(&counts_f1);
        let of_frequencies = |part: Tensor| part.permute((1, 2, 0))?.contiguous()?.reshape((rows * m, f));
        let y = (ops::matmul(&of_frequencies(y_re)?, &back(&cos_bf)?)?
            - ops::matmul(&of_frequencies(y_im)?, &back(&sin_bf)?)?)?;
        Ok(y.reshape((rows, m * b))?)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        // Of blocks as most sites have them.
        let b = self.config.block_size as usize;
        let f = b / 2 + 1;
        let (m, n) = (o.div_ceil(b), i.div_ceil(b));
        let row = Cost::new(2 * f * (i + o) + 4 * f * m * n, 2 * f * (m + n) + i + o);
        Some(AsWeight { map: self, row, weight: Cost::new(0, 2 * o * i), product_again: false })
    }
}

impl WeightMap for C3a {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        Ok((w_oi + change(tensors.get(KERNEL)?)?)?)
    }
}

/// The keys of `adapter_config.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct Layout {
    block_size: u32,
    block_size_pattern: BTreeMap<String, u32>,
    bias: String,
    init_weights: InitWeights,
}

/// How PEFT starts kernels: a distribution, or a flag that is set for 0.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum InitWeights {
    Flag(bool),
    Named(Distribution),
}

/// PEFT's names of distributions.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Distribution {
    XavierUniform,
    KaimingUniform,
    Gaussian,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            block_size: 256,
            block_size_pattern: BTreeMap::new(),
            bias: "none".to_owned(),
            init_weights: InitWeights::Named(Distribution::XavierUniform),
        }
    }
}

/// What `adapter_config.json` of a PEFT C3A says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let layout: Layout = foreign::parse(config)?;
    let own = foreign::by_pattern("block_size_pattern", layout.block_size, layout.block_size_pattern, modules)?;
    let start = match layout.init_weights {
        InitWeights::Flag(true) => Kernels::Zero,
        InitWeights::Named(Distribution::Gaussian) => Kernels::Gaussian,
        InitWeights::Named(Distribution::KaimingUniform) => Kernels::Kaiming,
        InitWeights::Flag(false) | InitWeights::Named(Distribution::XavierUniform) => Kernels::Xavier,
    };
    let params = json!({"block_size": layout.block_size, "block_size_pattern": own, "start": start});
    let params = params.as_object().cloned().unwrap_or_default();
    Ok((MethodRef { method: C3a::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn delta(x: &Tensor, kernel: &Tensor) -> Tensor {
        let (site, layout) = (attune_architecture::SiteId::new("q_proj"), attune_points::Layout::new());
        let cx = RowCx { site: &site, output: 0, dropout: None, layout: &layout, rows: None };
        let c3a = C3a { config: Config::default() };
        RowMap::graph(&c3a, x, &Locals::new("q_proj", [(KERNEL, kernel.clone())]), &cx).unwrap()
    }

    /// Even and odd widths: only even ones have a frequency that is its own mirror image beside 0.
    #[test]
    fn frequency_by_frequency_is_the_product_with_circulant_blocks() {
        for b in [1, 2, 3, 4, 7, 8] {
            let (x, kernel) = (normal("x", &[5, 3 * b]), normal("k", &[2, 3, b]));
            let expected = x.matmul(&change(&kernel).unwrap().t().unwrap()).unwrap();
            assert!(difference(&delta(&x, &kernel), &expected) < 1e-13, "{b}");
        }
    }

    #[test]
    fn each_row_of_a_block_is_the_one_before_rotated() {
        let kernel = Tensor::new(&[[[1.0f64, 2.0, 3.0]]], &Device::Cpu).unwrap();
        let found = (change(&kernel).unwrap() * 3.0).unwrap().to_vec2::<f64>().unwrap();
        let expected = [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [2.0, 3.0, 1.0]];
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!((found - expected).abs() < 1e-15);
        }
    }

    #[test]
    fn sizes_of_single_sites_are_checked_and_read_from_patterns() {
        let config = Config { block_size_pattern: BTreeMap::from([("q_proj".to_owned(), 0)]), ..Config::default() };
        let cx = BuildCx { steps: attune_spec::id::Step(1), domains: &[], words: None };
        let faults = C3a::build(config, &cx).map(|_| ()).unwrap_err();
        assert_eq!(faults[0].to_string(), "`block_size_pattern` has 0 for \"q_proj\"; expected 1 to 65536");
        let config = json!({"block_size": 8, "block_size_pattern": {"q_.*": 4}, "init_weights": true});
        let modules = ["layers.0.q_proj".to_owned(), "layers.0.k_proj".to_owned()];
        let (method, _) = from_peft(config.as_object().unwrap(), &modules).unwrap();
        assert_eq!(method.params["block_size_pattern"], json!({"layers.0.q_proj": 4}));
        assert_eq!(method.params["start"], "zero");
    }
}
