//! PEFT's configurations of methods other than LoRA, key by key: what asks for something that a method does not compute is
//! refused.

use std::collections::{BTreeMap, BTreeSet};

use attune_artifacts::formats::peft::PEFT_VERSION;
use attune_spec::Fault;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// A configuration that is being read.
pub(crate) struct Keys<'a> {
    config: &'a Map<String, Value>,
    faults: Vec<Fault>,
}

impl<'a> Keys<'a> {
    /// What asks for more than an adapter at linears is at fault.
    pub(crate) fn of(config: &'a Map<String, Value>) -> Self {
        let mut keys = Self { config, faults: Vec::new() };
        let beyond = "which is more than the adapter; this version does not read it";
        keys.only("bias", "none", beyond);
        keys.only("modules_to_save", json!([]), beyond);
        keys.only("trainable_token_indices", json!([]), beyond);
        keys
    }

    /// The value of a key, or `default` where it is not there.
    pub(crate) fn get<T: DeserializeOwned>(&mut self, key: &str, default: T) -> T {
        let Some(value) = self.config.get(key).filter(|value| !value.is_null()) else { return default };
        T::deserialize(value).unwrap_or_else(|error| {
            self.faults.push(Fault::new(key, format!("is {value}, which cannot be read: {error}")));
            default
        })
    }

    /// Refuses another value of a key than this one, if it is there.
    pub(crate) fn only(&mut self, key: &str, value: impl Into<Value>, otherwise: &str) {
        let (value, number) = (value.into(), Value::as_f64);
        let same = |found: &Value| *found == value || (found.is_number() && number(found) == number(&value));
        if let Some(found) = self.config.get(key).filter(|found| !found.is_null() && !same(found)) {
            self.faults.push(Fault::new(key, format!("is {found}, {otherwise}")));
        }
    }

    /// Refuses dropout of a kind that is not there: a finished adapter does not depend on it.
    pub(crate) fn no_dropout(&mut self, key: &str) {
        self.only(
            key,
            0,
            "a dropout that is not known here. Set it to 0 in the file: it changes nothing about what the adapter computes",
        );
    }

    /// One more fault.
    pub(crate) fn fault(&mut self, key: &str, message: impl Into<String>) {
        self.faults.push(Fault::new(key, message.into()));
    }

    /// # Errors
    /// What was at fault.
    pub(crate) fn finish(self) -> Result<(), Vec<Fault>> {
        if self.faults.is_empty() { Ok(()) } else { Err(self.faults) }
    }
}

/// `adapter_config.json` of an adapter of this type at linears, with keys of its own.
pub(crate) fn written<const N: usize>(peft_type: &str, own: [(&str, Value); N]) -> Map<String, Value> {
    let common = [
        ("peft_type", json!(peft_type)),
        ("peft_version", json!(PEFT_VERSION)),
        ("task_type", json!("CAUSAL_LM")),
        ("inference_mode", json!(true)),
        ("modules_to_save", Value::Null),
    ];
    common.into_iter().chain(own).map(|(key, value)| (key.to_owned(), value)).collect()
}

/// The modules without those that are a component's own, in one that is among them: what is spelt `q_proj.peanut_encoders.0.weight` is
/// `q_proj`'s.
pub(crate) fn without_inner(modules: &[String], prefix: &str) -> Vec<String> {
    let outer = |module: &String| {
        let last = module
            .rsplit_once('.')
            .map_or(module.as_str(), |(outer, last)| if last.starts_with(prefix) { outer } else { module.as_str() });
        last.to_owned()
    };
    modules.iter().map(outer).collect::<BTreeSet<_>>().into_iter().collect()
}

/// A number as PEFT writes it: whole ones as integers.
pub(crate) fn number(value: f64) -> Value {
    let whole = value as i64;
    if whole as f64 == value { json!(whole) } else { json!(value) }
}

/// Numbers by name, as PEFT writes them.
pub(crate) fn numbers(values: &BTreeMap<String, f64>) -> Value {
    Value::Object(values.iter().map(|(name, value)| (name.clone(), number(*value))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_computed_is_refused_by_its_key_and_neutral_values_pass() {
        let config = json!({"bias": "all", "modules_to_save": null, "r": -1, "dropout": 0.0, "rank_dropout": 0.5});
        let mut keys = Keys::of(config.as_object().unwrap());
        assert_eq!((keys.get("r", 8u32), keys.get("alpha", 3.0)), (8, 3.0));
        keys.no_dropout("dropout");
        keys.no_dropout("rank_dropout");
        let faults: Vec<String> = keys.finish().unwrap_err().iter().map(|fault| fault.path.to_string()).collect();
        assert_eq!(faults, ["bias", "r", "rank_dropout"]);
    }

    #[test]
    fn whole_numbers_are_written_as_integers() {
        assert_eq!((number(8.0).to_string(), number(1.5).to_string()), ("8".to_owned(), "1.5".to_owned()));
    }
}
