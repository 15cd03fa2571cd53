//! What an adapter's folder says of the head that it was trained under, where that tells classes apart: `head.json` beside the files of
//! PEFT's layout, which has the tensors and no names.

use std::path::Path;

use attune_spec::job::HeadSpec;

use crate::error::Error;

/// The file that says it.
const SAYS: &str = "head.json";

/// What a folder says; nothing of an adapter that was trained under the base's own head.
///
/// # Errors
/// [`Error::Mismatch`] for a file that cannot be understood.
pub fn read(folder: &Path) -> Result<Option<HeadSpec>, Error> {
    let file = folder.join(SAYS);
    let mismatch = |message: String| Error::Mismatch { file: file.clone(), message };
    match std::fs::read(&file) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| mismatch(error.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(mismatch(format!("cannot be read: {error}"))),
    }
}

/// Says it in a folder that is there.
///
/// # Errors
/// Whatever writing raises.
pub fn write(folder: &Path, head: &HeadSpec) -> Result<(), Error> {
    let mut text = serde_json::to_string_pretty(head).unwrap_or_default();
    text.push('\n');
    let file = folder.join(SAYS);
    std::fs::write(&file, text).map_err(|source| {
        Error::Tensor(attune_points::Error::Io { what: format!("writing {}", file.display()), source })
    })
}
