//! Bottlenecks within each block that a second, narrow stream connects: it runs beside the frozen model, so that every module learns
//! from the loss by way of modules alone; for retrieval and other tasks that take gradients deep down.
//!
//! # Update
//! ```text
//! z_0   = E h_0                                                    h_0: what the table of tokens gives
//! a_l   = U gelu(D h_l)                                            h_l: the stream behind a block
//! z_l   = z_(l-1) + V gelu(G [LN(h_l); z_(l-1)])
//! h'_l  = h_l + a_l + T z_l
//! ```
//! `LN` is a norm over a row to mean 0 and variance 1, without a scale or shift of its own.
//!
//! # Symbols
//! `start` `E` `[z, d]`, once; at each block `inside_down` `D` `[r, d]`, `inside_up` `U` `[d, r]`, `aside_down` `G` `[r, d+z]`,
//! `aside_up` `V` `[z, r]` and `inject` `T` `[d, z]`; f32, trained. `E`, `D` and `G` start uniform within one over the root of what they
//! read, `U`, `V` and `T` at 0. `r` is `width`, `z` is `side`.
//!
//! # Cost
//! `2*r*d + r*(d+2*z) + d*z` parameters a block, `r*2*d` fewer without `inside`, and `z*d` once; as many multiplications for each row.
//! It does not merge: it runs beside the blocks.
//!
//! # Limits
//! With `T` at 0 it is a bottleneck behind each block, none knowing of the others. With all of `U`, `V` and `T` at 0 it is the base.
//!
//! # Departures
//! The paper names three insertions, the bottleneck aside and skip connections; widths and wiring are as above. `insertion: block` is
//! behind the MLP, where a block of the paper ends, `attention` behind the attention, `both` behind either. Instead of bottlenecks, LoRA
//! may stand within the blocks: a slot of its own beside this one with `inside: false`.
//!
//! # Paper
//! Scattered or Connected? An Optimized Parameter-efficient Tuning Approach for Information Retrieval. Ma, Guo, Zhang, Fan, Cheng, 2022.

use attune_architecture::{Architecture, Place, Site, SiteKind as Kind};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, SideMap};
use attune_points::{Locals, Result, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{D, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::own;
use crate::parts::starts::{self, Start};

const START: &str = "start";
const INSIDE_DOWN: &str = "inside_down";
const INSIDE_UP: &str = "inside_up";
const ASIDE_DOWN: &str = "aside_down";
const ASIDE_UP: &str = "aside_up";
const INJECT: &str = "inject";

/// Below the variance of rows of any model, so that rows of zeros stay what they are.
const EPS: f64 = 1e-6;

/// Where the modules stand.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Insertion {
    /// Once a layer, behind all of it.
    #[default]
    Block,
    /// Once a layer, behind its attention.
    Attention,
    /// Behind the attention and behind the MLP.
    Both,
}

/// Parameters of connected adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Width of each bottleneck.
    #[schemars(range(min = 1, max = 65536))]
    width: u32,
    /// Width of the stream that connects them.
    #[schemars(range(min = 1, max = 65536))]
    side: u32,
    /// Where they stand.
    insertion: Insertion,
    /// Whether there is a bottleneck within each block beside the one of the second stream.
    inside: bool,
}

impl Default for Config {
    /// Below one percent of the parameters of a model of 110 million.
    fn default() -> Self {
        Self { width: 64, side: 64, insertion: Insertion::Block, inside: true }
    }
}

pub(super) struct ConnectedAdapter {
    config: Config,
}

impl Method for ConnectedAdapter {
    const CARD: Card = Card {
        category: Some(Category::Additive),
        paper: Some(Paper {
            title: "Scattered or Connected? An Optimized Parameter-efficient Tuning Approach for Information Retrieval",
            authors: "Xinyu Ma, Jiafeng Guo, Ruqing Zhang, Yixing Fan, Xueqi Cheng",
            year: 2022,
        }),
        applies: &[SiteKind::Embedding, SiteKind::Attention, SiteKind::Mlp],
        targets: "all",
        parameters: "if(table > 0, side*o, if(insertion == \"both\" or (insertion == \"attention\") == (attention > 0), \
                     2*i*width*inside + width*(i + 2*side) + i*side, 0))",
        merges: Merges::No,
        ..Card::new(
            "connected-adapter",
            Point::Adapter,
            "Bottlenecks within each block that a second, narrow stream connects, so that every module learns from the loss by way of \
             modules alone; for retrieval and other tasks that take gradients deep down.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> std::result::Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl ConnectedAdapter {
    /// The tensors at a site; none where nothing of it stands.
    fn tensors(&self, site: &Site) -> Option<Vec<TensorSpec>> {
        let Config { width, side, insertion, inside } = self.config;
        let (r, z) = (width as usize, side as usize);
        let d = match site.kind {
            Kind::Embedding { width, .. } if site.place == Place::Embedding => {
                return Some(vec![TensorSpec::trained(START, [z, width])]);
            }
            Kind::Block { width } => width,
            _ => return None,
        };
        let stands = match insertion {
            Insertion::Block => site.place != Place::Attention,
            Insertion::Attention => site.place == Place::Attention,
            Insertion::Both => true,
        };
        let within = [TensorSpec::trained(INSIDE_DOWN, [r, d]), TensorSpec::trained(INSIDE_UP, [d, r])];
        let aside = [
            TensorSpec::trained(ASIDE_DOWN, [r, d + z]),
            TensorSpec::trained(ASIDE_UP, [z, r]),
            TensorSpec::trained(INJECT, [d, z]),
        ];
        stands.then(|| within.into_iter().filter(|_| inside).chain(aside).collect())
    }
}

impl Adapter for ConnectedAdapter {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        let attachment = |site: &Site| Some(Attachment { site: site.id.clone(), tensors: self.tensors(site)? });
        let attachments: Vec<Attachment> = sites.iter().filter_map(attachment).collect();
        let is_block = |at: &&Attachment| at.tensors.iter().any(|spec| spec.local == INJECT);
        let blocks = attachments.iter().filter(is_block).count();
        let mut faults = Vec::new();
        if blocks == attachments.len() {
            let message =
                "names no table of tokens, from which its stream starts: leave it out, or name that table, too";
            faults.push(Fault::new("targets", message));
        }
        if blocks == 0 {
            let message = "is left without a block among `targets`; expected one behind which a module can stand";
            faults.push(Fault::new("insertion", message));
        }
        if faults.is_empty() { Ok(attachments) } else { Err(faults) }
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| match spec.local {
            INSIDE_UP | ASIDE_UP | INJECT => Start::Constant(0.0),
            _ => Start::kaiming(spec),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Side(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
        Ok(Merged::No("it runs beside the blocks"))
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

/// Rows of mean 0 and variance 1.
fn normed(h_td: &Tensor) -> Result<Tensor> {
    let off_td = h_td.broadcast_sub(&h_td.mean_keepdim(D::Minus1)?)?;
    let deviation_t1 = (off_td.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
    Ok(off_td.broadcast_div(&deviation_t1)?)
}

impl SideMap for ConnectedAdapter {
    fn width(&self) -> usize {
        self.config.side as usize
    }

    fn graph(&self, h_td: &Tensor, z_tz: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> Result<(Tensor, Tensor)> {
        if let Ok(start) = tensors.get(START) {
            return Ok((h_td.clone(), ops::linear(h_td, start, None)?));
        }
        let seen = Tensor::cat(&[&normed(h_td)?, z_tz], 1)?;
        let aside_tr = ops::gelu(&ops::linear(&seen, tensors.get(ASIDE_DOWN)?, None)?)?;
        let z_tz = (z_tz + ops::linear(&aside_tr, tensors.get(ASIDE_UP)?, None)?)?;
        let mut to_td = (h_td + ops::linear(&z_tz, tensors.get(INJECT)?, None)?)?;
        if self.config.inside {
            let inside_tr = ops::gelu(&ops::linear(h_td, tensors.get(INSIDE_DOWN)?, None)?)?;
            to_td = (to_td + ops::linear(&inside_tr, tensors.get(INSIDE_UP)?, None)?)?;
        }
        Ok((to_td, z_tz))
    }
}
