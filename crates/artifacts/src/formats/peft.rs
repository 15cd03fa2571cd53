//! PEFT's layout of a LoRA adapter: `adapter_config.json`, the names of its tensors, and the folder that holds both.
//!
//! Follows what peft 0.21.2 writes. Keys that are not known here are ignored on reading; on writing every key below is
//! there, sorted, with two spaces of indent.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::Path;

use attune_spec::Fault;
use serde::{Deserialize, Serialize};

use super::safetensors::{self, Tensor};
use super::write_file;
use crate::error::{Error, Result};

/// The configuration's file name.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The tensors' file name.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The model card's file name.
pub const CARD_FILE: &str = "README.md";
/// The version whose layout is followed, written as `peft_version`.
pub const PEFT_VERSION: &str = "0.21.2";
/// What PEFT puts before a module's path in the name of a tensor.
pub const PREFIX: &str = "base_model.model.";

/// Largest `adapter_config.json`: rank patterns of every site of a large model fit many times.
const CONFIG_BYTES_MAX: u64 = 16 << 20;

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
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Set by PEFT for models without a task type.
    pub auto_mapping: Option<serde_json::Value>,
    /// The base as a hub id or a digest; never a local path.
    pub base_model_name_or_path: Option<String>,
    /// Which biases are trained: `none`, `all`, `lora_only`.
    pub bias: String,
    /// Modules that are left out.
    pub exclude_modules: Option<Modules>,
    /// Whether base weights are stored `[in, out]`.
    pub fan_in_fan_out: bool,
    /// Always `true` in a saved adapter.
    pub inference_mode: bool,
    /// How A and B started.
    pub init_lora_weights: InitWeights,
    /// Repeated layers.
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
}

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
            use_rslora: false,
        }
    }
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
        let config: Self = serde_json::from_slice(text).map_err(|e| refuse("", format!("cannot be read: {e}")))?;
        if config.peft_type != "LORA" {
            let shown: String = config.peft_type.chars().take(40).collect();
            return Err(refuse("peft_type", format!("is {shown:?}; this version reads \"LORA\"")));
        }
        if config.r == 0 {
            return Err(refuse("r", "is 0; expected at least 1".into()));
        }
        Ok(config)
    }

    /// The file's text: sorted keys, two spaces of indent, as PEFT writes it.
    ///
    /// # Errors
    /// [`Error::Refused`] when the base is named by a local path, which means nothing on another machine, or a number
    /// is not finite.
    pub fn render(&self) -> Result<String> {
        let mut faults = Vec::new();
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
            ("fan_in_fan_out", self.fan_in_fan_out),
            ("layer_replication", set(&self.layer_replication)),
            ("lora_bias", self.lora_bias),
            ("modules_to_save", self.modules_to_save.as_ref().is_some_and(|modules| !modules.is_empty())),
            ("target_parameters", self.target_parameters.as_ref().is_some_and(|names| !names.is_empty())),
            ("trainable_token_indices", set(&self.trainable_token_indices)),
            ("use_dora", self.use_dora),
        ];
        let message = "asks for more than plain LoRA, which this version does not read";
        asked.into_iter().filter(|(_, asked)| *asked).map(|(key, _)| Fault::new(key, message)).collect()
    }

    /// The factor on `B A x` at rank `rank` and alpha `alpha`, which are the configuration's own or a pattern's.
    pub fn scaling(&self, rank: u32, alpha: f64) -> f64 {
        let rank = f64::from(rank);
        if self.use_rslora { alpha / rank.sqrt() } else { alpha / rank }
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

/// Which half of a pair of factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Factor {
    /// `A`, shape `[r, in]`.
    A,
    /// `B`, shape `[out, r]`.
    B,
}

/// The name of a factor's tensor: `base_model.model.<module>.lora_A.weight`.
pub fn tensor_name(module: &str, factor: Factor) -> String {
    let letter = match factor {
        Factor::A => 'A',
        Factor::B => 'B',
    };
    format!("{PREFIX}{module}.lora_{letter}.weight")
}

/// The module and factor that a tensor's name says; nothing when it is no factor of a linear LoRA.
pub fn parse_tensor_name(name: &str) -> Option<(&str, Factor)> {
    let rest = name.strip_prefix(PREFIX)?;
    let by = |suffix: &str, factor| {
        rest.strip_suffix(suffix).filter(|module| !module.is_empty()).map(|module| (module, factor))
    };
    by(".lora_A.weight", Factor::A).or_else(|| by(".lora_B.weight", Factor::B))
}

/// Writes an adapter folder (made if absent): configuration, tensors with `format: pt`, and a card if there is one.
/// The same input gives the same bytes. Blocks.
///
/// # Errors
/// As [`LoraConfig::render`] and [`safetensors::write`]; [`Error::Io`], [`Error::Full`].
pub fn write_folder(folder: &Path, config: &LoraConfig, tensors: &[Tensor<'_>], card: Option<&str>) -> Result<()> {
    let text = config.render()?;
    fs::create_dir_all(folder).map_err(|e| Error::io("create the folder", folder, e))?;
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::write(&folder.join(WEIGHTS_FILE), tensors, &metadata)?;
    if let Some(card) = card {
        write_file(&folder.join(CARD_FILE), |file| file.write_all(card.as_bytes()))?;
    }
    write_file(&folder.join(CONFIG_FILE), |file| file.write_all(text.as_bytes()))
}

/// Reads the configuration and validates the tensors' header of an adapter folder. Blocks.
///
/// # Errors
/// As [`LoraConfig::parse`] and [`safetensors::Header::read`]; [`Error::NotFound`] when a file is missing.
pub fn read_folder(folder: &Path) -> Result<(LoraConfig, safetensors::Header)> {
    let path = folder.join(CONFIG_FILE);
    let mut text = Vec::new();
    let read = fs::File::open(&path).and_then(|file| file.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut text));
    read.map_err(|e| missing(folder, CONFIG_FILE, Error::io("read", &path, e)))?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        let faults = vec![Fault::new("", format!("is larger than {CONFIG_BYTES_MAX} bytes"))];
        return Err(Error::Refused { what: path.display().to_string(), faults });
    }
    let config = LoraConfig::parse(&text)?;
    let header = safetensors::Header::read(&folder.join(WEIGHTS_FILE)).map_err(|e| missing(folder, WEIGHTS_FILE, e))?;
    Ok((config, header))
}

fn missing(folder: &Path, name: &str, error: Error) -> Error {
    match error {
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Error::NotFound { what: name.into(), place: folder.display().to_string() }
        }
        other => other,
    }
}
