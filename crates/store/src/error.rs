//! What can go wrong, by what the caller can do about it.

use attune_spec::id::Epoch;

/// The result of a store operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a store operation was not done. Nothing of a refused change is stored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The named thing does not exist in its project.
    #[error("{what} {name:?} does not exist in project {project:?}")]
    NotFound {
        /// `job`, `artifact`, `tag`, …
        what: &'static str,
        /// Its name as asked for.
        name: String,
        /// The project looked into.
        project: String,
    },
    /// The stored state is not the one the change was decided on, or the name is taken.
    #[error("{0}")]
    Conflict(String),
    /// The same request id came with another body.
    #[error("request id {request:?} was used before with another body; use a new id for a new request")]
    RequestReused {
        /// The id.
        request: String,
    },
    /// A write under an epoch that is not the job's current one, or after the job ended.
    #[error("epoch {given} of job {job:?} is not current ({current}); the attempt was replaced or has ended")]
    StaleEpoch {
        /// The job.
        job: String,
        /// The epoch of the write.
        given: Epoch,
        /// `epoch N` or `the job is cancelled`.
        current: String,
    },
    /// The deletion would break something that still refers to the artifact.
    #[error("{0}")]
    InUse(String),
    /// A value that the store cannot keep or look up, such as a page token that it did not give out.
    #[error("{0}")]
    Invalid(String),
    /// The database cannot take writes now (disk full, busy, out of connections); later it may.
    #[error("the control plane's database is unavailable: {0}; free space or wait, then try again")]
    Unavailable(String),
    /// The system could not say that a write is on the disk, and may not say it again: what is in memory can no longer be believed.
    #[error(
        "the disk of the control plane's database may have lost a write: {0}; look at the disk, then start the scheduler again"
    )]
    NotDurable(String),
    /// Another process holds the database.
    #[error("database {database} is in use by another scheduler; stop that one first")]
    Locked {
        /// The database, without a password.
        database: String,
    },
    /// The store only reads: another scheduler leads, or none does yet.
    #[error("this scheduler follows and changes nothing; ask the one that leads")]
    Follows,
    /// The database lacks steps of this binary's schema.
    #[error("the database lacks {lacking} steps of this version's schema, which a scheduler of it makes when it leads")]
    Behind {
        /// How many.
        lacking: usize,
    },
    /// Another scheduler has opened the database since.
    #[error("another scheduler leads since term {current}; this one led in term {own}, and writes nothing any more")]
    Replaced {
        /// The term in which this store was opened.
        own: i64,
        /// The present one.
        current: i64,
    },
    /// The database's schema does not fit this binary.
    #[error("{0}")]
    Schema(String),
    /// The database holds what this room would never write.
    #[error("the control plane's database is damaged: {0}; restore it from a backup")]
    Corrupt(String),
    /// Anything else the database said; retrying will not help.
    #[error("the control plane's database failed: {0}")]
    Other(String),
}

impl Error {
    #[expect(clippy::needless_pass_by_value, reason = "names are handed over as they are, borrowed or small")]
    pub(crate) fn not_found(what: &'static str, name: impl ToString, project: impl ToString) -> Self {
        Self::NotFound { what, name: name.to_string(), project: project.to_string() }
    }

    /// Whether the same call can succeed later without any change by the caller.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unavailable(_) => true,
            Self::NotFound { .. }
            | Self::Conflict(_)
            | Self::NotDurable(_)
            | Self::RequestReused { .. }
            | Self::StaleEpoch { .. }
            | Self::InUse(_)
            | Self::Invalid(_)
            | Self::Locked { .. }
            | Self::Follows
            | Self::Behind { .. }
            | Self::Replaced { .. }
            | Self::Schema(_)
            | Self::Corrupt(_)
            | Self::Other(_) => false,
        }
    }
}

/// SQLite's primary result codes (<https://sqlite.org/rescode.html>); the extended ones add bits above the lowest byte.
mod code {
    pub(super) const BUSY: i32 = 5;
    pub(super) const LOCKED: i32 = 6;
    pub(super) const IOERR: i32 = 10;
    pub(super) const IOERR_FSYNC: i32 = 10 | (4 << 8);
    pub(super) const IOERR_DIR_FSYNC: i32 = 10 | (5 << 8);
    pub(super) const CORRUPT: i32 = 11;
    pub(super) const FULL: i32 = 13;
    pub(super) const CANTOPEN: i32 = 14;
    pub(super) const CONSTRAINT: i32 = 19;
    pub(super) const NOTADB: i32 = 26;
}

/// PostgreSQL's codes (<https://www.postgresql.org/docs/current/errcodes-appendix.html>), of which the first two letters are a class.
fn of_postgres(code: &str, message: String) -> Error {
    match (code.get(..2).unwrap_or_default(), code) {
        // Connections, resources, a server that stops or starts, one that only reads, and changes that have to wait for others.
        ("08" | "53" | "57", _) | (_, "25006" | "40001" | "40P01" | "55P03") => Error::Unavailable(message),
        ("23", _) => Error::Conflict(format!("the change breaks a rule of the schema: {message}")),
        (_, "XX001" | "XX002") => Error::Corrupt(message),
        _ => Error::Other(message),
    }
}

fn of_sqlite(code: Option<i32>, message: String) -> Error {
    if let Some(code::IOERR_FSYNC | code::IOERR_DIR_FSYNC) = code {
        return Error::NotDurable(message);
    }
    match code.map(|code| code & 0xff) {
        // Where a disk is full, files that are kept beside the database cannot grow either: an input or output error.
        Some(code::IOERR | code::FULL | code::BUSY | code::LOCKED | code::CANTOPEN) => Error::Unavailable(message),
        Some(code::CORRUPT | code::NOTADB) => Error::Corrupt(message),
        Some(code::CONSTRAINT) => Error::Conflict(format!("the change breaks a rule of the schema: {message}")),
        _ => Error::Other(message),
    }
}

/// Sorts a database error into the classes above. A function and not `From`, so that the library's type stays inside.
#[expect(clippy::needless_pass_by_value, reason = "the form that `map_err` takes")]
pub(crate) fn db(error: sqlx::Error) -> Error {
    match &error {
        sqlx::Error::Database(inner) => {
            let message = inner.message().to_owned();
            match inner.try_downcast_ref::<sqlx::postgres::PgDatabaseError>() {
                Some(postgres) => of_postgres(postgres.code(), message),
                None => of_sqlite(inner.code().and_then(|code| code.parse().ok()), message),
            }
        }
        sqlx::Error::PoolTimedOut => Error::Unavailable("no free connection within the time limit".to_owned()),
        sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => Error::Unavailable(error.to_string()),
        // A full disk, or a server that is gone.
        sqlx::Error::Io(io) => Error::Unavailable(io.to_string()),
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::ColumnNotFound(_) | sqlx::Error::Decode(_) => {
            Error::Corrupt(error.to_string())
        }
        _ => Error::Other(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_passes_and_a_write_that_nobody_vouches_for_does_not() {
        let of = |code| of_sqlite(Some(code), "said".to_owned());
        // SQLITE_FULL, SQLITE_IOERR_WRITE, SQLITE_IOERR_SHMSIZE.
        for code in [13, 778, 4874] {
            assert!(of(code).is_retryable(), "{code}");
        }
        for code in [1034, 1290] {
            assert!(matches!(of(code), Error::NotDurable(_)) && !of(code).is_retryable(), "{code}");
        }
    }
}
