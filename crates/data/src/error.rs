//! What can go wrong with data, by what the caller can do about it.

use std::path::PathBuf;

use attune_spec::Fault;

use crate::origin::BadRows;

/// An error of the data room.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not a source this room can read from.
    #[error("data source {url:?} {message}")]
    Source {
        /// The source as written.
        url: String,
        /// What is wrong with it and what would be right; reads on from the quoted source.
        message: String,
    },
    /// A file could not be opened or read.
    #[error("{file}: cannot be read: {source}")]
    Read {
        /// The file as written.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A remote object could not be read. Worth another attempt when `retry` says so.
    #[error("{url}: cannot be read from the object store: {message}")]
    Remote {
        /// The object's URL.
        url: String,
        /// The store's words.
        message: String,
        /// Whether the same call may succeed later.
        retry: bool,
    },
    /// A file as a whole is not what its name says.
    #[error("{file}: {message}")]
    File {
        /// The file as written.
        file: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// Rows that do not fit, and the policy is to fail.
    #[error("{0}")]
    BadRows(Box<BadRows>),
    /// A file from which nothing can be trained.
    #[error("{file}: {message}")]
    NoRows {
        /// The file as written.
        file: String,
        /// How it came to be empty.
        message: String,
    },
    /// A chat template that does not compile or does not exist.
    #[error("chat template of {place}: {message}")]
    Template {
        /// The file or built-in name.
        place: String,
        /// What is wrong, with the template's line where there is one.
        message: String,
    },
    /// A tokeniser folder that does not load.
    #[error("tokenizer {}: {message}", path.display())]
    Tokenizer {
        /// The file at fault.
        path: PathBuf,
        /// What is wrong and what would be right.
        message: String,
    },
    /// Text that the tokeniser refused.
    #[error("cannot tokenise {text:?}: {message}")]
    Encode {
        /// The beginning of the text.
        text: String,
        /// The tokeniser's words.
        message: String,
    },
    /// Settings that do not fit together or do not fit the data.
    #[error("{0}")]
    Fault(#[from] Fault),
    /// A saved stream state that does not belong to this data.
    #[error("saved data state does not fit: {0}")]
    State(String),
}

impl Error {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn retry(&self) -> bool {
        matches!(self, Self::Remote { retry: true, .. })
    }
}
