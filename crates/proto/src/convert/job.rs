//! The job specification: the job file's types and its messages.
//!
//! A message is turned into the job file's own form and read like a file, so that the same schemas, rules and field paths
//! hold for both.

use attune_spec::job::{
    Activations, CheckpointSpec, DataSpec, Device, DomainSpec, EvaluateSpec, Form, HeadSpec, HeadTask, JobKind,
    JobSpec, Limits, Matmul, MergedInto, OnBadRow, Outputs, Precision, ReadError, Resources, RewardSpec, SlotSpec,
    Targets, TooLong, TuneSpec, ValidationSpec, read_value,
};
use attune_spec::method::{Catalogue, MethodRef};
use attune_spec::{Fault, FieldPath};
use serde_json::{Map, Value, json};

use super::Faults;
use super::structure::{from_struct, to_struct};
use crate::v1;
use crate::words::Word;

/// A specification as a message.
///
/// # Errors
/// The faults at parameters that a message cannot hold exactly, such as integers beyond 2^53.
pub fn to_message(spec: &JobSpec) -> Result<v1::JobSpec, Vec<Fault>> {
    let mut faults = Faults::new();
    let message = v1::JobSpec {
        version: spec.version,
        name: spec.name.to_string(),
        kind: match spec.kind {
            JobKind::Tune => v1::JobKind::Tune as i32,
            JobKind::Recipe => v1::JobKind::Recipe as i32,
        },
        project: spec.project.as_ref().map(ToString::to_string),
        priority: spec.priority,
        labels: spec.labels.iter().map(|(key, value)| (key.to_string(), value.clone())).collect(),
        after: spec.after.iter().map(ToString::to_string).collect(),
        base: spec.base.to_string(),
        data: Some(data(&spec.data, &mut faults)),
        tune: Some(tune(&spec.tune, &mut faults)),
        resources: Some(resources(&spec.resources)),
        limits: Some(limits(&spec.limits)),
        outputs: Some(outputs(&spec.outputs)),
        recipe: spec.recipe.as_ref().and_then(|recipe| method(recipe, &"recipe".into(), &mut faults)),
    };
    faults.finish(Some(message))
}

fn method(given: &MethodRef, path: &FieldPath, faults: &mut Faults) -> Option<v1::MethodRef> {
    let params = faults.field(to_struct(&given.params, path));
    Some(v1::MethodRef { method: given.method.clone(), params })
}

fn data(spec: &DataSpec, faults: &mut Faults) -> v1::DataSpec {
    let form = |form: Option<Form>| match form {
        None => v1::RowForm::Unspecified,
        Some(Form::Chat) => v1::RowForm::Chat,
        Some(Form::PromptCompletion) => v1::RowForm::PromptCompletion,
        Some(Form::Alpaca) => v1::RowForm::Alpaca,
        Some(Form::Text) => v1::RowForm::Text,
        Some(Form::Preference) => v1::RowForm::Preference,
        Some(Form::Classification) => v1::RowForm::Classification,
        Some(Form::TokenClassification) => v1::RowForm::TokenClassification,
    } as i32;
    let domain = |domain: &DomainSpec| v1::DomainSpec {
        name: domain.name.to_string(),
        source: domain.source.to_string(),
        weight: Some(domain.weight),
        form: form(domain.form),
        rows: domain.rows,
    };
    let set = |set: &ValidationSpec| v1::ValidationSpec {
        name: set.name.to_string(),
        source: set.source.to_string(),
        form: form(set.form),
        rows: set.rows,
    };
    v1::DataSpec {
        domains: spec.domains.iter().map(domain).collect(),
        mixing: method(&spec.mixing, &"data.mixing".into(), faults),
        validation: spec.validation.iter().map(set).collect(),
        max_length: Some(spec.max_length),
        too_long: match spec.too_long {
            TooLong::Truncate => v1::TooLong::Truncate,
            TooLong::Refuse => v1::TooLong::Refuse,
        } as i32,
        on_bad_row: match spec.on_bad_row {
            OnBadRow::Fail => v1::OnBadRow::Fail,
            OnBadRow::Skip => v1::OnBadRow::Skip,
        } as i32,
        template: spec.template.clone(),
    }
}

fn slot(spec: &SlotSpec, path: &FieldPath, faults: &mut Faults) -> v1::SlotSpec {
    let targets = |targets: &Targets| v1::Targets { entries: targets.entries().to_vec() };
    v1::SlotSpec {
        name: spec.name.as_ref().map(ToString::to_string),
        method: spec.method.clone(),
        targets: spec.targets.as_ref().map(targets),
        exclude: spec.exclude.as_ref().map(targets),
        init: spec.init.as_ref().and_then(|init| method(init, &path.field("init"), faults)),
        from: spec.from.as_ref().map(ToString::to_string),
        train: Some(spec.train),
        domains: spec.domains.iter().map(ToString::to_string).collect(),
        params: faults.field(to_struct(&spec.params, path)),
    }
}

fn tune(spec: &TuneSpec, faults: &mut Faults) -> v1::TuneSpec {
    use v1::tune_spec::Length;
    let path = FieldPath::from("tune");
    let stack = spec.stack.iter().enumerate();
    v1::TuneSpec {
        stack: stack.map(|(index, item)| slot(item, &path.field("stack").index(index), faults)).collect(),
        adapter: spec.adapter.as_ref().map(|item| slot(item, &path.field("adapter"), faults)),
        from_scratch: spec.from_scratch,
        head: spec.head.as_ref().map(head),
        surgery: spec.surgery.as_ref().and_then(|surgery| method(surgery, &path.field("surgery"), faults)),
        budget: spec.budget.as_ref().and_then(|budget| method(budget, &path.field("budget"), faults)),
        objective: method(&spec.objective, &path.field("objective"), faults),
        rewards: (spec.rewards.iter().enumerate())
            .map(|(index, item)| v1::RewardSpec {
                reward: method(&item.reward, &path.field("rewards").index(index), faults),
                weight: Some(item.weight),
            })
            .collect(),
        step: method(&spec.step, &path.field("step"), faults),
        optimizer: method(&spec.optimizer, &path.field("optimizer"), faults),
        schedule: method(&spec.schedule, &path.field("schedule"), faults),
        batch_tokens: Some(spec.batch_tokens),
        accumulation: Some(spec.accumulation),
        length: (spec.steps.map(Length::Steps))
            .or_else(|| spec.epochs.map(Length::Epochs))
            .or_else(|| spec.tokens.map(Length::Tokens)),
        max_grad_norm: Some(spec.max_grad_norm.unwrap_or(0.0)),
        precision: match spec.precision {
            Precision::F32 => v1::Precision::F32,
            Precision::Bf16 => v1::Precision::Bf16,
        } as i32,
        quantization: spec.quantization.as_ref().and_then(|format| method(format, &path.field("quantization"), faults)),
        matmul: match spec.matmul {
            Matmul::Highest => v1::Matmul::Highest,
            Matmul::High => v1::Matmul::High,
        } as i32,
        activations: match spec.activations {
            Activations::Auto => v1::Activations::Auto,
            Activations::Keep => v1::Activations::Keep,
            Activations::Recompute => v1::Activations::Recompute,
        } as i32,
        checkpoint: Some(checkpoint(&spec.checkpoint)),
        evaluate: Some(evaluate(&spec.evaluate)),
        logical_shards: spec.logical_shards,
        seed: spec.seed,
        statistics: spec.statistics.as_ref().map(ToString::to_string),
    }
}

fn head(HeadSpec { task, labels }: &HeadSpec) -> v1::HeadSpec {
    let task = match task {
        HeadTask::Classification => v1::HeadTask::Classification,
        HeadTask::TokenClassification => v1::HeadTask::TokenClassification,
    };
    v1::HeadSpec { task: task as i32, labels: labels.clone() }
}

fn checkpoint(spec: &CheckpointSpec) -> v1::CheckpointSpec {
    // A file's `null` is written as 0, which no file may say.
    v1::CheckpointSpec { every_steps: Some(spec.every_steps.unwrap_or(0)), keep: Some(spec.keep) }
}

fn evaluate(spec: &EvaluateSpec) -> v1::EvaluateSpec {
    v1::EvaluateSpec { every_steps: spec.every_steps }
}

fn resources(spec: &Resources) -> v1::ResourceSpec {
    v1::ResourceSpec {
        workers: Some(spec.workers),
        devices_per_worker: Some(spec.devices_per_worker),
        device: match spec.device {
            Device::Any => v1::DeviceKind::Unspecified,
            Device::Cpu => v1::DeviceKind::Cpu,
            Device::Cuda => v1::DeviceKind::Cuda,
        } as i32,
        share_base: spec.share_base,
        labels: spec.labels.clone(),
    }
}

fn limits(spec: &Limits) -> v1::LimitSpec {
    v1::LimitSpec {
        max_attempts: Some(spec.max_attempts),
        stall_seconds: Some(spec.stall_seconds),
        run_seconds: spec.run_seconds,
        deadline: spec.deadline.clone(),
    }
}

fn outputs(spec: &Outputs) -> v1::OutputSpec {
    v1::OutputSpec {
        tag: spec.tag.as_ref().map(ToString::to_string),
        merged: spec.merged,
        merged_tag: spec.merged_tag.as_ref().map(ToString::to_string),
        merged_into: match spec.merged_into {
            None => v1::MergedInto::Unspecified,
            Some(MergedInto::Base) => v1::MergedInto::Base,
            Some(MergedInto::Dequantized) => v1::MergedInto::Dequantized,
        } as i32,
        statistics: spec.statistics,
    }
}

/// The specification in a message, checked like a job file against the methods of this build.
///
/// # Errors
/// All faults at once, with the job file's field paths.
pub fn from_message(message: &v1::JobSpec) -> Result<JobSpec, Vec<Fault>> {
    let mut reader = Reader { faults: Faults::new() };
    let value = reader.job(message);
    // What cannot be said in the job file's form is reported together with what is wrong in it.
    match read_value(&value, Catalogue::embedded()) {
        Ok(spec) => reader.faults.finish(Some(spec)),
        Err(error) => {
            reader.faults.take::<()>(Err(match error {
                ReadError::Faults(faults) => faults,
                other @ ReadError::Syntax { .. } => vec![Fault::new("", other.to_string())],
            }));
            reader.faults.finish(None)
        }
    }
}

/// The file's form of a number that means nothing when it is 0.
fn null_if_zero(number: u64) -> Value {
    if number == 0 { Value::Null } else { json!(number) }
}

/// Builds the job file's form of a message.
struct Reader {
    faults: Faults,
}

/// An object of the fields that are given.
macro_rules! given {
    ($($name:literal: $value:expr),* $(,)?) => {{
        let mut object = Map::new();
        $(if let Some(value) = $value { object.insert($name.to_owned(), json!(value)); })*
        object
    }};
}

impl Reader {
    fn job(&mut self, message: &v1::JobSpec) -> Value {
        let mut job = given! {
            "version": Some(message.version),
            "name": Some(&message.name),
            "kind": self.word::<v1::JobKind>(message.kind, "kind"),
            "project": message.project.as_ref(),
            "priority": Some(message.priority),
            "labels": Some(&message.labels),
            "after": Some(&message.after),
            "resources": message.resources.as_ref().map(|spec| self.resources(spec)),
            "limits": message.limits.as_ref().map(|spec| given! {
                "max_attempts": spec.max_attempts,
                "stall_seconds": spec.stall_seconds,
                "run_seconds": spec.run_seconds,
                "deadline": spec.deadline.as_ref(),
            }),
            "outputs": message.outputs.as_ref().map(|spec| given! {
                "tag": spec.tag.as_ref(),
                "merged": Some(spec.merged),
                "merged_tag": spec.merged_tag.as_ref(),
                "merged_into": self.word::<v1::MergedInto>(spec.merged_into, "outputs.merged_into"),
                "statistics": Some(spec.statistics),
            }),
            "data": message.data.as_ref().map(|spec| self.data(spec)),
            "tune": message.tune.as_ref().map(|spec| self.tune(spec)),
            "recipe": message.recipe.as_ref().map(|recipe| self.method(recipe, &"recipe".into())),
        };
        // An empty text is what an absent one looks like.
        if !message.base.is_empty() {
            job.insert("base".to_owned(), json!(message.base));
        }
        Value::Object(job)
    }

    /// The word of an enum value; nothing for the unspecified one, a fault for one of a newer client.
    fn word<T: Word + TryFrom<i32>>(&mut self, value: i32, path: &str) -> Option<String> {
        match T::try_from(value) {
            Ok(_) if value == 0 => None,
            Ok(known) => Some(known.word()),
            Err(_) => {
                self.faults.push(Fault::new(path, format!("has the value {value}, which this server does not know")));
                None
            }
        }
    }

    fn resources(&mut self, spec: &v1::ResourceSpec) -> Map<String, Value> {
        given! {
            "workers": spec.workers,
            "devices_per_worker": spec.devices_per_worker,
            "device": self.word::<v1::DeviceKind>(spec.device, "resources.device"),
            "share_base": Some(spec.share_base),
            "labels": Some(&spec.labels),
        }
    }

    fn params(&mut self, params: Option<&prost_types::Struct>, path: &FieldPath, taken: &[&str]) -> Map<String, Value> {
        let params = params.and_then(|params| self.faults.field(from_struct(params, path))).unwrap_or_default();
        for name in taken.iter().filter(|name| params.contains_key(**name)) {
            let message = "is a parameter here, but a field beside the parameters has this name";
            self.faults.push(Fault::new(path.field(name), message));
        }
        params
    }

    fn method(&mut self, message: &v1::MethodRef, path: &FieldPath) -> Map<String, Value> {
        let mut object = self.params(message.params.as_ref(), path, &["method"]);
        object.insert("method".to_owned(), json!(message.method));
        object
    }

    fn data(&mut self, spec: &v1::DataSpec) -> Map<String, Value> {
        let path = FieldPath::from("data");
        let mut domains = Vec::new();
        for (index, domain) in spec.domains.iter().enumerate() {
            let form = path.field("domains").index(index).field("form");
            domains.push(given! {
                "name": Some(&domain.name),
                "source": Some(&domain.source),
                "weight": domain.weight,
                "form": self.word::<v1::RowForm>(domain.form, form.as_str()),
                "rows": domain.rows,
            });
        }
        let mut validation = Vec::new();
        for (index, set) in spec.validation.iter().enumerate() {
            let form = path.field("validation").index(index).field("form");
            validation.push(given! {
                "name": Some(&set.name),
                "source": Some(&set.source),
                "form": self.word::<v1::RowForm>(set.form, form.as_str()),
                "rows": set.rows,
            });
        }
        given! {
            "domains": Some(domains),
            "mixing": spec.mixing.as_ref().map(|mixing| self.method(mixing, &path.field("mixing"))),
            "validation": Some(validation),
            "max_length": spec.max_length,
            "too_long": self.word::<v1::TooLong>(spec.too_long, "data.too_long"),
            "on_bad_row": self.word::<v1::OnBadRow>(spec.on_bad_row, "data.on_bad_row"),
            "template": spec.template.as_ref(),
        }
    }

    fn slot(&mut self, spec: &v1::SlotSpec, path: &FieldPath) -> Map<String, Value> {
        let targets = |targets: &v1::Targets| match targets.entries.as_slice() {
            [one] => json!(one),
            many => json!(many),
        };
        let mut slot = self.params(spec.params.as_ref(), path, &SlotSpec::FIELDS);
        slot.extend(given! {
            "name": spec.name.as_ref(),
            "method": spec.method.as_ref(),
            "targets": spec.targets.as_ref().map(targets),
            "exclude": spec.exclude.as_ref().map(targets),
            "init": spec.init.as_ref().map(|init| self.method(init, &path.field("init"))),
            "from": spec.from.as_ref(),
            "train": spec.train,
            "domains": (!spec.domains.is_empty()).then_some(&spec.domains),
        });
        slot
    }

    fn tune(&mut self, spec: &v1::TuneSpec) -> Map<String, Value> {
        use v1::tune_spec::Length;
        let path = FieldPath::from("tune");
        let mut stack = Vec::new();
        for (index, item) in spec.stack.iter().enumerate() {
            stack.push(self.slot(item, &path.field("stack").index(index)));
        }
        let mut rewards = Vec::new();
        for (index, item) in spec.rewards.iter().enumerate() {
            let path = path.field("rewards").index(index);
            let mut reward = item.reward.as_ref().map(|reward| self.method(reward, &path)).unwrap_or_default();
            reward.extend(item.weight.map(|weight| (RewardSpec::WEIGHT.to_owned(), json!(weight))));
            rewards.push(reward);
        }
        let mut tune = given! {
            "stack": Some(stack),
            "rewards": (!rewards.is_empty()).then_some(rewards),
            "adapter": spec.adapter.as_ref().map(|item| self.slot(item, &path.field("adapter"))),
            "from_scratch": Some(spec.from_scratch),
            "surgery": spec.surgery.as_ref().map(|m| self.method(m, &path.field("surgery"))),
            "budget": spec.budget.as_ref().map(|m| self.method(m, &path.field("budget"))),
            "objective": spec.objective.as_ref().map(|m| self.method(m, &path.field("objective"))),
            "step": spec.step.as_ref().map(|m| self.method(m, &path.field("step"))),
            "optimizer": spec.optimizer.as_ref().map(|m| self.method(m, &path.field("optimizer"))),
            "schedule": spec.schedule.as_ref().map(|m| self.method(m, &path.field("schedule"))),
            "batch_tokens": spec.batch_tokens,
            "accumulation": spec.accumulation,
            "max_grad_norm": spec.max_grad_norm.map(|norm| if norm == 0.0 { Value::Null } else { json!(norm) }),
            "precision": self.word::<v1::Precision>(spec.precision, "tune.precision"),
            "quantization": spec.quantization.as_ref().map(|m| self.method(m, &path.field("quantization"))),
            "matmul": self.word::<v1::Matmul>(spec.matmul, "tune.matmul"),
            "activations": self.word::<v1::Activations>(spec.activations, "tune.activations"),
            "checkpoint": spec.checkpoint.as_ref().map(|spec| given! {
                "every_steps": spec.every_steps.map(null_if_zero),
                "keep": spec.keep,
            }),
            "evaluate": spec.evaluate.as_ref().map(|spec| given! { "every_steps": spec.every_steps }),
            "logical_shards": spec.logical_shards,
            "seed": Some(spec.seed),
            "statistics": spec.statistics.as_ref(),
            "head": spec.head.as_ref().map(|spec| given! {
                "task": self.word::<v1::HeadTask>(spec.task, "tune.head.task"),
                "labels": Some(&spec.labels),
            }),
        };
        let length = spec.length.as_ref().map(|length| match length {
            Length::Steps(steps) => ("steps", json!(steps)),
            Length::Epochs(epochs) => ("epochs", json!(epochs)),
            Length::Tokens(tokens) => ("tokens", json!(tokens)),
        });
        tune.extend(length.map(|(name, value)| (name.to_owned(), value)));
        tune
    }
}

#[cfg(test)]
mod tests {
    use attune_spec::job::{read_yaml, set_path};

    use super::*;

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
    - {name: packages, source: "packages:latest", weight: 2.5, form: chat}
    - {name: manual, source: "s3://bucket/manual.parquet"}
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
outputs: {tag: "debian-helper:latest", merged: true, merged_into: dequantized, merged_tag: "debian-helper-merged", statistics: true}
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
        for text in [FULL, SHORT, &judged, &upcycled, &shared, &classes] {
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
