//! Writes a plain Hugging Face model folder.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use attune_architecture::{Architecture, HeadKind};
use attune_points::TensorName;
use candle_core::{DType, Tensor};

use crate::base::Base;
use crate::error::Error;
use crate::folder::CONFIG;

/// Files that travel with a model, beside its weights.
const COMPANIONS: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "config_sentence_transformers.json",
];

/// Writes the base with `replaced` weights in place of its own into the folder `to`, which is made. Configuration, tokenizer
/// and chat template are copied from `from`. Tensors are written in `dtype`; `config.json` names it. The same weights give
/// the same bytes.
///
/// # Errors
/// A name in `replaced` that the model does not have; whatever writing raises.
pub fn write(
    base: &Base,
    replaced: &BTreeMap<TensorName, Tensor>,
    dtype: DType,
    from: &Path,
    to: &Path,
) -> Result<(), Error> {
    std::fs::create_dir_all(to).map_err(Error::io(to))?;
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    let infos = base.architecture().tensors();
    for name in replaced.keys() {
        if !infos.iter().any(|info| info.name == name.to_string()) {
            let message = format!("tensor {name} is not one of the model's");
            return Err(Error::Format { path: to.to_owned(), message });
        }
    }
    for info in infos {
        let name = TensorName::from_path(&info.name);
        let tensor = match replaced.get(&name) {
            Some(tensor) => tensor.to_dtype(dtype)?,
            None => base.tensor(&name, dtype)?,
        };
        let tensor = if info.transposed { tensor.t()? } else { tensor };
        tensors.insert(info.name, tensor.contiguous()?);
    }
    let file = to.join("model.safetensors");
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    // The library orders tensors by type and name, so the order of the map does not show.
    safetensors::serialize_to_file(tensors, Some(metadata), &file).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => Error::Io { path: file, source },
        error => Error::Format { path: file, message: error.to_string() },
    })?;
    let config = from.join(CONFIG);
    let text = std::fs::read(&config).map_err(Error::io(&config))?;
    let to_config = to.join(CONFIG);
    std::fs::write(&to_config, rewritten(&text, dtype, base.architecture(), &config)?)
        .map_err(Error::io(&to_config))?;
    for name in COMPANIONS {
        match std::fs::copy(from.join(name), to.join(name)) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(from.join(name))(error)),
        }
    }
    Ok(())
}

/// Gives the classes of a written model folder their names: `id2label` and `label2id` of its `config.json`.
///
/// # Errors
/// Whatever reading or writing the file raises.
pub fn name_classes(folder: &Path, names: &[String]) -> Result<(), Error> {
    let path = folder.join(CONFIG);
    let text = std::fs::read(&path).map_err(Error::io(&path))?;
    let format = |error: serde_json::Error| Error::Format { path: path.clone(), message: error.to_string() };
    let mut config: serde_json::Map<_, _> = serde_json::from_slice(&text).map_err(format)?;
    classes(&mut config, names);
    let mut text = serde_json::to_vec_pretty(&config).map_err(format)?;
    text.push(b'\n');
    std::fs::write(&path, text).map_err(Error::io(&path))
}

/// The names that the classes of a model folder have, in the order of their numbers; none where its `config.json` has none, or only the
/// numbers themselves.
///
/// # Errors
/// A `config.json` that cannot be read.
pub fn named_classes(folder: &Path) -> Result<Vec<String>, Error> {
    let path = folder.join(CONFIG);
    let text = std::fs::read(&path).map_err(Error::io(&path))?;
    let format = |error: serde_json::Error| Error::Format { path: path.clone(), message: error.to_string() };
    let config: serde_json::Value = serde_json::from_slice(&text).map_err(format)?;
    let Some(names) = config.get("id2label").and_then(serde_json::Value::as_object) else { return Ok(Vec::new()) };
    let name = |id: usize| Some(names.get(&id.to_string())?.as_str()?.to_owned());
    let found: Vec<String> = (0..names.len()).map_while(name).collect();
    let is_number = |(id, name): (usize, &String)| *name == unnamed(id);
    let said = found.len() == names.len() && !found.iter().enumerate().all(is_number);
    Ok(if said { found } else { Vec::new() })
}

/// What a class without a name is called.
fn unnamed(id: usize) -> String {
    format!("LABEL_{id}")
}

/// Writes the names of classes, in the order of their numbers.
fn classes(config: &mut serde_json::Map<String, serde_json::Value>, names: &[String]) {
    let id2label: serde_json::Map<_, _> =
        names.iter().enumerate().map(|(id, name)| (id.to_string(), name.as_str().into())).collect();
    let label2id: serde_json::Map<_, _> =
        names.iter().enumerate().map(|(id, name)| (name.clone(), id.into())).collect();
    config.insert("id2label".to_owned(), id2label.into());
    config.insert("label2id".to_owned(), label2id.into());
}

/// The text of a `config.json` naming the type that the weights are written in, under the spelling that it used, and the
/// head and the form of the layers if they are others than the text's own.
fn rewritten(text: &[u8], dtype: DType, architecture: &Architecture, path: &Path) -> Result<Vec<u8>, Error> {
    let format = |error: serde_json::Error| Error::Format { path: path.to_owned(), message: error.to_string() };
    let mut config: serde_json::Value = serde_json::from_slice(text).map_err(format)?;
    let name = match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        DType::F64 => "float64",
        _ => "float32",
    };
    if let Some(config) = config.as_object_mut() {
        let key = if config.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
        config.insert(key.to_owned(), name.into());
        // All numbers are whole now.
        config.remove("quantization_config");
        let read = Architecture::from_json(text).ok();
        let form = |of: &Architecture| (of.family, of.inner, of.layers);
        if read.as_ref().is_some_and(|read| form(read) != form(architecture)) {
            architecture.write_config(config);
        }
        if read.as_ref().is_some_and(|read| read.causal && !architecture.causal) {
            config.insert("is_causal".to_owned(), false.into());
        }
        // A vector needs no head: whatever the base's was is left out.
        let is_trunk = matches!(architecture.head, HeadKind::Embedding(_));
        if is_trunk || read.is_some_and(|read| read.head != architecture.head) {
            config.insert("architectures".to_owned(), serde_json::json!([architecture.class_name()]));
            if let Some(labels) = architecture.head.labels() {
                classes(config, &(0..labels).map(unnamed).collect::<Vec<_>>());
            }
        }
    }
    let mut text = serde_json::to_vec_pretty(&config).map_err(format)?;
    text.push(b'\n');
    Ok(text)
}
