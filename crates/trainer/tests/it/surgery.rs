//! Jobs that make another model of their base first.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use attune_architecture::{Family, Place};
use attune_models::{Base, Model, Pass, Stack};
use attune_points::{Layout, TensorName, Theta};
use attune_spec::job::Precision;
use candle_core::{DType, Device, Tensor};

use attune_trainer::{component, few};

use crate::outputs::{self, unpack};
use crate::support::{Small, metric};

/// Four copies of each MLP, in two experts each, which train with their routers.
const UPCYCLED: &[(&str, &str)] = &[
    ("tune.surgery", "{method: dynamic-dino, copies: 4, granularity: 2}"),
    ("tune.adapter", "{method: full, targets: [w1, w2, w3, gate]}"),
    ("tune.from_scratch", "false"),
];

fn logits(folder: &Path) -> Tensor {
    let model = Model::new(Base::open(folder, Precision::F32).unwrap(), Stack::default());
    let (theta, layout) = (Theta::default(), Layout::single(&IDS));
    model.logits(&Pass { theta: &theta, layout: &layout, dropout: None }).unwrap()
}

const IDS: [u32; 12] = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 33];

/// Keeps a model and its logits for `crates/models/golden/check_transformers_reads.py`, if that is asked for.
fn leave(case: &str, folder: &Path) {
    let Some(to) = std::env::var_os("ATTUNE_WRITTEN") else { return };
    let to = Path::new(&to).join(case);
    std::fs::create_dir_all(to.join("model")).unwrap();
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join("model").join(entry.file_name())).unwrap();
    }
    let ids = Tensor::new(IDS.map(i64::from).as_slice(), &Device::Cpu).unwrap();
    let tensors = std::collections::HashMap::from([("input_ids", ids), ("logits", logits(folder))]);
    candle_core::safetensors::save(&tensors, to.join("logits.safetensors")).unwrap();
}

#[test]
fn an_upcycled_base_starts_as_it_was_learns_and_is_kept_as_a_model_of_experts() {
    let small = Small::with_weights();
    let plain = small.plan(&[("tune.from_scratch", "false"), ("tune.steps", "1")]);
    let before = metric(&small.finish(plain, 1).0, "eval/sums/loss")[0];
    let plan = small.plan(&[UPCYCLED, &[("tune.steps", "40")]].concat());
    let (events, files) = small.finish(plan, 1);
    let losses = metric(&events, "eval/sums/loss");
    let (first, last) = (losses[0], *losses.last().unwrap());
    assert!((first - before).abs() < 1e-5, "{first} at the start; the base has {before}");
    assert!(last < 0.8 * first, "{first} before, {last} after");

    let folder = small.path("trained");
    std::fs::create_dir(&folder).unwrap();
    for (name, bytes) in files.iter().filter_map(|(name, bytes)| Some((name.strip_prefix("Result/")?, bytes))) {
        std::fs::write(folder.join(name), bytes).unwrap();
    }
    leave("trained", &folder);
    let read = Base::open(&folder, Precision::F32).unwrap();
    let architecture = read.architecture();
    assert_eq!((architecture.family, architecture.inner), (Family::Mixtral, 12));
    let experts = architecture.experts.unwrap();
    assert_eq!((experts.count, experts.per_token, experts.normalised, experts.balance), (8, 2, true, 0.01));
    // What trained has moved, and apart: copies from one another, and the rows of one copy.
    let tensor = |place: Place, expert: Option<u32>| {
        let sites = architecture.sites();
        let site = sites.iter().find(|site| (site.place, site.layer, site.expert) == (place, Some(0), expert)).unwrap();
        read.tensor(&TensorName::new(site.id.as_str(), "weight"), DType::F32).unwrap()
    };
    let distance =
        |a: &Tensor, b: &Tensor| -> f32 { (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap() };
    let router = tensor(Place::Router, None);
    assert!(distance(&router.narrow(0, 0, 1).unwrap(), &router.narrow(0, 1, 1).unwrap()) > 1e-4);
    assert!(distance(&tensor(Place::Up, Some(0)), &tensor(Place::Up, Some(2))) > 1e-4);
    // The rest is the base's.
    let base = Base::open(&small.path("base"), Precision::F32).unwrap();
    let name = TensorName::from_path("model.layers.0.self_attn.q_proj.weight");
    let [old, new] = [&base, &read].map(|base| base.tensor(&name, DType::F32).unwrap());
    assert_eq!(distance(&old, &new), 0.0);
    // The next run starts where this one ended.
    let changes = [
        ("base", "./trained"),
        ("tune.from_scratch", "false"),
        ("tune.steps", "1"),
        ("tune.adapter", "{method: full}"),
    ];
    let again = metric(&small.finish(small.plan(&changes), 1).0, "eval/sums/loss")[0];
    assert!((again - last).abs() < 1e-6, "{last} in the run that made it, {again} read again");
}

/// Every row goes through two of eight experts; of which two, the report says for each layer.
#[test]
fn a_report_says_which_experts_are_chosen_together() {
    let small = Small::with_weights();
    let (_, files) = small.finish(small.plan(&[UPCYCLED, &[("tune.steps", "20")]].concat()), 1);
    let report: serde_json::Value = serde_json::from_slice(&files["Report/experts.json"]).unwrap();
    let rows = report["rows"].as_u64().unwrap();
    let layers = report["layers"].as_array().unwrap();
    assert_eq!((layers.len(), rows > 50), (2, true), "{rows} rows");
    let mut pairs = BTreeSet::new();
    for (number, layer) in layers.iter().enumerate() {
        assert_eq!(layer["layer"], number);
        let counts: Vec<Vec<u64>> = serde_json::from_value(layer["rows_of_both"].clone()).unwrap();
        assert_eq!(counts.iter().enumerate().map(|(expert, row)| row[expert]).sum::<u64>(), 2 * rows);
        for (one, row) in counts.iter().enumerate() {
            // The partners of an expert's rows are as many as its rows.
            assert_eq!(row.iter().sum::<u64>(), 2 * row[one]);
            for (other, &count) in row.iter().enumerate() {
                assert_eq!(count, counts[other][one]);
                if one < other && count > 0 {
                    pairs.insert((number, one, other));
                }
            }
        }
    }
    assert!(pairs.len() > 2, "{pairs:?}");
    let (_, plain) = small.finish(small.plan(&[("tune.from_scratch", "false"), ("tune.steps", "1")]), 1);
    assert!(!plain.contains_key("Report/experts.json"), "a model without experts has nothing to say of them");
}

/// Without the loss on routing the copies that were likeliest at the start stay so.
#[test]
fn the_balance_loss_spreads_rows_over_experts() {
    let small = Small::with_weights();
    let uneven = |balance: &str| {
        let surgery = format!("{{method: dynamic-dino, copies: 4, granularity: 2, balance: {balance}}}");
        let changes = [UPCYCLED, &[("tune.surgery", surgery.as_str()), ("tune.steps", "60")]].concat();
        let (_, files) = small.finish(small.plan(&changes), 1);
        let report: serde_json::Value = serde_json::from_slice(&files["Report/experts.json"]).unwrap();
        let share = |layer: &serde_json::Value| -> f64 {
            let counts: Vec<Vec<u64>> = serde_json::from_value(layer["rows_of_both"].clone()).unwrap();
            let of_each: Vec<f64> = counts.iter().enumerate().map(|(expert, row)| row[expert] as f64).collect();
            let sum: f64 = of_each.iter().sum();
            of_each.iter().map(|of_one| (of_one / sum).powi(2)).sum()
        };
        report["layers"].as_array().unwrap().iter().map(share).sum::<f64>()
    };
    let (without, with) = (uneven("0"), uneven("1"));
    assert!(with < 0.9 * without, "sums of squared shares: {without} without, {with} with");
}

#[test]
fn a_surgery_that_does_not_fit_the_base_is_a_fault_at_its_field() {
    let small = Small::with_weights();
    let plan = small.plan(&[UPCYCLED, &[("tune.surgery", "{method: dynamic-dino, granularity: 5}")]].concat());
    let (request, _work) = small.request(plan, 1, None);
    let outside = crate::support::Outside::default();
    let error = attune_trainer::run::run(&request, &outside).unwrap_err();
    let faults: BTreeMap<String, String> =
        error.faults().into_iter().map(|fault| (fault.path.to_string(), fault.message)).collect();
    assert_eq!(faults["tune.surgery"], "makes `inner` 4.8 of 24; expected parameters that make it whole");
}

/// Layers of the base that are repeated, each copy with an adapter of its own.
const REPEATED: &[(&str, &str)] = &[
    ("tune.surgery", "{method: layer-replication, ranges: [[0, 2], [0, 2]]}"),
    ("tune.adapter", "{method: lora, rank: 4, alpha: 8}"),
    ("tune.from_scratch", "false"),
];

/// What such a job trains says of which base it is: who reads it makes that again, the next job that starts from it says the same or is
/// refused, and merged it is a plain model.
#[test]
fn an_adapter_on_repeated_layers_says_so_and_is_read_on_them() {
    for held in [&[][..], &[("tune.quantization", "{method: nf4}")]] {
        let small = Small::with_weights();
        let into = if held.is_empty() { &[][..] } else { &[("outputs.merged_into", "dequantized")] };
        let changes = [REPEATED, held, into, &[("outputs.merged", "true"), ("tune.steps", "20")]].concat();
        let (events, files) = small.finish(small.plan(&changes), 1);
        let losses = metric(&events, "train/loss");
        assert!(losses[19] < 0.9 * losses[0], "{losses:?}");
        unpack(&files, "Result", &small.path("adapter"));
        let config: serde_json::Value = serde_json::from_slice(&files["Result/adapter_config.json"]).unwrap();
        assert_eq!(config["layer_replication"], serde_json::json!([[0, 2], [0, 2]]));
        let folders = [small.path("adapter")];
        let base = few::open_for(&small.path("base"), &folders, Precision::F32).unwrap();
        assert_eq!(base.architecture().layers, 4);
        let (base, stack, theta) = component::frozen(base, [folders[0].as_path()]).unwrap();
        // Copies of one layer have become different.
        let up = |layer: u32| {
            let name = TensorName::from_path(&format!("model.layers.{layer}.mlp.up_proj.lora_B"));
            theta.banks[0].sets[0].get(&name).unwrap().clone()
        };
        let apart = (up(0) - up(2)).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(apart > 1e-4, "{apart}");
        let spoken = outputs::logits(&Model::new(base, stack), &theta);
        unpack(&files, "Merged", &small.path("merged"));
        let merged = Base::open(&small.path("merged"), Precision::F32).unwrap();
        assert_eq!((merged.architecture().layers, &merged.architecture().origins), (4, &None));
        let merged = outputs::logits(&Model::new(merged, Stack::default()), &Theta::default());
        let off = outputs::largest_difference(&merged, &spoken);
        assert!(off < 1e-4, "merged it is off by {off}");

        let from = [held, &[("tune.adapter", "{from: ./adapter}"), ("tune.steps", "2"), REPEATED[2]]].concat();
        let (again, _) = small.finish(small.plan(&[&from[..], &REPEATED[..1]].concat()), 1);
        let (before, after) = (*metric(&events, "eval/sums/loss").last().unwrap(), metric(&again, "eval/sums/loss")[0]);
        assert!((before - after).abs() < 1e-4 * before, "{before} ended, {after} began");
        let refused = |changes: &[(&str, &str)]| {
            let (request, _work) = small.request(small.plan(changes), 1, None);
            attune_trainer::run::run(&request, &crate::support::Outside::default()).unwrap_err().to_string()
        };
        let message = refused(&from);
        assert!(message.contains("layers are repeated; expected `tune.surgery` to be"), "{message}");
        assert!(message.contains("[[0,2],[0,2]]"), "{message}");
        let other = [&from[..], &[("tune.surgery", "{method: layer-replication, ranges: [[0, 2], [1, 2], [1, 2]]}")]];
        assert!(refused(&other.concat()).contains("layers are repeated; expected `tune.surgery`"));
    }
}

#[test]
fn an_adapter_on_the_base_as_it_is_is_not_read_on_repeated_layers() {
    let small = Small::with_weights();
    let (_, files) = small.finish(small.plan(&[("tune.from_scratch", "false"), ("tune.steps", "1")]), 1);
    unpack(&files, "Result", &small.path("adapter"));
    let changes = [REPEATED, &[("tune.adapter", "{from: ./adapter}")]].concat();
    let (request, _work) = small.request(small.plan(&changes), 1, None);
    let error = attune_trainer::run::run(&request, &crate::support::Outside::default()).unwrap_err();
    assert!(error.to_string().contains("`tune.surgery` repeats"), "{error}");
}
