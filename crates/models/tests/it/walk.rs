//! Properties of the walk that need no reference: finite differences, packing, caches, stop tokens.

use std::sync::Arc;

use attune_architecture::Architecture;
use attune_models::generate::generate;
use attune_models::{Base, Model, Pass, Routing, Stack};
use attune_points::generate::{Finish, Sampling};
use attune_points::layout::{NO_LABEL, Source};
use attune_points::objective::{Level, Objective};
use attune_points::{Bank, BankKind, GradSink, Grads, Layout, Params, Row, TensorId, TensorName, Theta};
use attune_spec::job::Precision;
use attune_tensor::Rng;
use candle_core::{DType, Tensor};

use crate::support::{Alternating, CrossEntropy, Golden, Smoothed, difference, golden};

const TINY: &str = r#"{
    "model_type": "qwen2", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 11, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": true, "rope_theta": 100.0, "use_sliding_window": true, "sliding_window": 3,
    "max_window_layers": 1, "initializer_range": 0.5
}"#;

const TINY_QWEN3: &str = r#"{
    "model_type": "qwen3", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 11, "rms_norm_eps": 1e-3, "max_position_embeddings": 32, "hidden_act": "gelu",
    "tie_word_embeddings": false, "rope_theta": 100.0, "attention_bias": true, "initializer_range": 0.5
}"#;

const TINY_GPT2: &str = r#"{
    "model_type": "gpt2", "n_embd": 8, "n_inner": 12, "n_layer": 2, "n_head": 4, "n_positions": 7, "vocab_size": 11,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.5
}"#;

const TINY_OLMOE: &str = r#"{
    "model_type": "olmoe", "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 11, "max_position_embeddings": 32, "rms_norm_eps": 1e-3, "num_experts": 4,
    "num_experts_per_tok": 2, "norm_topk_prob": true, "rope_theta": 100.0, "initializer_range": 0.5,
    "eos_token_id": null
}"#;

/// As many classes as the documents here have labels.
const TINY_BERT: &str = r#"{
    "model_type": "bert", "architectures": ["BertForTokenClassification"], "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 11, "max_position_embeddings": 7, "num_labels": 11,
    "layer_norm_eps": 1e-3, "initializer_range": 0.5
}"#;

fn tiny_of(config: &str) -> Model {
    let architecture = Architecture::from_json(config.as_bytes()).unwrap();
    Model::new(Base::random(architecture, 5, DType::F64).unwrap(), Stack::default()).in_f64()
}

fn tiny() -> Model {
    tiny_of(TINY)
}

fn documents(lengths: &[usize]) -> Layout {
    let mut layout = Layout::new();
    let mut rng = Rng::new(9, "documents");
    for (example, &length) in lengths.iter().enumerate() {
        let ids: Vec<u32> = (0..length).map(|_| rng.below(11) as u32).collect();
        let label = |row: usize| if row % 3 == 1 { NO_LABEL } else { ids.get(row + 1).copied().unwrap_or(NO_LABEL) };
        let rows = ids.iter().enumerate().map(|(row, &id)| (Row::Token(id), label(row)));
        layout.push(Source { example: example as u64, domain: (example % 2) as u16, ..Source::default() }, rows);
    }
    layout
}

/// All weights trained, biases and norms moved away from their special values.
fn trained(model: &Model) -> Theta {
    let mut rng = Rng::new(3, "moved");
    let names = model.base().architecture().tensors().into_iter().map(|info| TensorName::from_path(&info.name));
    let params: Params = names
        .map(|name| {
            let value = model.base().tensor(&name, DType::F64).unwrap();
            let noise = rng.normal_tensor(value.shape(), 0.1, DType::F64).unwrap();
            (name, (value + noise).unwrap())
        })
        .collect();
    Theta::single([Bank { slot: "w".into(), kind: BankKind::Weights, sets: vec![Arc::new(params)], train: true }])
}

fn with(theta: &Theta, id: &TensorId, tensor: Tensor) -> Theta {
    let mut params: Params = (*theta.banks[0].sets[0]).clone();
    params.insert(id.name.clone(), tensor);
    let mut theta = theta.clone();
    theta.banks[0].sets[0] = Arc::new(params);
    theta
}

/// The derivative along a random direction in each tensor against a central difference, in f64.
#[test]
fn every_tensors_gradient_agrees_with_central_differences() {
    for config in [TINY, TINY_QWEN3, TINY_GPT2, TINY_OLMOE, TINY_BERT] {
        gradients_agree_with_central_differences(&tiny_of(config), &documents(&[5, 3, 5, 1, 7]), &CrossEntropy);
    }
}

#[test]
fn the_gradients_of_every_kind_of_objective_agree_with_central_differences() {
    let (model, layout) = (tiny(), pairs(&[5, 3, 5, 1, 7, 4]));
    gradients_agree_with_central_differences(&model, &layout, &Smoothed);
    for level in [Level::Document, Level::Group, Level::Part] {
        gradients_agree_with_central_differences(&model, &layout, &Alternating(level));
    }
}

/// Documents of which every two are a group.
fn pairs(lengths: &[usize]) -> Layout {
    let mut layout = Layout::new();
    for doc in documents(lengths).docs() {
        let source = documents(lengths);
        let rows = doc.rows.start as usize..doc.rows.end as usize;
        let of_doc = source.rows()[rows.clone()].iter().copied().zip(source.labels()[rows].iter().copied());
        layout.push(Source { example: doc.example, group: Some(doc.example as u32 / 2), ..Source::default() }, of_doc);
    }
    layout
}

fn gradients_agree_with_central_differences(model: &Model, layout: &Layout, objective: &dyn Objective) {
    let theta = trained(model);
    let mut sink = Grads::wanting(theta.trained().map(|(id, _)| id));
    model.grad(&Pass { theta: &theta, layout, dropout: None }, objective, 0.5, &mut sink).unwrap();
    let mut rng = Rng::new(1, "directions");
    let step = 1e-4;
    for (id, value) in theta.trained() {
        let direction = rng.normal_tensor(value.shape(), 1.0, DType::F64).unwrap();
        let loss = |by: f64| {
            let moved = (value + (&direction * by).unwrap()).unwrap();
            let theta = &with(&theta, &id, moved);
            model.score(&Pass { theta, layout, dropout: None }, objective).unwrap().loss_sum
        };
        let central = |step: f64| 0.5 * (loss(step) - loss(-step)) / (2.0 * step);
        // Of two steps, so that their errors of step² cancel.
        let numeric = (4.0 * central(step / 2.0) - central(step)) / 3.0;
        let gradient = sink.get(&id).unwrap_or_else(|| panic!("{id} has no gradient"));
        let exact = (gradient * &direction).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        // Off by O(step⁴) times the fifth derivative and by rounding of 1e-16 × loss / step.
        assert!((numeric - exact).abs() <= 1e-7 * (1.0 + exact.abs()), "{id}: {numeric} against {exact}");
    }
}

#[test]
fn a_packs_loss_is_the_token_weighted_mean_of_its_documents() {
    let (model, lengths) = (tiny(), [6, 4, 6, 9]);
    let theta = trained(&model);
    let packed = documents(&lengths);
    let whole = model.score(&Pass { theta: &theta, layout: &packed, dropout: None }, &CrossEntropy).unwrap();
    let (mut sum, mut tokens) = (0.0, 0);
    for doc in packed.docs() {
        let rows = doc.rows.start as usize..doc.rows.end as usize;
        let mut alone = Layout::new();
        let rows = packed.rows()[rows.clone()].iter().copied().zip(packed.labels()[rows].iter().copied());
        alone.push(Source::default(), rows);
        let report = model.score(&Pass { theta: &theta, layout: &alone, dropout: None }, &CrossEntropy).unwrap();
        sum += report.mean() * report.counts.tokens as f64;
        tokens += report.counts.tokens;
    }
    assert_eq!(whole.counts.tokens, tokens);
    assert!((whole.mean() - sum / tokens as f64).abs() < 1e-12);
    let by_domain: f64 = whole.by_domain.iter().map(|(loss, _)| loss).sum();
    assert!((by_domain - whole.loss_sum).abs() < 1e-12);
    let counts: attune_points::layout::LabelCounts = whole.by_domain.iter().map(|(_, counts)| *counts).sum();
    assert_eq!((counts, whole.counts), (packed.counts(), packed.counts()));
}

#[test]
fn a_document_does_not_see_its_neighbours() {
    let model = Model::new(Base::open(&golden("mistral"), Precision::F32).unwrap(), Stack::default());
    let packed = Golden::open("mistral", "packed.safetensors").unwrap().layout();
    let mut changed = Layout::new();
    let first = packed.docs()[0].rows.clone();
    let other = packed.rows()[..first.end as usize].iter().map(|_| (Row::Token(1), NO_LABEL));
    changed.push(Source::default(), other);
    let second: Vec<_> = packed.rows()[first.end as usize..].iter().map(|row| (*row, NO_LABEL)).collect();
    let rows = second.len();
    changed.push(Source::default(), second);
    let theta = Theta::default();
    let logits = |layout: &Layout| {
        let logits = model.logits(&Pass { theta: &theta, layout, dropout: None }).unwrap();
        logits.narrow(0, first.end as usize, rows).unwrap()
    };
    assert_eq!(difference(&logits(&packed), &logits(&changed)), 0.0);
}

#[test]
fn nothing_is_computed_below_the_lowest_wanted_tensor() {
    struct Recorder(Vec<String>);
    impl GradSink for Recorder {
        fn want(&self, tensor: &TensorId) -> attune_points::Region<'_> {
            let upper = tensor.name.to_string().starts_with("model.layers.1.mlp.");
            if upper { attune_points::Region::All } else { attune_points::Region::None }
        }
        fn put(&mut self, tensor: &TensorId, _: &Tensor) -> attune_points::Result<()> {
            self.0.push(tensor.name.to_string());
            Ok(())
        }
    }
    let model = tiny();
    let theta = trained(&model);
    let layout = documents(&[4]);
    let mut sink = Recorder(Vec::new());
    model.grad(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy, 1.0, &mut sink).unwrap();
    sink.0.sort();
    let expected = ["down_proj", "gate_proj", "up_proj"].map(|role| format!("model.layers.1.mlp.{role}.weight"));
    assert_eq!(sink.0, expected);
}

#[test]
fn decoding_with_a_cache_gives_the_logits_of_the_whole_text() {
    for case in ["llama", "llama_rope_dynamic", "mistral", "qwen2_window", "qwen3", "olmoe"] {
        let model = Model::new(Base::open(&golden(case), Precision::F32).unwrap(), Stack::default());
        let theta = Theta::default();
        let prompt: Vec<u32> = (0..12).map(|i| (i * 5 + 3) % 40).collect();
        let sampling = Sampling { max_tokens: 40, ..Sampling::default() };
        let generated = generate(&model, &theta, &prompt, &sampling, |_| true).unwrap();
        let mut text = prompt.clone();
        for token in generated.tokens {
            let layout = Layout::single(&text);
            let logits = model.logits(&Pass { theta: &theta, layout: &layout, dropout: None }).unwrap();
            let last: Vec<f32> = logits.get(text.len() - 1).unwrap().to_vec1().unwrap();
            let best = last.iter().copied().fold(f32::MIN, f32::max);
            assert!(best - last[token as usize] < 1e-4, "{case}: token {token} after {} tokens", text.len());
            text.push(token);
        }
    }
}

#[test]
fn generation_stops_where_it_is_told_to() {
    let model = Model::new(Base::open(&golden("llama"), Precision::F32).unwrap(), Stack::default());
    let theta = Theta::default();
    let run = |sampling: &Sampling, most: usize| {
        let mut left = most;
        generate(&model, &theta, &[1, 2, 3], sampling, |_| {
            left -= 1;
            left > 0
        })
        .unwrap()
    };
    let free = run(&Sampling { max_tokens: 10, ..Sampling::default() }, 100);
    assert_eq!((free.tokens.len(), free.finish), (10, Finish::Length));
    let place = (1..10).find(|&i| !free.tokens[..i].contains(&free.tokens[i])).unwrap();
    let stopped = run(&Sampling { max_tokens: 10, stop: vec![free.tokens[place]], ..Sampling::default() }, 100);
    assert_eq!((stopped.tokens.as_slice(), stopped.finish), (&free.tokens[..place], Finish::Stop(free.tokens[place])));
    assert_eq!(run(&Sampling { max_tokens: 10, ..Sampling::default() }, 4).finish, Finish::Callback);
    let sampled = |seed| run(&Sampling { max_tokens: 10, temperature: 1.5, seed, ..Sampling::default() }, 100);
    assert_eq!(sampled(1), sampled(1));
    assert_ne!(sampled(1).tokens, sampled(2).tokens);
    let refused = generate(&model, &theta, &[], &Sampling::default(), |_| true).unwrap_err();
    assert!(refused.to_string().contains("prompt is empty"), "{refused}");
}

/// One row reaches two of four experts; the others' weights are asked for all the same.
#[test]
fn an_expert_without_rows_has_a_gradient_of_zero() {
    let model = tiny_of(TINY_OLMOE);
    let theta = trained(&model);
    let mut layout = Layout::new();
    layout.push(Source::default(), [(Row::Token(3), 4)]);
    let pass = Pass { theta: &theta, layout: &layout, dropout: None };
    let mut sink = Grads::wanting(theta.trained().map(|(id, _)| id));
    model.grad(&pass, &CrossEntropy, 1.0, &mut sink).unwrap();
    for Routing { layer, .. } in model.routing(&pass).unwrap() {
        let chosen = model.routing(&pass).unwrap()[layer as usize].chosen().unwrap();
        for expert in 0..4 {
            let name = format!("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight");
            let (id, _) = theta.trained().find(|(id, _)| id.name.to_string() == name).unwrap();
            let size = crate::support::largest(sink.get(&id).unwrap_or_else(|| panic!("{name} has no gradient")));
            assert_eq!(size > 0.0, chosen.contains(&expert), "{name}: {size}");
        }
    }
}

#[test]
fn a_text_beyond_the_learned_positions_is_refused() {
    let (model, theta) = (tiny_of(TINY_GPT2), Theta::default());
    let logits = |length: usize| {
        let layout = Layout::single(&vec![3; length]);
        model.logits(&Pass { theta: &theta, layout: &layout, dropout: None })
    };
    assert_eq!(logits(7).unwrap().dims(), [7, 11]);
    let message = "a document has 8 tokens or more; this model has positions for 7";
    assert_eq!(logits(8).unwrap_err().to_string(), message);
    let sampling = Sampling { max_tokens: 5, ..Sampling::default() };
    assert_eq!(generate(&model, &theta, &[1, 2, 3], &sampling, |_| true).unwrap().tokens.len(), 5);
    let sampling = Sampling { max_tokens: 6, ..Sampling::default() };
    assert_eq!(generate(&model, &theta, &[1, 2, 3], &sampling, |_| true).unwrap_err().to_string(), message);
}

#[test]
fn a_token_outside_of_the_vocabulary_is_named() {
    let model = tiny();
    let theta = Theta::default();
    let layout = Layout::single(&[3, 11]);
    let error = model.logits(&Pass { theta: &theta, layout: &layout, dropout: None }).unwrap_err();
    assert_eq!(
        error.to_string(),
        "token 11 is outside of the model's vocabulary of 11; tokenizer and model do not fit"
    );
}
