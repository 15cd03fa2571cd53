use attune_architecture::{Architecture, Error};
use proptest::prelude::*;
use serde_json::json;

use crate::configs::{
    BERT_BASE, GPT2, LLAMA_31_8B, MISTRAL_7B, MIXTRAL_8X7B, OLMOE_1B_7B, QWEN3_30B_A3B, QWEN25_05B, edited,
};

fn refused(config: &str) -> Error {
    match Architecture::from_json(config.as_bytes()) {
        Ok(_) => panic!("accepted: {config}"),
        Err(error) => error,
    }
}

#[test]
fn another_family_is_refused_by_name() {
    let error = refused(&edited(LLAMA_31_8B, json!({"model_type": "mamba"})));
    insta::assert_snapshot!(error, @r#"config.json: `model_type` is "mamba"; supported are llama, mistral, qwen2, qwen3, olmoe, mixtral, qwen3_moe, gpt2, bert"#);
    assert!(matches!(refused("{}"), Error::Family { given, .. } if given.is_empty()));
}

#[test]
fn malformed_json_has_line_and_column() {
    let error = refused("{\n  \"hidden_size\": ,\n}");
    assert!(matches!(error, Error::Json { line: 2, .. }), "{error}");
    insta::assert_snapshot!(refused("[1]"), @"config.json line 0 column 0: the document is [1]; expected one JSON object");
    assert!(Architecture::from_json(b"\xff\xfe").is_err());
    assert!(Architecture::from_json(b"").is_err());
}

#[test]
fn each_fault_names_its_field() {
    for (edit, path, message) in [
        (json!({"hidden_size": "big"}), "hidden_size", "is \"big\"; expected a whole number in 1 ..= 1048576"),
        (json!({"-vocab_size": null}), "vocab_size", "is missing; expected a whole number in 1 ..= 16777216"),
        (json!({"num_hidden_layers": 0}), "num_hidden_layers", "is 0; expected a whole number in 1 ..= 4096"),
        (json!({"num_hidden_layers": -3}), "num_hidden_layers", "is -3; expected a whole number in 1 ..= 4096"),
        (
            json!({"intermediate_size": u64::MAX}),
            "intermediate_size",
            "is 18446744073709551615; expected a whole number in 1 ..= 4194304",
        ),
        (
            json!({"intermediate_size": 1e300}),
            "intermediate_size",
            "is 1e+300; expected a whole number in 1 ..= 4194304",
        ),
        (
            json!({"num_key_value_heads": 5}),
            "num_key_value_heads",
            "is 5; expected a divisor of `num_attention_heads`, which is 32",
        ),
        (
            json!({"num_attention_heads": 24}),
            "num_attention_heads",
            "is 24; expected a divisor of `hidden_size`, which is 4096, or a `head_dim`",
        ),
        (json!({"head_dim": 7}), "head_dim", "is 7; expected an even number, since rotary embedding turns pairs"),
        (
            json!({"hidden_act": "gelu_pytorch_tan"}),
            "hidden_act",
            "is \"gelu_pytorch_tan\"; supported are silu, swish, gelu, gelu_python, gelu_new, gelu_pytorch_tanh, \
             gelu_fast, relu; did you mean \"gelu_pytorch_tanh\"?",
        ),
        (
            json!({"eos_token_id": [5, 128256]}),
            "eos_token_id",
            "is [5,128256]; expected a token id below the vocabulary's 128256, or a list of them",
        ),
        (json!({"rms_norm_eps": -1}), "rms_norm_eps", "is -1; expected a number in 0 ..= 1"),
        (json!({"tie_word_embeddings": 1}), "tie_word_embeddings", "is 1; expected true or false"),
        (
            json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}}),
            "quantization_config",
            "describes quantised weights of bitsandbytes; expected a folder with f32, bf16 or f16 weights, which \
             `tune.quantization` holds in few bits where they are trained beside, or with those of bitsandbytes in 4 bits in bytes",
        ),
        (
            json!({"rope_scaling": {"rope_type": "longrope"}}),
            "rope_scaling.rope_type",
            "is \"longrope\"; supported are default, linear, dynamic, llama3, yarn",
        ),
        (
            json!({"rope_scaling": {"type": "yran", "factor": 2}}),
            "rope_scaling.type",
            "is \"yran\"; supported are default, linear, dynamic, llama3, yarn; did you mean \"yarn\"?",
        ),
        (
            json!({"rope_scaling": {"type": "linear"}}),
            "rope_scaling.factor",
            "is missing; expected a number in 1 ..= 1000000",
        ),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 0.5}}),
            "rope_scaling.factor",
            "is 0.5; expected a number in 1 ..= 1000000",
        ),
        (json!({"rope_scaling": 4}), "rope_scaling", "is 4; expected an object"),
        (json!({"rope_theta": 0}), "rope_theta", "is 0; expected a number in 1 ..= 1000000000000000000"),
    ] {
        let faults = refused(&edited(LLAMA_31_8B, edit.clone())).faults();
        let found: Vec<_> = faults.iter().map(|f| (f.path.as_str(), f.message.as_str())).collect();
        assert!(found.contains(&(path, message)), "{edit}: {found:#?}");
    }
}

#[test]
fn options_of_mixtures_that_change_their_mathematics_are_refused() {
    for (base, edit, path, message) in [
        (
            MIXTRAL_8X7B,
            json!({"router_jitter_noise": 0.1}),
            "router_jitter_noise",
            "is 0.1; expected 0, which is what is supported",
        ),
        (
            MIXTRAL_8X7B,
            json!({"num_experts_per_tok": 9}),
            "num_experts_per_tok",
            "is 9; expected at most `num_local_experts`, which is 8",
        ),
        (
            QWEN3_30B_A3B,
            json!({"decoder_sparse_step": 2}),
            "decoder_sparse_step",
            "is 2; expected 1, which is what is supported",
        ),
        (
            QWEN3_30B_A3B,
            json!({"mlp_only_layers": [0]}),
            "mlp_only_layers",
            "is [0]; expected no layers, which is what is supported",
        ),
        (
            QWEN3_30B_A3B,
            json!({"use_sliding_window": true}),
            "use_sliding_window",
            "is true; expected false, which is what is supported",
        ),
    ] {
        let faults = refused(&edited(base, edit)).faults();
        let found: Vec<_> = faults.iter().map(|f| (f.path.as_str(), f.message.as_str())).collect();
        assert!(found.contains(&(path, message)), "{found:#?}");
    }
}

#[test]
fn options_of_gpt2_that_change_its_mathematics_are_refused() {
    for (edit, path, message) in [
        (
            json!({"scale_attn_weights": false}),
            "scale_attn_weights",
            "is false; expected true, which is what is supported",
        ),
        (
            json!({"scale_attn_by_inverse_layer_idx": true}),
            "scale_attn_by_inverse_layer_idx",
            "is true; expected false, which is what is supported",
        ),
        (
            json!({"add_cross_attention": true}),
            "add_cross_attention",
            "is true; expected false, which is what is supported",
        ),
        (json!({"n_head": 7}), "n_head", "is 7; expected a divisor of `n_embd`, which is 768, or a `head_dim`"),
        (
            json!({"n_positions": 1u64 << 30}),
            "n_positions",
            "is 1073741824; expected at most 16777216, since each position has a row",
        ),
        (
            json!({"activation_function": "gelu_nwe"}),
            "activation_function",
            "is \"gelu_nwe\"; supported are silu, swish, gelu, gelu_python, gelu_new, gelu_pytorch_tanh, gelu_fast, relu; \
             did you mean \"gelu_new\"?",
        ),
    ] {
        let faults = refused(&edited(GPT2, edit.clone())).faults();
        let found: Vec<_> = faults.iter().map(|f| (f.path.as_str(), f.message.as_str())).collect();
        assert_eq!(found, [(path, message)], "{edit}");
    }
}

#[test]
fn experts_must_be_few_enough_and_not_clipped() {
    for (edit, path, message) in [
        (
            json!({"num_experts_per_tok": 65}),
            "num_experts_per_tok",
            "is 65; expected at most `num_experts`, which is 64",
        ),
        (json!({"clip_qkv": 8.0}), "clip_qkv", "is 8.0; expected null, which is what is supported"),
        (
            json!({"num_experts": 4096, "intermediate_size": 1 << 20}),
            "num_experts",
            "is 4096; expected experts whose inner widths are at most 4194304 together, and at most 262144 in all layers",
        ),
    ] {
        let faults = refused(&edited(OLMOE_1B_7B, edit.clone())).faults();
        let found: Vec<_> = faults.iter().map(|f| (f.path.as_str(), f.message.as_str())).collect();
        assert_eq!(found, [(path, message)], "{edit}");
    }
}

#[test]
fn options_of_bert_that_change_its_mathematics_are_refused() {
    for (edit, path, message) in [
        (json!({"is_decoder": true}), "is_decoder", "is true; expected false, which is what is supported"),
        (
            json!({"position_embedding_type": "relative_key"}),
            "position_embedding_type",
            "is \"relative_key\"; expected \"absolute\", which is what is supported",
        ),
    ] {
        let faults = refused(&edited(BERT_BASE, edit.clone())).faults();
        let found: Vec<_> = faults.iter().map(|f| (f.path.as_str(), f.message.as_str())).collect();
        assert_eq!(found, [(path, message)], "{edit}");
    }
}

#[test]
fn layer_types_must_fit_the_layers_and_the_window() {
    for (base, edit, path) in [
        (QWEN25_05B, json!({"layer_types": ["full_attention"]}), "layer_types"),
        (QWEN25_05B, json!({"layer_types": vec!["sliding_attention"; 24]}), "layer_types[0]"),
        (QWEN25_05B, json!({"layer_types": vec!["linear_attention"; 24]}), "layer_types[0]"),
        (MISTRAL_7B, json!({"layer_types": vec!["full_attention"; 32]}), "layer_types[0]"),
    ] {
        let faults = refused(&edited(base, edit)).faults();
        assert_eq!(faults[0].path.as_str(), path, "{faults:?}");
    }
}

#[test]
fn all_faults_come_at_once() {
    let error = refused(&edited(LLAMA_31_8B, json!({"hidden_act": "tanh", "hidden_size": 0, "rope_theta": "x"})));
    assert_eq!(error.faults().len(), 3, "{error}");
}

proptest! {
    /// Whatever stands in one field, reading ends in a consistent architecture or an error, never in a panic.
    #[test]
    fn no_value_of_a_field_panics(
        field in prop::sample::select(vec![
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling", "layer_types",
            "sliding_window", "max_window_layers", "hidden_act", "eos_token_id", "use_sliding_window", "tie_word_embeddings",
        ]),
        value in prop_oneof![
            Just(json!(null)), any::<i64>().prop_map(|n| json!(n)), any::<u64>().prop_map(|n| json!(n)),
            (1u64..5000).prop_map(|n| json!(n)), any::<f64>().prop_map(|x| json!(x)), ".*".prop_map(|s| json!(s)),
            Just(json!([])), Just(json!({})), Just(json!([{}, null, 3])), any::<bool>().prop_map(|b| json!(b)),
        ],
    ) {
        if let Ok(model) = Architecture::from_json(edited(QWEN25_05B, json!({field: value})).as_bytes()) {
            prop_assert_eq!(model.heads % model.kv_heads, 0);
            prop_assert_eq!(model.windows.len(), model.layers);
            prop_assert!(model.weight_bytes(4) / 4 == model.parameters());
            let rope = model.positions.rope().unwrap();
            prop_assert!(rope.frequencies(model.head_dim, 10).iter().all(|f| f.is_finite()));
        }
    }
}
