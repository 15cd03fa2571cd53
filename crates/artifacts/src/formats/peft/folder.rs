//! The folder of an adapter.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::Path;

use attune_spec::Fault;

use super::config::{CONFIG_FILE, LoraConfig};
use crate::error::{Error, Result};
use crate::formats::safetensors::{self, Tensor};
use crate::formats::write_file;

/// The tensors' file name.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The model card's file name.
pub const CARD_FILE: &str = "README.md";

/// Largest `adapter_config.json`: rank patterns of every site of a large model fit many times.
const CONFIG_BYTES_MAX: u64 = 16 << 20;

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
