//! Makes a deeper model by repeating layers, without a weight more: each copy is a layer to all components, so that adapters make
//! the copies different.
//!
//! # Update
//! ```text
//! layer l of the new model    computes with the weights of layer o(l) of the base
//! o = (start_1, …, end_1 - 1, start_2, …, end_2 - 1, …)          for the ranges [start_k, end_k]
//! ```
//!
//! # Symbols
//! `ranges`, the list of ranges of the base's layers; nothing is drawn.
//!
//! # Cost
//! No parameter and no byte of weights: what is repeated lies in memory once. Each layer costs a pass what it costs in the base.
//! Where weights of the base train, or a whole model is written, each copy has its own.
//!
//! # Limits
//! With the one range of all layers it is the base, bit for bit. A range that is repeated right away applies its layers twice.
//!
//! # Departures
//! none; an adapter's folder says the ranges as PEFT does (`layer_replication`, which it has for LoRA alone), joined where one goes
//! on after the other.
//!
//! # Paper
//! SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling. Kim, Kim, Kim, Kim, Kim, Lee et al., 2023,
//! whose model is two overlapping ranges and trains all of it; shared weights and adapters on them are PEFT's.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site, SiteId, TensorInfo, TensorPart};
use attune_points::surgery::{Derivation, Surgery};
use attune_points::{Error, TensorName, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, LAYERS, Method, Paper, Point, Rule};
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::surgery::by_place;

/// Parameters of the surgery.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// The layers, as ranges of the base's: each from its first number to before its second.
    ranges: Vec<[u32; 2]>,
}

pub(super) struct LayerReplication;

impl Method for LayerReplication {
    const CARD: Card = Card {
        aliases: &["depth-up-scaling"],
        paper: Some(Paper {
            title: "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling",
            authors: "Dahyun Kim et al.",
            year: 2023,
        }),
        becomes: &[(LAYERS, "ranges")],
        moves: Some("a row goes through layers several times"),
        rules: &[Rule {
            when: "true",
            require: "count(ranges) > 0",
            message: "is empty; expected ranges of the base's layers, such as [[0, 16], [8, 24]]",
            path: "ranges",
        }],
        ..Card::new(
            "layer-replication",
            Point::Surgery,
            "Makes a deeper model by repeating layers, without a weight more: each copy is a layer to all components, so that adapters \
             make the copies different.",
        )
    };
    type Config = Config;
    type Object = dyn Surgery;

    fn build(_: Config, _: &BuildCx<'_>) -> Result<Box<dyn Surgery>, Vec<Fault>> {
        // The card says which layers there are.
        Ok(Box::new(Self))
    }
}

impl Surgery for LayerReplication {
    fn plan(&self, from: &Architecture, to: &Architecture) -> Result<BTreeMap<TensorName, Derivation>, Vec<Fault>> {
        let (old, sites) = (from.sites(), to.sites());
        let old = by_place(&old);
        let by_id: BTreeMap<&SiteId, &Site> = sites.iter().map(|site| (&site.id, site)).collect();
        let origin = |layer: u32| to.origins.as_ref().and_then(|origins| origins.get(layer as usize).copied());
        let mut plan = BTreeMap::new();
        for TensorInfo { name, site, part, .. } in to.tensors() {
            let Some(at) = by_id.get(&site) else { continue };
            let Some(of) = old.get(&(at.place, at.layer.and_then(origin), at.expert)) else {
                let message = format!("finds nothing in the base that {name} could be");
                return Err(vec![Fault::new("", message)]);
            };
            let local = match part {
                TensorPart::Weight => "weight",
                TensorPart::Bias => "bias",
            };
            plan.insert(TensorName::from_path(&name), Derivation::Kept(TensorName::new(of.id.as_str(), local)));
        }
        Ok(plan)
    }

    fn tensor(&self, at: &Site, _: TensorPart, _: Option<&dyn Weight>, _: &mut Rng) -> attune_points::Result<Tensor> {
        Err(Error::Refused(format!("{} is a layer of the base, of which nothing is made", at.id)))
    }
}
