//! Vectors of documents, whole jobs: sentence-transformers' and PEFT's losses, parameters and vectors; steps in many micro-batches; what
//! is kept and read again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use attune_artifacts::formats::sentence_transformers;
use attune_merge::words;
use attune_models::{Base, Model, Pass};
use attune_points::layout::{NO_LABEL, Source};
use attune_points::{Layout, Row};
use attune_spec::id::Step;
use attune_spec::job::{HeadPooling, Plan, Precision};
use attune_trainer::combine::{Combine, Part};
use attune_trainer::component::frozen;
use attune_trainer::few;
use attune_trainer::run::{End, run};
use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::bits::checkpoint;
use crate::classes::{close, copy, expectations, folder_of, golden, numbers, plan_of};
use crate::gangs::{finished, gang};
use crate::outputs::unpack;
use crate::support::{Outside, Small, files as files_of, metric};

/// A folder with one of the golden models, its tokenizer, its rows and PEFT's adapter.
struct Case {
    small: Small,
    expected: Value,
}

impl Case {
    fn new(name: &str) -> Self {
        let base = expectations(name)["base"].as_str().unwrap().to_owned();
        let (small, expected) = folder_of(name, &base);
        Self { small, expected }
    }

    fn plan(&self, stack: &str, further: &[(&str, &str)]) -> Plan {
        let head = format!(
            "{{task: embedding, pooling: {}, bidirectional: {}}}",
            self.expected["pooling"], self.expected["bidirectional"]
        );
        let mut objective = self.expected["objective"].clone();
        objective["method"] = "info-nce".into();
        let (objective, tokens) = (objective.to_string(), self.expected["tokens"].to_string());
        let own = [("tune.stack", stack), ("tune.head", head.as_str()), ("tune.objective", objective.as_str())];
        plan_of((&self.small, &self.expected), &tokens, &own, further)
    }

    /// Rows of one length in the place of its own, so that they can be dealt out alike.
    fn with_rows(self, negatives: usize) -> Self {
        let row = |row: usize| {
            let text = |key: usize| format!("w{key} w{} w{}", 20 + (7 * row + key) % 20, 20 + (3 * row) % 20);
            let others: Vec<String> = (1..=negatives).map(|by| text(12 + (row + by) % 8)).collect();
            serde_json::json!({"anchor": text(4 + row), "positive": text(12 + row), "negative": others}).to_string()
        };
        let rows: Vec<String> = (0..8).map(row).collect();
        std::fs::write(self.small.path("rows.jsonl"), rows.join("\n")).unwrap();
        self
    }
}

fn tensors(folder: &Path) -> BTreeMap<String, Tensor> {
    let file = folder.join("adapter_model.safetensors");
    candle_core::safetensors::load(file, &Device::Cpu).unwrap().into_iter().collect()
}

fn json(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

/// The vectors of texts of words without tokens around them, of a base with adapters.
fn vectors(base: Base, folders: &[&Path], texts: &[Vec<u32>]) -> Vec<f32> {
    let (base, stack, theta) = frozen(base, folders.iter().copied()).unwrap();
    let mut layout = Layout::new();
    for text in texts {
        layout.push(Source::default(), text.iter().map(|&token| (Row::Token(token), NO_LABEL)));
    }
    let pass = Pass { theta: &theta, layout: &layout, dropout: None };
    Model::new(base, stack).embed(&pass).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn a_tune_of_vectors_has_the_losses_parameters_and_vectors_of_sentence_transformers() {
    for name in ["bert_vectors", "llama_vectors", "llama_vectors_bidirectional"] {
        let case = Case::new(name);
        let (events, files) = case.small.finish(case.plan("[{name: skill, from: ./before}]", &[]), 1);
        close(name, &metric(&events, "train/loss"), &numbers(&case.expected["losses"]), 2e-5);
        let ends = [numbers(&case.expected["before"]), numbers(&case.expected["after"])];
        for (at, metric_name) in ["eval/rows/loss", "eval/rows/accuracy"].into_iter().enumerate() {
            close(metric_name, &metric(&events, metric_name), &[ends[0][at], ends[1][at]], 2e-5);
        }
        let folder = tempfile::tempdir().unwrap();
        unpack(&files, "Result", folder.path());
        let (own, theirs) = (tensors(folder.path()), tensors(&golden("trainer/golden").join(name).join("after")));
        assert!(own.keys().eq(theirs.keys()), "{:?} and {:?}", own.keys(), theirs.keys());
        for (tensor, own) in &own {
            let off = (own - &theirs[tensor]).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            let off = off.to_scalar::<f32>().unwrap();
            assert!(off < 1e-3, "{name}: {tensor} is off by {off}");
        }
        assert_eq!(json(&folder.path().join("adapter_config.json"))["task_type"], "FEATURE_EXTRACTION");
        let pooling = serde_json::from_value::<HeadPooling>(case.expected["pooling"].clone()).unwrap();
        assert_eq!(sentence_transformers::pooling(folder.path()).unwrap(), Some(pooling));

        // What is read of it gives their vectors.
        let is_bert = name == "bert_vectors";
        let rows = std::fs::read_to_string(case.small.path("rows.jsonl")).unwrap();
        let query = |row: &str| {
            let row: Value = serde_json::from_str(row).unwrap();
            let words = row["query"].as_str().unwrap().split(' ').map(|word| word[1..].parse::<u32>().unwrap());
            let (before, after) = if is_bert { (2, Some(3)) } else { (1, None) };
            std::iter::once(before).chain(words).chain(after).collect::<Vec<_>>()
        };
        let texts: Vec<Vec<u32>> = rows.lines().map(query).collect();
        let adapter = folder.path().to_owned();
        let opened = few::open_for(&case.small.path("model"), &[adapter], Precision::F32).unwrap();
        let found: Vec<f64> = vectors(opened, &[folder.path()], &texts).into_iter().map(f64::from).collect();
        let expected: Vec<f64> = case.expected["vectors"].as_array().unwrap().iter().flat_map(numbers).collect();
        close(name, &found, &expected, 1e-3);
    }
}

/// The vectors of all micro-batches come first, and then the gradient of each: it is that of the step in one piece.
#[test]
fn a_step_in_many_micro_batches_compares_the_queries_of_all() {
    for (name, negatives) in [("bert_vectors", 2), ("llama_vectors_bidirectional", 0)] {
        let case = Case::new(name).with_rows(negatives);
        let words = if name == "bert_vectors" { 5 } else { 4 };
        let tokens = 8 * (2 + negatives) * words;
        let run = |shards: usize, accumulation: usize, ranks| {
            let changes = [
                ("tune.batch_tokens", (tokens / accumulation).to_string()),
                ("tune.logical_shards", shards.to_string()),
                ("tune.accumulation", accumulation.to_string()),
            ];
            let changes: Vec<(&str, &str)> = changes.iter().map(|(path, value)| (*path, value.as_str())).collect();
            case.small.finish(case.plan("[{name: skill, from: ./before}]", &changes), ranks)
        };
        let (whole, of_whole) = run(1, 1, 1);
        let (parted, of_parts) = run(4, 2, 1);
        close(name, &metric(&parted, "train/loss"), &metric(&whole, "train/loss"), 2e-5);
        close(name, &metric(&parted, "train/accuracy"), &metric(&whole, "train/accuracy"), 1e-9);
        assert_eq!(metric(&parted, "train/negatives"), vec![(8 * (1 + negatives) - 1) as f64; 12]);
        let folders = [&of_whole, &of_parts].map(|files| {
            let folder = tempfile::tempdir().unwrap();
            unpack(files, "Result", folder.path());
            tensors(folder.path())
        });
        for (tensor, whole) in &folders[0] {
            let off = (whole - &folders[1][tensor]).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            assert!(off.to_scalar::<f32>().unwrap() < 1e-4, "{name}: {tensor}");
        }
        // Dealt out to ranks it has the same bits, and to processes.
        assert_eq!(run(4, 2, 2).1, of_parts);
        let tokens = (tokens / 2).to_string();
        let changes =
            [("tune.batch_tokens", tokens.as_str()), ("tune.logical_shards", "4"), ("tune.accumulation", "2")];
        let plan = case.plan("[{name: skill, from: ./before}]", &changes);
        assert_eq!(finished(&gang(&case.small, &[plan.clone(), plan], 1, None, None)), of_parts);
    }
}

#[test]
fn vectors_learn_under_every_kind_of_adapter_and_go_on_after_a_stop() {
    let case = Case::new("llama_vectors");
    for stack in [
        "[{method: lora, rank: 3, alpha: 6}]",
        "[{method: prompt-tuning, length: 2}]",
        "[{method: ln-tuning}]",
        "[{method: full}]",
        // A start that looks at gradients: of the queries of each micro-batch.
        "[{method: lora, rank: 3, alpha: 6, init: {method: lora-ga, examples: 8}}]",
    ] {
        let changes = [("tune.batch_tokens", "400"), ("tune.steps", "12"), ("tune.logical_shards", "2")];
        let plan = case.plan(stack, &changes);
        let (events, files) = case.small.finish(plan.clone(), 1);
        let losses = metric(&events, "eval/rows/loss");
        assert!(losses[1] < 0.95 * losses[0], "{stack}: {losses:?}");
        let (request, _work) = case.small.request(plan.clone(), 1, None);
        let stopped = Outside::stopping_after(5);
        assert_eq!(run(&request, &stopped).unwrap(), End::Stopped(Step(5)));
        let saved = checkpoint(&stopped);
        let (request, _work) = case.small.request(plan, 2, Some(&saved));
        let resumed = Outside::default();
        run(&request, &resumed).unwrap();
        assert_eq!(files_of(&resumed.events.into_inner().unwrap()), files, "{stack}");
    }
}

#[test]
fn a_merged_model_gives_the_vectors_of_the_adapter_beside_its_base() {
    for name in ["bert_vectors", "llama_vectors_bidirectional"] {
        let case = Case::new(name);
        let changes = [("outputs.merged", "true"), ("tune.steps", "4")];
        let (_, files) =
            case.small.finish(case.plan("[{method: lora, rank: 3, alpha: 6, targets: '*.1.*'}]", &changes), 1);
        let (adapter, merged) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        unpack(&files, "Result", adapter.path());
        unpack(&files, "Merged", merged.path());
        let config = json(&merged.path().join("config.json"));
        let class = if name == "bert_vectors" { "BertModel" } else { "LlamaModel" };
        assert_eq!(config["architectures"][0], class);
        assert_eq!(config.get("is_causal").and_then(Value::as_bool), (name != "bert_vectors").then_some(false));
        assert_eq!(json(&merged.path().join("modules.json")).as_array().unwrap().len(), 2);
        let head = few::head_of(&[adapter.path().to_owned()]).unwrap().unwrap();
        let opened = |folder: &Path, adapters: &[PathBuf]| {
            few::open_under(folder, adapters, Precision::F32, Some(&head)).unwrap()
        };
        let texts = [vec![2, 5, 9, 3], vec![7, 8]];
        let beside =
            vectors(opened(&case.small.path("model"), &[adapter.path().to_owned()]), &[adapter.path()], &texts);
        let whole = vectors(opened(merged.path(), &[]), &[], &texts);
        let off = beside.iter().zip(&whole).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off < 1e-5, "{name}: off by {off}");
    }
}

/// What was combined gives vectors as what it was made of does.
#[test]
fn adapters_for_vectors_are_combined_under_their_head() {
    let case = Case::new("llama_vectors_bidirectional");
    let (_, files) = case.small.finish(case.plan("[{name: skill, from: ./before}]", &[("tune.steps", "2")]), 1);
    let (adapter, made) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    unpack(&files, "Result", adapter.path());
    let part = |weight| Part { name: "one".to_owned(), folder: adapter.path().to_owned(), weight };
    let (method, space) = words::of("cat", None, None, None, None).unwrap();
    let of = [part(0.25), part(0.75)];
    let combine = Combine { base: &case.small.path("model"), of: &of, method: &method, space, seed: 0 };
    combine.run(made.path()).unwrap();
    let opened =
        |folder: &Path| few::open_for(&case.small.path("model"), &[folder.to_owned()], Precision::F32).unwrap();
    let texts = [vec![5, 9, 3], vec![7, 8]];
    let [one, both] = [adapter.path(), made.path()].map(|folder| vectors(opened(folder), &[folder], &texts));
    let off = one.iter().zip(&both).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off < 1e-5, "off by {off}");
    assert_eq!(sentence_transformers::pooling(made.path()).unwrap(), Some(HeadPooling::Mean));
}

#[test]
fn what_does_not_fit_is_said_by_field() {
    let fails = |case: &Case, changes: &[(&str, &str)]| {
        let (request, _work) = case.small.request(case.plan("[{method: lora}]", changes), 1, None);
        let shown = case.small.path("").display().to_string();
        run(&request, &Outside::default()).unwrap_err().to_string().replace(&shown, "DIR/")
    };
    let case = Case::new("llama_vectors");
    let found = fails(&case, &[("tune.objective", "{method: info-nce, dims: [64]}")]);
    assert_eq!(found, "the model's vectors have 32 numbers; `tune.objective.dims` names 64");
    let found = fails(&case, &[("data.domains", "[{name: rows, source: ./plain.jsonl}]")]);
    assert!(found.contains("plain.jsonl"), "{found}");
    std::fs::write(case.small.path("plain.jsonl"), "{\"text\": \"w5\"}\n").unwrap();
    let found = fails(&case, &[("data.domains", "[{name: rows, source: ./plain.jsonl}]")]);
    assert_eq!(
        found,
        "plain.jsonl: its columns [\"text\"] are not those of what belongs together; expected `query` (or `anchor`) + `positive`, with \
         `negative` where there are such"
    );
    // Windows and rows that see all others.
    let windows = Case::new("llama_vectors");
    copy(&golden("models/golden/mistral"), &windows.small.path("model"));
    let found = fails(&windows, &[("tune.head", "{task: embedding, bidirectional: true}")]);
    assert!(found.contains("rows of this model see a part of their document only, by its windows"), "{found}");
    // A base that says how its rows become vectors is not asked for others by leaving it out.
    sentence_transformers::write(&case.small.path("model"), 32, HeadPooling::First, Some(64)).unwrap();
    let found = fails(&case, &[("tune.head", "{task: embedding}")]);
    assert_eq!(
        found,
        "`tune.head.pooling` is left out, which is mean, and the base's folder says \"first\": expected `pooling: first`, or another one \
         in so many words"
    );
}
