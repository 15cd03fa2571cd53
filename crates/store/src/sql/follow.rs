//! A store that follows: it reads while another scheduler leads, sees what moves, and leads when nobody else does.

use attune_spec::id::{JobId, Project};

use super::jobs::PAGE_ROWS;
use super::query::Query;
use super::{Held, Store, postgres, row};
use crate::database::Database;
use crate::error::{Error, Result, db};

/// What the scheduler that leads has said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announced {
    /// The number of its term; that of the last one while nobody leads.
    pub term: u64,
    /// Where it is reached; empty if it has not said so, or has ended in good order.
    pub url: String,
    /// The word by which it knows schedulers that follow it: whoever reads the database.
    pub word: String,
}

/// How far the logs of a job are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// The job.
    pub job: JobId,
    /// The number of its last event.
    pub events: u64,
    /// The number of its last point of metrics.
    pub metrics: u64,
}

impl Store {
    /// Opens a database of PostgreSQL for reading, whoever leads.
    ///
    /// # Errors
    /// [`Error::Behind`] while its schema lacks steps, which only who leads makes; [`Error::Schema`] when it was written by a newer
    /// binary, [`Error::Unavailable`] when its server does not answer, [`Error::Invalid`] for a file of SQLite, which one process
    /// has to itself.
    pub async fn follow(database: &Database) -> Result<Self> {
        // Once a process; more often changes nothing.
        sqlx::any::install_default_drivers();
        let Database::Postgres(url) = database else {
            return Err(Error::Invalid(format!("{database} is a file of SQLite; only one scheduler reads it")));
        };
        let (writer, readers, candidate) = postgres::follow(url, database).await?;
        Ok(Self { writer, readers, held: Default::default(), candidate: Some(candidate.into()) })
    }

    /// Leads from now on if nobody else does; whether this store leads. What may have changed since it was opened is what is stored.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the server does not answer, [`Error::Schema`] when a newer binary has led meanwhile.
    pub async fn lead(&self) -> Result<bool> {
        let Some(candidate) = self.candidate.as_ref().filter(|_| !self.leads()) else { return Ok(true) };
        if let Some(lock) = candidate.take().await? {
            // Only this function sets it, and it does so under the lock of the candidate.
            let _ = self.held.set(Held::Postgres(lock));
        }
        Ok(self.leads())
    }

    /// Says where this store's scheduler is reached while it leads, and the word by which those that follow are known.
    ///
    /// # Errors
    /// [`Error::Replaced`], [`Error::Unavailable`].
    pub async fn announce(&self, url: &str, word: &str) -> Result<()> {
        if let Some(Held::Sqlite(_)) = self.held.get() {
            return Ok(());
        }
        let mut transaction = self.begin().await?;
        let update = sqlx::query("UPDATE terms SET leader = $1, word = $2").bind(url).bind(word);
        let done = update.execute(&mut *transaction).await.map_err(db);
        transaction.end(done).await.map(drop)
    }

    /// What the scheduler has said of itself that leads; nothing over SQLite, where nobody follows.
    ///
    /// # Errors
    /// [`Error::Unavailable`]; [`Error::Schema`] when a newer binary leads by now, whose rows this one may not understand.
    pub async fn announced(&self) -> Result<Option<Announced>> {
        if let Some(Held::Sqlite(_)) = self.held.get() {
            return Ok(None);
        }
        postgres::announced(&mut *self.readers.acquire().await.map_err(db)?).await.map(Some)
    }

    /// How far the logs of some jobs of a project are written; those that are not there are left out.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Corrupt`].
    pub async fn moved(&self, project: &Project, jobs: &[JobId]) -> Result<Vec<Moved>> {
        let mut moved = Vec::with_capacity(jobs.len());
        for some in jobs.chunks(PAGE_ROWS as usize) {
            let mut query = Query::new(
                "SELECT job, metrics, COALESCE((SELECT MAX(seq) FROM events e WHERE e.project = jobs.project \
                 AND e.job = jobs.job), 0) AS events FROM jobs WHERE project = ",
            );
            query.push_bind(project.as_str()).push(" AND job IN (").push_list(some.iter().map(JobId::as_str)).push(")");
            for found in query.build()?.fetch_all(&self.readers).await.map_err(db)? {
                moved.push(Moved {
                    job: row::parsed(&found, "job")?,
                    events: row::unsigned(&found, "events")?,
                    metrics: row::unsigned(&found, "metrics")?,
                });
            }
        }
        Ok(moved)
    }
}
