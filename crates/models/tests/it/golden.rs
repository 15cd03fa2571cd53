//! Every folder under `golden/`, computed by transformers (`golden/decoders.py` names the versions).

use std::collections::BTreeMap;
use std::sync::Arc;

use attune_models::generate::generate;
use attune_models::{Auxiliary as _, Base, LoadBalance, Model, Pass, Routing, Stack};
use attune_points::generate::{Finish, Sampling};
use attune_points::layout::{NO_LABEL, Source};
use attune_points::{Grads, Layout, Row, TensorId, TensorName, Theta};
use attune_spec::job::Precision;
use candle_core::Tensor;

use crate::support::{CrossEntropy, Golden, all_trained, difference, golden, largest};

pub(crate) const CASES: [&str; 26] = [
    "gpt2",
    "gpt2_bare",
    "gpt2_untied",
    "llama",
    "llama_attention_bias",
    "llama_head_dim",
    "llama_old_config",
    "llama_rope_dynamic",
    "llama_rope_dynamic_old_config",
    "llama_rope_linear",
    "llama_rope_linear_old_config",
    "llama_rope_llama3",
    "llama_rope_llama3_old_config",
    "llama_rope_yarn",
    "llama_rope_yarn_old_config",
    "mistral",
    "mistral_no_window",
    "mixtral",
    "mixtral_window",
    "olmoe",
    "olmoe_normalised",
    "qwen2",
    "qwen2_old_config",
    "qwen2_window",
    "qwen3",
    "qwen3_moe",
];

/// Both sides compute in f32; the bound that logits have to keep.
const TOLERANCE: f64 = 1e-4;

fn model(case: &str) -> Model {
    Model::new(Base::open(&golden(case), Precision::F32).unwrap(), Stack::default())
}

fn all_files(file: &str) -> impl Iterator<Item = (&'static str, Golden)> {
    CASES.into_iter().filter_map(move |case| Some((case, Golden::open(case, file)?)))
}

#[test]
fn the_list_is_complete() {
    let folder = golden("");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let mut found: Vec<String> = entries
        .filter(|entry| entry.file_type().unwrap().is_dir() && !entry.file_name().to_string_lossy().starts_with('_'))
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    found.sort();
    let mut expected: Vec<&str> = CASES.into_iter().chain(crate::encoders::CASES).chain(crate::folder::FEW).collect();
    expected.sort_unstable();
    assert_eq!(found, expected);
}

#[test]
fn hidden_rows_logits_and_loss_are_the_references() {
    let mut compared = 0;
    for file in ["expected.safetensors", "packed.safetensors"] {
        for (case, expected) in all_files(file) {
            let (model, layout, theta) = (model(case), expected.layout(), Theta::default());
            let pass = Pass { theta: &theta, layout: &layout, dropout: None };
            for (index, hidden) in model.hidden(&pass).unwrap().iter().enumerate() {
                // A block of the reference is our attention and MLP blocks together.
                if index % 2 == 0 {
                    let name = format!("hidden.{}", index / 2);
                    let off = difference(hidden, expected.tensor(&name));
                    assert!(off < TOLERANCE, "{case}/{file}: {name} is off by {off}");
                }
            }
            let off = difference(&model.logits(&pass).unwrap(), expected.tensor("logits"));
            assert!(off < TOLERANCE, "{case}/{file}: logits are off by {off}");
            let report = model.score(&pass, &CrossEntropy).unwrap();
            assert_eq!(report.counts.tokens as i64, expected.ints("label_count")[0], "{case}/{file}");
            let off = (report.mean() - expected.float("loss")).abs() / expected.float("loss");
            assert!(off < 1e-5, "{case}/{file}: the loss is off by a factor of {off}");
            compared += 1;
        }
    }
    assert!(compared >= 32, "{compared} files");
}

#[test]
fn gradients_of_all_weights_are_the_references() {
    let mut compared = 0;
    for (file, batch) in
        [("gradients.safetensors", "expected.safetensors"), ("packed_gradients.safetensors", "packed.safetensors")]
    {
        for (case, expected) in all_files(file) {
            let model = model(case);
            let (theta, ids) = all_trained(&model);
            let layout = Golden::open(case, batch).unwrap().layout();
            let mut sink = Grads::wanting(ids);
            let scale = 1.0 / layout.counts().tokens as f64;
            let pass = Pass { theta: &theta, layout: &layout, dropout: None };
            model.grad(&pass, &CrossEntropy, scale, &mut sink).unwrap();
            let found: BTreeMap<String, _> = sink.iter().map(|(id, g)| (id.name.to_string(), g.unwrap())).collect();
            assert_eq!(
                found.keys().map(String::as_str).collect::<Vec<_>>(),
                expected.names().collect::<Vec<_>>(),
                "{case}"
            );
            let transposed: BTreeMap<String, bool> =
                model.base().architecture().tensors().into_iter().map(|info| (info.name, info.transposed)).collect();
            for (name, gradient) in found {
                let stored = expected.tensor(&name);
                let reference = if transposed[&name] { &stored.t().unwrap() } else { stored };
                let off = difference(gradient, reference) / largest(reference);
                assert!(off < TOLERANCE, "{case}/{file}: the gradient of {name} is off by a factor of {off}");
                compared += 1;
            }
        }
    }
    assert!(compared > 240, "{compared} tensors");
}

#[test]
fn gradients_by_input_embeddings_are_the_references() {
    let (mut compared, id) = (0, TensorId::input_embeddings());
    for file in ["expected.safetensors", "packed.safetensors"] {
        for (case, expected) in all_files(file) {
            let (model, layout, theta) = (model(case), expected.layout(), Theta::default());
            let mut sink = Grads::wanting([id.clone()]);
            let pass = Pass { theta: &theta, layout: &layout, dropout: None };
            model.grad(&pass, &CrossEntropy, 1.0 / layout.counts().tokens as f64, &mut sink).unwrap();
            let reference = expected.tensor("grad.inputs_embeds");
            let off = difference(sink.get(&id).unwrap(), reference) / largest(reference);
            assert!(off < TOLERANCE, "{case}/{file}: off by a factor of {off}");
            compared += 1;
        }
    }
    assert!(compared >= 32, "{compared} files");
}

/// Weights, operands of products and what is kept are rounded by 2^-9 at most, in the root of the mean square by 0.11 %; logits have gone
/// through some forty roundings, which add up in quadrature to 0.7 %. Four times that is the bound, of how much logits differ from one
/// another; losses, which are means of many, keep it without the factor. In mixtures probabilities of experts are rounded as well, and a
/// row may go to another one: twice that.
#[test]
fn bases_of_bf16_are_the_references_within_the_precision_of_bf16() {
    let mut compared = 0;
    for (case, expected) in all_files("expected.safetensors") {
        let base = Base::open(&golden(case), Precision::Bf16).unwrap();
        let (model, layout, theta) = (Model::new(base, Stack::default()), expected.layout(), Theta::default());
        let pass = Pass { theta: &theta, layout: &layout, dropout: None };
        let (found, reference) = (model.logits(&pass).unwrap(), expected.tensor("logits"));
        let size = |tensor: &Tensor| tensor.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let spread = reference.broadcast_sub(&reference.mean_all().unwrap()).unwrap();
        let off = size(&(found - reference).unwrap()) / size(&spread);
        let loss = model.score(&pass, &CrossEntropy).unwrap().mean();
        let off_loss = (loss / expected.float("loss") - 1.0).abs();
        let by: f32 = if model.base().architecture().experts.is_some() { 2.0 } else { 1.0 };
        assert!(off > 1e-5, "{case}: nothing was rounded");
        assert!(off < by * 0.028, "{case}: logits are off by a factor of {off}");
        assert!(off_loss < f64::from(by) * 0.007, "{case}: the loss is off by a factor of {off_loss}");
        compared += 1;
    }
    assert!(compared >= 20, "{compared} files");
}

/// The loss of `auxiliary.safetensors` is the mean cross-entropy plus the coefficient times the balance.
#[test]
fn routing_and_the_balance_are_the_references_and_their_gradient_reaches_routers() {
    let mut compared = 0;
    for (case, expected) in all_files("auxiliary.safetensors") {
        let model = model(case);
        let balance = LoadBalance::of(model.base().architecture()).unwrap();
        let coefficient = balance.coefficient;
        let model = model.with_auxiliary(Arc::new(balance));
        let (theta, ids) = all_trained(&model);
        let layout = Golden::open(case, "expected.safetensors").unwrap().layout();
        let pass = Pass { theta: &theta, layout: &layout, dropout: None };
        let routing = model.routing(&pass).unwrap();
        for Routing { layer, probs_te, .. } in &routing {
            let logits = expected.tensor(&format!("router_logits.{layer}"));
            let off = difference(probs_te, &attune_tensor::ops::softmax(logits).unwrap());
            assert!(off < TOLERANCE, "{case}: probabilities of layer {layer} are off by {off}");
        }
        let tokens = layout.counts().tokens as f64;
        let loss = balance.loss(&routing, &layout).unwrap().loss_sum / (tokens * coefficient);
        assert!((loss - expected.float("auxiliary_loss")).abs() < 1e-5, "{case}: the balance is {loss}");
        let mut sink = Grads::wanting(ids);
        model.grad(&pass, &CrossEntropy, 1.0 / tokens, &mut sink).unwrap();
        for (id, gradient) in sink.iter() {
            let name = format!("gradient.{}", id.name);
            if !expected.names().any(|known| known == name) {
                continue;
            }
            let reference = expected.tensor(&name);
            let off = difference(gradient.unwrap(), reference) / largest(reference);
            assert!(off < TOLERANCE, "{case}: the gradient of {id} is off by a factor of {off}");
            compared += 1;
        }
    }
    assert_eq!(compared, 25);
}

#[test]
fn frozen_weights_give_their_gradient_to_a_sink_that_asks() {
    let expected = Golden::open("qwen2", "gradients.safetensors").unwrap();
    let (model, theta) = (model("qwen2"), Theta::default());
    let layout = Golden::open("qwen2", "expected.safetensors").unwrap().layout();
    let name = TensorName::from_path("model.layers.1.mlp.up_proj.weight");
    let id = TensorId { owner: attune_points::Owner::Base, name: name.clone() };
    let mut sink = Grads::wanting([id.clone()]);
    let scale = 1.0 / layout.counts().tokens as f64;
    model.grad(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy, scale, &mut sink).unwrap();
    let reference = expected.tensor(&name.to_string());
    assert!(difference(sink.get(&id).unwrap(), reference) / largest(reference) < TOLERANCE);
}

#[test]
fn greedy_generation_with_a_cache_is_the_references() {
    let mut compared = 0;
    for (case, expected) in all_files("generated.safetensors") {
        let model = model(case);
        let prompt: Vec<u32> = expected.ints("prompt").into_iter().map(|id| id as u32).collect();
        let reference: Vec<u32> = expected.ints("generated").into_iter().map(|id| id as u32).collect();
        let sampling = Sampling { max_tokens: reference.len(), ..Sampling::default() };
        let mut streamed = Vec::new();
        let each = |token| {
            streamed.push(token);
            true
        };
        let generated = generate(&model, &Theta::default(), &prompt, &sampling, each).unwrap();
        assert_eq!(generated.tokens, reference, "{case}");
        assert_eq!(streamed, reference, "{case}");
        assert_eq!(generated.finish, Finish::Length);
        // What was chosen was ahead by far more than what logits may differ by, and they differ by no more.
        assert!(expected.float("margin") > 10.0 * TOLERANCE, "{case}");
        let rows = prompt.iter().chain(&reference).map(|id| (Row::Token(*id), NO_LABEL)).collect::<Vec<_>>();
        let mut layout = Layout::new();
        layout.push(Source::default(), rows);
        let theta = Theta::default();
        let whole = model.logits(&Pass { theta: &theta, layout: &layout, dropout: None }).unwrap();
        let chosen_by = whole.narrow(0, prompt.len() - 1, reference.len()).unwrap();
        let off = difference(&chosen_by, expected.tensor("logits"));
        assert!(off < TOLERANCE, "{case}: logits are off by {off}");
        compared += 1;
    }
    assert_eq!(compared, 22);
}
