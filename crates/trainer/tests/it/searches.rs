//! Jobs that search for what they learn and take no gradients.

use attune_trainer::protocol::{Event, Phase};
use attune_trainer::run::run;

use crate::support::{Outside, Small, metric};

/// Documents of 32 tokens and rows before them in each of four shards; nothing is said of how gradients change parameters.
const ROOM: (&str, &str) = ("tune.batch_tokens", "1024");
const NO_GRADIENTS: (&str, &str) = ("tune.optimizer", "{method: adamw}");
const SEARCHED: (&str, &str) =
    ("tune.adapter", "{method: bbtv2, length: 4, dimensions: 8, population: 8, budget: 400}");

/// What is learned by losses alone is kept, read again as it was, and stands beside what trains.
#[test]
fn a_run_without_gradients_learns_says_what_it_did_and_keeps_it() {
    let small = Small::with_weights();
    let changes = [
        SEARCHED,
        NO_GRADIENTS,
        ROOM,
        ("tune.from_scratch", "false"),
        ("tune.steps", "40"),
        ("tune.evaluate.every_steps", "20"),
    ];
    let (request, work) = small.request(small.plan(&changes), 2, None);
    let outside = Outside::default();
    run(&request, &outside).unwrap();
    let events = outside.events.into_inner().unwrap();
    let losses = metric(&events, "eval/sums/loss");
    assert!(losses[1..].iter().all(|loss| *loss < 0.98 * losses[0]), "{losses:?}");
    assert!(events.iter().any(|event| matches!(event, Event::Starting { phase: Phase::Rehearsal })));
    // A pass at what is there and at eight candidates a step, and one look before the first.
    let calls = metric(&events, "calls");
    assert_eq!((calls.len(), calls[0], calls[39]), (40, 10.0, 361.0));
    for site in ["model.embed_tokens", "model.layers.1.self_attn"] {
        for name in ["best", "reach"] {
            let said = metric(&events, &format!("{name}/{site}"));
            assert!(said.len() == 20 && said.iter().all(|number| *number > 0.0), "{name}/{site}: {said:?}");
        }
    }
    let trained = metric(&events, "train/loss");
    assert!(trained.len() == 40 && trained[39] < trained[0], "{trained:?}");
    assert!(metric(&events, "train/mfu").iter().all(|share| *share > 0.0));
    for name in ["train/grad_norm", "train/lr"] {
        assert!(metric(&events, name).is_empty(), "{name} is said of steps without gradients");
    }
    std::fs::rename(work.path().join("adapter"), small.path("searched")).unwrap();
    let stack = "[{name: a, from: ./searched, train: false}, {method: lora, rank: 2}]";
    let changes =
        [("tune.adapter", "null"), ("tune.stack", stack), ("tune.from_scratch", "false"), ("tune.steps", "1"), ROOM];
    let (events, _) = small.finish(small.plan(&changes), 1);
    assert_eq!(metric(&events, "eval/sums/loss")[0], losses[2]);
    // And it searches on by itself, from what it had found.
    let further = ("tune.adapter", "{from: ./searched}");
    let changes = [further, NO_GRADIENTS, ROOM, ("tune.from_scratch", "false"), ("tune.steps", "6")];
    let (events, _) = small.finish(small.plan(&changes), 1);
    let again = metric(&events, "eval/sums/loss");
    assert_eq!(again[0], losses[2]);
    assert!(metric(&events, "train/loss")[5] < trained[0]);
}

#[test]
fn what_is_said_of_gradients_where_none_are_taken_is_refused_by_its_field() {
    let small = Small::new();
    let failure = |changes: &[(&str, &str)]| {
        let (request, _work) = small.request(small.plan(&[&[SEARCHED, ROOM], changes].concat()), 1, None);
        run(&request, &Outside::default()).unwrap_err().to_string()
    };
    let all = failure(&[
        ("tune.optimizer", "{method: adamw, lr: 0.01}"),
        ("tune.schedule", "{method: cosine, warmup: 0.3}"),
        ("tune.max_grad_norm", "0.123"),
    ]);
    for field in ["tune.optimizer", "tune.schedule", "tune.max_grad_norm"] {
        assert!(all.contains(&format!("`{field}` is for steps along gradients, and what trains takes none")), "{all}");
    }
    let rule = failure(&[NO_GRADIENTS, ("tune.step", "{method: smart}")]);
    assert!(rule.contains("`tune.step` is `smart`; what trains has steps of its own"), "{rule}");
    let long = failure(&[NO_GRADIENTS, ("tune.steps", "50")]);
    assert!(long.contains("budget` is 400; 50 steps of 9 passes, and one before them, make 451"), "{long}");
    let answers = failure(&[
        NO_GRADIENTS,
        ("tune.objective", "{method: grpo, generations: 3, max_tokens: 6}"),
        ("tune.rewards", "[{method: overlong, margin: 4}]"),
        ("data.domains", "[{name: greetings, source: ./greetings.jsonl}]"),
        ("data.validation", "[{name: greetings, source: ./greetings.jsonl}]"),
    ]);
    assert!(answers.contains("the objective learns from answers"), "{answers}");
}

/// What is left of a component of many ranks is searched for when all has trained: what is found is in the report, the folder has the ranks that
/// were chosen, and a run that stops before the end, or has more ranks, finds the same.
#[test]
fn what_is_left_of_an_elastic_component_is_found_by_its_validation_loss() {
    let small = Small::with_weights();
    let elastic = "{method: elastic-lora, rank: 4, step: 1, smallest: 1, alpha: 8, left: searched, evaluations: 24, population: 6, most: 0.6}";
    let changes = [("tune.adapter", elastic), ("tune.from_scratch", "false"), ("tune.steps", "8")];
    let plan = small.plan(&changes);
    let (events, whole) = small.finish(plan.clone(), 1);
    let found: serde_json::Value = serde_json::from_slice(&whole["Report/found.json"]).unwrap();
    let front = found["front"].as_array().unwrap();
    assert!(found["evaluations"] == 24 && !front.is_empty(), "{found}");
    let of = |choice: &serde_json::Value| (choice["loss"].as_f64().unwrap(), choice["parameters"].as_u64().unwrap());
    assert!(front.windows(2).all(|two| of(&two[0]).0 < of(&two[1]).0 && of(&two[0]).1 > of(&two[1]).1), "{found}");
    let chosen = &front[found["chosen"].as_u64().unwrap() as usize];
    // The loss that was found is that of what is written down.
    let after = *metric(&events, "eval/sums/loss").last().unwrap();
    assert!((of(chosen).0 - after).abs() < 1e-5, "{after} {chosen}");
    let config: serde_json::Value = serde_json::from_slice(&whole["Result/adapter_config.json"]).unwrap();
    let ranks = chosen["ranks"].as_object().unwrap();
    let rank = |site: &str| config["rank_pattern"].get(site).unwrap_or_else(|| &config["r"]).clone();
    assert!(ranks.iter().all(|(site, chosen)| rank(site) == *chosen), "{config} {chosen}");
    assert_eq!(small.finish(plan.clone(), 2).1, whole);
    let outside = Outside::stopping_after(5);
    let (request, _work) = small.request(plan.clone(), 1, None);
    run(&request, &outside).unwrap();
    let checkpoint = crate::bits::checkpoint(&outside);
    let (request, _again) = small.request(plan, 1, Some(&checkpoint));
    let outside = Outside::default();
    run(&request, &outside).unwrap();
    assert_eq!(crate::support::files(&outside.events.into_inner().unwrap()), whole);
    // Without validation data it says so at its first step.
    let (request, _work) = small.request(small.plan(&[&changes[..], &[("data.validation", "[]")]].concat()), 1, None);
    let why = run(&request, &Outside::default()).unwrap_err().to_string();
    assert!(why.contains("searched for by its validation loss"), "{why}");
}
