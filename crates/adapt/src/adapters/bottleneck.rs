//! A small network after attention and MLP, or beside them: down, an activation, up, added to what the block gives.
//!
//! # Update
//! ```text
//! Δ_td  = up(f(down(h_td)))                       h = y, what the block gives; x, what it reads, where `parallel`
//! y'_td = y_td + scale · Δ_td                     composition: scaled
//! y'_td = y_td + factor · Δ_td                    composition: learned
//! y'_td = (1 - gate) · y_td + gate · Δ_td         composition: gated
//! down: D to r, up: r to D, r = width, or D / reduction where no width is given
//! ```
//!
//! # Symbols
//! `down` `[r, D]`, `down_bias` `[r]`, `up` `[D, r]`, `up_bias` `[D]`, `factor` `[1]` or `gate` `[1]` where one is learned; f32,
//! trained. `f` is the activation, behind which a share `dropout` of the values is dropped in training. `down` starts uniform within
//! `1/√D`, `factor` at `scale`, all else at 0; with a gate, `up` starts uniform within `1/√r`.
//!
//! # Cost
//! `2*i*r + r + i` parameters a block, and one more with a factor or a gate. It does not merge.
//!
//! # Limits
//! With `up` and its bias at 0 it is the base, and so it is with a gate of 0. Beside a block and with `activation: identity` it is a
//! low-rank change of the block as a whole: LoRA with a factor of `scale`.
//!
//! # Departures
//! The authors start both maps near 0; here the upper one is 0, so that the start is the base to the bit. Norms and a head are
//! not trained along with it. With targets `mlp` alone it is Pfeiffer's; `parallel` with targets `mlp`, `width: 512` and `scale: 4`
//! is the MLP's half of MAM, which the recipe of that name makes.
//!
//! # Paper
//! Parameter-Efficient Transfer Learning for NLP. Houlsby et al., 2019; beside the block: Towards a Unified View of
//! Parameter-Efficient Transfer Learning. He et al., 2022.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, BranchMap, Merged, Peft, Port, RowCx};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{self, BuildCx, Card, Category, Merges, Method, Paper, Point, Rule};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::starts::{self, Start};
use crate::parts::{blocks, own};

const DOWN: &str = "down";
const DOWN_BIAS: &str = "down_bias";
const UP: &str = "up";
const UP_BIAS: &str = "up_bias";
const FACTOR: &str = "factor";
const GATE: &str = "gate";

/// What stands between the two maps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Between {
    /// `max(x, 0)`.
    #[default]
    Relu,
    /// `x Φ(x)`.
    Gelu,
    /// `x sigmoid(x)`.
    Silu,
    /// The hyperbolic tangent.
    Tanh,
    /// Nothing: the two maps are a product of thin matrices.
    Identity,
}

/// How what it makes and what the block gives become one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Composition {
    /// It is added, times `scale`.
    #[default]
    Scaled,
    /// It is added, times a number that trains and starts at `scale`.
    Learned,
    /// It takes the block's place in part, by a gate that trains and starts at 0.
    Gated,
}

/// Parameters of a bottleneck.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How many times narrower than the stream the bottleneck is.
    #[schemars(range(min = 1, max = 4096))]
    reduction: u32,
    /// Its width; 0 for that of the stream divided by `reduction`.
    #[schemars(range(max = 65536))]
    width: u32,
    /// What stands between its maps.
    activation: Between,
    /// Whether it reads what the block reads instead of what it gives.
    parallel: bool,
    /// How what it makes and what the block gives become one.
    composition: Composition,
    /// Factor on what it adds.
    #[schemars(range(min = 0.0, max = 1000.0))]
    scale: f64,
    /// Share of the values between its maps that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            reduction: 16,
            width: 0,
            activation: Between::Relu,
            parallel: false,
            composition: Composition::Scaled,
            scale: 1.0,
            dropout: 0.0,
        }
    }
}

pub(super) struct Bottleneck {
    config: Config,
}

impl Method for Bottleneck {
    const CARD: Card = Card {
        category: Some(Category::Additive),
        aliases: &["houlsby"],
        paper: Some(Paper {
            title: "Parameter-Efficient Transfer Learning for NLP",
            authors: "Neil Houlsby, Andrei Giurgiu, Stanislaw Jastrzebski, et al.",
            year: 2019,
        }),
        applies: &[method::SiteKind::Attention, method::SiteKind::Mlp],
        targets: "all",
        parameters: "if(width < 1, 2*i*i/reduction + i/reduction, 2*i*width + width) + i + (composition != \"scaled\")",
        merges: Merges::No,
        rules: &[
            Rule {
                when: "composition == \"gated\"",
                require: "scale == 1",
                message: "is a factor beside the gate, which has one already; expected 1, or `composition: scaled`",
                path: "scale",
            },
            Rule {
                when: "composition == \"learned\"",
                require: "scale > 0",
                message: "is 0, and so is what it would stand before: nothing would move; expected more",
                path: "scale",
            },
        ],
        ..Card::new(
            "bottleneck",
            Point::Adapter,
            "A small network with an activation after attention and MLP, or beside them: for changes that no low-rank matrix \
             is, and as what `adapterfusion` mixes.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Bottleneck {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { reduction, width: own, composition, .. } = self.config;
        let (reduction, own) = (reduction as usize, own as usize);
        blocks::attach(sites, |site, width| {
            if own == 0 && !width.is_multiple_of(reduction) {
                let message = format!(
                    "is {reduction}, which does not divide {width}, the width of {}; expected `width`",
                    site.id
                );
                return Err(Fault::new("reduction", message));
            }
            let inner = if own == 0 { width / reduction } else { own };
            let bias = |local, n: usize| TensorSpec { decay: false, ..TensorSpec::trained(local, [n]) };
            let (down, up) = (TensorSpec::trained(DOWN, [inner, width]), TensorSpec::trained(UP, [width, inner]));
            let mut tensors = vec![down, bias(DOWN_BIAS, inner), up, bias(UP_BIAS, width)];
            tensors.extend(match composition {
                Composition::Scaled => None,
                Composition::Learned => Some(bias(FACTOR, 1)),
                Composition::Gated => Some(bias(GATE, 1)),
            });
            Ok(tensors)
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let is_gated = self.config.composition == Composition::Gated;
        starts::each(at, rng, |spec| match spec.local {
            DOWN => Start::kaiming(spec),
            // The gate is closed: what it will open for may be there already.
            UP if is_gated => Start::kaiming(spec),
            FACTOR => Start::Constant(self.config.scale),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Branch(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No("a network beside a block is no change of one of its weights"))
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl BranchMap for Bottleneck {
    fn graph(&self, x_td: &Tensor, y_td: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let Config { activation, parallel, composition, scale, dropout, .. } = self.config;
        let h_td = if parallel { x_td } else { y_td };
        let h_tr = ops::linear(h_td, tensors.get(DOWN)?, Some(tensors.get(DOWN_BIAS)?))?;
        let h_tr = match activation {
            Between::Relu => ops::relu(&h_tr)?,
            Between::Gelu => ops::gelu(&h_tr)?,
            Between::Silu => ops::silu(&h_tr)?,
            Between::Tanh => h_tr.tanh()?,
            Between::Identity => h_tr,
        };
        let made_td = ops::linear(&dropped(&h_tr, dropout, cx)?, tensors.get(UP)?, Some(tensors.get(UP_BIAS)?))?;
        Ok(match composition {
            Composition::Scaled => (y_td + (made_td * scale)?)?,
            Composition::Learned => (y_td + made_td.broadcast_mul(tensors.get(FACTOR)?)?)?,
            // So that a closed gate leaves the bits of what the block gives.
            Composition::Gated => (y_td + (made_td - y_td)?.broadcast_mul(tensors.get(GATE)?)?)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use candle_core::DType;
    use serde_json::json;

    use super::*;

    /// What becomes of `y` behind `x`, with tensors away from their start; and these.
    fn made(config: serde_json::Value) -> (Tensor, Locals, Tensor, Tensor) {
        let config: Config = serde_json::from_value(config).unwrap();
        let map = Bottleneck { config };
        let normal = |name: &str, shape: &[usize]| Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap();
        let (x, y) = (normal("x", &[5, 6]), normal("y", &[5, 6]));
        let shapes: [(&'static str, &[usize]); 6] =
            [(DOWN, &[3, 6]), (DOWN_BIAS, &[3]), (UP, &[6, 3]), (UP_BIAS, &[6]), (FACTOR, &[1]), (GATE, &[1])];
        let locals = Locals::new("mlp", shapes.map(|(local, shape)| (local, normal(local, shape))));
        let (site, layout) = (SiteId::new("mlp"), attune_points::Layout::new());
        let cx = RowCx { site: &site, output: 6, dropout: None, layout: &layout, rows: None };
        (map.graph(&x, &y, &locals, &cx).unwrap(), locals, x, y)
    }

    fn off(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    /// The linear limit: LoRA's formula on what the block reads, with its factor.
    #[test]
    fn beside_a_block_without_an_activation_it_is_low_rank() {
        let (found, locals, x, y) = made(json!({"width": 3, "parallel": true, "activation": "identity", "scale": 4.0}));
        let get = |local: &str| locals.get(local).unwrap();
        let h = x.matmul(&get(DOWN).t().unwrap()).unwrap().broadcast_add(get(DOWN_BIAS)).unwrap();
        let added = h.matmul(&get(UP).t().unwrap()).unwrap().broadcast_add(get(UP_BIAS)).unwrap();
        assert!(off(&found, &(y + (added * 4.0).unwrap()).unwrap()) < 1e-12);
    }

    #[test]
    fn behind_a_block_and_beside_it_are_two_things() {
        let of = |parallel: bool| made(json!({"width": 3, "parallel": parallel})).0;
        assert!(off(&of(true), &of(false)) > 0.1);
    }

    #[test]
    fn a_gate_takes_the_place_of_the_block_in_part_and_a_factor_adds() {
        let (gated, locals, x, y) = made(json!({"width": 3, "composition": "gated"}));
        let value = |local: &str| locals.get(local).unwrap().to_vec1::<f64>().unwrap()[0];
        let scaled = |scale: f64| made(json!({"width": 3, "scale": scale})).0;
        let made_of = (scaled(1.0) - &y).unwrap();
        let gate = value(GATE);
        let expected = ((&y * (1.0 - gate)).unwrap() + (made_of * gate).unwrap()).unwrap();
        assert!(off(&gated, &expected) < 1e-12);
        let learned = made(json!({"width": 3, "composition": "learned", "scale": 2.0})).0;
        assert!(off(&learned, &scaled(value(FACTOR))) < 1e-12 && off(&x, &y) > 0.1);
    }
}
