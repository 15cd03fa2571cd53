//! Recipes: an adapter for answers, then one for preferences over it; with the scheduler killed within a stage and between two,
//! cancelled, and with a stage that fails; a skill beside what knows; a preset.

use std::collections::BTreeMap;

use attune_proto::v1::{self, JobState};
use serde_json::Value;

use crate::kills::prepare;
use crate::support::{Cluster, PATIENCE, outputs};

/// Two stages on the demonstration's world.
const RECIPE: &str = r#"
version: 1
name: atlas
kind: recipe
base: "demo-base:latest"
data:
  domains: [{name: chat, source: ./chat.train.jsonl}]
  max_length: 64
tune: {optimizer: {method: adamw, lr: 5e-3}, batch_tokens: 256, logical_shards: 2, steps: 40, checkpoint: {every_steps: 10}, seed: 7}
limits: {max_attempts: 100}
outputs: {tag: "atlas:latest", merged: true}
recipe:
  method: pipeline
  stages:
    - name: answers
      set: {tune: {adapter: {method: lora, rank: 4, alpha: 8}}}
    - name: preferences
      set:
        data: {domains: [{name: pairs, form: preference, source: ./preference.train.jsonl}]}
        tune:
          stack:
            - {name: answers, from: "${stages.answers.adapter}", train: false}
            - {name: preferences, method: lora, rank: 4, alpha: 8}
          objective: {method: dpo, beta: 0.1}
"#;

async fn submit(cluster: &Cluster, text: &str, set: &[&str]) -> String {
    prepare(cluster).await;
    let file = cluster.path("world/recipe.yaml");
    std::fs::write(&file, text).unwrap();
    cluster.submit(&file, set)
}

/// The id of a stage, once the stage is in a state that `fits`.
async fn stage(cluster: &Cluster, id: &str, name: &str, fits: impl Fn(JobState) -> bool) -> String {
    let of = |job: &v1::Job| job.stages.iter().find(|stage| stage.name == name).cloned();
    let job = cluster.wait(id, name, |job| of(job).is_some_and(|stage| fits(stage.state()))).await;
    of(&job).unwrap().job_id
}

async fn undisturbed(cluster: &Cluster) -> BTreeMap<String, String> {
    let id = submit(cluster, RECIPE, &[]).await;
    outputs(&cluster.ends(&id, JobState::Succeeded).await)
}

#[tokio::test]
async fn a_recipe_ends_with_the_same_adapter_whenever_the_scheduler_is_killed() {
    let quiet = Cluster::start().await;
    let expected = undisturbed(&quiet).await;
    let roles: Vec<&str> = expected.keys().map(String::as_str).collect();
    assert_eq!(roles, ["adapter", "merged", "report"]);
    drop(quiet);

    let mut cluster = Cluster::start().await;
    let id = submit(&cluster, RECIPE, &[]).await;
    // In the middle of the first stage.
    let first = stage(&cluster, &id, "answers", |state| state == JobState::Running).await;
    cluster.wait(&first, "step", |job| job.progress.as_ref().is_some_and(|progress| progress.step > 2)).await;
    cluster.scheduler.take().unwrap().kill();
    // It dies again where it would make the second.
    cluster.start_scheduler(&[("FAILPOINTS", "scheduler::before_stage=return(kill)")]).await;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !cluster.scheduler.as_mut().unwrap().has_ended() {
        assert!(tokio::time::Instant::now() < deadline, "the second stage is not reached\n{}", cluster.logs());
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    cluster.start_scheduler(&[]).await;
    // In the middle of the second.
    let second = stage(&cluster, &id, "preferences", |state| state == JobState::Running).await;
    cluster.wait(&second, "step", |job| job.progress.as_ref().is_some_and(|progress| progress.step > 2)).await;
    cluster.scheduler.take().unwrap().kill();
    cluster.start_scheduler(&[]).await;
    let found = outputs(&cluster.ends(&id, JobState::Succeeded).await);
    assert_eq!(found, expected);
    let stages = cluster.json(["jobs", "list", "--parent", &id]);
    assert_eq!(stages.as_array().unwrap().len(), 2, "no stage was made twice: {stages}");
    let tagged = cluster.json(["artifacts", "get", "atlas:latest"]);
    assert_eq!(tagged["digest"], Value::from(found["adapter"].clone()));

    // What people see of it.
    let shown = String::from_utf8(cluster.run(["jobs", "get", &id]).stdout).unwrap();
    for line in
        [format!("stage       answers succeeded: {first}"), format!("stage       preferences succeeded: {second}")]
    {
        assert!(shown.contains(&line), "{shown}");
    }
    let watched = cluster.run(["jobs", "watch", &id]);
    assert!(watched.status.success(), "{watched:?}");
    let told = String::from_utf8(watched.stderr).unwrap();
    for line in ["waiting: its stages have not all ended yet", "stage answers succeeded", "stage preferences queued"] {
        assert!(told.contains(line), "{line}: {told}");
    }
    let of = cluster.json(["jobs", "get", &second]);
    assert_eq!((&of["parent"], &of["stage"]), (&Value::from(id), &Value::from("preferences")));
}

#[tokio::test]
async fn cancelling_a_recipe_stops_the_stage_that_runs() {
    let cluster = Cluster::start().await;
    let id = submit(&cluster, RECIPE, &["tune.steps=100000"]).await;
    let first = stage(&cluster, &id, "answers", |state| state == JobState::Running).await;
    let cancelled = cluster.json(["jobs", "cancel", &id]);
    assert_eq!(cancelled["state"], "cancelled");
    let job = cluster.ends(&first, JobState::Cancelled).await;
    assert_eq!(job.reason(), v1::JobReason::ParentEnded);
    let stages = cluster.json(["jobs", "list", "--parent", &id]);
    assert_eq!(stages.as_array().unwrap().len(), 1, "{stages}");
}

#[tokio::test]
async fn a_stage_that_fails_is_why_the_recipe_fails() {
    let cluster = Cluster::start().await;
    // Texts are no pairs, which shows when the second stage reads them.
    let wrong = RECIPE
        .replace("form: preference, source: ./preference.train.jsonl", "form: preference, source: ./text.train.jsonl");
    let id = submit(&cluster, &wrong, &["tune.steps=3"]).await;
    let failed = cluster.ends(&id, JobState::Failed).await;
    assert_eq!(failed.reason(), v1::JobReason::StageFailed);
    assert!(failed.message.starts_with("stage preferences failed: "), "{}", failed.message);
    assert_eq!(failed.failure.unwrap().cause(), v1::FailureCause::DataFault);
    let watched = cluster.run(["jobs", "watch", &id]);
    let told = String::from_utf8(watched.stderr).unwrap();
    assert!(watched.status.code() == Some(1) && told.contains("`chosen` is missing"), "{told}");

    // One that can be known to fail is refused with its place in the file.
    let bad = RECIPE.replace("method: dpo, beta: 0.1", "method: dpo, beta: -1");
    std::fs::write(cluster.path("world/bad.yaml"), bad).unwrap();
    for command in ["validate", "submit"] {
        let refused = cluster.run([command, "world/bad.yaml"]);
        let told = String::from_utf8(refused.stderr).unwrap();
        assert!(refused.status.code() == Some(2), "{told}");
        assert!(told.contains("recipe.stages[1].set.tune.objective.beta"), "{told}");
    }
}

/// Two adapters that know the world in two forms, and a skill that is learned beside them.
const PREREQUISITES: &str = r#"
version: 1
name: manners
kind: recipe
base: "demo-base:latest"
data:
  domains: [{name: chat, source: ./chat.train.jsonl}]
  validation: [{name: chat, source: ./chat.valid.jsonl, rows: 4}]
  max_length: 64
tune: {adapter: {method: lora, rank: 4, alpha: 8}, optimizer: {method: adamw, lr: 5e-3}, batch_tokens: 256, logical_shards: 2, steps: 8, seed: 7}
outputs: {tag: "manners:latest"}
recipe:
  method: prereq-tune
  learn: {adapter: {rank: 8}, steps: 5}
  knowledge:
    - {name: texts, source: ./text.train.jsonl, domains: [chat]}
    - {name: further-texts, source: ./text.valid.jsonl, domains: [chat]}
"#;

#[tokio::test]
async fn a_skill_is_learned_beside_adapters_that_know_and_is_the_result_alone() {
    let cluster = Cluster::start().await;
    let id = submit(&cluster, PREREQUISITES, &[]).await;
    let job = cluster.ends(&id, JobState::Succeeded).await;
    let names: Vec<&str> = job.stages.iter().map(|stage| stage.name.as_str()).collect();
    assert_eq!(names, ["texts", "further-texts", "skill"]);
    let mut made = Vec::new();
    for stage in &job.stages {
        made.push(outputs(&cluster.job(&stage.job_id).await.unwrap())["adapter"].clone());
    }
    assert_eq!(outputs(&job)["adapter"], made[2]);
    let lineage = cluster.json(["artifacts", "lineage", "manners:latest"]);
    let edges = lineage["edges"].as_array().unwrap();
    for known in &made[..2] {
        assert!(edges.iter().any(|edge| edge["input"] == known.as_str()), "{known} is no cause: {lineage}");
    }
    // The result needs neither of them.
    let said = cluster.run([
        "generate",
        "--base",
        "demo-base:latest",
        "--adapter",
        "manners:latest",
        "--prompt",
        "Hello?",
        "--max-tokens",
        "4",
    ]);
    assert!(said.status.success(), "{said:?}");
}

/// A stack of two by the name of a preset.
const PRESET: &str = r#"
version: 1
name: two-places
kind: recipe
base: "demo-base:latest"
data:
  domains: [{name: chat, source: ./chat.train.jsonl}]
  validation: [{name: chat, source: ./chat.valid.jsonl, rows: 8}]
  max_length: 64
tune: {optimizer: {method: adamw, lr: 5e-3}, batch_tokens: 256, logical_shards: 2, steps: 30, seed: 7}
outputs: {tag: "two-places:latest"}
recipe: {method: mam, length: 4, hidden: 16, rank: 24, scale: 2}
"#;

#[tokio::test]
async fn a_preset_is_the_stack_that_it_stands_for() {
    let cluster = Cluster::start().await;
    let id = submit(&cluster, PRESET, &[]).await;
    let found = outputs(&cluster.ends(&id, JobState::Succeeded).await);

    // What is shown before is what runs: the stack, written out.
    let shown = cluster.json(["validate", "world/recipe.yaml"]);
    let stack = shown["stages"][0]["stack"].clone();
    assert_eq!((&shown["valid"], stack.as_array().unwrap().len()), (&Value::Bool(true), 2));
    let said = String::from_utf8(cluster.run(["validate", "world/recipe.yaml"]).stdout).unwrap();
    assert!(said.contains("\n  stage tune: {") && said.contains("method: prefix-tuning"), "{said}");
    let (head, _) = PRESET.split_once("recipe: {method").unwrap();
    let plain = head
        .replace("kind: recipe", "kind: tune")
        .replace("two-places", "two-places.tune")
        .replace("two-places.tune:latest", "written-out:latest");
    let plain = plain.replace("tune: {", &format!("tune: {{stack: {stack}, "));
    std::fs::write(cluster.path("world/plain.yaml"), plain).unwrap();
    let plain = cluster.submit(&cluster.path("world/plain.yaml"), &[]);
    let mut expected = outputs(&cluster.ends(&plain, JobState::Succeeded).await);
    let mut found_adapters = found.clone();
    for outputs in [&mut expected, &mut found_adapters] {
        outputs.remove("report");
    }
    assert!(!expected.is_empty());
    assert_eq!(found_adapters, expected, "the same bytes");

    // It learned.
    let stage = cluster.job(&id).await.unwrap().stages[0].job_id.clone();
    let told = cluster.run(["--json", "jobs", "metrics", &stage, "--name", "train/loss"]);
    let text = String::from_utf8(told.stdout).unwrap();
    let losses: Vec<f64> =
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["value"].as_f64().unwrap()).collect();
    assert_eq!(losses.len(), 30, "{text}");
    assert!(losses[29] < losses[0] - 0.1, "{losses:?}");

    for (right, wrong, told) in [
        ("rank: 24", "rnak: 24", "`recipe.rnak` is not a known field; did you mean \"rank\"?"),
        ("length: 4", "length: 0", "`recipe.length` is 0; expected 1 or more"),
        ("rank: 24", "rank: 24, mlps: mpl", "`recipe.mlps` \"mpl\" matches no site"),
    ] {
        std::fs::write(cluster.path("world/bad.yaml"), PRESET.replace(right, wrong)).unwrap();
        let refused = cluster.run(["submit", "world/bad.yaml"]);
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(refused.status.code() == Some(2) && said.contains(told), "{said}");
    }
}

/// Rates of which one learns, beside one job whose data is of another form: texts are no pairs.
const SWEEP: &str = r#"
version: 1
name: rates
kind: recipe
base: "demo-base:latest"
data:
  domains: [{name: chat, source: ./chat.train.jsonl}]
  validation: [{name: chat, source: ./chat.valid.jsonl, rows: 8}]
  max_length: 64
tune: {adapter: {method: lora, rank: 4, alpha: 8}, optimizer: {method: adamw, lr: 1e-3}, batch_tokens: 256, logical_shards: 2, steps: 12, seed: 7}
outputs: {tag: "best:latest"}
recipe:
  method: sweep
  vary:
    - name: data
      values:
        fitting: {}
        texts-for-pairs:
          data.domains: [{name: pairs, form: preference, source: ./text.train.jsonl}]
          tune.objective: {method: dpo}
    - {name: lr, field: tune.optimizer.lr, values: [1e-5, 1e-2, 1e-4]}
  at_once: 2
  may_fail: 3
"#;

/// However often the scheduler dies: each combination is one job, no more run at a time than may, and the best adapter is the result.
#[tokio::test]
async fn a_sweep_ends_with_the_best_of_its_jobs() {
    let mut cluster = Cluster::start().await;
    let id = submit(&cluster, SWEEP, &[]).await;
    let first = stage(&cluster, &id, "1.fitting.0p00001", |state| state == JobState::Running).await;
    cluster.scheduler.take().unwrap().kill();
    cluster.start_scheduler(&[]).await;
    cluster.ends(&first, JobState::Succeeded).await;
    cluster.scheduler.take().unwrap().kill();
    cluster.start_scheduler(&[]).await;
    let job = cluster.ends(&id, JobState::Succeeded).await;
    let names: Vec<(&str, JobState)> = job.stages.iter().map(|stage| (stage.name.as_str(), stage.state())).collect();
    let expected = [
        ("1.fitting.0p00001", JobState::Succeeded),
        ("2.fitting.0p01", JobState::Succeeded),
        ("3.fitting.0p0001", JobState::Succeeded),
        ("4.texts-for-pairs.0p00001", JobState::Failed),
        ("5.texts-for-pairs.0p01", JobState::Failed),
        ("6.texts-for-pairs.0p0001", JobState::Failed),
    ];
    assert_eq!(names, expected);
    let best = outputs(&cluster.job(&job.stages[1].job_id).await.unwrap());
    assert_eq!(outputs(&job), best, "the largest rate learns most in so few steps");
    assert_eq!(cluster.json(["artifacts", "get", "best:latest"])["digest"], Value::from(best["adapter"].clone()));
    let labelled = cluster.json(["jobs", "list", "--label", "lr=0.01", "--parent", &id]);
    assert_eq!(labelled.as_array().unwrap().len(), 2, "{labelled}");

    let told = String::from_utf8(cluster.run(["jobs", "watch", &id]).stderr).unwrap();
    let (mut open, mut most) = (0, 0);
    for line in told.lines().filter(|line| line.contains("  stage ")) {
        if line.contains(" queued: ") {
            open += 1;
        } else if [" succeeded: ", " failed: "].iter().any(|end| line.contains(end)) {
            open -= 1;
        }
        most = most.max(open);
    }
    assert_eq!((open, most), (0, 2), "{told}");
}

#[tokio::test]
async fn a_sweep_of_which_too_many_fail_ends_at_once() {
    let cluster = Cluster::start().await;
    let texts_first = SWEEP.replace("        fitting: {}\n", "").replace("may_fail: 3", "may_fail: 1");
    let id = submit(&cluster, &texts_first, &[]).await;
    let failed = cluster.ends(&id, JobState::Failed).await;
    assert_eq!(failed.reason(), v1::JobReason::StageFailed);
    assert!(failed.message.contains(" failed: "), "{}", failed.message);
    assert!(failed.stages.iter().all(|stage| stage.state() != JobState::Succeeded), "{:?}", failed.stages);
}
