//! What can be wrong with a file of statistics.

use std::path::PathBuf;

/// A file of statistics that cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is not there, or the disk fails.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's own account.
        #[source]
        source: std::io::Error,
    },
    /// It is no such file, or it is of something else.
    #[error("{path}: {message}", path = .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A tensor that cannot be read out.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}
