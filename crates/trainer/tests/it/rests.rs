//! What an optimiser keeps, and where a schedule stands, where components have steps of their own: vectors that rest, links that begin anew; and what
//! such components leave in the end.

use std::collections::{BTreeMap, BTreeSet};

use attune_spec::id::Step;
use attune_tensor::Mapped;
use attune_trainer::protocol::Event;
use attune_trainer::run::{End, run};
use candle_core::Device;

use crate::bits::checkpoint;
use crate::support::{Outside, Small, metric};

/// The optimiser's numbers in the checkpoint of a run that is stopped after some steps, by their names, and the names of metrics.
fn stopped(small: &Small, changes: &[(&str, &str)], after: u64) -> (Vec<(String, Vec<f32>)>, BTreeSet<String>) {
    let (request, _work) = small.request(small.plan(changes), 1, None);
    let outside = Outside::stopping_after(after);
    assert_eq!(run(&request, &outside).unwrap(), End::Stopped(Step(after)));
    let kept = Mapped::open(&checkpoint(&outside).join("optimizer.safetensors")).unwrap();
    let numbers = |name: &str| kept.get_number(name).unwrap().unwrap().to_numbers().unwrap().to_vec1::<f32>().unwrap();
    let kept = kept.names().map(|name| (name.to_owned(), numbers(name))).collect();
    let events = outside.events.into_inner().unwrap();
    let metrics = events.iter().flat_map(|event| match event {
        Event::Metrics { metrics, .. } => metrics.iter().map(|metric| metric.name.clone()).collect(),
        _ => Vec::new(),
    });
    (kept, metrics.collect())
}

/// The moments of a vector that rests are those that it had, to the bit, and those of all others are not.
#[test]
fn moments_of_what_rests_stay_as_they_were() {
    let small = Small::new();
    let adapter = "{method: vectorfit, freeze: 0.3, begins: 0.2, every: 0.6, checks: 1}";
    let changes = [("tune.adapter", adapter), ("tune.optimizer", "{method: adamw, lr: 0.01, weight_decay: 0.1}")];
    let (two, five) = (stopped(&small, &changes, 2).0, stopped(&small, &changes, 5));
    let resting: Vec<&str> = five.1.iter().filter_map(|name| name.split_once("rests/").map(|(_, id)| id)).collect();
    // Of 14 linears, a vector each.
    assert_eq!(resting.len(), 4, "{resting:?}");
    assert_eq!(two.len(), five.0.len());
    for ((name, then), (_, now)) in two.iter().zip(&five.0) {
        assert_eq!(then == now, resting.iter().any(|id| name.contains(id)), "{name}");
    }
}

/// A link has a schedule of its own: the learning rate falls to its end, and the next one begins where the first did.
#[test]
fn the_schedule_begins_anew_with_each_link() {
    let small = Small::new();
    let rates = |adapter: &str| {
        let changes = [
            ("tune.adapter", adapter),
            ("tune.schedule", "{method: linear, warmup: 0}"),
            ("tune.steps", "9"),
            ("tune.batch_tokens", "128"),
        ];
        metric(&small.finish(small.plan(&changes), 1).0, "train/lr")
    };
    let chain = rates("{method: chain-of-lora, rank: 2, links: 3}");
    assert_eq!(chain.len(), 9);
    assert!(chain[..3] == chain[3..6] && chain[..3] == chain[6..] && chain[0] > chain[2], "{chain:?}");
    let plain = rates("{method: lora, rank: 2}");
    assert!(plain.windows(2).all(|pair| pair[0] > pair[1]), "{plain:?}");
}

/// The folder that a job of 10 steps leaves, as it is read, and the shapes of its tensors by their names.
fn left(small: &Small, adapter: &str) -> (attune_adapt::peft::Folder, BTreeMap<String, Vec<usize>>) {
    let files = small.finish(small.plan(&[("tune.adapter", adapter)]), 1).1;
    let folder = tempfile::tempdir().unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::write(folder.path().join(name), &files[&format!("Result/{name}")]).unwrap();
    }
    let tensors =
        candle_core::safetensors::load(folder.path().join("adapter_model.safetensors"), &Device::Cpu).unwrap();
    let shapes = tensors.into_iter().map(|(name, tensor)| (name, tensor.dims().to_vec())).collect();
    (attune_adapt::peft::read(folder.path()).unwrap(), shapes)
}

/// Of 14 linears 3 stay open: the others are not in the file, and the folder says which are.
#[test]
fn what_is_closed_is_absent_from_the_file() {
    let small = Small::new();
    let adapter =
        "{method: selective-lora, rank: 2, most: 0.2, before: 0, every: 1, penalty: 0, start: 0.5, score_lr: 1}";
    let (folder, shapes) = left(&small, adapter);
    assert_eq!((shapes.len(), folder.targets.entries().len()), (3 * 4, 3), "{shapes:?}");
    assert_eq!(folder.method.method, "selective-lora");
}

/// The ranks behind the one that is left are not in the file either, and PEFT's own keys say what is.
#[test]
fn a_file_has_the_rank_that_is_left() {
    let small = Small::new();
    let (folder, shapes) =
        left(&small, "{method: elastic-lora, rank: 4, step: 1, smallest: 1, alpha: 8, left: smallest}");
    let ranks: Vec<usize> =
        shapes.iter().filter(|(name, _)| name.contains("lora_A")).map(|(_, shape)| shape[0]).collect();
    assert_eq!((ranks, shapes.len()), (vec![1; 14], 28));
    assert_eq!(folder.method.params["extracted"], true);
    let (whole, _) = left(&small, "{method: elastic-lora, rank: 4, step: 1, smallest: 1, alpha: 8, left: largest}");
    assert!(!whole.method.params.contains_key("extracted"));
}

/// Few kept numbers are there with their places, and the share of entries that do not change is said.
#[test]
fn a_file_has_the_numbers_that_were_kept() {
    let small = Small::new();
    let (folder, shapes) = left(&small, "{method: roselora, rank: 2, keep: 0.1, ends: 0.5}");
    assert_eq!(shapes.len(), 14 * 4);
    let share = folder.method.params["sparsity"].as_f64().unwrap();
    assert!((0.9..1.0).contains(&share), "{share}");
}
