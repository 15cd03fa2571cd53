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
            // Comments may hold what ends a statement.
            let code: String = step.lines().map(|line| line.split("--").next().unwrap().to_owned() + "\n").collect();
            let statements: Vec<&str> = code.split(';').map(str::trim).filter(|text| !text.is_empty()).collect();
            for n_done in 0..=statements.len() {
                let (folder, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
                let mut connection = file(&folder.path().join("a.db")).await;
                migrate_to(&mut connection, before).await.unwrap();
                let mut transaction = sqlx::Acquire::begin(&mut connection).await.unwrap();
                for statement in &statements[..n_done] {
                    let statement = sqlx::AssertSqlSafe((*statement).to_owned());
                    sqlx::raw_sql(statement).execute(&mut *transaction).await.unwrap();
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

    #[tokio::test]
    async fn a_step_that_fails_leaves_the_schema_before_it() {
        let mut connection = memory().await;
        let broken = "CREATE TABLE a (x INTEGER) STRICT; CREATE TABLE a (x INTEGER) STRICT";
        migrate_to(&mut connection, &[broken]).await.unwrap_err();
        migrate_to(&mut connection, &["CREATE TABLE a (x INTEGER) STRICT"]).await.unwrap();
    }
}
