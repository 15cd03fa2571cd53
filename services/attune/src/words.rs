//! Messages of the server as JSON for programs and as short text for people.

use attune_proto::convert::time::{span, unix_ms};
use attune_proto::v1::{self, job_event::Event};
use attune_proto::words::{Word, state_words};
use serde_json::{Value, json};

/// The word of an enum value; empty for one that nobody set.
pub(crate) fn word<T: Word + TryFrom<i32>>(value: i32) -> String {
    if value == 0 { String::new() } else { T::try_from(value).map(Word::word).unwrap_or_default() }
}

/// The word of a state, with the purpose of a stop.
pub(crate) fn state(state: i32, purpose: i32) -> String {
    let word = v1::JobState::try_from(state).ok().and_then(state_words).map_or("unknown", |words| words.attune);
    match word_or_none::<v1::StopPurpose>(purpose) {
        Some(purpose) => format!("{word} ({purpose})"),
        None => word.to_owned(),
    }
}

fn word_or_none<T: Word + TryFrom<i32>>(value: i32) -> Option<String> {
    Some(word::<T>(value)).filter(|word| !word.is_empty())
}

/// A time as people and programs write it; nothing for one that is not set.
pub(crate) fn time(time: Option<&prost_types::Timestamp>) -> Option<String> {
    let ms = unix_ms(time?);
    let stamp = jiff::Timestamp::from_millisecond(i64::try_from(ms).ok()?).ok()?;
    Some(format!("{stamp:.0}"))
}

/// A digest cut to what people compare.
pub(crate) fn short(digest: &str) -> &str {
    digest.get(..19).unwrap_or(digest)
}

/// A number of bytes in a unit that fits.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = count as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    let digits = if unit == 0 || size >= 100.0 { 0 } else { 1 };
    format!("{size:.digits$} {}", UNITS[unit])
}

/// A span of time to the second.
pub(crate) fn seconds(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} min"),
    }
}

/// A job.
pub(crate) fn job(job: &v1::Job) -> Value {
    json!({
        "id": job.job_id,
        "project": job.project,
        "name": job.spec.as_ref().map(|spec| &spec.name),
        "kind": job.spec.as_ref().map(|spec| word::<v1::JobKind>(spec.kind)),
        "parent": Some(&job.parent_job_id).filter(|parent| !parent.is_empty()),
        "stage": Some(&job.stage).filter(|stage| !stage.is_empty()),
        "stages": job.stages.iter().map(stage).collect::<Vec<_>>(),
        "state": word::<v1::JobState>(job.state),
        "stop_purpose": word_or_none::<v1::StopPurpose>(job.stop_purpose),
        "reason": word::<v1::JobReason>(job.reason),
        "message": job.message,
        "epoch": job.epoch,
        "failed_attempts": job.failed_attempts,
        "progress": job.progress.as_ref().map(progress),
        "outputs": job.outputs.iter().map(output).collect::<Vec<_>>(),
        "failure": job.failure.as_ref().map(failure),
        "checkpoint": Some(&job.checkpoint).filter(|digest| !digest.is_empty()),
        "worker": Some(&job.worker_id).filter(|worker| !worker.is_empty()),
        "labels": job.spec.as_ref().map(|spec| spec.labels.clone().into_iter().collect::<std::collections::BTreeMap<_, _>>()),
        "sequence": job.sequence,
        "created": time(job.create_time.as_ref()),
        "started": time(job.start_time.as_ref()),
        "updated": time(job.update_time.as_ref()),
        "ended": time(job.end_time.as_ref()),
        "retry_at": time(job.retry_time.as_ref()),
    })
}

/// A stage of a job.
fn stage(stage: &v1::JobStage) -> Value {
    json!({
        "name": stage.name,
        "job": Some(&stage.job_id).filter(|job| !job.is_empty()),
        "state": word_or_none::<v1::JobState>(stage.state),
        "after": stage.after,
    })
}

/// A stage of a job in a line.
pub(crate) fn stage_line(stage: &v1::JobStage) -> String {
    let v1::JobStage { name, job_id, after, .. } = stage;
    if job_id.is_empty() {
        let after = if after.is_empty() { String::new() } else { format!(" after {}", after.join(", ")) };
        format!("{name} planned{after}")
    } else {
        format!("{name} {}: {job_id}", state(stage.state, 0))
    }
}

/// How far a job is.
pub(crate) fn progress(progress: &v1::JobProgress) -> Value {
    json!({
        "step": progress.step,
        "total_steps": progress.total_steps,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens_per_second,
        "eta_seconds": span(progress.eta.as_ref()).map(|eta| eta.as_secs_f64()),
    })
}

/// A result of a job.
pub(crate) fn output(output: &v1::JobOutput) -> Value {
    json!({"role": output.role, "digest": output.digest})
}

/// Why an attempt failed.
pub(crate) fn failure(failure: &v1::Failure) -> Value {
    let fault = |fault: &v1::FieldFault| json!({"path": fault.path, "message": fault.message});
    json!({
        "cause": word::<v1::FailureCause>(failure.cause),
        "message": failure.message,
        "signal": failure.signal,
        "exit_code": failure.exit_code,
        "last_log_lines": failure.last_log_lines,
        "faults": failure.faults.iter().map(fault).collect::<Vec<_>>(),
    })
}

/// An event of a job.
pub(crate) fn event(event: &v1::JobEvent) -> Value {
    let (kind, what) = match &event.event {
        Some(Event::StateChange(change)) => (
            "state",
            json!({
                "from": word_or_none::<v1::JobState>(change.from),
                "to": word::<v1::JobState>(change.to),
                "stop_purpose": word_or_none::<v1::StopPurpose>(change.stop_purpose),
                "reason": word::<v1::JobReason>(change.reason),
                "message": change.message,
                "worker": Some(&change.worker_id).filter(|worker| !worker.is_empty()),
            }),
        ),
        Some(Event::Progress(found)) => ("progress", progress(found)),
        Some(Event::CheckpointCommitted(found)) => ("checkpoint", json!({"digest": found.digest, "step": found.step})),
        Some(Event::OutputCommitted(found)) => ("output", output(found)),
        Some(Event::AttemptFailed(found)) => ("attempt_failed", failure(found)),
        Some(Event::Note(note)) => (
            "note",
            json!({
                "severity": word::<v1::Severity>(note.severity),
                "topic": note.topic,
                "message": note.message,
                "step": note.step,
            }),
        ),
        Some(Event::StageChange(change)) => {
            ("stage", json!({"name": change.stage, "job": change.job_id, "state": word::<v1::JobState>(change.state)}))
        }
        None => ("unknown", Value::Null),
    };
    json!({
        "sequence": event.sequence,
        "job": event.job_id,
        "epoch": event.epoch,
        "time": time(event.time.as_ref()),
        "event": kind,
        kind: what,
    })
}

/// An event in a line for people; nothing for progress, which comes too often.
pub(crate) fn event_line(event: &v1::JobEvent) -> Option<String> {
    let at = time(event.time.as_ref()).unwrap_or_default();
    let text = match event.event.as_ref()? {
        Event::StateChange(change) => {
            let mut text = state(change.to, change.stop_purpose);
            let reason = word::<v1::JobReason>(change.reason);
            let told = if change.message.is_empty() { reason.replace('_', " ") } else { change.message.clone() };
            if !told.is_empty() {
                text.push_str(&format!(": {told}"));
            }
            text
        }
        Event::Progress(_) => return None,
        Event::CheckpointCommitted(found) => format!("checkpoint at step {}: {}", found.step, short(&found.digest)),
        Event::OutputCommitted(found) => format!("{}: {}", found.role, found.digest),
        Event::AttemptFailed(found) => format!("attempt {} failed: {}", event.epoch, failure_line(found)),
        Event::Note(note) => format!("{}: {}", note.topic, note.message),
        Event::StageChange(change) => format!("stage {} {}: {}", change.stage, state(change.state, 0), change.job_id),
    };
    Some(format!("{at}  {text}"))
}

/// A failure in a line.
pub(crate) fn failure_line(failure: &v1::Failure) -> String {
    let cause = word::<v1::FailureCause>(failure.cause).replace('_', " ");
    if failure.message.is_empty() { cause } else { format!("{} ({cause})", failure.message) }
}

/// A metric point.
pub(crate) fn metric(point: &v1::MetricPoint) -> Value {
    json!({
        "name": point.name,
        "step": point.step,
        "tokens": point.tokens,
        // JSON knows no infinities; they are written as text.
        "value": if point.value.is_finite() { json!(point.value) } else { json!(point.value.to_string()) },
        "epoch": point.epoch,
        "time": time(point.time.as_ref()),
        "sequence": point.sequence,
    })
}

/// An artifact.
pub(crate) fn artifact(artifact: &v1::Artifact) -> Value {
    let file =
        |file: &v1::ArtifactFile| json!({"path": file.path, "size_bytes": file.size_bytes, "digest": file.digest});
    let causes = |causes: &v1::ArtifactCauses| {
        json!({
            "inputs": causes.inputs.clone().into_iter().collect::<std::collections::BTreeMap<_, _>>(),
            "plan": causes.plan,
            "code_version": causes.code_version,
            "kernel_profile": causes.kernel_profile,
            "logical_shards": causes.logical_shards,
        })
    };
    let facts = |facts: &v1::RunFacts| {
        json!({
            "step": facts.step,
            "tokens": facts.tokens,
            "tokens_per_second": facts.tokens_per_second,
            "peak_memory_bytes": facts.peak_memory_bytes,
            "started": time(facts.start_time.as_ref()),
            "finished": time(facts.finish_time.as_ref()),
        })
    };
    let commit = |commit: &v1::CommitRecord| {
        json!({
            "job": commit.job_id,
            "epoch": commit.epoch,
            "worker": commit.worker_id,
            "time": time(commit.commit_time.as_ref()),
            "facts": commit.facts.as_ref().map(facts),
        })
    };
    json!({
        "digest": artifact.digest,
        "project": artifact.project,
        "kind": word::<v1::ArtifactKind>(artifact.kind),
        "tags": artifact.tags,
        "size_bytes": artifact.size_bytes,
        "file_count": artifact.file_count,
        "files": artifact.files.iter().map(file).collect::<Vec<_>>(),
        "causes": artifact.causes.as_ref().map(causes),
        "commit": artifact.commit.as_ref().map(commit),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!([bytes(0), bytes(1023), bytes(1536), bytes(200 << 20)], ["0 B", "1023 B", "1.5 KiB", "200 MiB"]);
        assert_eq!([seconds(9), seconds(75), seconds(7300)], ["9 s", "1 min 15 s", "2 h 01 min"]);
    }

    #[test]
    fn an_event_is_told_in_one_line_and_in_one_object() {
        let change = v1::StateChange {
            from: v1::JobState::Running as i32,
            to: v1::JobState::Stopping as i32,
            stop_purpose: v1::StopPurpose::Pause as i32,
            reason: v1::JobReason::PauseAsked as i32,
            ..Default::default()
        };
        let told = v1::JobEvent { sequence: 4, event: Some(Event::StateChange(change)), ..Default::default() };
        assert_eq!(event_line(&told).unwrap().trim(), "stopping (pause): pause asked");
        let value = event(&told);
        assert_eq!((&value["event"], &value["state"]["from"]), (&json!("state"), &json!("running")));
    }
}
