//! What can be wrong with a file of tensors.

use std::path::PathBuf;

/// A file of tensors that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be opened or mapped.
    #[error("{}: cannot be opened: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's own account.
        #[source]
        source: std::io::Error,
    },
    /// The file is not in the safetensors format, or its end is missing.
    #[error("{}: is no complete safetensors file: {message}; copy or download it again", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with the header or the length.
        message: String,
    },
    /// A tensor is stored in a type that is not read.
    #[error("{}: tensor {name:?} is stored as {dtype}; expected F32, F64, BF16 or F16", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The type as the file calls it.
        dtype: String,
    },
}
