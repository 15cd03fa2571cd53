//! A grid of jobs, and a search in a space of them, whose command is killed on the way, goes on with what is missing, and makes no job
//! twice.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::kills::prepare;
use crate::support::{Cluster, PATIENCE, Process, attune, world};

const GRID: &str = r#"
version: 1
name: small-grid
job: ./world/text.yaml
vary:
  - name: kind
    values:
      right: {tune.optimizer.lr: 1e-2, tune.steps: 3, tune.batch_tokens: 256, data.max_length: 64, tune.logical_shards: 2}
      wrong: {"data.domains[0].form": preference, tune.steps: 3}
  - {name: seed, field: tune.seed, values: [0, 1]}
report: {mean_over: [seed]}
"#;

fn records(file: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The command that runs the grid in `grid.yaml`, with a folder of its own.
fn run(cluster: &Cluster, to: &str, more: &[&str]) -> Command {
    let mut command = attune();
    command.args(["experiment", "run", "grid.yaml", "--to", to]).args(more);
    command
        .env("ATTUNE_SERVER", cluster.url())
        .env("ATTUNE_CACHE", cluster.path("cache"))
        .current_dir(cluster.folder.path());
    command
}

/// Runs the grid until so many of its jobs have results, and kills the command.
async fn killed_after(cluster: &Cluster, to: &str, count: usize) {
    let results = cluster.path(to).join("results.jsonl");
    let mut process = Process::start(&mut run(cluster, to, &[]), &cluster.path("grid.log"));
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while records(&results).len() < count {
        assert!(
            !process.has_ended() || records(&results).len() >= count,
            "it ended: {:?}",
            std::fs::read_to_string(cluster.path("grid.log"))
        );
        assert!(tokio::time::Instant::now() < deadline, "no record: {}", cluster.logs());
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    process.kill();
}

#[tokio::test]
async fn a_grid_that_was_killed_goes_on_with_what_is_missing() {
    let cluster = Cluster::start().await;
    world(&cluster.path("world"));
    std::fs::write(cluster.path("grid.yaml"), GRID).unwrap();
    let results = cluster.path("grid/results.jsonl");
    let run = |more: &[&str]| run(&cluster, "grid", more);
    killed_after(&cluster, "grid", 1).await;
    let whole = run(&["--at-once", "2"]).output().unwrap();
    assert!(whole.status.success(), "{whole:?}\n{}", cluster.logs());
    let found = records(&results);
    let places: Vec<(&str, &str, bool)> = found
        .iter()
        .map(|record| {
            let place = |axis: &str| record["place"][axis].as_str().unwrap();
            (place("kind"), place("seed"), record["error"].is_null())
        })
        .collect();
    assert_eq!(places, [("right", "0", true), ("right", "1", true), ("wrong", "0", false), ("wrong", "1", false)]);
    let jobs = cluster.json(["jobs", "list"]);
    assert_eq!(jobs.as_array().unwrap().len(), 4, "no job was made twice: {jobs}");
    let right = &found[0];
    assert!(right["trained_parameters"].as_u64().unwrap() > 10_000, "{right}");
    assert!(
        right["tokens_per_second"].as_f64().unwrap() > 0.0 && right["peak_memory_bytes"].as_u64().unwrap() > 0,
        "{right}"
    );
    let losses = right["validation"]["world"].as_array().unwrap();
    assert!(losses[1].as_f64().unwrap() < losses[0].as_f64().unwrap(), "{right}");
    assert!(found[2]["error"].as_str().unwrap().contains("`chosen` is missing"), "{}", found[2]);

    let table = std::fs::read_to_string(cluster.path("grid/table.md")).unwrap();
    assert!(table.contains("| `right` |") && table.contains("- kind=wrong, seed=1: "), "{table}");
    assert!(std::fs::read_to_string(cluster.path("grid/plot.svg")).unwrap().contains(">right</text>"));

    // Nothing is left but what failed, which runs again if that is asked for.
    let again = run(&[]).output().unwrap();
    assert!(String::from_utf8_lossy(&again.stderr).contains("0 of 4 jobs are left to run"), "{again:?}");
    let retried = run(&["--retry"]).output().unwrap();
    assert!(String::from_utf8_lossy(&retried.stderr).contains("2 of 4 jobs are left to run"), "{retried:?}");
    assert_eq!(records(&results).len(), 6);
}

/// Points of AutoPEFT's space on the demonstration's world.
const POINT: &str = r#"
version: 1
name: point
kind: recipe
base: "demo-base:latest"
data:
  domains: [{name: chat, source: ./chat.train.jsonl}]
  validation: [{name: chat, source: ./chat.valid.jsonl, rows: 8}]
  max_length: 64
tune: {optimizer: {method: adamw, lr: 5e-3}, batch_tokens: 256, logical_shards: 2, steps: 3}
recipe: {method: autopeft-stack, prefix: 0, serial: 48}
"#;

const SPACE: &str = "
version: 1
name: space
job: ./world/point.yaml
vary:
  - {name: serial, field: recipe.serial, values: [null, 48, 12], ordered: true}
  - {name: prefix, field: recipe.prefix, values: [0, 2, 4]}
  - {name: first, field: recipe.layers.0, values: [true, false]}
  - {name: second, field: recipe.layers.1, values: [true, false]}
search: {method: autopeft, evaluations: 8, first: 4, batch: 2, draws: 8}
then: {tune.steps: 5}
";

#[tokio::test]
async fn a_search_that_was_killed_finds_what_it_would_have_found() {
    let cluster = Cluster::start().await;
    prepare(&cluster).await;
    std::fs::write(
        cluster.path("world/point.yaml"),
        POINT.replace("prefix: 0, serial: 48", "prefix: 0, parallel: null"),
    )
    .unwrap();
    std::fs::write(cluster.path("grid.yaml"), SPACE).unwrap();
    killed_after(&cluster, "cut", 5).await;
    for to in ["cut", "whole"] {
        let ran = run(&cluster, to, &["--at-once", "2"]).output().unwrap();
        assert!(ran.status.success(), "{ran:?}\n{}", cluster.logs());
    }
    // The second asked for the same jobs in the same order, all of which were there by then.
    let of = |to: &str| -> Vec<String> {
        let kept = ["place", "spec", "validation", "trained_parameters", "error"];
        let told = |record: Value| kept.map(|name| record[name].to_string()).join(" ");
        records(&cluster.path(to).join("results.jsonl")).into_iter().map(told).collect()
    };
    assert_eq!(of("cut"), of("whole"));
    let found = records(&cluster.path("whole/results.jsonl"));
    let (again, searched): (Vec<&Value>, Vec<&Value>) =
        found.iter().partition(|record| record["place"].get("then").is_some());
    let places: BTreeSet<String> = searched.iter().map(|record| record["place"].to_string()).collect();
    assert_eq!((searched.len(), places.len()), (8, 8));
    assert!(!again.is_empty() && again.iter().all(|record| record["steps"] == 5), "{again:?}");
    // Nothing was asked for that trains nothing; a layer that is off has no parameter.
    for record in &searched {
        let is = |axis: &str| record["place"][axis].as_str().unwrap();
        let layers = ["first", "second"].into_iter().filter(|axis| is(axis) == "true").count() as u64;
        let serial = is("serial").parse::<u64>().map_or(0, |reduction| {
            let (width, stream) = (96 / reduction, 96);
            2 * width * stream + width + stream
        });
        let prefix = 2 * 48 * is("prefix").parse::<u64>().unwrap();
        assert!(layers > 0 && serial + prefix > 0, "{record}");
        assert_eq!(record["trained_parameters"].as_u64().unwrap(), layers * (serial + prefix), "{record}");
    }
    let table = std::fs::read_to_string(cluster.path("whole/table.md")).unwrap();
    assert!(table.contains("8 of 36 jobs") && table.contains("| run once more |"), "{table}");
    assert_eq!(table, std::fs::read_to_string(cluster.path("cut/table.md")).unwrap());
}
