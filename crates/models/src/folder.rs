//! A model folder in Hugging Face's format: which file holds which tensor.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use attune_architecture::Architecture;
use attune_tensor::{Mapped, MappedTensor};

use crate::error::Error;

pub(crate) const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Reads the folder's `config.json`.
pub(crate) fn architecture(folder: &Path) -> Result<Architecture, Error> {
    let path = folder.join(CONFIG);
    let text = std::fs::read(&path).map_err(Error::io(&path))?;
    Architecture::from_json(&text).map_err(|source| Error::Architecture { folder: folder.to_owned(), source })
}

/// The mapped tensors of a folder, checked against what the architecture needs. Tensors beyond that (a tied head's copy, old
/// rotary buffers) are left alone.
pub(crate) fn tensors(folder: &Path, architecture: &Architecture) -> Result<BTreeMap<String, MappedTensor>, Error> {
    let files = files(folder)?.into_iter().map(|file| Mapped::open(&file)).collect::<Result<Vec<_>, _>>()?;
    let mut found = BTreeMap::new();
    for needed in architecture.tensors() {
        let mut holders = files.iter().map(|file| Ok((file, file.get(&needed.name)?)));
        let holder = holders.find_map(|held: Result<_, Error>| match held {
            Ok((file, Some(tensor))) => Some(Ok((file, tensor))),
            Ok((_, None)) => None,
            Err(error) => Some(Err(error)),
        });
        let Some(held) = holder else {
            return Err(Error::MissingTensor { folder: folder.to_owned(), name: needed.name });
        };
        let (file, tensor) = held?;
        if tensor.shape() != needed.shape {
            return Err(Error::Shape {
                file: file.path().to_owned(),
                name: needed.name,
                found: tensor.shape().to_vec(),
                expected: needed.shape,
            });
        }
        found.insert(needed.name, tensor);
    }
    Ok(found)
}

/// The safetensors files of a folder, in the order of their names: those of the index if there is one.
fn files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let index = folder.join(INDEX);
    let text = match std::fs::read(&index) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![folder.join(SINGLE)]),
        Err(error) => return Err(Error::io(index)(error)),
    };
    let format = |message: String| Error::Format { path: index.clone(), message };
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(|error| format(error.to_string()))?;
    let map = value.get("weight_map").and_then(serde_json::Value::as_object);
    let map = map.ok_or_else(|| format("has no mapping \"weight_map\" from tensors to files".to_owned()))?;
    let mut names = Vec::new();
    for name in map.values() {
        let name = name.as_str().ok_or_else(|| format(format!("names file {name}; expected a text")))?;
        // The index is untrusted: it names files of its own folder only.
        if name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.') {
            return Err(format(format!("names file {name:?}; expected a file of the same folder")));
        }
        names.push(name.to_owned());
    }
    names.sort_unstable();
    names.dedup();
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}
