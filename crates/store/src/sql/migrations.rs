//! Brings a database to this binary's schema: numbered steps, forward only, each in its own transaction.

use sqlx::{Acquire as _, AnyConnection, Row as _};

use crate::error::{Error, Result, db};

/// The steps of a kind of database, oldest first; a published step is never edited.
pub(super) struct Steps<'s> {
    /// What makes the table of the steps that were run.
    table: &'static str,
    steps: &'s [&'static str],
}

impl Steps<'_> {
    /// Refuses a database that has run more steps than this binary knows.
    pub(super) fn knows(&self, done: usize) -> Result<()> {
        let known = self.steps.len();
        if done <= known {
            return Ok(());
        }
        Err(Error::Schema(format!(
            "the database has schema {done}, newer than {known}, the newest that this binary knows; use a newer binary"
        )))
    }
}

/// SQLite's.
pub(super) const SQLITE: Steps<'_> = Steps {
    table: "CREATE TABLE IF NOT EXISTS schema_steps (step INTEGER NOT NULL PRIMARY KEY, sql TEXT NOT NULL) STRICT",
    steps: &[
        include_str!("../../../../migrations/sqlite/0001_control_plane.sql"),
        include_str!("../../../../migrations/sqlite/0002_stages.sql"),
        include_str!("../../../../migrations/sqlite/0003_access.sql"),
        include_str!("../../../../migrations/sqlite/0004_rules.sql"),
    ],
};

/// PostgreSQL's.
pub(super) const POSTGRES: Steps<'_> = Steps {
    table: "CREATE TABLE IF NOT EXISTS schema_steps (step BIGINT NOT NULL PRIMARY KEY, sql TEXT NOT NULL)",
    steps: &[
        include_str!("../../../../migrations/postgres/0001_control_plane.sql"),
        include_str!("../../../../migrations/postgres/0002_access.sql"),
        include_str!("../../../../migrations/postgres/0003_rules.sql"),
        include_str!("../../../../migrations/postgres/0004_leader.sql"),
    ],
};

/// How many steps the database lacks; all of them where it has no table of steps. For those that only read.
///
/// # Errors
/// [`Error::Schema`] for steps that this binary does not know.
pub(super) async fn lacking(connection: &mut AnyConnection, to: &Steps<'_>) -> Result<usize> {
    let there = sqlx::query("SELECT to_regclass('schema_steps') IS NOT NULL AS there");
    let there = there.fetch_one(&mut *connection).await.map_err(db)?;
    if !there.try_get::<bool, _>("there").map_err(db)? {
        return Ok(to.steps.len());
    }
    Ok(to.steps.len() - run(connection, to).await?)
}

/// How many steps the database has run, all of which this binary knows.
async fn run(connection: &mut AnyConnection, to: &Steps<'_>) -> Result<usize> {
    let steps = to.steps;
    let rows = sqlx::query("SELECT step, sql FROM schema_steps ORDER BY step")
        .fetch_all(&mut *connection)
        .await
        .map_err(db)?;
    to.knows(rows.len())?;
    for (index, row) in rows.iter().enumerate() {
        let (step, sql): (i64, String) = (row.try_get("step").map_err(db)?, row.try_get("sql").map_err(db)?);
        if usize::try_from(step) != Ok(index + 1) || sql != steps[index] {
            return Err(Error::Schema(format!(
                "schema step {} of the database is not the one that this binary knows; it was edited by hand or belongs \
                 to another program",
                index + 1
            )));
        }
    }
    Ok(rows.len())
}

/// Runs the steps that the database lacks.
pub(super) async fn migrate(connection: &mut AnyConnection, to: &Steps<'_>) -> Result<()> {
    sqlx::query(to.table).execute(&mut *connection).await.map_err(db)?;
    let done = run(connection, to).await?;
    for (index, &sql) in to.steps.iter().enumerate().skip(done) {
        let mut transaction = connection.begin().await.map_err(db)?;
        sqlx::raw_sql(sql).execute(&mut *transaction).await.map_err(db)?;
        sqlx::query("INSERT INTO schema_steps (step, sql) VALUES ($1, $2)")
            .bind(i64::try_from(index + 1).expect("there are few steps"))
            .bind(sql)
            .execute(&mut *transaction)
            .await
            .map_err(db)?;
        transaction.commit().await.map_err(db)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use sqlx::Connection as _;

    use super::*;

    async fn memory() -> AnyConnection {
        sqlx::any::install_default_drivers();
        AnyConnection::connect("sqlite::memory:").await.unwrap()
    }

    async fn migrate_to(connection: &mut AnyConnection, steps: &[&'static str]) -> Result<()> {
        migrate(connection, &Steps { table: SQLITE.table, steps }).await
    }

    #[tokio::test]
    async fn steps_run_once_and_a_newer_or_edited_schema_is_refused() {
        let mut connection = memory().await;
        let (one, two) = ("CREATE TABLE a (x INTEGER) STRICT", "CREATE TABLE b (x INTEGER) STRICT");
        migrate_to(&mut connection, &[one]).await.unwrap();
        migrate_to(&mut connection, &[one, two]).await.unwrap();
        migrate_to(&mut connection, &[one, two]).await.unwrap();
        let newer = migrate_to(&mut connection, &[one]).await.unwrap_err().to_string();
        assert_eq!(
            newer,
            "the database has schema 2, newer than 1, the newest that this binary knows; use a newer binary"
        );
        let edited = migrate_to(&mut connection, &[two, two]).await.unwrap_err();
        assert!(matches!(edited, Error::Schema(_)), "{edited}");
    }

    /// A schema as the database itself describes it.
    async fn described(connection: &mut AnyConnection) -> Vec<String> {
        let all = sqlx::query("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type, name");
        all.fetch_all(connection).await.unwrap().iter().map(|row| row.try_get("sql").unwrap()).collect()
    }

    /// The statements of a step.
    fn statements(step: &str) -> Vec<String> {
        // Comments may hold what ends a statement.
        let code: String = step.lines().map(|line| line.split("--").next().unwrap().to_owned() + "\n").collect();
        code.split(';').map(str::trim).filter(|text| !text.is_empty()).map(str::to_owned).collect()
    }

    async fn file(path: &std::path::Path) -> AnyConnection {
        sqlx::any::install_default_drivers();
        let mut connection = AnyConnection::connect(&format!("sqlite:{}?mode=rwc", path.display())).await.unwrap();
        sqlx::raw_sql("PRAGMA journal_mode = wal").execute(&mut connection).await.unwrap();
        connection
    }

    /// F39: a database of each earlier version, whose upgrade is killed after each statement: what the next process finds on the
    /// disk is brought up to date, and is what a new database has.
    #[tokio::test]
    async fn an_upgrade_that_is_killed_anywhere_is_made_again() {
        let steps = SQLITE.steps;
        let mut fresh = memory().await;
        migrate_to(&mut fresh, steps).await.unwrap();
        let expected = described(&mut fresh).await;
        let mut n_killed = 0;
        for (before, step) in (0..steps.len()).map(|done| (&steps[..done], steps[done])) {
            let statements = statements(step);
            for n_done in 0..=statements.len() {
                let (folder, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
                let mut connection = file(&folder.path().join("a.db")).await;
                migrate_to(&mut connection, before).await.unwrap();
                let mut transaction = sqlx::Acquire::begin(&mut connection).await.unwrap();
                for statement in &statements[..n_done] {
                    sqlx::raw_sql(sqlx::AssertSqlSafe(statement.clone())).execute(&mut *transaction).await.unwrap();
                }
                // What a process leaves that is killed at this moment.
                for found in std::fs::read_dir(folder.path()).unwrap() {
                    let found = found.unwrap();
                    // What is shared between processes is made anew by the first.
                    if !found.file_name().to_string_lossy().ends_with("-shm") {
                        std::fs::copy(found.path(), killed.path().join(found.file_name())).unwrap();
                    }
                }
                drop(transaction);
                let mut next = file(&killed.path().join("a.db")).await;
                migrate_to(&mut next, steps).await.unwrap();
                assert_eq!(described(&mut next).await, expected, "step {}, {n_done} statements", before.len() + 1);
                n_killed += 1;
            }
        }
        assert!(n_killed > 20, "{n_killed}");
    }

    /// A server with databases of its own; none, with the reason, where there is none.
    struct Server {
        url: String,
        admin: AnyConnection,
        n_databases: usize,
    }

    impl Server {
        async fn find() -> Option<Self> {
            sqlx::any::install_default_drivers();
            let Ok(url) = std::env::var("ATTUNE_TEST_POSTGRES") else {
                eprintln!("skipped: ATTUNE_TEST_POSTGRES names no server (tests/services/postgres.sh starts one)");
                return None;
            };
            let admin = AnyConnection::connect(&url).await.unwrap();
            Some(Self { url, admin, n_databases: 0 })
        }

        async fn run(&mut self, sql: String) {
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut self.admin).await.unwrap();
        }

        /// A new database, empty or as another one is.
        async fn database(&mut self, like: Option<&str>) -> String {
            self.n_databases += 1;
            let name = format!("m_{}_{}", std::process::id(), self.n_databases);
            self.run(format!("CREATE DATABASE {name} TEMPLATE {}", like.unwrap_or("template0"))).await;
            name
        }

        async fn connect(&self, database: &str) -> AnyConnection {
            let (head, query) = self.url.split_once('?').unwrap_or((&self.url, ""));
            let (place, _) = head.rsplit_once('/').unwrap();
            AnyConnection::connect(&format!("{place}/{database}?{query}")).await.unwrap()
        }
    }

    /// A schema as PostgreSQL describes it: columns, indexes, constraints, and what is in the tables that steps fill.
    async fn described_by_postgres(connection: &mut AnyConnection) -> Vec<String> {
        let all = sqlx::query(
            "SELECT concat_ws(' ', table_name, ordinal_position, column_name, data_type, is_nullable, column_default) AS line
             FROM information_schema.columns WHERE table_schema = 'public'
             UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
             UNION ALL SELECT concat_ws(' ', conrelid::regclass::text, conname::text, pg_get_constraintdef(oid))
             FROM pg_constraint WHERE connamespace = 'public'::regnamespace
             UNION ALL SELECT concat_ws(' ', 'term', term, leader, word) FROM terms
             UNION ALL SELECT concat_ws(' ', 'step', step, md5(sql)) FROM schema_steps
             ORDER BY 1",
        );
        all.fetch_all(connection).await.unwrap().iter().map(|row| row.try_get("line").unwrap()).collect()
    }

    /// F39: the same over PostgreSQL, where a connection that breaks takes its transaction with it.
    #[tokio::test]
    async fn an_upgrade_of_postgres_that_is_killed_anywhere_is_made_again() {
        let Some(mut server) = Server::find().await else { return };
        let to = |steps| Steps { table: POSTGRES.table, steps };
        let steps = POSTGRES.steps;
        let fresh = server.database(None).await;
        let mut fresh = server.connect(&fresh).await;
        migrate(&mut fresh, &POSTGRES).await.unwrap();
        let expected = described_by_postgres(&mut fresh).await;
        assert!(expected.len() > 50, "{expected:#?}");
        let mut n_killed = 0;
        for (before, step) in (0..steps.len()).map(|done| (&steps[..done], steps[done])) {
            let earlier = server.database(None).await;
            let mut connection = server.connect(&earlier).await;
            migrate(&mut connection, &to(before)).await.unwrap();
            connection.close().await.unwrap();
            let statements = statements(step);
            for n_done in 0..=statements.len() {
                let database = server.database(Some(&earlier)).await;
                let mut connection = server.connect(&database).await;
                let pid = sqlx::query("SELECT pg_backend_pid() AS pid").fetch_one(&mut connection).await.unwrap();
                let pid: i32 = pid.try_get("pid").unwrap();
                sqlx::raw_sql("BEGIN").execute(&mut connection).await.unwrap();
                for statement in &statements[..n_done] {
                    sqlx::raw_sql(sqlx::AssertSqlSafe(statement.clone())).execute(&mut connection).await.unwrap();
                }
                // No word of goodbye, as of a process that is killed; the lock that it had is free once the server has noticed.
                server.run(format!("SELECT pg_terminate_backend({pid}, 10000)")).await;
                assert!(sqlx::raw_sql("SELECT 1").execute(&mut connection).await.is_err(), "it is not gone");
                let mut next = server.connect(&database).await;
                migrate(&mut next, &POSTGRES).await.unwrap();
                let found = described_by_postgres(&mut next).await;
                assert_eq!(found, expected, "step {}, {n_done} statements", before.len() + 1);
                n_killed += 1;
            }
        }
        assert!(n_killed > 20, "{n_killed}");
    }

    #[tokio::test]
    async fn a_step_that_fails_leaves_the_schema_before_it() {
        let mut connection = memory().await;
        let broken = "CREATE TABLE a (x INTEGER) STRICT; CREATE TABLE a (x INTEGER) STRICT";
        migrate_to(&mut connection, &[broken]).await.unwrap_err();
        migrate_to(&mut connection, &["CREATE TABLE a (x INTEGER) STRICT"]).await.unwrap();
    }
}
