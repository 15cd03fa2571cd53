//! What reads bytes that somebody else wrote, one function for each such reader: bytes in, nothing out but a panic where a
//! promise is broken. The fuzz targets (`fuzz/`) and the test that replays their corpus call the same functions.
//!
//! The promises: no input panics, none takes memory or time out of proportion, and what is accepted means the same when it
//! is written and read again.
//!
//! Deliberately absent: readers of bytes that are named by a digest which was checked before; Parquet, whose library goes through lists
//! that say of themselves that they have billions of values of no bytes, one by one, for as long as that takes.

use std::convert::Infallible;
use std::fs;
use std::sync::LazyLock;

use attune_architecture::Architecture;
use attune_artifacts::formats::{peft, safetensors};
use attune_artifacts::{Kind, Manifest, hash};
use attune_data::tokenizer::byte_level;
use attune_data::{ChatTemplate, Classes, Dataset, Encoder, Labelled, Message, Reading, Source, Tokenizer};
use attune_proto::convert::job;
use attune_proto::v1;
use attune_spec::job::{OnBadRow, TooLong, read};
use attune_spec::method::Catalogue;
use attune_spec::stages;
use bytes::Bytes;
use prost::Message as _;
use serde_json::Map;

/// A reader of untrusted bytes.
pub type Target = fn(&[u8]);

/// Every reader by its name, which is that of its fuzz target and of its folder of inputs.
pub const TARGETS: &[(&str, Target)] = &[
    ("adapter_config", adapter_config),
    ("chat_template", chat_template),
    ("csv", csv),
    ("job_file", job_file),
    ("job_message", job_message),
    ("manifest", manifest),
    ("model_config", model_config),
    ("rows", rows),
    ("safetensors_header", safetensors_header),
    ("tokenizer", tokenizer),
];

/// A conversation of two turns.
fn conversation() -> [Message; 2] {
    [Message::new("user", "What is <b>a & b</b>?"), Message::new("assistant", "Both.\n")]
}

/// `adapter_config.json` of an adapter in PEFT's layout, and what it says of modules.
pub fn adapter_config(bytes: &[u8]) {
    let Ok(config) = peft::LoraConfig::parse(bytes) else { return };
    config.beyond_plain();
    if let Ok(patterns) = config.patterns() {
        for module in ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "h.3.attn.c_attn"] {
            assert!(patterns.rank(module) > 0, "{module} has no rank");
            assert!(!patterns.alpha(module).is_nan() && !patterns.scaling(module).is_nan(), "{module} has no scaling");
        }
    }
    // A base that is named by a local path is read, and never written.
    let Ok(written) = config.render() else { return };
    let again = peft::LoraConfig::parse(written.as_bytes()).expect("what was written can be read");
    assert_eq!(config, again);
}

/// The chat template of a model folder: compiled, and rendered for a conversation.
pub fn chat_template(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    static TOKENIZER: LazyLock<Tokenizer> =
        LazyLock::new(|| byte_level(&["<|im_start|>", "<|im_end|>", "<|endoftext|>"]));
    let Ok(template) = ChatTemplate::compile("chat_template.jinja", text, TOKENIZER.specials()) else { return };
    let turns = conversation();
    if let Ok(prompt) = template.prompt(&turns) {
        assert_eq!(template.prompt(&turns).expect("it did a moment ago"), prompt);
    }
    template.end_of_turn();
}

/// A job file: YAML, the structure, the methods, the relations between fields, and the stages of a recipe.
pub fn job_file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(value) = read::read_yaml(text) else { return };
    let Ok(spec) = read::read_value(&value, Catalogue::embedded()) else { return };
    let written = serde_json::to_value(&spec).expect("what was read can be written");
    let again = read::read_value(&written, Catalogue::embedded()).expect("what was written can be read");
    assert_eq!(spec, again);
    // What it names is what is replaced, all of it and nothing else.
    let mut replaced = Vec::new();
    let mut same = spec.clone();
    let kept: Result<(), Infallible> = same.replace_references(|reference| {
        replaced.push(reference.to_string());
        Ok(reference.clone())
    });
    kept.expect("nothing was refused");
    assert_eq!(spec, same);
    let mut named: Vec<_> = spec.references().iter().map(|(_, reference)| reference.to_string()).collect();
    named.sort();
    replaced.sort();
    assert_eq!(named, replaced);
    // Refused or not, it comes to an end.
    let _ = stages::known(&spec, &[]);
}

/// A job as a message.
pub fn job_message(bytes: &[u8]) {
    let Ok(message) = v1::JobSpec::decode(bytes) else { return };
    let Ok(spec) = job::from_message(&message) else { return };
    let written = job::to_message(&spec).expect("what was read can be written");
    let again = job::from_message(&written).expect("what was written can be read");
    // Numbers that are none are not equal to themselves; their text is.
    assert_eq!(format!("{spec:?}"), format!("{again:?}"));
}

/// The manifest of an artifact.
pub fn manifest(bytes: &[u8]) {
    let Ok(manifest) = Manifest::parse(bytes) else { return };
    assert_eq!(manifest.bytes(), bytes, "one meaning has one form");
    assert_eq!(manifest.digest(), hash::bytes(bytes));
    let (files, causes) = (manifest.files().to_vec(), manifest.causes().clone());
    let again = Manifest::new(manifest.kind(), files, causes).expect("what was read can be written");
    assert_eq!(again, manifest);
    let kind = manifest.kind().to_string();
    assert_eq!(kind.parse::<Kind>().ok(), Some(manifest.kind()));
    assert!(format!("{kind} ").parse::<Kind>().is_err());
    let blobs = manifest.blobs();
    for file in manifest.files() {
        assert_eq!(manifest.file(&file.path), Some(file));
        assert!(blobs.contains(&file.blob()), "{} has no blob", file.path);
    }
    assert!(manifest.size_bytes() >= blobs.iter().map(|blob| blob.size_bytes).max().unwrap_or_default());
}

/// `config.json` of a model folder.
pub fn model_config(bytes: &[u8]) {
    let Ok(architecture) = Architecture::from_json(bytes) else { return };
    for tensor in architecture.tensors() {
        let elements = tensor.shape.iter().try_fold(1_usize, |all, n| all.checked_mul(*n));
        assert!(elements.is_some(), "{} has more elements than can be counted", tensor.name);
    }
    architecture.parameters();
    let mut config = Map::new();
    architecture.write_config(&mut config);
    architecture.forward_flops_per_token(1024.0, 1.0);
    architecture.weight_bytes(4);
}

/// A file of rows in JSON Lines: read, understood, made tokens.
pub fn rows(bytes: &[u8]) {
    documents("rows.jsonl", bytes);
}

/// A file of rows in CSV.
pub fn csv(bytes: &[u8]) {
    documents("rows.csv", bytes);
}

/// Reads a file as one of rows, twice, with a chat template and without, with classes of documents and of words, and for vectors.
fn documents(name: &str, bytes: &[u8]) {
    static ENCODERS: LazyLock<[Encoder; 5]> = LazyLock::new(|| {
        let classes = |of| Some(Classes { names: ["no", "yes", "1"].map(str::to_owned).to_vec(), of });
        let ways = [
            (Some("chatml"), None),
            (None, None),
            (None, classes(Labelled::Last)),
            (None, classes(Labelled::Words)),
            (None, classes(Labelled::Queries)),
        ];
        ways.map(|(template, classes)| {
            let tokenizer = byte_level(&["<|im_start|>", "<|im_end|>", "<|endoftext|>"]);
            let encoder = Encoder::new(tokenizer, template, 256, TooLong::Truncate);
            encoder.expect("it has the template's tokens").with_classes(classes)
        })
    });
    let source = Source::in_memory(name, Bytes::copy_from_slice(bytes)).expect("the name says the format");
    let reading = Reading { form: None, on_bad_row: OnBadRow::Skip, rows: None };
    for encoder in &*ENCODERS {
        let Ok(found) = Dataset::read(&source, encoder, reading) else { continue };
        for document in found.documents() {
            assert_eq!(document.ids.len(), document.trained.len());
            assert!((1..=256).contains(&document.ids.len()), "a document of {} tokens", document.ids.len());
            assert_eq!(document.classed.is_some(), encoder.classes().is_some());
            if let Some(classed) = document.classed {
                let lengths = [classed.labels.len(), classed.types.len()];
                assert_eq!(lengths, [document.ids.len(); 2]);
            }
        }
        let again = Dataset::read(&source, encoder, reading).expect("it was read a moment ago");
        assert_eq!(found.digest(), again.digest());
    }
}

/// The header of a safetensors file.
pub fn safetensors_header(bytes: &[u8]) {
    let Ok(header) = safetensors::Header::read_from(&mut &*bytes, bytes.len() as u64, "the input") else { return };
    let mut ranges: Vec<_> = header.tensors().values().map(|info| info.bytes.clone()).collect();
    ranges.sort_by_key(|range| (range.start, range.end));
    for pair in ranges.windows(2) {
        assert_eq!(pair[0].end, pair[1].start, "tensors tile the file");
    }
    assert!(ranges.last().is_none_or(|range| range.end == bytes.len() as u64), "a tensor ends beyond the file");
}

/// The files of a model folder that say how text becomes tokens, with a byte of zero between them: `tokenizer.json`,
/// `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`, of which the later ones may be missing.
pub fn tokenizer(bytes: &[u8]) {
    const FILES: [&str; 4] =
        ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];
    let folder = tempfile::tempdir().expect("a folder can be made");
    for (name, part) in FILES.into_iter().zip(bytes.splitn(FILES.len(), |byte| *byte == 0)) {
        fs::write(folder.path().join(name), part).expect("the file can be written");
    }
    let Ok(tokenizer) = Tokenizer::open(folder.path()) else { return };
    for special in tokenizer.specials().all() {
        let _ = tokenizer.id(special);
    }
    if let Ok(ids) = tokenizer.encode("One text,\u{a0}zwei Ärger: 3,14 <|im_end|>\n", true) {
        assert!(ids.iter().all(|id| *id < tokenizer.vocabulary()), "a token beyond the vocabulary");
        let _ = tokenizer.decode(&ids, true);
    }
    for of in [Labelled::First, Labelled::Words] {
        let names = vec!["no".to_owned(), "yes".to_owned()];
        let Ok(encoder) = Encoder::new(tokenizer.clone(), None, 6, TooLong::Truncate) else { break };
        if let Ok(asked) = encoder.with_classes(Some(Classes { names, of })).ask("One text, zwei Ärger", None) {
            assert!(asked.rows.iter().all(|row| (*row as usize) < asked.layout.n_rows()), "a row beyond the text");
            assert_eq!(asked.rows.len(), asked.of.len());
        }
    }
    let template = tokenizer.chat_template().ok().flatten();
    if let Some(template) = &template {
        let _ = template.prompt(&conversation());
    }
    tokenizer.stops(template.as_ref());
}
