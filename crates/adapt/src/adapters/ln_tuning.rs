//! Trains the scales and shifts of norms and leaves every matrix as it is: a handful of numbers, for a base that knows the task and
//! has to be pointed to it.
//!
//! # Update
//! ```text
//! w_d, b_d of each norm are trained, from the base's values
//! ```
//!
//! # Symbols
//! `weight` `w_d` and, where the norm has one, `bias` `b_d`, f32, trained, started from the base.
//!
//! # Cost
//! `i*o` parameters a norm: its width, twice with a bias. Nothing more than the base's own norms in a step.
//!
//! # Limits
//! Before the first step it is the base. No matrix changes.
//!
//! # Departures
//! none; agrees with PEFT. It takes all norms by default, also those of queries and keys where a model has them.
//!
//! # Paper
//! Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning. Zhao, Tu, Wei, Mei, Xie, 2024.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port};
use attune_points::{Locals, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::rng::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::parts::keys::{self, Keys};
use crate::parts::weights::{self, BIAS, WEIGHT};

/// It has no parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {}

pub(super) struct LnTuning;

impl Method for LnTuning {
    const CARD: Card = Card {
        category: Some(Category::Selective),
        paper: Some(Paper {
            title: "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
            authors: "Bingchen Zhao, Haoqin Tu, Chen Wei, Jieru Mei, Cihang Xie",
            year: 2024,
        }),
        applies: &[SiteKind::Norm],
        targets: "all",
        parameters: "i*o",
        merges: Merges::Weight,
        peft_type: Some("LN_TUNING"),
        ..Card::new(
            "ln-tuning",
            Point::Adapter,
            "Trains the scales and shifts of norms and leaves every matrix as it is: a handful of numbers, for a base that knows \
             the task and has to be pointed to it.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(_: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self))
    }
}

impl Adapter for LnTuning {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let is_norm = |site: &&Site| site.offers() == SiteKind::Norm;
        let other = sites.iter().filter(|site| !is_norm(site)).map(|site| {
            Fault::new("targets", format!("names {}, which is a {}; expected norms", site.id, site.kind.name()))
        });
        let faults: Vec<Fault> = other.collect();
        if faults.is_empty() { Ok(weights::attach(arch, sites)) } else { Err(faults) }
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
        let tensors = vec![(WEIGHT, "ln_tuning_layers.weight"), (BIAS, "ln_tuning_layers.bias")];
        Some(Peft { config: keys::written("LN_TUNING", []), tensors: PeftTensors::Each(tensors) })
    }
}

/// What `adapter_config.json` of PEFT's tuning of norms says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    Keys::of(config).finish()?;
    // A bias is a tensor of the copy of the norm that PEFT keeps.
    let mut norms: Vec<String> =
        modules.iter().map(|module| module.trim_end_matches(".ln_tuning_layers").to_owned()).collect();
    norms.dedup();
    Ok((MethodRef { method: LnTuning::CARD.name.to_owned(), params: Map::new() }, Targets::Many(norms)))
}
