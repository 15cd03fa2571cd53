//! The store over a database that speaks SQL: SQLite, a file beside the data with no server, or PostgreSQL.
//!
//! One set of statements, which both read. What differs is how each is opened, how a transaction that writes begins, and the types
//! in the schema's steps.

mod apply;
mod artifacts;
mod audit;
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

use std::sync::Arc;
use std::time::Duration;

use sqlx::{Any, AnyPool, Transaction};

use crate::database::Database;
use crate::error::{Result, db};
use transaction::WriteTransaction;
pub use workers::HeldJob;

/// Reads are short; more connections than cores do not help.
const READERS: u32 = 4;
/// How long a caller waits for a connection before the store is unavailable.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(30);

/// The control plane's state. Cheap to clone; all clones share the connections.
#[derive(Debug, Clone)]
pub struct Store {
    writer: AnyPool,
    readers: AnyPool,
    held: Arc<Held>,
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
        Ok(Self { writer, readers, held: Arc::new(held) })
    }

    /// Closes all connections after the running calls; SQLite's last writer folds the log into the database file.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
        if let Held::Postgres(lock) = &*self.held {
            lock.release().await;
        }
    }

    /// A transaction that will write.
    async fn begin(&self) -> Result<WriteTransaction> {
        WriteTransaction::begin(&self.writer, &self.held).await
    }

    /// A transaction that reads one state, whatever is written beside it.
    async fn view(&self) -> Result<Transaction<'static, Any>> {
        self.readers
            .begin_with(match &*self.held {
                Held::Sqlite(_) => "BEGIN",
                Held::Postgres(_) => "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY",
            })
            .await
            .map_err(db)
    }
}
