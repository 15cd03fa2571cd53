//! The audit log: appended to, read backwards, forgotten in time.

use attune_spec::id::Project;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};

use super::jobs::{PAGE_ROWS, bad_token};
use super::query::Query;
use super::{Store, row};
use crate::audit::{Record, Recorded};
use crate::error::{Result, db};
use crate::job::{Order, Page};
use crate::time::UtcMs;

fn recorded(found: &AnyRow) -> Result<Recorded> {
    let text = |column: &str| found.try_get::<String, _>(column).map_err(db);
    Ok(Recorded {
        seq: row::unsigned(found, "seq")?,
        record: Record {
            time: row::time(found, "time_ms")?,
            caller: text("caller")?,
            name: text("name")?,
            peer: text("peer")?,
            project: row::parsed_optional(found, "project")?,
            rpc: text("rpc")?,
            target: text("target")?,
            outcome: text("outcome")?,
        },
    })
}

/// Appends a record in a transaction.
pub(super) async fn append(connection: &mut AnyConnection, record: &Record) -> Result<()> {
    fail::fail_point!("store::before_record", |what| {
        if what.as_deref() == Some("kill") {
            std::process::abort();
        }
        Err(crate::Error::Unavailable("a test planted this failure".to_owned()))
    });
    sqlx::query(
        "INSERT INTO audit (time_ms, caller, name, peer, project, rpc, target, outcome) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(record.time.0)
    .bind(&record.caller)
    .bind(&record.name)
    .bind(&record.peer)
    .bind(record.project.as_ref().map(Project::as_str))
    .bind(&record.rpc)
    .bind(&record.target)
    .bind(&record.outcome)
    .execute(connection)
    .await
    .map_err(db)
    .map(drop)
}

/// The same, where there is a record.
pub(super) async fn append_some(connection: &mut AnyConnection, record: Option<&Record>) -> Result<()> {
    match record {
        Some(record) => append(connection, record).await,
        None => Ok(()),
    }
}

impl Store {
    /// Appends a record of a call that changed nothing; so may a store that follows.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`].
    pub async fn append_audit(&self, record: &Record) -> Result<()> {
        let mut transaction = self.begin_beside().await?;
        let done = append(&mut transaction, record).await;
        transaction.end(done).await
    }

    /// Records in an order, at most `rows` of them: those about one project where one is given, else all.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] for a page token that no earlier page gave out.
    pub async fn audit(
        &self,
        project: Option<&Project>,
        order: Order,
        page: Option<&str>,
        rows: u32,
    ) -> Result<Page<Recorded>> {
        let (rows, newest) = (rows.clamp(1, PAGE_ROWS), order == Order::Newest);
        let last = page.map(|token| token.parse().ok().filter(|last: &i64| *last > 0).ok_or_else(|| bad_token(token)));
        let start = if newest { i64::MAX } else { 0 };
        let mut query = Query::new("SELECT * FROM audit WHERE seq ");
        query.push(if newest { "< " } else { "> " }).push_bind(last.transpose()?.unwrap_or(start));
        if let Some(project) = project {
            query.push(" AND project = ").push_bind(project.as_str());
        }
        query.push(if newest { " ORDER BY seq DESC LIMIT " } else { " ORDER BY seq LIMIT " });
        query.push_bind(i64::from(rows) + 1);
        let found = query.build()?.fetch_all(&self.readers).await.map_err(db)?;
        let more = found.len() > rows as usize;
        let items = found.iter().take(rows as usize).map(recorded).collect::<Result<Vec<_>>>()?;
        let next = items.last().filter(|_| more).map(|last| last.seq.to_string());
        Ok(Page { items, next })
    }

    /// Deletes at most `rows` records from before a time, the oldest first. Gives how many.
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`].
    pub async fn forget_audit(&self, before: UtcMs, rows: u32) -> Result<u64> {
        let mut transaction = self.begin().await?;
        let done = sqlx::query(
            "DELETE FROM audit WHERE seq IN (SELECT seq FROM audit WHERE time_ms < $1 ORDER BY seq LIMIT $2)",
        )
        .bind(before.0)
        .bind(i64::from(rows))
        .execute(&mut *transaction)
        .await
        .map_err(db);
        Ok(transaction.end(done).await?.rows_affected())
    }
}
