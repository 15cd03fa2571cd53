//! What can be wrong with an adapter's folder.

use std::path::PathBuf;

use attune_spec::Fault;

/// An adapter that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the folder cannot be used; names the file.
    #[error(transparent)]
    Format(#[from] attune_artifacts::Error),
    /// A file of tensors cannot be used; names the file.
    #[error(transparent)]
    Weights(#[from] attune_tensor::Error),
    /// The configuration asks for something that this build does not read.
    #[error("{}: {}", folder.display(), .faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Unsupported {
        /// The folder.
        folder: PathBuf,
        /// The keys at fault.
        faults: Vec<Fault>,
    },
    /// The tensors do not belong to the configuration or to the base.
    #[error("{}: {message}", file.display())]
    Mismatch {
        /// The file of tensors.
        file: PathBuf,
        /// What is wrong and what would be right.
        message: String,
    },
    /// Computing on tensors failed.
    #[error(transparent)]
    Tensor(#[from] attune_points::Error),
}

impl From<candle_core::Error> for Error {
    fn from(source: candle_core::Error) -> Self {
        Self::Tensor(source.into())
    }
}
