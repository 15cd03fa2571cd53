//! Messages to the job file's own form, which is read like a file.

use attune_spec::job::{JobSpec, ReadError, RewardSpec, SlotSpec, read_value};
use attune_spec::method::Catalogue;
use attune_spec::{Fault, FieldPath};
use serde_json::{Map, Value, json};

use super::super::Faults;
use super::super::structure::from_struct;
use crate::v1;
use crate::words::Word;

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
                "gate": Some(spec.gate.iter().map(|(set, bounds)| (set.clone(), Value::Object(given! {
                    "loss": bounds.loss,
                    "of_before": bounds.of_before,
                    "accuracy": bounds.accuracy,
                    "reward": bounds.reward,
                }))).collect::<Map<String, Value>>()),
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
            let own = path.field("domains").index(index);
            let (form, class) = (own.field("form"), own.field("provenance").field("class"));
            domains.push(given! {
                "name": Some(&domain.name),
                "source": Some(&domain.source),
                "weight": domain.weight,
                "form": self.word::<v1::RowForm>(domain.form, form.as_str()),
                "rows": domain.rows,
                "provenance": domain.provenance.as_ref().map(|of| given! {
                    "class": self.word::<v1::ProvenanceClass>(of.class, class.as_str()),
                    "teacher": of.teacher.as_ref(),
                    "round": of.round,
                    "filter": of.filter.as_ref(),
                }),
            });
        }
        let mut caps = Map::new();
        for (index, cap) in spec.caps.iter().enumerate() {
            let class = path.field("caps").index(index).field("class");
            match self.word::<v1::ProvenanceClass>(cap.class, class.as_str()) {
                Some(word) if caps.contains_key(&word) => {
                    self.faults.push(Fault::new(class, format!("is {word} for the second time")));
                }
                Some(word) => drop(caps.insert(word, json!(cap.share))),
                None if cap.class == 0 => self.faults.push(Fault::new(class, "is missing")),
                None => {}
            }
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
            "caps": (!caps.is_empty()).then_some(caps),
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
                "labels": (!spec.labels.is_empty()).then_some(&spec.labels),
                "pooling": self.word::<v1::HeadPooling>(spec.pooling, "tune.head.pooling"),
                "bidirectional": spec.bidirectional.then_some(true),
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
