//! Twenty real AdamW steps on LoRA against PyTorch and PEFT (`crates/optim/golden/adamw.py` names the versions).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use attune_adapt::{ADAPTERS, peft};
use attune_architecture::targets;
use attune_models::{Base, Model, Pass, Slot, Stack};
use attune_objective::OBJECTIVES;
use attune_optim::{OPTIMIZERS, SCHEDULES, clip};
use attune_points::adapter::Adapter;
use attune_points::layout::{NO_LABEL, Source};
use attune_points::optimizer::UpdateCx;
use attune_points::{Bank, BankKind, Grads, Layout, Params, Row, Theta};
use attune_spec::id::Step;
use attune_spec::job::Precision;
use attune_spec::method::{BuildCx, MethodRef};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn method(value: Value) -> MethodRef {
    serde_json::from_value(value).unwrap()
}

struct Setup {
    model: Model,
    adapter: Arc<dyn Adapter>,
    attachments: Vec<attune_points::adapter::Attachment>,
}

fn open(cx: &BuildCx<'_>) -> Setup {
    let base = Base::open(&golden("models/golden/llama"), Precision::F32).unwrap();
    let folder = peft::read(&golden("optim/golden/lora_steps/before")).unwrap();
    let adapter = ADAPTERS.build(&folder.method, &"adapter".into(), cx).unwrap_or_else(|faults| panic!("{faults:?}"));
    let adapter: Arc<dyn Adapter> = adapter.into();
    let sites = targets::resolve(&folder.targets, None, base.architecture(), |_| true).unwrap();
    let attachments = adapter.attach(base.architecture(), &sites).unwrap();
    let stack = Stack::new(vec![Slot::new(Arc::clone(&adapter), attachments.iter().cloned())]);
    Setup { model: Model::new(base, stack), adapter, attachments }
}

fn layout(tensors: &std::collections::HashMap<String, Tensor>) -> Layout {
    let ints = |name: &str| -> Vec<i64> { tensors[name].to_dtype(DType::I64).unwrap().to_vec1().unwrap() };
    let (ids, labels) = (ints("input_ids"), ints("labels"));
    let mut layout = Layout::new();
    let mut start = 0;
    for length in ints("doc_lengths") {
        let rows = start..start + length as usize;
        start = rows.end;
        let row = |row: usize| (Row::Token(ids[row] as u32), u32::try_from(labels[row]).unwrap_or(NO_LABEL));
        layout.push(Source::default(), rows.map(row).collect::<Vec<_>>());
    }
    layout
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn twenty_steps_end_within_a_thousandth_of_pytorchs_parameters() {
    let hyper = std::fs::read(golden("optim/golden/lora_steps/hyper.json")).unwrap();
    let hyper: Value = serde_json::from_slice(&hyper).unwrap();
    let expected =
        candle_core::safetensors::load(golden("optim/golden/lora_steps/expected.safetensors"), &Device::Cpu).unwrap();
    let total = Step(hyper["steps"].as_u64().unwrap());
    let cx = BuildCx { steps: total, domains: &[], words: None };
    let Setup { model, adapter, attachments } = open(&cx);
    let read = |name: &str| -> Params {
        peft::read(&golden(&format!("optim/golden/lora_steps/{name}")))
            .unwrap()
            .params(&*adapter, &attachments)
            .unwrap()
    };
    let mut params = read("before");
    let objective =
        OBJECTIVES.build(&MethodRef::named("sft"), &"objective".into(), &cx).unwrap_or_else(|f| panic!("{f:?}"));
    let optimizer = method(json!({
        "method": "adamw", "lr": hyper["lr"], "weight_decay": hyper["weight_decay"], "beta1": hyper["betas"][0],
        "beta2": hyper["betas"][1], "eps": hyper["eps"],
    }));
    let optimizer = OPTIMIZERS.build(&optimizer, &"optimizer".into(), &cx).unwrap_or_else(|f| panic!("{f:?}"));
    let schedule = method(json!({"method": hyper["schedule"], "warmup": hyper["warmup_steps"]}));
    let schedule = SCHEDULES.build(&schedule, &"schedule".into(), &cx).unwrap_or_else(|f| panic!("{f:?}"));
    let layout = layout(&expected);
    let losses = values(&expected["loss"]);
    let mut buffers: BTreeMap<_, Vec<Vec<f32>>> = BTreeMap::new();
    for step in 0..total.0 {
        let bank =
            Bank { slot: "x".into(), kind: BankKind::Adapter, sets: vec![Arc::new(params.clone())], train: true };
        let theta = Theta::single([bank]);
        let mut sink = Grads::wanting(theta.trained().map(|(id, _)| id));
        let scale = 1.0 / objective.denominator().of(layout.counts());
        let report =
            model.grad(&Pass { theta: &theta, layout: &layout, dropout: None }, &*objective, scale, &mut sink).unwrap();
        let off = (report.mean() - f64::from(losses[step as usize])).abs();
        assert!(off < 1e-3, "the loss before step {step} is off by {off}");
        let gradients: Vec<_> =
            sink.iter().map(|(id, gradient)| (id.name.clone(), values(gradient.unwrap()))).collect();
        let norm = clip::norm(gradients.iter().map(|(_, gradient)| clip::square(gradient)));
        let factor = clip::factor(norm, hyper["max_grad_norm"].as_f64());
        let lr = optimizer.lr() * schedule.factor(Step(step), total);
        for (name, mut gradient) in gradients {
            gradient.iter_mut().for_each(|g| *g *= factor);
            let tensor = params.get(&name).unwrap();
            let (shape, mut value) = (tensor.dims().to_vec(), values(tensor));
            let own = buffers.entry(name.clone()).or_insert_with(|| vec![vec![0.0; value.len()]; 2]);
            let cx = UpdateCx { step: Step(step + 1), lr, decay: true, shape: &shape, born: None };
            optimizer.update(&cx, &mut value, &gradient, own).unwrap();
            params.insert(name, Tensor::from_vec(value, shape, &Device::Cpu).unwrap());
        }
    }
    let after = read("after");
    for (name, tensor) in params.iter() {
        for (found, reference) in values(tensor).iter().zip(values(after.get(name).unwrap())) {
            assert!((found - reference).abs() < 1e-3, "{name}: {found} against {reference}");
        }
    }
}
