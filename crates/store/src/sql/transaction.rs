//! A transaction that writes.
//!
//! Not the library's own: when SQLite itself rolls back (as it does when the disk is full), the library's connection
//! goes on believing in an open transaction and is lost to its pool. Here a connection whose state is in doubt is closed
//! and replaced: closing rolls back whatever was open.

use std::ops::{Deref, DerefMut};

use sqlx::pool::PoolConnection;
use sqlx::{Any, AnyConnection, AnyPool};

use super::{Held, postgres};
use crate::error::{Result, db};

/// Rolled back unless [`commit`](Self::commit) is reached.
pub(super) struct WriteTransaction {
    connection: PoolConnection<Any>,
    is_open: bool,
}

impl WriteTransaction {
    /// Takes what lets one write at a time at once, so that the transaction cannot fail half way for it.
    pub(super) async fn begin(writer: &AnyPool, held: &Held) -> Result<Self> {
        match held {
            Held::Sqlite(_) => Self::open(writer, "BEGIN IMMEDIATE").await,
            Held::Postgres(lock) => {
                let mut transaction = Self::open(writer, "BEGIN").await?;
                match lock.enter(&mut transaction).await {
                    Ok(()) => Ok(transaction),
                    Err(error) => Err(transaction.abandon(error).await),
                }
            }
        }
    }

    /// The same over PostgreSQL, in anybody's term.
    pub(super) async fn begin_beside(writer: &AnyPool) -> Result<Self> {
        let mut transaction = Self::open(writer, "BEGIN").await?;
        match postgres::term(&mut transaction).await {
            Ok(_) => Ok(transaction),
            Err(error) => Err(transaction.abandon(error).await),
        }
    }

    async fn open(writer: &AnyPool, begin: &'static str) -> Result<Self> {
        let connection = writer.acquire().await.map_err(db)?;
        // In doubt from before the statement is sent until it is known to have failed.
        let mut transaction = Self { connection, is_open: true };
        sqlx::query(begin).execute(&mut *transaction.connection).await.map_err(db)?;
        Ok(transaction)
    }

    /// Makes the writes durable.
    pub(super) async fn commit(mut self) -> Result<()> {
        sqlx::query("COMMIT").execute(&mut *self.connection).await.map_err(db)?;
        self.is_open = false;
        Ok(())
    }

    /// Makes what was done durable, or leaves no trace where it failed.
    pub(super) async fn end<T>(self, done: Result<T>) -> Result<T> {
        match done {
            Ok(done) => self.commit().await.map(|()| done),
            Err(refusal) => Err(self.abandon(refusal).await),
        }
    }

    /// Ends the transaction without a trace; gives the reason back.
    pub(super) async fn abandon<E>(mut self, reason: E) -> E {
        self.is_open = sqlx::query("ROLLBACK").execute(&mut *self.connection).await.is_err();
        reason
    }
}

impl Drop for WriteTransaction {
    fn drop(&mut self) {
        if self.is_open {
            self.connection.close_on_drop();
        }
    }
}

impl Deref for WriteTransaction {
    type Target = AnyConnection;

    fn deref(&self) -> &AnyConnection {
        &self.connection
    }
}

impl DerefMut for WriteTransaction {
    fn deref_mut(&mut self) -> &mut AnyConnection {
        &mut self.connection
    }
}
