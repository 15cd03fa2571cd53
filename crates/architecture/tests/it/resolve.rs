use attune_architecture::{Site, SiteKind, targets};
use attune_spec::job::Targets;

use crate::configs::{BERT_BASE, GPT2, OLMOE_1B_7B, QWEN25_05B, edited, read};

fn linear_or_embedding(site: &Site) -> bool {
    !matches!(site.kind, SiteKind::Norm { .. })
}

fn resolve(targets: Targets, exclude: Option<Targets>) -> Result<Vec<String>, Vec<String>> {
    let model = read(&edited(QWEN25_05B, serde_json::json!({"num_hidden_layers": 12})));
    targets::resolve(&targets, exclude.as_ref(), &model, linear_or_embedding)
        .map(|sites| sites.iter().map(|site| site.id.to_string()).collect())
        .map_err(|faults| faults.iter().map(ToString::to_string).collect())
}

fn many(entries: &[&str]) -> Targets {
    Targets::Many(entries.iter().map(|&entry| entry.to_owned()).collect())
}

#[test]
fn each_form_names_its_sites() {
    for (entry, count) in [
        ("all-linear", 84),
        ("all", 110),
        ("q_proj", 12),
        ("self_attn.q_proj", 12),
        ("1.self_attn.q_proj", 1),
        ("model.layers.3.mlp.up_proj", 1),
        ("lm_head", 1),
        ("embed_tokens", 1),
        ("*", 110),
        ("*.self_attn.*", 48),
        ("model.layers.1*.mlp.*_proj", 9),
        ("*proj", 84),
        ("*layers.0.*", 9),
    ] {
        assert_eq!(resolve(entry.into(), None).map(|sites| sites.len()), Ok(count), "{entry}");
    }
}

#[test]
fn modules_of_gpt2_have_roles_of_their_own() {
    let model = read(GPT2);
    let count = |entry: &str| {
        let sites = targets::resolve(&entry.into(), None, &model, |_| true).unwrap();
        sites.len()
    };
    let found = ["all-linear", "c_attn", "c_proj", "attn.c_proj", "mlp.c_proj", "wpe", "all"].map(count);
    assert_eq!(found, [48, 12, 24, 12, 12, 1, 100]);
    let faults = targets::resolve(&"q_proj".into(), None, &model, |_| true).unwrap_err();
    insta::assert_snapshot!(faults[0], @r#"`targets` "q_proj" matches no site of this gpt2 model of 12 layers (modules: wte, wpe, ln_1, c_attn, attn.c_proj, attn, ln_2, c_fc, mlp.c_proj, mlp, ln_f, lm_head)"#);
}

#[test]
fn all_linear_has_experts_but_no_router() {
    let small =
        edited(OLMOE_1B_7B, serde_json::json!({"num_hidden_layers": 2, "num_experts": 3, "num_experts_per_tok": 2}));
    let model = read(&small);
    let count = |entry: &str| targets::resolve(&entry.into(), None, &model, |_| true).unwrap().len();
    let found = ["all-linear", "gate", "experts.1.up_proj", "*.experts.*"].map(count);
    assert_eq!(found, [2 * (4 + 9), 2, 2, 18]);
}

#[test]
fn all_linear_of_an_encoder_leaves_its_head_alone() {
    let model = read(&edited(BERT_BASE, serde_json::json!({"architectures": ["BertForSequenceClassification"]})));
    let count = |entry: &str| targets::resolve(&entry.into(), None, &model, |_| true).unwrap().len();
    let found = ["all-linear", "query", "intermediate.dense", "classifier", "pooler.dense"].map(count);
    assert_eq!(found, [72, 12, 12, 1, 1]);
}

#[test]
fn several_entries_are_a_union_in_forward_order() {
    let sites = resolve(many(&["down_proj", "model.layers.0.*", "q_proj"]), Some("*.[0-9]*".into()));
    assert!(sites.is_err(), "brackets are no pattern: {sites:?}");
    let sites = resolve(many(&["down_proj", "q_proj"]), Some("model.layers.1*".into())).unwrap();
    assert_eq!(sites.len(), 18);
    assert_eq!(sites[0], "model.layers.0.self_attn.q_proj");
    assert_eq!(sites[1], "model.layers.0.mlp.down_proj");
}

#[test]
fn an_entry_that_names_nothing_proposes_the_nearest() {
    let faults = resolve(many(&["q_porj", "v_proj", "all_linear", "proj", ""]), None).unwrap_err();
    insta::assert_snapshot!(faults.join("\n"), @r#"
    `targets[0]` "q_porj" matches no site of this qwen2 model of 12 layers; did you mean "q_proj"? (modules: embed_tokens, input_layernorm, q_proj, k_proj, v_proj, o_proj, self_attn, post_attention_layernorm, gate_proj, up_proj, down_proj, mlp, norm, lm_head)
    `targets[2]` "all_linear" matches no site of this qwen2 model of 12 layers; did you mean "all-linear"? (modules: embed_tokens, input_layernorm, q_proj, k_proj, v_proj, o_proj, self_attn, post_attention_layernorm, gate_proj, up_proj, down_proj, mlp, norm, lm_head)
    `targets[3]` "proj" matches no site of this qwen2 model of 12 layers (modules: embed_tokens, input_layernorm, q_proj, k_proj, v_proj, o_proj, self_attn, post_attention_layernorm, gate_proj, up_proj, down_proj, mlp, norm, lm_head)
    `targets[4]` "" matches no site of this qwen2 model of 12 layers (modules: embed_tokens, input_layernorm, q_proj, k_proj, v_proj, o_proj, self_attn, post_attention_layernorm, gate_proj, up_proj, down_proj, mlp, norm, lm_head)
    "#);
}

#[test]
fn other_faults_say_what_would_do() {
    for (targets, exclude, expected) in [
        (
            "input_layernorm".into(),
            None,
            "`targets` \"input_layernorm\" names only sites that this method does not adapt: model.layers.0.input_layernorm is a norm",
        ),
        (
            many(&[]),
            None,
            "`targets` is an empty list; expected at least one module name, path or pattern, or \"all-linear\"",
        ),
        (
            "q_proj".into(),
            Some("all-linear".into()),
            "`targets` names no site that `exclude` leaves; expected at least one",
        ),
    ] {
        assert_eq!(resolve(targets, exclude), Err(vec![expected.to_owned()]));
    }
    let faults = resolve("q_proj".into(), Some(many(&["k_prj"]))).unwrap_err();
    assert!(
        faults[0].starts_with("`exclude[0]` \"k_prj\" matches no site") && faults[0].contains("\"k_proj\""),
        "{faults:?}"
    );
}
