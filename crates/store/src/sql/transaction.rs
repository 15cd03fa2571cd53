//! A transaction that writes.
//!
//! Not the library's own: when SQLite itself rolls back (as it does when the disk is full), the library's connection
//! goes on believing in an open transaction and is lost to its pool. Here a connection whose state is in doubt is closed
//! and replaced: closing rolls back whatever was open.

use std::ops::{Deref, DerefMut};

use sqlx::pool::PoolConnection;
use sqlx::{Sqlite, SqliteConnection, SqlitePool};

use crate::error::{Result, db};

/// Rolled back unless [`commit`](Self::commit) is reached.
pub(super) struct WriteTransaction {
    connection: PoolConnection<Sqlite>,
    is_open: bool,
}

impl WriteTransaction {
    /// Takes SQLite's write lock at once, so that the transaction cannot fail half way for it.
    pub(super) async fn begin(writer: &SqlitePool) -> Result<Self> {
        let connection = writer.acquire().await.map_err(db)?;
        // In doubt from before the statement is sent until it is known to have failed.
        let mut transaction = Self { connection, is_open: true };
        sqlx::query("BEGIN IMMEDIATE").execute(&mut *transaction.connection).await.map_err(db)?;
        Ok(transaction)
    }

    /// Makes the writes durable.
    pub(super) async fn commit(mut self) -> Result<()> {
        sqlx::query("COMMIT").execute(&mut *self.connection).await.map_err(db)?;
        self.is_open = false;
        Ok(())
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
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.connection
    }
}

impl DerefMut for WriteTransaction {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.connection
    }
}
