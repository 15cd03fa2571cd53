//! What is needed no more: a job's old checkpoints, and blobs that no artifact refers to.

use std::collections::BTreeSet;

use attune_spec::id::{Digest, JobId, Project};
use serde_json::json;
use sqlx::AnyConnection;

use super::artifacts::{blobs_of, event, is_referenced, remove};
use super::{Store, apply, row};
use crate::artifact::Pruned;
use crate::error::{Result, db};
use crate::time::UtcMs;

impl Store {
    /// Deletes the rows of checkpoints that `job` made and needs no more, and appends `artifact.deleted` for each. Left
    /// alone are those that another job made too, that a tag names, or that an unfinished job was created with.
    ///
    /// # Errors
    /// [`Error::Unavailable`](crate::Error::Unavailable), [`Error::Corrupt`](crate::Error::Corrupt).
    pub async fn prune_checkpoints(
        &self,
        project: &Project,
        job: &JobId,
        old: &[Digest],
        now: UtcMs,
    ) -> Result<Pruned> {
        let mut transaction = self.begin().await?;
        let pruned = prune(&mut transaction, project, job, old, now).await;
        transaction.end(pruned).await
    }

    /// The projects that have anything, sorted.
    ///
    /// # Errors
    /// [`Error::Unavailable`](crate::Error::Unavailable), [`Error::Corrupt`](crate::Error::Corrupt).
    pub async fn projects(&self) -> Result<Vec<Project>> {
        let found = sqlx::query("SELECT project FROM event_heads ORDER BY project").fetch_all(&self.readers).await;
        found.map_err(db)?.iter().map(|found| row::parsed(found, "project")).collect()
    }

    /// Whether this store may still write: an error if another scheduler leads by now.
    ///
    /// # Errors
    /// [`Error::Replaced`](crate::Error::Replaced), [`Error::Unavailable`](crate::Error::Unavailable).
    pub async fn may_write(&self) -> Result<()> {
        self.begin().await?.commit().await
    }

    /// Deletes at most `rows` events of jobs that ended before `before`, the oldest first: all but the last `kept` of each job, which
    /// tell how it ended. Gives how many. The numbers of others stay what they are, and no number is given twice.
    ///
    /// # Errors
    /// [`Error::Unavailable`](crate::Error::Unavailable).
    pub async fn forget_events(&self, project: &Project, before: UtcMs, kept: u32, rows: u32) -> Result<u64> {
        let mut transaction = self.begin().await?;
        let done = sqlx::query(
            "DELETE FROM events WHERE project = $1 AND seq IN ( \
             SELECT e.seq FROM events e JOIN jobs j ON j.project = e.project AND j.job = e.job \
             WHERE e.project = $1 AND j.finished_ms < $2 AND e.seq < ( \
             SELECT MIN(l.seq) FROM (SELECT seq FROM events WHERE project = $1 AND job = e.job \
             ORDER BY seq DESC LIMIT $3) l) ORDER BY e.seq LIMIT $4)",
        )
        .bind(project.as_str())
        .bind(before.0)
        .bind(i64::from(kept.max(1)))
        .bind(i64::from(rows))
        .execute(&mut *transaction)
        .await
        .map_err(db);
        Ok(transaction.end(done).await?.rows_affected())
    }

    /// Bytes of a project's artifacts; a file that several have counts once.
    ///
    /// # Errors
    /// [`Error::Unavailable`](crate::Error::Unavailable).
    pub async fn kept_bytes(&self, project: &Project) -> Result<u64> {
        let row = sqlx::query(
            "SELECT CAST(COALESCE(SUM(size_bytes), 0) AS BIGINT) AS bytes \
             FROM (SELECT DISTINCT blob, size_bytes FROM artifact_files WHERE project = $1) AS kept",
        )
        .bind(project.as_str())
        .fetch_one(&mut *self.readers.acquire().await.map_err(db)?)
        .await
        .map_err(db)?;
        row::unsigned(&row, "bytes")
    }

    /// Those of `blobs` that no artifact of the project refers to.
    ///
    /// # Errors
    /// [`Error::Unavailable`](crate::Error::Unavailable).
    pub async fn unreferenced(&self, project: &Project, blobs: &[Digest]) -> Result<Vec<Digest>> {
        let mut connection = self.readers.acquire().await.map_err(db)?;
        let mut unreferenced = Vec::new();
        for blob in blobs {
            if !is_referenced(&mut connection, project, *blob).await? {
                unreferenced.push(*blob);
            }
        }
        Ok(unreferenced)
    }
}

async fn prune(
    connection: &mut AnyConnection,
    project: &Project,
    job: &JobId,
    old: &[Digest],
    now: UtcMs,
) -> Result<Pruned> {
    let mut pruned = Pruned::default();
    let mut blobs = BTreeSet::new();
    for &digest in old {
        let needed = sqlx::query(
            "SELECT 1 WHERE NOT EXISTS (SELECT 1 FROM artifact_commits WHERE project = $1 AND digest = $2 AND job = $3) \
             OR EXISTS (SELECT 1 FROM artifact_commits WHERE project = $1 AND digest = $2 AND job <> $3) \
             OR EXISTS (SELECT 1 FROM tags WHERE project = $1 AND digest = $2) \
             OR EXISTS (SELECT 1 FROM job_inputs i JOIN jobs j ON j.project = i.project AND j.job = i.job \
             WHERE i.project = $1 AND i.digest = $2 AND j.finished_ms IS NULL)",
        )
        .bind(project.as_str())
        .bind(digest.to_string())
        .bind(job.as_str())
        .fetch_optional(&mut *connection)
        .await
        .map_err(db)?;
        if needed.is_some() {
            continue;
        }
        blobs.extend(blobs_of(connection, project, digest).await?);
        remove(connection, project, digest).await?;
        let data = json!({"digest": digest.to_string()});
        apply::append(connection, &event(project, Some(job), None, "artifact.deleted", data, now)).await?;
        pruned.artifacts.push(digest);
    }
    for blob in blobs {
        if !is_referenced(connection, project, blob).await? {
            pruned.orphans.push(blob);
        }
    }
    Ok(pruned)
}
