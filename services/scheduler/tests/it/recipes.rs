//! Jobs that are recipes: from the call that makes one to the results of its last stage, whatever happens on the way.

use std::time::Duration;

use attune_proto::Client;
use attune_proto::error::faults;
use attune_proto::v1::{self, FailureCause, JobReason, JobState, attempt_finished::Outcome, job_event::Event};
use serde_json::{Value, json};

use crate::fixtures::{create, events, get, inputs, job, message, until};
use crate::server::Server;
use crate::worker::{Worker, attempt, register, running};

/// Two stages, the second on what the first made.
fn recipe() -> Value {
    let mut recipe = job();
    recipe["kind"] = json!("recipe");
    recipe["recipe"] = json!({"method": "pipeline", "stages": [
        {"name": "first"},
        {"name": "second", "set": {"tune": {"adapter": {"from": "${stages.first.adapter}"}, "steps": 4}}},
    ]});
    recipe
}

/// The job of a stage, once it is made.
async fn stage(client: &Client, parent: &str, name: &str) -> String {
    for _ in 0..400 {
        let stages = get(client, parent).await.unwrap().stages;
        let found = stages.into_iter().find(|stage| stage.name == name).unwrap();
        if !found.job_id.is_empty() {
            return found.job_id;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("{parent} has no stage {name}");
}

async fn stages_of(client: &Client, parent: &str) -> Vec<v1::Job> {
    let request = v1::ListJobsRequest { parent_job_id: parent.to_owned(), ..Default::default() };
    client.jobs().list_jobs(request).await.unwrap().into_inner().jobs
}

#[tokio::test]
async fn a_recipe_runs_stage_after_stage_and_ends_with_the_results_of_the_last() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let made = create(&client, "r1", &recipe()).await.unwrap();
    assert_eq!((made.state(), made.reason()), (JobState::Waiting, JobReason::StagesPending));
    assert_eq!(create(&client, "r1", &recipe()).await.unwrap().job_id, made.job_id);
    let mut worker = Worker::connect(&client, "w-1").await;
    let offer = worker.offer().await;
    let first = get(&client, &attempt(&offer).job_id).await.unwrap();
    assert_eq!((first.parent_job_id.as_str(), first.stage.as_str()), (made.job_id.as_str(), "first"));
    assert_eq!(first.spec.as_ref().unwrap().name, "test-job.first");
    let planned = get(&client, &made.job_id).await.unwrap().stages;
    assert_eq!((planned[1].name.as_str(), planned[1].job_id.as_str()), ("second", ""));
    assert_eq!(planned[1].after, ["first"]);
    worker.begin(&attempt(&offer)).await;
    let adapter = worker.succeed(&offer).await;

    let offer = worker.offer().await;
    let second = get(&client, &attempt(&offer).job_id).await.unwrap();
    assert_eq!((second.parent_job_id.as_str(), second.stage.as_str()), (made.job_id.as_str(), "second"));
    let tune = second.spec.unwrap().tune.unwrap();
    assert_eq!(tune.adapter.unwrap().from, Some(adapter.clone()), "the adapter by its digest");
    assert_eq!(offer.attempts[0].inputs.iter().filter(|input| input.digest == adapter).count(), 1);
    worker.begin(&attempt(&offer)).await;
    let result = worker.succeed(&offer).await;

    let done = until(&client, &made.job_id, JobState::Succeeded).await;
    assert_eq!(done.reason(), JobReason::Finished);
    assert_eq!(done.outputs, [v1::JobOutput { role: "adapter".to_owned(), digest: result.clone() }]);
    assert!(done.stages.iter().all(|stage| stage.state() == JobState::Succeeded));
    let tagged = v1::GetArtifactRequest { project: String::new(), reference: "result".to_owned() };
    let artifact = client.artifacts().get_artifact(tagged).await.unwrap().into_inner().artifact.unwrap();
    assert_eq!(artifact.digest, result, "the tag moved to the last stage's result");
    assert_eq!(stages_of(&client, &made.job_id).await.len(), 2);

    let told: Vec<(String, JobState)> = events(&client, &made.job_id, 0, usize::MAX)
        .await
        .into_iter()
        .filter_map(|event| match event.event {
            Some(Event::StageChange(change)) => Some((change.stage.clone(), change.state())),
            _ => None,
        })
        .collect();
    let of = |stage: &str, state| (stage.to_owned(), state);
    let wanted = [
        of("first", JobState::Queued),
        of("first", JobState::Succeeded),
        of("second", JobState::Queued),
        of("second", JobState::Succeeded),
    ];
    assert_eq!(told, wanted);
}

#[tokio::test]
async fn a_scheduler_that_is_killed_between_stages_or_within_one_goes_on_with_the_next() {
    let mut server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let made = create(&client, "r1", &recipe()).await.unwrap();
    let mut worker = Worker::connect(&client, "w-1").await;
    let offer = worker.offer().await;
    worker.begin(&attempt(&offer)).await;
    // Within a stage.
    server.kill();
    server.restart().await;
    let client = server.client().await;
    let with = v1::Register { running: vec![running(&offer)], ..register("w-1") };
    let mut worker = Worker::connect_with(&client, with).await.0.go_on(&worker);
    let digest = worker.output(&attempt(&offer), "adapter", Default::default()).await.unwrap();
    let outputs = vec![v1::JobOutput { role: "adapter".to_owned(), digest }];
    worker.finish(&attempt(&offer), Outcome::Succeeded(v1::AttemptSucceeded { outputs })).await;
    // Right after its end was recorded.
    server.kill();
    server.restart().await;
    let client = server.client().await;
    let mut worker = Worker::connect(&client, "w-1").await.go_on(&worker);
    let offer = worker.offer().await;
    assert_eq!(attempt(&offer).job_id, stage(&client, &made.job_id, "second").await);
    worker.begin(&attempt(&offer)).await;
    worker.succeed(&offer).await;
    until(&client, &made.job_id, JobState::Succeeded).await;
    let stages = stages_of(&client, &made.job_id).await;
    assert!(stages.len() == 2 && stages.iter().all(|stage| stage.epoch == 1), "none is lost or made twice");
}

#[tokio::test]
async fn a_stage_that_fails_fails_the_recipe_with_its_reason() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let made = create(&client, "r1", &recipe()).await.unwrap();
    let mut worker = Worker::connect(&client, "w-1").await;
    let offer = worker.offer().await;
    worker.fail(&attempt(&offer), FailureCause::DataFault, "2 rows cannot be used").await;
    let failed = until(&client, &made.job_id, JobState::Failed).await;
    assert_eq!(failed.reason(), JobReason::StageFailed);
    assert_eq!(failed.message, "stage first failed: 2 rows cannot be used");
    let failure = failed.failure.unwrap();
    assert_eq!((failure.cause(), failure.message.as_str()), (FailureCause::DataFault, "2 rows cannot be used"));
    assert_eq!(stages_of(&client, &made.job_id).await.len(), 1, "no other stage is made");
    // Tried again by a person: another recipe with stages of its own.
    let retry =
        v1::RetryJobRequest { project: String::new(), job_id: made.job_id.clone(), request_id: "again".to_owned() };
    let again = client.jobs().retry_job(retry).await.unwrap().into_inner().job.unwrap();
    worker.release(offer.cohort_id).await;
    let offer = worker.offer().await;
    assert_eq!(attempt(&offer).job_id, stage(&client, &again.job_id, "first").await);
}

#[tokio::test]
async fn cancelling_a_recipe_ends_its_stages() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let made = create(&client, "r1", &recipe()).await.unwrap();
    let mut worker = Worker::connect(&client, "w-1").await;
    let offer = worker.offer().await;
    worker.begin(&attempt(&offer)).await;
    let cancel = v1::CancelJobRequest { project: String::new(), job_id: made.job_id.clone() };
    let cancelled = client.jobs().cancel_job(cancel).await.unwrap().into_inner().job.unwrap();
    assert_eq!(cancelled.state(), JobState::Cancelled);
    let stopped = v1::AttemptStopped { purpose: v1::StopPurpose::Cancel as i32, checkpoint: None };
    worker.finish(&attempt(&offer), Outcome::Stopped(stopped)).await;
    let first = until(&client, &attempt(&offer).job_id, JobState::Cancelled).await;
    assert_eq!(first.reason(), JobReason::ParentEnded);
    let pause = v1::PauseJobRequest { project: String::new(), job_id: made.job_id };
    assert!(client.jobs().pause_job(pause).await.is_err());
}

/// All stages that are known are looked at when the recipe is submitted, and what is wrong is told where it was written.
#[tokio::test]
async fn a_bad_stage_is_refused_at_once() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut bad = recipe();
    let second = &mut bad["recipe"]["stages"][1]["set"];
    *second = json!({
        "base": "rows",
        "data": {"domains": [{"name": "rows", "source": "nothing"}]},
        "tune": {"adapter": {"method": "lora", "targets": ["q_prj"]}},
    });
    let status = create(&client, "r1", &bad).await.unwrap_err();
    let texts: Vec<String> = faults(&status).iter().map(ToString::to_string).collect();
    for part in [
        "`recipe.stages[1].set.base` is \"rows:latest\", an artifact of kind dataset; expected a model",
        "`recipe.stages[1].set.data.domains[0].source` is \"nothing:latest\", which is no tag",
    ] {
        assert!(texts.iter().any(|text| text.contains(part)), "{part} is not in {texts:?}");
    }
    bad["recipe"]["stages"][1]["set"] = json!({"tune": {"adapter": {"method": "lora", "targets": ["q_prj"]}}});
    let status = create(&client, "r1", &bad).await.unwrap_err();
    let found = faults(&status);
    assert_eq!(found[0].path.as_str(), "recipe.stages[1].set.tune.adapter.targets[0]");
    // What no server has to be asked for comes with everything else from the specification.
    let mut spec = message(&recipe());
    let unknown = prost_types::Value { kind: Some(prost_types::value::Kind::NumberValue(1.0)) };
    spec.recipe.as_mut().unwrap().params.as_mut().unwrap().fields.insert("stags".to_owned(), unknown);
    let status = crate::fixtures::create_message(&client, "r1", spec).await.unwrap_err();
    assert!(faults(&status)[0].to_string().contains("`recipe.stags` is not a known field"), "{status:?}");
    let jobs = client.jobs().list_jobs(v1::ListJobsRequest::default()).await.unwrap().into_inner().jobs;
    assert!(jobs.is_empty());
}

/// What a stage names may be gone when its turn comes: then the recipe says so.
#[tokio::test]
async fn a_stage_that_cannot_be_made_fails_the_recipe() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let made = create(&client, "r1", &recipe()).await.unwrap();
    let mut worker = Worker::connect(&client, "w-1").await;
    let offer = worker.offer().await;
    worker.begin(&attempt(&offer)).await;
    // A result of another role than the next stage names.
    let digest = worker.output(&attempt(&offer), "model", Default::default()).await.unwrap();
    let outputs = vec![v1::JobOutput { role: "model".to_owned(), digest }];
    worker.finish(&attempt(&offer), Outcome::Succeeded(v1::AttemptSucceeded { outputs })).await;
    let failed = until(&client, &made.job_id, JobState::Failed).await;
    assert_eq!(
        (failed.reason(), failed.failure.as_ref().map(|f| f.cause())),
        (JobReason::Failure, Some(FailureCause::SpecFault))
    );
    assert!(failed.message.contains("which stage first did not make"), "{}", failed.message);
}
