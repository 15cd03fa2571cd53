//! Whole lives of jobs, with a worker.

use std::collections::BTreeMap;

use attune_artifacts::Causes;
use attune_proto::error::Class;
use attune_proto::v1::attempt_report::Report;
use attune_proto::v1::connect_response::Message;
use attune_proto::v1::{self, FailureCause, JobReason, JobState};
use serde_json::json;

use crate::fixtures::{create, events, get, inputs, job, states, until};
use crate::server::Server;
use crate::worker::{Worker, attempt, running};

#[tokio::test]
async fn a_job_goes_from_queued_to_succeeded_and_leaves_its_result() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let id = made.job_id.as_str();

    let offer = worker.offer().await;
    let it = attempt(&offer);
    assert_eq!((it.job_id.as_str(), it.epoch, offer.rank, offer.device_count), (id, 1, 0, 1));
    let told = &offer.attempts[0];
    assert_eq!(told.spec, get(&client, id).await.unwrap().spec);
    let roles: Vec<&str> = told.inputs.iter().map(|input| input.role.as_str()).collect();
    assert_eq!(roles, ["base", "data.domains[0].source"]);
    assert!(told.inputs.iter().all(|input| input.digest == input.reference && told.checkpoint.is_empty()));
    let base = told.inputs[0].digest.clone();

    worker.begin(&it).await;
    let progress = v1::JobProgress { step: 5, total_steps: 10, tokens: 160, ..Default::default() };
    worker.report(&it, Report::Progress(progress)).await;
    let point = |name: &str, step, value| v1::MetricPoint { name: name.to_owned(), step, value, ..Default::default() };
    let points = vec![point("train/loss", 1, 2.0), point("train/loss", 2, f64::NAN), point("train/grad_norm", 2, 0.5)];
    worker.report(&it, Report::Metrics(v1::AttemptMetrics { points, dropped: 0 })).await;
    let note = v1::JobNote {
        severity: v1::Severity::Warning as i32,
        topic: "bad-rows-skipped".to_owned(),
        message: "3 rows were skipped".to_owned(),
        ..Default::default()
    };
    worker.report(&it, Report::Note(note.clone())).await;
    let running = get(&client, id).await.unwrap();
    assert_eq!((running.state(), running.worker_id.as_str()), (JobState::Running, "w-1"));
    assert_eq!(running.progress.unwrap().step, 5);

    let checkpoint = worker.checkpoint(&it, 5).await.unwrap();
    assert_eq!(get(&client, id).await.unwrap().checkpoint, checkpoint);
    let causes = Causes { inputs: BTreeMap::from([("base".to_owned(), base.parse().unwrap())]), ..Causes::default() };
    let digest = worker.output(&it, "adapter", causes).await.unwrap();
    // The same push again changes nothing: its answer may have been lost.
    let outputs = vec![v1::JobOutput { role: "adapter".to_owned(), digest: digest.clone() }];
    let succeeded = v1::AttemptSucceeded { outputs: outputs.clone() };
    worker.finish(&it, v1::attempt_finished::Outcome::Succeeded(succeeded)).await;
    worker.release(offer.cohort_id).await;

    let done = get(&client, id).await.unwrap();
    assert_eq!((done.state(), done.reason()), (JobState::Succeeded, JobReason::Finished));
    assert_eq!(done.outputs, outputs);
    assert!(done.start_time.is_some() && done.end_time.is_some() && done.failed_attempts == 0);
    let tagged = v1::GetArtifactRequest { project: String::new(), reference: "result".to_owned() };
    let artifact = client.artifacts().get_artifact(tagged).await.unwrap().into_inner().artifact.unwrap();
    assert_eq!(
        (artifact.digest.as_str(), artifact.tags.as_slice()),
        (digest.as_str(), &["result:latest".to_owned()][..])
    );
    let commit = artifact.commit.unwrap();
    assert_eq!((commit.job_id.as_str(), commit.epoch, commit.worker_id.as_str()), (id, 1, "w-1"));
    assert_eq!(commit.facts.unwrap().tokens, 320);

    // The whole log, and its second half.
    let all = events(&client, id, 0, usize::MAX).await;
    use JobState::{Queued, Running, Starting, Succeeded};
    assert_eq!(states(&all), [Queued, Starting, Running, Succeeded]);
    assert!(all.is_sorted_by(|a, b| a.sequence < b.sequence));
    use v1::job_event::Event as E;
    let has = |wanted: &dyn Fn(&E) -> bool| all.iter().filter(|event| wanted(event.event.as_ref().unwrap())).count();
    assert_eq!(has(&|event| matches!(event, E::CheckpointCommitted(c) if c.step == 5 && c.digest == checkpoint)), 1);
    assert_eq!(has(&|event| matches!(event, E::OutputCommitted(o) if *o == outputs[0])), 1);
    assert_eq!(has(&|event| matches!(event, E::Progress(p) if p.step == 5)), 1);
    assert_eq!(has(&|event| matches!(event, E::Note(n) if *n == note)), 1);
    let middle = all[all.len() / 2].sequence;
    let rest = events(&client, id, middle, usize::MAX).await;
    assert_eq!(rest, all[all.len() / 2 + 1..]);
    assert!(events(&client, id, all.last().unwrap().sequence, usize::MAX).await.is_empty());

    // Metrics: listed, filtered, streamed to the end.
    let list = v1::ListMetricsRequest { job_id: id.to_owned(), ..Default::default() };
    let listed = client.jobs().list_metrics(list).await.unwrap().into_inner().points;
    let shown: Vec<_> = listed.iter().map(|p| (p.sequence, p.name.as_str(), p.step, p.epoch)).collect();
    assert_eq!(shown, [(1, "train/loss", 1, 1), (2, "train/loss", 2, 1), (3, "train/grad_norm", 2, 1)]);
    assert!(listed[1].value.is_nan());
    let names = vec!["train/grad_norm".to_owned()];
    let stream = v1::StreamMetricsRequest { job_id: id.to_owned(), names, ..Default::default() };
    let mut stream = client.jobs().stream_metrics(stream).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().points.len(), 1);
    assert!(stream.message().await.unwrap().is_none());

    // Lineage, both ways.
    let up = v1::GetLineageRequest { reference: "result".to_owned(), ..Default::default() };
    let up = client.artifacts().get_lineage(up).await.unwrap().into_inner();
    assert_eq!((up.edges[0].input.as_str(), up.edges[0].role.as_str(), up.artifacts.len()), (base.as_str(), "base", 2));
    let direction = v1::LineageDirection::Descendants as i32;
    let down = v1::GetLineageRequest { reference: base, direction, ..Default::default() };
    let down = client.artifacts().get_lineage(down).await.unwrap().into_inner();
    assert_eq!(down.edges[0].output, digest);
}

#[tokio::test]
async fn a_watch_that_is_open_follows_the_job_to_its_end() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let watching = events(&client, &made.job_id, 0, usize::MAX);
    let working = async {
        let mut worker = Worker::connect(&client, "w-1").await;
        let offer = worker.offer().await;
        worker.begin(&attempt(&offer)).await;
        worker.succeed(&offer).await;
    };
    let (seen, ()) = tokio::join!(watching, working);
    assert_eq!(states(&seen).last(), Some(&JobState::Succeeded));
}

#[tokio::test]
async fn metrics_are_streamed_as_they_come() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let offer = worker.offer().await;
    let it = attempt(&offer);
    worker.begin(&it).await;
    let request = v1::StreamMetricsRequest { job_id: made.job_id, ..Default::default() };
    let mut stream = client.jobs().stream_metrics(request).await.unwrap().into_inner();
    for step in 1..=3 {
        let point = v1::MetricPoint { name: "train/loss".to_owned(), step, value: 1.0, ..Default::default() };
        worker.report(&it, Report::Metrics(v1::AttemptMetrics { points: vec![point], dropped: 0 })).await;
        let next = tokio::time::timeout(crate::server::LIMIT, stream.message()).await.expect("a point");
        assert_eq!(next.unwrap().unwrap().points[0].sequence, step);
    }
    worker.succeed(&offer).await;
    assert!(stream.message().await.unwrap().is_none());
}

#[tokio::test]
async fn a_running_job_is_cancelled_by_stopping_its_attempt() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let offer = worker.offer().await;
    let it = attempt(&offer);
    worker.begin(&it).await;
    let cancel = || v1::CancelJobRequest { project: String::new(), job_id: made.job_id.clone() };
    let stopping = client.jobs().cancel_job(cancel()).await.unwrap().into_inner().job.unwrap();
    assert_eq!((stopping.state(), stopping.stop_purpose()), (JobState::Stopping, v1::StopPurpose::Cancel));
    let stop = worker
        .expect(|message| match message {
            Message::StopAttempt(stop) => Some(stop.clone()),
            _ => None,
        })
        .await;
    assert_eq!((stop.purpose(), stop.attempt.as_ref()), (v1::StopPurpose::Cancel, Some(&it)));
    let stopped = v1::AttemptStopped { purpose: v1::StopPurpose::Cancel as i32, checkpoint: None };
    worker.finish(&it, v1::attempt_finished::Outcome::Stopped(stopped)).await;
    worker.release(offer.cohort_id).await;
    assert_eq!(get(&client, &made.job_id).await.unwrap().state(), JobState::Cancelled);
    // Again is once; other wishes come too late.
    let again = client.jobs().cancel_job(cancel()).await.unwrap().into_inner().job.unwrap();
    assert_eq!(again.state(), JobState::Cancelled);
    let pause = v1::PauseJobRequest { project: String::new(), job_id: made.job_id.clone() };
    assert_eq!(Class::of(&client.jobs().pause_job(pause).await.unwrap_err()), Class::IllegalState);
}

#[tokio::test]
async fn a_paused_job_goes_on_from_its_checkpoint() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let job_id = made.job_id.clone();
    let offer = worker.offer().await;
    let it = attempt(&offer);
    worker.begin(&it).await;
    let pause = v1::PauseJobRequest { project: String::new(), job_id: job_id.clone() };
    client.jobs().pause_job(pause).await.unwrap();
    let digest = worker.checkpoint(&it, 4).await.unwrap();
    let stopped = v1::AttemptStopped {
        purpose: v1::StopPurpose::Pause as i32,
        checkpoint: Some(v1::CheckpointCommitted { digest: digest.clone(), step: 4 }),
    };
    worker.finish(&it, v1::attempt_finished::Outcome::Stopped(stopped)).await;
    worker.release(offer.cohort_id).await;
    let paused = get(&client, &job_id).await.unwrap();
    assert_eq!((paused.state(), paused.reason()), (JobState::Paused, JobReason::PauseAsked));

    let resume = v1::ResumeJobRequest { project: String::new(), job_id: job_id.clone() };
    client.jobs().resume_job(resume).await.unwrap();
    let offer = worker.offer().await;
    assert_eq!(attempt(&offer).epoch, 2);
    assert_eq!((offer.attempts[0].checkpoint.as_str(), offer.attempts[0].checkpoint_step), (digest.as_str(), 4));
    worker.begin(&attempt(&offer)).await;
    worker.succeed(&offer).await;
    assert_eq!(get(&client, &job_id).await.unwrap().state(), JobState::Succeeded);
}

#[tokio::test]
async fn failed_attempts_are_tried_again_until_none_is_left() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    for epoch in 1..=2 {
        let offer = worker.offer().await;
        let it = attempt(&offer);
        assert_eq!(it.epoch, epoch);
        worker.begin(&it).await;
        worker.fail(&it, FailureCause::Hung, "no step for 600 s").await;
        worker.release(offer.cohort_id).await;
    }
    let failed = until(&client, &made.job_id, JobState::Failed).await;
    assert_eq!((failed.reason(), failed.failed_attempts), (JobReason::AttemptsExhausted, 2));
    assert_eq!(failed.message, "no attempts are left; the last failed: no step for 600 s");
    let failure = failed.failure.unwrap();
    assert_eq!((failure.cause(), failure.message.as_str()), (FailureCause::Hung, "no step for 600 s"));
    let seen = events(&client, &made.job_id, 0, usize::MAX).await;
    assert!(states(&seen).contains(&JobState::Backoff));

    // Tried again by a person: another job, pinned to the same inputs, once per request.
    let retry =
        || v1::RetryJobRequest { project: String::new(), job_id: made.job_id.clone(), request_id: "again".to_owned() };
    let second = client.jobs().retry_job(retry()).await.unwrap().into_inner().job.unwrap();
    assert!(second.job_id != made.job_id && second.spec == made.spec);
    let same = client.jobs().retry_job(retry()).await.unwrap().into_inner().job.unwrap();
    assert_eq!(same.job_id, second.job_id);
    assert_eq!(get(&client, &made.job_id).await.unwrap().state(), JobState::Failed);
}

#[tokio::test]
async fn a_fault_of_the_data_is_not_tried_again() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let it = attempt(&worker.offer().await);
    let failure = v1::Failure {
        cause: FailureCause::DataFault as i32,
        message: "2 rows cannot be used".to_owned(),
        last_log_lines: vec!["reading".to_owned()],
        faults: vec![v1::FieldFault { path: "data.domains[0]".to_owned(), message: "line 3 is no JSON".to_owned() }],
        ..Default::default()
    };
    worker.finish(&it, v1::attempt_finished::Outcome::Failed(failure.clone())).await;
    let failed = get(&client, &made.job_id).await.unwrap();
    assert_eq!((failed.state(), failed.failure), (JobState::Failed, Some(failure)));
}

#[tokio::test]
async fn a_result_that_was_never_committed_is_no_success() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let it = attempt(&worker.offer().await);
    worker.begin(&it).await;
    let digest = format!("blake3:{}", "ab".repeat(32));
    let outputs = vec![v1::JobOutput { role: "adapter".to_owned(), digest }];
    let succeeded = v1::attempt_finished::Outcome::Succeeded(v1::AttemptSucceeded { outputs });
    worker.finish(&it, succeeded).await;
    let now = get(&client, &made.job_id).await.unwrap();
    assert_eq!(now.failed_attempts, 1);
    assert!(now.failure.unwrap().message.contains("never committed"));
}

#[tokio::test]
async fn jobs_wait_for_those_they_come_after() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let first = create(&client, "r1", &job()).await.unwrap();
    let mut spec = job();
    spec["after"] = json!([first.job_id]);
    let second = create(&client, "r2", &spec).await.unwrap();
    assert_eq!((second.state(), second.reason()), (JobState::Waiting, JobReason::DependencyPending));
    let mut worker = Worker::connect(&client, "w-1").await;
    let offer = worker.offer().await;
    assert_eq!(attempt(&offer).job_id, first.job_id);
    worker.begin(&attempt(&offer)).await;
    worker.succeed(&offer).await;
    let offer = worker.offer().await;
    assert_eq!(attempt(&offer).job_id, second.job_id);
    // A job after one that was cancelled fails with it, and one that comes later fails at once.
    let cancel = v1::CancelJobRequest { project: String::new(), job_id: second.job_id.clone() };
    client.jobs().cancel_job(cancel).await.unwrap();
    let stopped = v1::AttemptStopped::default();
    worker.finish(&attempt(&offer), v1::attempt_finished::Outcome::Stopped(stopped)).await;
    spec["after"] = json!([second.job_id]);
    let third = create(&client, "r3", &spec).await.unwrap();
    assert_eq!((third.state(), third.reason()), (JobState::Failed, JobReason::DependencyFailed));
}

#[tokio::test]
async fn old_checkpoints_go_when_new_ones_come() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut spec = job();
    spec["tune"]["checkpoint"] = json!({"every_steps": 1, "keep": 2});
    let mut worker = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &spec).await.unwrap();
    let offer = worker.offer().await;
    let it = attempt(&offer);
    worker.begin(&it).await;
    let mut digests = Vec::new();
    for step in 1..=4 {
        digests.push(worker.checkpoint(&it, step).await.unwrap());
        worker.beat(&[running(&offer)]).await;
    }
    let request = v1::ListArtifactsRequest {
        kinds: vec![v1::ArtifactKind::Checkpoint as i32],
        job_id: made.job_id.clone(),
        ..Default::default()
    };
    let mut kept = Vec::new();
    for _ in 0..200 {
        let listed = client.artifacts().list_artifacts(request.clone()).await.unwrap().into_inner().artifacts;
        kept = listed.into_iter().map(|artifact| artifact.digest).collect();
        if kept.len() == 2 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
    }
    assert_eq!(kept, [digests[3].clone(), digests[2].clone()]);
    // Their bytes are gone too, and the newest is whole.
    let gone = format!("state of {} after 1", made.job_id);
    let there = format!("state of {} after 4", made.job_id);
    let digests = [&gone, &there].map(|text| attune_artifacts::hash::bytes(text.as_bytes()));
    for _ in 0..200 {
        if client.missing(&digests).await.unwrap() == digests[..1] {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
    }
    panic!("the bytes of an old checkpoint stay: {:?}", client.missing(&digests).await);
}
