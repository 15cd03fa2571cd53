//! The main job through the command line: `up`, `submit --watch`, results, lineage, a sample answer.

use std::path::Path;

use attune_proto::v1::JobState;
use serde_json::Value;

use crate::support::{Cluster, SMALL, outputs, world};

fn text(output: &std::process::Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[tokio::test]
async fn a_base_and_an_adapter_are_trained_stored_traced_and_spoken_to() {
    let cluster = Cluster::start().await;
    world(&cluster.path("world"));
    let set = |changes: &[&'static str]| {
        let all = SMALL.iter().chain(changes).flat_map(|change| ["--set", change]).map(str::to_owned);
        all.collect::<Vec<_>>()
    };
    let submit = |file: &str, changes: &[&'static str]| {
        let arguments = ["submit", file, "--watch"].map(str::to_owned);
        cluster.run(arguments.into_iter().chain(set(changes)))
    };
    let full = submit("world/text.yaml", &["tune.steps=6", "tune.evaluate.every_steps=3"]);
    assert!(full.status.success(), "{full:?}\n{}", cluster.logs());
    let lines = text(&full);
    assert!(lines.contains("validation loss of world: "), "{lines}");
    let watched = String::from_utf8(full.stderr.clone()).unwrap();
    for state in ["queued", "starting", "running", "succeeded"] {
        assert!(watched.contains(state), "{watched}");
    }

    let lora = submit("world/chat.yaml", &["tune.steps=6", "tune.checkpoint.every_steps=3", "outputs.merged=true"]);
    assert!(lora.status.success(), "{lora:?}\n{}", cluster.logs());
    let id = text(&lora).lines().next().unwrap().to_owned();
    let job = cluster.job(&id).await.unwrap();
    assert_eq!(job.state(), JobState::Succeeded);
    let roles: Vec<_> = outputs(&job).into_keys().collect();
    assert_eq!(roles, ["adapter", "merged", "report"]);

    // The tag moved, the adapter is in PEFT's layout, its lineage leads to the data.
    let adapter = cluster.json(["artifacts", "get", "demo-guide:latest"]);
    assert_eq!(adapter["digest"], Value::from(outputs(&job)["adapter"].clone()));
    for fact in ["tokens", "peak_memory_bytes"] {
        assert!(adapter["commit"]["facts"][fact].as_u64().unwrap() > 0, "{fact}: {adapter}");
    }
    let files: Vec<_> =
        adapter["files"].as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap()).collect();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        assert!(files.contains(&file), "{files:?}");
    }
    let lineage = cluster.json(["artifacts", "lineage", "demo-guide:latest"]);
    let roles: Vec<_> =
        lineage["edges"].as_array().unwrap().iter().map(|edge| edge["role"].as_str().unwrap()).collect();
    for role in ["base", "data.chat", "data.world", "validation.chat"] {
        assert!(roles.contains(&role), "{roles:?}");
    }
    let down = cluster.json(["artifacts", "lineage", "demo-base:latest", "--descendants"]);
    assert!(down["artifacts"].as_array().unwrap().len() >= 3, "{down}");

    // What was pulled is what was pushed, byte for byte, and speaks.
    let data = cluster.json(["artifacts", "push", "world/chat.train.jsonl", "--tag", "chats"]);
    let pulled = cluster.run(["artifacts", "pull", "chats", "pulled"]);
    assert!(pulled.status.success(), "{pulled:?}");
    let read = |path: &Path| std::fs::read(path).unwrap();
    assert_eq!(read(&cluster.path("pulled/chat.train.jsonl")), read(&cluster.path("world/chat.train.jsonl")));
    assert_eq!(data["created"], Value::Bool(false), "the job pushed it before");
    for reference in ["demo-guide:latest", "adapter"] {
        if reference == "adapter" {
            assert!(cluster.run(["artifacts", "pull", "demo-guide:latest", "adapter"]).status.success());
        }
        let cache = cluster.path("cache");
        let said = crate::support::attune()
            .args(["generate", "--base", "demo-base:latest", "--adapter", reference])
            .args(["--prompt", "Hello?", "--max-tokens", "4"])
            .env("ATTUNE_SERVER", cluster.url())
            .env("ATTUNE_CACHE", cache)
            .current_dir(cluster.folder.path())
            .output()
            .unwrap();
        assert!(said.status.success(), "{said:?}");
    }

    // What was measured can be read back.
    let losses = cluster.run(["--json", "jobs", "metrics", &id, "--name", "train/loss"]);
    let steps: Vec<_> = text(&losses)
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
    let listed = cluster.json(["jobs", "list", "--state", "succeeded"]);
    assert_eq!(listed.as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_job_is_paused_resumed_and_cancelled() {
    let cluster = Cluster::start().await;
    world(&cluster.path("world"));
    let set = SMALL.into_iter().chain(["tune.steps=100000"]).collect::<Vec<_>>();
    let id = cluster.submit(&cluster.path("world/text.yaml"), &set);
    let progressed = |least: u64| {
        move |job: &attune_proto::v1::Job| job.progress.as_ref().is_some_and(|progress| progress.step > least)
    };
    cluster.wait(&id, "progress", progressed(2)).await;
    assert!(cluster.run(["jobs", "pause", &id]).status.success());
    let paused = cluster.wait(&id, "pause", |job| job.state() == JobState::Paused).await;
    assert!(!paused.checkpoint.is_empty(), "{paused:#?}");
    let at = paused.progress.unwrap().step;
    assert!(cluster.run(["jobs", "resume", &id]).status.success());
    cluster.wait(&id, "progress beyond the pause", progressed(at + 2)).await;
    assert!(cluster.run(["jobs", "cancel", &id]).status.success());
    let cancelled = cluster.ends(&id, JobState::Cancelled).await;
    assert!(cancelled.outputs.is_empty());
    // A final state never changes.
    let again = cluster.run(["jobs", "resume", &id]);
    assert_eq!(again.status.code(), Some(1), "{again:?}");
}

#[tokio::test]
async fn a_job_that_nobody_can_run_says_why_while_it_is_watched() {
    use std::io::{BufRead as _, BufReader};
    let cluster = Cluster::start().await;
    world(&cluster.path("world"));
    let set = SMALL.into_iter().chain(["tune.steps=1", "resources.devices_per_worker=2"]);
    let mut watching = crate::support::attune()
        .args(["submit", "world/text.yaml", "--watch"].into_iter().chain(set.flat_map(|set| ["--set", set])))
        .env("ATTUNE_SERVER", cluster.url())
        .current_dir(cluster.folder.path())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(watching.stderr.take().unwrap()).lines();
    let said = lines.map_while(Result::ok).find(|line| line.contains("no worker"));
    watching.kill().unwrap();
    watching.wait().unwrap();
    assert_eq!(
        said.unwrap(),
        "queued: submitted; no worker has as many devices of the kind, and the labels, that it asks for"
    );
}
