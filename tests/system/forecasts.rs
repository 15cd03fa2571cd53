//! What a job is said to take before it starts, against what it took.

use attune_proto::v1::JobState;
use serde_json::Value;

use crate::support::{Cluster, outputs, world};

/// A Llama of 5.4 million parameters, large enough for its passes to count beside the program.
const CONFIG: &str = r#"{
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": true
}"#;

const JOB: &str = "
version: 1
name: measured
base: ./larger
data: {domains: [{name: world, source: ./text.train.jsonl}], max_length: 64}
tune:
  adapter: {method: lora, rank: 16}
  optimizer: {method: adamw, lr: 1e-3}
  from_scratch: true
  batch_tokens: 2048
  logical_shards: 8
  steps: 2
";

/// The largest memory of a process is what was said before, within a tenth.
#[tokio::test]
async fn a_job_takes_the_memory_that_it_was_said_to_take() {
    let cluster = Cluster::start().await;
    world(&cluster.path("world"));
    let (base, larger) = (cluster.path("world/base"), cluster.path("world/larger"));
    std::fs::create_dir(&larger).unwrap();
    for file in std::fs::read_dir(&base).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), larger.join(file.file_name())).unwrap();
    }
    std::fs::write(larger.join("config.json"), CONFIG).unwrap();
    let file = cluster.path("world/measured.yaml");
    std::fs::write(&file, JOB).unwrap();
    let jobs: [&[&str]; 3] =
        [&[], &["tune.adapter={method: full}", "tune.logical_shards=2"], &["tune.adapter={method: loha}"]];
    for set in jobs {
        let dry = ["submit", file.to_str().unwrap(), "--dry-run"]
            .into_iter()
            .chain(set.iter().flat_map(|set| ["--set", set]));
        let said = cluster.json(dry)["forecast"]["memory_bytes"].as_f64().unwrap();
        let job = cluster.ends(&cluster.submit(&file, set), JobState::Succeeded).await;
        let made = outputs(&job).into_iter().find(|(role, _)| role != "report").unwrap().1;
        let artifact: Value = cluster.json(["artifacts", "get", &made]);
        let taken = artifact["commit"]["facts"]["peak_memory_bytes"].as_f64().unwrap();
        let mib = |bytes: f64| (bytes / 1024.0 / 1024.0).round();
        assert!((said / taken - 1.0).abs() < 0.1, "{set:?}: {} MiB said, {} taken", mib(said), mib(taken));
    }
}
