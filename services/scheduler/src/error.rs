//! Why a scheduler does not start, or ended by itself.

use attune_telemetry::TaskFailure;

/// Why a scheduler does not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The database could not be opened, is held by another scheduler, or fails for good.
    #[error(transparent)]
    Store(#[from] attune_store::Error),
    /// The artifact store could not be opened.
    #[error(transparent)]
    Artifacts(#[from] attune_artifacts::Error),
    /// The folder of `data_root` could not be opened.
    #[error("data root {path:?} cannot be opened")]
    DataRoot {
        /// The folder.
        path: std::path::PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Nobody could give out tokens, or what should do so cannot be used.
    #[error("{0}")]
    Auth(String),
    /// The file of the first admin's token cannot be read or written.
    #[error("the admin's token cannot be kept in {path:?}")]
    AdminFile {
        /// The file.
        path: std::path::PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Connections cannot be encrypted with what was given.
    #[error("no encrypted connection can be made with this certificate and key: {0}")]
    Tls(String),
    /// The stored rows do not fit together.
    #[error("the control plane's database cannot be understood: {0}")]
    Restore(String),
    /// The server could not accept connections.
    #[error("the server failed: {0}")]
    Server(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A part that the scheduler cannot do without has failed.
    #[error("the scheduler ended: {0}")]
    Task(TaskFailure),
}

impl From<attune_scheduler_core::RestoreError> for Error {
    fn from(error: attune_scheduler_core::RestoreError) -> Self {
        Self::Restore(error.to_string())
    }
}

impl From<attune_scheduler_core::ParseError> for Error {
    fn from(error: attune_scheduler_core::ParseError) -> Self {
        Self::Restore(error.to_string())
    }
}
