//! The job file's types to messages.

use attune_spec::job::{
    Activations, Bounds, CheckpointSpec, DataSpec, Device, DomainSpec, EvaluateSpec, Form, HeadPooling, HeadSpec,
    HeadTask, JobKind, JobSpec, Limits, Matmul, MergedInto, OnBadRow, Outputs, Precision, Provenance, ProvenanceClass,
    Resources, SlotSpec, Targets, TooLong, TuneSpec, ValidationSpec,
};
use attune_spec::method::MethodRef;
use attune_spec::{Fault, FieldPath};

use super::super::Faults;
use super::super::structure::to_struct;
use crate::v1;

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
        Some(Form::Retrieval) => v1::RowForm::Retrieval,
    } as i32;
    let domain = |domain: &DomainSpec| v1::DomainSpec {
        name: domain.name.to_string(),
        source: domain.source.to_string(),
        weight: Some(domain.weight),
        form: form(domain.form),
        rows: domain.rows,
        provenance: domain.provenance.as_ref().map(provenance),
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
        caps: spec.caps.iter().map(|(of, share)| v1::ProvenanceCap { class: class(*of), share: *share }).collect(),
    }
}

const fn class(of: ProvenanceClass) -> i32 {
    match of {
        ProvenanceClass::Expert => v1::ProvenanceClass::Expert as i32,
        ProvenanceClass::Distilled => v1::ProvenanceClass::Distilled as i32,
        ProvenanceClass::SelfImproved => v1::ProvenanceClass::SelfImproved as i32,
    }
}

fn provenance(of: &Provenance) -> v1::Provenance {
    let Provenance { class: of_class, teacher, round, filter } = of.clone();
    v1::Provenance { class: class(of_class), teacher, round, filter }
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

fn head(HeadSpec { task, labels, pooling, bidirectional }: &HeadSpec) -> v1::HeadSpec {
    let task = match task {
        HeadTask::Classification => v1::HeadTask::Classification,
        HeadTask::TokenClassification => v1::HeadTask::TokenClassification,
        HeadTask::Embedding => v1::HeadTask::Embedding,
    };
    let pooling = match pooling {
        None => v1::HeadPooling::Unspecified,
        Some(HeadPooling::Mean) => v1::HeadPooling::Mean,
        Some(HeadPooling::First) => v1::HeadPooling::First,
        Some(HeadPooling::Last) => v1::HeadPooling::Last,
    };
    v1::HeadSpec { task: task as i32, labels: labels.clone(), pooling: pooling as i32, bidirectional: *bidirectional }
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
        gate: spec.gate.iter().map(|(set, bounds)| (set.to_string(), self::bounds(bounds))).collect(),
    }
}

fn bounds(spec: &Bounds) -> v1::Bounds {
    v1::Bounds { loss: spec.loss, of_before: spec.of_before, accuracy: spec.accuracy, reward: spec.reward }
}
