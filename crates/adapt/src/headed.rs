//! What an adapter's folder says of the head that it was trained under, where that is not the base's: `head.json` beside the files of
//! PEFT's layout, which has the tensors and no names. Of a folder that PEFT wrote its own files say how many classes there are, or
//! sentence-transformers' how rows become a vector.

use std::path::Path;

use attune_artifacts::formats::peft::{PREFIX, WEIGHTS_FILE};
use attune_artifacts::formats::safetensors::Header;
use attune_artifacts::formats::sentence_transformers;
use attune_spec::job::{HeadSpec, HeadTask};
use serde_json::Value;

use crate::error::Error;

/// The file that says it.
const SAYS: &str = "head.json";

/// What PEFT calls what such models are for.
const TASKS: [(&str, HeadTask); 2] =
    [("SEQ_CLS", HeadTask::Classification), ("TOKEN_CLS", HeadTask::TokenClassification)];

/// What it calls one for vectors.
const VECTORS: &str = "FEATURE_EXTRACTION";

/// The modules that give logits of classes, as Hugging Face's models call them.
const MODULES: [&str; 2] = ["classifier", "score"];

/// What a folder says; nothing of an adapter that was trained under the base's own head.
///
/// # Errors
/// [`Error::Mismatch`] for a file that cannot be understood.
pub fn read(folder: &Path) -> Result<Option<HeadSpec>, Error> {
    let file = folder.join(SAYS);
    let mismatch = |message: String| Error::Mismatch { file: file.clone(), message };
    match std::fs::read(&file) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| mismatch(error.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => of_peft(folder),
        Err(error) => Err(mismatch(format!("cannot be read: {error}"))),
    }
}

/// The head that a folder of PEFT's has among the modules that it keeps whole, with the names that Hugging Face gives classes without.
fn of_peft(folder: &Path) -> Result<Option<HeadSpec>, Error> {
    let config = crate::peft::read_config(folder)?;
    let said = config.get("task_type").and_then(Value::as_str);
    if said == Some(VECTORS) {
        let pooling = sentence_transformers::pooling(folder)?;
        return Ok(pooling.map(|pooling| HeadSpec::of_vectors(Some(pooling), false)));
    }
    let Some((_, task)) = TASKS.into_iter().find(|(name, _)| said == Some(*name)) else { return Ok(None) };
    let header = Header::read(&folder.join(WEIGHTS_FILE))?;
    let of_head = |name: &str| MODULES.iter().any(|module| name == format!("{PREFIX}{module}.weight"));
    let mut found = header.tensors().iter().filter(|(name, _)| of_head(name));
    let labels = found.find_map(|(_, info)| match info.shape.as_slice() {
        [labels, _] => u32::try_from(*labels).ok().filter(|labels| (2..=65_536).contains(labels)),
        _ => None,
    });
    let named = |labels| (0..labels).map(|label| format!("LABEL_{label}")).collect();
    Ok(labels.map(|labels| HeadSpec::of_classes(task, named(labels))))
}

/// What a head does, in a few words.
pub fn spelt(head: &HeadSpec) -> String {
    match head.task {
        HeadTask::Embedding => {
            let pooling = serde_json::to_value(head.pooling.unwrap_or_default()).unwrap_or_default();
            let seeing = if head.bidirectional { ", of rows that see all others" } else { "" };
            format!("give vectors by {}{seeing}", pooling.as_str().unwrap_or_default())
        }
        _ => format!("tell [{}] apart", head.labels.join(", ")),
    }
}

/// Says it in a folder that is there, of rows of `width` numbers and texts of at most `max_length` tokens, if that is known.
///
/// # Errors
/// Whatever writing raises.
pub fn write(folder: &Path, head: &HeadSpec, width: usize, max_length: Option<u32>) -> Result<(), Error> {
    if head.gives_vectors() {
        sentence_transformers::write(folder, width, head.pooling.unwrap_or_default(), max_length)?;
    }
    let mut text = serde_json::to_string_pretty(head).unwrap_or_default();
    text.push('\n');
    let file = folder.join(SAYS);
    std::fs::write(&file, text).map_err(|source| {
        Error::Tensor(attune_points::Error::Io { what: format!("writing {}", file.display()), source })
    })
}
