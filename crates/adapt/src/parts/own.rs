//! Adapters that PEFT does not have, in its layout: `adapter_config.json` says the method in our own words.

use attune_artifacts::formats::peft::LoraConfig;
use attune_points::adapter::{Peft, PeftTensors};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::MethodRef;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::parts::scaling;

/// The key of `adapter_config.json` under which the method is.
pub(crate) const KEY: &str = "attune";

/// The layout of a method with its parameters, whose tensors are spelt by their local names.
pub(crate) fn peft(method: &str, config: &impl Serialize) -> Peft {
    let mut named = serde_json::to_value(config).unwrap_or_default();
    named["method"] = method.into();
    let peft_type = method.to_uppercase().replace('-', "_");
    let keys = [("peft_type", json!(peft_type)), ("inference_mode", json!(true)), (KEY, named)];
    let config = keys.map(|(key, value)| (key.to_owned(), value)).into_iter().collect();
    Peft { config, tensors: PeftTensors::Each(Vec::new()) }
}

/// The layout of a method whose tensors are LoRA's: PEFT reads it as that, and we read the method.
pub(crate) fn as_lora(method: &str, config: &impl Serialize, lora: &LoraConfig) -> Peft {
    let mut made = scaling::peft(lora, vec![("lora_A", "lora_A.weight"), ("lora_B", "lora_B.weight")]);
    made.config.extend(peft(method, config).config.remove_entry(KEY));
    made
}

/// Whether a configuration says a method in our own words.
pub(crate) fn is_own(config: &Map<String, Value>) -> bool {
    config.contains_key(KEY)
}

/// What it says. Its sites are those that it lists: tensors that several of them share are not named after one.
pub(crate) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let named = config.get(KEY).cloned().unwrap_or_default();
    let listed = config.get("target_modules").cloned().unwrap_or_default();
    let modules = serde_json::from_value(listed).unwrap_or_else(|_| modules.to_vec());
    match serde_json::from_value(named) {
        Ok(method) => Ok((method, Targets::Many(modules))),
        Err(error) => Err(vec![Fault::new(KEY, format!("names no method: {error}"))]),
    }
}
