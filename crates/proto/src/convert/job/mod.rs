//! The job specification: the job file's types and its messages.
//!
//! A message is turned into the job file's own form and read like a file, so that the same schemas, rules and field paths
//! hold for both.

mod read;
mod write;

pub use read::from_message;
pub use write::to_message;

#[cfg(test)]
mod tests {
    use attune_spec::job::{JobSpec, read_value, read_yaml, set_path};
    use attune_spec::method::Catalogue;

    use super::*;
    use crate::v1;

    const FULL: &str = r#"
version: 1
name: debian-helper
project: research
priority: -3
labels: {team: search}
after: [j-1]
base: "base:latest"
data:
  domains:
    - {name: packages, source: "packages:latest", weight: 2.5, form: chat, provenance: {class: distilled, teacher: large}}
    - {name: manual, source: "s3://bucket/manual.parquet", provenance: {class: expert}}
    - {name: own, source: "own:latest", provenance: {class: self_improved, round: 2, filter: shorter than 80 words}}
  caps: {distilled: 0.5, self_improved: 0.25}
  mixing: {method: static}
  validation: [{name: held-out, source: "valid:latest", rows: 40}]
  max_length: 256
  too_long: refuse
  on_bad_row: skip
  template: chatml
tune:
  stack:
    - {name: skill, method: lora, rank: 16, alpha: 32, dropout: 0.05, targets: [q_proj, v_proj], exclude: "*.0.*", init: {method: gaussian}}
  optimizer: {method: adamw, lr: 3e-4, beta2: 0.95}
  schedule: {method: linear, warmup: 10}
  batch_tokens: 2048
  accumulation: 2
  epochs: 1.5
  max_grad_norm: null
  precision: bf16
  quantization: {method: nf4, double_quant: true}
  matmul: high
  checkpoint: {every_steps: 5, keep: 2}
  evaluate: {every_steps: 10}
  statistics: "measured:latest"
  logical_shards: 4
  seed: 18446744073709551615
resources: {devices_per_worker: 2, device: cpu, labels: {zone: eu}}
limits: {max_attempts: 7, stall_seconds: 60, run_seconds: 3600, deadline: "2031-01-01T00:00:00Z"}
outputs: {tag: "debian-helper:latest", merged: true, merged_into: dequantized, merged_tag: "debian-helper-merged", statistics: true, gate: {held-out: {loss: 2.5, of_before: 0.75}}}
"#;

    const SHORT: &str = r#"
version: 1
name: short
base: "base:latest"
data: {domains: [{name: a, source: "a:latest"}]}
tune: {adapter: {method: full}, steps: 3}
"#;

    fn read(text: &str) -> JobSpec {
        read_value(&read_yaml(text).unwrap(), Catalogue::embedded()).unwrap()
    }

    #[test]
    fn specifications_round_trip() {
        let judged = SHORT.replace(
            "steps: 3}",
            "steps: 3, objective: {method: grpo}, rewards: [{method: exact-match, case: true}, {method: overlong, weight: 0.5}]}",
        );
        assert!(judged.contains("overlong"));
        let upcycled =
            SHORT.replace("steps: 3}", "steps: 3, surgery: {method: dynamic-dino, copies: 3, balance: 0.5}}");
        assert!(read(&upcycled).tune.surgery.is_some());
        let shared = SHORT.replace(
            "adapter: {method: full}",
            "adapter: {method: lora}, budget: {method: sensitivity-lora, least: 3}",
        );
        assert!(read(&shared).tune.budget.is_some());
        let classes = SHORT
            .replace("steps: 3}", "steps: 3, head: {task: token_classification, labels: [O, B-PER]}}")
            .replace("a:latest\"}", "a:latest\", form: token_classification}");
        assert!(read(&classes).tune.head.is_some());
        let vectors = SHORT.replace(
            "steps: 3}",
            "steps: 3, objective: {method: info-nce, dims: [8]}, head: {task: embedding, pooling: last, bidirectional: true}}",
        );
        assert!(read(&vectors).tune.head.is_some_and(|head| head.bidirectional));
        for text in [FULL, SHORT, &judged, &upcycled, &shared, &classes, &vectors] {
            let spec = read(text);
            assert_eq!(from_message(&to_message(&spec).unwrap()).unwrap(), spec);
        }
        let staged = SHORT.replace("name: short", "name: short\nkind: recipe")
            + "recipe: {method: pipeline, stages: [{name: a}, {name: b, set: {tune: {steps: 7, adapter: {method: lora}}}}]}";
        let spec = read(&staged);
        assert_eq!(from_message(&to_message(&spec).unwrap()).unwrap(), spec);
        let beside = SHORT.replace(
            "tune: {adapter: {method: full}",
            "tune: {stack: [{method: lora}, {from: \"facts:latest\", train: false, domains: [a]}]",
        );
        let spec = read(&beside);
        assert_eq!(spec.tune.stack[1].domains.len(), 1);
        assert_eq!(from_message(&to_message(&spec).unwrap()).unwrap(), spec);
        let mut value = read_yaml(SHORT).unwrap();
        set_path(&mut value, "tune.steps", "null").unwrap();
        for (path, text) in [("tune.tokens", "90000"), ("tune.checkpoint", "{every_steps: null}")] {
            set_path(&mut value, path, text).unwrap();
            let spec = read_value(&value, Catalogue::embedded()).unwrap();
            assert_eq!(from_message(&to_message(&spec).unwrap()).unwrap(), spec, "{path}");
        }
        let spec = read(
            &SHORT
                .replace("method: full", "method: lora")
                .replace("steps: 3}", "steps: 3}\nresources: {share_base: true}"),
        );
        assert!(spec.resources.share_base);
        assert_eq!(from_message(&to_message(&spec).unwrap()).unwrap(), spec);
    }

    #[test]
    fn a_message_that_says_little_takes_the_defaults_of_the_file() {
        let spec = read(SHORT);
        let message = v1::JobSpec {
            version: 1,
            name: "short".to_owned(),
            base: "base:latest".to_owned(),
            data: Some(v1::DataSpec {
                domains: vec![v1::DomainSpec { name: "a".into(), source: "a:latest".into(), ..Default::default() }],
                ..Default::default()
            }),
            tune: Some(v1::TuneSpec {
                adapter: Some(v1::SlotSpec { method: Some("full".to_owned()), ..Default::default() }),
                length: Some(v1::tune_spec::Length::Steps(3)),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(from_message(&message).unwrap(), spec);
    }

    #[test]
    fn all_faults_come_at_once_with_the_paths_of_the_file() {
        let mut message = to_message(&read(FULL)).unwrap();
        let data = message.data.as_mut().unwrap();
        data.domains[1].form = 99;
        data.domains[0].weight = Some(-1.0);
        let slot = &mut message.tune.as_mut().unwrap().stack[0];
        slot.method = Some("lroa".to_owned());
        message.base = String::new();
        let faults = from_message(&message).unwrap_err();
        let paths: Vec<_> = faults.iter().map(|fault| fault.path.as_str()).collect();
        for path in ["data.domains[1].form", "data.domains[0].weight", "tune.stack[0].method", "base"] {
            assert!(paths.contains(&path), "{path} is missing in {paths:?}");
        }
        assert!(from_message(&v1::JobSpec::default()).unwrap_err().len() > 1);
    }

    #[test]
    fn parameters_that_cannot_be_told_apart_are_refused() {
        let mut message = to_message(&read(FULL)).unwrap();
        let slot = &mut message.tune.as_mut().unwrap().stack[0];
        let name = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue("x".to_owned())) };
        slot.params.as_mut().unwrap().fields.insert("name".to_owned(), name);
        assert_eq!(from_message(&message).unwrap_err()[0].path.as_str(), "tune.stack[0].name");
    }
}
