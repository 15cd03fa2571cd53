//! Whose workers are whose, and what they hold.

use std::collections::BTreeSet;

use attune_spec::id::{Digest, JobId, Project, WorkerId};
use serde_json::Value;
use sqlx::Row as _;

use super::query::Query;
use super::{Store, audit, row};
use crate::audit::Record;
use crate::error::{Error, Result, db};
use crate::time::UtcMs;

/// A job with an attempt that a worker runs.
#[derive(Debug, Clone, PartialEq)]
pub struct HeldJob {
    /// The job.
    pub job: JobId,
    /// What the scheduling core keeps of it.
    pub core: Value,
}

impl Store {
    /// Makes a worker id its owner's, for good, with the record of the call that asked for it. The first who asks gets it. Gives whether
    /// it is the owner's from now on only; nothing is stored otherwise.
    ///
    /// # Errors
    /// [`Error::Conflict`] when it is another's.
    pub async fn claim_worker(
        &self,
        worker: &WorkerId,
        owner: &str,
        now: UtcMs,
        record: Option<&Record>,
    ) -> Result<bool> {
        let taken = || Error::Conflict(format!("worker id {:?} belongs to another credential", worker.as_str()));
        match self.owner(worker).await? {
            Some(known) if known == owner => return Ok(false),
            Some(_) => return Err(taken()),
            None => {}
        }
        let mut transaction = self.begin().await?;
        let done = sqlx::query(
            "INSERT INTO worker_owners (worker, owner, created_ms) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        )
        .bind(worker.as_str())
        .bind(owner)
        .bind(now.0)
        .execute(&mut *transaction)
        .await
        .map_err(db);
        let mut done = done.map(|done| done.rows_affected() == 1);
        if let Ok(true) = done
            && let Err(error) = audit::append_some(&mut transaction, record).await
        {
            done = Err(error);
        }
        let is_new = transaction.end(done).await?;
        let is_own = is_new || self.owner(worker).await?.is_some_and(|known| known == owner);
        if is_own { Ok(is_new) } else { Err(taken()) }
    }

    /// Whose a worker id is.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn owner(&self, worker: &WorkerId) -> Result<Option<String>> {
        sqlx::query("SELECT owner FROM worker_owners WHERE worker = $1")
            .bind(worker.as_str())
            .fetch_optional(&self.readers)
            .await
            .map_err(db)?
            .map(|found| found.try_get("owner").map_err(db))
            .transpose()
    }

    /// The jobs of a project of which some worker of `owner` runs an attempt.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Corrupt`].
    pub async fn held(&self, project: &Project, owner: &str) -> Result<Vec<HeldJob>> {
        let own: BTreeSet<String> = sqlx::query("SELECT worker FROM worker_owners WHERE owner = $1")
            .bind(owner)
            .fetch_all(&self.readers)
            .await
            .map_err(db)?
            .iter()
            .map(|found| found.try_get("worker").map_err(db))
            .collect::<Result<_>>()?;
        let running = sqlx::query(
            "SELECT j.job, j.core, a.workers FROM jobs j JOIN attempts a ON a.project = j.project AND a.job = j.job \
             AND a.epoch = j.epoch WHERE j.project = $1 AND j.finished_ms IS NULL AND a.ended_ms IS NULL ORDER BY j.job",
        )
        .bind(project.as_str())
        .fetch_all(&self.readers)
        .await
        .map_err(db)?;
        let mut held = Vec::new();
        for found in &running {
            let workers = row::json(found, "workers")?;
            let mut workers = workers.as_array().into_iter().flatten().filter_map(Value::as_str);
            if workers.any(|worker| own.contains(worker)) {
                held.push(HeldJob { job: row::parsed(found, "job")?, core: row::json(found, "core")? });
            }
        }
        Ok(held)
    }

    /// Whether one of these jobs was created with an artifact.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn is_input(&self, project: &Project, jobs: &[&JobId], digest: Digest) -> Result<bool> {
        // As many places as every database has.
        for some in jobs.chunks(500) {
            let mut query = Query::new("SELECT 1 FROM job_inputs WHERE project = ");
            query.push_bind(project.as_str()).push(" AND digest = ").push_bind(digest.to_string());
            query.push(" AND job IN (").push_list(some.iter().map(|job| job.as_str())).push(") LIMIT 1");
            if query.build()?.fetch_optional(&self.readers).await.map_err(db)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
