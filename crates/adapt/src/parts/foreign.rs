//! PEFT's configurations of methods whose own keys are a type.

use std::collections::BTreeMap;

use attune_artifacts::formats::peft::LoraConfig;
use attune_points::adapter::{Peft, PeftTensors};
use attune_spec::Fault;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::parts::keys::{self, Keys};

/// The keys that are a method's own, as `adapter_config.json` has them.
///
/// # Errors
/// What the file asks for beyond the method itself, and values of another kind.
pub(crate) fn parse<C: DeserializeOwned>(config: &Map<String, Value>) -> Result<C, Vec<Fault>> {
    Keys::of(config).finish()?;
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
    let mut config = keys::written(peft_type, []);
    config.extend(serde_json::to_value(own).ok().and_then(|value| value.as_object().cloned()).unwrap_or_default());
    Peft { config, tensors: PeftTensors::Each(tensors) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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
