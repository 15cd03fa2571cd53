//! PostgreSQL: a server that others may use as well.
//!
//! One scheduler leads. Whoever does holds an advisory lock by a connection of its own, which the server releases when the connection
//! ends, and counts the terms: each that opens the database begins a new one. A transaction that writes locks the row of the term and
//! looks whether it is still its own, so that changes are serial, as over SQLite, and one who has lost the lock without noticing
//! (stopped and continued, cut off from the server) writes nothing any more.

use std::time::Duration;

use sqlx::any::AnyPoolOptions;
use sqlx::{AnyConnection, AnyPool, Connection as _, Row as _};
use tokio::sync::Mutex;

use super::migrations::{self, POSTGRES};
use super::{ACQUIRE_TIMEOUT, Held, READERS};
use crate::database::Database;
use crate::error::{Error, Result, db};

/// The number of the advisory lock: `attune` in ASCII.
const LOCK: i64 = 0x6174_7475_6e65;
/// How long somebody else's lock is waited for, and how often it is looked at: a scheduler that was killed has it until the
/// server notices.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_LOOK: Duration = Duration::from_millis(100);

/// Opens the database: who writes, who reads, and the lock.
pub(super) async fn open(url: &str, database: &Database) -> Result<(AnyPool, AnyPool, Held)> {
    let mut connection = AnyConnection::connect(url).await.map_err(|error| unreached(error, database))?;
    let give_up = tokio::time::Instant::now() + LOCK_WAIT;
    loop {
        let taken = sqlx::query("SELECT pg_try_advisory_lock($1) AS taken").bind(LOCK).fetch_one(&mut connection).await;
        if taken.map_err(db)?.try_get::<bool, _>("taken").map_err(db)? {
            break;
        }
        if tokio::time::Instant::now() >= give_up {
            return Err(Error::Locked { database: database.to_string() });
        }
        tokio::time::sleep(LOCK_LOOK).await;
    }
    migrations::migrate(&mut connection, &POSTGRES).await?;
    let term = sqlx::query("UPDATE terms SET term = term + 1 RETURNING term").fetch_one(&mut connection).await;
    let term = term.map_err(db)?.try_get("term").map_err(db)?;
    let pool = |connections| {
        let options = AnyPoolOptions::new().max_connections(connections).acquire_timeout(ACQUIRE_TIMEOUT);
        options.connect(url)
    };
    // Changes wait for one another anyhow.
    let writer = pool(1).await.map_err(db)?;
    let readers = pool(READERS).await.map_err(db)?;
    Ok((writer, readers, Held::Postgres(Lock { term, connection: Mutex::new(Some(connection)) })))
}

/// Why a server was not reached, and which.
fn unreached(error: sqlx::Error, database: &Database) -> Error {
    match db(error) {
        Error::Unavailable(message) => Error::Unavailable(format!("{database}: {message}")),
        Error::Other(message) => Error::Other(format!("{database}: {message}")),
        other => other,
    }
}

/// The term, and the connection that holds the lock.
#[derive(Debug)]
pub(super) struct Lock {
    term: i64,
    connection: Mutex<Option<AnyConnection>>,
}

impl Lock {
    /// Lets others lead.
    pub(super) async fn release(&self) {
        if let Some(connection) = self.connection.lock().await.take()
            && let Err(error) = connection.close().await
        {
            // The server ends it then.
            tracing::debug!(%error, "the connection that held the lock did not end in order");
        }
    }

    /// Makes a transaction the only one that writes, if this term still lasts.
    pub(super) async fn enter(&self, connection: &mut AnyConnection) -> Result<()> {
        let found = sqlx::query("SELECT term FROM terms FOR UPDATE").fetch_one(connection).await.map_err(db)?;
        let term: i64 = found.try_get("term").map_err(db)?;
        if term == self.term {
            return Ok(());
        }
        Err(Error::Replaced { own: self.term, current: term })
    }
}
