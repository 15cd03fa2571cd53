//! What an optimiser keeps, and where a schedule stands, where components have steps of their own: vectors that rest, links that begin anew.

use std::collections::BTreeSet;

use attune_spec::id::Step;
use attune_tensor::Mapped;
use attune_trainer::protocol::Event;
use attune_trainer::run::{End, run};

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
            ("tune.schedule", "{method: linear}"),
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
