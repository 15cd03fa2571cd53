//! Stored rows as the messages that clients get.

use std::time::Duration;

use attune_artifacts::{Manifest, manifest};
use attune_proto::convert::id::{artifact_name, job_name};
use attune_proto::convert::job::to_message;
use attune_proto::convert::time::timestamp;
use attune_proto::v1;
use attune_proto::words::Word;
use attune_scheduler_core::{Attempt, Backoff, JobKey};
use attune_spec::job::JobSpec;
use attune_store::artifact::Artifact;
use attune_store::job::{Job, State, Stop};
use attune_store::metric::Point;
use serde_json::{Value, json};

use crate::error::Error;
use crate::{ledger, log, rows};

/// A job.
pub(crate) fn job(row: &Job, backoff: &Backoff) -> Result<v1::Job, Error> {
    let unreadable = |what: String| Error::Restore(format!("job {}: {what}", row.job));
    let spec: JobSpec = serde_json::from_value(row.resolved.clone()).map_err(|error| unreadable(error.to_string()))?;
    let spec = to_message(&spec).map_err(|faults| unreadable(format!("{faults:?}")))?;
    let document = rows::JobDocument::read(&row.core)?;
    let output = |output: ledger::Output| v1::JobOutput { role: output.role, digest: output.digest.to_string() };
    let retry_time = (row.state == State::Backoff).then(|| {
        let attempt = Attempt { key: JobKey::new(row.project.clone(), row.job.clone()), epoch: row.epoch };
        let wait = backoff.wait(&attempt, document.n_failed());
        timestamp(u64::try_from(row.updated.0).unwrap_or(0).saturating_add(millis(wait)))
    });
    Ok(v1::Job {
        resource_name: job_name(&row.project, &row.job),
        project: row.project.to_string(),
        job_id: row.job.to_string(),
        spec: Some(spec),
        state: state(row.state) as i32,
        stop_purpose: row.stop.map_or(v1::StopPurpose::Unspecified, purpose) as i32,
        reason: log::reason(&row.reason) as i32,
        message: row.message.clone(),
        epoch: row.epoch.0,
        failed_attempts: document.failed_attempts,
        progress: row.progress.as_ref().map(log::read_progress),
        outputs: ledger::outputs(&row.outputs).into_iter().map(output).collect(),
        failure: row.failure.as_ref().map(log::read_failure),
        checkpoint: document.checkpoint.map(|checkpoint| checkpoint.digest.to_string()).unwrap_or_default(),
        worker_id: document.workers.first().map(ToString::to_string).unwrap_or_default(),
        sequence: row.last_event.0,
        create_time: Some(log::time(row.created)),
        start_time: row.started.map(log::time),
        update_time: Some(log::time(row.updated)),
        end_time: row.finished.map(log::time),
        retry_time,
        parent_job_id: row.stage.as_ref().map(|stage| stage.parent.to_string()).unwrap_or_default(),
        stage: row.stage.as_ref().map(|stage| stage.name.to_string()).unwrap_or_default(),
        stages: Vec::new(),
    })
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// The store's state in the contract's words.
pub(crate) fn state(state: State) -> v1::JobState {
    v1::JobState::from_word(state.as_str()).unwrap_or(v1::JobState::Unspecified)
}

fn purpose(stop: Stop) -> v1::StopPurpose {
    v1::StopPurpose::from_word(stop.as_str()).unwrap_or(v1::StopPurpose::Unspecified)
}

/// A metric point.
pub(crate) fn point(stored: Point) -> v1::MetricPoint {
    let Point { seq, epoch, point } = stored;
    v1::MetricPoint {
        sequence: seq.0,
        name: point.name,
        step: point.step.0,
        tokens: point.tokens.0,
        value: point.value,
        epoch: epoch.0,
        time: Some(log::time(point.time)),
    }
}

/// The facts of a commit, written down beside the artifact.
pub(crate) fn record(commit: &v1::AttemptCommit) -> Value {
    use v1::attempt_commit::Commit;
    let facts = commit.facts.as_ref().map(|facts| {
        let time = |time: Option<&prost_types::Timestamp>| time.map(attune_proto::convert::time::unix_ms);
        json!({
            "start_ms": time(facts.start_time.as_ref()),
            "finish_ms": time(facts.finish_time.as_ref()),
            "step": facts.step,
            "tokens": facts.tokens,
            "tokens_per_second": facts.tokens_per_second,
            "peak_memory_bytes": facts.peak_memory_bytes,
        })
    });
    let (step, role) = match &commit.commit {
        Some(Commit::CheckpointStep(step)) => (Some(*step), None),
        Some(Commit::OutputRole(role)) => (None, Some(role.as_str())),
        None => (None, None),
    };
    json!({"worker": commit.worker_id, "checkpoint_step": step, "output_role": role, "facts": facts})
}

fn read_record(commit: &attune_store::artifact::Commit) -> v1::CommitRecord {
    let record = &commit.maker.record;
    let facts = record.get("facts").filter(|facts| facts.is_object()).map(|facts| {
        let time = |name: &str| facts.get(name).and_then(Value::as_u64).map(timestamp);
        v1::RunFacts {
            start_time: time("start_ms"),
            finish_time: time("finish_ms"),
            step: log::number(facts, "step"),
            tokens: log::number(facts, "tokens"),
            tokens_per_second: facts.get("tokens_per_second").and_then(Value::as_f64).unwrap_or_default(),
            peak_memory_bytes: log::number(facts, "peak_memory_bytes"),
        }
    });
    v1::CommitRecord {
        job_id: commit.maker.job.to_string(),
        epoch: commit.maker.epoch.0,
        worker_id: log::text(record, "worker"),
        commit_time: Some(log::time(commit.time)),
        facts,
    }
}

/// An artifact as lists have it: without files and causes.
pub(crate) fn artifact(row: &Artifact) -> v1::Artifact {
    let pushed = || v1::CommitRecord { commit_time: Some(log::time(row.created)), ..v1::CommitRecord::default() };
    v1::Artifact {
        resource_name: artifact_name(&row.project, &row.digest),
        project: row.project.to_string(),
        digest: row.digest.to_string(),
        kind: v1::ArtifactKind::from_word(&row.kind).unwrap_or(v1::ArtifactKind::Unspecified) as i32,
        files: Vec::new(),
        file_count: u32::try_from(row.n_files).unwrap_or(u32::MAX),
        size_bytes: row.size_bytes,
        causes: None,
        tags: row.tags.iter().map(ToString::to_string).collect(),
        commit: Some(row.commits.first().map_or_else(pushed, read_record)),
    }
}

/// An artifact with its files and causes.
pub(crate) fn whole_artifact(row: &Artifact, manifest: &Manifest) -> v1::Artifact {
    let file = |file: &manifest::File| v1::ArtifactFile {
        path: file.path.clone(),
        size_bytes: file.size_bytes,
        digest: file.digest.to_string(),
    };
    let causes = manifest.causes();
    v1::Artifact {
        files: manifest.files().iter().map(file).collect(),
        causes: Some(v1::ArtifactCauses {
            inputs: causes.inputs.iter().map(|(role, digest)| (role.clone(), digest.to_string())).collect(),
            plan: causes.plan.map(|plan| plan.to_string()).unwrap_or_default(),
            code_version: causes.code_version.clone().unwrap_or_default(),
            kernel_profile: causes.kernel_profile.clone().unwrap_or_default(),
            logical_shards: causes.logical_shards.unwrap_or_default(),
        }),
        ..artifact(row)
    }
}
