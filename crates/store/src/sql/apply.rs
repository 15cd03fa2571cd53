//! Carries out a change: every write in one transaction, every comparison inside it.

use attune_spec::id::{Epoch, JobId, Project, Seq};
use serde_json::Value;
use sqlx::{AnyConnection, Row as _};

use super::{Store, artifacts, audit, row};
use crate::attempt::{Attempt, Cohort};
use crate::change::{Applied, Write};
use crate::error::{Error, Result, db};
use crate::event::{Event, NewEvent};
use crate::job::{JobChange, State};
use crate::metric::NewPoint;

impl Store {
    /// Carries out all writes, in order, in one transaction.
    ///
    /// # Errors
    /// [`Error::Conflict`] when a job's version, a final state, an epoch or a counter is not what the change was decided
    /// on, [`Error::StaleEpoch`] for writes of a replaced attempt, [`Error::NotFound`] for what they refer to. Nothing
    /// is stored then.
    pub async fn apply(&self, change: &[Write]) -> Result<Applied> {
        let mut transaction = self.begin().await?;
        let mut applied = Applied::default();
        for write in change {
            if let Err(refusal) = carry_out(&mut transaction, write, &mut applied).await {
                return Err(transaction.abandon(refusal).await);
            }
        }
        transaction.commit().await?;
        Ok(applied)
    }
}

/// Carries out one write of a change inside its transaction.
pub(super) async fn carry_out(connection: &mut AnyConnection, write: &Write, applied: &mut Applied) -> Result<()> {
    match write {
        Write::Job(change) => {
            change_job(connection, change).await?;
            applied.events.push(append(connection, &change.event).await?);
        }
        Write::Progress { project, job, epoch, progress, now } => {
            check_epoch(connection, project, job, *epoch).await?;
            let (project, job) = row::key(project, job);
            sqlx::query("UPDATE jobs SET progress = $3, updated_ms = $4 WHERE project = $1 AND job = $2")
                .bind(project)
                .bind(job)
                .bind(progress.to_string())
                .bind(now.0)
                .execute(connection)
                .await
                .map_err(db)?;
        }
        Write::Attempt(attempt) => put_attempt(connection, attempt).await?,
        Write::Reported { project, job, epoch, number } => {
            let (project, job) = row::key(project, job);
            sqlx::query(
                "UPDATE attempts SET reported = $4 WHERE project = $1 AND job = $2 AND epoch = $3 AND reported < $4",
            )
            .bind(project)
            .bind(job)
            .bind(row::signed(epoch.0)?)
            .bind(row::signed(*number)?)
            .execute(connection)
            .await
            .map_err(db)?;
        }
        Write::Cohort(cohort) => put_cohort(connection, cohort).await?,
        Write::Event(event) => applied.events.push(append(connection, event).await?),
        Write::Metrics { project, job, epoch, points } => {
            check_epoch(connection, project, job, *epoch).await?;
            append_points(connection, project, job, *epoch, points).await?;
        }
        Write::Artifact(artifact) => artifacts::commit(connection, artifact, applied).await?,
        Write::Tag { project, tag, digest, expected, job, now } => {
            if let Some(expected) = expected {
                artifacts::check_tag(connection, project, tag, *expected).await?;
            }
            artifacts::move_tag(connection, project, tag, *digest, job.as_ref(), *now, applied).await?;
        }
        Write::Audit(record) => audit::append(connection, record).await?,
        Write::Counter { name, value } => raise_counter(connection, name, *value).await?,
        Write::Rule { kind, name, value } => put_rule(connection, kind, name, value.as_ref()).await?,
    }
    Ok(())
}

async fn put_rule(connection: &mut AnyConnection, kind: &str, name: &str, value: Option<&Value>) -> Result<()> {
    let query = match value {
        None => sqlx::query("DELETE FROM rules WHERE kind = $1 AND name = $2").bind(kind).bind(name),
        Some(value) => sqlx::query(
            "INSERT INTO rules (kind, name, value) VALUES ($1, $2, $3) \
             ON CONFLICT (kind, name) DO UPDATE SET value = excluded.value",
        )
        .bind(kind)
        .bind(name)
        .bind(value.to_string()),
    };
    query.execute(connection).await.map_err(db).map(drop)
}

/// Gives the event the next number of its project and stores it.
pub(super) async fn append(connection: &mut AnyConnection, event: &NewEvent) -> Result<Event> {
    let head = sqlx::query(
        "INSERT INTO event_heads (project, seq) VALUES ($1, 1) \
         ON CONFLICT (project) DO UPDATE SET seq = event_heads.seq + 1 RETURNING seq",
    )
    .bind(event.project.as_str())
    .fetch_one(&mut *connection)
    .await
    .map_err(db)?;
    let seq = Seq(row::unsigned(&head, "seq")?);
    sqlx::query(
        "INSERT INTO events (project, seq, job, epoch, kind, data, time_ms) VALUES ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(event.project.as_str())
    .bind(row::signed(seq.0)?)
    .bind(event.job.as_ref().map(JobId::as_str))
    .bind(event.epoch.map(|epoch| row::signed(epoch.0)).transpose()?)
    .bind(&event.kind)
    .bind(event.data.to_string())
    .bind(event.time.0)
    .execute(connection)
    .await
    .map_err(db)?;
    Ok(Event { seq, event: event.clone() })
}

/// The job's state and epoch, as the transaction sees them.
async fn state_of(connection: &mut AnyConnection, project: &Project, job: &JobId) -> Result<(State, Epoch, u64)> {
    let (p, j) = row::key(project, job);
    let found = sqlx::query("SELECT state, epoch, version FROM jobs WHERE project = $1 AND job = $2")
        .bind(p)
        .bind(j)
        .fetch_optional(connection)
        .await
        .map_err(db)?
        .ok_or_else(|| Error::not_found("job", job, project))?;
    Ok((row::parsed(&found, "state")?, Epoch(row::unsigned(&found, "epoch")?), row::unsigned(&found, "version")?))
}

/// The fence: a write of an attempt counts only while its epoch is the job's current one and the job has not ended.
pub(super) async fn check_epoch(
    connection: &mut AnyConnection,
    project: &Project,
    job: &JobId,
    given: Epoch,
) -> Result<()> {
    let (state, epoch, _) = state_of(connection, project, job).await?;
    let current = match () {
        () if state.is_final() => format!("the job has {state}"),
        () if epoch != given => format!("epoch {epoch}"),
        () => return Ok(()),
    };
    Err(Error::StaleEpoch { job: job.to_string(), given, current })
}

async fn change_job(connection: &mut AnyConnection, change: &JobChange) -> Result<()> {
    let (state, epoch, version) = state_of(connection, &change.project, &change.job).await?;
    if state.is_final() {
        return Err(Error::Conflict(format!("job {:?} has {state}; a final state never changes", change.job.as_str())));
    }
    if version != change.version {
        return Err(Error::Conflict(format!(
            "job {:?} is at version {version}; the change was decided on version {}",
            change.job.as_str(),
            change.version
        )));
    }
    if change.epoch < epoch {
        return Err(Error::StaleEpoch {
            job: change.job.to_string(),
            given: change.epoch,
            current: format!("epoch {epoch}"),
        });
    }
    let (project, job) = row::key(&change.project, &change.job);
    sqlx::query(
        "UPDATE jobs SET version = version + 1, state = $3, stop = $4, reason = $5, message = $6, epoch = $7, \
         attempts = $8, core = $9, failure = COALESCE($10, failure), outputs = COALESCE($11, outputs), \
         updated_ms = $12, \
         started_ms = CASE WHEN started_ms IS NULL AND $3 = 'starting' THEN $12 ELSE started_ms END, \
         finished_ms = CASE WHEN $13 THEN $12 ELSE NULL END \
         WHERE project = $1 AND job = $2",
    )
    .bind(project)
    .bind(job)
    .bind(change.state.as_str())
    .bind(change.stop.map(crate::job::Stop::as_str))
    .bind(&change.reason)
    .bind(&change.message)
    .bind(row::signed(change.epoch.0)?)
    .bind(i64::from(change.attempts))
    .bind(change.core.to_string())
    .bind(change.failure.as_ref().map(ToString::to_string))
    .bind(change.outputs.as_ref().map(ToString::to_string))
    .bind(change.now.0)
    .bind(change.state.is_final())
    .execute(connection)
    .await
    .map_err(db)?;
    Ok(())
}

async fn put_attempt(connection: &mut AnyConnection, attempt: &Attempt) -> Result<()> {
    let workers: Vec<&str> = attempt.workers.iter().map(attune_spec::id::WorkerId::as_str).collect();
    sqlx::query(
        "INSERT INTO attempts (project, job, epoch, cohort, workers, outcome, message, started_ms, ended_ms, reported) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (project, job, epoch) DO UPDATE SET \
         cohort = excluded.cohort, workers = excluded.workers, outcome = excluded.outcome, \
         message = excluded.message, started_ms = excluded.started_ms, ended_ms = excluded.ended_ms, \
         reported = CASE WHEN attempts.reported < excluded.reported THEN excluded.reported ELSE attempts.reported END",
    )
    .bind(attempt.project.as_str())
    .bind(attempt.job.as_str())
    .bind(row::signed(attempt.epoch.0)?)
    .bind(row::signed(attempt.cohort.0)?)
    .bind(serde_json::json!(workers).to_string())
    .bind(&attempt.outcome)
    .bind(&attempt.message)
    .bind(attempt.started.0)
    .bind(attempt.ended.map(|time| time.0))
    .bind(row::signed(attempt.reported)?)
    .execute(connection)
    .await
    .map_err(db)?;
    Ok(())
}

async fn put_cohort(connection: &mut AnyConnection, cohort: &Cohort) -> Result<()> {
    sqlx::query(
        "INSERT INTO cohorts (cohort, project, core, created_ms, ended_ms) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT (cohort) DO UPDATE SET core = excluded.core, ended_ms = excluded.ended_ms",
    )
    .bind(row::signed(cohort.cohort.0)?)
    .bind(cohort.project.as_str())
    .bind(cohort.core.to_string())
    .bind(cohort.created.0)
    .bind(cohort.ended.map(|time| time.0))
    .execute(connection)
    .await
    .map_err(db)?;
    Ok(())
}

async fn append_points(
    connection: &mut AnyConnection,
    project: &Project,
    job: &JobId,
    epoch: Epoch,
    points: &[NewPoint],
) -> Result<()> {
    let Some(first) = points.iter().map(|point| point.step).min() else { return Ok(()) };
    let (project, job) = row::key(project, job);
    let epoch = row::signed(epoch.0)?;
    sqlx::query("DELETE FROM metrics WHERE project = $1 AND job = $2 AND step >= $3 AND epoch < $4")
        .bind(&project)
        .bind(&job)
        .bind(row::signed(first.0)?)
        .bind(epoch)
        .execute(&mut *connection)
        .await
        .map_err(db)?;
    let head = sqlx::query("SELECT metrics FROM jobs WHERE project = $1 AND job = $2")
        .bind(&project)
        .bind(&job)
        .fetch_one(&mut *connection)
        .await
        .map_err(db)?;
    let mut seq: i64 = head.try_get("metrics").map_err(db)?;
    for point in points {
        let value = (!point.value.is_nan()).then(|| point.value.clamp(f64::MIN, f64::MAX));
        let done = sqlx::query(
            "INSERT INTO metrics (project, job, seq, name, step, epoch, value, tokens, time_ms) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT DO NOTHING",
        )
        .bind(&project)
        .bind(&job)
        .bind(seq + 1)
        .bind(&point.name)
        .bind(row::signed(point.step.0)?)
        .bind(epoch)
        .bind(value)
        .bind(row::signed(point.tokens.0)?)
        .bind(point.time.0)
        .execute(&mut *connection)
        .await
        .map_err(db)?;
        seq += i64::from(done.rows_affected() > 0);
    }
    sqlx::query("UPDATE jobs SET metrics = $3 WHERE project = $1 AND job = $2")
        .bind(&project)
        .bind(&job)
        .bind(seq)
        .execute(connection)
        .await
        .map_err(db)?;
    Ok(())
}

async fn raise_counter(connection: &mut AnyConnection, name: &str, value: u64) -> Result<()> {
    let stored = sqlx::query("SELECT value FROM counters WHERE name = $1")
        .bind(name)
        .fetch_optional(&mut *connection)
        .await
        .map_err(db)?
        .map(|row| row.try_get::<i64, _>("value").map_err(db))
        .transpose()?;
    let value = row::signed(value)?;
    if let Some(stored) = stored.filter(|stored| *stored > value) {
        return Err(Error::Conflict(format!("counter {name:?} is at {stored}; it cannot go back to {value}")));
    }
    sqlx::query(
        "INSERT INTO counters (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
    )
    .bind(name)
    .bind(value)
    .execute(connection)
    .await
    .map_err(db)?;
    Ok(())
}
