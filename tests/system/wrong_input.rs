//! What people get wrong, and what they are told: the field, or the file and its line.

use std::process::Output;

use attune_proto::v1::{self, FailureCause, JobState};
use tokio::time::{Duration, Instant, sleep};

use crate::support::{Cluster, SMALL, attune, is_alive, world};

/// How long a training process may take to notice that its worker has been killed.
const LEFT_BEHIND: Duration = Duration::from_secs(2);

fn errors(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Submits the text job with changes and expects a refusal with exit status 2 that says all of `expected`.
fn refused(cluster: &Cluster, changes: &[&str], expected: &[&str]) {
    let set = SMALL.iter().chain(changes).flat_map(|change| ["--set", change]);
    let output = cluster.run(["submit", "world/text.yaml"].into_iter().chain(set));
    let said = errors(&output);
    assert_eq!(output.status.code(), Some(2), "{changes:?}: {output:?}");
    for text in expected {
        assert!(said.contains(text), "{changes:?}: no {text:?} in {said}");
    }
}

#[tokio::test]
async fn a_job_file_that_cannot_be_is_refused_at_its_fields() {
    let cluster = Cluster::start().await;
    world(&cluster.path("world"));
    std::fs::write(cluster.path("broken.yaml"), "version: 1\nname: [x\nbase: y\n").unwrap();
    let output = cluster.run(["submit", "broken.yaml"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(errors(&output).contains("broken.yaml:3:"), "{}", errors(&output));

    refused(&cluster, &["tune.adapter.method=lroa"], &["`tune.adapter.method`", "did you mean \"lora\""]);
    refused(&cluster, &["tune.steps=many"], &["`tune.steps`", "\"many\""]);
    let lora = "tune.adapter={method: lora, rank: -4}";
    refused(&cluster, &[lora, "tune.from_scratch=false"], &["`tune.adapter.rank`", "-4"]);
    let nowhere = "tune.adapter={method: lora, targets: [qq_proj]}";
    refused(
        &cluster,
        &[nowhere, "tune.from_scratch=false"],
        &["`tune.adapter.targets[0]`", "qq_proj", "did you mean \"q_proj\""],
    );
    refused(&cluster, &["data.domains[0].source=./absent.jsonl"], &["`data.domains[0].source`", "absent.jsonl"]);
    refused(&cluster, &["base=nobody:latest"], &["`base`", "nobody:latest"]);
    // All at once.
    refused(&cluster, &["tune.steps=0", "data.max_length=0"], &["`tune.steps`", "`data.max_length`"]);
}

/// Writes a data file and submits the text job on it; the end of the job.
async fn run_on(cluster: &Cluster, rows: &str, changes: &[&str]) -> v1::Job {
    std::fs::write(cluster.path("world/rows.jsonl"), rows).unwrap();
    let set = SMALL.iter().chain(changes).copied();
    let set = set.chain(["data.domains[0].source=./rows.jsonl", "tune.steps=2"]).collect::<Vec<_>>();
    let id = cluster.submit(&cluster.path("world/text.yaml"), &set);
    cluster.wait(&id, "end", |job| matches!(job.state(), JobState::Failed | JobState::Succeeded)).await
}

fn failure(job: &v1::Job) -> (FailureCause, String) {
    assert_eq!(job.state(), JobState::Failed, "{job:#?}");
    let failure = job.failure.clone().unwrap();
    let faults = failure.faults.iter().map(|fault| format!("`{}` {}", fault.path, fault.message));
    (failure.cause(), std::iter::once(failure.message.clone()).chain(faults).collect::<Vec<_>>().join("\n"))
}

#[tokio::test]
async fn data_that_cannot_be_used_fails_the_job_at_its_file_and_line() {
    let cluster = Cluster::start().await;
    world(&cluster.path("world"));
    let good = "{\"text\": \"A good row with some words.\"}\n";

    let broken = format!("{good}{good}{{\"text\": \n");
    let (cause, said) = failure(&run_on(&cluster, &broken, &[]).await);
    assert_eq!(cause, FailureCause::DataFault, "{said}");
    assert!(said.contains("rows.jsonl:3"), "{said}");
    let skipped = run_on(&cluster, &broken, &["data.on_bad_row=skip"]).await;
    assert_eq!(skipped.state(), JobState::Succeeded, "{skipped:#?}");
    let told = cluster.run(["jobs", "logs", &skipped.job_id]);
    let told = String::from_utf8(told.stdout).unwrap();
    assert!(told.contains("1 of 3 rows are bad and left out, the first of them rows.jsonl:3"), "{told}");

    let (_, said) = failure(&run_on(&cluster, "\n", &[]).await);
    assert!(said.contains("rows.jsonl"), "{said}");

    let long = format!("{good}{{\"text\": \"{}\"}}\n", "many words ".repeat(400));
    let (_, said) = failure(&run_on(&cluster, &long, &["data.too_long=refuse"]).await);
    assert!(said.contains("rows.jsonl:2") && said.contains("64"), "{said}");
    let cut = run_on(&cluster, &long, &["data.too_long=truncate"]).await;
    assert_eq!(cut.state(), JobState::Succeeded, "{cut:#?}");
}

/// A base with weights in `folder`, trained for a step.
async fn base(cluster: &Cluster, folder: &str) {
    let set = SMALL.into_iter().chain(["tune.steps=1"]).collect::<Vec<_>>();
    let id = cluster.submit(&cluster.path("world/text.yaml"), &set);
    cluster.ends(&id, JobState::Succeeded).await;
    let pulled = cluster.run(["artifacts", "pull", "demo-base:latest", folder]);
    assert!(pulled.status.success(), "{pulled:?}");
}

/// Submits the chat job on the base in `folder` and gives what the command said on a refusal, or how the job failed.
async fn chat_on(cluster: &Cluster, folder: &str) -> String {
    let base = format!("base={}", cluster.path(folder).display());
    let set = SMALL.into_iter().chain(["tune.steps=1", &base]).flat_map(|change| ["--set", change]);
    let output = cluster.run(["submit", "world/chat.yaml"].into_iter().chain(set));
    if !output.status.success() {
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        return errors(&output);
    }
    let id = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let job = cluster.ends(&id, JobState::Failed).await;
    failure(&job).1
}

fn weights(cluster: &Cluster, folder: &str) -> std::path::PathBuf {
    cluster.path(folder).join("model.safetensors")
}

#[tokio::test]
async fn a_base_that_is_broken_is_named_by_file_and_tensor() {
    let cluster = Cluster::start().await;
    world(&cluster.path("world"));
    base(&cluster, "cut").await;
    let bytes = std::fs::read(weights(&cluster, "cut")).unwrap();
    std::fs::write(weights(&cluster, "cut"), &bytes[..bytes.len() - 100]).unwrap();
    let said = chat_on(&cluster, "cut").await;
    assert!(said.contains("model.safetensors"), "{said}");

    base(&cluster, "shape").await;
    let config = cluster.path("shape/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let inner = value["intermediate_size"].as_u64().unwrap();
    value["intermediate_size"] = (inner * 2).into();
    std::fs::write(&config, value.to_string()).unwrap();
    let said = chat_on(&cluster, "shape").await;
    assert!(said.contains("mlp.") && said.contains(&inner.to_string()), "{said}");

    value["model_type"] = "mamba".into();
    std::fs::write(&config, value.to_string()).unwrap();
    let said = chat_on(&cluster, "shape").await;
    assert!(said.contains("`base`") && said.contains("mamba"), "{said}");
}

#[tokio::test]
async fn a_worker_that_vanishes_costs_an_attempt_and_not_the_job() {
    let mut cluster = Cluster::start().await;
    world(&cluster.path("world"));
    let set = SMALL.into_iter().chain(["tune.steps=60", "tune.checkpoint.every_steps=5"]).collect::<Vec<_>>();
    let id = cluster.submit(&cluster.path("world/text.yaml"), &set);
    cluster.wait(&id, "checkpoint", |job| !job.checkpoint.is_empty()).await;
    let worker = cluster.worker.take().unwrap();
    let orphans = worker.children();
    worker.kill();
    // Its process goes with it, whatever the lease says.
    let deadline = Instant::now() + LEFT_BEHIND;
    while orphans.iter().any(|orphan| is_alive(*orphan)) {
        assert!(Instant::now() < deadline, "a training process outlives its worker: {orphans:?}");
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(orphans.len(), 1);
    let lost = cluster.wait(&id, "loss", |job| job.failure.is_some()).await;
    assert_eq!(lost.failure.unwrap().cause(), FailureCause::WorkerLost);
    cluster.start_worker(&[]);
    cluster.ends(&id, JobState::Succeeded).await;
}

#[tokio::test]
async fn a_full_disk_of_the_artifact_store_is_told_and_survived() {
    let mut cluster = Cluster::start().await;
    world(&cluster.path("world"));
    cluster.scheduler.take().unwrap().kill();
    cluster.start_scheduler(&[("FAILPOINTS", "artifacts::disk_full=return")]).await;
    let output = cluster.run(["artifacts", "push", "world/chat.train.jsonl"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(errors(&output).contains("full"), "{}", errors(&output));
    let listed = cluster.json(["artifacts", "list"]);
    assert_eq!(listed, serde_json::json!([]), "nothing half-written is visible");
    cluster.scheduler.take().unwrap().kill();
    cluster.start_scheduler(&[]).await;
    assert!(cluster.run(["artifacts", "push", "world/chat.train.jsonl"]).status.success());
}

#[tokio::test]
async fn a_disk_without_room_refuses_what_is_too_large_and_takes_the_rest() {
    let mut cluster = Cluster::start().await;
    world(&cluster.path("world"));
    cluster.scheduler.take().unwrap().kill();
    if !cluster.start_scheduler_on_a_small_disk(40).await {
        println!("skipped: this machine lets nobody mount a small disk");
        return;
    }
    let large = cluster.run(["artifacts", "push", "world/text.train.jsonl"]);
    assert_eq!(large.status.code(), Some(1), "{large:?}");
    assert!(errors(&large).contains("full"), "{}", errors(&large));
    let small = cluster.run(["artifacts", "push", "world/chat.valid.jsonl", "--tag", "small"]);
    assert!(small.status.success(), "what was half-written is gone: {small:?}");
    let listed = cluster.json(["artifacts", "list"]);
    assert_eq!(listed.as_array().unwrap().len(), 1);
}

/// A request as a client of another version of the contract might send it.
#[derive(Clone, PartialEq, prost::Message)]
struct OtherListJobsRequest {
    #[prost(string, tag = "1")]
    project: String,
    #[prost(string, tag = "999")]
    unheard_of: String,
}

#[tokio::test]
async fn a_field_of_another_version_of_the_contract_is_not_fatal() {
    let cluster = Cluster::start().await;
    let channel = tonic::transport::Endpoint::from_shared(cluster.url()).unwrap().connect().await.unwrap();
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let asked = OtherListJobsRequest { project: String::new(), unheard_of: "of a time to come".to_owned() };
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/attune.v1.JobService/ListJobs");
    let codec = tonic_prost::ProstCodec::<OtherListJobsRequest, v1::ListJobsResponse>::default();
    let answer = client.unary(tonic::Request::new(asked), path, codec).await.unwrap().into_inner();
    assert!(answer.jobs.is_empty());
    // A job file of another version is refused by name instead of being misread.
    std::fs::write(cluster.path("new.yaml"), "version: 2\nname: x\n").unwrap();
    let output = attune().arg("validate").arg(cluster.path("new.yaml")).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(errors(&output).contains("`version` is 2"), "{}", errors(&output));
}
