//! Databases of PostgreSQL, where `ATTUNE_TEST_POSTGRES` names a server on which they may be made (`tests/services/postgres.sh`).
#![expect(clippy::print_stderr, reason = "who skips a test says why")]

use std::sync::atomic::{AtomicU32, Ordering};

use attune_scheduler::Database;
use sqlx::{Connection as _, Executor as _, PgConnection};

/// A database of its own.
pub(crate) struct Postgres(String);

impl Postgres {
    /// A new one; none, with the reason, where there is no server.
    pub(crate) async fn fresh() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let Ok(server) = std::env::var("ATTUNE_TEST_POSTGRES") else {
            eprintln!("skipped: ATTUNE_TEST_POSTGRES names no server (tests/services/postgres.sh starts one)");
            return None;
        };
        let name = format!("s_{}_{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let made = sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"));
        PgConnection::connect(&server).await.unwrap().execute(made).await.unwrap();
        let (head, query) = server.split_once('?').unwrap_or((&server, ""));
        let (place, _) = head.rsplit_once('/').unwrap();
        Some(Self(format!("{place}/{name}?{query}")))
    }

    /// What a scheduler is told.
    pub(crate) fn database(&self) -> Database {
        self.0.parse().unwrap()
    }

    /// A connection past any scheduler.
    pub(crate) async fn direct(&self) -> PgConnection {
        PgConnection::connect(&self.0).await.unwrap()
    }
}
