//! SQLite: a file beside the data.
//!
//! Write-ahead log with `synchronous=FULL`: an acknowledged change survives a power cut. One connection writes, so that
//! changes are serial without retries; a few read, each seeing a whole state. A lock file keeps a second scheduler out: an advisory
//! lock, which the kernel releases when the process dies, however it dies.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

use sqlx::any::AnyPoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode};
use sqlx::{AnyPool, ConnectOptions as _, Connection as _, Executor as _};

use super::migrations::{self, SQLITE};
use super::{ACQUIRE_TIMEOUT, Held, READERS};
use crate::error::{Error, Result, db};

/// What every connection is told. A statement waits so many milliseconds for another process's lock (a backup tool, a shell) before
/// the store is unavailable.
const EVERY: &str = "PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA busy_timeout = 5000";

/// Opens a file, making it and its folder when they are missing: who writes, who reads, and the lock.
pub(super) async fn open(path: &Path) -> Result<(AnyPool, AnyPool, Held)> {
    let unavailable = |e: std::io::Error| Error::Unavailable(format!("{}: {e}", path.display()));
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        tokio::fs::create_dir_all(folder).await.map_err(unavailable)?;
    }
    let file = path.to_owned();
    let lock = tokio::task::spawn_blocking(move || Lock::take(&file))
        .await
        .map_err(|e| Error::Other(format!("the task that takes the lock was lost: {e}")))??;
    prepare(path).await?;
    let url = url(path).map_err(unavailable)?;
    let pool = |connections: u32| {
        AnyPoolOptions::new().max_connections(connections).acquire_timeout(ACQUIRE_TIMEOUT).after_connect(
            |connection, _| {
                Box::pin(async move {
                    connection.execute(sqlx::raw_sql(EVERY)).await?;
                    Ok(())
                })
            },
        )
    };
    let writer = pool(1)
        .min_connections(1)
        .idle_timeout(None)
        .max_lifetime(None)
        .connect(&format!("{url}?mode=rw"))
        .await
        .map_err(db)?;
    migrations::migrate(&mut *writer.acquire().await.map_err(db)?, &SQLITE).await?;
    let readers = pool(READERS).connect(&format!("{url}?mode=ro")).await.map_err(db)?;
    Ok((writer, readers, Held::Sqlite(lock)))
}

/// Makes the file if there is none, and sets what the file itself remembers. Says what is wrong with a file that is no database, which
/// a pool of connections would only try again.
async fn prepare(path: &Path) -> Result<()> {
    let options =
        SqliteConnectOptions::new().filename(path).create_if_missing(true).journal_mode(SqliteJournalMode::Wal);
    let connection: SqliteConnection = options.connect().await.map_err(db)?;
    connection.close().await.map_err(db)
}

/// The path as the URL that names it, every byte that could mean something else written as a number.
fn url(path: &Path) -> std::io::Result<String> {
    let mut url = "sqlite://".to_owned();
    for byte in std::path::absolute(path)?.as_os_str().as_encoded_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' | b'~' => url.push(char::from(*byte)),
            other => {
                let _ = write!(url, "%{other:02X}");
            }
        }
    }
    Ok(url)
}

/// Held as long as the value lives.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of the database at `path`, or fails at once.
    fn take(path: &Path) -> Result<Self> {
        let mut name = path.as_os_str().to_owned();
        name.push(".lock");
        let name = PathBuf::from(name);
        let failed = |e: std::io::Error| Error::Unavailable(format!("{}: {e}", name.display()));
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&name).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(Error::Locked { database: path.display().to_string() }),
            Err(TryLockError::Error(e)) => Err(failed(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::Store;
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

    async fn opened(folder: &Path) -> Store {
        Store::open(&folder.join("attune.db").into()).await.unwrap()
    }

    #[tokio::test]
    async fn a_full_disk_refuses_writes_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let store = opened(folder.path()).await;
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
        use sqlx::Row as _;

        let folder = tempfile::tempdir().unwrap();
        let store = opened(folder.path()).await;
        for (pragma, expected) in [("PRAGMA synchronous", 2), ("PRAGMA foreign_keys", 1), ("PRAGMA busy_timeout", 5000)]
        {
            for pool in [&store.writer, &store.readers] {
                let row = sqlx::query(pragma).fetch_one(pool).await.unwrap();
                assert_eq!(row.get::<i64, _>(0), expected, "{pragma}");
            }
        }
        let row = sqlx::query("PRAGMA journal_mode").fetch_one(&store.writer).await.unwrap();
        assert_eq!(row.get::<String, _>(0), "wal");
        // Who reads cannot write.
        let refused = sqlx::query("DELETE FROM jobs").execute(&store.readers).await.unwrap_err().to_string();
        assert!(refused.contains("readonly"), "{refused}");
    }

    #[tokio::test]
    async fn any_name_of_a_folder_will_do() {
        let folder = tempfile::tempdir().unwrap();
        let store = opened(&folder.path().join("50 % größer? #1")).await;
        store.apply(&[event(1)]).await.unwrap();
        assert!(folder.path().join("50 % größer? #1/attune.db").is_file());
    }
}
