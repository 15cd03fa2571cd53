//! From rows to domain values, and back to what SQLite can hold.

use std::str::FromStr;

use attune_spec::id::{Digest, Epoch, JobId, Project};
use serde_json::Value;
use sqlx::Row as _;
use sqlx::any::AnyRow;

use crate::artifact::Edge;
use crate::attempt::{Attempt, Cohort};
use crate::error::{Error, Result, db};
use crate::event::{Event, NewEvent};
use crate::job::{Job, Stage};
use crate::metric::{NewPoint, Point};
use crate::time::UtcMs;

/// A text column as a domain type; a text that the type refuses is damage, since only the type wrote it.
pub(super) fn parsed<T: FromStr<Err: std::fmt::Display>>(row: &AnyRow, column: &str) -> Result<T> {
    let text: String = row.try_get(column).map_err(db)?;
    text.parse().map_err(|e| Error::Corrupt(format!("column {column}: {e}")))
}

pub(super) fn parsed_optional<T: FromStr<Err: std::fmt::Display>>(row: &AnyRow, column: &str) -> Result<Option<T>> {
    let text: Option<String> = row.try_get(column).map_err(db)?;
    text.map(|text| text.parse().map_err(|e| Error::Corrupt(format!("column {column}: {e}")))).transpose()
}

pub(super) fn json(row: &AnyRow, column: &str) -> Result<Value> {
    parsed(row, column)
}

pub(super) fn unsigned(row: &AnyRow, column: &str) -> Result<u64> {
    let value: i64 = row.try_get(column).map_err(db)?;
    u64::try_from(value).map_err(|_| Error::Corrupt(format!("column {column} is {value}; expected 0 or more")))
}

pub(super) fn time(row: &AnyRow, column: &str) -> Result<UtcMs> {
    row.try_get(column).map(UtcMs).map_err(db)
}

pub(super) fn time_optional(row: &AnyRow, column: &str) -> Result<Option<UtcMs>> {
    row.try_get::<Option<i64>, _>(column).map(|time| time.map(UtcMs)).map_err(db)
}

/// A counter as SQLite holds it.
pub(super) fn signed(value: u64) -> Result<i64> {
    i64::try_from(value).map_err(|_| Error::Invalid(format!("{value} is larger than any stored number")))
}

pub(super) fn job(row: &AnyRow) -> Result<Job> {
    let (parent, name) = (parsed_optional(row, "parent")?, parsed_optional(row, "stage")?);
    Ok(Job {
        project: parsed(row, "project")?,
        job: parsed(row, "job")?,
        version: unsigned(row, "version")?,
        name: row.try_get("name").map_err(db)?,
        kind: row.try_get("kind").map_err(db)?,
        spec: json(row, "spec")?,
        resolved: json(row, "resolved")?,
        state: parsed(row, "state")?,
        stop: parsed_optional(row, "stop")?,
        reason: row.try_get("reason").map_err(db)?,
        message: row.try_get("message").map_err(db)?,
        epoch: Epoch(unsigned(row, "epoch")?),
        attempts: u32::try_from(unsigned(row, "attempts")?).unwrap_or(u32::MAX),
        priority: row.try_get("priority").map_err(db)?,
        labels: Default::default(),
        core: json(row, "core")?,
        progress: parsed_optional(row, "progress")?,
        outputs: json(row, "outputs")?,
        failure: parsed_optional(row, "failure")?,
        retry_of: parsed_optional(row, "retry_of")?,
        stage: parent.zip(name).map(|(parent, name)| Stage { parent, name }),
        last_event: attune_spec::id::Seq(unsigned(row, "last_event")?),
        created: time(row, "created_ms")?,
        updated: time(row, "updated_ms")?,
        started: time_optional(row, "started_ms")?,
        finished: time_optional(row, "finished_ms")?,
    })
}

pub(super) fn attempt(row: &AnyRow) -> Result<Attempt> {
    let workers: String = row.try_get("workers").map_err(db)?;
    Ok(Attempt {
        project: parsed(row, "project")?,
        job: parsed(row, "job")?,
        epoch: Epoch(unsigned(row, "epoch")?),
        cohort: attune_spec::id::CohortId(unsigned(row, "cohort")?),
        workers: serde_json::from_str(&workers).map_err(|e| Error::Corrupt(format!("column workers: {e}")))?,
        outcome: row.try_get("outcome").map_err(db)?,
        message: row.try_get("message").map_err(db)?,
        reported: unsigned(row, "reported")?,
        started: time(row, "started_ms")?,
        ended: time_optional(row, "ended_ms")?,
    })
}

pub(super) fn cohort(row: &AnyRow) -> Result<Cohort> {
    Ok(Cohort {
        cohort: attune_spec::id::CohortId(unsigned(row, "cohort")?),
        project: parsed(row, "project")?,
        core: json(row, "core")?,
        created: time(row, "created_ms")?,
        ended: time_optional(row, "ended_ms")?,
    })
}

pub(super) fn event(row: &AnyRow) -> Result<Event> {
    Ok(Event {
        seq: attune_spec::id::Seq(unsigned(row, "seq")?),
        event: NewEvent {
            project: parsed(row, "project")?,
            job: parsed_optional(row, "job")?,
            epoch: row
                .try_get::<Option<i64>, _>("epoch")
                .map_err(db)?
                .map(|epoch| u64::try_from(epoch).map(Epoch))
                .transpose()
                .map_err(|e| Error::Corrupt(format!("column epoch: {e}")))?,
            kind: row.try_get("kind").map_err(db)?,
            data: json(row, "data")?,
            time: time(row, "time_ms")?,
        },
    })
}

pub(super) fn point(row: &AnyRow) -> Result<Point> {
    Ok(Point {
        seq: attune_spec::id::Seq(unsigned(row, "seq")?),
        epoch: Epoch(unsigned(row, "epoch")?),
        point: NewPoint {
            name: row.try_get("name").map_err(db)?,
            step: attune_spec::id::Step(unsigned(row, "step")?),
            value: row.try_get::<Option<f64>, _>("value").map_err(db)?.unwrap_or(f64::NAN),
            tokens: attune_spec::id::Tokens(unsigned(row, "tokens")?),
            time: time(row, "time_ms")?,
        },
    })
}

pub(super) fn edge(row: &AnyRow, depth: u32) -> Result<Edge> {
    Ok(Edge {
        depth,
        artifact: parsed(row, "digest")?,
        role: row.try_get("role").map_err(db)?,
        cause: parsed(row, "cause")?,
    })
}

/// What names a job in every query.
pub(super) fn key(project: &Project, job: &JobId) -> (String, String) {
    (project.to_string(), job.to_string())
}

pub(super) fn digest_of(row: &AnyRow, column: &str) -> Result<Digest> {
    parsed(row, column)
}
