//! The elementwise product of two low-rank matrices beside each frozen weight: at LoRA's number of parameters it reaches the square
//! of half the rank; for changes that no small rank holds.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · x_ti ((P_or A_ri) ⊙ (Q_or B_ri))^T           s = alpha / r
//!      = x_ti W_oi^T + s · (x_ti (A ∘ B)_ni^T) (P ∘ Q)_on^T             n < r²: products of two numbers of a row (a column)
//! ```
//!
//! # Symbols
//! `hada_w1_a` `P_or`, `hada_w1_b` `A_ri`, `hada_w2_a` `Q_or`, `hada_w2_b` `B_ri`, f32, trained. P and Q start uniform in ±1/sqrt(r),
//! A in ±1/sqrt(i), B at 0.
//!
//! # Cost
//! `2*r*(i+o)` parameters per linear. Rows go through the factors of rank r², `2 r² (i+o)` FLOPs a token, where these are cheaper than
//! the weight, `r² (i+o) < i*o`; else, or where that costs less, each pass makes the new weight of the
//! site and the gradient by it.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. With P A = 1 it is LoRA. The change has rank r² at most, and reaches it.
//!
//! # Departures
//! none; agrees with PEFT on linears (there it has no transposed ones, as GPT-2's are), whose dropouts of whole outputs and of whole
//! sites it does not have. Its `rank_pattern` and `alpha_pattern` name whole paths.
//!
//! # Paper
//! FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning. Hyeon-Woo, Ye-Bin, Oh, 2022.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{
    Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, RowCx, RowMap, WeightMap,
};
use attune_points::forms::{AsWeight, Cost};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::hadamard::{Pairs, thin};
use crate::parts::keys::{self, Keys};
use crate::parts::scaling::{self, Scaling};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, linears};

const P: &str = "hada_w1_a";
const A: &str = "hada_w1_b";
const Q: &str = "hada_w2_a";
const B: &str = "hada_w2_b";

/// Parameters of LoHa.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of each of the two products.
    #[schemars(range(min = 1, max = 1024))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
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
        Self { rank: 8, alpha: 8.0, rank_pattern: BTreeMap::new(), alpha_pattern: BTreeMap::new() }
    }
}

pub(super) struct Loha {
    scaling: Scaling,
    /// The map of each site that has a scaling of its own.
    own: BTreeMap<String, Product>,
    /// The map of all others.
    map: Product,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Product {
    scale: f64,
    /// That of most sites.
    rank: usize,
}

impl Method for Loha {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
            authors: "Nam Hyeon-Woo, Moon Ye-Bin, Tae-Hyun Oh",
            year: 2022,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "2*rank*(i+o)",
        merges: Merges::Factors,
        peft_type: Some("LOHA"),
        ..Card::new(
            "loha",
            Point::Adapter,
            "The elementwise product of two low-rank matrices beside each frozen weight: at LoRA's number of parameters it reaches \
             the square of half the rank; for changes that no small rank holds.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let Config { rank, alpha, rank_pattern, alpha_pattern } = config;
        let scaling = Scaling { rank, alpha, rslora: false, ranks: rank_pattern, alphas: alpha_pattern };
        let faults = scaling.faults();
        if !faults.is_empty() {
            return Err(faults);
        }
        let map = |scale| Product { scale, rank: scaling.rank as usize };
        Ok(Box::new(Self { own: scaling.own(map), map: map(scaling.factor()), scaling }))
    }
}

impl Loha {
    fn map_at(&self, site: &str) -> &Product {
        self.own.get(site).unwrap_or(&self.map)
    }

    /// Whether rows go through factors at a site, instead of through another weight.
    fn is_thin(at: &Attachment) -> bool {
        match at.tensors.as_slice() {
            [p, a, ..] => thin(p.shape[1] * p.shape[1], (p.shape[0], a.shape[1])),
            _ => false,
        }
    }
}

impl Adapter for Loha {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        linears::attach(sites, |site, o, i| {
            let rank = self.scaling.rank_at(site.id.as_str());
            let r = factors::within(rank, site, (o, i))?;
            let product = |left, right| [TensorSpec::trained(left, [o, r]), TensorSpec::trained(right, [r, i])];
            Ok(product(P, A).into_iter().chain(product(Q, B)).collect())
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| if spec.local == B { Start::Constant(0.0) } else { Start::kaiming(spec) })
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        let map = self.map_at(at.site.as_str());
        if Self::is_thin(at) { Port::Delta(map) } else { Port::Weight(map) }
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let map = self.map_at(at.site.as_str());
        if Self::is_thin(at) {
            let (left, right) = Pairs::of(tensors, [P, A, Q, B])?.factors()?;
            return Ok(Merged::Factors { left, right, scale: map.scale });
        }
        let w_oi = weight.dense(tensors.get(P)?.dtype())?;
        Ok(Merged::Weight { weight: WeightMap::graph(map, &w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let config = keys::written(
            Self::CARD.peft_type.unwrap_or_default(),
            [
                ("r", json!(self.scaling.rank)),
                ("alpha", keys::number(self.scaling.alpha)),
                ("rank_pattern", json!(self.scaling.ranks)),
                ("alpha_pattern", keys::numbers(&self.scaling.alphas)),
                ("rank_dropout", json!(0.0)),
                ("module_dropout", json!(0.0)),
                ("use_effective_conv2d", json!(false)),
                ("init_weights", json!(true)),
            ],
        );
        Some(Peft { config, tensors: PeftTensors::Each(Vec::new()) })
    }
}

impl RowMap for Product {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        Pairs::of(tensors, [P, A, Q, B])?.rows(x_ti, self.scale)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        let r = self.rank;
        let (row, weight) = (Cost::new(r * r * (o + i), 0), Cost::new(2 * r * o * i, o * i));
        Some(AsWeight { map: self, row, weight, product_again: false })
    }
}

impl WeightMap for Product {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        Ok((w_oi + (Pairs::of(tensors, [P, A, Q, B])?.dense()? * self.scale)?)?)
    }
}

/// What `adapter_config.json` of a PEFT LoHa says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    keys.no_dropout("rank_dropout");
    keys.no_dropout("module_dropout");
    let params = scaling::from_keys(&mut keys, (8, 8.0), ["alpha", "alpha_pattern"], modules);
    keys.finish()?;
    Ok((MethodRef { method: Loha::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::Layout;
    use candle_core::DType;

    use super::*;

    fn locals(rank: usize) -> Locals {
        let tensor =
            |name: &str, shape: [usize; 2]| Rng::new(1, name).normal_tensor(&shape[..], 1.0, DType::F64).unwrap();
        let tensors = [(P, [6, rank]), (A, [rank, 5]), (Q, [6, rank]), (B, [rank, 5])];
        Locals::new("q_proj", tensors.map(|(name, shape)| (name, tensor(name, shape))))
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn rows_through_factors_are_rows_through_the_weight() {
        let (locals, map) = (locals(2), Product { scale: 1.5, rank: 2 });
        let (x, w) = (
            Rng::new(1, "x").normal_tensor(&[4, 5][..], 1.0, DType::F64).unwrap(),
            Rng::new(1, "w").normal_tensor(&[6, 5][..], 1.0, DType::F64).unwrap(),
        );
        let (site, layout) = (SiteId::new("q_proj"), Layout::new());
        let cx = RowCx { site: &site, output: 6, dropout: None, layout: &layout, rows: None };
        let added = RowMap::graph(&map, &x, &locals, &cx).unwrap();
        let change = (WeightMap::graph(&map, &w, &locals).unwrap() - &w).unwrap();
        assert!(largest(&(added - x.matmul(&change.t().unwrap()).unwrap()).unwrap()) < 1e-12);
    }

    #[test]
    fn with_a_first_product_of_ones_it_is_lora() {
        let locals = locals(1);
        let ones = |x: &Tensor| x.ones_like().unwrap();
        let (q, b) = (locals.get(Q).unwrap().clone(), locals.get(B).unwrap().clone());
        let (p, a) = (ones(locals.get(P).unwrap()), ones(locals.get(A).unwrap()));
        let lora = (q.matmul(&b).unwrap() * 3.0).unwrap();
        let locals = Locals::new("q_proj", [(P, p), (A, a), (Q, q), (B, b)]);
        let made = WeightMap::graph(&Product { scale: 3.0, rank: 2 }, &lora.zeros_like().unwrap(), &locals).unwrap();
        assert!(largest(&(made - lora).unwrap()) < 1e-12);
    }

    #[test]
    fn what_peft_asks_for_beyond_it_is_refused() {
        let config = json!({"peft_type": "LOHA", "r": 4, "alpha": 2, "rank_dropout": 0.1, "module_dropout": 0.0});
        let faults = from_peft(config.as_object().unwrap(), &["q_proj".to_owned()]).unwrap_err();
        assert!(
            faults[0].to_string().starts_with("`rank_dropout` is 0.1, a dropout that is not known here"),
            "{faults:?}"
        );
    }
}
