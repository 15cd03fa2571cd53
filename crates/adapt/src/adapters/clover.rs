//! A full matrix for each head of a projection, in the basis in which the head's rows are orthonormal: every direction that a head has is learned
//! in any mixture with its others, and none beyond; where heads shall be put to other uses, and what they read stays theirs.
//!
//! # Update
//! ```text
//! W_hi = R_h^T Q_hi                  Q Q^T = 1, of each block h of `block` rows               W'_hi = (R_h^T + D_h) Q_hi
//! W'_hi = (1 + D_h K_h) W_hi         K_h = (R_h^T)⁻¹                                          y_to  = x_ti W'_oi^T
//! ```
//!
//! # Symbols
//! `clover_D` the `D_h` as `[heads, block, block]`, f32, trained, 0 at the start. `clover_K` the `K_h`, of the same shape, never trained: with
//! them orthonormal rows need not be kept.
//!
//! # Cost
//! `o*block` parameters per linear, and as many numbers that never train beside them. Each pass makes `W'` twice, forward and reverse, at
//! `2 block o i` FLOPs each, and the gradient by it, `2 i o` FLOPs per token. A QR decomposition of each block before the first step.
//!
//! # Limits
//! With D = 0 it is the base, bit for bit. A block's rows stay in the span of its own; with a block as wide as the input it is any change.
//!
//! # Departures
//! Each linear is decomposed alone, as the authors' code does for queries and keys that are turned by position, for grouped values and for
//! MLPs: their product of values and outputs over a pair of linears is not here, nor are heads cut short. Biases stay as they are. A full matrix trains,
//! as in the code; the paper speaks of singular values.
//!
//! # Paper
//! CLOVER: Constrained Learning with Orthonormal Vectors for Eliminating Redundancy. Meng, Tang, Jiang, Zhang, 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap};
use attune_points::{Error, Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::linalg;
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::starts::{self, Start};
use crate::parts::{linears, orthogonal, own};

const D: &str = "clover_D";
const K: &str = "clover_K";

/// Rows of which one is this much shorter, beyond those before it, than another are no basis in 32 bits.
const LEAST: f64 = 1e-5;

/// Parameters of CLOVER.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rows of a block, which divide the output width: the width of a head.
    #[schemars(range(min = 1, max = 4096))]
    block: u32,
}

impl Default for Config {
    /// The width of a head in most models.
    fn default() -> Self {
        Self { block: 64 }
    }
}

pub(super) struct Clover {
    config: Config,
}

impl Method for Clover {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "CLOVER: Constrained Learning with Orthonormal Vectors for Eliminating Redundancy",
            authors: "Fanxu Meng, Pingzhi Tang, Fan Jiang, Muhan Zhang",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "o*block",
        merges: Merges::Weight,
        ..Card::new(
            "clover",
            Point::Adapter,
            "A full matrix for each head of a projection, in the basis in which the head's rows are orthonormal: every direction that \
             a head has is learned in any mixture with its others, and none beyond; where heads shall be put to other uses, and what \
             they read stays theirs.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Clover {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let d = self.config.block as usize;
        linears::attach(sites, |site, o, i| {
            if !o.is_multiple_of(d) {
                let message = format!("is {d}, which does not divide {o}, the output width of {}", site.id);
                return Err(Fault::new("block", message));
            }
            if d > i {
                let message = format!(
                    "is {d}, more rows than {} has inputs, {i}: they are no basis; expected {i} at most",
                    site.id
                );
                return Err(Fault::new("block", message));
            }
            let shape = [o / d, d, d];
            Ok(vec![TensorSpec::trained(D, shape), TensorSpec::fixed(K, shape)])
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let (d, (o, _)) = (self.config.block as usize, weight.shape());
        let mut lower = Vec::with_capacity(o / d);
        for block in 0..o / d {
            let rows_di = weight.rows(block * d..(block + 1) * d, DType::F64)?;
            let (_, r_dd) = linalg::qr(&rows_di.t()?.contiguous()?)?;
            let lengths = (0..d).map(|row| r_dd.get(row)?.get(row)?.to_scalar::<f64>());
            let lengths = lengths.collect::<candle_core::Result<Vec<f64>>>()?;
            let (least, most) = lengths.iter().fold((f64::MAX, 0.0f64), |(a, b), x| (a.min(*x), b.max(*x)));
            if least <= LEAST * most {
                let rows = block * d..(block + 1) * d;
                let message = format!(
                    "rows {} to {} of {} depend on each other, so they are no basis: expected a smaller `block`, or other targets",
                    rows.start,
                    rows.end - 1,
                    at.site
                );
                return Err(Error::Refused(message));
            }
            lower.push(r_dd.t()?.contiguous()?);
        }
        let k_hdd = orthogonal::inverse(&Tensor::stack(&lower, 0)?)?;
        starts::each(at, rng, |spec| if spec.local == K { Start::Is(k_hdd.clone()) } else { Start::Constant(0.0) })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(D)?.dtype())?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl WeightMap for Clover {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (o, i) = w_oi.dims2()?;
        let between_hdd = ops::matmul(tensors.get(D)?, tensors.get(K)?)?;
        let (h, d, _) = between_hdd.dims3()?;
        let w_hdi = w_oi.contiguous()?.reshape((h, d, i))?;
        Ok((w_oi + ops::matmul(&between_hdd, &w_hdi)?.reshape((o, i))?)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use candle_core::Device;

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn at(heads: usize, d: usize) -> Attachment {
        let shape = [heads, d, d];
        Attachment { site: SiteId::new("q"), tensors: vec![TensorSpec::trained(D, shape), TensorSpec::fixed(K, shape)] }
    }

    fn started(w: &Tensor, heads: usize, d: usize) -> attune_points::Result<Locals> {
        let clover = Clover { config: Config { block: d as u32 } };
        Ok(clover.init(&at(heads, d), w, &mut Rng::new(1, "init"))?.0)
    }

    /// `(Rᵀ + D) Q` head by head, by a decomposition of each.
    #[test]
    fn a_heads_matrix_is_between_it_and_its_orthonormal_rows() {
        let (w, d) = (normal("w", &[9, 7]), normal("d", &[3, 3, 3]));
        let k = started(&w, 3, 3).unwrap().get(K).unwrap().to_dtype(DType::F64).unwrap();
        let clover = Clover { config: Config { block: 3 } };
        let made = clover.graph(&w, &Locals::new("q", [(D, d.clone()), (K, k)])).unwrap();
        for head in 0..3 {
            let rows = w.narrow(0, 3 * head, 3).unwrap();
            let (q, r) = linalg::qr(&rows.t().unwrap().contiguous().unwrap()).unwrap();
            let core = (r.t().unwrap() + d.get(head).unwrap()).unwrap();
            let by_hand = core.matmul(&q.t().unwrap()).unwrap();
            // K is kept in 32 bits.
            assert!(largest(&(made.narrow(0, 3 * head, 3).unwrap() - by_hand).unwrap()) < 1e-5);
        }
    }

    #[test]
    fn rows_that_depend_on_each_other_are_refused_with_their_place() {
        let w = normal("w", &[4, 6]);
        let twice = Tensor::cat(&[&w, &w.narrow(0, 0, 2).unwrap(), &w.narrow(0, 0, 2).unwrap()], 0).unwrap();
        assert!(started(&twice, 4, 2).is_ok());
        let error = started(&twice, 2, 4).unwrap_err().to_string();
        assert!(error.starts_with("rows 4 to 7 of q depend on each other"), "{error}");
        let nothing = Tensor::zeros((2, 6), DType::F64, &Device::Cpu).unwrap();
        assert!(started(&nothing, 1, 2).is_err());
    }
}
