//! Entries of the event log: how they are written down, and how watchers get them.
//!
//! Kinds that watchers of a job are told: `job.created`, `job.state`, `job.progress`, `job.checkpoint`, `job.output`,
//! `job.attempt_failed`, `job.note`, `job.stage`. Others (`artifact.committed`, `tag.moved`, `job.dependency_met`, …) are for the record.

use attune_proto::convert::structure::{from_struct, to_struct};
use attune_proto::convert::time::{duration, span, timestamp, unix_ms};
use attune_proto::v1;
use attune_proto::words::Word;
use attune_scheduler_core as core;
use attune_spec::FieldPath;
use attune_spec::id::{Digest, JobId, Step, WorkerId};
use attune_store::UtcMs;
use attune_store::event::Event;
use serde_json::{Value, json};

use crate::rows;

/// The kind of the event that the store appends when it takes a job in.
const CREATED: &str = "job.created";
/// The kind of a change of state.
pub(crate) const STATE: &str = "job.state";
/// The kind of a report of progress.
pub(crate) const PROGRESS: &str = "job.progress";
/// The kind of a committed checkpoint.
pub(crate) const CHECKPOINT: &str = "job.checkpoint";
/// The kind of a committed result.
pub(crate) const OUTPUT: &str = "job.output";
/// The kind of a failed attempt.
pub(crate) const ATTEMPT_FAILED: &str = "job.attempt_failed";
/// The kind of something that was said.
pub(crate) const NOTE: &str = "job.note";
/// The kind of a stage that was made or has succeeded.
pub(crate) const STAGE: &str = "job.stage";
/// The kind of a dependency that has succeeded while others have not.
pub(crate) const DEPENDENCY_MET: &str = "job.dependency_met";

/// A calendar time as a message.
pub(crate) fn time(time: UtcMs) -> prost_types::Timestamp {
    timestamp(u64::try_from(time.0).unwrap_or(0))
}

/// A change of state, written down.
pub(crate) fn state_change(
    from: core::State,
    to: core::State,
    reason: core::Reason,
    message: &str,
    worker: Option<&WorkerId>,
) -> Value {
    let (state, stop) = rows::state(to);
    json!({
        "from": rows::state(from).0.as_str(),
        "to": state.as_str(),
        "stop": stop.map(attune_store::job::Stop::as_str),
        "reason": reason.code(),
        "message": message,
        "worker": worker.map(WorkerId::as_str),
    })
}

/// A stage of a job, written down.
pub(crate) fn stage(stage: &str, job: &JobId, state: core::State) -> Value {
    json!({"stage": stage, "job": job, "state": rows::state(state).0.as_str()})
}

fn read_stage(data: &Value) -> v1::StageChange {
    let state = word::<v1::JobState>(data, "state").map_or(0, |state| state as i32);
    v1::StageChange { stage: text(data, "stage"), job_id: text(data, "job"), state }
}

/// A committed checkpoint, written down.
pub(crate) fn checkpoint(digest: Digest, step: Step) -> Value {
    json!({"digest": digest, "step": step})
}

/// A result, written down.
pub(crate) fn output(role: &str, digest: &str) -> Value {
    json!({"role": role, "digest": digest})
}

/// A result as a message.
pub(crate) fn read_output(data: &Value) -> v1::JobOutput {
    v1::JobOutput { role: text(data, "role"), digest: text(data, "digest") }
}

/// A failure, written down.
pub(crate) fn failure(failure: &v1::Failure) -> Value {
    let faults = failure.faults.iter().map(|fault| json!({"path": fault.path, "message": fault.message}));
    json!({
        "cause": failure.cause().word(),
        "message": failure.message,
        "signal": failure.signal,
        "exit_code": failure.exit_code,
        "log": failure.last_log_lines,
        "faults": faults.collect::<Vec<_>>(),
    })
}

/// A failure as a message.
pub(crate) fn read_failure(data: &Value) -> v1::Failure {
    let list = |name: &str| data.get(name).and_then(Value::as_array).into_iter().flatten();
    let small = |name: &str| data.get(name).and_then(Value::as_i64).and_then(|n| i32::try_from(n).ok());
    v1::Failure {
        cause: word::<v1::FailureCause>(data, "cause").map_or(0, |cause| cause as i32),
        message: text(data, "message"),
        signal: small("signal"),
        exit_code: small("exit_code"),
        last_log_lines: list("log").filter_map(Value::as_str).map(str::to_owned).collect(),
        faults: list("faults")
            .map(|fault| v1::FieldFault { path: text(fault, "path"), message: text(fault, "message") })
            .collect(),
    }
}

/// The core's cause of a failure that a worker reports; what it does not know, or is not a worker's to say of what it has run, is
/// a defect of ours.
pub(crate) fn cause(failure: &v1::Failure) -> core::Cause {
    let word = failure.cause().word();
    let number = match failure.cause() {
        v1::FailureCause::ChildKilled => failure.signal,
        v1::FailureCause::ChildExited => failure.exit_code,
        v1::FailureCause::OfferLost | v1::FailureCause::OfferRefused => return core::Cause::Internal,
        _ => return word.parse().unwrap_or(core::Cause::Internal),
    };
    format!("{word}({})", number.unwrap_or_default()).parse().unwrap_or(core::Cause::Internal)
}

/// The failure that the scheduler itself found.
pub(crate) fn failure_of(cause: core::Cause) -> v1::Failure {
    let (signal, exit_code) = match cause {
        core::Cause::ChildKilled { signal } => (Some(signal), None),
        core::Cause::ChildExited { code } => (None, Some(code)),
        _ => (None, None),
    };
    let known = v1::FailureCause::from_word(cause.code()).unwrap_or(v1::FailureCause::Internal);
    v1::Failure { cause: known as i32, message: cause.words(), signal, exit_code, ..v1::Failure::default() }
}

/// Progress, written down; `now` stands for a time that was not said.
pub(crate) fn progress(progress: &v1::JobProgress, now: UtcMs) -> Value {
    let eta = span(progress.eta.as_ref()).map(|eta| u64::try_from(eta.as_millis()).unwrap_or(u64::MAX));
    let updated = progress.update_time.as_ref().map_or_else(|| u64::try_from(now.0).unwrap_or(0), unix_ms);
    json!({
        "step": progress.step,
        "total_steps": progress.total_steps,
        "tokens": progress.tokens,
        "eta_ms": eta,
        "tokens_per_second": progress.tokens_per_second,
        "updated_ms": updated,
    })
}

/// Progress as a message.
pub(crate) fn read_progress(data: &Value) -> v1::JobProgress {
    let eta = data.get("eta_ms").and_then(Value::as_u64);
    v1::JobProgress {
        step: number(data, "step"),
        total_steps: number(data, "total_steps"),
        tokens: number(data, "tokens"),
        eta: eta.map(|eta| duration(std::time::Duration::from_millis(eta))),
        tokens_per_second: data.get("tokens_per_second").and_then(Value::as_f64).unwrap_or_default(),
        update_time: Some(timestamp(number(data, "updated_ms"))),
    }
}

/// Something said, written down. Values that JSON cannot hold are left out.
pub(crate) fn note(note: &v1::JobNote) -> Value {
    let fields = note.fields.as_ref().and_then(|fields| from_struct(fields, &FieldPath::root()).ok());
    json!({
        "severity": note.severity().word(),
        "topic": note.topic,
        "message": note.message,
        "step": note.step,
        "fields": fields,
    })
}

fn read_note(data: &Value) -> v1::JobNote {
    let fields = data.get("fields").and_then(Value::as_object);
    v1::JobNote {
        severity: word::<v1::Severity>(data, "severity").map_or(0, |severity| severity as i32),
        topic: text(data, "topic"),
        message: text(data, "message"),
        step: number(data, "step"),
        fields: fields.and_then(|fields| to_struct(fields, &FieldPath::root()).ok()),
    }
}

/// The reason's word of a stored reason, which may have its cause behind it.
pub(crate) fn reason(stored: &str) -> v1::JobReason {
    let code = stored.split('(').next().unwrap_or_default();
    v1::JobReason::from_word(code).unwrap_or(v1::JobReason::Unspecified)
}

fn read_state_change(data: &Value, to: &str) -> v1::StateChange {
    v1::StateChange {
        from: word::<v1::JobState>(data, "from").map_or(0, |state| state as i32),
        to: word::<v1::JobState>(data, to).map_or(0, |state| state as i32),
        stop_purpose: word::<v1::StopPurpose>(data, "stop").map_or(0, |stop| stop as i32),
        reason: reason(&text(data, "reason")) as i32,
        message: text(data, "message"),
        worker_id: text(data, "worker"),
    }
}

/// The event as watchers get it; nothing for events that they are not told.
pub(crate) fn to_message(event: &Event) -> Option<v1::JobEvent> {
    use v1::job_event::Event as E;
    let data = &event.event.data;
    let what = match event.event.kind.as_str() {
        CREATED => E::StateChange(read_state_change(data, "state")),
        STATE => E::StateChange(read_state_change(data, "to")),
        PROGRESS => E::Progress(read_progress(data)),
        CHECKPOINT => {
            E::CheckpointCommitted(v1::CheckpointCommitted { digest: text(data, "digest"), step: number(data, "step") })
        }
        OUTPUT => E::OutputCommitted(read_output(data)),
        ATTEMPT_FAILED => E::AttemptFailed(read_failure(data)),
        NOTE => E::Note(read_note(data)),
        STAGE => E::StageChange(read_stage(data)),
        _ => return None,
    };
    Some(v1::JobEvent {
        sequence: event.seq.0,
        project: event.event.project.to_string(),
        job_id: event.event.job.as_ref().map(ToString::to_string).unwrap_or_default(),
        epoch: event.event.epoch.unwrap_or_default().0,
        time: Some(time(event.event.time)),
        event: Some(what),
    })
}

/// Whether a job is final after this event.
pub(crate) fn is_final(event: &v1::JobEvent) -> bool {
    match &event.event {
        Some(v1::job_event::Event::StateChange(change)) => {
            attune_proto::words::state_words(change.to()).is_some_and(|words| words.is_final)
        }
        _ => false,
    }
}

pub(crate) fn text(data: &Value, name: &str) -> String {
    data.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}

pub(crate) fn number(data: &Value, name: &str) -> u64 {
    data.get(name).and_then(Value::as_u64).unwrap_or_default()
}

fn word<T: Word>(data: &Value, name: &str) -> Option<T> {
    data.get(name).and_then(Value::as_str).and_then(T::from_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_come_back_as_they_were_and_name_the_cores_cause() {
        let given = v1::Failure {
            cause: v1::FailureCause::ChildKilled as i32,
            message: "killed".to_owned(),
            signal: Some(9),
            exit_code: None,
            last_log_lines: vec!["a".to_owned(), "b".to_owned()],
            faults: vec![v1::FieldFault { path: "data".to_owned(), message: "is empty".to_owned() }],
        };
        assert_eq!(read_failure(&failure(&given)), given);
        assert_eq!(cause(&given), core::Cause::ChildKilled { signal: 9 });
        assert_eq!(cause(&v1::Failure::default()), core::Cause::Internal);
        let own = failure_of(core::Cause::WorkerLost);
        assert_eq!((own.cause(), cause(&own)), (v1::FailureCause::WorkerLost, core::Cause::WorkerLost));
        // These cost a job nothing, so nobody says them of an attempt that it has run.
        for free in [core::Cause::OfferLost, core::Cause::OfferRefused] {
            assert_eq!(cause(&failure_of(free)), core::Cause::Internal);
        }
    }

    #[test]
    fn every_cause_and_reason_has_a_word_in_the_contract() {
        for cause in ["hung", "corrupt", "time_limit", "no_gradient", "offer_refused", "internal"] {
            let parsed: core::Cause = cause.parse().unwrap();
            assert_eq!(failure_of(parsed).cause().word(), cause);
        }
        for stored in ["submitted", "failure(hung)", "attempts_exhausted(child_killed(9))", "finished"] {
            assert_ne!(reason(stored), v1::JobReason::Unspecified, "{stored}");
        }
    }

    #[test]
    fn progress_comes_back_as_it_was() {
        let given = v1::JobProgress {
            step: 3,
            total_steps: 10,
            tokens: 4096,
            eta: Some(duration(std::time::Duration::from_millis(1500))),
            tokens_per_second: 12.5,
            update_time: Some(timestamp(1_700_000_000_123)),
        };
        assert_eq!(read_progress(&progress(&given, UtcMs(0))), given);
    }
}
