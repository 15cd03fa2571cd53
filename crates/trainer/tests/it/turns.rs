//! Frozen adapters that stand beside documents of some domains in training, in turn: who sees which, and what is made.

use std::collections::BTreeMap;

use attune_models::{Base, Model, Stack};
use attune_points::Theta;
use attune_spec::job::Precision;
use attune_trainer::protocol::Event;
use attune_trainer::run::{End, run};

use crate::outputs::{adapted, largest_difference, logits, unpack};
use crate::support::{Outside, Small, files, metric};

type Files = BTreeMap<String, Vec<u8>>;

/// The small base with adapters that know something: trained by themselves, each with its own seed, and kept in folders.
fn with_knowledge(names: &[&str]) -> Small {
    let small = Small::with_weights();
    for (seed, name) in (1..).zip(names) {
        let seed = format!("{seed}");
        let changes = [
            ("tune.from_scratch", "false"),
            ("tune.adapter", "{method: lora, rank: 3, alpha: 6}"),
            ("tune.steps", "12"),
            ("tune.seed", seed.as_str()),
        ];
        let (_, files) = small.finish(small.plan(&changes), 1);
        unpack(&files, "Result", &small.path(name));
    }
    small
}

const SKILL: &str = "{name: skill, method: lora, rank: 4, alpha: 8, dropout: 0.1}";

/// The small job of a skill beside these adapters, each with the domains that it stands beside.
fn changes(beside: &[(&str, &str)]) -> Vec<(String, String)> {
    let slot = |(at, (name, domains)): (usize, &(&str, &str))| {
        format!("{{name: know-{at}, from: ./{name}, train: false, domains: [{domains}]}}")
    };
    let slots: Vec<String> = beside.iter().enumerate().map(slot).chain([SKILL.to_owned()]).collect();
    let change = |path: &str, text: &str| (path.to_owned(), text.to_owned());
    vec![
        change("tune.adapter", "null"),
        change("tune.from_scratch", "false"),
        change("tune.stack", &format!("[{}]", slots.join(", "))),
    ]
}

fn skill(small: &Small, beside: &[(&str, &str)], more: &[(&str, &str)]) -> (Vec<Event>, Files) {
    let changes = changes(beside);
    let changes = changes.iter().map(|(path, text)| (path.as_str(), text.as_str()));
    let changes: Vec<(&str, &str)> = changes.chain(more.iter().copied()).collect();
    small.finish(small.plan(&changes), 1)
}

fn result(files: &Files) -> &[u8] {
    &files["Result/adapter_model.safetensors"]
}

/// A document sees the adapter of its own domain and no other: what stands beside another domain may be anything, and neither its
/// loss nor, where the other domain is never drawn, anything else changes.
#[test]
fn a_document_never_sees_what_stands_beside_other_domains() {
    let small = with_knowledge(&["a", "b"]);
    let of = |beside: &[(&str, &str)], more: &[(&str, &str)]| skill(&small, beside, more);
    let ab = of(&[("a", "greetings"), ("b", "sums")], &[]);
    let aa = of(&[("a", "greetings"), ("a", "sums")], &[]);
    let first = |(events, _): &(Vec<Event>, Files), name: &str| metric(events, name)[0];
    let greetings = "data/greetings/loss";
    assert_eq!(first(&ab, greetings).to_bits(), first(&aa, greetings).to_bits());
    assert_ne!(first(&ab, "data/sums/loss").to_bits(), first(&aa, "data/sums/loss").to_bits());
    // The gradient of what trains depends on what stands beside.
    assert_ne!(first(&ab, "train/grad_norm").to_bits(), first(&aa, "train/grad_norm").to_bits());
    let only = (
        "data.domains",
        "[{name: greetings, source: ./greetings.jsonl}, {name: sums, source: ./sums.jsonl, weight: 0}]",
    );
    let (ab, aa) =
        (of(&[("a", "greetings"), ("b", "sums")], &[only]), of(&[("a", "greetings"), ("a", "sums")], &[only]));
    let bb = of(&[("b", "greetings"), ("b", "sums")], &[only]);
    assert_eq!(result(&ab.1), result(&aa.1));
    assert_ne!(result(&ab.1), result(&bb.1));
}

/// Of several that name a domain one stands beside its documents, the next one at the next step.
#[test]
fn those_of_one_domain_take_turns() {
    let small = with_knowledge(&["a", "b"]);
    let both = "greetings, sums";
    let steps = [("tune.steps", "4")];
    let of = |names: &[&str]| {
        let beside: Vec<(&str, &str)> = names.iter().map(|name| (*name, both)).collect();
        skill(&small, &beside, &steps)
    };
    let (a, ab, aa) = (of(&["a"]), of(&["a", "b"]), of(&["a", "a"]));
    assert_eq!(result(&aa.1), result(&a.1), "the same in its own turn");
    let losses = |events: &[Event]| metric(events, "train/loss").into_iter().map(f64::to_bits).collect::<Vec<_>>();
    let (alone, turns) = (losses(&a.0), losses(&ab.0));
    assert_eq!(alone[0], turns[0], "the first one's turn");
    assert_ne!(alone[1], turns[1], "the other one's turn");
}

/// What is measured and what is made is the skill alone.
#[test]
fn the_result_is_the_skill_alone() {
    let small = with_knowledge(&["a", "b"]);
    let before: Vec<Vec<u8>> =
        ["a", "b"].map(|name| std::fs::read(small.path(name).join("adapter_model.safetensors")).unwrap()).into();
    let beside = [("a", "greetings"), ("b", "sums")];
    let (events, files) = skill(&small, &beside, &[("outputs.merged", "true"), ("tune.steps", "20")]);
    let (alone, _) = skill(&small, &[], &[]);
    let loss = |events: &[Event]| metric(events, "eval/sums/loss");
    assert_eq!(loss(&events)[0].to_bits(), loss(&alone)[0].to_bits(), "before the first step it is the base");
    unpack(&files, "Result", &small.path("skill"));
    unpack(&files, "Merged", &small.path("merged"));
    let (model, theta) = adapted(Base::open(&small.path("base"), Precision::F32).unwrap(), &small.path("skill"));
    let with_skill = logits(&model, &theta);
    let merged = Base::open(&small.path("merged"), Precision::F32).unwrap();
    let off = largest_difference(&with_skill, &logits(&Model::new(merged, Stack::default()), &Theta::default()));
    assert!(off < 1e-4, "off by {off}");
    let names = safetensors_names(result(&files));
    assert!(!names.is_empty() && names.iter().all(|name| !name.contains("know")), "{names:?}");
    let after: Vec<Vec<u8>> =
        ["a", "b"].map(|name| std::fs::read(small.path(name).join("adapter_model.safetensors")).unwrap()).into();
    assert_eq!(before, after);
}

fn safetensors_names(bytes: &[u8]) -> Vec<String> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    header.as_object().unwrap().keys().filter(|name| *name != "__metadata__").cloned().collect()
}

/// The turn follows from the step, so a run that stops and goes on, or has more ranks, ends with the same bytes.
#[test]
fn a_stop_and_more_ranks_change_no_bit() {
    let small = with_knowledge(&["a", "b", "c"]);
    let beside = [("a", "greetings"), ("b", "greetings, sums"), ("c", "sums")];
    let changes = changes(&beside);
    let changes: Vec<(&str, &str)> = changes.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
    let plan = small.plan(&changes);
    let (_, whole) = small.finish(plan.clone(), 1);
    assert_eq!(small.finish(plan.clone(), 2).1, whole);
    let outside = Outside::stopping_after(3);
    let (request, work) = small.request(plan.clone(), 1, None);
    let end = run(&request, &outside).unwrap();
    assert!(matches!(end, End::Stopped(_)), "{end:?}");
    let (request, _again) = small.request(plan, 1, Some(&work.path().join("checkpoint-3")));
    let outside = Outside::default();
    run(&request, &outside).unwrap();
    assert_eq!(files(&outside.events.into_inner().unwrap()), whole);
}

/// What an adapter beside it knows, a skill need not learn: asked with it, the facts are there; asked alone, the skill knows them
/// less than one that was learned without.
#[test]
fn a_skill_does_not_learn_what_is_known_beside_it() {
    let small = Small::with_weights();
    let towns = ["Vel", "Kar", "Bru", "Tis", "Mon", "Olf", "Ash", "Gri"];
    let rivers = ["Tarn", "Ilse", "Okra", "Wend", "Susk", "Dray", "Pell", "Lune"];
    let rows = |row: &dyn Fn(&str, &str) -> String, all: bool| -> String {
        let pairs = (0..8).flat_map(|town| (0..8).map(move |river| (town, river)));
        pairs
            .filter(|(town, river)| all || town == river)
            .map(|(town, river)| row(towns[town], rivers[river]))
            .collect()
    };
    let write = |name: &str, rows: String| std::fs::write(small.path(name), rows).unwrap();
    let text = |town: &str, river: &str| format!("{{\"text\": \"{town}: {river}\"}}\n");
    let asked = |town: &str, river: &str| format!("{{\"prompt\": \"{town}:\", \"completion\": \" {river}\"}}\n");
    let task = |town: &str, river: &str| format!("{{\"prompt\": \"{town}:\", \"completion\": \" {river}, sir.\"}}\n");
    write("language.jsonl", rows(&text, true));
    write("facts.jsonl", rows(&text, false));
    write("asked.jsonl", rows(&asked, false));
    write("tasks.jsonl", rows(&task, false));
    let validation = ("data.validation", "[{name: asked, source: ./asked.jsonl}]");
    let optimizer = ("tune.optimizer", "{method: adamw, lr: 0.02}");
    // A base that has the words and none of the facts.
    let language = [
        ("tune.from_scratch", "false"),
        ("data.domains", "[{name: language, source: ./language.jsonl}]"),
        ("tune.adapter", "{method: full}"),
        ("tune.batch_tokens", "512"),
        optimizer,
        validation,
        ("tune.steps", "250"),
    ];
    let (events, files) = small.finish(small.plan(&language), 1);
    let guessed = *metric(&events, "eval/asked/loss").last().unwrap();
    unpack(&files, "Result", &small.path("literate"));
    let base = ("base", "./literate");
    let facts = [
        ("tune.from_scratch", "false"),
        ("data.domains", "[{name: facts, source: ./facts.jsonl}]"),
        ("tune.adapter", "{method: lora, rank: 8, alpha: 16}"),
        base,
        optimizer,
        validation,
        ("tune.steps", "150"),
    ];
    let (events, files) = small.finish(small.plan(&facts), 1);
    unpack(&files, "Result", &small.path("facts"));
    let known = *metric(&events, "eval/asked/loss").last().unwrap();
    // The loss on the tasks beside what stands beside them, and by the skill alone.
    let learn = |beside: &[(&str, &str)]| {
        let tasks = [
            ("data.domains", "[{name: tasks, source: ./tasks.jsonl}]"),
            base,
            // Half the rate of the others: knowledge that comes and goes in turn is unlearned by small steps.
            ("tune.optimizer", "{method: adamw, lr: 0.01}"),
            ("data.validation", "[{name: alone, source: ./tasks.jsonl}]"),
            ("tune.steps", "300"),
        ];
        let (events, _) = skill(&small, beside, &tasks);
        let last = |name: &str| *metric(&events, name).last().unwrap();
        (last("data/tasks/loss"), last("eval/alone/loss"))
    };
    let (with, alone) = (learn(&[("facts", "tasks")]), learn(&[]));
    println!("guessed {guessed}, known {known}; with knowledge {with:?}, without {alone:?}");
    assert!(known < 0.5 * guessed, "the facts were learned: {known} of {guessed}");
    assert!(with.0 < 0.5 * with.1, "beside what knows them the facts are there, and without they are not: {with:?}");
    assert!(with.1 > 1.5 * alone.1, "a skill that had to learn them knows more: {with:?}, {alone:?}");
}
