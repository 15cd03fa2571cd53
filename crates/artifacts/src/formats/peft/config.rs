//! `adapter_config.json`. Keys that are not known here are ignored on reading; on writing every key below is there,
//! sorted, with two spaces of indent.

use std::collections::BTreeMap;

use attune_spec::Fault;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The configuration's file name.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The version whose layout is followed, written as `peft_version`.
pub const PEFT_VERSION: &str = "0.21.2";

/// Modules by name or by pattern.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Modules {
    /// The last parts of module paths, or whole ones.
    Names(Vec<String>),
    /// A regular expression that matches whole paths, or `all-linear`.
    Pattern(String),
}

/// A layer index or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Layers {
    /// One.
    One(u32),
    /// Several.
    Many(Vec<u32>),
}

/// `init_lora_weights`: a flag or a method's name. It matters at the start of training only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum InitWeights {
    /// `true`: Kaiming A, zero B.
    Flag(bool),
    /// `gaussian`, `pissa`, …
    Named(String),
}

/// `adapter_config.json` of a LoRA adapter. Fields are in the order of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// Alpha by pattern of module paths.
    #[serde(serialize_with = "numbers")]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Set by PEFT for models without a task type.
    pub auto_mapping: Option<serde_json::Value>,
    /// The base as a hub id or a digest; never a local path.
    pub base_model_name_or_path: Option<String>,
    /// Which biases are trained: `none`, `all`, `lora_only`.
    pub bias: String,
    /// Modules that are left out.
    pub exclude_modules: Option<Modules>,
    /// Whether base weights are stored `[in, out]`. A and B are the same either way, and the base itself knows, so a
    /// reader has nothing to do about it.
    pub fan_in_fan_out: bool,
    /// Always `true` in a saved adapter.
    pub inference_mode: bool,
    /// How A and B started.
    pub init_lora_weights: InitWeights,
    /// Repeated layers of the base: a matter of the base, whatever stands beside it.
    pub layer_replication: Option<serde_json::Value>,
    /// Name of the list of layers, for `layers_to_transform`.
    pub layers_pattern: Option<Modules>,
    /// The only layers that have an adapter.
    pub layers_to_transform: Option<Layers>,
    /// Numerator of the scaling.
    #[serde(serialize_with = "number")]
    pub lora_alpha: f64,
    /// Whether B has a bias.
    pub lora_bias: bool,
    /// Dropout on the input of A.
    pub lora_dropout: f64,
    /// Modules that are trained and stored whole.
    pub modules_to_save: Option<Vec<String>>,
    /// `LORA`.
    pub peft_type: String,
    /// The version that wrote it, or whose layout it follows.
    pub peft_version: Option<String>,
    /// Rank.
    pub r: u32,
    /// Rank by pattern of module paths.
    pub rank_pattern: BTreeMap<String, u32>,
    /// Revision of the base.
    pub revision: Option<String>,
    /// Modules that have an adapter.
    pub target_modules: Option<Modules>,
    /// Parameters (not modules) that have an adapter.
    pub target_parameters: Option<Vec<String>>,
    /// `CAUSAL_LM` for a decoder.
    pub task_type: Option<String>,
    /// Rows of the embedding that are trained.
    pub trainable_token_indices: Option<serde_json::Value>,
    /// Weight-decomposed LoRA.
    pub use_dora: bool,
    /// Scaling by alpha / sqrt(r) instead of alpha / r.
    pub use_rslora: bool,
    /// Keys of other methods that PEFT keeps among LoRA's, as far as they are asked for.
    #[serde(skip)]
    pub others: Vec<&'static str>,
}

/// Keys by which a configuration of LoRA asks for another method: A and B mean something else then.
const OTHERS: [&str; 6] =
    ["alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora"];

impl Default for LoraConfig {
    /// PEFT's own defaults, as a saved adapter has them.
    fn default() -> Self {
        Self {
            alpha_pattern: BTreeMap::new(),
            auto_mapping: None,
            base_model_name_or_path: None,
            bias: "none".into(),
            exclude_modules: None,
            fan_in_fan_out: false,
            inference_mode: true,
            init_lora_weights: InitWeights::Flag(true),
            layer_replication: None,
            layers_pattern: None,
            layers_to_transform: None,
            lora_alpha: 8.0,
            lora_bias: false,
            lora_dropout: 0.0,
            modules_to_save: None,
            peft_type: "LORA".into(),
            peft_version: Some(PEFT_VERSION.into()),
            r: 8,
            rank_pattern: BTreeMap::new(),
            revision: None,
            target_modules: None,
            target_parameters: None,
            task_type: Some("CAUSAL_LM".into()),
            trainable_token_indices: None,
            use_dora: false,
            others: Vec::new(),
            use_rslora: false,
        }
    }
}

fn numbers<S: serde::Serializer>(values: &BTreeMap<String, f64>, serializer: S) -> Result<S::Ok, S::Error> {
    struct Number(f64);
    impl Serialize for Number {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            number(&self.0, serializer)
        }
    }
    serializer.collect_map(values.iter().map(|(key, value)| (key, Number(*value))))
}

/// PEFT writes whole alphas as integers.
fn number<S: serde::Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    let whole = *value as i64;
    if whole as f64 == *value { serializer.serialize_i64(whole) } else { serializer.serialize_f64(*value) }
}

impl LoraConfig {
    /// Reads the text of an `adapter_config.json`.
    ///
    /// # Errors
    /// [`Error::Refused`] when it is not JSON, a value has the wrong type, or it is not LoRA's.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let refuse = |path: &str, message: String| Error::Refused {
            what: CONFIG_FILE.into(),
            faults: vec![Fault::new(path, message)],
        };
        let broken = |e: serde_json::Error| refuse("", format!("cannot be read: {e}"));
        let all: serde_json::Value = serde_json::from_slice(text).map_err(broken)?;
        let is_asked = |key: &&str| all.get(*key).is_some_and(|value| !value.is_null() && value != false);
        let others = OTHERS.into_iter().filter(is_asked).collect();
        let config = Self { others, ..Self::deserialize(&all).map_err(broken)? };
        if config.peft_type != "LORA" {
            let shown: String = config.peft_type.chars().take(40).collect();
            return Err(refuse("peft_type", format!("is {shown:?}; this version reads \"LORA\"")));
        }
        if config.r == 0 {
            return Err(refuse("r", "is 0; expected at least 1".into()));
        }
        if let Some((key, _)) = config.rank_pattern.iter().find(|(_, rank)| **rank == 0) {
            let shown: String = key.chars().take(200).collect();
            return Err(refuse("rank_pattern", format!("has the rank 0 for {shown:?}; expected at least 1")));
        }
        Ok(config)
    }

    /// The file's text: sorted keys, two spaces of indent, as PEFT writes it.
    ///
    /// # Errors
    /// [`Error::Refused`] when the base is named by a local path, which means nothing on another machine, a number is not finite,
    /// or it was read of another method, whose keys would be lost.
    pub fn render(&self) -> Result<String> {
        let of_another = "is another method's, which is not written as plain LoRA";
        let mut faults: Vec<Fault> = self.others.iter().map(|key| Fault::new(*key, of_another)).collect();
        if let Some(base) = &self.base_model_name_or_path
            && !is_hub_id(base)
            && base.parse::<attune_spec::id::Digest>().is_err()
        {
            faults.push(Fault::new(
                "base_model_name_or_path",
                format!("is {base:?}; expected a hub id (`owner/name`) or an artifact digest, never a local path"),
            ));
        }
        let numbers = [("lora_alpha", self.lora_alpha), ("lora_dropout", self.lora_dropout)];
        let patterns = self.alpha_pattern.values().map(|alpha| ("alpha_pattern", *alpha));
        faults.extend(
            numbers
                .into_iter()
                .chain(patterns)
                .filter(|(_, value)| !value.is_finite())
                .map(|(field, value)| Fault::new(field, format!("is {value}; expected a finite number"))),
        );
        if !faults.is_empty() {
            return Err(Error::Refused { what: CONFIG_FILE.into(), faults });
        }
        Ok(serde_json::to_string_pretty(self).expect("a configuration has string keys only"))
    }

    /// What a reader of plain LoRA cannot honour, each by the key that asks for it. Empty means that scaling, A and B
    /// say everything.
    pub fn beyond_plain(&self) -> Vec<Fault> {
        let set = |value: &Option<serde_json::Value>| value.as_ref().is_some_and(|value| !value.is_null());
        let asked = [
            ("bias", self.bias != "none"),
            ("lora_bias", self.lora_bias),
            ("modules_to_save", self.modules_to_save.as_ref().is_some_and(|modules| !modules.is_empty())),
            ("target_parameters", self.target_parameters.as_ref().is_some_and(|names| !names.is_empty())),
            ("trainable_token_indices", set(&self.trainable_token_indices)),
            ("use_dora", self.use_dora),
        ];
        let message = "asks for more than plain LoRA, which this version does not read";
        let asked = asked.into_iter().filter(|(_, asked)| *asked).map(|(key, _)| key);
        asked.chain(self.others.iter().copied()).map(|key| Fault::new(key, message)).collect()
    }
}

/// Whether `name` has the form of a hub id: `name` or `owner/name`, nothing that could be a path.
pub fn is_hub_id(name: &str) -> bool {
    let part = |part: &str| {
        (1..=96).contains(&part.len())
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            && !part.starts_with(['.', '-'])
            && !part.ends_with(['.', '-'])
            && !part.contains("..")
    };
    let mut parts = name.split('/');
    parts.by_ref().take(2).all(part) && parts.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_configuration_has_sorted_keys_and_reads_back() {
        let config = LoraConfig {
            base_model_name_or_path: Some("HuggingFaceTB/SmolLM2-135M".into()),
            lora_alpha: 32.0,
            r: 16,
            target_modules: Some(Modules::Names(vec!["model.layers.0.self_attn.q_proj".into()])),
            alpha_pattern: BTreeMap::from([("q_proj".into(), 1.5)]),
            ..LoraConfig::default()
        };
        let text = config.render().unwrap();
        assert_eq!(LoraConfig::parse(text.as_bytes()).unwrap(), config);
        assert!(text.contains("\n  \"lora_alpha\": 32,\n") && text.contains("\"q_proj\": 1.5"), "{text}");
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
        assert!(keys.is_sorted(), "{keys:?}");
        // What other tools look at, and must therefore be there whatever the values are.
        for key in [
            "peft_type",
            "task_type",
            "base_model_name_or_path",
            "revision",
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "bias",
            "fan_in_fan_out",
            "init_lora_weights",
            "modules_to_save",
            "rank_pattern",
            "alpha_pattern",
            "layers_to_transform",
            "layers_pattern",
            "use_rslora",
            "use_dora",
            "inference_mode",
            "peft_version",
        ] {
            assert!(value.get(key).is_some(), "{key} is not written");
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        let parse = |text: &str| LoraConfig::parse(text.as_bytes()).map(|_| ()).unwrap_err().to_string();
        assert!(parse("{\"peft_type\": \"LOHA\", \"r\": 8}").contains("`peft_type` is \"LOHA\""));
        assert!(parse("{\"r\": 0}").contains("`r` is 0"));
        assert!(parse("{\"rank_pattern\": {\"q\": 0}}").contains("`rank_pattern` has the rank 0 for \"q\""));
        assert!(parse("{\"r\": -1}").contains("cannot be read"));
        assert!(parse(&"[".repeat(100_000)).contains("cannot be read"));
        let of_another = LoraConfig::parse(b"{\"use_qalora\": true}").unwrap().render().unwrap_err().to_string();
        assert!(of_another.contains("`use_qalora` is another method's"), "{of_another}");
        let odd = br#"{"use_dora": true, "bias": "all", "modules_to_save": ["lm_head"], "layer_replication": [[0, 1]],
            "target_parameters": ["experts.up"], "trainable_token_indices": [1], "lora_bias": true, "fan_in_fan_out": true,
            "use_qalora": true, "use_bdlora": null, "alora_invocation_tokens": [3]}"#;
        let keys: Vec<_> =
            LoraConfig::parse(odd).unwrap().beyond_plain().into_iter().map(|f| f.path.to_string()).collect();
        assert_eq!(
            keys,
            [
                "bias",
                "lora_bias",
                "modules_to_save",
                "target_parameters",
                "trainable_token_indices",
                "use_dora",
                "alora_invocation_tokens",
                "use_qalora",
            ]
        );
        assert!(LoraConfig::default().beyond_plain().is_empty());
    }

    #[test]
    fn a_local_path_is_no_name_of_a_base() {
        let render =
            |base: &str| LoraConfig { base_model_name_or_path: Some(base.into()), ..LoraConfig::default() }.render();
        let digest = format!("blake3:{}", "0".repeat(64));
        for good in ["gpt2", "owner/name-1.5_b", digest.as_str()] {
            render(good).unwrap();
        }
        for bad in
            ["/models/base", "./base", "../base", "a/b/c", "~/base", "C:\\base", "file:///x", "", "a/", "-x/y", "a/..b"]
        {
            let error = render(bad).unwrap_err().to_string();
            assert!(
                error.contains("`base_model_name_or_path`") && error.contains("never a local path"),
                "{bad}: {error}"
            );
        }
        let error = LoraConfig { lora_alpha: f64::NAN, ..LoraConfig::default() }.render().unwrap_err().to_string();
        assert!(error.contains("`lora_alpha` is NaN"), "{error}");
    }
}
