//! A small network after attention and MLP, or beside them: down, an activation, up, added to what the block gives.
//!
//! # Update
//! ```text
//! y'_td = y_td + scale · up(f(down(h_td)))        h = y, what the block gives; x, what it reads, where `parallel`
//! down: D to r, up: r to D, r = D / reduction
//! ```
//!
//! # Symbols
//! `down` `[r, D]`, `down_bias` `[r]`, `up` `[D, r]`, `up_bias` `[D]`; f32, trained. `f` is the activation. `down` starts uniform
//! within `1/√D`, all else at 0.
//!
//! # Cost
//! `2*i*i/reduction + i/reduction + i` parameters a block. It has an activation, so it does not merge.
//!
//! # Limits
//! With `up` and its bias at 0 it is the base; without an activation it would be a low-rank change of the block's last linear.
//!
//! # Departures
//! The authors start both maps near 0; here the upper one is 0, so that the start is the base to the bit. Norms and a head are
//! not trained along with it. With targets `mlp` alone it is Pfeiffer's; `parallel` with targets `mlp`, a wide bottleneck and
//! `scale: 4` is the MLP's half of MAM.
//!
//! # Paper
//! Parameter-Efficient Transfer Learning for NLP. Houlsby et al., 2019; beside the block: Towards a Unified View of
//! Parameter-Efficient Transfer Learning. He et al., 2022.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, BranchMap, Merged, Peft, Port, RowCx};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{self, BuildCx, Card, Merges, Method, Paper, Point};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::starts::{self, Start};
use crate::parts::{blocks, own};

const DOWN: &str = "down";
const DOWN_BIAS: &str = "down_bias";
const UP: &str = "up";
const UP_BIAS: &str = "up_bias";

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
}

/// Parameters of a bottleneck.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How many times narrower than the stream the bottleneck is.
    #[schemars(range(min = 1, max = 4096))]
    reduction: u32,
    /// What stands between its maps.
    activation: Between,
    /// Whether it reads what the block reads instead of what it gives.
    parallel: bool,
    /// Factor on what it adds.
    #[schemars(range(min = 0.0, max = 1000.0))]
    scale: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { reduction: 16, activation: Between::Relu, parallel: false, scale: 1.0 }
    }
}

pub(super) struct Bottleneck {
    config: Config,
}

impl Method for Bottleneck {
    const CARD: Card = Card {
        aliases: &["houlsby"],
        paper: Some(Paper {
            title: "Parameter-Efficient Transfer Learning for NLP",
            authors: "Neil Houlsby, Andrei Giurgiu, Stanislaw Jastrzebski, et al.",
            year: 2019,
        }),
        applies: &[method::SiteKind::Attention, method::SiteKind::Mlp],
        targets: "all",
        parameters: "2*i*i/reduction + i/reduction + i",
        merges: Merges::No,
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
        let reduction = self.config.reduction as usize;
        blocks::attach(sites, |site, width| {
            if !width.is_multiple_of(reduction) {
                let message = format!("is {reduction}, which does not divide {width}, the width of {}", site.id);
                return Err(Fault::new("reduction", message));
            }
            let inner = width / reduction;
            let bias = |local, n: usize| TensorSpec { decay: false, ..TensorSpec::trained(local, [n]) };
            let (down, up) = (TensorSpec::trained(DOWN, [inner, width]), TensorSpec::trained(UP, [width, inner]));
            Ok(vec![down, bias(DOWN_BIAS, inner), up, bias(UP_BIAS, width)])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| if spec.local == DOWN { Start::kaiming(spec) } else { Start::Constant(0.0) })
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

impl BranchMap for Bottleneck {
    fn graph(&self, x_td: &Tensor, y_td: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let Config { activation, parallel, scale, .. } = self.config;
        let h_td = if parallel { x_td } else { y_td };
        let h_tr = ops::linear(h_td, tensors.get(DOWN)?, Some(tensors.get(DOWN_BIAS)?))?;
        let h_tr = match activation {
            Between::Relu => ops::relu(&h_tr)?,
            Between::Gelu => ops::gelu(&h_tr)?,
            Between::Silu => ops::silu(&h_tr)?,
            Between::Tanh => h_tr.tanh()?,
        };
        let added = (ops::linear(&h_tr, tensors.get(UP)?, Some(tensors.get(UP_BIAS)?))? * scale)?;
        Ok((y_td + added)?)
    }
}
