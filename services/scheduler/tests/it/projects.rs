//! What projects may have, who makes way, limits of time, workers that are told off: as people see it.

use attune_artifacts::{Causes, Kind};
use attune_proto::Client;
use attune_proto::client::Options;
use attune_proto::error::Class;
use attune_proto::v1::connect_response::Message;
use attune_proto::v1::{self, JobState};
use serde_json::{Value, json};

use crate::fixtures::{bundle, create, get, inputs, job, push, until};
use crate::server::Server;
use crate::worker::{Worker, attempt, register, running};

/// A client of another project on the same server.
async fn of(server: &Server, project: &str) -> Client {
    let options = Options { project: project.parse().unwrap(), ..Options::default() };
    Client::connect(&server.url(), options).await.unwrap()
}

fn with(path: &str, value: Value) -> Value {
    let mut job = job();
    job["outputs"] = json!({});
    job[path] = value;
    job
}

async fn set(client: &Client, project: &str, policy: v1::ProjectPolicy) -> Result<v1::ProjectUsage, tonic::Status> {
    let asked = v1::SetProjectPolicyRequest { project: project.to_owned(), policy: Some(policy) };
    client.fleet().set_project_policy(asked).await.map(|answer| answer.into_inner().project.unwrap())
}

async fn usage(client: &Client, project: &str) -> v1::ProjectUsage {
    let asked = v1::GetProjectRequest { project: project.to_owned() };
    client.fleet().get_project(asked).await.unwrap().into_inner().project.unwrap()
}

async fn workers(client: &Client) -> Vec<v1::Worker> {
    client.fleet().list_workers(v1::ListWorkersRequest::default()).await.unwrap().into_inner().workers
}

/// Waits for the request to stop an attempt.
async fn stop(worker: &mut Worker, of: &v1::AttemptRef) {
    worker
        .expect(|message| match message {
            Message::StopAttempt(stop) if stop.attempt.as_ref() == Some(of) => Some(()),
            _ => None,
        })
        .await;
}

#[tokio::test]
async fn a_project_has_what_it_may_and_is_told_why_it_waits() {
    let mut server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let policy = v1::ProjectPolicy { max_cpu: Some(1), max_queued: Some(1), ..Default::default() };
    let shown = set(&client, "default", policy).await.unwrap();
    assert_eq!((shown.cpu, shown.policy.unwrap().max_cpu, shown.policy.unwrap().weight), (0, Some(1), Some(1)));
    let mut worker = Worker::connect(&client, "w-1").await;
    let mut other = Worker::connect(&client, "w-2").await;
    let first = create(&client, "r1", &with("name", json!("first"))).await.unwrap();
    let second = create(&client, "r2", &with("name", json!("second"))).await.unwrap();
    let now = get(&client, &second.job_id).await.unwrap();
    assert!(now.message.contains("more devices than it may at a time"), "{}", now.message);
    // A third would wait, and a gang of two devices never run.
    let refused = create(&client, "r3", &with("name", json!("third"))).await.unwrap_err();
    assert_eq!(Class::of(&refused), Class::QuotaExceeded, "{refused}");
    assert!(refused.message().contains("has 1 jobs that wait"), "{refused}");
    let shown = usage(&client, "default").await;
    assert_eq!((shown.cpu, shown.queued), (1, 1));
    assert!(shown.bytes > 100, "base and rows: {}", shown.bytes);

    // It is known after a restart.
    let (offered, offer) = tokio::select! {
        offer = worker.offer() => (&mut worker, offer),
        offer = other.offer() => (&mut other, offer),
    };
    offered.begin(&attempt(&offer)).await;
    server.kill();
    server.restart().await;
    let client = server.client().await;
    assert_eq!(usage(&client, "default").await.policy.unwrap().max_queued, Some(1));
    let freed = set(&client, "default", v1::ProjectPolicy::default()).await.unwrap();
    assert_eq!(freed.policy.unwrap().max_cpu, None);
    assert_eq!(get(&client, &first.job_id).await.unwrap().state(), JobState::Running);
    create(&client, "r3", &with("name", json!("third"))).await.unwrap();

    let wrong = set(&client, "default", v1::ProjectPolicy { weight: Some(0), ..Default::default() }).await.unwrap_err();
    assert!(wrong.message().contains("policy.weight"), "{wrong}");
    let wrong = set(&client, "Not A Name", v1::ProjectPolicy::default()).await.unwrap_err();
    assert_eq!(Class::of(&wrong), Class::Invalid, "{wrong}");
}

#[tokio::test]
async fn bytes_beyond_what_a_project_may_keep_are_refused_and_results_are_not() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let kept = usage(&client, "default").await.bytes;
    set(&client, "default", v1::ProjectPolicy { max_bytes: Some(kept + 20), ..Default::default() }).await.unwrap();
    let rows = |text: &[u8]| bundle(Kind::Dataset, &[("rows.jsonl", text)], Causes::default());
    let refused = push(&client, &rows(b"{\"text\": \"longer than what is left\"}\n"), None, &[]).await.unwrap_err();
    assert_eq!(Class::of(&refused), Class::QuotaExceeded, "{refused}");
    assert!(refused.message().contains(&format!("keeps {kept} bytes")), "{refused}");
    push(&client, &rows(b"{\"text\": \"b\"}\n"), None, &[]).await.unwrap();
    // What is there already takes nothing.
    push(&client, &rows(b"{\"text\": \"a\"}\n"), None, &["rows-again"]).await.unwrap();
    // Another project keeps its own.
    push(&of(&server, "other").await, &rows(b"{\"text\": \"longer than what is left\"}\n"), None, &[]).await.unwrap();
    let mut worker = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let offer = worker.offer().await;
    worker.begin(&attempt(&offer)).await;
    worker.succeed(&offer).await;
    assert_eq!(get(&client, &made.job_id).await.unwrap().state(), JobState::Succeeded);
}

/// A41, in small: who has less goes first.
#[tokio::test]
async fn projects_take_turns() {
    let server = Server::start();
    let (many, few) = (server.client().await, of(&server, "few").await);
    inputs(&many).await;
    inputs(&few).await;
    for at in 0..4 {
        create(&many, &format!("r{at}"), &with("name", json!(format!("m{at}")))).await.unwrap();
    }
    let late = create(&few, "r", &with("name", json!("late"))).await.unwrap();
    let (mut one, mut two) = (Worker::connect(&many, "w-1").await, Worker::connect(&many, "w-2").await);
    let first = one.offer().await;
    let second = two.offer().await;
    let projects = [&first, &second].map(|offer| attempt(offer).project);
    assert!(projects.contains(&"few".to_owned()) && projects.contains(&"default".to_owned()), "{projects:?}");
    assert!([first, second].iter().any(|offer| attempt(offer).job_id == late.job_id));
    let listed = many.fleet().list_projects(v1::ListProjectsRequest::default()).await.unwrap().into_inner().projects;
    let shown: Vec<_> = listed.iter().map(|project| (project.project.as_str(), project.cpu, project.queued)).collect();
    assert_eq!(shown, [("default", 1, 3), ("few", 1, 0)]);
    // Page by page.
    let mut asked = v1::ListWorkersRequest { page_size: 1, ..Default::default() };
    let mut names = Vec::new();
    loop {
        let page = many.fleet().list_workers(asked.clone()).await.unwrap().into_inner();
        names.extend(page.workers.into_iter().map(|worker| worker.worker_id));
        if page.next_page_token.is_empty() {
            break;
        }
        asked.page_token = page.next_page_token;
    }
    assert_eq!(names, ["w-1", "w-2"]);
}

#[tokio::test]
async fn the_less_urgent_makes_way_and_goes_on_from_its_checkpoint() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    let low = create(&client, "r1", &with("name", json!("low"))).await.unwrap();
    let offer = worker.offer().await;
    let its = attempt(&offer);
    worker.begin(&its).await;
    let urgent = create(&client, "r2", &with("priority", json!(5))).await.unwrap();
    stop(&mut worker, &its).await;
    assert_eq!(get(&client, &low.job_id).await.unwrap().state(), JobState::Stopping);
    let checkpoint = worker.checkpoint(&its, 4).await.unwrap();
    worker.finish(&its, v1::attempt_finished::Outcome::Stopped(v1::AttemptStopped::default())).await;
    worker.release(offer.cohort_id).await;
    let offer = worker.offer().await;
    assert_eq!(attempt(&offer).job_id, urgent.job_id);
    assert_eq!(get(&client, &low.job_id).await.unwrap().state(), JobState::Queued);
    worker.begin(&attempt(&offer)).await;
    worker.succeed(&offer).await;
    let offer = worker.offer().await;
    assert_eq!(attempt(&offer).job_id, low.job_id);
    assert_eq!(offer.attempts[0].checkpoint, checkpoint);
}

#[tokio::test]
async fn nobody_makes_way_where_the_scheduler_is_told_so() {
    let server = Server::start_with(|config| config.limits.preempts = false);
    let client = server.client().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    let low = create(&client, "r1", &with("name", json!("low"))).await.unwrap();
    let offer = worker.offer().await;
    worker.begin(&attempt(&offer)).await;
    let urgent = create(&client, "r2", &with("priority", json!(5))).await.unwrap();
    assert_eq!(get(&client, &low.job_id).await.unwrap().state(), JobState::Running);
    let now = get(&client, &urgent.job_id).await.unwrap();
    assert!(now.message.contains("other jobs occupy the devices"), "{}", now.message);
}

#[tokio::test]
async fn jobs_end_when_their_time_is_over() {
    // The worker sends no heartbeats.
    let server = Server::start_with(|config| config.timings.lease_ttl = std::time::Duration::from_secs(60));
    let client = server.client().await;
    inputs(&client).await;
    // One that waits.
    let soon = in_some(2);
    let waits = create(&client, "r1", &with("limits", json!({"deadline": soon}))).await.unwrap();
    let ended = until(&client, &waits.job_id, JobState::Cancelled).await;
    assert!(ended.message.contains("time by which it was to be done"), "{}", ended.message);
    // One that runs.
    let mut worker = Worker::connect(&client, "w-1").await;
    let runs = create(&client, "r2", &with("limits", json!({"run_seconds": 1}))).await.unwrap();
    let offer = worker.offer().await;
    let its = attempt(&offer);
    worker.begin(&its).await;
    stop(&mut worker, &its).await;
    worker.finish(&its, v1::attempt_finished::Outcome::Stopped(v1::AttemptStopped::default())).await;
    let ended = until(&client, &runs.job_id, JobState::Cancelled).await;
    assert!(ended.message.contains("`limits.run_seconds`"), "{}", ended.message);
    worker.release(offer.cohort_id).await;
    let late = create(&client, "r3", &with("limits", json!({"deadline": "2020-01-01T00:00:00Z"}))).await.unwrap_err();
    assert!(late.message().contains("limits.deadline") && late.message().contains("has passed"), "{late}");
}

/// The time in some seconds, as people write it.
fn in_some(seconds: i64) -> String {
    (jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds)).to_string()
}

#[tokio::test]
async fn a_worker_that_is_told_off_is_left_alone_until_it_is_let_in_again() {
    let mut server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let labels = [("zone".to_owned(), "eu".to_owned())].into();
    let (mut worker, _) = Worker::connect_with(&client, v1::Register { labels, ..register("w-1") }).await;
    let first = create(&client, "r1", &with("resources", json!({"labels": {"zone": "eu"}}))).await.unwrap();
    let elsewhere = create(&client, "r2", &with("resources", json!({"labels": {"zone": "us"}}))).await.unwrap();
    let now = get(&client, &elsewhere.job_id).await.unwrap();
    assert!(now.message.contains("no worker has as many devices"), "{}", now.message);
    let offer = worker.offer().await;
    worker.begin(&attempt(&offer)).await;
    let cordon = |drain| v1::CordonWorkerRequest { worker_id: "w-1".to_owned(), drain };
    client.fleet().cordon_worker(cordon(false)).await.unwrap();
    let seen = workers(&client).await;
    assert_eq!((seen.len(), seen[0].cordoned, seen[0].connected), (1, true, true));
    assert_eq!(seen[0].devices, [v1::DeviceCount { kind: v1::DeviceKind::Cpu as i32, total: 1, free: 0 }]);
    assert_eq!(seen[0].jobs, [format!("projects/default/jobs/{}", first.job_id)]);
    assert_eq!(seen[0].labels["zone"], "eu");

    // Also when both come back.
    server.kill();
    server.restart().await;
    let client = server.client().await;
    let with = v1::Register { running: vec![running(&offer)], ..register("w-1") };
    let (again, _) = Worker::connect_with(&client, with).await;
    let mut again = again.go_on(&worker);
    assert!(workers(&client).await[0].cordoned);
    client.fleet().cordon_worker(cordon(true)).await.unwrap();
    stop(&mut again, &attempt(&offer)).await;
    again.finish(&attempt(&offer), v1::attempt_finished::Outcome::Stopped(v1::AttemptStopped::default())).await;
    again.release(offer.cohort_id).await;
    until(&client, &first.job_id, JobState::Queued).await;
    assert!(!again.has(|message| matches!(message, Message::LeaseOffer(_))).await);
    let uncordon = |worker: &str| v1::UncordonWorkerRequest { worker_id: worker.to_owned() };
    client.fleet().uncordon_worker(uncordon("w-1")).await.unwrap();
    let third = create(&client, "r3", &job()).await.unwrap();
    let offer = again.offer().await;
    assert_eq!(attempt(&offer).job_id, third.job_id, "the first asks for a label that it has not any more");

    let unknown = client.fleet().uncordon_worker(uncordon("nobody")).await.unwrap_err();
    assert_eq!(Class::of(&unknown), Class::NotFound, "{unknown}");
    let wrong = client.fleet().cordon_worker(v1::CordonWorkerRequest::default()).await.unwrap_err();
    assert_eq!(Class::of(&wrong), Class::Invalid, "{wrong}");
}
