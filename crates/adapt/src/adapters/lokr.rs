//! A Kronecker product beside each frozen weight, its second factor low-rank: a change of full rank from the fewest numbers; for
//! many small adapters, and for changes that repeat a pattern.
//!
//! # Update
//! ```text
//! y_to     = x_ti W_oi^T + s · x_ti (C ⊗ D)^T          o = (a, c), i = (b, d):   (C ⊗ D)_oi = C_ab D_cd        s = alpha / r
//! y_t(ac) += s · Σ_b C_ab Σ_d D_cd x_t(bd)
//! D_cd     = E_cr F_rd   where r < max(c, d) / 2       C_ab = G_ar H_rb   where decompose_both and r < max(a, b) / 2
//! ```
//!
//! # Symbols
//! `lokr_w1` `C_ab`, or `lokr_w1_a` `G_ar` and `lokr_w1_b` `H_rb`; `lokr_w2` `D_cd`, or `lokr_w2_a` `E_cr` and `lokr_w2_b` `F_rd`; f32,
//! trained. C and G start at 0, the others uniform in ±1/sqrt of their last width. `a` is `factor` where it divides o, else the
//! largest divisor of o below it and below sqrt(o); `b` in the same way for i.
//!
//! # Cost
//! `a*b + r*(c+d)` parameters per linear, or those of factors that are whole or both low-rank. A row costs `2 (i c + o b)` FLOPs at
//! most, and is turned around in memory between two small products. Where it costs less, a pass makes the product in place of it, forward
//! and in reverse, and the gradient by it.
//!
//! # Limits
//! With C = 0 or G = 0 it is the base, bit for bit. With a factor of 1 it is LoRA, or the whole weight.
//!
//! # Departures
//! none; agrees with PEFT on linears (there it has no transposed ones, as GPT-2's are), whose dropouts of whole outputs and of whole
//! sites it does not have. `factor` 0 is its `decompose_factor` -1. Its `rank_pattern` and `alpha_pattern` name whole paths.
//!
//! # Paper
//! Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation. Yeh, Hsieh, Gao, Yang, Oh, Gong, 2024.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{
    Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, RowCx, RowMap, WeightMap,
};
use attune_points::forms::{AsWeight, Cost};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::expression::divisor;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::keys::{self, Keys};
use crate::parts::linears;
use crate::parts::scaling::{self, Scaling};
use crate::parts::starts::{self, Start};

/// The first factor: whole, or a product of two.
const C: [&str; 3] = ["lokr_w1", "lokr_w1_a", "lokr_w1_b"];
/// The second one.
const D: [&str; 3] = ["lokr_w2", "lokr_w2_a", "lokr_w2_b"];

/// Parameters of LoKr.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the second factor, where that is less than half of its longer side; else it is whole.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// How long the sides of the first factor are, as far as they divide the widths; 0 for as near to their roots as they can be.
    #[schemars(range(min = 0, max = 65536))]
    factor: u32,
    /// Makes the first factor low-rank too, where that is smaller.
    decompose_both: bool,
    /// Rank at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    rank_pattern: BTreeMap<String, u32>,
    /// Alpha at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    alpha_pattern: BTreeMap<String, f64>,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 8.0,
            factor: 0,
            decompose_both: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

pub(super) struct Lokr {
    scaling: Scaling,
    factor: u32,
    decompose_both: bool,
    /// The map of each site that has a scaling of its own.
    own: BTreeMap<String, Kronecker>,
    /// The map of all others.
    map: Kronecker,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Kronecker {
    scale: f64,
    /// As the configuration has it.
    factor: u32,
}

impl Method for Lokr {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
            authors: "Shih-Ying Yeh, Yu-Guan Hsieh, Zhidong Gao, Bernard B W Yang, Giyeong Oh, Yanmin Gong",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "if(decompose_both and 2*rank < max(divisor(o, factor), divisor(i, factor)), \
                     rank*(divisor(o, factor) + divisor(i, factor)), divisor(o, factor)*divisor(i, factor)) \
                     + if(2*rank < max(o/divisor(o, factor), i/divisor(i, factor)), \
                     rank*(o/divisor(o, factor) + i/divisor(i, factor)), o/divisor(o, factor)*i/divisor(i, factor))",
        merges: Merges::Weight,
        peft_type: Some("LOKR"),
        ..Card::new(
            "lokr",
            Point::Adapter,
            "A Kronecker product beside each frozen weight, its second factor low-rank: a change of full rank from the fewest \
             numbers; for many small adapters, and for changes that repeat a pattern.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let Config { rank, alpha, factor, decompose_both, rank_pattern, alpha_pattern } = config;
        let scaling = Scaling { rank, alpha, rslora: false, ranks: rank_pattern, alphas: alpha_pattern };
        let faults = scaling.faults();
        if !faults.is_empty() {
            return Err(faults);
        }
        let map = |scale| Kronecker { scale, factor };
        Ok(Box::new(Self { own: scaling.own(map), map: map(scaling.factor()), scaling, factor, decompose_both }))
    }
}

impl Lokr {
    fn map_at(&self, site: &str) -> &Kronecker {
        self.own.get(site).unwrap_or(&self.map)
    }
}

/// A factor of this shape: whole, or a product of two of this rank if that is less than half of its longer side.
fn factor(names: [&'static str; 3], (rows, cols): (usize, usize), rank: usize, low: bool) -> Vec<TensorSpec> {
    let [whole, left, right] = names;
    if low && 2 * rank < rows.max(cols) {
        vec![TensorSpec::trained(left, [rows, rank]), TensorSpec::trained(right, [rank, cols])]
    } else {
        vec![TensorSpec::trained(whole, [rows, cols])]
    }
}

/// A factor, however it is held.
fn matrix(tensors: &Locals, [whole, left, right]: [&str; 3]) -> attune_points::Result<Tensor> {
    if tensors.iter().any(|(name, _)| name == whole) {
        return Ok(tensors.get(whole)?.clone());
    }
    Ok(ops::matmul(tensors.get(left)?, tensors.get(right)?)?)
}

impl Adapter for Lokr {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        linears::attach(sites, |site, o, i| {
            let rank = self.scaling.rank_at(site.id.as_str()) as usize;
            let side = |width: usize| divisor(width as u64, u64::from(self.factor)) as usize;
            let (a, b) = (side(o), side(i));
            let first = factor(C, (a, b), rank, self.decompose_both);
            Ok(first.into_iter().chain(factor(D, (o / a, i / b), rank, true)).collect())
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let [whole, left, _] = C;
        starts::each(at, rng, |spec| {
            if [whole, left].contains(&spec.local) { Start::Constant(0.0) } else { Start::kaiming(spec) }
        })
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        Port::Delta(self.map_at(at.site.as_str()))
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let change_oi = self.map_at(at.site.as_str()).product(tensors)?;
        Ok(Merged::Weight { weight: (weight.dense(change_oi.dtype())? + change_oi)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let factor = if self.factor == 0 { -1 } else { i64::from(self.factor) };
        let config = keys::written(
            Self::CARD.peft_type.unwrap_or_default(),
            [
                ("r", json!(self.scaling.rank)),
                ("alpha", keys::number(self.scaling.alpha)),
                ("rank_pattern", json!(self.scaling.ranks)),
                ("alpha_pattern", keys::numbers(&self.scaling.alphas)),
                ("decompose_both", json!(self.decompose_both)),
                ("decompose_factor", json!(factor)),
                ("rank_dropout", json!(0.0)),
                ("rank_dropout_scale", json!(false)),
                ("module_dropout", json!(0.0)),
                ("use_effective_conv2d", json!(false)),
                ("init_weights", json!(true)),
            ],
        );
        Some(Peft { config, tensors: PeftTensors::Each(Vec::new()) })
    }
}

impl Kronecker {
    /// `s · C ⊗ D`.
    fn product(&self, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (c_ab, d_cd) = (matrix(tensors, C)?, (matrix(tensors, D)? * self.scale)?);
        Ok(ops::kronecker(&c_ab, &d_cd)?)
    }
}

impl RowMap for Kronecker {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let (t, c_ab) = (x_ti.dim(0)?, matrix(tensors, C)?);
        let (a, b) = c_ab.dims2()?;
        let x = x_ti.reshape((t * b, x_ti.dim(1)? / b))?;
        let h = if tensors.iter().any(|(name, _)| name == D[0]) {
            ops::linear(&x, tensors.get(D[0])?, None)?
        } else {
            ops::linear(&ops::linear(&x, tensors.get(D[2])?, None)?, tensors.get(D[1])?, None)?
        };
        // [t b, c] to [t c, b], times C: [t c, a], to [t, a c].
        let c = h.dim(1)?;
        let h = h.reshape((t, b, c))?.transpose(1, 2)?.contiguous()?.reshape((t * c, b))?;
        let y = ops::linear(&h, &(c_ab * self.scale)?, None)?;
        Ok(y.reshape((t, c, a))?.transpose(1, 2)?.contiguous()?.reshape((t, a * c))?)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        let side = |width: usize| divisor(width as u64, u64::from(self.factor)).max(1) as usize;
        let (a, b) = (side(o), side(i));
        let c = o / a;
        // A row is turned around before and behind the product with C.
        let row = Cost::new(c * i + c * b * a, c * b + 2 * o);
        Some(AsWeight { map: self, row, weight: Cost::new(0, 2 * o * i), product_again: false })
    }
}

impl WeightMap for Kronecker {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        Ok((w_oi + self.product(tensors)?)?)
    }
}

/// What `adapter_config.json` of a PEFT LoKr says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    keys.no_dropout("rank_dropout");
    keys.no_dropout("module_dropout");
    let mut params = scaling::from_keys(&mut keys, (8, 8.0), ["alpha", "alpha_pattern"], modules);
    // What is neither positive nor -1 leaves the widths whole there.
    let factor = match keys.get("decompose_factor", -1i64) {
        -1 => 0,
        factor => factor.max(1),
    };
    params.insert("factor".to_owned(), json!(factor));
    params.insert("decompose_both".to_owned(), json!(keys.get("decompose_both", false)));
    keys.finish()?;
    Ok((MethodRef { method: Lokr::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
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

    #[test]
    fn rows_are_those_of_the_kronecker_product_by_its_entries() {
        let whole = [(C[0], vec![3, 2]), (D[0], vec![4, 5])];
        let low = [(C[1], vec![3, 1]), (C[2], vec![1, 2]), (D[1], vec![4, 2]), (D[2], vec![2, 5])];
        for shapes in [whole.to_vec(), low.to_vec()] {
            let locals = Locals::new("up", shapes.iter().map(|(name, shape)| (*name, tensor(name, shape))));
            let (map, x) = (Kronecker { scale: 1.5, factor: 0 }, tensor("x", &[6, 10]));
            let (site, layout) = (SiteId::new("up"), Layout::new());
            let cx = RowCx { site: &site, output: 12, dropout: None, layout: &layout, rows: None };
            let found = RowMap::graph(&map, &x, &locals, &cx).unwrap();
            let product = map.product(&locals).unwrap();
            let c = matrix(&locals, C).unwrap().to_vec2::<f64>().unwrap();
            let d = matrix(&locals, D).unwrap().to_vec2::<f64>().unwrap();
            for (o, row) in product.to_vec2::<f64>().unwrap().iter().enumerate() {
                for (i, value) in row.iter().enumerate() {
                    assert!((value - 1.5 * c[o / 4][i / 5] * d[o % 4][i % 5]).abs() < 1e-12);
                }
            }
            let off = (found - x.matmul(&product.t().unwrap()).unwrap()).unwrap().abs().unwrap();
            assert!(off.flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap() < 1e-12);
        }
    }

    #[test]
    fn a_factor_is_low_rank_where_that_is_less_than_half_of_its_longer_side() {
        let locals = |rank, low| factor(D, (6, 8), rank, low).iter().map(|spec| spec.local).collect::<Vec<_>>();
        assert_eq!(locals(3, true), D[1..]);
        assert_eq!(locals(4, true), D[..1]);
        assert_eq!(locals(3, false), D[..1]);
    }

    #[test]
    fn the_factor_of_a_peft_folder_keeps_its_meaning() {
        for (theirs, ours) in [(-1, 0), (0, 1), (4, 4)] {
            let config = json!({"peft_type": "LOKR", "decompose_factor": theirs, "decompose_both": true});
            let (method, _) = from_peft(config.as_object().unwrap(), &["q_proj".to_owned()]).unwrap();
            assert_eq!((&method.params["factor"], &method.params["decompose_both"]), (&json!(ours), &json!(true)));
        }
    }
}
