//! A grid of jobs whose command is killed on the way goes on with what is missing, and makes no job twice.

use std::path::Path;

use serde_json::Value;

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

#[tokio::test]
async fn a_grid_that_was_killed_goes_on_with_what_is_missing() {
    let cluster = Cluster::start().await;
    world(&cluster.path("world"));
    std::fs::write(cluster.path("grid.yaml"), GRID).unwrap();
    let (results, cache) = (cluster.path("grid/results.jsonl"), cluster.path("cache"));
    let run = |more: &[&str]| {
        let mut command = attune();
        command.args(["experiment", "run", "grid.yaml"]).args(more);
        command.env("ATTUNE_SERVER", cluster.url()).env("ATTUNE_CACHE", &cache).current_dir(cluster.folder.path());
        command
    };
    let mut process = Process::start(&mut run(&[]), &cluster.path("grid.log"));
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while records(&results).is_empty() {
        assert!(
            !process.has_ended() || !records(&results).is_empty(),
            "it ended: {:?}",
            std::fs::read_to_string(cluster.path("grid.log"))
        );
        assert!(tokio::time::Instant::now() < deadline, "no record: {}", cluster.logs());
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    process.kill();
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
