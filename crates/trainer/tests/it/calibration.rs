//! Starts that look at the job's data before the first step.

use std::collections::BTreeMap;

use attune_spec::id::Step;
use attune_trainer::protocol::{Event, Phase};
use attune_trainer::run::{End, run};

use crate::support::{Outside, Small, files, metric};

const EVA: (&str, &str) = ("tune.adapter", "{method: lora, rank: 4, init: {method: eva, examples: 6}}");
const ADAPTER: &str = "Result/adapter_model.safetensors";

fn calibrates(events: &[Event]) -> bool {
    events.iter().any(|event| matches!(event, Event::Starting { phase: Phase::Calibration }))
}

fn note(events: &[Event]) -> Option<String> {
    events.iter().find_map(|event| match event {
        Event::Note { topic, message } if topic == "calibration" => Some(message.clone()),
        _ => None,
    })
}

/// It is one more phase of starting, which says what it did; a run that goes on does not do it again.
#[test]
fn what_a_start_asks_for_is_measured_once() {
    let small = Small::new();
    let (events, _) = small.finish(small.plan(&[]), 1);
    assert!(!calibrates(&events) && note(&events).is_none(), "nobody asks");
    let plan = small.plan(&[EVA]);
    let (request, _work) = small.request(plan.clone(), 2, None);
    let outside = Outside::stopping_after(3);
    assert_eq!(run(&request, &outside).unwrap(), End::Stopped(Step(3)));
    let events = outside.events.into_inner().unwrap();
    let phases: Vec<Phase> = events
        .iter()
        .filter_map(|event| match event {
            Event::Starting { phase } => Some(*phase),
            _ => None,
        })
        .collect();
    assert_eq!(phases, [Phase::Base, Phase::Data, Phase::Calibration, Phase::Rehearsal, Phase::Evaluation]);
    // Seven linears in each of two layers.
    let said = note(&events).unwrap();
    assert!(said.starts_with("14 statistics on 6 documents of "), "{said}");
    let checkpoint = events.iter().find_map(|event| match event {
        Event::Checkpoint { folder, .. } => Some(folder.clone()),
        _ => None,
    });
    let (request, _work) = small.request(plan, 2, checkpoint.as_deref());
    let outside = Outside::default();
    run(&request, &outside).unwrap();
    assert!(!calibrates(&outside.events.into_inner().unwrap()));
}

/// The factors A that a run of one step starts with, which that step hardly moves.
fn start(small: &Small, changes: &[(&str, &str)]) -> BTreeMap<String, Vec<f32>> {
    let usual = [EVA, ("tune.steps", "1"), ("tune.optimizer.lr", "1e-30")];
    let (_, files) = small.finish(small.plan(&[&usual, changes].concat()), 1);
    let tensors = candle_core::safetensors::load_buffer(&files[ADAPTER], &candle_core::Device::Cpu).unwrap();
    let values = |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let of_a = tensors.iter().filter(|(name, _)| name.contains("lora_A"));
    of_a.map(|(name, tensor)| (name.clone(), values(tensor))).collect()
}

/// The same start from the same first examples, whatever comes after them; another from others.
#[test]
fn a_start_depends_on_the_first_examples_alone() {
    let small = Small::new();
    let usual = start(&small, &[]);
    assert_eq!(usual.len(), 14);
    assert!(start(&small, &[("tune.steps", "2"), ("tune.optimizer.lr", "1e-20")]) == usual);
    let of = |examples: u32| {
        let adapter = format!("{{method: lora, rank: 4, init: {{method: eva, examples: {examples}}}}}");
        start(&small, &[("tune.adapter", &adapter)])
    };
    assert!(of(6) == usual && of(9) != usual, "of more examples");
    assert!(start(&small, &[("tune.seed", "8")]) != usual, "of another order");
    // There are nineteen in a run through the data.
    assert!(of(19) == of(3000) && of(18) != of(19));
}

/// What is measured is what the stack's adapters make of the base.
#[test]
fn adapters_that_the_stack_reads_are_there_when_it_is_measured() {
    let small = Small::new();
    let changes = [("tune.steps", "20"), ("tune.adapter.dropout", "0"), ("tune.optimizer.lr", "0.05")];
    let (request, work) = small.request(small.plan(&changes), 1, None);
    run(&request, &Outside::default()).unwrap();
    std::fs::rename(work.path().join("adapter"), small.path("before")).unwrap();
    let on = |stack: &str| start(&small, &[("tune.adapter", "null"), ("tune.stack", stack)]);
    let fresh = "{method: lora, rank: 4, init: {method: eva, examples: 6}}";
    let (alone, above) =
        (on(&format!("[{fresh}]")), on(&format!("[{{name: facts, from: ./before, train: false}}, {fresh}]")));
    assert!(alone == start(&small, &[]) && alone != above);
}

const KEPT: &str = "Statistics/statistics.safetensors";

/// Statistics that one job keeps serve another, which measures what is not there and ends with the bits that it would have had.
#[test]
fn statistics_are_kept_and_read_by_other_jobs() {
    let small = Small::new();
    let three = [EVA, ("tune.steps", "3")];
    let (_, without) = small.finish(small.plan(&three), 1);
    assert!(!without.contains_key(KEPT));
    let keeping = |more: &[(&str, &str)]| small.plan(&[&three[..], &[("outputs.statistics", "true")], more].concat());
    let (_, first) = small.finish(keeping(&[]), 2);
    assert!(first[ADAPTER] == without[ADAPTER], "keeping changes nothing");
    std::fs::write(small.path("kept.safetensors"), &first[KEPT]).unwrap();
    let reading = ("tune.statistics", "./kept.safetensors");

    let (events, second) = small.finish(small.plan(&[&three[..], &[reading]].concat()), 1);
    assert!(!calibrates(&events) && second[ADAPTER] == without[ADAPTER]);
    assert_eq!(note(&events).as_deref(), Some("14 statistics were measured by another job"));

    // Fewer sites need less of it; what more of them need is measured.
    let some = "{method: lora, rank: 4, targets: [q_proj], init: {method: eva, examples: 6}}";
    let (_, few) = small.finish(keeping(&[("tune.adapter", some)]), 1);
    assert!(few[KEPT].len() < first[KEPT].len());
    std::fs::write(small.path("kept.safetensors"), &few[KEPT]).unwrap();
    let (events, third) = small.finish(keeping(&[reading]), 1);
    assert!(calibrates(&events) && third[ADAPTER] == without[ADAPTER]);
    assert!(third[KEPT] == first[KEPT], "what was read is kept as well");
}

/// A run that goes on with a checkpoint keeps what the undisturbed run keeps.
#[test]
fn a_run_that_goes_on_keeps_the_same_statistics() {
    let small = Small::new();
    let plan = small.plan(&[EVA, ("tune.steps", "4"), ("outputs.statistics", "true")]);
    let (_, undisturbed) = small.finish(plan.clone(), 1);
    let (request, _first) = small.request(plan.clone(), 1, None);
    let outside = Outside::stopping_after(2);
    assert_eq!(run(&request, &outside).unwrap(), End::Stopped(Step(2)));
    let checkpoint = outside.events.into_inner().unwrap().into_iter().find_map(|event| match event {
        Event::Checkpoint { folder, .. } => Some(folder),
        _ => None,
    });
    let (request, _second) = small.request(plan, 1, checkpoint.as_deref());
    let outside = Outside::default();
    run(&request, &outside).unwrap();
    assert!(files(&outside.events.into_inner().unwrap()) == undisturbed);
}

#[test]
fn statistics_of_something_else_are_refused() {
    let small = Small::new();
    let (_, made) = small.finish(small.plan(&[EVA, ("tune.steps", "1"), ("outputs.statistics", "true")]), 1);
    std::fs::write(small.path("kept.safetensors"), &made[KEPT]).unwrap();
    let refused = |changes: &[(&str, &str)]| {
        let plan = small.plan(&[&[EVA], changes].concat());
        run(&small.request(plan, 1, None).0, &Outside::default()).unwrap_err().to_string()
    };
    let reading = ("tune.statistics", "./kept.safetensors");
    // Another seed makes another base here.
    let base = refused(&[reading, ("tune.seed", "8")]);
    assert!(base.contains("`tune.statistics` is of base \"blake3:"), "{base}");
    let data = refused(&[reading, ("data.max_length", "31")]);
    assert!(data.contains("`tune.statistics` is of data \"blake3:"), "{data}");
    let other = refused(&[("tune.statistics", "./sums.jsonl")]);
    assert!(other.contains("`tune.statistics` "), "{other}");
    let nothing = refused(&[("tune.adapter", "{method: lora, rank: 4}"), ("outputs.statistics", "true")]);
    assert!(nothing.contains("`outputs.statistics` is true, but no component of the job measures"), "{nothing}");
}

/// Gradients of an objective that compares with a reference are to be had; of one that looks at whole steps they are not.
#[test]
fn gradients_are_those_of_the_jobs_own_objective() {
    let small = Small::new();
    let pairs = [
        ("data.domains", "[{name: pairs, source: ./pairs.jsonl}]"),
        ("data.validation", "[{name: pairs, source: ./pairs.jsonl}]"),
        ("tune.batch_tokens", "256"),
        ("tune.adapter", "{method: lora, rank: 4, alpha: 8, init: {method: lora-ga, scale: unit}}"),
    ];
    let plan = small.plan(&[&pairs[..], &[("tune.objective", "{method: dpo}"), ("tune.steps", "15")]].concat());
    let (events, _) = small.finish(plan, 1);
    let losses = metric(&events, "train/loss");
    // It starts as the reference, but for rounding.
    assert!((losses[0] - std::f64::consts::LN_2).abs() < 1e-5 && losses[14] < losses[0], "{losses:?}");
    let plan = small.plan(&[&pairs[..], &[("tune.objective", "{method: dpo, loss: aot}")]].concat());
    let (request, _work) = small.request(plan, 1, None);
    let error = run(&request, &Outside::default()).unwrap_err().to_string();
    assert!(
        error.contains("`tune.stack[0].init` needs the gradient over 64 examples, and `dpo` looks at whole steps"),
        "{error}"
    );
}

/// Of an objective whose answers are the model's own there are prompts to look at, and nothing else.
#[test]
fn prompts_can_be_looked_at_before_there_are_answers() {
    let small = Small::new();
    let answers = |init: &str| {
        let adapter = format!("{{method: lora, rank: 4, init: {init}}}");
        let plan = small.plan(&[
            ("tune.adapter", adapter.as_str()),
            ("tune.objective", "{method: grpo, generations: 3, max_tokens: 6}"),
            ("tune.rewards", "[{method: regex-match, pattern: '^[ -~]'}]"),
            ("data.domains", "[{name: greetings, source: ./greetings.jsonl}]"),
            ("data.validation", "[{name: greetings, source: ./greetings.jsonl, rows: 3}]"),
            ("tune.steps", "2"),
        ]);
        let (request, _work) = small.request(plan, 1, None);
        let outside = Outside::default();
        let end = run(&request, &outside);
        (end, outside.events.into_inner().unwrap())
    };
    let (end, events) = answers("{method: eva, rows: tokens, examples: 5}");
    assert!(matches!(end, Ok(End::Finished(_))), "{end:?}");
    let said = note(&events).unwrap();
    assert!(said.starts_with("14 statistics on 5 documents of "), "{said}");
    for init in ["{method: eva}", "{method: lora-ga}"] {
        let error = answers(init).0.unwrap_err().to_string();
        assert!(error.contains("`grpo` learns from answers that are not there yet"), "{error}");
    }
}

#[test]
fn a_start_that_cannot_be_is_refused_where_it_is_asked_for() {
    let small = Small::new();
    let refused = |adapter: &str| {
        let changes = [("tune.adapter", adapter), ("data.domains", "[{name: greetings, source: ./greetings.jsonl}]")];
        let (request, _work) = small.request(small.plan(&changes), 1, None);
        run(&request, &Outside::default()).unwrap_err().to_string()
    };
    let head = refused("{method: lora, rank: 4, targets: [up_proj, embed_tokens], init: {method: eva}}");
    assert!(head.contains("embed_tokens"), "{head}");
    // A greeting has fewer tokens than the model is wide.
    let few = refused("{method: lora, rank: 16, targets: [q_proj], init: {method: eva, examples: 1}}");
    assert!(few.contains("`tune.stack[0].init` cannot start: ") && few.contains("raise `examples`"), "{few}");
    let domain = refused("{method: lora, rank: 4, init: {method: corda, domains: [greeting]}}");
    assert!(domain.contains("init.domains[0]") && domain.contains("(greetings)"), "{domain}");
    let moving = refused("{method: lora, rank: 4, init: {method: kore}}");
    assert!(moving.contains("set `trains: b`"), "{moving}");
}
