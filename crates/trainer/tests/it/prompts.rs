//! Jobs that train rows before documents.

use attune_spec::job::{read_value, read_yaml};
use attune_spec::method::Catalogue;
use attune_trainer::run::run;

use crate::support::{Outside, Small, metric};

/// Documents of 32 tokens and rows before them in each of four shards.
const ROOM: (&str, &str) = ("tune.batch_tokens", "256");

const TEXT: (&str, &str) = ("tune.adapter", "{method: prompt-tuning, length: 6, start: text, text: 'Who? '}");

/// The rows are kept as they are, whatever made them, and are what was trained where they are read.
#[test]
fn rows_that_were_trained_are_those_that_an_adapter_has() {
    let small = Small::with_weights();
    for adapter in [
        "{method: prompt-tuning, length: 4}",
        "{method: p-tuning, length: 4, hidden: 8}",
        "{method: multitask-prompt-tuning, length: 4, rank: 2}",
        "{method: p-tuning, length: 3, hidden: 8, encoder: lstm}",
    ] {
        let changes = [("tune.adapter", adapter), ("tune.from_scratch", "false"), ("tune.steps", "40"), ROOM];
        let (request, work) = small.request(small.plan(&changes), 1, None);
        let outside = Outside::default();
        run(&request, &outside).unwrap();
        let losses = metric(&outside.events.into_inner().unwrap(), "eval/sums/loss");
        assert!(losses[1] < 0.98 * losses[0], "{adapter}: {losses:?}");
        let folder = small.path("prompt");
        std::fs::remove_dir_all(&folder).ok();
        std::fs::rename(work.path().join("adapter"), &folder).unwrap();
        let stack = "[{name: a, from: ./prompt, train: false}, {method: lora, rank: 2}]";
        let changes = [
            ("tune.adapter", "null"),
            ("tune.stack", stack),
            ("tune.from_scratch", "false"),
            ("tune.steps", "1"),
            ROOM,
        ];
        let (events, _) = small.finish(small.plan(&changes), 1);
        assert_eq!(metric(&events, "eval/sums/loss")[0], losses[1], "{adapter}");
        // And they train on by themselves.
        let changes = [("tune.adapter", "{from: ./prompt}"), ("tune.from_scratch", "false"), ("tune.steps", "5"), ROOM];
        let (events, _) = small.finish(small.plan(&changes), 1);
        let further = metric(&events, "eval/sums/loss");
        assert!(further[0] == losses[1] && further[1] != losses[1], "{adapter}: {further:?}");
    }
}

/// What is measured before a start is measured after the rows of an adapter that is there, which have other numbers in the stack than
/// in what is measured.
#[test]
fn a_start_that_looks_at_data_looks_behind_the_rows_of_an_adapter() {
    let small = Small::with_weights();
    let plain = [("tune.adapter", "{method: prompt-tuning, length: 4}"), ("tune.from_scratch", "false"), ROOM];
    let (request, work) = small.request(small.plan(&plain), 1, None);
    run(&request, &Outside::default()).unwrap();
    std::fs::rename(work.path().join("adapter"), small.path("prompt")).unwrap();
    for start in ["{method: eva, examples: 9}", "{method: lora-ga}"] {
        let lora = format!("{{method: lora, rank: 2, init: {start}}}");
        // Behind another slot that trains, the one that is there is the first in what is measured.
        let stack = format!("[{lora}, {{name: a, from: ./prompt, train: false}}]");
        let changes = [
            ("tune.adapter", "null"),
            ("tune.stack", stack.as_str()),
            ("tune.from_scratch", "false"),
            ("tune.logical_shards", "2"),
            ROOM,
        ];
        let (events, _) = small.finish(small.plan(&changes), 1);
        let losses = metric(&events, "eval/sums/loss");
        assert!(losses[1] < losses[0], "{start}: {losses:?}");
    }
}

/// Rows that start as a text are that text before every document: the loss of the base on data that has it there.
#[test]
fn a_start_from_a_text_is_that_text_before_every_document() {
    let small = Small::with_weights();
    let data = |name: &str, before: &str| {
        let rows: String =
            (0..6).map(|i| format!("{{\"prompt\": \"{before}{i} and\", \"completion\": \" {i}.\"}}\n")).collect();
        std::fs::write(small.path(name), rows).unwrap();
    };
    data("plain.jsonl", "");
    // Six rows of a text of five tokens: its first one comes again.
    data("told.jsonl", "Who? W");
    let loss = |source: &str, adapter: (&str, &str)| {
        let domains = format!("[{{name: sums, source: ./{source}.jsonl}}]");
        let changes = [
            adapter,
            ("tune.from_scratch", "false"),
            ("tune.steps", "1"),
            ("data.domains", domains.as_str()),
            ("data.validation", domains.as_str()),
            ROOM,
        ];
        metric(&small.finish(small.plan(&changes), 1).0, "eval/sums/loss")[0]
    };
    let plain = ("tune.adapter", "{method: lora}");
    let (found, expected, without) = (loss("plain", TEXT), loss("told", plain), loss("plain", plain));
    assert!((found - expected).abs() < 1e-5, "{found} against {expected}");
    assert!((found - without).abs() > 1e-3, "the text changes nothing");
}

/// A reference has neither the trained rows nor their places: before training on pairs nothing is preferred to what a model without
/// rows prefers.
#[test]
fn a_reference_has_no_rows_before_documents() {
    let small = Small::with_weights();
    let changes = [
        TEXT,
        ("tune.from_scratch", "false"),
        ("tune.steps", "20"),
        ("tune.objective", "{method: dpo}"),
        ("data.domains", "[{name: pairs, source: ./pairs.jsonl}]"),
        ("data.validation", "[{name: pairs, source: ./pairs.jsonl}]"),
        ("tune.batch_tokens", "320"),
    ];
    let (events, _) = small.finish(small.plan(&changes), 2);
    let measured = metric(&events, "eval/pairs/loss");
    assert!((measured[0] - std::f64::consts::LN_2).abs() > 1e-4, "rows change what is preferred: {measured:?}");
    assert!(measured[1] < measured[0], "{measured:?}");
}

#[test]
fn rows_without_room_are_refused_by_the_field_that_has_to_change() {
    let small = Small::new();
    let job = "{version: 1, name: a, base: ./base, data: {domains: [{name: a, source: ./a.jsonl}], max_length: 32}, \
               tune: {adapter: {method: prompt-tuning, length: 10}, steps: 1, batch_tokens: 80, logical_shards: 2}}";
    let refused = read_value(&read_yaml(job).unwrap(), Catalogue::embedded()).unwrap_err().to_string();
    assert!(
        refused.contains("expected at least logical_shards × (data.max_length + 10 rows before each document) = 84"),
        "{refused}"
    );
    let failure = |adapter: &str| {
        let plan = small.plan(&[("tune.adapter", adapter), ("tune.batch_tokens", "1024")]);
        let (request, _work) = small.request(plan, 1, None);
        run(&request, &Outside::default()).unwrap_err().to_string()
    };
    let long = failure("{method: prompt-tuning, length: 40}");
    assert!(long.contains("with 40 rows before each document it goes beyond the base's context of 64"), "{long}");
    let elsewhere = failure("{method: prompt-tuning, length: 4, targets: norm}");
    assert!(elsewhere.contains("names only sites that this method does not adapt"), "{elsewhere}");
}

/// A cartridge of a text is that text before every document: the loss of the base on data that has it there. What is read of it is kept
/// with a run, and an adapter that puts rows before documents leaves no place for it.
#[test]
fn a_cartridge_of_a_text_is_that_text_before_every_document() {
    let small = Small::with_weights();
    let data = |name: &str, before: &str| {
        let rows: String =
            (0..6).map(|i| format!("{{\"prompt\": \"{before}{i} and\", \"completion\": \" {i}.\"}}\n")).collect();
        std::fs::write(small.path(name), rows).unwrap();
    };
    data("plain.jsonl", "");
    data("told.jsonl", "Who? I");
    let losses = |source: &str, adapter: &str, steps: &str| {
        let domains = format!("[{{name: sums, source: ./{source}.jsonl}}]");
        let changes = [
            ("tune.adapter", adapter),
            ("tune.from_scratch", "false"),
            ("tune.steps", steps),
            ("data.domains", domains.as_str()),
            ("data.validation", domains.as_str()),
            ROOM,
        ];
        metric(&small.finish(small.plan(&changes), 1).0, "eval/sums/loss")
    };
    let cartridge = |length: u32| format!("{{method: cartridge, length: {length}, start: text, text: 'Who? I am'}}");
    let found = losses("plain", &cartridge(6), "30");
    let (expected, without) = (losses("told", "{method: lora}", "1")[0], losses("plain", "{method: lora}", "1")[0]);
    assert!((found[0] - expected).abs() < 1e-5, "{} against {expected}", found[0]);
    assert!((found[0] - without).abs() > 1e-3, "the text changes nothing");
    assert!(found[1] < found[0], "it learns: {found:?}");
    let refused = |changes: &[(&str, &str)]| {
        let (request, _work) = small.request(small.plan(changes), 1, None);
        run(&request, &Outside::default()).unwrap_err().to_string()
    };
    let (long, weights) = (cartridge(10), ("tune.from_scratch", "false"));
    let said = refused(&[("tune.adapter", long.as_str()), weights]);
    assert!(said.contains("has 9 tokens; expected at least 10"), "{said}");
    let prompt = [("tune.adapter", "{method: prompt-tuning, length: 4}"), weights, ("tune.steps", "1"), ROOM];
    let (request, work) = small.request(small.plan(&prompt), 1, None);
    run(&request, &Outside::default()).unwrap();
    std::fs::rename(work.path().join("adapter"), small.path("prompt")).unwrap();
    let stack = format!("[{{name: a, from: ./prompt, train: false}}, {}]", cartridge(6));
    let said = refused(&[("tune.adapter", "null"), ("tune.stack", stack.as_str()), weights, ROOM]);
    assert!(said.contains("tune.stack[1]") && said.contains("puts before documents"), "{said}");
}
