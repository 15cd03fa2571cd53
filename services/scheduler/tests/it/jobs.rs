//! Jobs as people make and find them.

use attune_proto::error::{Class, faults};
use attune_proto::v1::{self, JobState};
use serde_json::json;

use crate::fixtures::{create, create_message, get, inputs, job, message};
use crate::server::Server;

#[tokio::test]
async fn a_job_is_made_once_per_request_and_found_again() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let made = create(&client, "r1", &job()).await.unwrap();
    assert_eq!((made.state(), made.epoch, made.sequence > 0), (JobState::Queued, 0, true));
    assert_eq!(made.resource_name, format!("projects/default/jobs/{}", made.job_id));
    assert!(made.spec.as_ref().unwrap().base.starts_with("blake3:"), "{:?}", made.spec);
    assert_eq!(create(&client, "r1", &job()).await.unwrap().job_id, made.job_id);

    let mut other = job();
    other["tune"]["steps"] = json!(11);
    let reused = create(&client, "r1", &other).await.unwrap_err();
    assert_eq!(Class::of(&reused), Class::RequestIdReused);
    let second = create(&client, "r2", &other).await.unwrap();
    assert!(second.job_id > made.job_id);

    let found = get(&client, &made.job_id).await.unwrap();
    assert_eq!((found.job_id, found.spec), (made.job_id.clone(), made.spec));
    assert!(found.message.contains("no worker is connected"), "{}", found.message);

    let list = async |request: v1::ListJobsRequest| client.jobs().list_jobs(request).await.unwrap().into_inner();
    let first = list(v1::ListJobsRequest { page_size: 1, ..Default::default() }).await;
    assert_eq!(first.jobs[0].job_id, second.job_id);
    let next = v1::ListJobsRequest { page_size: 1, page_token: first.next_page_token, ..Default::default() };
    let next = list(next).await;
    assert_eq!((next.jobs[0].job_id.as_str(), next.next_page_token.as_str()), (made.job_id.as_str(), ""));
    let running = list(v1::ListJobsRequest { states: vec![JobState::Running as i32], ..Default::default() }).await;
    assert!(running.jobs.is_empty());
    let too_many = v1::ListJobsRequest { page_size: 1001, ..Default::default() };
    assert_eq!(Class::of(&client.jobs().list_jobs(too_many).await.unwrap_err()), Class::Invalid);
}

#[tokio::test]
async fn every_fault_of_a_job_comes_at_once() {
    let server = Server::start();
    let client = server.client().await;
    // What can be seen in the specification alone.
    let mut spec = message(&job());
    spec.tune.as_mut().unwrap().batch_tokens = Some(1);
    spec.tune.as_mut().unwrap().adapter.as_mut().unwrap().method = Some("lorra".to_owned());
    spec.limits.as_mut().unwrap().max_attempts = Some(0);
    let status = create_message(&client, "r1", spec).await.unwrap_err();
    let paths: Vec<String> = faults(&status).iter().map(|fault| fault.path.as_str().to_owned()).collect();
    for path in ["limits.max_attempts", "tune.adapter.method", "tune.batch_tokens"] {
        assert!(paths.iter().any(|found| found == path), "{path} is not among {paths:?}");
    }
    // What can be seen in what it refers to.
    let mut spec = job();
    spec["after"] = json!(["j-none"]);
    spec["data"]["validation"] = json!([{"name": "v", "source": "/etc/passwd"}]);
    let status = create(&client, "r1", &spec).await.unwrap_err();
    let texts: Vec<String> = faults(&status).iter().map(ToString::to_string).collect();
    assert_eq!(texts.len(), 4, "{texts:?}");
    for part in ["`after[0]`", "`base` is \"base:latest\"", "`data.domains[0].source`", "--data-root"] {
        assert!(texts.iter().any(|text| text.contains(part)), "{part} is not in {texts:?}");
    }
    // A host that a worker's client could be led to (A32): by another scheme, and by what is no bucket's name.
    let mut spec = job();
    spec["data"]["domains"][0]["source"] = json!("s3://127.0.0.1:80#/rows.jsonl");
    let mut spec = message(&spec);
    spec.base = "http://169.254.169.254/latest".to_owned();
    let status = create_message(&client, "r1", spec.clone()).await.unwrap_err();
    assert!(faults(&status).iter().any(|fault| fault.path.as_str() == "base"), "{status:?}");
    spec.base = "base".to_owned();
    let status = create_message(&client, "r1", spec).await.unwrap_err();
    let told = "`data.domains[0].source` names the bucket \"127.0.0.1:80#\"";
    assert!(faults(&status).iter().any(|fault| fault.to_string().starts_with(told)), "{status:?}");
    // What can be seen in the base.
    inputs(&client).await;
    let mut spec = job();
    spec["tune"]["adapter"]["targets"] = json!(["q_prj", "v_proj"]);
    let status = create(&client, "r1", &spec).await.unwrap_err();
    let found = faults(&status);
    assert_eq!(found[0].path.as_str(), "tune.adapter.targets[0]");
    assert!(found[0].message.contains("did you mean \"q_proj\""), "{found:?}");
    // What is there, but of another kind.
    let mut spec = job();
    spec["base"] = json!("rows");
    let status = create(&client, "r1", &spec).await.unwrap_err();
    assert!(status.message().contains("of kind dataset; expected a model"), "{status:?}");
    // None of these made a job.
    let jobs = client.jobs().list_jobs(v1::ListJobsRequest::default()).await.unwrap().into_inner().jobs;
    assert!(jobs.is_empty());
    assert_eq!(Class::of(&create(&client, "", &job()).await.unwrap_err()), Class::Invalid);
}

#[tokio::test]
async fn unknown_jobs_are_not_found_by_any_call() {
    let server = Server::start();
    let client = server.client().await;
    let (project, job_id) = (String::new(), "j-none".to_owned());
    let mut jobs = client.jobs();
    let mut classes = vec![Class::of(&get(&client, "j-none").await.unwrap_err())];
    let cancel = v1::CancelJobRequest { project: project.clone(), job_id: job_id.clone() };
    classes.push(Class::of(&jobs.cancel_job(cancel).await.unwrap_err()));
    let pause = v1::PauseJobRequest { project: project.clone(), job_id: job_id.clone() };
    classes.push(Class::of(&jobs.pause_job(pause).await.unwrap_err()));
    let resume = v1::ResumeJobRequest { project: project.clone(), job_id: job_id.clone() };
    classes.push(Class::of(&jobs.resume_job(resume).await.unwrap_err()));
    let retry = v1::RetryJobRequest { project: project.clone(), job_id: job_id.clone(), request_id: "r".to_owned() };
    classes.push(Class::of(&jobs.retry_job(retry).await.unwrap_err()));
    let watch = v1::WatchJobRequest { job_id: job_id.clone(), ..Default::default() };
    classes.push(Class::of(&jobs.watch_job(watch).await.unwrap_err()));
    let metrics = v1::ListMetricsRequest { job_id: job_id.clone(), ..Default::default() };
    classes.push(Class::of(&jobs.list_metrics(metrics).await.unwrap_err()));
    let stream = v1::StreamMetricsRequest { job_id: job_id.clone(), ..Default::default() };
    classes.push(Class::of(&jobs.stream_metrics(stream).await.unwrap_err()));
    assert_eq!(classes, [Class::NotFound; 8]);
    // A name that cannot be one is a fault of the request.
    assert_eq!(Class::of(&get(&client, "No Such/Job").await.unwrap_err()), Class::Invalid);
}

#[tokio::test]
async fn checking_a_job_tells_what_it_costs_and_makes_nothing() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let request = v1::CreateJobRequest { spec: Some(message(&job())), validate_only: true, ..Default::default() };
    let answer = client.jobs().create_job(request).await.unwrap().into_inner();
    assert!(answer.job.is_none());
    let forecast = answer.forecast.unwrap();
    // Per layer: q, k, v, o are 8x8, gate and up 16x8, down 8x16; rank 2 takes 2 (i + o) parameters at each.
    let per_layer = 2 * (4 * (8 + 8) + 3 * (8 + 16));
    assert_eq!(forecast.trainable_parameters, 2 * per_layer);
    // Embedding, per layer the linears and two norms, the last norm; the head is the embedding.
    assert_eq!(forecast.total_parameters, 32 * 8 + 2 * (4 * 64 + 3 * 128 + 2 * 8) + 8);
    assert_eq!((forecast.steps, forecast.tokens), (10, 320));
    assert!(forecast.memory_bytes > forecast.total_parameters * 4 && forecast.flops > 0.0);
    let jobs = client.jobs().list_jobs(v1::ListJobsRequest::default()).await.unwrap().into_inner().jobs;
    assert!(jobs.is_empty());
}

/// Steps of several passes cost as many, methods of blocks are counted by the widths of keys and with what their sites share.
#[tokio::test]
async fn what_a_method_costs_is_in_the_forecast() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    // One factor of rank 1 at the linears that are 16 wide and give 8.
    let down = |more: serde_json::Value| {
        let mut lora = json!({"method": "lora", "rank": 1, "trains": "b", "targets": ["down_proj"]});
        lora.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        lora
    };
    let mut forecasts = Vec::new();
    for (field, method) in [
        ("adapter", json!({"method": "lora", "rank": 2})),
        ("step", json!({"method": "smart"})),
        ("adapter", json!({"method": "prefix-tuning", "length": 3})),
        ("adapter", json!({"method": "compacter", "reduction": 2, "factors": 2})),
        ("adapter", down(json!({}))),
        ("adapter", down(json!({"init": {"method": "eva"}}))),
        ("adapter", down(json!({"init": {"method": "lora-ga"}}))),
        ("adapter", json!({"method": "full"})),
    ] {
        let mut job = job();
        job["tune"][field] = method;
        let request = v1::CreateJobRequest { spec: Some(message(&job)), validate_only: true, ..Default::default() };
        forecasts.push(client.jobs().create_job(request).await.unwrap().into_inner().forecast.unwrap());
    }
    let [lora, smart, prefix, compacter, thin, eva, lora_ga, full] = forecasts.as_slice() else {
        panic!("{forecasts:?}")
    };
    // One pass over two copies, and one over three.
    assert_eq!(smart.flops, 5.0 * lora.flops);
    assert!(smart.memory_bytes > lora.memory_bytes);
    // In two layers three keys and values of 8.
    assert_eq!(prefix.trainable_parameters, 2 * 2 * 3 * 8);
    // Four blocks of two maps of rank 1 between 8 and 4 with their biases, and once two times 2x2.
    assert_eq!(compacter.trainable_parameters, 4 * (2 * (8 + 4) + 4 + 8) + 8);
    // What is measured is gone before anything trains: the larger of the two counts. In each of two layers eight parameters take 18 bytes
    // and four for the gradient of each of two shards, and each of 32 rows a third of a number; half of a covariance takes 8 bytes a
    // number.
    let trained = 2 * 8 * (18 + 2 * 4) + 32 * 2 / 3 * 4;
    assert_eq!(eva.memory_bytes - thin.memory_bytes, 2 * 4 * (16 * 19) - trained);
    // Ranks that are shared by what inputs vary in cost as much to measure.
    let mut job = job();
    job["tune"]["adapter"] = down(json!({}));
    job["tune"]["budget"] = json!({"method": "sensitivity-lora", "least": 1});
    let request = v1::CreateJobRequest { spec: Some(message(&job)), validate_only: true, ..Default::default() };
    let shared = client.jobs().create_job(request).await.unwrap().into_inner().forecast.unwrap();
    assert_eq!(shared.memory_bytes, eva.memory_bytes);
    assert_eq!(shared.trainable_parameters, thin.trainable_parameters);
    // A head that is the embedding counts once.
    assert_eq!(full.trainable_parameters, full.total_parameters);
    assert_eq!(lora_ga.memory_bytes - thin.memory_bytes, 2 * 4 * 128 - trained);
}

/// Linears of blocks in four bits take half a byte a number and four a block of 64; embeddings and norms what they took. Where a
/// start quantises them anew the job has them twice.
#[tokio::test]
async fn few_bits_are_in_the_forecast() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let ask = async |quantization: Option<serde_json::Value>, init: Option<serde_json::Value>| {
        let mut job = job();
        job["tune"]["adapter"] = json!({"method": "lora", "rank": 1});
        job["tune"]["adapter"].as_object_mut().unwrap().extend(init.map(|init| ("init".to_owned(), init)));
        job["tune"].as_object_mut().unwrap().extend(quantization.map(|format| ("quantization".to_owned(), format)));
        let request = v1::CreateJobRequest { spec: Some(message(&job)), validate_only: true, ..Default::default() };
        client.jobs().create_job(request).await.unwrap().into_inner().forecast.unwrap().memory_bytes
    };
    let nf4 = json!({"method": "nf4"});
    let whole = ask(None, None).await;
    let few = ask(Some(nf4.clone()), None).await;
    let linears = 2 * (4 * (64 / 2 + 4) + 3 * (128 / 2 + 2 * 4));
    assert_eq!(whole - few, 2 * 4 * (4 * 64 + 3 * 128) - linears);
    assert_eq!(ask(Some(nf4.clone()), Some(json!({"method": "loftq"}))).await, few);
    assert_eq!(ask(Some(nf4), Some(json!({"method": "loftq", "iterations": 2}))).await, few + linears);
}

/// A surgery's sites, parameters and cost are those of the model that it makes.
#[tokio::test]
async fn a_job_with_a_surgery_is_judged_by_the_model_that_it_makes() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let ask = async |surgery, targets: &[&str]| {
        let mut job = job();
        job["tune"]["surgery"] = surgery;
        job["tune"]["adapter"] = json!({"method": "full", "targets": targets});
        let request = v1::CreateJobRequest { spec: Some(message(&job)), validate_only: true, ..Default::default() };
        client.jobs().create_job(request).await.map(|answer| answer.into_inner().forecast.unwrap())
    };
    let surgery = json!({"method": "dynamic-dino", "copies": 3, "granularity": 2});
    let forecast = ask(surgery.clone(), &["w1", "w2", "w3", "gate"]).await.unwrap();
    // In two layers three times the MLP's three matrices of 8 by 16, and a router of six rows.
    assert_eq!(forecast.trainable_parameters, 2 * (3 * 3 * 8 * 16 + 6 * 8));
    let rest = 32 * 8 + 2 * (4 * 64 + 2 * 8) + 8;
    assert_eq!(forecast.total_parameters, forecast.trainable_parameters + rest);
    let found = faults(&ask(surgery, &["gate_proj"]).await.unwrap_err());
    assert_eq!(found[0].path.as_str(), "tune.adapter.targets");
    assert!(found[0].message.contains("matches no site of this mixtral model"), "{found:?}");
    let found = faults(&ask(json!({"method": "dynamic-dino", "granularity": 3}), &["w1"]).await.unwrap_err());
    assert_eq!(found[0].path.as_str(), "tune.surgery");
    assert!(found[0].message.starts_with("makes `inner` 5.3"), "{found:?}");
}

#[tokio::test]
async fn paths_are_read_under_the_data_root_only() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    std::fs::create_dir(&base).unwrap();
    std::fs::write(base.join("config.json"), crate::fixtures::model_config().to_string()).unwrap();
    std::fs::write(folder.path().join("rows.jsonl"), "{\"text\": \"a\"}\n").unwrap();
    let root = folder.path().to_owned();
    let server = Server::start_with(|config| config.data_root = Some(root));
    let client = server.client().await;
    let mut spec = job();
    spec["base"] = json!(base.display().to_string());
    spec["data"]["domains"][0]["source"] = json!(folder.path().join("rows.jsonl").display().to_string());
    let made = create(&client, "r1", &spec).await.unwrap();
    assert!(made.spec.unwrap().base.starts_with("file:///"));
    spec["data"]["domains"][0]["source"] = json!(folder.path().join("../../etc/passwd").display().to_string());
    let status = create(&client, "r2", &spec).await.unwrap_err();
    assert!(status.message().contains("data.domains[0].source"), "{status:?}");
}
