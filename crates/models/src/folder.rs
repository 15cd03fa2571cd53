//! A model folder in Hugging Face's format: which file holds which tensor.

use std::path::{Path, PathBuf};

use attune_architecture::{Architecture, Place, TensorInfo};
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

/// What a folder holds of a tensor.
pub(crate) enum Found {
    /// Its numbers.
    Numbers(MappedTensor),
    /// A matrix in few bits: the file that has its parts, and the name that they begin with.
    Few(Mapped, String),
    /// Nothing, where that may be.
    Nothing,
}

/// The mapped tensors of a folder, checked against what the architecture needs. Tensors beyond that (a tied head's copy, old
/// buffers of masks and rotary angles) are left alone. Those at `fresh` places may be missing.
pub(crate) fn tensors(
    folder: &Path,
    architecture: &Architecture,
    fresh: &[Place],
) -> Result<Vec<(TensorInfo, Found)>, Error> {
    let files = files(folder)?.into_iter().map(|file| Mapped::open(&file)).collect::<Result<Vec<_>, _>>()?;
    let mut found = Vec::new();
    for needed in architecture.tensors() {
        if needed.place.quantizes()
            && let Some((file, name)) = few(&files, &architecture.spellings(&needed.name))
        {
            found.push((needed, Found::Few(file.clone(), name)));
            continue;
        }
        let Some((file, tensor)) = find(&files, &architecture.spellings(&needed.name))? else {
            if fresh.contains(&needed.place) {
                found.push((needed, Found::Nothing));
                continue;
            }
            return Err(Error::MissingTensor { folder: folder.to_owned(), name: needed.name });
        };
        if tensor.shape() != needed.stored_shape() {
            return Err(Error::Shape {
                file: file.path().to_owned(),
                expected: needed.stored_shape(),
                name: needed.name,
                found: tensor.shape().to_vec(),
            });
        }
        found.push((needed, Found::Numbers(tensor)));
    }
    Ok(found)
}

/// The file that holds a matrix in few bits under one of `names`, which is a matrix of bytes with parts beside it.
fn few<'f>(files: &'f [Mapped], names: &[String]) -> Option<(&'f Mapped, String)> {
    let held = |file: &&Mapped, name: &str| {
        let state = format!("{name}.quant_state.");
        file.stored(name).is_some_and(|stored| stored.dtype == "U8")
            && file.names().any(|other| other.starts_with(&state))
    };
    names.iter().find_map(|name| Some((files.iter().find(|file| held(file, name))?, name.clone())))
}

/// The tensor that one of the files holds under the first of `names` that any has.
fn find<'f>(files: &'f [Mapped], names: &[String]) -> Result<Option<(&'f Mapped, MappedTensor)>, Error> {
    for name in names {
        for file in files {
            if let Some(tensor) = file.get(name)? {
                return Ok(Some((file, tensor)));
            }
        }
    }
    Ok(None)
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
