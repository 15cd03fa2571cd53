//! A database that cannot be written, at the worst moments (`--features failpoints`).

use attune_proto::error::Class;
use attune_proto::v1::connect_request::Message as Said;
use attune_proto::v1::connect_response::Message;
use attune_proto::v1::{self, JobState};

use crate::fixtures::{create, events, get, inputs, job, states, until};
use crate::server::Server;
use crate::worker::{Worker, attempt, register, running};

#[tokio::test]
async fn what_is_not_stored_did_not_happen() {
    let scenario = fail::FailScenario::setup();
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    fail::cfg("scheduler::before_transaction", "1*return").unwrap();
    let refused = create(&client, "r1", &job()).await.unwrap_err();
    assert_eq!(Class::of(&refused), Class::Unavailable);
    let list = client.jobs().list_jobs(v1::ListJobsRequest::default()).await.unwrap().into_inner();
    assert!(list.jobs.is_empty());
    let made = create(&client, "r1", &job()).await.unwrap();
    assert_eq!(get(&client, &made.job_id).await.unwrap().state(), JobState::Queued);
    scenario.teardown();
}

#[tokio::test]
async fn what_is_stored_happened_also_when_nobody_was_told() {
    let scenario = fail::FailScenario::setup();
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    fail::cfg("scheduler::after_transaction", "1*return").unwrap();
    let refused = create(&client, "r1", &job()).await.unwrap_err();
    assert_eq!(Class::of(&refused), Class::Unavailable);
    // The caller asks again, as it may, and there is one job.
    let made = create(&client, "r1", &job()).await.unwrap();
    let list = client.jobs().list_jobs(v1::ListJobsRequest::default()).await.unwrap().into_inner();
    assert_eq!(list.jobs.iter().map(|job| &job.job_id).collect::<Vec<_>>(), [&made.job_id]);

    // A grant that was stored while the answer was lost: the worker comes back, and the job is its own.
    fail::cfg("scheduler::after_transaction", "1*return").unwrap();
    let worker = Worker::open(&client, register("w-1")).await;
    let granted = until(&client, &made.job_id, JobState::Starting).await;
    assert_eq!(granted.epoch, 1);
    drop(worker);
    // It never heard of the cohort, so the attempt is given up and granted anew.
    let mut worker = Worker::connect(&client, "w-1").await;
    let offer = worker.offer().await;
    assert_eq!(attempt(&offer).epoch, 2);
    worker.begin(&attempt(&offer)).await;
    worker.succeed(&offer).await;
    let seen = events(&client, &made.job_id, 0, usize::MAX).await;
    assert_eq!(states(&seen).last(), Some(&JobState::Succeeded));
    scenario.teardown();
}

#[tokio::test]
async fn a_running_job_survives_a_scheduler_that_starts_anew_within() {
    let scenario = fail::FailScenario::setup();
    let server = Server::start();
    let client = server.client_of_one_try().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let offer = worker.offer().await;
    worker.begin(&attempt(&offer)).await;
    // Its checkpoint cannot be committed now: it is not visible, and the worker is asked to register again.
    fail::cfg("scheduler::before_transaction", "1*return").unwrap();
    let refused = worker.checkpoint(&attempt(&offer), 3).await.unwrap_err();
    assert_eq!(Class::of(&refused), Class::Unavailable);
    assert_eq!(get(&client, &made.job_id).await.unwrap().checkpoint, "");
    let with = v1::Register { running: vec![running(&offer)], ..register("w-1") };
    let (again, registered) = Worker::connect_with(&client, with).await;
    let mut worker = again.go_on(&worker);
    assert_eq!(registered.cohort_ids, [offer.cohort_id]);
    let digest = worker.checkpoint(&attempt(&offer), 3).await.unwrap();
    assert_eq!(get(&client, &made.job_id).await.unwrap().checkpoint, digest);
    worker.succeed(&offer).await;
    assert_eq!(get(&client, &made.job_id).await.unwrap().state(), JobState::Succeeded);
    scenario.teardown();
}

#[tokio::test]
async fn a_sign_of_life_is_answered_before_reports_are_stored() {
    let scenario = fail::FailScenario::setup();
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    create(&client, "r1", &job()).await.unwrap();
    let offer = worker.offer().await;
    let attempt = attempt(&offer);
    worker.begin(&attempt).await;
    fail::cfg("scheduler::before_writes", "sleep(50)").unwrap();
    let mut number = 0;
    for step in 1..=N_REPORTS {
        let told = v1::JobProgress { step, total_steps: N_REPORTS, ..Default::default() };
        let report = Some(v1::attempt_report::Report::Progress(told));
        let sequence = worker.next_number(&attempt);
        number = sequence;
        let said = v1::AttemptReport { attempt: Some(attempt.clone()), sequence, report };
        worker.say(Said::AttemptReport(said)).await;
    }
    worker.beat(&[running(&offer)]).await;
    let last = |message: &Message| matches!(message, Message::ReportAck(ack) if ack.sequence == number);
    assert!(!worker.has_heard(last), "it was answered behind all reports");
    // They are stored all the same, in order.
    worker.expect(|message| last(message).then_some(())).await;
    worker.succeed(&offer).await;
    let seen = events(&client, &attempt.job_id, 0, usize::MAX).await;
    let steps = seen.iter().filter_map(|event| match &event.event {
        Some(v1::job_event::Event::Progress(told)) => Some(told.step),
        _ => None,
    });
    assert!(steps.eq(1..=N_REPORTS), "{seen:?}");
    scenario.teardown();
}

/// Reports that take seconds to store.
const N_REPORTS: u64 = 40;

#[tokio::test]
async fn bytes_without_a_row_are_not_seen() {
    let scenario = fail::FailScenario::setup();
    let server = Server::start();
    let client = server.client_of_one_try().await;
    fail::cfg("scheduler::before_artifact_row", "1*return").unwrap();
    let made = crate::fixtures::bundle(attune_artifacts::Kind::Report, &[("a", b"1")], Default::default());
    crate::fixtures::push(&client, &made, None, &["t"]).await.unwrap_err();
    let list = client.artifacts().list_artifacts(v1::ListArtifactsRequest::default()).await.unwrap().into_inner();
    assert!(list.artifacts.is_empty());
    assert!(crate::fixtures::push(&client, &made, None, &["t"]).await.unwrap().created);
    scenario.teardown();
}

/// The record of a change and the change are stored together, or neither is.
#[tokio::test]
async fn no_change_without_its_record_and_no_record_without_its_change() {
    let scenario = fail::FailScenario::setup();
    let server = Server::guarded(|_| {});
    let admin = server.admin().await;
    let records = async || -> Vec<(String, String, String)> {
        let asked = v1::ListAuditRecordsRequest { order_by: v1::AuditOrder::SequenceAsc as i32, ..Default::default() };
        let list = admin.audit().list_audit_records(asked).await.unwrap().into_inner().records;
        list.into_iter().map(|record| (record.rpc, record.target, record.outcome)).collect()
    };
    let record = |rpc: &str, target: &str, outcome: &str| (rpc.to_owned(), target.to_owned(), outcome.to_owned());
    let set = || v1::SetProjectPolicyRequest {
        project: "a".to_owned(),
        policy: Some(v1::ProjectPolicy { weight: Some(7), ..Default::default() }),
    };
    let weight = async || {
        let asked = v1::GetProjectRequest { project: "a".to_owned() };
        let project = admin.fleet().get_project(asked).await.unwrap().into_inner().project.unwrap();
        project.policy.unwrap().weight()
    };
    // The record cannot be stored: the change is not made, and the refusal is written down, which is a record of its own.
    fail::cfg("store::before_record", "1*return").unwrap();
    let refused = admin.fleet().set_project_policy(set()).await.unwrap_err();
    assert_eq!(Class::of(&refused), Class::Unavailable);
    assert_eq!(weight().await, 1);
    let rpc = "FleetService/SetProjectPolicy";
    assert_eq!(records().await, [record(rpc, "a", "UNAVAILABLE")]);
    // Both are stored, and nobody is told: the record is there without the answer.
    fail::cfg("scheduler::after_transaction", "1*return").unwrap();
    assert_eq!(Class::of(&admin.fleet().set_project_policy(set()).await.unwrap_err()), Class::Unavailable);
    assert_eq!(weight().await, 7);
    let told = [
        record(rpc, "a", "UNAVAILABLE"),
        record(rpc, "a", "OK"),
        // What was answered all the same.
        record(rpc, "a", "UNAVAILABLE"),
    ];
    assert_eq!(records().await, told);
    // Well: once.
    admin.fleet().set_project_policy(set()).await.unwrap();
    assert_eq!(records().await.len(), 4);

    // So for tokens, which no desk decides on.
    fail::cfg("store::before_record", "1*return").unwrap();
    let token = || v1::CreateTokenRequest {
        project: "a".to_owned(),
        name: "n".to_owned(),
        role: v1::TokenRole::Viewer as i32,
        ..Default::default()
    };
    admin.tokens().create_token(token()).await.unwrap_err();
    let list = admin.tokens().list_tokens(v1::ListTokensRequest::default()).await.unwrap().into_inner();
    assert_eq!(list.tokens.len(), 1, "the admin's alone");
    let made = admin.tokens().create_token(token()).await.unwrap().into_inner().token.unwrap();
    assert_eq!(records().await[5..], [record("TokenService/CreateToken", &made.token_id, "OK")]);
    scenario.teardown();
}
