//! Bases in few bits: what is trained beside them, what says so, and what it is merged into.

use attune_models::{Model, Stack};
use attune_points::Theta;
use attune_spec::job::Precision;
use attune_trainer::run::run;
use attune_trainer::{component, few};

use crate::outputs::{adapted, largest_difference, logits, unpack};
use crate::support::{Outside, Small, metric};

const NF4: (&str, &str) = ("tune.quantization", "{method: nf4}");
const WEIGHTS: (&str, &str) = ("tune.from_scratch", "false");

/// What a model that speaks says with the adapters of these folders.
fn spoken(small: &Small, adapters: &[&str]) -> Vec<f32> {
    let folders: Vec<_> = adapters.iter().map(|name| small.path(name)).collect();
    let base = few::open_for(&small.path("base"), &folders, Precision::F32).unwrap();
    let (base, stack, theta) = component::frozen(base, folders.iter().map(|folder| folder.as_path())).unwrap();
    logits(&Model::new(base, stack), &theta)
}

fn failure(small: &Small, changes: &[(&str, &str)]) -> String {
    let (request, _work) = small.request(small.plan(changes), 1, None);
    run(&request, &Outside::default()).unwrap_err().to_string()
}

fn last(events: &[attune_trainer::protocol::Event]) -> f64 {
    *metric(events, "eval/sums/loss").last().unwrap()
}

/// What a job trains beside few bits is for them: its folder says so, and whoever reads it makes the same base, with the outputs
/// that the job had; the next job that starts from it starts there.
#[test]
fn an_adapter_is_read_with_the_base_that_it_was_trained_on() {
    for (adapter, precision, requantized) in [
        ("{method: lora, rank: 4, alpha: 8}", "f32", false),
        ("{method: lora, rank: 4, alpha: 8}", "bf16", false),
        ("{method: dora, rank: 4, alpha: 8}", "f32", false),
        ("{method: lora, rank: 4, alpha: 8, init: {method: pissa}}", "f32", false),
        ("{method: lora, rank: 4, alpha: 8, init: {method: loftq}}", "f32", false),
        ("{method: lora, rank: 4, alpha: 8, init: {method: loftq, iterations: 3}}", "f32", true),
        ("{method: lora, rank: 4, alpha: 8, init: {method: loftq, iterations: 2}}", "bf16", true),
    ] {
        let small = Small::with_weights();
        let merged = [("outputs.merged", "true"), ("outputs.merged_into", "dequantized")];
        let held = [NF4, WEIGHTS, ("tune.precision", precision)];
        let changes = [&held[..], &merged, &[("tune.adapter", adapter), ("tune.steps", "20")]].concat();
        let (events, files) = small.finish(small.plan(&changes), 1);
        let losses = metric(&events, "train/loss");
        assert!(losses[19] < 0.9 * losses[0], "{adapter}: {losses:?}");
        unpack(&files, "Result", &small.path("adapter"));
        let said: serde_json::Value = serde_json::from_slice(&files["Result/base_quantization.json"]).unwrap();
        let expected = serde_json::json!({
            "precision": precision, "quantization": {"method": "nf4", "double_quant": false},
        });
        assert_eq!(said, expected);
        assert!(String::from_utf8_lossy(&files["Result/README.md"]).contains("nf4"));
        assert_eq!(files.contains_key("Result/base_quantization.safetensors"), requantized, "{adapter}");
        // A next job reads the same, and goes on from where the first ended.
        let from = [&held[..], &[("tune.adapter", "{from: ./adapter}"), ("tune.steps", "2")]].concat();
        let (again, further) = small.finish(small.plan(&from), 1);
        let (before, after) = (last(&events), metric(&again, "eval/sums/loss")[0]);
        // Written in 32 bits; two products of a start are one in its folder.
        assert!((before - after).abs() < 1e-4 * before, "{adapter}: {before} ended, {after} began");
        assert_eq!(further.contains_key("Result/base_quantization.safetensors"), requantized);
        // Merged into what it was trained beside it says the same, in whole numbers.
        if precision == "f32" {
            unpack(&files, "Merged", &small.path("merged"));
            let merged = few::open_for(&small.path("merged"), &[], Precision::F32).unwrap();
            let merged = logits(&Model::new(merged, Stack::default()), &Theta::default());
            let off = largest_difference(&merged, &spoken(&small, &["adapter"]));
            assert!(off < 1e-4, "{adapter}: merged it is off by {off}");
        }
        // A base of whole numbers is another one.
        let whole = few::open_for(&small.path("base"), &[], Precision::F32).unwrap();
        let (model, theta) = adapted(whole, &small.path("adapter"));
        assert!(largest_difference(&logits(&model, &theta), &spoken(&small, &["adapter"])) > 1e-3, "{adapter}");
    }
}

#[test]
fn an_adapter_does_not_stand_beside_other_weights_than_its_own() {
    let small = Small::with_weights();
    let steps = ("tune.steps", "1");
    let (_, files) = small.finish(small.plan(&[NF4, WEIGHTS, steps]), 1);
    unpack(&files, "Result", &small.path("adapter"));
    let double = ("tune.quantization", "{method: nf4, double_quant: true}");
    let (_, files) = small.finish(small.plan(&[double, WEIGHTS, steps]), 1);
    unpack(&files, "Result", &small.path("other"));
    let from = ("tune.adapter", "{from: ./adapter}");
    for changes in [&[from, WEIGHTS][..], &[from, WEIGHTS, double], &[from, WEIGHTS, NF4, ("tune.precision", "bf16")]] {
        let message = failure(&small, changes);
        let expected = "`tune.stack[0].from` was trained on a base of {\"double_quant\":false,\"method\":\"nf4\"} with products in \
                        f32; expected `tune.quantization` and `tune.precision` to say so";
        let other = expected
            .replace("{\"double_quant\":false,\"method\":\"nf4\"}", "{\"method\":\"nf4\",\"double_quant\":false}");
        assert!(message.contains(expected) || message.contains(&other), "{message}");
    }
    let both = few::open_for(&small.path("base"), &[small.path("adapter"), small.path("other")], Precision::F32);
    let message = both.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(message.contains("no base is both"), "{message}");
    // One of a base of whole numbers may stand beside few bits.
    let (_, files) = small.finish(small.plan(&[WEIGHTS, steps]), 1);
    unpack(&files, "Result", &small.path("plain"));
    small.finish(small.plan(&[("tune.adapter", "{from: ./plain}"), WEIGHTS, NF4, steps]), 1);
    for (file, text, expected) in [
        ("base_quantization.json", "{", "base_quantization.json: EOF while parsing"),
        ("base_quantization.json", r#"{"precision": "f32", "quantization": {"method": "nf5"}}"#, "\"nf5\""),
    ] {
        std::fs::write(small.path("adapter").join(file), text).unwrap();
        let read = few::open_for(&small.path("base"), &[small.path("adapter")], Precision::F32);
        let message = read.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(message.contains(expected), "{message}");
    }
}

/// Merged into the base's folder the adapter changes its numbers and not those of few bits.
#[test]
fn what_is_merged_into_the_base_is_the_base_with_the_adapter() {
    let small = Small::with_weights();
    let changes = [NF4, WEIGHTS, ("outputs.merged", "true"), ("outputs.merged_into", "base"), ("tune.steps", "20")];
    let (_, files) = small.finish(small.plan(&changes), 1);
    unpack(&files, "Result", &small.path("adapter"));
    unpack(&files, "Merged", &small.path("merged"));
    let open = |name: &str| few::open_for(&small.path(name), &[], Precision::F32).unwrap();
    let (model, theta) = adapted(open("base"), &small.path("adapter"));
    let expected = logits(&model, &theta);
    let merged = logits(&Model::new(open("merged"), Stack::default()), &Theta::default());
    assert!(largest_difference(&merged, &expected) < 1e-4);
    assert!(largest_difference(&merged, &spoken(&small, &["adapter"])) > 1e-3);
}

/// The start makes up for what few bits lose: the first loss is nearer to that of the base as it was.
#[test]
fn a_start_that_makes_up_for_few_bits_begins_nearer_to_the_base() {
    let small = Small::with_weights();
    let first = |more: &[(&str, &str)]| {
        let (events, _) = small.finish(small.plan(&[&[WEIGHTS, ("tune.steps", "1")], more].concat()), 1);
        metric(&events, "eval/sums/loss")[0]
    };
    let loftq = |rounds: u32| format!("{{method: lora, rank: 8, init: {{method: loftq, iterations: {rounds}}}}}");
    let exact = first(&[]);
    let plain = (first(&[NF4]) - exact).abs();
    for rounds in [1, 4] {
        let off = (first(&[NF4, ("tune.adapter", &loftq(rounds))]) - exact).abs();
        assert!(off < 0.7 * plain, "{rounds} rounds: {off} from the base, without {plain}");
    }
}

#[test]
fn what_the_base_is_less_is_checked_as_it_is_read() {
    let small = Small::with_weights();
    let adapter = "{method: lora, rank: 2, targets: q_proj, init: {method: loftq, iterations: 2}}";
    let (_, files) = small.finish(small.plan(&[NF4, WEIGHTS, ("tune.adapter", adapter), ("tune.steps", "1")]), 1);
    unpack(&files, "Result", &small.path("adapter"));
    let file = small.path("adapter").join("base_quantization.safetensors");
    let whole = candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap();
    let name = whole.keys().min().unwrap().clone();
    let changed = |change: &dyn Fn(&mut std::collections::HashMap<String, candle_core::Tensor>)| {
        let mut tensors = whole.clone();
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, &file).unwrap();
        failure(&small, &[NF4, WEIGHTS, ("tune.adapter", "{from: ./adapter}"), ("tune.steps", "1")])
    };
    let missing = changed(&|tensors| drop(tensors.remove(&name)));
    assert!(missing.contains(&format!("base_quantization.safetensors: has no tensor {name}")), "{missing}");
    let further = changed(&|tensors| drop(tensors.insert("x.lora_A".to_owned(), tensors[&name].clone())));
    assert!(further.contains("tensor \"x.lora_A\" belongs to no site of the adapter"), "{further}");
    let other = changed(&|tensors| drop(tensors.insert(name.clone(), tensors[&name].narrow(0, 0, 1).unwrap())));
    assert!(other.contains("; the adapter makes it ["), "{other}");
}
