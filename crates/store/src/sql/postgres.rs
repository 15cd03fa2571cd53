//! PostgreSQL: a server that others may use as well.
//!
//! One scheduler leads. Whoever does holds an advisory lock by a connection of its own, which the server releases when the connection
//! ends, and counts the terms: each that opens the database begins a new one. A transaction that writes locks the row of the term and
//! looks whether it is still its own, so that changes are serial, as over SQLite, and one who has lost the lock without noticing
//! (stopped and continued, cut off from the server) writes nothing any more. Others follow: they read, and ask for the lock again and
//! again.

use std::time::Duration;

use sqlx::any::AnyPoolOptions;
use sqlx::{AnyConnection, AnyPool, Connection as _, Row as _};
use tokio::sync::Mutex;

use super::migrations::{self, POSTGRES};
use super::{ACQUIRE_TIMEOUT, Announced, Held, READERS, row};
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
    let candidate = Candidate { url: url.to_owned(), shown: database.clone(), connection: Mutex::new(None) };
    let give_up = tokio::time::Instant::now() + LOCK_WAIT;
    let lock = loop {
        if let Some(lock) = candidate.take().await? {
            break lock;
        }
        if tokio::time::Instant::now() >= give_up {
            return Err(Error::Locked { database: database.to_string() });
        }
        tokio::time::sleep(LOCK_LOOK).await;
    };
    let (writer, readers) = pools(url).await?;
    Ok((writer, readers, Held::Postgres(lock)))
}

/// Opens the database for reading: who writes what is no state, who reads, and who would lead.
pub(super) async fn follow(url: &str, database: &Database) -> Result<(AnyPool, AnyPool, Candidate)> {
    let mut connection = AnyConnection::connect(url).await.map_err(|error| unreached(error, database))?;
    let lacking = migrations::lacking(&mut connection, &POSTGRES).await?;
    if lacking > 0 {
        return Err(Error::Behind { lacking });
    }
    let (writer, readers) = pools(url).await?;
    let candidate =
        Candidate { url: url.to_owned(), shown: database.clone(), connection: Mutex::new(Some(connection)) };
    Ok((writer, readers, candidate))
}

async fn pools(url: &str) -> Result<(AnyPool, AnyPool)> {
    let pool = |connections| {
        let options = AnyPoolOptions::new().max_connections(connections).acquire_timeout(ACQUIRE_TIMEOUT);
        options.connect(url)
    };
    // Changes wait for one another anyhow.
    Ok((pool(1).await.map_err(db)?, pool(READERS).await.map_err(db)?))
}

/// The present term, whose row is locked until the transaction ends.
pub(super) async fn term(connection: &mut AnyConnection) -> Result<i64> {
    let found = sqlx::query("SELECT term FROM terms FOR UPDATE").fetch_one(connection).await.map_err(db)?;
    found.try_get("term").map_err(db)
}

/// What the one has said of itself that leads.
pub(super) async fn announced(connection: &mut AnyConnection) -> Result<Announced> {
    let found = sqlx::query("SELECT term, leader, word, (SELECT COUNT(*) FROM schema_steps) AS steps FROM terms");
    let found = found.fetch_one(connection).await.map_err(db)?;
    POSTGRES.knows(usize::try_from(row::unsigned(&found, "steps")?).unwrap_or(usize::MAX))?;
    Ok(Announced {
        term: row::unsigned(&found, "term")?,
        url: found.try_get("leader").map_err(db)?,
        word: found.try_get("word").map_err(db)?,
    })
}

/// Who would lead: a connection that asks for the lock.
#[derive(Debug)]
pub(super) struct Candidate {
    url: String,
    shown: Database,
    connection: Mutex<Option<AnyConnection>>,
}

impl Candidate {
    /// Takes the lock if nobody has it, brings the schema up to date, and begins a term.
    pub(super) async fn take(&self) -> Result<Option<Lock>> {
        let mut kept = self.connection.lock().await;
        let mut connection = match kept.take() {
            Some(connection) => connection,
            None => AnyConnection::connect(&self.url).await.map_err(|error| unreached(error, &self.shown))?,
        };
        // A connection that fails is dropped, and with it a lock that it may have by now.
        let taken = sqlx::query("SELECT pg_try_advisory_lock($1) AS taken").bind(LOCK).fetch_one(&mut connection).await;
        if !taken.map_err(db)?.try_get::<bool, _>("taken").map_err(db)? {
            *kept = Some(connection);
            return Ok(None);
        }
        migrations::migrate(&mut connection, &POSTGRES).await?;
        let begun = sqlx::query("UPDATE terms SET term = term + 1, leader = '', word = '' RETURNING term");
        let term = begun.fetch_one(&mut connection).await.map_err(db)?.try_get("term").map_err(db)?;
        Ok(Some(Lock { term, connection: Mutex::new(Some(connection)) }))
    }
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
    /// Lets others lead, at once.
    pub(super) async fn release(&self) {
        let Some(mut connection) = self.connection.lock().await.take() else { return };
        // Nobody is sent to who has gone.
        let gone = sqlx::query("UPDATE terms SET leader = '', word = '' WHERE term = $1").bind(self.term);
        let gone = gone.execute(&mut connection).await.map(drop);
        // A connection that ended frees the lock as well, but some time after whoever closed it has gone on.
        let freed = sqlx::query("SELECT pg_advisory_unlock($1)").bind(LOCK).execute(&mut connection).await.map(drop);
        if let Err(error) = gone.and(freed).and(connection.close().await) {
            // The server ends it then.
            tracing::debug!(%error, "the connection that held the lock did not end in order");
        }
    }

    /// Makes a transaction the only one that writes, if this term still lasts.
    pub(super) async fn enter(&self, connection: &mut AnyConnection) -> Result<()> {
        let term = term(connection).await?;
        if term == self.term {
            return Ok(());
        }
        Err(Error::Replaced { own: self.term, current: term })
    }
}
