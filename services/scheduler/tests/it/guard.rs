//! Credentials: what proves somebody, what does not, how often one may try, and what is written down.

use std::time::Duration;

use attune_proto::v1::{self, TokenRole};
use attune_proto::{Class, Client, Secret};
use attune_spec::id::Project;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::fixtures::{create, get, inputs, job};
use crate::server::{LIMIT, Server, cut};

async fn list(client: &Client) -> Result<(), Status> {
    let request = v1::ListJobsRequest { project: client.project().to_string(), ..Default::default() };
    client.jobs().list_jobs(request).await.map(drop)
}

async fn revoke(admin: &Client, id: &str) {
    let request = v1::RevokeTokenRequest { project: String::new(), token_id: id.to_owned() };
    let revoked = admin.tokens().revoke_token(request).await.unwrap().into_inner().token.unwrap();
    assert!(revoked.revoke_time.is_some());
}

async fn audit(admin: &Client) -> Vec<v1::AuditRecord> {
    let request = v1::ListAuditRecordsRequest { page_size: 1000, ..Default::default() };
    admin.audit().list_audit_records(request).await.unwrap().into_inner().records
}

/// A1: the answer to a credential that is not valid does not say what is wrong with it.
#[tokio::test]
async fn whatever_is_wrong_with_a_credential_the_answer_is_the_same() {
    let server = Server::guarded(|_| {});
    let admin = server.admin().await;
    let (id, secret) = server.token(&admin, Some("default"), TokenRole::Viewer, "anna").await;
    let whole = secret.expose().to_owned();
    let other = server.token(&admin, Some("default"), TokenRole::Viewer, "bert").await.1;
    list(&server.client_as(Some(secret.clone())).await).await.unwrap();

    let soon = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap() + Duration::from_millis(300);
    let request = v1::CreateTokenRequest {
        name: "short".to_owned(),
        role: TokenRole::Viewer as i32,
        expire_time: Some(attune_proto::convert::time::timestamp(soon.as_millis() as u64)),
        ..Default::default()
    };
    let expired = admin.tokens().create_token(request.clone()).await.unwrap().into_inner().secret;
    tokio::time::sleep(Duration::from_millis(400)).await;
    let late = admin.tokens().create_token(request).await.unwrap_err();
    assert_eq!(attune_proto::error::faults(&late)[0].to_string(), "`expire_time` has passed");
    revoke(&admin, &id).await;

    let mixed = format!("{}{}", &whole[..24], &other.expose()[24..]);
    let shown = ["x", "attune_", &whole[..70], &mixed, &whole, &expired, &format!("{whole}x"), "attune_nobody_x"];
    let mut answers = Vec::new();
    for shown in shown.into_iter().map(|shown| Some(Secret::new(shown))).chain([None]) {
        let refused = list(&server.client_as(shown).await).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
        answers.push((refused.message().to_owned(), refused.details().to_vec()));
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    assert_eq!(answers[0].0, "the call carries no valid credential");
    // A call that nobody knows is not answered to strangers either, and health is to everybody.
    let channel = tonic::transport::Endpoint::from_shared(server.url()).unwrap().connect().await.unwrap();
    tonic_health::pb::health_client::HealthClient::new(channel)
        .check(tonic_health::pb::HealthCheckRequest::default())
        .await
        .unwrap();
}

/// A8: guessing is slow, for the address that guesses, and whoever has a token goes on.
#[tokio::test]
async fn guesses_run_out_and_come_again_in_time() {
    let server = Server::guarded(|config| {
        config.limits.calls.failures_at_once = 5;
        config.limits.calls.failures_per_second = 2;
    });
    let secret = server.admin_secret();
    let guess = server.client_as(Some(Secret::new("attune_guess"))).await;
    let mut n_refused = 0;
    let waits = loop {
        let refused = list(&guess).await.unwrap_err();
        match refused.code() {
            Code::Unauthenticated => n_refused += 1,
            _ => break refused,
        }
        assert!(n_refused < 50, "guesses never run out");
    };
    assert!(n_refused >= 5, "{n_refused}");
    assert_eq!(Class::of(&waits), Class::QuotaExceeded);
    let wait = waits.get_details_retry_info().unwrap().retry_delay.unwrap();
    assert!(wait > Duration::ZERO && wait <= Duration::from_millis(500), "{wait:?}");
    // Whoever proves who it is goes on beside it, from the same address.
    list(&server.client_as(Some(secret)).await).await.unwrap();
    tokio::time::sleep(wait).await;
    assert_eq!(list(&guess).await.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_credential_has_its_share_of_calls_and_no_more() {
    let server = Server::guarded(|config| {
        config.limits.calls.calls_at_once = 10;
        config.limits.calls.calls_per_second = 5;
    });
    let admin = server.admin().await;
    let (_, one) = server.token(&admin, Some("default"), TokenRole::Viewer, "anna").await;
    let (_, two) = server.token(&admin, Some("default"), TokenRole::Viewer, "bert").await;
    let (one, two) = (server.client_as(Some(one)).await, server.client_as(Some(two)).await);
    let mut last = Ok(());
    for _ in 0..30 {
        last = list(&one).await;
    }
    let refused = last.unwrap_err();
    assert_eq!((refused.code(), Class::of(&refused)), (Code::ResourceExhausted, Class::QuotaExceeded));
    assert!(refused.get_details_retry_info().unwrap().retry_delay.unwrap() <= Duration::from_millis(200));
    list(&two).await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    list(&one).await.unwrap();
}

/// A token that is revoked takes with it what is open under it.
#[tokio::test]
async fn a_revoked_token_cuts_what_is_open() {
    let server = Server::guarded(|_| {});
    let admin = server.admin().await;
    inputs(&admin).await;
    let made = create(&admin, "r1", &job()).await.unwrap();
    let (id, secret) = server.token(&admin, Some("default"), TokenRole::Viewer, "anna").await;
    let viewer = server.client_as(Some(secret)).await;
    let request = v1::WatchJobRequest { project: String::new(), job_id: made.job_id.clone(), after_sequence: 0 };
    let mut watch = viewer.jobs().watch_job(request).await.unwrap().into_inner();
    assert!(watch.message().await.unwrap().is_some());
    let (worker_id, worker_secret) = server.token(&admin, None, TokenRole::Worker, "gpu").await;
    let worker = server.client_as(Some(worker_secret)).await;
    let mut worker = crate::worker::Worker::connect(&worker, "w1").await;

    revoke(&admin, &id).await;
    let cut = cut(&mut watch).await;
    assert_eq!(cut.code(), Code::Unauthenticated, "{cut:?}");
    assert_eq!(list(&viewer).await.unwrap_err().code(), Code::Unauthenticated);
    revoke(&admin, &worker_id).await;
    while worker.next().await.is_some() {}
}

/// A6, A34: project and cursors of a request mean nothing beyond the credential's own project.
#[tokio::test]
async fn a_project_in_the_body_does_not_widen_a_credential() {
    let server = Server::guarded(|_| {});
    let admin = server.admin().await;
    let of = |project: &str| admin.for_project(Project::new(project).unwrap());
    let mut jobs = Vec::new();
    for project in ["a", "b"] {
        inputs(&of(project)).await;
        for n in 0..3 {
            let mut spec = job();
            spec["name"] = serde_json::json!(format!("{project}-{n}"));
            jobs.push(create(&of(project), &format!("r{n}"), &spec).await.unwrap());
        }
    }
    let (_, secret) = server.token(&admin, Some("a"), TokenRole::Submitter, "anna").await;
    let anna = server.client_as(Some(secret)).await;
    // A job file that names another project.
    let mut spec = job();
    spec["project"] = serde_json::json!("b");
    let request = v1::CreateJobRequest {
        project: String::new(),
        request_id: "x".to_owned(),
        spec: Some(crate::fixtures::message(&spec)),
        validate_only: false,
    };
    assert_eq!(anna.jobs().create_job(request).await.unwrap_err().code(), Code::InvalidArgument);
    // A9: the request id of another project is not this one's.
    let (of_a, mut spec) = (anna.for_project(Project::new("a").unwrap()), job());
    spec["name"] = serde_json::json!("a-0");
    assert_eq!(create(&of_a, "r0", &spec).await.unwrap().job_id, jobs[0].job_id);
    // Every page is of the own project, whatever token it starts from.
    let foreign = jobs[5].job_id.clone();
    for token in [String::new(), foreign] {
        let request = v1::ListJobsRequest { page_size: 1000, page_token: token, ..Default::default() };
        let listed = anna.jobs().list_jobs(request).await.unwrap().into_inner().jobs;
        assert!(listed.iter().all(|job| job.project == "a"), "{listed:?}");
    }
    let huge = v1::ListJobsRequest { page_size: u32::MAX, ..Default::default() };
    assert_eq!(anna.jobs().list_jobs(huge).await.unwrap_err().code(), Code::InvalidArgument);
    let absent = get(&anna, &jobs[4].job_id).await.unwrap_err();
    assert_eq!(absent.message(), format!("job \"{}\" does not exist in project \"a\"", jobs[4].job_id));
}

#[tokio::test]
async fn an_admin_of_a_project_rules_over_that_project_alone() {
    let server = Server::guarded(|_| {});
    let root = server.admin().await;
    let (_, secret) = server.token(&root, Some("a"), TokenRole::Admin, "anna").await;
    let anna = server.client_as(Some(secret)).await;
    let (foreign, _) = server.token(&root, Some("b"), TokenRole::Viewer, "bert").await;
    let everywhere = v1::CreateTokenRequest {
        all_projects: true,
        name: "x".to_owned(),
        role: TokenRole::Worker as i32,
        ..Default::default()
    };
    assert_eq!(anna.tokens().create_token(everywhere).await.unwrap_err().code(), Code::PermissionDenied);
    let worker = v1::CreateTokenRequest { name: "x".to_owned(), role: TokenRole::Worker as i32, ..Default::default() };
    assert_eq!(anna.tokens().create_token(worker).await.unwrap_err().code(), Code::InvalidArgument);
    let (own, _) = server.token(&anna, Some("a"), TokenRole::Submitter, "carl").await;
    let listed = anna.tokens().list_tokens(v1::ListTokensRequest::default()).await.unwrap().into_inner().tokens;
    assert!(listed.len() == 2 && listed.iter().all(|token| token.project == "a"), "{listed:?}");
    assert!(listed.iter().any(|token| token.token_id == own && token.creator != token.token_id));
    let all = root.tokens().list_tokens(v1::ListTokensRequest::default()).await.unwrap().into_inner().tokens;
    assert_eq!(all.len(), 4);
    // A token of another project, and one that is not there.
    let ask = async |id: &str| {
        let request = v1::RevokeTokenRequest { project: String::new(), token_id: id.to_owned() };
        anna.tokens().revoke_token(request).await.map_err(|status| status.message().replace(id, "ID"))
    };
    assert_eq!(ask(&foreign).await.unwrap_err(), ask("0000000000000000").await.unwrap_err());
    assert!(ask(&own).await.is_ok() && ask(&own).await.is_ok());
    let records = anna.audit().list_audit_records(v1::ListAuditRecordsRequest::default()).await.unwrap().into_inner();
    assert!(!records.records.is_empty() && records.records.iter().all(|record| record.project == "a"));
    // What others do to its tokens, and what its tokens try elsewhere, it may know.
    let (lost, secret) = server.token(&anna, Some("a"), TokenRole::Viewer, "dora").await;
    let dora = server.client_as(Some(secret)).await;
    list(&dora.for_project(Project::new("b").unwrap())).await.unwrap_err();
    revoke(&root, &lost).await;
    let records = anna.audit().list_audit_records(v1::ListAuditRecordsRequest::default()).await.unwrap().into_inner();
    let is_there = |name: &str, rpc: &str, outcome: &str| {
        records.records.iter().any(|record| (&*record.name, &*record.rpc, &*record.outcome) == (name, rpc, outcome))
    };
    assert!(
        is_there("admin", "TokenService/RevokeToken", "OK") && is_there("dora", "JobService/ListJobs", "NOT_FOUND")
    );
}

#[tokio::test]
async fn what_was_changed_or_refused_is_written_down() {
    let server = Server::guarded(|config| {
        config.timings.housekeeping = Duration::from_millis(20);
        config.timings.audit_kept = Some(Duration::from_secs(3600));
    });
    let admin = server.admin().await;
    inputs(&admin).await;
    let (id, secret) = server.token(&admin, Some("default"), TokenRole::Viewer, "anna").await;
    let viewer = server.client_as(Some(secret.clone())).await;
    let made = create(&admin, "r1", &job()).await.unwrap();
    let cancel = |project: &str| v1::CancelJobRequest { project: project.to_owned(), job_id: made.job_id.clone() };
    get(&viewer, &made.job_id).await.unwrap();
    assert_eq!(viewer.jobs().cancel_job(cancel("")).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(get(&viewer.for_project(Project::new("b").unwrap()), "j-1").await.unwrap_err().code(), Code::NotFound);
    list(&viewer.for_project(Project::new("b").unwrap())).await.unwrap_err();
    admin.jobs().cancel_job(cancel("")).await.unwrap();
    revoke(&admin, &id).await;
    list(&viewer).await.unwrap_err();

    // That somebody was refused is written down beside the answer.
    let written = async {
        loop {
            let records = audit(&admin).await;
            if records.iter().any(|record| record.outcome == "UNAUTHENTICATED") {
                break records;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let records = tokio::time::timeout(LIMIT, written).await.expect("it is written down");
    let lines: Vec<String> = records
        .iter()
        .rev()
        .map(|record| format!("{} {} {} {}", record.name, record.rpc, record.target, record.outcome))
        .collect();
    for expected in [
        format!("admin TokenService/CreateToken {id} OK"),
        format!("admin JobService/CreateJob {} OK", made.job_id),
        "anna JobService/CancelJob  PERMISSION_DENIED".to_owned(),
        "anna JobService/ListJobs  NOT_FOUND".to_owned(),
        format!("admin JobService/CancelJob {} OK", made.job_id),
        format!("admin TokenService/RevokeToken {id} OK"),
        "anna JobService/ListJobs  UNAUTHENTICATED".to_owned(),
    ] {
        assert!(lines.contains(&expected), "{expected:?} is not in {lines:#?}");
    }
    assert!(!lines.iter().any(|line| line.contains("GetJob")), "what only looks is not written down: {lines:#?}");
    let one = records.iter().find(|record| record.rpc == "JobService/CreateJob").unwrap();
    assert_eq!((one.peer.as_str(), one.project.as_str()), ("127.0.0.1", "default"));
    assert!(one.time.is_some() && one.caller.len() == 16);
    assert!(!format!("{records:?}").contains(&secret.expose()[24..]), "a secret is written down");
    // It is kept for as long as it is to be.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(audit(&admin).await.len() >= records.len());
}

#[tokio::test]
async fn records_are_forgotten_in_their_time() {
    let server = Server::guarded(|config| {
        config.timings.housekeeping = Duration::from_millis(20);
        config.timings.audit_kept = Some(Duration::from_secs(3));
    });
    let admin = server.admin().await;
    server.token(&admin, Some("default"), TokenRole::Viewer, "anna").await;
    assert_eq!(audit(&admin).await.len(), 1);
    let gone = async {
        while !audit(&admin).await.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, gone).await.expect("it is forgotten");
}

#[tokio::test]
async fn a_token_says_whose_it_is_and_when_it_was_used() {
    let server = Server::guarded(|_| {});
    let admin = server.admin().await;
    let (id, secret) = server.token(&admin, Some("a"), TokenRole::Submitter, "anna").await;
    let anna = server.client_as(Some(secret)).await;
    let caller = anna.tokens().get_caller(v1::GetCallerRequest::default()).await.unwrap().into_inner();
    let expected = v1::GetCallerResponse {
        authenticated: true,
        name: "anna".to_owned(),
        token_id: id.clone(),
        project: "a".to_owned(),
        role: TokenRole::Submitter as i32,
        expire_time: None,
    };
    assert_eq!(caller, expected);
    let used = async {
        loop {
            let all = admin.tokens().list_tokens(v1::ListTokensRequest::default()).await.unwrap().into_inner().tokens;
            if all.iter().any(|token| token.token_id == id && token.use_time.is_some()) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, used).await.expect("the use is noted");
    // Where nobody is asked, everybody is anybody and no token is given out.
    let open = Server::start();
    let anybody = open.client().await;
    let caller = anybody.tokens().get_caller(v1::GetCallerRequest::default()).await.unwrap().into_inner();
    assert_eq!(caller, v1::GetCallerResponse::default());
    let request = v1::CreateTokenRequest { name: "x".to_owned(), role: TokenRole::Viewer as i32, ..Default::default() };
    let refused = anybody.tokens().create_token(request).await.unwrap_err();
    assert!(refused.message().contains("--auth tokens"), "{refused:?}");
}

/// Whoever hangs up before the answer comes is written down all the same.
#[tokio::test]
async fn nobody_escapes_the_audit_log_by_hanging_up() {
    let server = Server::guarded(|_| {});
    let admin = server.admin().await;
    inputs(&admin).await;
    let (_, secret) = server.token(&admin, Some("default"), TokenRole::Submitter, "anna").await;
    let anna = server.client_as(Some(secret)).await;
    let mut jobs = Vec::new();
    for n in 0..24 {
        let mut spec = job();
        spec["name"] = serde_json::json!(format!("job-{n}"));
        jobs.push(create(&admin, &format!("r{n}"), &spec).await.unwrap().job_id);
    }
    for (n, id) in jobs.iter().enumerate() {
        let request = v1::CancelJobRequest { project: String::new(), job_id: id.clone() };
        let patience = Duration::from_micros(200 * n as u64);
        let _ = tokio::time::timeout(patience, anna.jobs().cancel_job(request)).await;
    }
    let mut cancelled: Vec<&String> = Vec::new();
    for id in &jobs {
        if get(&admin, id).await.unwrap().state() == v1::JobState::Cancelled {
            cancelled.push(id);
        }
    }
    assert!(!cancelled.is_empty());
    let written = async {
        let is_there = |records: &[v1::AuditRecord], id: &str| {
            records.iter().any(|record| record.target == id && record.name == "anna" && record.outcome == "OK")
        };
        loop {
            let records = audit(&admin).await;
            if cancelled.iter().all(|id| is_there(&records, id)) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, written).await.expect("every change is written down");
}
