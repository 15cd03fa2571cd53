//! The store over SQLite: a file beside the data, no server.
//!
//! Write-ahead log with `synchronous=FULL`: an acknowledged change survives a power cut. One connection writes, so that
//! changes are serial without retries; a few read, each seeing a whole state. A lock file keeps a second scheduler out.

mod apply;
mod artifacts;
mod jobs;
mod lock;
mod migrations;
mod prune;
mod reads;
mod row;
mod transaction;

use std::path::Path;
use std::time::Duration;

use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};

use crate::error::{Error, Result, db};
use transaction::WriteTransaction;

/// Reads are short; more connections than cores do not help.
const READERS: u32 = 4;
/// How long a statement waits for another process's lock (a backup tool, a shell) before the store is unavailable.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a caller waits for a connection before the store is unavailable.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(30);

/// The control plane's state. Cheap to clone; all clones share the connections.
#[derive(Debug, Clone)]
pub struct Store {
    writer: SqlitePool,
    readers: SqlitePool,
    _lock: std::sync::Arc<lock::Lock>,
}

impl Store {
    /// Opens the database at `path`, creating it and its folder when missing, and brings its schema up to date.
    ///
    /// # Errors
    /// [`Error::Locked`] when another scheduler has it open, [`Error::Schema`] when it was written by a newer binary,
    /// [`Error::Corrupt`] when it is not a database.
    pub async fn open(path: &Path) -> Result<Self> {
        let unavailable = |e: std::io::Error| Error::Unavailable(format!("{}: {e}", path.display()));
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            tokio::fs::create_dir_all(folder).await.map_err(unavailable)?;
        }
        let file = path.to_owned();
        let lock = tokio::task::spawn_blocking(move || lock::Lock::take(&file))
            .await
            .map_err(|e| Error::Other(format!("the task that takes the lock was lost: {e}")))??;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT);
        let writer = SqlitePoolOptions::new()
            .max_connections(1)
            .min_connections(1)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(options.clone())
            .await
            .map_err(db)?;
        migrations::migrate(&mut *writer.acquire().await.map_err(db)?).await?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_with(options.create_if_missing(false).read_only(true))
            .await
            .map_err(db)?;
        Ok(Self { writer, readers, _lock: std::sync::Arc::new(lock) })
    }

    /// Closes all connections after the running calls; the last writer folds the log into the database file.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }

    /// A transaction that will write.
    async fn begin(&self) -> Result<WriteTransaction> {
        WriteTransaction::begin(&self.writer).await
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::change::Write;
    use crate::event::NewEvent;
    use crate::time::UtcMs;

    fn event(size: usize) -> Write {
        Write::Event(NewEvent {
            project: Default::default(),
            job: None,
            epoch: None,
            kind: "log".to_owned(),
            data: json!("x".repeat(size)),
            time: UtcMs(0),
        })
    }

    #[tokio::test]
    async fn a_full_disk_refuses_writes_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("attune.db")).await.unwrap();
        let project = Default::default();
        store.apply(&[event(10)]).await.unwrap();
        // SQLite's own limit answers exactly as a full disk does.
        sqlx::query("PRAGMA max_page_count = 60").fetch_all(&store.writer).await.unwrap();
        let full = store.apply(&[event(10), event(1_000_000)]).await.unwrap_err();
        assert!(matches!(full, Error::Unavailable(_)) && full.is_retryable(), "{full}");
        assert_eq!(store.events(&project, None, Default::default(), 10).await.unwrap().len(), 1);
        // Room again (the limit belongs to a connection that was replaced): the same store goes on, without a gap.
        let applied = store.apply(&[event(1_000_000)]).await.unwrap();
        assert_eq!(applied.events[0].seq.0, 2);
    }

    #[tokio::test]
    async fn writes_are_synced_in_full() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("attune.db")).await.unwrap();
        for (pragma, expected) in
            [("PRAGMA synchronous", "2"), ("PRAGMA journal_mode", "wal"), ("PRAGMA foreign_keys", "1")]
        {
            use sqlx::{Row as _, ValueRef as _};
            let row = sqlx::query(pragma).fetch_one(&store.writer).await.unwrap();
            let raw = row.try_get_raw(0).unwrap();
            let is_text = raw.type_info().to_string() == "TEXT";
            let value = if is_text { row.get::<String, _>(0) } else { row.get::<i64, _>(0).to_string() };
            assert_eq!(value, expected, "{pragma}");
        }
    }
}
