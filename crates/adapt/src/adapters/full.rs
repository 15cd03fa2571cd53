//! Full fine-tuning: the weights themselves train, which learns the most and costs the most memory.
//!
//! # Update
//! ```text
//! W_oi is trained, from the base's values; so are biases, norms and embeddings where the targets name them
//! ```
//!
//! # Symbols
//! `weight` and `bias` of each site, in the base's shapes, f32, trained, started from the base.
//!
//! # Cost
//! All parameters of the targeted sites: `i*o + b*o`. Each has a 32-bit value beside the frozen base, a gradient and the
//! optimiser's buffers.
//!
//! # Limits
//! Before the first step it is the base, bit for bit (where the base is held in 32 bits).
//!
//! # Departures
//! none. A tied head is the embedding and is trained as such. Norms and biases have no weight decay, as is usual.
//!
//! # Paper
//! none: common practice.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port};
use attune_points::{Locals, Weight};
use attune_spec::Fault;
use attune_spec::method::{self, BuildCx, Card, Category, Merges, Method, Point};
use attune_tensor::rng::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::weights;

/// It has no parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {}

pub(super) struct Full;

impl Method for Full {
    const CARD: Card = Card {
        category: Some(Category::Selective),
        applies: &[method::SiteKind::Linear, method::SiteKind::Embedding, method::SiteKind::Norm],
        targets: "all",
        parameters: "i*o + b*o",
        merges: Merges::Weight,
        trains_base: true,
        ..Card::new(
            "full",
            Point::Adapter,
            "Full fine-tuning: the weights themselves train, which learns the most and costs the most memory.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(_: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self))
    }
}

impl Adapter for Full {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        Ok(weights::attach(arch, sites))
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, _: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        weights::start(at, weight)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weights
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        weights::merged(at, tensors)
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}
