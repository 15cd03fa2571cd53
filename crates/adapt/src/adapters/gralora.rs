//! A grid of low-rank changes, one for each block of a frozen weight: more rank than LoRA at the same number of parameters, and an
//! outlier among the inputs spoils the gradients of its own blocks only.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · (Σ_n x_tn A_nj B_jn for each j) + s · (x_ti A'_hi^T) B'_oh^T
//! s    = alpha / (r + h)                               n and j < k: blocks of inputs and of outputs
//! A_nj = columns j r/k .. of A_n,  B_jn = rows n r/k .. of B_j
//! ```
//!
//! # Symbols
//! `gralora_A` `A_n` as `[k, i / k, r]`, `gralora_B` `B_j` as `[k, r, o / k]`; where `hybrid` h > 0, `gralora_A_general` `A'_hi` and
//! `gralora_B_general` `B'_oh`, a LoRA of the whole; f32, trained. A starts uniform in ±1/sqrt(i / k), A' in ±1/sqrt(i), the others at
//! 0. `blocks` k. Dropout on the component's input.
//!
//! # Cost
//! `(r + h)*(i+o)` parameters per linear; `2 (r + h) (i+o)` extra FLOPs per token, as for LoRA.
//! Rows are cut and turned around in memory for products that are small. Where it costs less, and nothing is dropped, a pass makes another
//! weight in place of it, forward and in reverse, and the gradient by it.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. With k = 1 and h = 0 it is LoRA. The change has rank k r + h at most, each of its blocks r / k.
//!
//! # Departures
//! none; agrees with PEFT.
//!
//! # Paper
//! GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning. Jung, Ahn, Kim, Kim, Park, 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{
    Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, RowCx, RowMap, WeightMap,
};
use attune_points::forms::{AsWeight, Cost};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::dropout::dropped;
use crate::parts::keys::{self, Keys};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, linears};

const A: &str = "gralora_A";
const B: &str = "gralora_B";
const GENERAL_A: &str = "gralora_A_general";
const GENERAL_B: &str = "gralora_B_general";

/// Parameters of GraLoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the LoRA that has as many parameters as the grid; a multiple of `blocks`.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Blocks along the inputs, and as many along the outputs; divides both widths.
    #[schemars(range(min = 1, max = 256))]
    blocks: u32,
    /// Rank of a LoRA of the whole weight beside the grid; 0 for none.
    #[schemars(range(min = 0, max = 4096))]
    hybrid: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { rank: 32, blocks: 2, hybrid: 0, alpha: 64.0, dropout: 0.0 }
    }
}

pub(super) struct Gralora {
    config: Config,
}

impl Method for Gralora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
            authors: "Yeonjoon Jung, Daehyun Ahn, Hyungjun Kim, Taesu Kim, Eunhyeok Park",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "(rank + hybrid)*(i+o)",
        merges: Merges::Factors,
        peft_type: Some("GRALORA"),
        rules: &[Rule {
            when: "true",
            require: "floor(rank/blocks) == rank/blocks",
            message: "is not a multiple of blocks; each block of a grid has a whole rank",
            path: "rank",
        }],
        ..Card::new(
            "gralora",
            Point::Adapter,
            "A grid of low-rank changes, one for each block of a frozen weight: more rank than LoRA at the same number of parameters, \
             and an outlier among the inputs spoils the gradients of its own blocks only.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Gralora {
    fn scale(&self) -> f64 {
        self.config.alpha / f64::from(self.config.rank + self.config.hybrid)
    }
}

impl Adapter for Gralora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { rank, blocks, hybrid, .. } = self.config;
        let (k, h) = (blocks as usize, hybrid as usize);
        linears::attach(sites, |site, o, i| {
            let r = factors::within(rank, site, (o, i))?;
            if !o.is_multiple_of(k) || !i.is_multiple_of(k) {
                let message = format!("is {k}, which does not divide the widths {o} and {i} of {}", site.id);
                return Err(Fault::new("blocks", message));
            }
            let mut tensors = vec![TensorSpec::trained(A, [k, i / k, r]), TensorSpec::trained(B, [k, r, o / k])];
            if h > 0 {
                tensors.push(TensorSpec::trained(GENERAL_A, [h, i]));
                tensors.push(TensorSpec::trained(GENERAL_B, [o, h]));
            }
            Ok(tensors)
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| match spec.local {
            // Its inputs are in the middle.
            A => Start::Uniform(1.0 / (spec.shape[1] as f64).sqrt()),
            GENERAL_A => Start::kaiming(spec),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let (a, b) = (tensors.get(A)?, tensors.get(B)?);
        let one = |n: usize| Tensor::eye(n, a.dtype(), a.device());
        // What the two halves do to the rows of the identity are their factors.
        let mut right = vec![down(&one(weight.shape().1)?, a)?.t()?];
        let mut left = vec![up(&one(a.dim(0)? * a.dim(2)?)?, b)?.t()?];
        if self.config.hybrid > 0 {
            right.push(tensors.get(GENERAL_A)?.clone());
            left.push(tensors.get(GENERAL_B)?.clone());
        }
        Ok(Merged::Factors { left: Tensor::cat(&left, 1)?, right: Tensor::cat(&right, 0)?, scale: self.scale() })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, blocks, hybrid, alpha, dropout } = self.config;
        let config = keys::written(
            Self::CARD.peft_type.unwrap_or_default(),
            [
                ("r", json!(rank)),
                ("hybrid_r", json!(hybrid)),
                ("gralora_k", json!(blocks)),
                ("alpha", keys::number(alpha)),
                ("gralora_dropout", json!(dropout)),
                ("fan_in_fan_out", json!(false)),
                ("bias", json!("none")),
                ("init_weights", json!(true)),
            ],
        );
        let whole = vec![(GENERAL_A, "gralora_A_general.weight"), (GENERAL_B, "gralora_B_general.weight")];
        Some(Peft { config, tensors: PeftTensors::Each(whole) })
    }
}

/// Rows through A, block by block: `[T, (n, r)]`.
fn down(x_ti: &Tensor, a_nir: &Tensor) -> attune_points::Result<Tensor> {
    let ((k, width, r), t) = (a_nir.dims3()?, x_ti.dim(0)?);
    let x_nti = x_ti.reshape((t, k, width))?.transpose(0, 1)?.contiguous()?;
    Ok(ops::matmul(&x_nti, a_nir)?.transpose(0, 1)?.contiguous()?.reshape((t, k * r))?)
}

/// Rows `[T, (n, j, r / k)]` through B: the numbers j of each n to block j.
fn up(h_tr: &Tensor, b_jro: &Tensor) -> attune_points::Result<Tensor> {
    let ((k, r, width), t) = (b_jro.dims3()?, h_tr.dim(0)?);
    let h_jtr = h_tr.reshape((t, k, k, r / k))?.permute((2, 0, 1, 3))?.contiguous()?.reshape((k, t, r))?;
    Ok(ops::matmul(&h_jtr, b_jro)?.transpose(0, 1)?.contiguous()?.reshape((t, k * width))?)
}

impl RowMap for Gralora {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let (x_ti, scale) = (dropped(x_ti, self.config.dropout, cx)?, self.scale());
        let grid_to = up(&(down(&x_ti, tensors.get(A)?)? * scale)?, tensors.get(B)?)?;
        if self.config.hybrid == 0 {
            return Ok(grid_to);
        }
        let h_th = (ops::linear(&x_ti, tensors.get(GENERAL_A)?, None)? * scale)?;
        Ok((grid_to + ops::linear(&h_th, tensors.get(GENERAL_B)?, None)?)?)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        let Config { rank, blocks, hybrid, dropout, .. } = self.config;
        let (r, k, h) = (rank as usize, blocks as usize, hybrid as usize);
        let row = Cost::new((r + h) * (o + i), o + i + 3 * k * r);
        let weight = Cost::new((r.div_ceil(k) + h) * o * i, 2 * o * i);
        (dropout == 0.0).then_some(AsWeight { map: self, row, weight, product_again: false })
    }
}

impl WeightMap for Gralora {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (a_nir, b_jro) = (tensors.get(A)?, tensors.get(B)?);
        let (k, i, r) = a_nir.dims3()?;
        let (o, s) = (b_jro.dim(2)?, r / k);
        // The numbers s of each n go to block j, from block j of those of A's block n: one product for each block of the weight.
        let left = b_jro.reshape((k * k, s, o))?.transpose(1, 2)?.contiguous()?;
        let right = a_nir.reshape((k, i, k, s))?.permute((2, 0, 3, 1))?.contiguous()?.reshape((k * k, s, i))?;
        let blocks = ops::matmul(&(left * self.scale())?, &right)?.reshape((k, k, o, i))?;
        let grid_oi = blocks.permute((0, 2, 1, 3))?.contiguous()?.reshape((k * o, k * i))?;
        let made = (w_oi + grid_oi)?;
        if self.config.hybrid == 0 {
            return Ok(made);
        }
        let general_oh = (tensors.get(GENERAL_B)? * self.scale())?;
        Ok((made + ops::matmul(&general_oh, tensors.get(GENERAL_A)?)?)?)
    }
}

/// What `adapter_config.json` of a PEFT GraLoRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let own = Config::default();
    let params = [
        ("rank", json!(keys.get("r", own.rank))),
        ("blocks", json!(keys.get("gralora_k", own.blocks))),
        ("hybrid", json!(keys.get("hybrid_r", own.hybrid))),
        ("alpha", json!(keys.get("alpha", own.alpha))),
        ("dropout", json!(keys.get("gralora_dropout", own.dropout))),
    ];
    keys.finish()?;
    let params = params.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Ok((MethodRef { method: Gralora::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::Layout;
    use candle_core::DType;

    use super::*;

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    /// What is added, and the change by hand: block by block, and of the whole.
    fn both(blocks: usize, hybrid: usize) -> (Tensor, Tensor) {
        let (k, r, o, i) = (blocks, 6, 12, 18);
        let config = Config { rank: 6, blocks: k as u32, hybrid: hybrid as u32, alpha: 3.0, dropout: 0.0 };
        let gralora = Gralora { config };
        let (a, b) = (tensor("a", &[k, i / k, r]), tensor("b", &[k, r, o / k]));
        let mut tensors = vec![(A, a.clone()), (B, b.clone())];
        let mut change = Tensor::zeros((o, i), DType::F64, a.device()).unwrap();
        if hybrid > 0 {
            let (a, b) = (tensor("ga", &[hybrid, i]), tensor("gb", &[o, hybrid]));
            change = b.matmul(&a).unwrap();
            tensors.extend([(GENERAL_A, a), (GENERAL_B, b)]);
        }
        let rows: Vec<Tensor> = (0..k)
            .map(|j| {
                let block = |n: usize| {
                    let a = a.get(n).unwrap().narrow(1, j * r / k, r / k).unwrap();
                    let b = b.get(j).unwrap().narrow(0, n * r / k, r / k).unwrap();
                    a.contiguous().unwrap().matmul(&b.contiguous().unwrap()).unwrap().t().unwrap()
                };
                Tensor::cat(&(0..k).map(block).collect::<Vec<_>>(), 1).unwrap()
            })
            .collect();
        change = ((change + Tensor::cat(&rows, 0).unwrap()).unwrap() * (3.0 / (6 + hybrid) as f64)).unwrap();
        let (site, layout, locals) = (SiteId::new("up"), Layout::new(), Locals::new("up", tensors));
        let x = tensor("x", &[5, i]);
        let cx = RowCx { site: &site, output: o, dropout: None, layout: &layout, rows: None };
        let added = RowMap::graph(&gralora, &x, &locals, &cx).unwrap();
        let at = Attachment { site: site.clone(), tensors: vec![] };
        let Merged::Factors { left, right, scale } = gralora.merge(&at, &locals, &change).unwrap() else { panic!() };
        assert!(largest(&((left.matmul(&right).unwrap() * scale).unwrap() - &change).unwrap()) < 1e-12);
        (added, x.matmul(&change.t().unwrap()).unwrap())
    }

    #[test]
    fn each_block_has_its_own_share_of_the_factors() {
        for (blocks, hybrid) in [(1, 0), (2, 0), (3, 0), (2, 1), (3, 4)] {
            let (added, by_hand) = both(blocks, hybrid);
            assert!(largest(&(added - by_hand).unwrap()) < 1e-12, "{blocks} blocks, hybrid {hybrid}");
        }
    }
}
