//! Configurations of PEFT's methods beside LoRA.

use std::collections::BTreeMap;

use attune_artifacts::formats::peft::{LoraConfig, PEFT_VERSION};
use attune_points::adapter::{Peft, PeftTensors};
use attune_spec::Fault;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// The keys that are a method's own, as `adapter_config.json` has them.
///
/// # Errors
/// What the file asks for beyond the method itself, and values of another kind.
pub(crate) fn parse<C: DeserializeOwned>(config: &Map<String, Value>) -> Result<C, Vec<Fault>> {
    let set = |key: &str| match config.get(key) {
        None | Some(Value::Null) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(map)) => !map.is_empty(),
        Some(_) => true,
    };
    let beyond = [
        ("bias", set("bias") && config["bias"] != "none"),
        ("modules_to_save", set("modules_to_save")),
        ("trainable_token_indices", set("trainable_token_indices")),
    ];
    let message = "asks for more than the method itself, which this version does not read";
    let faults: Vec<Fault> =
        beyond.into_iter().filter(|(_, asked)| *asked).map(|(key, _)| Fault::new(key, message)).collect();
    if !faults.is_empty() {
        return Err(faults);
    }
    serde_json::from_value(Value::Object(config.clone())).map_err(|error| vec![Fault::new("", error.to_string())])
}

/// The number of each module that has another one than most, by PEFT's patterns of module paths under `key`, which match as those
/// of ranks do.
///
/// # Errors
/// A pattern that is no regular expression.
pub(crate) fn by_pattern(
    key: &str,
    most: u32,
    patterns: BTreeMap<String, u32>,
    modules: &[String],
) -> Result<BTreeMap<String, u32>, Vec<Fault>> {
    let patterns = LoraConfig { r: most, rank_pattern: patterns, ..LoraConfig::default() }.patterns();
    let patterns = patterns.map_err(|error| vec![Fault::new(key, error.to_string())])?;
    let each = modules.iter().map(|module| (module.clone(), patterns.rank(module)));
    Ok(each.filter(|(_, number)| *number != most).collect())
}

/// An adapter in PEFT's layout: its own keys beside those that all have, and the spelling of its tensors.
pub(crate) fn peft(peft_type: &str, own: &impl Serialize, tensors: Vec<(&'static str, &'static str)>) -> Peft {
    let own = serde_json::to_value(own).ok().and_then(|value| value.as_object().cloned()).unwrap_or_default();
    let all = [
        ("peft_type", json!(peft_type)),
        ("peft_version", json!(PEFT_VERSION)),
        ("task_type", json!("CAUSAL_LM")),
        ("inference_mode", json!(true)),
        ("modules_to_save", Value::Null),
    ];
    let config = all.map(|(key, value)| (key.to_owned(), value)).into_iter().chain(own).collect();
    Peft { config, tensors: PeftTensors::Each(tensors) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_beyond_the_method_is_named() {
        let parse = |config: Value| parse::<Map<String, Value>>(config.as_object().unwrap());
        assert!(parse(json!({"bias": "none", "modules_to_save": null, "r": 4})).is_ok());
        let faults = parse(json!({"bias": "all", "modules_to_save": ["lm_head"]})).unwrap_err();
        let paths: Vec<String> = faults.iter().map(|fault| fault.path.to_string()).collect();
        assert_eq!(paths, ["bias", "modules_to_save"]);
    }
}
