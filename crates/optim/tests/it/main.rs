//! Twenty steps against PyTorch (`golden/adamw.py` names the versions).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::HashMap;
use std::path::PathBuf;

use attune_optim::{OPTIMIZERS, SCHEDULES, clip};
use attune_points::optimizer::UpdateCx;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, MethodRef};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

fn golden(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(file)
}

fn method(value: Value) -> MethodRef {
    serde_json::from_value(value).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// Rounding of f32 over twenty steps: a few units in the last place of values near 1.
const TOLERANCE: f32 = 2e-6;

fn assert_near(what: &str, found: &[f32], expected: &[f32]) {
    for (index, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= TOLERANCE * (1.0 + b.abs()), "{what}[{index}]: {a} against {b}");
    }
    assert_eq!(found.len(), expected.len(), "{what}");
}

struct Run {
    tensors: HashMap<String, Tensor>,
    settings: Value,
    values: Vec<Vec<f32>>,
    buffers: Vec<Vec<Vec<f32>>>,
}

const NAMES: [&str; 2] = ["weight", "bias"];

impl Run {
    fn open(case: &str) -> Self {
        let tensors =
            candle_core::safetensors::load(golden(&format!("adamw_{case}.safetensors")), &Device::Cpu).unwrap();
        let settings = std::fs::read(golden(&format!("adamw_{case}.json"))).unwrap();
        let values = NAMES.iter().map(|name| floats(&tensors[&format!("initial.{name}")])).collect();
        Self { tensors, settings: serde_json::from_slice(&settings).unwrap(), values, buffers: Vec::new() }
    }

    fn gradients(&self, step: usize) -> Vec<Vec<f32>> {
        NAMES.iter().map(|name| floats(&self.tensors[&format!("grads.{name}")].get(step).unwrap())).collect()
    }
}

#[test]
fn rates_norms_and_parameters_are_pytorchs() {
    for case in ["constant", "linear", "cosine", "cosine_no_clip"] {
        let mut run = Run::open(case);
        let (settings, total) = (run.settings.clone(), run.settings["steps"].as_u64().unwrap());
        let cx = BuildCx { steps: Step(total), domains: &[], words: None };
        let betas = &settings["betas"];
        let optimizer = method(json!({
            "method": "adamw", "lr": settings["lr"], "weight_decay": settings["weight_decay"], "beta1": betas[0], "beta2": betas[1],
            "eps": settings["eps"],
        }));
        let optimizer = OPTIMIZERS.build(&optimizer, &"optimizer".into(), &cx).unwrap();
        let schedule = method(json!({"method": settings["schedule"], "warmup": settings["warmup_steps"]}));
        let schedule = SCHEDULES.build(&schedule, &"schedule".into(), &cx).unwrap();
        let (rates, norms) = (floats(&run.tensors["lr"]), floats(&run.tensors["grad_norm"]));
        run.buffers = run
            .values
            .iter()
            .map(|value| optimizer.buffers(&[value.len()]).iter().map(|(_, length)| vec![0.0; *length]).collect())
            .collect();
        for step in 0..total {
            let mut gradients = run.gradients(step as usize);
            let norm = clip::norm(gradients.iter().map(|gradient| clip::square(gradient)));
            assert_near(case, &[norm as f32], &norms[step as usize..=step as usize]);
            let factor = clip::factor(norm, settings["max_grad_norm"].as_f64());
            gradients.iter_mut().flatten().for_each(|g| *g *= factor);
            let lr = optimizer.lr() * schedule.factor(Step(step), Step(total));
            assert_near(case, &[lr as f32], &rates[step as usize..=step as usize]);
            for ((value, gradient), buffers) in run.values.iter_mut().zip(&gradients).zip(&mut run.buffers) {
                let cx = UpdateCx { step: Step(step + 1), lr, decay: true, shape: &[gradient.len()], born: None };
                optimizer.update(&cx, value, gradient, buffers).unwrap();
            }
            for (name, value) in NAMES.iter().zip(&run.values) {
                if let Some(expected) = run.tensors.get(&format!("after_{}.{name}", step + 1)) {
                    assert_near(&format!("{case} after {} steps: {name}", step + 1), value, &floats(expected));
                }
            }
        }
    }
}

#[test]
fn parameters_out_of_range_are_refused_with_their_path() {
    let cx = BuildCx { steps: Step(10), domains: &[], words: None };
    let build = |value: Value| match OPTIMIZERS.build(&method(value), &"tune.optimizer".into(), &cx) {
        Ok(_) => Vec::new(),
        Err(faults) => faults.iter().map(ToString::to_string).collect(),
    };
    assert_eq!(build(json!({"method": "adamw", "lr": -1.0})), ["`tune.optimizer.lr` is -1.0; expected 0.0 or more"]);
    assert_eq!(
        build(json!({"method": "adamw", "learning_rate": 1.0})),
        ["`tune.optimizer.learning_rate` is not a known field; known are lr, weight_decay, beta1, beta2, eps"]
    );
    assert_eq!(
        build(json!({"method": "adamv"})),
        [
            "`tune.optimizer.method` is \"adamv\", which no method of point optimizer is called; known are adamw; did you mean \"adamw\"?"
        ]
    );
}
