//! Jobs: created once per request id, read, listed page by page, loaded for a restart.

use std::collections::BTreeMap;

use attune_spec::id::{JobId, Project};
use serde_json::{Value, json};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row as _};

use super::query::Query;
use super::{Store, apply, row};
use crate::attempt::{Attempt, Unfinished};
use crate::change::{Applied, Write};
use crate::error::{Error, Result, db};
use crate::event::NewEvent;
use crate::job::{Created, Filter, Job, NewJob, Order, Overdue, Page, Request};
use crate::time::UtcMs;

/// A job's row with the number of the newest event about it.
macro_rules! select_jobs {
    ($rest:literal) => {
        concat!(
            "SELECT jobs.*, (SELECT COALESCE(MAX(e.seq), 0) FROM events e WHERE e.project = jobs.project \
             AND e.job = jobs.job) AS last_event FROM jobs WHERE ",
            $rest
        )
    };
}

/// Rows of one page at most; larger wishes are cut down to it.
pub(super) const PAGE_ROWS: u32 = 1000;

impl Store {
    /// Stores a job with its `job.created` event and what the scheduling core wants stored with it (`also`); with a
    /// `request`, at most once per request id: a repeat gives back the job of the first call and writes nothing.
    ///
    /// # Errors
    /// [`Error::RequestReused`] for the same id with another body, [`Error::NotFound`] when an input does not exist,
    /// [`Error::Conflict`] when the job id is taken.
    pub async fn create_job(&self, job: &NewJob, also: &[Write], request: Option<&Request>) -> Result<Created> {
        let mut transaction = self.begin().await?;
        let created = create(&mut transaction, job, also, request).await;
        transaction.end(created).await
    }

    /// The job that an earlier call with this request made, if there was one.
    ///
    /// # Errors
    /// [`Error::RequestReused`] for the same id with another body.
    pub async fn job_of_request(&self, project: &Project, request: &Request) -> Result<Option<Job>> {
        let mut connection = self.readers.acquire().await.map_err(db)?;
        match answered(&mut connection, project, request).await? {
            Some(job) => one(&mut connection, project, &job).await.map(Some),
            None => Ok(None),
        }
    }

    /// One job.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn job(&self, project: &Project, job: &JobId) -> Result<Job> {
        one(&mut *self.readers.acquire().await.map_err(db)?, project, job).await
    }

    /// Jobs of a project, in the filter's order, at most `rows` of them (and at most 1000).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a page token that no earlier page gave out.
    pub async fn jobs(&self, project: &Project, filter: &Filter, page: Option<&str>, rows: u32) -> Result<Page<Job>> {
        let (rows, newest) = (rows.clamp(1, PAGE_ROWS), filter.order == Order::Newest);
        let mut query = Query::new(select_jobs!("project = "));
        query.push_bind(project.as_str());
        if let Some(token) = page {
            let last = JobId::new(token).map_err(|_| bad_token(token))?;
            query.push(if newest { " AND job < " } else { " AND job > " }).push_bind(last.to_string());
        }
        if !filter.states.is_empty() {
            query.push(" AND state IN (").push_list(filter.states.iter().map(|state| state.as_str())).push(")");
        }
        if let Some(kind) = &filter.kind {
            query.push(" AND kind = ").push_bind(kind);
        }
        if let Some(name) = &filter.name {
            query.push(" AND name = ").push_bind(name);
        }
        if let Some(parent) = &filter.parent {
            query.push(" AND parent = ").push_bind(parent.to_string());
        }
        for (key, value) in &filter.labels {
            query.push(" AND EXISTS (SELECT 1 FROM job_labels l WHERE l.project = jobs.project AND l.job = jobs.job AND l.key = ");
            query.push_bind(key).push(" AND l.value = ").push_bind(value).push(")");
        }
        query
            .push(if newest { " ORDER BY job DESC LIMIT " } else { " ORDER BY job LIMIT " })
            .push_bind(i64::from(rows) + 1);
        let mut connection = self.readers.acquire().await.map_err(db)?;
        let found = query.build()?.fetch_all(&mut *connection).await.map_err(db)?;
        let more = found.len() > rows as usize;
        let mut items = found.iter().take(rows as usize).map(row::job).collect::<Result<Vec<_>>>()?;
        for job in &mut items {
            job.labels = labels(&mut connection, &job.project, &job.job).await?;
        }
        let next = items.last().filter(|_| more).map(|job| job.job.to_string());
        Ok(Page { items, next })
    }

    /// The attempts of a job, oldest first.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Corrupt`].
    pub async fn attempts(&self, project: &Project, job: &JobId) -> Result<Vec<Attempt>> {
        let (project, job) = row::key(project, job);
        sqlx::query("SELECT * FROM attempts WHERE project = $1 AND job = $2 ORDER BY epoch")
            .bind(project)
            .bind(job)
            .fetch_all(&self.readers)
            .await
            .map_err(db)?
            .iter()
            .map(row::attempt)
            .collect()
    }

    /// All that has not ended, in one consistent view: what a scheduler starts from. Ordered by project and id.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Corrupt`].
    pub async fn unfinished(&self) -> Result<Unfinished> {
        let mut view = self.view().await?;
        let mut jobs = sqlx::query(select_jobs!("finished_ms IS NULL ORDER BY project, job"))
            .fetch_all(&mut *view)
            .await
            .map_err(db)?
            .iter()
            .map(row::job)
            .collect::<Result<Vec<_>>>()?;
        for job in &mut jobs {
            job.labels = labels(&mut view, &job.project, &job.job).await?;
        }
        let cohorts = sqlx::query("SELECT * FROM cohorts WHERE ended_ms IS NULL ORDER BY cohort")
            .fetch_all(&mut *view)
            .await
            .map_err(db)?
            .iter()
            .map(row::cohort)
            .collect::<Result<_>>()?;
        let attempts = sqlx::query(
            "SELECT a.* FROM attempts a JOIN jobs j ON j.project = a.project AND j.job = a.job \
             WHERE j.finished_ms IS NULL AND a.ended_ms IS NULL ORDER BY a.project, a.job, a.epoch",
        )
        .fetch_all(&mut *view)
        .await
        .map_err(db)?
        .iter()
        .map(row::attempt)
        .collect::<Result<_>>()?;
        let counters = sqlx::query("SELECT name, value FROM counters")
            .fetch_all(&mut *view)
            .await
            .map_err(db)?
            .iter()
            .map(|row| Ok((row.try_get("name").map_err(db)?, row::unsigned(row, "value")?)))
            .collect::<Result<_>>()?;
        let rules = sqlx::query("SELECT kind, name, value FROM rules ORDER BY kind, name")
            .fetch_all(&mut *view)
            .await
            .map_err(db)?
            .iter()
            .map(|row| {
                let (kind, name) = (row.try_get("kind").map_err(db)?, row.try_get("name").map_err(db)?);
                Ok((kind, name, row::json(row, "value")?))
            })
            .collect::<Result<_>>()?;
        Ok(Unfinished { jobs, cohorts, attempts, counters, rules })
    }

    /// The largest id of a job that has no parent, in any project.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Corrupt`].
    pub async fn last_job(&self) -> Result<Option<JobId>> {
        let rows = sqlx::query("SELECT job FROM jobs WHERE parent IS NULL ORDER BY job DESC LIMIT 1")
            .fetch_all(&mut *self.readers.acquire().await.map_err(db)?)
            .await
            .map_err(db)?;
        rows.first().map(|row| row::parsed(row, "job")).transpose()
    }

    /// Jobs that have not ended although a limit of time that they set themselves has passed: a date, by `now`, or a time of
    /// running, by `steady`, which is of the clock that the times of attempts are of.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Corrupt`].
    pub async fn overdue(&self, now: UtcMs, steady: UtcMs) -> Result<Vec<(Project, JobId, Overdue)>> {
        let rows = sqlx::query(
            "SELECT project, job, deadline_ms FROM jobs WHERE finished_ms IS NULL \
             AND (run_limit_ms IS NOT NULL OR deadline_ms IS NOT NULL) \
             AND (deadline_ms <= $1 OR run_limit_ms <= \
                  (SELECT COALESCE(SUM(COALESCE(a.ended_ms, $2) - a.started_ms), 0) FROM attempts a \
                   WHERE a.project = jobs.project AND a.job = jobs.job)) ORDER BY project, job",
        )
        .bind(now.0)
        .bind(steady.0)
        .fetch_all(&mut *self.readers.acquire().await.map_err(db)?)
        .await
        .map_err(db)?;
        let overdue = |row: &AnyRow| {
            let deadline: Option<i64> = row.try_get("deadline_ms").map_err(db)?;
            let limit =
                if deadline.is_some_and(|deadline| deadline <= now.0) { Overdue::Deadline } else { Overdue::RunTime };
            Ok((row::parsed(row, "project")?, row::parsed(row, "job")?, limit))
        };
        rows.iter().map(overdue).collect()
    }
}

pub(super) fn bad_token(token: &str) -> Error {
    let token: String = token.chars().take(80).collect();
    Error::Invalid(format!("page token {token:?} was not given out by an earlier page; start without one"))
}

async fn answered(connection: &mut AnyConnection, project: &Project, request: &Request) -> Result<Option<JobId>> {
    let found = sqlx::query("SELECT body_digest, answer FROM requests WHERE project = $1 AND request = $2")
        .bind(project.as_str())
        .bind(&request.id)
        .fetch_optional(connection)
        .await
        .map_err(db)?;
    let Some(found) = found else { return Ok(None) };
    if row::digest_of(&found, "body_digest")? != request.body {
        return Err(Error::RequestReused { request: request.id.clone() });
    }
    let answer = row::json(&found, "answer")?;
    let job = answer.get("job").and_then(Value::as_str).and_then(|job| JobId::new(job).ok());
    job.map(Some).ok_or_else(|| Error::Corrupt(format!("the answer of request {:?} names no job", request.id)))
}

async fn one(connection: &mut AnyConnection, project: &Project, job: &JobId) -> Result<Job> {
    let (p, j) = row::key(project, job);
    let found = sqlx::query(select_jobs!("project = $1 AND job = $2"))
        .bind(p)
        .bind(j)
        .fetch_optional(&mut *connection)
        .await
        .map_err(db)?
        .ok_or_else(|| Error::not_found("job", job, project))?;
    let mut found = row::job(&found)?;
    found.labels = labels(connection, project, job).await?;
    Ok(found)
}

async fn labels(connection: &mut AnyConnection, project: &Project, job: &JobId) -> Result<BTreeMap<String, String>> {
    let (project, job) = row::key(project, job);
    sqlx::query("SELECT key, value FROM job_labels WHERE project = $1 AND job = $2")
        .bind(project)
        .bind(job)
        .fetch_all(connection)
        .await
        .map_err(db)?
        .iter()
        .map(|row| Ok((row.try_get("key").map_err(db)?, row.try_get("value").map_err(db)?)))
        .collect()
}

async fn create(
    connection: &mut AnyConnection,
    job: &NewJob,
    also: &[Write],
    request: Option<&Request>,
) -> Result<Created> {
    if let Some(request) = request
        && let Some(before) = answered(connection, &job.project, request).await?
    {
        let job = one(connection, &job.project, &before).await?;
        return Ok(Created { job, is_new: false, events: Vec::new() });
    }
    insert(connection, job).await?;
    let mut applied = Applied::default();
    let event = NewEvent {
        project: job.project.clone(),
        job: Some(job.job.clone()),
        epoch: None,
        kind: "job.created".to_owned(),
        data: json!({
            "name": job.name, "kind": job.kind, "state": job.state.as_str(),
            "reason": job.reason, "message": job.message,
        }),
        time: job.now,
    };
    applied.events.push(apply::append(connection, &event).await?);
    for write in also {
        apply::carry_out(connection, write, &mut applied).await?;
    }
    if let Some(request) = request {
        sqlx::query(
            "INSERT INTO requests (project, request, body_digest, answer, created_ms) VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(job.project.as_str())
        .bind(&request.id)
        .bind(request.body.to_string())
        .bind(json!({"job": job.job.as_str()}).to_string())
        .bind(job.now.0)
        .execute(&mut *connection)
        .await
        .map_err(db)?;
    }
    let job = one(connection, &job.project, &job.job).await?;
    Ok(Created { job, is_new: true, events: applied.events })
}

async fn insert(connection: &mut AnyConnection, job: &NewJob) -> Result<()> {
    if job.state.is_final() || job.state == crate::job::State::Stopping {
        return Err(Error::Invalid(format!("a job cannot be created in state {}", job.state)));
    }
    let (project, id) = row::key(&job.project, &job.job);
    let done = sqlx::query(
        "INSERT INTO jobs (project, job, version, name, kind, spec, resolved, state, reason, message, epoch, attempts, \
         priority, core, retry_of, created_ms, updated_ms, parent, stage, run_limit_ms, deadline_ms) \
         VALUES ($1, $2, $14, $3, $4, $5, $6, $7, $8, $9, 0, 0, $10, $11, $12, $13, $13, $15, $16, $17, $18) \
         ON CONFLICT DO NOTHING",
    )
    .bind(&project)
    .bind(&id)
    .bind(&job.name)
    .bind(&job.kind)
    .bind(job.spec.to_string())
    .bind(job.resolved.to_string())
    .bind(job.state.as_str())
    .bind(&job.reason)
    .bind(&job.message)
    .bind(job.priority)
    .bind(job.core.to_string())
    .bind(job.retry_of.as_ref().map(JobId::as_str))
    .bind(job.now.0)
    .bind(row::signed(job.version)?)
    .bind(job.stage.as_ref().map(|stage| stage.parent.as_str()))
    .bind(job.stage.as_ref().map(|stage| stage.name.as_str()))
    .bind(job.run_limit_ms.map(row::signed).transpose()?)
    .bind(job.deadline.map(|deadline| deadline.0))
    .execute(&mut *connection)
    .await
    .map_err(db)?;
    if done.rows_affected() == 0 {
        return Err(Error::Conflict(format!("job id {id:?} is taken in project {project:?}")));
    }
    for (key, value) in &job.labels {
        sqlx::query("INSERT INTO job_labels (project, job, key, value) VALUES ($1, $2, $3, $4)")
            .bind(&project)
            .bind(&id)
            .bind(key)
            .bind(value)
            .execute(&mut *connection)
            .await
            .map_err(db)?;
    }
    for input in &job.inputs {
        let done = sqlx::query(
            "INSERT INTO job_inputs (project, job, role, digest) \
             SELECT $1, $2, $3, digest FROM artifacts WHERE project = $1 AND digest = $4",
        )
        .bind(&project)
        .bind(&id)
        .bind(&input.role)
        .bind(input.digest.to_string())
        .execute(&mut *connection)
        .await
        .map_err(db)?;
        if done.rows_affected() == 0 {
            return Err(Error::not_found("artifact", input.digest, &project));
        }
    }
    Ok(())
}
