//! Why an agent ended.

use std::path::{Path, PathBuf};

/// What an agent cannot go on after.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The scheduler's address cannot be one.
    #[error(transparent)]
    Connect(#[from] attune_proto::client::ConnectError),
    /// The scheduler does not want this worker.
    #[error("the scheduler refuses this worker: {message}")]
    Refused {
        /// Why.
        message: String,
    },
    /// Another agent works in the same folder.
    #[error("another worker runs in {}; give this one a --work-dir of its own", path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// More NVIDIA devices are to be offered than there are.
    #[error(
        "{wanted} NVIDIA devices were to be offered; this program finds {found} (it needs their driver, and to be built with the feature `cuda`)"
    )]
    Cards {
        /// What was asked for.
        wanted: u32,
        /// What there is.
        found: usize,
    },
    /// The work folder cannot be used.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// The verb.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The cache of inputs cannot be used.
    #[error(transparent)]
    Cache(#[from] attune_artifacts::Error),
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }
}
