//! What an adapter's folder says of the base that it was trained on, where linears of that were held in few bits: two files beside those
//! of PEFT's layout, which pass them by.
//!
//! `base_quantization.json` has the format and the type of products, in the words of a job file. Where a start had weights quantised
//! anew, `base_quantization.safetensors` has the tensors of the component less whose change that was done, so that anybody can make the
//! same base of the one that everybody has.

use std::collections::BTreeMap;
use std::path::Path;

use attune_artifacts::formats::safetensors::{self, Dtype};
use attune_points::adapter::Attachment;
use attune_points::{Params, TensorName};
use attune_spec::job::Precision;
use attune_spec::method::MethodRef;
use attune_tensor::{Mapped, bytes};
use candle_core::DType;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The file that says how.
const SAYS: &str = "base_quantization.json";
/// The file of what was taken out first.
const LESS: &str = "base_quantization.safetensors";

/// How the base of an adapter was held.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Held {
    /// The type of products.
    pub precision: Precision,
    /// The format of its linears, with all parameters.
    pub quantization: MethodRef,
}

/// What a folder says; nothing of an adapter whose base had whole numbers, or of which nobody knows.
///
/// # Errors
/// [`Error::Mismatch`] for a file that cannot be understood.
pub fn read(folder: &Path) -> Result<Option<Held>, Error> {
    let file = folder.join(SAYS);
    let mismatch = |message: String| Error::Mismatch { file: file.clone(), message };
    match std::fs::read(&file) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| mismatch(error.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(mismatch(format!("cannot be read: {error}"))),
    }
}

/// The tensors of the component at `attachments` less whose change weights were quantised anew; nothing where none were.
///
/// # Errors
/// [`Error::Mismatch`] for tensors that are missing, have another shape, or are nobody's.
pub fn read_less(folder: &Path, attachments: &[Attachment]) -> Result<Option<Params>, Error> {
    let file = folder.join(LESS);
    if !file.is_file() {
        return Ok(None);
    }
    let mismatch = |message: String| Error::Mismatch { file: file.clone(), message };
    let header = safetensors::Header::read(&file)?;
    let (mapped, mut params) = (Mapped::open(&file)?, Params::new());
    for at in attachments {
        for spec in &at.tensors {
            let name = spec.name(at.site.as_str());
            let tensor = mapped.get(&name.to_string())?.ok_or_else(|| mismatch(format!("has no tensor {name}")))?;
            if tensor.shape() != spec.shape {
                let message =
                    format!("tensor {name} has shape {:?}; the adapter makes it {:?}", tensor.shape(), spec.shape);
                return Err(mismatch(message));
            }
            params.insert_declared(spec, at.site.as_str(), tensor.to_tensor(DType::F32)?);
        }
    }
    match header.tensors().iter().find(|(name, _)| params.get(&TensorName::from_path(name)).is_none()) {
        Some((name, _)) => Err(mismatch(format!("tensor {name:?} belongs to no site of the adapter"))),
        None => Ok(Some(params)),
    }
}

/// Writes what a folder says of its base, `less` where weights were quantised anew. The same tensors give the same bytes.
///
/// # Errors
/// Whatever writing raises.
pub fn write(folder: &Path, held: &Held, less: Option<&Params>) -> Result<(), Error> {
    let io = |name: &str, source| {
        let what = format!("writing {}", folder.join(name).display());
        Error::Tensor(attune_points::Error::Io { what, source })
    };
    let mut text = serde_json::to_string_pretty(held).unwrap_or_default();
    text.push('\n');
    std::fs::write(folder.join(SAYS), text).map_err(|error| io(SAYS, error))?;
    let Some(less) = less else { return Ok(()) };
    let mut written = Vec::new();
    for (name, tensor) in less.iter() {
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let data = bytes::of_f32(&values).into_owned();
        written.push((name.to_string(), tensor.dims().to_vec(), data));
    }
    let tensors: Vec<safetensors::Tensor<'_>> = written
        .iter()
        .map(|(name, shape, data)| safetensors::Tensor {
            name: name.clone(),
            dtype: Dtype::F32,
            shape: shape.clone(),
            data,
        })
        .collect();
    safetensors::write(&folder.join(LESS), &tensors, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?;
    Ok(())
}
