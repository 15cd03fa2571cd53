//! What a model on views gives beside losses is held to the blocks' graphs, and many texts at once to each alone.

use std::sync::Arc;

use attune_models::generate::{Request, generate, generate_all};
use attune_models::{Base, Model, Pass, Stack};
use attune_points::Theta;
use attune_points::adapter::Adapter;
use attune_points::generate::{Finish, Sampling};
use attune_spec::job::Precision;
use candle_core::DType;

use crate::passes::{
    MIXTURE, TINY, TOLERANCE, bank, blender, bottleneck, documents, low_rank, mixer, model, prefix, rescaled, set,
    turned, weights,
};
use crate::sides::carrier;
use crate::support::{difference, golden, largest};

const QWEN3: &str = r#"{
    "model_type": "qwen3", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 10, "vocab_size": 41, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "hidden_act": "gelu", "tie_word_embeddings": false, "initializer_range": 0.2
}"#;

const GPT2: &str = r#"{
    "model_type": "gpt2", "n_embd": 24, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 41,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2
}"#;

/// Frequencies change with the length beyond 16 tokens.
const DYNAMIC: &str = r#"{
    "model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "vocab_size": 41, "rms_norm_eps": 1e-5, "max_position_embeddings": 16, "hidden_act": "silu",
    "tie_word_embeddings": false, "initializer_range": 0.2, "rope_scaling": {"type": "dynamic", "factor": 2.0}
}"#;

fn components() -> Vec<Vec<Arc<dyn Adapter>>> {
    vec![
        Vec::new(),
        vec![low_rank(3, 0.2, true)],
        vec![low_rank(3, 0.2, false)],
        vec![low_rank(2, 0.0, true), low_rank(4, 0.0, true), low_rank(2, 0.0, false)],
        vec![rescaled(2), low_rank(3, 0.2, true)],
        vec![turned(true), low_rank(3, 0.2, true), turned(false)],
        vec![prefix(3), bottleneck(2, 0.2)],
        vec![carrier(3), bottleneck(2, 0.2)],
        vec![bottleneck(2, 0.0), bottleneck(3, 0.0), mixer()],
        vec![low_rank(2, 0.0, true), low_rank(3, 0.0, true), blender(true), prefix(2)],
    ]
}

/// Each family with each choice of components: the model on views, by graphs, and parameters of both, all weights among them
/// at times.
fn each(mut f: impl FnMut(&Model, &Model, &Theta, &str)) {
    for config in [TINY, MIXTURE, QWEN3, GPT2, DYNAMIC] {
        for (choice, (of_views, of_graphs)) in components().into_iter().zip(components()).enumerate() {
            let n = of_views.len();
            let views = model(config, DType::F32, of_views);
            let graphs = model(config, DType::F32, of_graphs).by_graphs();
            let mut banks: Vec<_> = (0..n).map(|slot| bank(vec![set(&views, slot, 1)])).collect();
            if choice == 3 {
                banks.push(weights(&views));
            }
            f(&views, &graphs, &Theta::single(banks), &format!("components {choice} of {config}"));
        }
    }
}

#[test]
fn greedy_texts_are_those_of_the_graphs() {
    each(|views, graphs, theta, what| {
        let prompt: Vec<u32> = (0..9).map(|i| (i * 5 + 3) % 41).collect();
        let sampling = Sampling { max_tokens: 20, ..Sampling::default() };
        let [found, expected] =
            [views, graphs].map(|model| generate(model, theta, &prompt, &sampling, |_| true).unwrap());
        assert_eq!(found, expected, "{what}");
    });
}

#[test]
fn logits_hidden_rows_and_routing_are_those_of_the_graphs() {
    let layout = documents(&[0, 1, 2, 3, 6]);
    each(|views, graphs, theta, what| {
        let pass = Pass { theta, layout: &layout, dropout: None };
        let close = |of: &str, found: &_, expected: &_| {
            let off = difference(found, expected) / largest(expected);
            assert!(off < TOLERANCE, "{of} are off by a factor of {off}, {what}");
        };
        close("logits", &views.logits(&pass).unwrap(), &graphs.logits(&pass).unwrap());
        let (found, expected) = (views.hidden(&pass).unwrap(), graphs.hidden(&pass).unwrap());
        assert_eq!(found.len(), expected.len());
        found.iter().zip(&expected).for_each(|(found, expected)| close("hidden rows", found, expected));
        let (found, expected) = (views.routing(&pass).unwrap(), graphs.routing(&pass).unwrap());
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!((found.layer, found.per_token), (expected.layer, expected.per_token));
            close("probabilities", &found.probs_te, &expected.probs_te);
        }
    });
}

#[test]
fn a_base_of_bf16_gives_the_logits_of_its_widened_weights_within_the_precision_of_bf16() {
    let [narrow, graphs] = [0; 2].map(|_| model(TINY, DType::BF16, vec![low_rank(4, 0.0, true)]));
    let (graphs, theta) = (graphs.by_graphs(), Theta::single([bank(vec![set(&narrow, 0, 1)])]));
    let layout = documents(&[0, 1, 2, 3]);
    let pass = Pass { theta: &theta, layout: &layout, dropout: None };
    let (found, expected) = (narrow.logits(&pass).unwrap(), graphs.logits(&pass).unwrap());
    // The bound of the test of gradients, which go through more roundings.
    let norm = |x: &candle_core::Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let off = norm(&(found - &expected).unwrap()) / norm(&expected);
    assert!(off > 1e-4 && off < 0.028, "off by a factor of {off}");
}

#[test]
fn many_texts_at_once_are_each_as_alone() {
    let prompts: Vec<Vec<u32>> =
        [4, 1, 13, 4, 30].iter().map(|n| (0..*n).map(|i| (i * i + n * 7) % 40).collect()).collect();
    let sampling = |seed: usize| Sampling {
        max_tokens: 3 + 9 * seed,
        temperature: 1.1,
        top_p: 0.9,
        seed: seed as u64,
        stop: vec![5],
    };
    let samplings: Vec<Sampling> = (0..5).map(sampling).collect();
    let requests: Vec<Request<'_>> =
        prompts.iter().zip(&samplings).map(|(prompt, sampling)| Request { prompt, sampling }).collect();
    let theta = Theta::default();
    for case in ["llama_rope_dynamic", "qwen2_window", "olmoe", "qwen3"] {
        let model = Model::new(Base::open(&golden(case), Precision::F32).unwrap(), Stack::default());
        let mut seen = vec![Vec::new(); requests.len()];
        let together = generate_all(&model, &theta, &requests, |at, token| {
            seen[at].push(token);
            (at, seen[at].len()) != (3, 2)
        })
        .unwrap();
        for (at, Request { prompt, sampling }) in requests.iter().enumerate() {
            let mut left = if at == 3 { 2 } else { usize::MAX };
            let alone = generate(&model, &theta, prompt, sampling, |_| {
                left -= 1;
                left > 0
            });
            assert_eq!(together[at], alone.unwrap(), "{case}: text {at}");
            assert_eq!(together[at].tokens, seen[at], "{case}: text {at}");
        }
        assert!(together.iter().any(|text| text.finish == Finish::Length), "{case}: all stopped early");
    }
}

/// More rows than go through the model at a time.
#[test]
fn long_prompts_go_in_turns() {
    let model = Model::new(Base::open(&golden("llama"), Precision::F32).unwrap(), Stack::default());
    let theta = Theta::default();
    let prompts: Vec<Vec<u32>> =
        [1500u32, 900, 3, 2500, 40].iter().map(|n| (0..*n).map(|i| (i * n) % 40).collect()).collect();
    let sampling = Sampling { max_tokens: 4, ..Sampling::default() };
    let requests: Vec<Request<'_>> = prompts.iter().map(|prompt| Request { prompt, sampling: &sampling }).collect();
    let together = generate_all(&model, &theta, &requests, |_, _| true).unwrap();
    for (prompt, together) in prompts.iter().zip(together) {
        assert_eq!(generate(&model, &theta, prompt, &sampling, |_| true).unwrap(), together);
    }
}

#[test]
fn nothing_asked_for_is_nothing_made_and_one_bad_request_is_refused() {
    let model = Model::new(Base::open(&golden("llama"), Precision::F32).unwrap(), Stack::default());
    let theta = Theta::default();
    assert!(generate_all(&model, &theta, &[], |_, _| true).unwrap().is_empty());
    let none = Sampling { max_tokens: 0, ..Sampling::default() };
    let made = generate(&model, &theta, &[1], &none, |_| true).unwrap();
    assert_eq!((made.tokens.len(), made.finish), (0, Finish::Length));
    let sampling = Sampling::default();
    let requests = [&[1u32][..], &[]].map(|prompt| Request { prompt, sampling: &sampling });
    let refused = generate_all(&model, &theta, &requests, |_, _| true).unwrap_err();
    assert!(refused.to_string().contains("prompt is empty"), "{refused}");
}
