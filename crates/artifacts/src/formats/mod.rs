//! Files of other projects, read as untrusted input and written so that their own tools read them. Bytes and shapes
//! only; the training half turns them into tensors.

pub mod card;
pub mod peft;
pub mod safetensors;
pub mod sentence_transformers;

use std::fs;
use std::io::{self, BufWriter};
use std::path::Path;

use crate::error::{Error, Result};

/// Writes a file that appears under its name only when it is complete and durable.
fn write_file(path: &Path, write: impl FnOnce(&mut BufWriter<fs::File>) -> io::Result<()>) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!("{name}.{}.partial", uuid::Uuid::now_v7().simple()));
    let written = fs::File::create_new(&partial).and_then(|file| {
        let mut file = BufWriter::new(file);
        write(&mut file)?;
        let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    });
    written.map_err(|e| {
        // It may not be there; the first error is the one to report.
        let _ = fs::remove_file(&partial);
        Error::io("write", path, e)
    })
}
