//! Heads over classes, whole jobs: PyTorch's and PEFT's losses and parameters; a head that is new; what is kept and read again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use attune_models::{Base, Model, Pass, export};
use attune_spec::id::Step;
use attune_spec::job::{Plan, Precision};
use attune_trainer::component::frozen;
use attune_trainer::few;
use attune_trainer::run::{End, run};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::bits::checkpoint;
use crate::outputs::unpack;
use crate::support::{Outside, Small, files as files_of, metric};

pub(crate) fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.path().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// A folder with the golden model `base`, and the tokenizer, the rows and PEFT's adapter of the tune `rows`; with what that found.
pub(crate) fn folder_of(rows: &str, base: &str) -> (Small, Value) {
    let (small, of) = (Small::new(), golden("trainer/golden").join(rows));
    copy(&golden("models/golden").join(base), &small.path("model"));
    copy(&of.join("before"), &small.path("before"));
    for (name, to) in [("tokenizer.json", "model/tokenizer.json"), ("rows.jsonl", "rows.jsonl")] {
        std::fs::copy(of.join(name), small.path(to)).unwrap();
    }
    (small, expectations(rows))
}

/// What a golden tune found.
pub(crate) fn expectations(rows: &str) -> Value {
    let file = golden("trainer/golden").join(rows).join("expected.json");
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

/// The plan of a golden tune, whose every step is over all rows, of so many `tokens`: with `own` fields and `further` ones.
pub(crate) fn plan_of(
    (small, expected): (&Small, &Value),
    tokens: &str,
    own: &[(&str, &str)],
    further: &[(&str, &str)],
) -> Plan {
    let number = |name: &str| expected[name].to_string();
    let optimizer = format!("{{method: adamw, lr: {}, weight_decay: 0}}", number("lr"));
    let (steps, length) = (number("steps"), number("length"));
    let common = [
        ("base", "./model"),
        ("data.domains", "[{name: rows, source: ./rows.jsonl}]"),
        ("data.validation", "[{name: rows, source: ./rows.jsonl}]"),
        ("data.max_length", &length),
        ("tune.adapter", "null"),
        ("tune.from_scratch", "false"),
        ("tune.optimizer", &optimizer),
        ("tune.schedule", "{method: cosine, warmup: 0}"),
        ("tune.batch_tokens", tokens),
        ("tune.logical_shards", "1"),
        ("tune.steps", &steps),
    ];
    small.plan(&[&common[..], own, further].concat())
}

/// A folder with one of the golden models, its tokenizer, its rows and PEFT's adapter.
struct Case {
    small: Small,
    expected: Value,
    task: &'static str,
}

impl Case {
    /// The case `rows` on the model `base`.
    fn new(rows: &str, base: &str) -> Self {
        let (small, expected) = folder_of(rows, base);
        Self { small, expected, task: if rows == "bert_tokens" { "token_classification" } else { "classification" } }
    }

    fn plan(&self, stack: &str, further: &[(&str, &str)]) -> Plan {
        let tokens = (self.expected["length"].as_u64().unwrap() * 12).to_string();
        let head = format!("{{task: {}, labels: {}}}", self.task, self.expected["labels"]);
        let own = [("tune.stack", stack), ("tune.head", head.as_str())];
        plan_of((&self.small, &self.expected), &tokens, &own, further)
    }
}

pub(crate) fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

pub(crate) fn close(what: &str, found: &[f64], expected: &[f64], within: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: {found:?}");
    let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(off < within, "{what}: {found:?}, PEFT {expected:?}");
}

#[test]
fn a_tune_of_classes_has_the_losses_and_parameters_of_transformers_and_peft() {
    for name in ["bert_sequence", "bert_tokens", "llama_sequence"] {
        let case = Case::new(name, name);
        let (events, files) = case.small.finish(case.plan("[{name: skill, from: ./before}]", &[]), 1);
        close(name, &metric(&events, "train/loss"), &numbers(&case.expected["losses"]), 2e-5);
        let ends = [numbers(&case.expected["before"]), numbers(&case.expected["after"])];
        for (at, metric_name) in ["eval/rows/loss", "eval/rows/accuracy"].into_iter().enumerate() {
            close(metric_name, &metric(&events, metric_name), &[ends[0][at], ends[1][at]], 2e-5);
        }
        let folder = tempfile::tempdir().unwrap();
        unpack(&files, "Result", folder.path());
        let read = |folder: &Path| -> BTreeMap<String, Tensor> {
            candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu)
                .unwrap()
                .into_iter()
                .collect()
        };
        let (own, theirs) = (read(folder.path()), read(&golden("trainer/golden").join(name).join("after")));
        assert!(own.keys().eq(theirs.keys()), "{:?} and {:?}", own.keys(), theirs.keys());
        for (tensor, own) in &own {
            let off = (own - &theirs[tensor]).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            let off = off.to_scalar::<f32>().unwrap();
            assert!(off < 1e-3, "{name}: {tensor} is off by {off}");
        }
        let config: Value =
            serde_json::from_slice(&std::fs::read(folder.path().join("adapter_config.json")).unwrap()).unwrap();
        let task = if name == "bert_tokens" { "TOKEN_CLS" } else { "SEQ_CLS" };
        assert_eq!(config["task_type"], task);
        let saved = config["modules_to_save"].as_array().unwrap().len();
        assert_eq!(saved, if name == "bert_sequence" { 2 } else { 1 });
    }
}

/// The logits of the class of a text, of a base with adapters.
fn answer(base: Base, folders: &[&Path]) -> Vec<f32> {
    let (base, stack, theta) = frozen(base, folders.iter().copied()).unwrap();
    let mut layout = attune_points::Layout::new();
    let tokens = [2, 17, 27, 4, 36, 3].map(|token| (attune_points::Row::Token(token), attune_points::layout::NO_LABEL));
    layout.push(attune_points::layout::Source::default(), tokens);
    let pass = Pass { theta: &theta, layout: &layout, dropout: None };
    Model::new(base, stack).classify(&pass).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn a_new_head_learns_beside_an_adapter_and_is_kept_with_it_and_merged() {
    // This model has a pooler and no classifier.
    let case = Case::new("bert_sequence", "bert");
    let changes = [("outputs.merged", "true"), ("tune.steps", "20"), ("tune.logical_shards", "4")];
    let plan = case.plan("[{method: lora, rank: 3, alpha: 6}]", &changes);
    let head = plan.stack.last().unwrap();
    assert_eq!((head.name.as_str(), head.train), ("head", true));
    let (events, files) = case.small.finish(plan.clone(), 1);
    let losses = metric(&events, "eval/rows/loss");
    assert!((losses[0] - 3f64.ln()).abs() < 0.3 && losses[1] < 0.6 * losses[0], "{losses:?}");
    let found = metric(&events, "eval/rows/accuracy");
    assert!(found[1] > found[0] && found[1] > 0.9, "{found:?}");
    let card = String::from_utf8(files["Result/README.md"].clone()).unwrap();
    assert!(card.contains(&format!("| accuracy | rows: {:.4} before, {:.4} after |", found[0], found[1])), "{card}");
    assert!(files.keys().all(|name| !name.contains("Further")), "{:?}", files.keys());

    let (adapter, merged) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    unpack(&files, "Result", adapter.path());
    unpack(&files, "Merged", merged.path());
    let over = |trunk: attune_architecture::Architecture| trunk.over(plan.head.as_ref().unwrap());
    let base = Base::open_as(&case.small.path("model"), Precision::F32, None, over, plan.seed + 1).unwrap();
    let with = answer(base, &[adapter.path()]);
    let whole = answer(Base::open(merged.path(), Precision::F32).unwrap(), &[]);
    let off = with.iter().zip(&whole).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off < 1e-4, "merged {whole:?}, beside the base {with:?}");
    assert_eq!(export::named_classes(merged.path()).unwrap(), ["c0", "c1", "c2"]);
    // Without what it keeps of the head there is none that was trained.
    let base = Base::open_as(&case.small.path("model"), Precision::F32, None, over, 0).unwrap();
    let Err(error) = frozen(base, []) else { panic!("a head at random") };
    assert!(error.to_string().contains("has no classifier, and no adapter keeps one"), "{error}");

    // The same bytes from ranks, and of a run that was stopped.
    assert_eq!(case.small.finish(plan.clone(), 2).1, files);
    let (request, _work) = case.small.request(plan.clone(), 1, None);
    let stopped = Outside::stopping_after(7);
    assert_eq!(run(&request, &stopped).unwrap(), End::Stopped(Step(7)));
    let saved = checkpoint(&stopped);
    let (request, _work) = case.small.request(plan, 2, Some(&saved));
    let resumed = Outside::default();
    run(&request, &resumed).unwrap();
    assert_eq!(files_of(&resumed.events.into_inner().unwrap()), files);
}

#[test]
fn a_run_goes_on_from_a_head_that_an_adapter_keeps_or_leaves_it_as_it_is() {
    let case = Case::new("bert_sequence", "bert_sequence");
    let before = numbers(&case.expected["before"])[0];
    // The slot of the head starts from what the adapter keeps of it.
    let on = case.small.finish(case.plan("[{name: skill, from: ./before}]", &[("tune.steps", "2")]), 1);
    close("goes on", &metric(&on.0, "eval/rows/loss")[..1], &[before], 2e-5);
    // Where nothing trains it, it stays.
    let stack = "[{name: skill, from: ./before, train: false}, {method: lora, rank: 2}, \
                 {name: whole, method: modules-to-save, targets: layer.1.output.dense}]";
    let (events, files) = case.small.finish(case.plan(stack, &[("tune.steps", "2")]), 1);
    close("stays", &metric(&events, "eval/rows/loss")[..1], &[before], 2e-5);
    let folder = tempfile::tempdir().unwrap();
    unpack(&files, "Result", folder.path());
    let tensors =
        candle_core::safetensors::load(folder.path().join("adapter_model.safetensors"), &Device::Cpu).unwrap();
    assert!(tensors.keys().any(|name| name == "base_model.model.bert.encoder.layer.1.output.dense.weight"));
    assert!(!tensors.keys().any(|name| name.contains("classifier")), "{:?}", tensors.keys());
}

/// What PEFT trained speaks for itself: the head that it keeps says how many classes there are.
#[test]
fn a_folder_of_pefts_is_opened_under_the_head_that_it_keeps() {
    for (case, base) in
        [("bert_sequence", "bert"), ("bert_tokens", "bert_tokens"), ("llama_sequence", "llama_sequence")]
    {
        let folder = golden("trainer/golden").join(case).join("after");
        let head = few::head_of(std::slice::from_ref(&folder)).unwrap().unwrap();
        let classes = if case == "bert_tokens" { 5 } else { 3 };
        assert_eq!((head.labels.len(), head.labels[1].as_str()), (classes, "LABEL_1"), "{case}");
        let opened = few::open_for(&golden("models/golden").join(base), std::slice::from_ref(&folder), Precision::F32);
        let (base, _, _) = frozen(opened.unwrap(), [folder.as_path()]).unwrap();
        assert_eq!(base.architecture().head.labels(), Some(classes));
    }
    assert!(few::head_of(&[golden("adapt/golden/llama_all_linear/adapter")]).unwrap().is_none());
}

#[test]
fn a_probe_trains_the_head_alone() {
    let case = Case::new("bert_sequence", "bert");
    let (events, files) = case.small.finish(case.plan("[{method: modules-to-save}]", &[("tune.steps", "20")]), 1);
    let losses = metric(&events, "eval/rows/loss");
    assert!(losses[1] < 0.9 * losses[0], "{losses:?}");
    let folder = tempfile::tempdir().unwrap();
    unpack(&files, "Result", folder.path());
    let read = attune_adapt::peft::read(folder.path()).unwrap();
    assert_eq!((read.method.method.as_str(), read.saved.is_some()), ("modules-to-save", false));
    let base = |seed| {
        let plan = case.plan("[{method: modules-to-save}]", &[]);
        let over = |trunk: attune_architecture::Architecture| trunk.over(plan.head.as_ref().unwrap());
        Base::open_as(&case.small.path("model"), Precision::F32, None, over, seed).unwrap()
    };
    // Whatever the head was before, it is the one that is kept.
    assert_eq!(answer(base(5), &[folder.path()]), answer(base(6), &[folder.path()]));
}

#[test]
fn the_weights_of_a_classifier_train_whole() {
    let case = Case::new("llama_sequence", "llama_sequence");
    let plan = case.plan("[{method: full}]", &[]);
    assert_eq!(plan.stack.len(), 1);
    let (events, files) = case.small.finish(plan, 1);
    let losses = metric(&events, "eval/rows/loss");
    assert!(losses[1] < 0.5 * losses[0], "{losses:?}");
    let folder = tempfile::tempdir().unwrap();
    unpack(&files, "Result", folder.path());
    assert_eq!(export::named_classes(folder.path()).unwrap(), ["c0", "c1", "c2"]);
    let base = Base::open(folder.path(), Precision::F32).unwrap();
    assert_eq!(base.architecture().class_name(), "LlamaForSequenceClassification");
    assert_eq!(base.tensor(&attune_points::TensorName::new("score", "weight"), DType::F32).unwrap().dims(), [3, 24]);
}

/// Rows before a text, of which the first is the one that the classifier of an encoder reads.
#[test]
fn a_prompt_learns_beside_a_head() {
    for base in ["bert_sequence", "llama_sequence"] {
        let case = Case::new(base, base);
        let room = [("tune.batch_tokens", "200"), ("tune.steps", "25")];
        let (events, _) = case.small.finish(case.plan("[{method: prompt-tuning, length: 2}]", &room), 1);
        let losses = metric(&events, "eval/rows/loss");
        assert!(losses[1] < 0.8 * losses[0], "{base}: {losses:?}");
    }
}

#[test]
fn a_head_learns_on_a_base_in_few_bits_and_weights_in_few_bits_do_not() {
    let case = Case::new("llama_sequence", "llama_sequence");
    let few = [("tune.quantization", "{method: nf4}"), ("tune.steps", "8")];
    let (events, files) = case.small.finish(case.plan("[{method: lora, rank: 3, alpha: 6}]", &few), 1);
    let losses = metric(&events, "eval/rows/loss");
    assert!(losses[1] < 0.7 * losses[0], "{losses:?}");
    assert!(files.contains_key("Result/base_quantization.json"));
    let plan = case.plan("[{method: modules-to-save, targets: [head, down_proj]}]", &few);
    let (request, _work) = case.small.request(plan, 1, None);
    let found = run(&request, &Outside::default()).unwrap_err().to_string();
    assert!(found.contains("`tune.stack[0].targets` names model.layers.0.mlp.down_proj, which"), "{found}");
}

#[test]
fn what_does_not_fit_is_said_by_field() {
    let fails = |case: &Case, stack: &str, changes: &[(&str, &str)]| {
        let (request, _work) = case.small.request(case.plan(stack, changes), 1, None);
        let shown = case.small.path("").display().to_string();
        run(&request, &Outside::default()).unwrap_err().to_string().replace(&shown, "DIR/")
    };
    let case = Case::new("bert_sequence", "bert");
    let lora = "[{method: lora}]";
    let head = |text| [("tune.head", text)];
    let two = "{task: classification, labels: [c0, c1]}";
    let words = "{task: token_classification, labels: [c0, c1]}";
    for (stack, changes, expected) in [
        ("[{method: full, targets: query}]", &[][..], "`tune.head` starts at random at "),
        (lora, &head("null"), "`base` is a BertModel, which gives no tokens from left to right; expected"),
        (lora, &head(two), "rows.jsonl:3: label \"c2\" is none of `tune.head.labels` (c0, c1)"),
        (
            lora,
            &head(words),
            "rows.jsonl: its columns [\"text\", \"text_pair\", \"label\"] are not those of classes; expected `tokens`",
        ),
        (lora, &[("tune.objective", "{method: dpo}")], "holds rows of classification; `dpo` compares two answers"),
    ] {
        let found = fails(&case, stack, changes);
        assert!(found.contains(expected), "{found}");
    }
    let config = case.small.path("model/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replacen('{', r#"{"id2label": {"0": "c1", "1": "c0", "2": "c2"},"#, 1)).unwrap();
    let found = fails(&case, lora, &[]);
    assert!(
        found.contains("`tune.head.labels` is [c0, c1, c2]; the base's head has [c1, c0, c2] in this order"),
        "{found}"
    );
    let other = Case::new("bert_sequence", "bert_sequence");
    let found = fails(&other, lora, &head(two));
    assert!(found.contains("classifier.weight"), "{found}");
}
