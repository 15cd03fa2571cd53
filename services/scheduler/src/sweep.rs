//! Bytes that nothing refers to any more, checkpoints that a job needs no more, and events of jobs that ended long ago.
//!
//! Rows go first, in a transaction; bytes follow, behind a gate that keeps pushes from making them visible again
//! meanwhile. A scheduler that dies in between leaves bytes that nobody sees.

use std::sync::Arc;

use attune_artifacts::Kind;
use attune_scheduler_core::JobKey;
use attune_spec::id::{Digest, Project};
use attune_spec::job::JobSpec;
use attune_store::UtcMs;
use attune_store::artifact::{Artifact, Filter};
use tokio::sync::mpsc;

use crate::clock::Clock;
use crate::config::Timings;
use crate::context::Context;
use crate::log;
use crate::rows::JobDocument;

/// Checkpoints, blobs or events that are looked at once.
const ROWS: u32 = 1000;
/// Blobs that are deleted at once.
const DELETED_AT_ONCE: usize = 16;
/// Events that are kept of every job, however old: how it ended.
const EVENTS_KEPT: u32 = 8;

/// Deletes the manifests of artifacts whose rows are gone, and blobs that were theirs alone. What cannot be deleted now
/// stays, unseen.
pub(crate) async fn bytes(context: &Context, project: &Project, artifacts: &[Digest], blobs: &[Digest]) {
    // Pushes that have looked at their blobs are through, and those that have not will miss what is deleted here.
    let _alone = context.sweep.write().await;
    // Pushes to another scheduler do not wait at this gate.
    if let Err(error) = context.store.may_write().await {
        tracing::warn!(%error, "what nobody sees was not deleted");
        return;
    }
    for digest in artifacts {
        let is_gone =
            matches!(context.store.artifact(project, *digest).await, Err(attune_store::Error::NotFound { .. }));
        if is_gone && let Err(error) = context.blobs.delete_manifest(project, digest).await {
            tracing::warn!(%error, %digest, "a manifest that nobody sees was not deleted");
        }
    }
    for some in blobs.chunks(DELETED_AT_ONCE) {
        if let Err(error) = delete(context, project, some).await {
            tracing::warn!(%error, "blobs that nothing refers to were not deleted");
            return;
        }
    }
}

/// Deletes those of some blobs that nothing refers to. Whoever leads by now is asked about each few of them anew: deleting many
/// takes its time, in which another scheduler may have taken over, whose pushes do not wait here.
async fn delete(context: &Context, project: &Project, blobs: &[Digest]) -> attune_store::Result<()> {
    context.store.may_write().await?;
    let unreferenced = context.store.unreferenced(project, blobs).await?;
    let deleted = unreferenced.iter().map(|digest| async move {
        if let Err(error) = context.blobs.delete_blob(project, digest).await {
            tracing::warn!(%error, %digest, "a blob that nothing refers to was not deleted");
        }
    });
    futures::future::join_all(deleted).await;
    Ok(())
}

/// Deletes old checkpoints of jobs that have made new ones, or have ended, until nobody sends any more.
pub(crate) async fn checkpoints(context: Arc<Context>, mut jobs: mpsc::Receiver<JobKey>) {
    while let Some(key) = jobs.recv().await {
        if let Err(error) = prune(&context, &key).await {
            tracing::warn!(%error, %key, "old checkpoints were not deleted");
        }
    }
}

/// Looks now and then for what nobody needs any more: blobs of pushes that did not end, events of jobs that ended long ago.
pub(crate) async fn keep_house(context: Arc<Context>, timings: Timings) {
    loop {
        tokio::time::sleep(timings.housekeeping).await;
        if let Err(error) = tidy(&context, &timings).await {
            tracing::warn!(%error, "housekeeping was cut short");
        }
    }
}

async fn tidy(context: &Context, timings: &Timings) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let ago = |time: std::time::Duration| {
        UtcMs(Clock::utc().0.saturating_sub(i64::try_from(time.as_millis()).unwrap_or(i64::MAX)))
    };
    for project in context.store.projects().await? {
        // A push may find a blob that an older one left, and then relies on it: it looks once more behind the gate, and sends what is
        // gone.
        let old = context.blobs.blobs_since(&project, ago(timings.orphan_grace).0).await?;
        let old: Vec<Digest> = old.into_iter().map(|blob| blob.digest).collect();
        for some in old.chunks(ROWS as usize) {
            let orphans = context.store.unreferenced(&project, some).await?;
            if !orphans.is_empty() {
                tracing::info!(%project, count = orphans.len(), "deleting blobs that nothing refers to");
                bytes(context, &project, &[], &orphans).await;
            }
        }
        let Some(kept) = timings.events_kept else { continue };
        while context.store.forget_events(&project, ago(kept), EVENTS_KEPT, ROWS).await? == u64::from(ROWS) {
            // Others write in between.
            tokio::task::yield_now().await;
        }
    }
    match context.blobs.abort_unfinished(ago(timings.orphan_grace).0).await {
        Ok(0) => {}
        Ok(aborted) => tracing::info!(aborted, "unfinished uploads were removed"),
        // Whoever owns the bucket may not allow it; the rest is done all the same.
        Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "unfinished uploads were not removed"),
    }
    if let Some(kept) = timings.audit_kept {
        while context.store.forget_audit(ago(kept), ROWS).await? == u64::from(ROWS) {
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}

async fn prune(context: &Context, key: &JobKey) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let row = context.store.job(&key.project, &key.job).await?;
    let spec: JobSpec = serde_json::from_value(row.resolved.clone())?;
    let document = JobDocument::read(&row.core)?;
    // A job that has ended is not gone on with.
    let older = document.older.filter(|_| row.finished.is_none());
    let needed: Vec<Digest> = [document.checkpoint, older].into_iter().flatten().map(|of| of.digest).collect();
    let filter = Filter { kinds: vec![Kind::Checkpoint.to_string()], job: Some(key.job.clone()), ..Filter::default() };
    let made = context.store.artifacts(&key.project, &filter, None, ROWS).await?.items;
    let old = old(&made, key, spec.tune.checkpoint.keep, &needed);
    if old.is_empty() {
        return Ok(());
    }
    let pruned = context.store.prune_checkpoints(&key.project, &key.job, &old, Clock::utc()).await?;
    bytes(context, &key.project, &pruned.artifacts, &pruned.orphans).await;
    Ok(())
}

/// The checkpoints of a job beyond those with the `keep` highest steps; never those that the next attempt may go on
/// from.
fn old(made: &[Artifact], key: &JobKey, keep: u32, needed: &[Digest]) -> Vec<Digest> {
    let step = |artifact: &Artifact| {
        let own = artifact.commits.iter().filter(|commit| commit.maker.job == key.job);
        own.map(|commit| log::number(&commit.maker.record, "checkpoint_step")).max()
    };
    let mut by_step: Vec<_> = made.iter().map(|artifact| (step(artifact), artifact.digest)).collect();
    by_step.sort_unstable();
    let kept = by_step.len().saturating_sub(keep.max(1) as usize);
    by_step.into_iter().take(kept).map(|(_, digest)| digest).filter(|digest| !needed.contains(digest)).collect()
}
