//! What can be wrong with a model's folder.

use std::path::PathBuf;

/// A model that cannot be loaded or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the folder cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's own account.
        #[source]
        source: std::io::Error,
    },
    /// A file of the folder says something that is not understood.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        message: String,
    },
    /// `config.json` describes no model that can be built.
    #[error("{}/{source}", folder.display())]
    Architecture {
        /// The model's folder; the source names the file in it.
        folder: PathBuf,
        /// Every field at fault.
        #[source]
        source: attune_architecture::Error,
    },
    /// A file of weights cannot be used.
    #[error(transparent)]
    Weights(#[from] attune_tensor::Error),
    /// The files hold no tensor of a name that the model needs.
    #[error("{}: no file holds tensor {name:?}, which a model with this config.json needs", folder.display())]
    MissingTensor {
        /// The folder.
        folder: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{}: tensor {name:?} has shape {found:?}; config.json makes it {expected:?}", file.display())]
    Shape {
        /// The file that holds it.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// Its shape by the configuration.
        expected: Vec<usize>,
    },
    /// A surgery cannot make another model of the base.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Refused(Vec<attune_spec::Fault>),
    /// Computing on weights failed.
    #[error(transparent)]
    Tensor(#[from] attune_points::Error),
}

impl From<candle_core::Error> for Error {
    fn from(source: candle_core::Error) -> Self {
        Self::Tensor(source.into())
    }
}

impl Error {
    /// An input/output error at `path`.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
