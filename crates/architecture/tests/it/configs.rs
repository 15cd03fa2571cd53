use attune_architecture::{
    Activation, Architecture, Experts, Family, HeadKind, MlpKind, NormKind, Place, PooledRow, Pooling, Positions,
    QkNorm, RopeScaling,
};

pub(crate) const LLAMA_31_8B: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
  "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
  "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
  "vocab_size": 128256
}"#;

pub(crate) const MISTRAL_7B: &str = r#"{
  "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
  "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32000
}"#;

pub(crate) const QWEN25_05B: &str = r#"{
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
  "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
  "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
  "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
  "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true,
  "use_sliding_window": false, "vocab_size": 151936
}"#;

pub(crate) const QWEN3_06B: &str = r#"{
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
  "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
  "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
  "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
  "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936
}"#;

pub(crate) const GPT2: &str = r#"{
  "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
  "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
  "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
  "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
  "summary_type": "cls_index", "summary_use_proj": true, "vocab_size": 50257
}"#;

pub(crate) const OLMOE_1B_7B: &str = r#"{
  "architectures": ["OlmoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "clip_qkv": null,
  "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
  "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": false,
  "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
  "num_key_value_heads": 16, "output_router_logits": false, "pad_token_id": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": null, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 50304
}"#;

pub(crate) const MIXTRAL_8X7B: &str = r#"{
  "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
  "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
  "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32000
}"#;

pub(crate) const QWEN3_30B_A3B: &str = r#"{
  "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
  "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
  "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
  "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
  "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
  "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null,
  "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936
}"#;

pub(crate) const BERT_BASE: &str = r#"{
  "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": false,
  "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
  "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
  "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
  "type_vocab_size": 2, "use_cache": true, "vocab_size": 30522
}"#;

/// `base` with some fields replaced, or removed by `null` under a key that starts with `-`.
pub(crate) fn edited(base: &str, edits: serde_json::Value) -> String {
    let mut config: serde_json::Value = serde_json::from_str(base).unwrap();
    let object = config.as_object_mut().unwrap();
    for (key, value) in edits.as_object().unwrap() {
        match key.strip_prefix('-') {
            Some(key) => drop(object.remove(key)),
            None => drop(object.insert(key.clone(), value.clone())),
        }
    }
    config.to_string()
}

pub(crate) fn read(config: &str) -> Architecture {
    Architecture::from_json(config.as_bytes()).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn llama_31_8b_has_its_published_size() {
    let model = read(LLAMA_31_8B);
    assert_eq!(model.family, Family::Llama);
    assert_eq!(model.parameters(), 8_030_261_248);
    assert_eq!((model.head_dim, model.query_width(), model.kv_width()), (128, 4096, 1024));
    assert_eq!(model.eos, [128_001, 128_008, 128_009]);
    let scaling = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192 };
    let rope = model.positions.rope().unwrap();
    assert_eq!((rope.theta, rope.scaling), (500_000.0, scaling));
    assert_eq!(model.mlp, MlpKind::Gated(Activation::Silu));
    assert_eq!(model.windows, vec![None; 32]);
    assert!(!model.tied && !model.qkv_bias && !model.output_bias && !model.mlp_bias);
}

#[test]
fn mistral_7b_slides_in_every_layer() {
    let model = read(MISTRAL_7B);
    assert_eq!(model.parameters(), 7_241_732_096);
    assert_eq!(model.windows, vec![Some(4096); 32]);
    let v3 = read(&edited(MISTRAL_7B, serde_json::json!({"sliding_window": null})));
    assert_eq!(v3.windows, vec![None; 32]);
    let silent = read(&edited(MISTRAL_7B, serde_json::json!({"-sliding_window": null, "-num_key_value_heads": null})));
    assert_eq!((silent.windows[0], silent.kv_heads), (Some(4096), 8));
}

#[test]
fn qwen25_05b_is_tied_with_bias_on_qkv_only() {
    let model = read(QWEN25_05B);
    assert_eq!(model.parameters(), 494_032_768);
    assert!(model.tied && model.qkv_bias && !model.output_bias && !model.mlp_bias);
    assert_eq!(model.windows, vec![None; 24]);
    let on = read(&edited(QWEN25_05B, serde_json::json!({"use_sliding_window": true})));
    assert_eq!((on.windows[20], on.windows[21]), (None, Some(32_768)));
    let types: Vec<_> = (0..24).map(|l| if l % 2 == 0 { "sliding_attention" } else { "full_attention" }).collect();
    let typed = serde_json::json!({"use_sliding_window": true, "sliding_window": 7, "layer_types": types});
    assert_eq!(read(&edited(QWEN25_05B, typed)).windows[..3], [Some(7), None, Some(7)]);
}

#[test]
fn qwen3_06b_norms_its_heads() {
    let model = read(QWEN3_06B);
    assert_eq!(model.parameters(), 596_049_920);
    assert_eq!((model.qk_norm, model.query_width(), model.kv_width()), (QkNorm::PerHead, 2048, 1024));
    assert!(model.tied && !model.qkv_bias && !model.output_bias);
    let silent =
        edited(QWEN3_06B, serde_json::json!({"-head_dim": null, "num_attention_heads": 4, "num_key_value_heads": 4}));
    assert_eq!(read(&silent).head_dim, 128);
}

#[test]
fn gpt2_has_its_published_size_and_its_own_names() {
    let model = read(GPT2);
    assert_eq!(model.parameters(), 124_439_808);
    assert_eq!(model.norm, NormKind::Layer { eps: 1e-5 });
    assert_eq!(model.positions, Positions::Learned { rows: 1024, offset: 0 });
    assert_eq!(model.mlp, MlpKind::Plain(Activation::GeluTanh));
    assert_eq!((model.positions.longest(), model.positions.changes_at(2000)), (Some(1024), false));
    assert_eq!(model.ties(), [("lm_head.weight".to_owned(), "transformer.wte.weight".to_owned())]);
    assert_eq!((model.initial_std(Place::Up), model.initial_std(Place::Down)), (0.02, 0.02 / 24f64.sqrt()));
    let text: Vec<String> =
        model.tensors()[..15].iter().map(|t| format!("{} {:?} {:?}", t.name, t.shape, t.stored_shape())).collect();
    insta::assert_snapshot!(text.join("\n"), @r"
    transformer.wte.weight [50257, 768] [50257, 768]
    transformer.wpe.weight [1024, 768] [1024, 768]
    transformer.h.0.ln_1.weight [768] [768]
    transformer.h.0.ln_1.bias [768] [768]
    transformer.h.0.attn.c_attn.weight [2304, 768] [768, 2304]
    transformer.h.0.attn.c_attn.bias [2304] [2304]
    transformer.h.0.attn.c_proj.weight [768, 768] [768, 768]
    transformer.h.0.attn.c_proj.bias [768] [768]
    transformer.h.0.ln_2.weight [768] [768]
    transformer.h.0.ln_2.bias [768] [768]
    transformer.h.0.mlp.c_fc.weight [3072, 768] [768, 3072]
    transformer.h.0.mlp.c_fc.bias [3072] [3072]
    transformer.h.0.mlp.c_proj.weight [768, 3072] [3072, 768]
    transformer.h.0.mlp.c_proj.bias [768] [768]
    transformer.h.1.ln_1.weight [768] [768]
    ");
    assert_eq!(model.spellings("transformer.h.0.ln_1.weight"), ["transformer.h.0.ln_1.weight", "h.0.ln_1.weight"]);
}

#[test]
fn olmoe_has_its_published_sizes_whole_and_in_use() {
    let model = read(OLMOE_1B_7B);
    assert_eq!(model.parameters(), 6_919_161_856);
    let experts = Experts { count: 64, per_token: 8, normalised: false, balance: 0.01 };
    assert_eq!((model.experts, model.qk_norm), (Some(experts), QkNorm::Whole));
    // Per layer: four attention matrices, the router, eight of 64 experts of three matrices.
    let used = 4 * 2048 * 2048 + 64 * 2048 + 8 * 3 * 2048 * 1024;
    assert_eq!(model.forward_flops_per_token(0.0, 0.0), 2.0 * 16.0 * f64::from(used));
    let site = model.site("model.layers.3.mlp.experts.7.gate_proj").unwrap();
    assert_eq!((site.place, site.expert, site.role), (Place::Gate, Some(7), "gate_proj"));
    assert_eq!(model.site("model.layers.3.mlp.gate").unwrap().place, Place::Router);
}

#[test]
fn mixtral_8x7b_and_qwen3_30b_a3b_have_their_published_sizes_and_names() {
    let model = read(MIXTRAL_8X7B);
    assert_eq!(model.parameters(), 46_702_792_704);
    let experts = Experts { count: 8, per_token: 2, normalised: true, balance: 0.02 };
    assert_eq!((model.experts, model.inner, model.qk_norm), (Some(experts), 14_336, QkNorm::None));
    let site = model.site("model.layers.3.block_sparse_moe.experts.7.w3").unwrap();
    assert_eq!((site.place, site.expert, site.role), (Place::Up, Some(7), "w3"));
    // What a missing field means is the family's own.
    let silent = serde_json::json!({"-rope_theta": null, "-sliding_window": null, "-router_aux_loss_coef": null});
    let silent = read(&edited(MIXTRAL_8X7B, silent));
    assert_eq!((silent.positions, silent.windows[0]), (model.positions, None));
    assert_eq!(silent.experts, Some(Experts { balance: 0.001, ..experts }));
    let window = read(&edited(MIXTRAL_8X7B, serde_json::json!({"sliding_window": 4096})));
    assert_eq!(window.windows, vec![Some(4096); 32]);

    let model = read(QWEN3_30B_A3B);
    assert_eq!(model.parameters(), 30_532_122_624);
    let experts = Experts { count: 128, per_token: 8, normalised: true, balance: 0.001 };
    assert_eq!((model.experts, model.inner, model.qk_norm), (Some(experts), 768, QkNorm::PerHead));
    assert_eq!(model.site("model.layers.3.mlp.experts.7.gate_proj").unwrap().expert, Some(7));
}

#[test]
fn bert_base_has_its_published_size_under_each_head() {
    let model = read(BERT_BASE);
    // 109,482,240 with the pooler, which a vector per document does not read.
    let pooler = 768 * 768 + 768;
    assert_eq!(model.parameters() + pooler, 109_482_240);
    assert!(!model.causal && !model.tied && model.embedding_norm && model.token_types == Some(2));
    assert_eq!(model.head, HeadKind::Embedding(Pooling::Mean));
    let classes = HeadKind::Sequence { labels: 2, row: PooledRow::First };
    let classifier = model.clone().with_head(classes).unwrap();
    assert_eq!(classifier.parameters(), 109_483_778);
    let named = serde_json::json!({
        "architectures": ["BertForTokenClassification"], "id2label": {"0": "O", "1": "B-PER", "2": "I-PER"}
    });
    let tagger = read(&edited(BERT_BASE, named));
    assert_eq!((tagger.head, tagger.logits_width()), (HeadKind::Rows { labels: 3 }, 3));
    assert_eq!(tagger.class_name(), "BertForTokenClassification");
    assert_eq!(
        model.spellings("bert.embeddings.LayerNorm.weight"),
        [
            "bert.embeddings.LayerNorm.weight",
            "embeddings.LayerNorm.weight",
            "bert.embeddings.LayerNorm.gamma",
            "embeddings.LayerNorm.gamma"
        ]
    );
    assert_eq!(model.with_head(HeadKind::Tokens).unwrap_err().path.as_str(), "head");
}

#[test]
fn a_decoder_takes_other_heads_and_sees_both_ways() {
    let model = read(QWEN25_05B);
    let tokens = model.parameters();
    let embedding = model.clone().bidirectional().with_head(HeadKind::Embedding(Pooling::Mean)).unwrap();
    assert!(!embedding.causal && !embedding.tied);
    // A tied head has no weight of its own to leave out.
    assert_eq!(embedding.parameters(), tokens);
    let scores = model.with_head(HeadKind::Sequence { labels: 5, row: PooledRow::Last }).unwrap();
    assert_eq!(scores.parameters(), tokens + 5 * 896);
    assert_eq!(scores.tensors().last().unwrap().name, "score.weight");
    let read_so = read(&edited(QWEN25_05B, serde_json::json!({"architectures": ["Qwen2Model"], "is_causal": false})));
    assert_eq!((read_so.head, read_so.causal), (HeadKind::Embedding(Pooling::Row(PooledRow::Last)), false));
}

#[test]
fn the_newer_form_says_the_same_as_the_older() {
    let newer = serde_json::json!({"-rope_theta": null, "-rope_scaling": null, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}});
    assert_eq!(read(&edited(LLAMA_31_8B, newer)), read(LLAMA_31_8B));
    let plain =
        serde_json::json!({"-rope_theta": null, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}});
    assert_eq!(read(&edited(QWEN25_05B, plain)), read(QWEN25_05B));
}

#[test]
fn every_scaling_variant_is_read_in_its_spellings() {
    for (scaling, expected) in [
        (serde_json::json!({"type": "linear", "factor": 4}), RopeScaling::Linear { factor: 4.0 }),
        (
            serde_json::json!({"rope_type": "dynamic", "factor": 2.0}),
            RopeScaling::Dynamic { factor: 2.0, max_position: 131_072 },
        ),
        (
            serde_json::json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
            RopeScaling::Yarn {
                factor: 4.0,
                attention_factor: 0.1 * 4f64.ln() + 1.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                original: 32_768,
                truncate: true,
            },
        ),
        (serde_json::json!({"rope_type": "default"}), RopeScaling::Default),
    ] {
        let model = read(&edited(LLAMA_31_8B, serde_json::json!({"rope_scaling": scaling})));
        assert_eq!(model.positions.rope().unwrap().scaling, expected, "{scaling}");
    }
}

#[test]
fn the_tensors_and_sites_add_up_to_the_count() {
    let untied = edited(QWEN25_05B, serde_json::json!({"tie_word_embeddings": false}));
    let biased = edited(LLAMA_31_8B, serde_json::json!({"attention_bias": true, "mlp_bias": true}));
    let classes = edited(BERT_BASE, serde_json::json!({"architectures": ["BertForSequenceClassification"]}));
    let half = edited(GPT2, serde_json::json!({"tie_word_embeddings": false, "n_inner": 100}));
    for config in [
        LLAMA_31_8B,
        MISTRAL_7B,
        QWEN25_05B,
        &untied,
        &biased,
        QWEN3_06B,
        GPT2,
        &half,
        OLMOE_1B_7B,
        BERT_BASE,
        &classes,
    ] {
        let model = read(config);
        let tensors: u64 = model.tensors().iter().map(|t| t.shape.iter().product::<usize>() as u64).sum();
        assert_eq!(tensors, model.parameters());
        let tied = if model.tied { (model.vocab * model.hidden) as u64 } else { 0 };
        assert_eq!(model.sites().iter().map(|site| site.kind.parameters()).sum::<u64>(), model.parameters() + tied);
        assert_eq!(model.blocks().len(), 2 * model.layers + 2);
    }
}

#[test]
fn names_and_shapes_are_hugging_faces() {
    let tensors = read(QWEN25_05B).tensors();
    let text: Vec<String> = tensors[..14].iter().map(|t| format!("{} {:?}", t.name, t.shape)).collect();
    insta::assert_snapshot!(text.join("\n"), @r"
    model.embed_tokens.weight [151936, 896]
    model.layers.0.input_layernorm.weight [896]
    model.layers.0.self_attn.q_proj.weight [896, 896]
    model.layers.0.self_attn.q_proj.bias [896]
    model.layers.0.self_attn.k_proj.weight [128, 896]
    model.layers.0.self_attn.k_proj.bias [128]
    model.layers.0.self_attn.v_proj.weight [128, 896]
    model.layers.0.self_attn.v_proj.bias [128]
    model.layers.0.self_attn.o_proj.weight [896, 896]
    model.layers.0.post_attention_layernorm.weight [896]
    model.layers.0.mlp.gate_proj.weight [4864, 896]
    model.layers.0.mlp.up_proj.weight [4864, 896]
    model.layers.0.mlp.down_proj.weight [896, 4864]
    model.layers.1.input_layernorm.weight [896]
    ");
    assert_eq!(tensors.last().unwrap().name, "model.norm.weight");
}

#[test]
fn flops_are_two_per_weight_and_token_plus_attention() {
    let model = read(LLAMA_31_8B);
    let weights = (model.parameters() - 2 * (model.vocab * model.hidden) as u64) as f64;
    let norms = (65 * model.hidden) as f64;
    let expected = 2.0 * (weights - norms) + 32.0 * 4.0 * 4096.0 * 100.0;
    assert_eq!(model.forward_flops_per_token(100.0, 0.0), expected);
    let windowed = read(&edited(MISTRAL_7B, serde_json::json!({"sliding_window": 10})));
    let difference = windowed.forward_flops_per_token(1e9, 0.0) - windowed.forward_flops_per_token(10.0, 0.0);
    assert_eq!(difference, 0.0);
    assert_eq!(model.cache_bytes_per_token(2), 2 * 32 * 1024 * 2);
}

#[test]
fn the_reference_model_is_read() {
    let Some(folder) = std::env::var_os("ATTUNE_REFERENCE") else {
        println!("skipped: ATTUNE_REFERENCE names no folder with models/base");
        return;
    };
    let path = std::path::Path::new(&folder).join("models/base/config.json");
    let model = read(&std::fs::read_to_string(path).unwrap());
    assert_eq!((model.hidden, model.layers, model.inner, model.vocab), (256, 6, 688, 4096));
    assert!(model.tied);
    assert_eq!(model.eos, [0]);
    assert!((5_300_000..5_500_000).contains(&model.parameters()));
}
