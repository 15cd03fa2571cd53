//! Trains modules whole and keeps them in the folder of the adapter beside which they train: the head of a classifier, which starts at
//! random, beside a LoRA of the trunk.
//!
//! # Update
//! ```text
//! W_oi is trained, from the base's values; so is the bias of each module that has one
//! ```
//!
//! # Symbols
//! `weight` and `bias` of each module, in the base's shapes, f32, trained, started from the base: from what the adapters before it have
//! of the module, where they have it.
//!
//! # Cost
//! `i*o + b*o`: all parameters of the modules. Each has a 32-bit value beside the frozen base, a gradient and the optimiser's buffers.
//!
//! # Limits
//! Before the first step it is the base. By itself it is a probe: a head on a trunk that stays as it is.
//!
//! # Departures
//! PEFT takes modules whatever they hold; here each is a linear, a norm or a table of tokens, and none shares its weight with another
//! or is stored transposed.
//!
//! # Paper
//! none: PEFT's `modules_to_save`.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port};
use attune_points::{Locals, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Point, SiteKind};
use attune_tensor::rng::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::keys;
use crate::parts::weights;

/// What PEFT calls modules that do not exist, for an adapter that has saved modules only.
const NOWHERE: &str = "dummy-target-modules";

/// It has no parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {}

pub(super) struct ModulesToSave;

impl Method for ModulesToSave {
    const CARD: Card = Card {
        category: Some(Category::Selective),
        applies: &[SiteKind::Linear, SiteKind::Embedding, SiteKind::Norm],
        targets: "head",
        parameters: "i*o + b*o",
        merges: Merges::Weight,
        peft_type: Some("LORA"),
        ..Card::new(
            "modules-to-save",
            Point::Adapter,
            "Trains modules whole and keeps them in the folder of the adapter beside which they train: the head of a classifier, \
             which starts at random, beside a LoRA of the trunk.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(_: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self))
    }
}

impl Adapter for ModulesToSave {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let ties = arch.ties();
        let shares = |site: &Site| {
            let weight = format!("{}.weight", site.id);
            ties.iter().find_map(|(one, other)| match (*one == weight, *other == weight) {
                (true, _) => Some(other.clone()),
                (_, true) => Some(one.clone()),
                _ => None,
            })
        };
        let fault = |site: &Site| {
            let why = match shares(site) {
                Some(other) => format!("shares its weight with {other}, so that it is not kept by itself"),
                None if site.kind.transposed() => "is stored transposed by models of this family".to_owned(),
                None => return None,
            };
            let other = "leave it out, or train it with the base's own weights";
            Some(Fault::new("targets", format!("names {}, which {why}: {other}", site.id)))
        };
        let faults: Vec<Fault> = sites.iter().filter_map(fault).collect();
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

    /// The folder of those that have no adapter beside them.
    fn peft(&self) -> Option<Peft> {
        let config = keys::written("LORA", [("r", json!(1)), ("lora_alpha", json!(1))]);
        Some(Peft { config, tensors: PeftTensors::Saved })
    }

    fn is_kept_beside(&self) -> bool {
        true
    }
}

/// The method and the modules, by their paths.
pub(crate) fn of(modules: Vec<String>) -> (MethodRef, Targets) {
    (MethodRef { method: ModulesToSave::CARD.name.to_owned(), params: Map::new() }, Targets::Many(modules))
}

/// What `target_modules` says where there is no adapter.
pub(crate) fn nowhere() -> Value {
    NOWHERE.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attach(config: &str, names: &str) -> Result<Vec<Attachment>, Vec<Fault>> {
        let arch = Architecture::from_json(config.as_bytes()).unwrap();
        let sites = attune_architecture::targets::resolve(&names.into(), None, &arch, |_| true).unwrap();
        ModulesToSave.attach(&arch, &sites)
    }

    #[test]
    fn a_weight_that_two_modules_have_or_that_is_transposed_is_refused() {
        let tied = r#"{"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 8, "vocab_size": 9, "tie_word_embeddings": true}"#;
        for name in ["embed_tokens", "lm_head"] {
            let faults = attach(tied, name).unwrap_err();
            assert!(faults[0].message.contains("shares its weight with"), "{faults:?}");
        }
        let attached = attach(&tied.replace("true", "false"), "head").unwrap();
        assert_eq!(attached.len(), 1);
        assert_eq!((attached[0].site.as_str(), attached[0].tensors.len()), ("lm_head", 1));
        let gpt2 = r#"{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 9}"#;
        let faults = attach(gpt2, "c_fc").unwrap_err();
        assert!(faults[0].message.contains("is stored transposed"), "{faults:?}");
    }
}
