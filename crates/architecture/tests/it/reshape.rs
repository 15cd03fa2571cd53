//! Models in another shape.

use attune_architecture::{Architecture, Experts, Family};
use attune_spec::method::{MethodDocument, MethodRef};
use serde_json::{Map, Value, json};

use crate::configs::{GPT2, LLAMA_31_8B, MISTRAL_7B, OLMOE_1B_7B, QWEN3_06B, QWEN25_05B, edited};

fn read(config: &str) -> Architecture {
    Architecture::from_json(config.as_bytes()).unwrap()
}

const EXPERTS: Experts = Experts { count: 16, per_token: 2, normalised: true, balance: 0.01 };

/// The `config.json` of a model with experts, made of that of the one without.
fn written(config: &str, made: &Architecture) -> Architecture {
    let mut object: Map<String, Value> = serde_json::from_str(config).unwrap();
    made.write_config(&mut object);
    read(&Value::Object(object).to_string())
}

#[test]
fn a_written_configuration_is_read_as_the_model_with_experts() {
    // What is missing here means other things in the two families.
    let bare = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                   "num_attention_heads": 4, "vocab_size": 100}"#;
    let newer = edited(
        LLAMA_31_8B,
        json!({"-rope_theta": null, "-rope_scaling": null, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}}),
    );
    let narrow = edited(MISTRAL_7B, json!({"layer_types": vec!["sliding_attention"; 32], "eos_token_id": [2, 5]}));
    let biased = edited(QWEN3_06B, json!({"attention_bias": true}));
    let silent = edited(QWEN3_06B, json!({"-head_dim": null, "-max_position_embeddings": null, "-rope_theta": null}));
    for (config, family) in [
        (bare, Family::Mixtral),
        (LLAMA_31_8B, Family::Mixtral),
        (&newer, Family::Mixtral),
        (MISTRAL_7B, Family::Mixtral),
        (&narrow, Family::Mixtral),
        (QWEN3_06B, Family::Qwen3Moe),
        (&biased, Family::Qwen3Moe),
        (&silent, Family::Qwen3Moe),
    ] {
        let dense = read(config);
        let made = dense.with_experts(dense.inner / 2, EXPERTS).unwrap();
        assert_eq!((made.family, made.experts, made.inner), (family, Some(EXPERTS), dense.inner / 2));
        assert_eq!(written(config, &made), made, "{config}");
        let router = 2.0 * (dense.layers * 16 * dense.hidden) as f64;
        let flops = |model: &Architecture| model.forward_flops_per_token(100.0, 1.0);
        assert_eq!(flops(&made), flops(&dense) + router);
    }
}

#[test]
fn what_no_family_with_experts_has_is_refused() {
    let refused = |config: &str, experts| {
        let dense = read(config);
        let faults = dense.with_experts(dense.inner / 2, experts).unwrap_err();
        faults.into_iter().map(|fault| fault.message).collect::<Vec<_>>().join("; ")
    };
    for (config, expected) in [
        (GPT2, "makes experts of MLPs, and no known kind of model is gpt2 with experts"),
        (QWEN25_05B, "makes experts of MLPs, and no known kind of model is qwen2 with experts"),
        (OLMOE_1B_7B, "needs a base without experts, and OlmoeForCausalLM has some"),
        (
            &edited(LLAMA_31_8B, json!({"attention_bias": true})),
            "makes this llama a mixtral, which has no biases in its attention",
        ),
        (
            &edited(LLAMA_31_8B, json!({"mlp_bias": true})),
            "makes this llama a mixtral, which has no biases in its experts",
        ),
        (
            &edited(QWEN3_06B, json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 3})),
            "makes this qwen3 a qwen3_moe, which has no such windows in its attention",
        ),
    ] {
        let found = refused(config, EXPERTS);
        assert!(found.starts_with(expected), "{found}");
    }
    let many = refused(LLAMA_31_8B, Experts { count: 5000, ..EXPERTS });
    assert!(many.starts_with("makes experts whose number is 5000; expected experts whose inner widths"), "{many}");
}

#[test]
fn a_card_says_what_becomes_of_the_sizes() {
    let card: MethodDocument = serde_json::from_value(json!({
        "name": "cut", "point": "surgery", "aliases": [], "summary": "", "paper": null, "applies": [], "targets": "",
        "parameters": "", "shared": "", "copies": "", "passes": "", "moves": null, "merges": "not_applicable",
        "trains_base": false, "peft_type": null, "rules": [], "defaults": {}, "schema": {},
        "becomes": {"inner": "inner / pieces", "experts": "3 * pieces", "experts_per_token": "pieces"}
    }))
    .unwrap();
    let surgery = |pieces: u64| MethodRef {
        method: "cut".to_owned(),
        params: Map::from_iter([("pieces".to_owned(), json!(pieces))]),
    };
    let dense = read(LLAMA_31_8B);
    let made = dense.after(&surgery(4), &card).unwrap();
    let experts = Experts { count: 12, per_token: 4, normalised: true, balance: 0.0 };
    assert_eq!(made, dense.with_experts(14_336 / 4, experts).unwrap());
    let faults = dense.after(&surgery(3), &card).unwrap_err();
    assert!(faults[0].message.starts_with("makes `inner` 4778.6"), "{faults:?}");
    // One that speaks of no experts leaves none.
    let narrow = MethodDocument { becomes: [("inner".to_owned(), "inner - pieces".to_owned())].into(), ..card };
    let made = dense.after(&surgery(336), &narrow).unwrap();
    assert_eq!((made.inner, made.experts, made.family), (14_000, None, Family::Llama));
}

#[test]
fn ranges_of_layers_are_within_the_model_and_in_bounds() {
    let model = read(QWEN3_06B);
    let refused = |ranges: &[[u32; 2]]| {
        let faults = model.repeating(ranges).unwrap_err();
        faults.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert!(refused(&[])[0].contains("expected ranges of the 28 layers, such as [[0, 28]]"));
    assert_eq!(
        refused(&[[0, 2], [3, 3], [4, 29]]),
        [
            "`[1]` is [3, 3]; expected a layer and a later end, 0 to 28",
            "`[2]` is [4, 29]; expected a layer and a later end, 0 to 28",
        ]
    );
    assert!(refused(&[[0, 28]; 147])[0].contains("has 4116 layers in all; expected at most 4096"));
    let made = model.repeating(&[[0, 20], [8, 20], [20, 28]]).unwrap();
    assert_eq!((made.layers, made.distinct_layers()), (40, 28));
    assert_eq!(made.ranges(), Some(vec![[0, 20], [8, 28]]));
    assert_eq!(made.weight_bytes(2), model.weight_bytes(2));
    assert_eq!(made.parameters(), model.parameters() + 12 * model.layer_parameters());
    // Again: of the layers that there were at first.
    let again = made.repeating(&[[19, 22]]).unwrap();
    assert_eq!(again.origins, Some(vec![19, 8, 9]));
}

/// Windows go with their layers, where a configuration can say so.
#[test]
fn a_written_configuration_is_read_as_the_model_with_repeated_layers() {
    let by_number = edited(
        QWEN25_05B,
        json!({"use_sliding_window": true, "sliding_window": 32, "max_window_layers": 21, "num_hidden_layers": 24}),
    );
    let everywhere =
        edited(QWEN3_06B, json!({"use_sliding_window": true, "sliding_window": 32, "max_window_layers": 0}));
    for config in [LLAMA_31_8B, MISTRAL_7B, QWEN3_06B, QWEN25_05B, GPT2, OLMOE_1B_7B, &by_number, &everywhere] {
        let model = read(config);
        let layers = model.layers as u32;
        let made = model.repeating(&[[0, layers], [layers - 5, layers - 1]]).unwrap();
        let plain = written(config, &made);
        assert_eq!((plain.layers, &plain.origins), (model.layers + 4, &None));
        assert_eq!(plain.windows, made.windows, "{config}");
        assert_eq!((plain.parameters(), plain.family), (made.parameters(), made.family));
    }
}
