//! One enum for the whole room, cut by the decision that the caller can take.

use std::io;
use std::path::{Path, PathBuf};

use attune_spec::Fault;

/// A result of this room.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A cause from below, kept for the chain without its type.
pub type Cause = Box<dyn std::error::Error + Send + Sync + 'static>;

/// What went wrong, by what can be done about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is not there. Name something else, or push it first.
    #[error("{what} is not in {place}")]
    NotFound {
        /// The blob, manifest or file that was asked for.
        what: String,
        /// Where it was looked for.
        place: String,
    },
    /// What is stored is not what was stored: a bit flip, a truncated object, a changed file. Someone must look at it;
    /// a copy from elsewhere replaces it.
    #[error("{what} in {place} is corrupt: expected {expected}, found {found}")]
    Corrupt {
        /// The blob, manifest or file.
        what: String,
        /// Where it lies.
        place: String,
        /// The digest or length by which it is named.
        expected: String,
        /// What its bytes gave.
        found: String,
    },
    /// The bytes that were handed in are not the bytes that were announced; sending them again may help.
    #[error("what was sent for {what} does not match its name: expected {expected}, received {found}; send it again")]
    Mismatch {
        /// The blob or file.
        what: String,
        /// What was announced.
        expected: String,
        /// What came.
        found: String,
    },
    /// The input is not acceptable, for all the reasons given. Repeating it changes nothing.
    #[error("{what} is refused: {}", join(faults))]
    Refused {
        /// The file, folder or manifest.
        what: String,
        /// Every fault found, with the field or file at fault.
        faults: Vec<Fault>,
    },
    /// No room is left. Free some and repeat; nothing was changed.
    #[error("{place} is full; free some space there and repeat, nothing was changed")]
    Full {
        /// The store or folder.
        place: String,
        /// The system's answer.
        #[source]
        source: Cause,
    },
    /// The store does not answer, or asks to wait; it may later.
    #[error("{place} is not available ({doing})")]
    Unavailable {
        /// The store.
        place: String,
        /// What was being done.
        doing: String,
        /// The store's answer.
        #[source]
        source: Cause,
    },
    /// The store refuses these credentials or this process.
    #[error("{place} denies access ({doing}); check the credentials and permissions that this process runs with")]
    Denied {
        /// The store.
        place: String,
        /// What was being done.
        doing: String,
        /// The store's answer.
        #[source]
        source: Cause,
    },
    /// An upload cannot go on where it was: what came before is not kept any more. Ask again what is kept, or begin anew.
    #[error("the first {start} bytes of {what} are not kept in {place}; ask how many are, and go on from there")]
    Gone {
        /// The blob.
        what: String,
        /// The store.
        place: String,
        /// Where it was to go on.
        start: u64,
    },
    /// This location cannot be an artifact store.
    #[error("{place} cannot hold artifacts: {reason}")]
    Unusable {
        /// The location as it was given.
        place: String,
        /// Why, and what would do.
        reason: String,
    },
    /// A local file could not be read or written.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// The verb.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The sender of the bytes gave up before their end.
    #[error("what was being sent for {what} broke off")]
    BrokenOff {
        /// The blob or file.
        what: String,
        /// The sender's error.
        #[source]
        source: Cause,
    },
}

impl Error {
    /// Whether the same call may succeed later without anything being changed by a person.
    pub fn retry(&self) -> bool {
        match self {
            Self::Mismatch { .. } | Self::Unavailable { .. } | Self::BrokenOff { .. } | Self::Gone { .. } => true,
            Self::NotFound { .. }
            | Self::Corrupt { .. }
            | Self::Refused { .. }
            | Self::Full { .. }
            | Self::Denied { .. }
            | Self::Unusable { .. }
            | Self::Io { .. } => false,
        }
    }

    /// A local file error; a full disk becomes [`Error::Full`].
    pub(crate) fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        if is_full(&source) {
            let folder = path.parent().unwrap_or(path);
            return Self::Full { place: folder.display().to_string(), source: source.into() };
        }
        Self::Io { doing, path: path.to_owned(), source }
    }

    /// An error of the object store at `place` while `doing` something.
    pub(crate) fn from_store(place: &str, doing: impl Into<String>, source: object_store::Error) -> Self {
        use object_store::Error as E;
        let place = place.to_owned();
        let doing = doing.into();
        match source {
            E::NotFound { path, .. } => Self::NotFound { what: path, place },
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => {
                Self::Denied { place, doing, source: source.into() }
            }
            E::NotSupported { .. }
            | E::NotImplemented { .. }
            | E::UnknownConfigurationKey { .. }
            | E::InvalidPath { .. } => Self::Unusable { place, reason: format!("{doing}: {source}") },
            _ => match io_cause(&source) {
                Some(io) if is_full(io) => Self::Full { place, source: source.into() },
                Some(io) if io.kind() == io::ErrorKind::PermissionDenied => {
                    Self::Denied { place, doing, source: source.into() }
                }
                // S3 answers "507 Insufficient Storage" with a status that object_store shows in its text only.
                _ if source.to_string().contains("507 Insufficient Storage") => {
                    Self::Full { place, source: source.into() }
                }
                _ => Self::Unavailable { place, doing, source: source.into() },
            },
        }
    }
}

/// The first `io::Error` in the chain.
fn io_cause<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io);
        }
        next = error.source();
    }
    None
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn join(faults: &[Fault]) -> String {
    const SHOWN: usize = 20;
    // A fault of the whole needs no name: what it is about stands before the list.
    let shown = |fault: &Fault| match fault.path.as_str() {
        "" => fault.message.clone(),
        _ => fault.to_string(),
    };
    let mut text = faults.iter().take(SHOWN).map(shown).collect::<Vec<_>>().join("; ");
    if faults.len() > SHOWN {
        text.push_str(&format!("; and {} more", faults.len() - SHOWN));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_from_other_failures() {
        let full = || io::Error::from_raw_os_error(28);
        let wrapped = object_store::Error::Generic { store: "test", source: Box::new(full()) };
        assert!(
            matches!(Error::from_store("s3://b", "storing", wrapped), Error::Full { place, .. } if place == "s3://b")
        );
        assert!(matches!(Error::io("write", Path::new("/a/b"), full()), Error::Full { place, .. } if place == "/a"));
        let other = object_store::Error::Generic { store: "test", source: "connection reset".into() };
        let other = Error::from_store("s3://b", "storing", other);
        assert!(other.retry() && matches!(other, Error::Unavailable { .. }));
    }

    #[test]
    fn a_refusal_names_every_fault_up_to_a_limit() {
        let faults = (0..25).map(|i| Fault::new(format!("f{i}").as_str(), "is wrong")).collect();
        let text = Error::Refused { what: "the folder".into(), faults }.to_string();
        assert!(text.contains("`f19` is wrong; and 5 more") && !text.contains("f20"), "{text}");
    }
}
