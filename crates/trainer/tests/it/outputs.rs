//! What a run leaves behind can be used: by itself, by another run, and in place of what it was made from.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use attune_adapt::{ADAPTERS, peft};
use attune_architecture::targets;
use attune_models::{Base, Model, Pass, Slot, Stack};
use attune_points::adapter::{Adapter, Port};
use attune_points::{Bank, BankKind, Layout, Theta};
use attune_spec::id::Step;
use attune_spec::job::Precision;
use attune_spec::method::BuildCx;
use attune_trainer::run::run;
use candle_core::{Device, Tensor};

use crate::support::{Outside, Small, metric};

/// Writes the files of one role into a folder.
pub(crate) fn unpack(files: &BTreeMap<String, Vec<u8>>, role: &str, folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    for (name, bytes) in files.iter().filter_map(|(name, bytes)| Some((name.strip_prefix(role)?, bytes))) {
        let path = folder.join(name.trim_start_matches('/'));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

/// The model of a base with an adapter, put together from what lies in the two folders.
pub(crate) fn adapted(base: Base, folder: &Path) -> (Model, Theta) {
    let cx = BuildCx { steps: Step(1), domains: &[], words: None };
    let read = peft::read(folder).unwrap();
    let adapter = ADAPTERS.build(&read.method, &"adapter".into(), &cx).unwrap_or_else(|faults| panic!("{faults:?}"));
    let adapter: Arc<dyn Adapter> = adapter.into();
    let sites = targets::resolve(&read.targets, None, base.architecture(), |_| true).unwrap();
    let attachments = adapter.attach(base.architecture(), &sites).unwrap();
    let params = Arc::new(read.params(&*adapter, &attachments).unwrap());
    let stands_in = matches!(adapter.port(&attachments[0]), Port::Weights);
    let kind = if stands_in { BankKind::Weights } else { BankKind::Adapter };
    let bank = Bank { slot: "x".into(), kind, sets: vec![params], train: false };
    let stack = Stack::new(vec![Slot::new(adapter, attachments)]);
    (Model::new(base, stack), Theta::single([bank]))
}

pub(crate) fn logits(model: &Model, theta: &Theta) -> Vec<f32> {
    let layout = Layout::single(&(0..40).map(|i| (i * 37) % 250).collect::<Vec<u32>>());
    let logits: Tensor = model.logits(&Pass { theta, layout: &layout, dropout: None }).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_merged_models_logits_are_those_of_the_base_with_the_adapter() {
    for adapter in [
        "{method: lora, rank: 4, alpha: 8}",
        "{method: lora, rank: 4, alpha: 8, init: {method: pissa, iterations: 4}}",
        "{method: lora, rank: 7, alpha: 8, init: {method: olora}}",
        "{method: dora, rank: 4, alpha: 8}",
        "{method: ia3}",
        "{method: ln-tuning}",
        "{method: road, group_size: 4}",
        "{method: spiel, density: 0.1, every: 4, watch: 2}",
    ] {
        merged_equals_adapted(adapter);
    }
}

fn merged_equals_adapted(adapter: &str) {
    let small = Small::new();
    let plan = small.plan(&[("tune.adapter", adapter), ("outputs.merged", "true"), ("tune.steps", "30")]);
    let (_, files) = small.finish(plan, 1);
    unpack(&files, "Result", &small.path("adapter"));
    unpack(&files, "Merged", &small.path("merged"));
    let base = || Base::from_scratch(&small.path("base"), 7).unwrap();
    let plain = logits(&Model::new(base(), Stack::default()), &Theta::default());
    let (model, theta) = adapted(base(), &small.path("adapter"));
    let with_adapter = logits(&model, &theta);
    let merged = Base::open(&small.path("merged"), Precision::F32).unwrap();
    let merged = logits(&Model::new(merged, Stack::default()), &Theta::default());
    let moved = largest_difference(&plain, &with_adapter);
    assert!(moved > 0.1, "the adapter does nothing: {moved}");
    let off = largest_difference(&with_adapter, &merged);
    assert!(off < 1e-4, "{adapter}: off by {off}");
    // As a model that speaks has it.
    let base = base();
    let (base, stack, theta) = attune_trainer::component::frozen(base, [small.path("adapter").as_path()]).unwrap();
    let off = largest_difference(&with_adapter, &logits(&Model::new(base, stack), &theta));
    assert!(off < 1e-5, "{adapter}: off by {off} where it is frozen");
}

#[test]
fn a_model_that_is_trained_from_nothing_is_a_base_for_the_next_run() {
    let small = Small::new();
    let full = ("tune.adapter", "{method: full}");
    let (events, files) = small.finish(small.plan(&[full, ("tune.steps", "60")]), 2);
    let losses = metric(&events, "eval/sums/loss");
    let (before, after) = (losses[0], *losses.last().unwrap());
    assert!(after < 0.6 * before, "{before} before, {after} after");
    unpack(&files, "Result", &small.path("trained"));
    for adapter in ["{method: full}", "{method: lora, rank: 2}"] {
        let changes =
            [("base", "./trained"), ("tune.from_scratch", "false"), ("tune.steps", "1"), ("tune.adapter", adapter)];
        let (events, _) = small.finish(small.plan(&changes), 1);
        let again = metric(&events, "eval/sums/loss")[0];
        assert!((again - after).abs() < 1e-6, "{after} in the run that made it, {again} read again");
    }
}

#[test]
fn a_packed_sets_loss_is_the_token_weighted_mean_of_its_documents_alone() {
    let small = Small::new();
    let rows = std::fs::read_to_string(small.path("sums.jsonl")).unwrap();
    let mut changes =
        vec![("tune.steps".to_owned(), "3".to_owned()), ("tune.batch_tokens".to_owned(), "512".to_owned())];
    let mut sets = vec!["{name: all, source: ./all.jsonl}".to_owned()];
    let chosen: Vec<&str> = rows.lines().take(6).collect();
    std::fs::write(small.path("all.jsonl"), chosen.join("\n")).unwrap();
    for (index, row) in chosen.iter().enumerate() {
        std::fs::write(small.path(&format!("row{index}.jsonl")), row).unwrap();
        sets.push(format!("{{name: row{index}, source: ./row{index}.jsonl}}"));
    }
    changes.push(("data.validation".to_owned(), format!("[{}]", sets.join(", "))));
    let changes: Vec<(&str, &str)> = changes.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
    let (_, files) = small.finish(small.plan(&changes), 1);
    let report: serde_json::Value = serde_json::from_slice(&files["Report/report.json"]).unwrap();
    for measured in report["validation"].as_array().unwrap() {
        let (mut sum, mut tokens) = (0.0, 0.0);
        for index in 0..chosen.len() {
            let learned = report["data"][format!("validation/row{index}")]["trained_tokens"].as_f64().unwrap();
            sum += measured["loss"][format!("row{index}")].as_f64().unwrap() * learned;
            tokens += learned;
        }
        let packed = measured["loss"]["all"].as_f64().unwrap();
        assert!((packed - sum / tokens).abs() < 1e-5, "{packed} packed, {} alone", sum / tokens);
    }
}

/// What never trains is in the result as it started; what does has moved, and more with a rate of its own.
#[test]
fn a_factor_that_does_not_train_stays_as_it_started() {
    let small = Small::new();
    let trained = |adapter: &str, steps: &str| {
        let constant = ("tune.schedule", "{method: constant}");
        let plan = small.plan(&[("tune.adapter", adapter), ("tune.steps", steps), constant]);
        let folder = format!("adapter-{steps}");
        unpack(&small.finish(plan, 1).1, "Result", &small.path(&folder));
        let file = small.path(&folder).join("adapter_model.safetensors");
        let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        let mut sums = [0.0f32; 2];
        let mut of_a = Vec::new();
        let mut names: Vec<&String> = tensors.keys().collect();
        names.sort();
        for name in names {
            let values: Vec<f32> = tensors[name].flatten_all().unwrap().to_vec1().unwrap();
            sums[usize::from(name.contains("lora_B"))] += values.iter().map(|value| value.abs()).sum::<f32>();
            if name.contains("lora_A") {
                of_a.extend(values);
            }
        }
        (of_a, sums[1])
    };
    let b_alone = "{method: lora, rank: 4, trains: b, init: {method: orthonormal}}";
    let ((a, b), (later_a, later_b)) = (trained(b_alone, "1"), trained(b_alone, "6"));
    assert!(a == later_a && later_b > b, "A moved, or B did not");
    let (_, slow) = trained("{method: lora, rank: 4}", "1");
    let (_, fast) = trained("{method: lora, rank: 4, b_lr: 16}", "1");
    assert!((fast / slow - 16.0).abs() < 0.01, "the first step of B is {} times as long", fast / slow);
}

/// What a component holds and does not train is no parameter of it: VeRA's random matrices, LoRA's A where B trains alone.
#[test]
fn a_report_counts_what_trains() {
    let small = Small::new();
    let trained = |adapter: &str| {
        let (_, files) = small.finish(small.plan(&[("tune.adapter", adapter), ("tune.steps", "1")]), 1);
        let report: serde_json::Value = serde_json::from_slice(&files["Report/report.json"]).unwrap();
        report["trained_parameters"].as_u64().unwrap()
    };
    // Two layers of q (16 by 16) and v (8 by 16).
    let targets = "targets: [q_proj, v_proj]";
    assert_eq!(trained(&format!("{{method: vera, rank: 8, {targets}}}")), 2 * (8 + 16 + 8 + 8));
    assert_eq!(trained(&format!("{{method: lora, rank: 4, trains: b, {targets}}}")), 2 * 4 * (16 + 8));
    assert_eq!(trained(&format!("{{method: lora, rank: 4, {targets}}}")), 2 * 4 * (32 + 24));
}

#[test]
fn only_the_first_rows_of_a_domain_are_learned_from() {
    let small = Small::new();
    let (_, files) = small.finish(small.plan(&[("data.domains[1].rows", "3"), ("tune.steps", "2")]), 1);
    let report: serde_json::Value = serde_json::from_slice(&files["Report/report.json"]).unwrap();
    assert_eq!(report["data"]["data/sums"]["rows"], 3);
    assert_eq!(report["data"]["data/greetings"]["rows"], 7);
}

/// Folders of PEFT's whose LoRA is on parameters of all experts at once say what it says of them.
#[test]
fn adapters_on_parameters_of_experts_are_read_as_those_of_each_expert() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for name in ["olmoe", "qwen3_moe"] {
        let case = crates.join("adapt/golden/experts").join(name);
        let expected = candle_core::safetensors::load(case.join("expected.safetensors"), &Device::Cpu).unwrap();
        let base = Base::open(&crates.join("models/golden").join(name), Precision::F32).unwrap();
        let (model, theta) = adapted(base, &case.join("adapter"));
        let ids = expected["input_ids"].to_vec1::<i64>().unwrap().into_iter().map(|id| id as u32).collect::<Vec<_>>();
        let layout = Layout::single(&ids);
        let logits = model.logits(&Pass { theta: &theta, layout: &layout, dropout: None }).unwrap();
        let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let off = largest_difference(&values(&logits), &values(&expected["logits"]));
        assert!(off < 1e-4, "{name} is off by {off}");
    }
}

/// What would be found after the last step, where a base has no biases, is said before the first.
#[test]
fn a_component_that_does_not_merge_into_this_base_is_refused_before_it_trains() {
    let small = Small::with_weights();
    for (adapter, why) in [
        ("{method: beft}", "the component at model.layers.0.self_attn.v_proj does not merge: the linear has no bias"),
        ("{method: lora, rank: 2, bias: true, targets: [up_proj]}", "model.layers.0.mlp.up_proj does not merge"),
    ] {
        let changes = [("tune.from_scratch", "false"), ("tune.adapter", adapter), ("outputs.merged", "true")];
        let (request, _work) = small.request(small.plan(&changes), 1, None);
        let outside = Outside::default();
        let failure = run(&request, &outside).unwrap_err();
        assert!(failure.to_string().contains(why), "{failure}");
        assert!(failure.to_string().contains("outputs.merged"), "{failure}");
        assert!(metric(&outside.events.into_inner().unwrap(), "train/loss").is_empty());
    }
}

/// The mixture asks for two thirds of greetings; they are a quarter of the documents, and the report says where all came from.
#[test]
fn documents_of_a_class_keep_to_their_cap() {
    let small = Small::with_weights();
    let domains = "[{name: greetings, source: ./greetings.jsonl, weight: 2, provenance: {class: distilled, teacher: large}}, \
                    {name: sums, source: ./sums.jsonl, provenance: {class: expert}}]";
    let changes = [("data.domains", domains), ("data.caps", "{distilled: 0.25}"), ("tune.steps", "20")];
    let (_, files) = small.finish(small.plan(&changes), 1);
    let report: serde_json::Value = serde_json::from_slice(&files["Report/report.json"]).unwrap();
    let drawn = |domain: &str| report["documents"][domain].as_f64().unwrap();
    let all = drawn("greetings") + drawn("sums");
    assert!(all > 40.0 && (drawn("greetings") - all / 4.0).abs() <= 1.0, "{report}");
    let (_, free) = small.finish(small.plan(&[("tune.steps", "20")]), 1);
    let report: serde_json::Value = serde_json::from_slice(&free["Report/report.json"]).unwrap();
    assert!(report["documents"]["greetings"].as_f64() > report["documents"]["sums"].as_f64(), "{report}");
}
