//! The store over a database that speaks SQL: SQLite, a file beside the data with no server, or PostgreSQL.
//!
//! One set of statements, which both read. What differs is how each is opened, how a transaction that writes begins, and the types
//! in the schema's steps.

mod apply;
mod artifacts;
mod audit;
mod follow;
mod jobs;
mod migrations;
mod postgres;
mod prune;
mod query;
mod reads;
mod row;
mod sqlite;
mod tokens;
mod transaction;
mod workers;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sqlx::{Any, AnyPool, Transaction};

use crate::database::Database;
use crate::error::{Error, Result, db};
pub use follow::{Announced, Moved};
use transaction::WriteTransaction;
pub use workers::HeldJob;

/// Reads are short; more connections than cores do not help.
const READERS: u32 = 4;
/// How long a caller waits for a connection before the store is unavailable.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(30);

/// The control plane's state. Cheap to clone; all clones share the connections.
///
/// A store that leads changes it. One that follows reads it, and may lead later; it is the same store then.
#[derive(Debug, Clone)]
pub struct Store {
    writer: AnyPool,
    readers: AnyPool,
    /// Nothing while it follows.
    held: Arc<OnceLock<Held>>,
    /// Who would lead, where this store was opened to follow.
    candidate: Option<Arc<postgres::Candidate>>,
}

/// What keeps a second scheduler out.
#[derive(Debug)]
enum Held {
    Sqlite(#[expect(dead_code, reason = "held, not read")] sqlite::Lock),
    Postgres(postgres::Lock),
}

impl Store {
    /// Opens the database, creating what of it is missing, and brings its schema up to date. A file of SQLite is made with its
    /// folder; a database of PostgreSQL has to be there.
    ///
    /// # Errors
    /// [`crate::Error::Locked`] when another scheduler has it open, [`crate::Error::Schema`] when it was written by a newer binary,
    /// [`crate::Error::Corrupt`] when it is not a database, [`crate::Error::Unavailable`] when its server does not answer.
    pub async fn open(database: &Database) -> Result<Self> {
        // Once a process; more often changes nothing.
        sqlx::any::install_default_drivers();
        let (writer, readers, held) = match database {
            Database::Sqlite(path) => sqlite::open(path).await?,
            Database::Postgres(url) => postgres::open(url, database).await?,
        };
        Ok(Self { writer, readers, held: Arc::new(OnceLock::from(held)), candidate: None })
    }

    /// Whether this store changes the state. One that led and was replaced finds that out when it writes.
    pub fn leads(&self) -> bool {
        self.held.get().is_some()
    }

    /// Closes all connections after the running calls; SQLite's last writer folds the log into the database file.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
        if let Some(Held::Postgres(lock)) = self.held.get() {
            lock.release().await;
        }
    }

    /// A transaction that will write.
    async fn begin(&self) -> Result<WriteTransaction> {
        let held = self.held.get().ok_or(Error::Follows)?;
        WriteTransaction::begin(&self.writer, held).await
    }

    /// A transaction that will write what is no state and nobody decides on, which a store that follows may as well: it waits for its
    /// turn like the others, whoever leads.
    async fn begin_beside(&self) -> Result<WriteTransaction> {
        match self.held.get() {
            Some(held @ Held::Sqlite(_)) => WriteTransaction::begin(&self.writer, held).await,
            Some(Held::Postgres(_)) | None => WriteTransaction::begin_beside(&self.writer).await,
        }
    }

    /// A transaction that reads one state, whatever is written beside it.
    async fn view(&self) -> Result<Transaction<'static, Any>> {
        self.readers
            .begin_with(match self.held.get() {
                Some(Held::Sqlite(_)) => "BEGIN",
                Some(Held::Postgres(_)) | None => "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY",
            })
            .await
            .map_err(db)
    }
}
