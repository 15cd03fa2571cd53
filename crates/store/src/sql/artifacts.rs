//! Artifacts: made visible under an epoch, found by digest, tag or lineage, deleted only when nothing needs them.

use std::collections::BTreeSet;

use attune_spec::id::{Digest, Epoch, JobId, Project, Tag};
use serde_json::json;
use sqlx::{AnyConnection, Row as _};

use super::jobs::{PAGE_ROWS, bad_token};
use super::query::Query;
use super::{Store, apply, audit, row};
use crate::artifact::{Artifact, Commit, Deleted, Direction, File, Filter, Lineage, Maker, NewArtifact};
use crate::audit::Record;
use crate::change::{Applied, Write};
use crate::error::{Error, Result, db};
use crate::event::NewEvent;
use crate::job::{Order, Page};
use crate::time::UtcMs;

/// An artifact's row with the number of its files.
macro_rules! select_artifacts {
    ($rest:literal) => {
        concat!(
            "SELECT artifacts.*, (SELECT COUNT(*) FROM artifact_files f WHERE f.project = artifacts.project \
             AND f.digest = artifacts.digest) AS n_files FROM artifacts WHERE ",
            $rest
        )
    };
}

/// Edges that one lineage answer holds at most.
const LINEAGE_EDGES: usize = 10_000;

impl Store {
    /// Makes an artifact visible; see [`Write::Artifact`]. Repeating it changes nothing but the tags it moves.
    ///
    /// # Errors
    /// [`Error::StaleEpoch`] when the attempt that made it was replaced or its job has ended.
    pub async fn commit_artifact(&self, artifact: NewArtifact) -> Result<Applied> {
        self.apply(&[Write::Artifact(Box::new(artifact))]).await
    }

    /// One artifact.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn artifact(&self, project: &Project, digest: Digest) -> Result<Artifact> {
        let mut connection = self.readers.acquire().await.map_err(db)?;
        let found = sqlx::query(select_artifacts!("project = $1 AND digest = $2"))
            .bind(project.as_str())
            .bind(digest.to_string())
            .fetch_optional(&mut *connection)
            .await
            .map_err(db)?
            .ok_or_else(|| Error::not_found("artifact", digest, project))?;
        whole(&mut connection, &found).await
    }

    /// The files of an artifact, by path.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Corrupt`].
    pub async fn artifact_files(&self, project: &Project, digest: Digest) -> Result<Vec<File>> {
        sqlx::query("SELECT * FROM artifact_files WHERE project = $1 AND digest = $2 ORDER BY path")
            .bind(project.as_str())
            .bind(digest.to_string())
            .fetch_all(&self.readers)
            .await
            .map_err(db)?
            .iter()
            .map(|found| {
                Ok(File {
                    path: found.try_get("path").map_err(db)?,
                    blob: row::digest_of(found, "blob")?,
                    size_bytes: row::unsigned(found, "size_bytes")?,
                })
            })
            .collect()
    }

    /// Artifacts of a project, in the filter's order, at most `rows` of them (and at most 1000).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a page token that no earlier page gave out.
    pub async fn artifacts(
        &self,
        project: &Project,
        filter: &Filter,
        page: Option<&str>,
        rows: u32,
    ) -> Result<Page<Artifact>> {
        let (rows, newest) = (rows.clamp(1, PAGE_ROWS), filter.order == Order::Newest);
        let mut query = Query::new(select_artifacts!("project = "));
        query.push_bind(project.as_str());
        if let Some(token) = page {
            let (time, digest) = token.split_once('.').ok_or_else(|| bad_token(token))?;
            let time: i64 = time.parse().map_err(|_| bad_token(token))?;
            let digest: Digest = format!("blake3:{digest}").parse().map_err(|_| bad_token(token))?;
            query.push(" AND (created_ms, digest) ").push(if newest { "<" } else { ">" });
            query.push(" (").push_bind(time).push(", ");
            query.push_bind(digest.to_string()).push(")");
        }
        for (kinds, is_in) in [(&filter.kinds, " AND kind IN ("), (&filter.without_kinds, " AND kind NOT IN (")] {
            if !kinds.is_empty() {
                query.push(is_in).push_list(kinds.iter().map(String::as_str)).push(")");
            }
        }
        if let Some(job) = &filter.job {
            query.push(
                " AND EXISTS (SELECT 1 FROM artifact_commits c WHERE c.project = artifacts.project \
                 AND c.digest = artifacts.digest AND c.job = ",
            );
            query.push_bind(job.as_str()).push(")");
        }
        if let Some(name) = &filter.tag_name {
            // Tag names hold none of LIKE's wildcards except `_`; the prefix is compared literally instead.
            query.push(
                " AND EXISTS (SELECT 1 FROM tags t WHERE t.project = artifacts.project \
                 AND t.digest = artifacts.digest AND substr(t.tag, 1, CAST(",
            );
            let prefix = format!("{name}:");
            query.push_bind(i64::try_from(prefix.chars().count()).unwrap_or(i64::MAX)).push(" AS INTEGER)) = ");
            query.push_bind(prefix).push(")");
        }
        query.push(if newest {
            " ORDER BY created_ms DESC, digest DESC LIMIT "
        } else {
            " ORDER BY created_ms, digest LIMIT "
        });
        query.push_bind(i64::from(rows) + 1);
        let mut connection = self.readers.acquire().await.map_err(db)?;
        let found = query.build()?.fetch_all(&mut *connection).await.map_err(db)?;
        let more = found.len() > rows as usize;
        let mut items = Vec::with_capacity(found.len());
        for found in found.iter().take(rows as usize) {
            items.push(whole(&mut connection, found).await?);
        }
        let next = items.last().filter(|_| more).map(|last| format!("{}.{}", last.created.0, last.digest.hex()));
        Ok(Page { items, next })
    }

    /// The artifact that a tag names.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn resolve_tag(&self, project: &Project, tag: &Tag) -> Result<Digest> {
        sqlx::query("SELECT digest FROM tags WHERE project = $1 AND tag = $2")
            .bind(project.as_str())
            .bind(tag.to_string())
            .fetch_optional(&self.readers)
            .await
            .map_err(db)?
            .ok_or_else(|| Error::not_found("tag", tag, project))
            .and_then(|found| row::digest_of(&found, "digest"))
    }

    /// All tags of a project with what they name, sorted.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Corrupt`].
    pub async fn tags(&self, project: &Project) -> Result<Vec<(Tag, Digest)>> {
        sqlx::query("SELECT tag, digest FROM tags WHERE project = $1 ORDER BY tag")
            .bind(project.as_str())
            .fetch_all(&self.readers)
            .await
            .map_err(db)?
            .iter()
            .map(|found| Ok((row::parsed(found, "tag")?, row::digest_of(found, "digest")?)))
            .collect()
    }

    /// Removes a tag, and appends `tag.removed`; with the record of the call that asked for it.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn untag(&self, project: &Project, tag: &Tag, now: UtcMs, record: Option<&Record>) -> Result<Applied> {
        let mut transaction = self.begin().await?;
        let mut applied = Applied::default();
        let mut removed = remove_tag(&mut transaction, project, tag, now, &mut applied).await;
        if removed.is_ok() {
            removed = audit::append_some(&mut transaction, record).await;
        }
        transaction.end(removed).await?;
        Ok(applied)
    }

    /// Edges up to `depth` steps from an artifact, nearest first. An answer holds at most 10,000 edges.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the artifact does not exist.
    pub async fn lineage(&self, project: &Project, of: Digest, direction: Direction, depth: u32) -> Result<Lineage> {
        let mut view = self.view().await?;
        exists(&mut view, project, of).await?;
        let sql = match direction {
            Direction::Causes => "SELECT * FROM lineage WHERE project = $1 AND digest = $2 ORDER BY role, cause",
            Direction::Effects => "SELECT * FROM lineage WHERE project = $1 AND cause = $2 ORDER BY digest, role",
        };
        let (mut seen, mut frontier, mut edges) = (BTreeSet::from([of]), vec![of], Vec::new());
        for level in 1..=depth {
            let mut next = Vec::new();
            for node in &frontier {
                let rows = sqlx::query(sql)
                    .bind(project.as_str())
                    .bind(node.to_string())
                    .fetch_all(&mut *view)
                    .await
                    .map_err(db)?;
                for found in &rows {
                    let edge = row::edge(found, level)?;
                    let other = if direction == Direction::Causes { edge.cause } else { edge.artifact };
                    if seen.insert(other) {
                        next.push(other);
                    }
                    edges.push(edge);
                    if edges.len() == LINEAGE_EDGES {
                        return Ok(Lineage { edges, is_cut: true });
                    }
                }
            }
            frontier = next;
        }
        let mut is_cut = false;
        for node in &frontier {
            let beyond = sqlx::query(sql).bind(project.as_str()).bind(node.to_string()).fetch_optional(&mut *view);
            is_cut |= beyond.await.map_err(db)?.is_some();
        }
        Ok(Lineage { edges, is_cut })
    }

    /// Deletes an artifact's row, and appends `artifact.deleted`. With `force` also when tags name it (they go too) or
    /// something visible was made from it (that keeps saying so). The record of the call that asked for it goes with it.
    ///
    /// # Errors
    /// [`Error::InUse`] while an unfinished job uses it or made it, or while a tag names it or a visible artifact was
    /// made from it and `force` is off; [`Error::NotFound`].
    pub async fn delete_artifact(
        &self,
        project: &Project,
        digest: Digest,
        force: bool,
        now: UtcMs,
        record: Option<&Record>,
    ) -> Result<(Deleted, Applied)> {
        let mut transaction = self.begin().await?;
        let mut deleted = delete(&mut transaction, project, digest, force, now).await;
        if deleted.is_ok()
            && let Err(error) = audit::append_some(&mut transaction, record).await
        {
            deleted = Err(error);
        }
        transaction.end(deleted).await
    }
}

/// Deletes the row of an artifact, with its files, edges and commits.
pub(super) async fn remove(connection: &mut AnyConnection, project: &Project, digest: Digest) -> Result<()> {
    sqlx::query("DELETE FROM artifacts WHERE project = $1 AND digest = $2")
        .bind(project.as_str())
        .bind(digest.to_string())
        .execute(connection)
        .await
        .map_err(db)?;
    Ok(())
}

async fn delete(
    connection: &mut AnyConnection,
    project: &Project,
    digest: Digest,
    force: bool,
    now: UtcMs,
) -> Result<(Deleted, Applied)> {
    exists(connection, project, digest).await?;
    if let Some(job) = user(connection, project, digest).await? {
        return Err(Error::InUse(format!("artifact {digest} is used by job {job:?}, which has not ended")));
    }
    let tags = tags_of(connection, project, digest).await?;
    if !force && !tags.is_empty() {
        let names: Vec<String> = tags.iter().map(ToString::to_string).collect();
        return Err(Error::InUse(format!("artifact {digest} is tagged {}; untag it first", names.join(", "))));
    }
    if let Some(effect) = effect_of(connection, project, digest).await?.filter(|_| !force) {
        return Err(Error::InUse(format!("artifact {effect} was made from {digest}; delete that one first")));
    }
    let mut applied = Applied::default();
    for tag in &tags {
        remove_tag(connection, project, tag, now, &mut applied).await?;
    }
    let blobs = blobs_of(connection, project, digest).await?;
    remove(connection, project, digest).await?;
    let mut orphans = Vec::new();
    for blob in blobs {
        if !is_referenced(connection, project, blob).await? {
            orphans.push(blob);
        }
    }
    let event = event(project, None, None, "artifact.deleted", json!({"digest": digest.to_string()}), now);
    applied.events.push(apply::append(connection, &event).await?);
    Ok((Deleted { orphans, tags }, applied))
}

pub(super) fn event(
    project: &Project,
    job: Option<&JobId>,
    epoch: Option<Epoch>,
    kind: &str,
    data: serde_json::Value,
    now: UtcMs,
) -> NewEvent {
    NewEvent { project: project.clone(), job: job.cloned(), epoch, kind: kind.to_owned(), data, time: now }
}

/// [`Write::Artifact`].
pub(super) async fn commit(
    connection: &mut AnyConnection,
    artifact: &NewArtifact,
    applied: &mut Applied,
) -> Result<()> {
    let (project, digest) = (&artifact.project, artifact.digest);
    if let Some(maker) = &artifact.maker {
        apply::check_epoch(connection, project, &maker.job, maker.epoch).await?;
    }
    let mut is_news = insert(connection, artifact).await?;
    if let Some(maker) = &artifact.maker {
        is_news |= insert_commit(connection, artifact, maker).await?;
    }
    let job = artifact.maker.as_ref().map(|maker| &maker.job);
    if is_news {
        let data = json!({
            "digest": digest.to_string(), "kind": artifact.kind, "size_bytes": artifact.size_bytes,
            "files": artifact.files.len(),
        });
        let epoch = artifact.maker.as_ref().map(|maker| maker.epoch);
        let event = event(project, job, epoch, "artifact.committed", data, artifact.now);
        applied.events.push(apply::append(connection, &event).await?);
    }
    for tag in &artifact.tags {
        move_tag(connection, project, tag, digest, job, artifact.now, applied).await?;
    }
    Ok(())
}

/// Stores the artifact, its files and edges unless it is there; whether it was not.
async fn insert(connection: &mut AnyConnection, artifact: &NewArtifact) -> Result<bool> {
    let (project, digest) = (artifact.project.as_str(), artifact.digest.to_string());
    let done = sqlx::query(
        "INSERT INTO artifacts (project, digest, kind, size_bytes, created_ms) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT DO NOTHING",
    )
    .bind(project)
    .bind(&digest)
    .bind(&artifact.kind)
    .bind(row::signed(artifact.size_bytes)?)
    .bind(artifact.now.0)
    .execute(&mut *connection)
    .await
    .map_err(db)?;
    if done.rows_affected() == 0 {
        return Ok(false);
    }
    for file in &artifact.files {
        sqlx::query("INSERT INTO artifact_files (project, digest, path, blob, size_bytes) VALUES ($1, $2, $3, $4, $5)")
            .bind(project)
            .bind(&digest)
            .bind(&file.path)
            .bind(file.blob.to_string())
            .bind(row::signed(file.size_bytes)?)
            .execute(&mut *connection)
            .await
            .map_err(db)?;
    }
    for cause in &artifact.causes {
        sqlx::query(
            "INSERT INTO lineage (project, digest, role, cause) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
        )
        .bind(project)
        .bind(&digest)
        .bind(&cause.role)
        .bind(cause.digest.to_string())
        .execute(&mut *connection)
        .await
        .map_err(db)?;
    }
    Ok(true)
}

/// Stores that an attempt made it; whether that is new.
async fn insert_commit(connection: &mut AnyConnection, artifact: &NewArtifact, maker: &Maker) -> Result<bool> {
    let done = sqlx::query(
        "INSERT INTO artifact_commits (project, digest, job, epoch, record, created_ms) VALUES ($1, $2, $3, $4, $5, $6) \
         ON CONFLICT DO NOTHING",
    )
    .bind(artifact.project.as_str())
    .bind(artifact.digest.to_string())
    .bind(maker.job.as_str())
    .bind(row::signed(maker.epoch.0)?)
    .bind(maker.record.to_string())
    .bind(artifact.now.0)
    .execute(connection)
    .await
    .map_err(db)?;
    Ok(done.rows_affected() > 0)
}

/// Refuses to go on unless the tag names `expected` now.
pub(super) async fn check_tag(
    connection: &mut AnyConnection,
    project: &Project,
    tag: &Tag,
    expected: Digest,
) -> Result<()> {
    match named_by(connection, project, tag).await? {
        Some(now) if now == expected => Ok(()),
        Some(now) => Err(Error::Conflict(format!("tag {tag} names {now}, not {expected} as expected"))),
        None => Err(Error::Conflict(format!("tag {tag} names nothing, not {expected} as expected"))),
    }
}

async fn named_by(connection: &mut AnyConnection, project: &Project, tag: &Tag) -> Result<Option<Digest>> {
    sqlx::query("SELECT digest FROM tags WHERE project = $1 AND tag = $2")
        .bind(project.as_str())
        .bind(tag.to_string())
        .fetch_optional(connection)
        .await
        .map_err(db)?
        .map(|found| row::digest_of(&found, "digest"))
        .transpose()
}

/// [`Write::Tag`].
pub(super) async fn move_tag(
    connection: &mut AnyConnection,
    project: &Project,
    tag: &Tag,
    digest: Digest,
    job: Option<&JobId>,
    now: UtcMs,
    applied: &mut Applied,
) -> Result<()> {
    exists(connection, project, digest).await?;
    let from = named_by(connection, project, tag).await?;
    if from == Some(digest) {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO tags (project, tag, digest, job, moved_ms) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT (project, tag) DO UPDATE SET digest = excluded.digest, job = excluded.job, \
         moved_ms = excluded.moved_ms",
    )
    .bind(project.as_str())
    .bind(tag.to_string())
    .bind(digest.to_string())
    .bind(job.map(JobId::as_str))
    .bind(now.0)
    .execute(&mut *connection)
    .await
    .map_err(db)?;
    let data = json!({
        "tag": tag.to_string(), "digest": digest.to_string(), "from": from.map(|digest| digest.to_string()),
    });
    applied.events.push(apply::append(connection, &event(project, job, None, "tag.moved", data, now)).await?);
    Ok(())
}

async fn remove_tag(
    connection: &mut AnyConnection,
    project: &Project,
    tag: &Tag,
    now: UtcMs,
    applied: &mut Applied,
) -> Result<()> {
    let from = sqlx::query("DELETE FROM tags WHERE project = $1 AND tag = $2 RETURNING digest")
        .bind(project.as_str())
        .bind(tag.to_string())
        .fetch_optional(&mut *connection)
        .await
        .map_err(db)?
        .ok_or_else(|| Error::not_found("tag", tag, project))
        .and_then(|found| row::digest_of(&found, "digest"))?;
    let data = json!({"tag": tag.to_string(), "from": from.to_string()});
    applied.events.push(apply::append(connection, &event(project, None, None, "tag.removed", data, now)).await?);
    Ok(())
}

async fn exists(connection: &mut AnyConnection, project: &Project, digest: Digest) -> Result<()> {
    sqlx::query("SELECT 1 FROM artifacts WHERE project = $1 AND digest = $2")
        .bind(project.as_str())
        .bind(digest.to_string())
        .fetch_optional(connection)
        .await
        .map_err(db)?
        .map(|_| ())
        .ok_or_else(|| Error::not_found("artifact", digest, project))
}

/// An unfinished job that uses the artifact as an input, or that made it (a checkpoint to resume from).
async fn user(connection: &mut AnyConnection, project: &Project, digest: Digest) -> Result<Option<String>> {
    sqlx::query(
        "SELECT j.job FROM jobs j WHERE j.project = $1 AND j.finished_ms IS NULL AND ( \
         EXISTS (SELECT 1 FROM job_inputs i WHERE i.project = $1 AND i.job = j.job AND i.digest = $2) OR \
         EXISTS (SELECT 1 FROM artifact_commits c WHERE c.project = $1 AND c.job = j.job AND c.digest = $2)) \
         ORDER BY j.job LIMIT 1",
    )
    .bind(project.as_str())
    .bind(digest.to_string())
    .fetch_optional(connection)
    .await
    .map_err(db)?
    .map(|found| found.try_get("job").map_err(db))
    .transpose()
}

/// A visible artifact that was made from this one.
async fn effect_of(connection: &mut AnyConnection, project: &Project, digest: Digest) -> Result<Option<Digest>> {
    sqlx::query("SELECT digest FROM lineage WHERE project = $1 AND cause = $2 ORDER BY digest LIMIT 1")
        .bind(project.as_str())
        .bind(digest.to_string())
        .fetch_optional(connection)
        .await
        .map_err(db)?
        .map(|found| row::digest_of(&found, "digest"))
        .transpose()
}

async fn tags_of(connection: &mut AnyConnection, project: &Project, digest: Digest) -> Result<Vec<Tag>> {
    sqlx::query("SELECT tag FROM tags WHERE project = $1 AND digest = $2 ORDER BY tag")
        .bind(project.as_str())
        .bind(digest.to_string())
        .fetch_all(connection)
        .await
        .map_err(db)?
        .iter()
        .map(|found| row::parsed(found, "tag"))
        .collect()
}

pub(super) async fn blobs_of(connection: &mut AnyConnection, project: &Project, digest: Digest) -> Result<Vec<Digest>> {
    sqlx::query("SELECT DISTINCT blob FROM artifact_files WHERE project = $1 AND digest = $2 ORDER BY blob")
        .bind(project.as_str())
        .bind(digest.to_string())
        .fetch_all(connection)
        .await
        .map_err(db)?
        .iter()
        .map(|found| row::digest_of(found, "blob"))
        .collect()
}

pub(super) async fn is_referenced(connection: &mut AnyConnection, project: &Project, blob: Digest) -> Result<bool> {
    let found = sqlx::query("SELECT 1 FROM artifact_files WHERE project = $1 AND blob = $2 LIMIT 1")
        .bind(project.as_str())
        .bind(blob.to_string())
        .fetch_optional(connection)
        .await
        .map_err(db)?;
    Ok(found.is_some())
}

async fn whole(connection: &mut AnyConnection, found: &sqlx::any::AnyRow) -> Result<Artifact> {
    let (project, digest): (Project, Digest) = (row::parsed(found, "project")?, row::digest_of(found, "digest")?);
    let commits = sqlx::query(
        "SELECT * FROM artifact_commits WHERE project = $1 AND digest = $2 ORDER BY created_ms, job, epoch",
    )
    .bind(project.as_str())
    .bind(digest.to_string())
    .fetch_all(&mut *connection)
    .await
    .map_err(db)?
    .iter()
    .map(|row| {
        let maker = Maker {
            job: row::parsed(row, "job")?,
            epoch: Epoch(row::unsigned(row, "epoch")?),
            record: row::json(row, "record")?,
        };
        Ok(Commit { maker, time: row::time(row, "created_ms")? })
    })
    .collect::<Result<_>>()?;
    Ok(Artifact {
        kind: found.try_get("kind").map_err(db)?,
        size_bytes: row::unsigned(found, "size_bytes")?,
        created: row::time(found, "created_ms")?,
        n_files: row::unsigned(found, "n_files")?,
        tags: tags_of(connection, &project, digest).await?,
        commits,
        project,
        digest,
    })
}
