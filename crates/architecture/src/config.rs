//! `config.json` to [`Architecture`].

use attune_spec::FieldPath;
use serde_json::{Map, Value};

use crate::activation::Activation;
use crate::decoder::{Architecture, Experts, MlpKind, NormKind, Positions};
use crate::error::Error;
use crate::family::{ExpertRule, FAMILIES, FamilyRow, PositionRule};
use crate::fields::Fields;
use crate::head::{HeadKind, PooledRow, Pooling};
use crate::rope_config::rope;
use crate::windows::windows;

// Far above any model that exists, and low enough that no count of parameters, FLOPs or bytes overflows 64 bits:
// 2^12 layers of three 2^20 x 2^22 matrices are below 2^56 parameters.
const WIDTH_MAX: u64 = 1 << 20;
const INNER_MAX: u64 = 1 << 22;
pub(crate) const LAYERS_MAX: u64 = 1 << 12;
const HEADS_MAX: u64 = 1 << 14;
const VOCAB_MAX: u64 = 1 << 24;
pub(crate) const POSITIONS_MAX: u64 = 1 << 32;
const EXPERTS_MAX: u64 = 1 << 12;
/// Experts of all layers: each has sites of its own, and a hostile file should not make millions.
const EXPERTS_ALL_MAX: u64 = 1 << 18;
/// Rows of a table of learned positions.
const TABLE_MAX: u64 = 1 << 24;

/// `initializer_range` of all families when the field is missing.
const INITIALIZER_RANGE_DEFAULT: f64 = 0.02;

pub(crate) fn read(json: &[u8]) -> Result<Architecture, Error> {
    let document: Value = serde_json::from_slice(json).map_err(|error| Error::Json {
        line: error.line(),
        column: error.column(),
        message: error.to_string(),
    })?;
    let object = document.as_object().ok_or_else(|| Error::Json {
        line: 0,
        column: 0,
        message: format!("the document is {}", crate::fields::quote(&document)),
    })?;
    let row = family(object)?;
    let mut fields = Fields::new(object, FieldPath::root());
    let architecture = decoder(row, &mut fields);
    if fields.faults.is_empty() { Ok(architecture) } else { Err(Error::Fields(fields.faults)) }
}

fn family(object: &Map<String, Value>) -> Result<&'static FamilyRow, Error> {
    let given = object.get("model_type").map_or("", |value| value.as_str().unwrap_or(""));
    FAMILIES.iter().find(|row| row.name == given).ok_or_else(|| Error::Family {
        given: given.chars().take(80).collect(),
        supported: FAMILIES.iter().map(|row| row.name).collect::<Vec<_>>().join(", "),
    })
}

fn decoder(row: &FamilyRow, fields: &mut Fields<'_>) -> Architecture {
    let hidden = fields.required(row.fields.hidden, WIDTH_MAX);
    let inner = match row.inner_factor {
        None => fields.required(row.fields.inner, INNER_MAX),
        Some(factor) => fields.count(row.fields.inner, INNER_MAX).unwrap_or(factor * hidden),
    };
    let layers = fields.required(row.fields.layers, LAYERS_MAX);
    let heads = fields.required(row.fields.heads, HEADS_MAX);
    let vocab = fields.required("vocab_size", VOCAB_MAX);
    let kv_heads = kv_heads(row, fields, heads);
    let head_dim = head_dim(row, fields, hidden, heads);
    let max_position = fields.count(row.fields.max_position, POSITIONS_MAX).unwrap_or(row.max_position);
    refuse_unsupported(row, fields);
    let positions = match row.positions {
        PositionRule::Rope => Positions::Rope(rope(fields, max_position, row.theta)),
        PositionRule::Learned { offset } => learned(row, fields, max_position, offset),
    };
    let eps = fields.number(row.fields.eps, 0.0, 1.0).unwrap_or(row.eps);
    let activation = activation(row, fields);
    let attention_bias = row.bias.attention_field && fields.flag("attention_bias").unwrap_or(false);
    let mlp_bias = row.bias.mlp_field && fields.flag("mlp_bias").unwrap_or(false);
    let head = head(row, fields);
    let causal = fields.flag("is_causal").unwrap_or(row.causal);
    let architecture = Architecture {
        family: row.family,
        hidden: hidden as usize,
        inner: inner as usize,
        layers: layers as usize,
        origins: None,
        heads: heads as usize,
        kv_heads: kv_heads as usize,
        head_dim: head_dim as usize,
        vocab: vocab as usize,
        head,
        max_position,
        norm: if row.layer_norm { NormKind::Layer { eps } } else { NormKind::Rms { eps } },
        placement: row.placement,
        positions,
        token_types: row.token_types.map(|rows| fields.count("type_vocab_size", TABLE_MAX).unwrap_or(rows) as usize),
        embedding_norm: row.token_types.is_some(),
        qk_norm: row.qk_norm,
        projections: row.projections,
        mlp: if row.gated { MlpKind::Gated(activation) } else { MlpKind::Plain(activation) },
        experts: row.experts.map(|rule| experts(&rule, fields, inner, layers)),
        causal,
        windows: windows(row, fields, layers),
        tied: fields.flag("tie_word_embeddings").unwrap_or(row.tied) && head == HeadKind::Tokens,
        transposed: row.transposed,
        qkv_bias: row.bias.qkv || attention_bias,
        output_bias: row.bias.others || attention_bias,
        mlp_bias: row.bias.others || mlp_bias,
        initializer_range: fields.number("initializer_range", 0.0, 1.0).unwrap_or(INITIALIZER_RANGE_DEFAULT),
        scaled_init: row.scaled_init,
        bos: fields.tokens("bos_token_id", vocab, row.bos),
        eos: fields.tokens("eos_token_id", vocab, row.eos),
        modules: row.modules,
    };
    if causal { architecture } else { architecture.bidirectional() }
}

fn kv_heads(row: &FamilyRow, fields: &mut Fields<'_>, heads: u64) -> u64 {
    // A null means "as many as query heads", a missing field the family's own default.
    let default = if fields.has("num_key_value_heads") { None } else { row.kv_heads };
    let kv_heads = fields.count("num_key_value_heads", HEADS_MAX).or(default).unwrap_or(heads);
    // A stand-in for a faulty number would contradict the others, and the reader is told of the cause already.
    if fields.faults.is_empty() && !heads.is_multiple_of(kv_heads) {
        let whole = row.fields.heads;
        let message = format!("is {kv_heads}; expected a divisor of `{whole}`, which is {heads}");
        fields.fault("num_key_value_heads", message);
    }
    kv_heads
}

fn head_dim(row: &FamilyRow, fields: &mut Fields<'_>, hidden: u64, heads: u64) -> u64 {
    let default = if fields.has("head_dim") { None } else { row.head_dim };
    let head_dim = match fields.count("head_dim", 1 << 12).or(default) {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None if !fields.faults.is_empty() => return 2,
        None => {
            let whole = row.fields.hidden;
            let message = format!("is {heads}; expected a divisor of `{whole}`, which is {hidden}, or a `head_dim`");
            fields.fault(row.fields.heads, message);
            return 2;
        }
    };
    if fields.faults.is_empty() && row.positions == PositionRule::Rope && !head_dim.is_multiple_of(2) {
        fields.fault("head_dim", format!("is {head_dim}; expected an even number, since rotary embedding turns pairs"));
    }
    if heads * head_dim > INNER_MAX {
        fields.fault("head_dim", format!("is {head_dim} in {heads} heads; expected at most {INNER_MAX} together"));
    }
    head_dim
}

fn learned(row: &FamilyRow, fields: &mut Fields<'_>, max_position: u64, offset: u64) -> Positions {
    if max_position > TABLE_MAX {
        let message = format!("is {max_position}; expected at most {TABLE_MAX}, since each position has a row");
        fields.fault(row.fields.max_position, message);
        return Positions::Learned { rows: 1, offset: 0 };
    }
    Positions::Learned { rows: (max_position + offset) as usize, offset: offset as usize }
}

/// The head that the class in `architectures` has, with as many classes as `id2label` names.
fn head(row: &FamilyRow, fields: &mut Fields<'_>) -> HeadKind {
    let class = fields.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str).unwrap_or_default();
    let labels = |fields: &mut Fields<'_>| {
        let named = fields.object("id2label").map(|names| names.len() as u64).filter(|named| *named <= WIDTH_MAX);
        // Two classes where nothing is said, as in Hugging Face's configurations.
        named.or_else(|| fields.count("num_labels", WIDTH_MAX)).unwrap_or(2).max(1) as usize
    };
    if class.ends_with("ForSequenceClassification") {
        let row = if row.causal { PooledRow::Last } else { PooledRow::First };
        HeadKind::Sequence { labels: labels(fields), row }
    } else if class.ends_with("ForTokenClassification") {
        HeadKind::Rows { labels: labels(fields) }
    } else if class.strip_suffix("Model") == Some(row.class) && row.head == HeadKind::Tokens {
        // A decoder's trunk alone, which has no head to give tokens.
        HeadKind::Embedding(Pooling::Row(PooledRow::Last))
    } else {
        row.head
    }
}

/// The fields of a mixture of experts, with the family's own values where they are missing.
fn experts(rule: &ExpertRule, fields: &mut Fields<'_>, inner: u64, layers: u64) -> Experts {
    let (names, missing) = rule.count;
    let name = names.iter().find(|name| fields.get(name).is_some()).unwrap_or(&names[0]);
    let count = fields.count(name, EXPERTS_MAX).unwrap_or(missing);
    let per_token = fields.count("num_experts_per_tok", EXPERTS_MAX).unwrap_or(rule.per_token);
    if fields.faults.is_empty() && per_token > count {
        fields.fault("num_experts_per_tok", format!("is {per_token}; expected at most `{name}`, which is {count}"));
    }
    if let Some(message) = too_many_experts(count, inner, layers) {
        fields.fault(name, message);
    }
    let said = rule.normalised_field.then(|| fields.flag("norm_topk_prob")).flatten();
    Experts {
        count: count as usize,
        per_token: per_token as usize,
        normalised: said.unwrap_or(rule.normalised),
        balance: fields.number("router_aux_loss_coef", 0.0, 1e3).unwrap_or(rule.balance),
    }
}

/// What is said of more experts of a width than any model has.
pub(crate) fn too_many_experts(count: u64, inner: u64, layers: u64) -> Option<String> {
    let fit = count <= EXPERTS_MAX
        && count.checked_mul(inner).is_some_and(|inner| inner <= INNER_MAX)
        && count.checked_mul(layers).is_some_and(|all| all <= EXPERTS_ALL_MAX);
    (!fit).then(|| {
        format!(
            "is {count}; expected experts whose inner widths are at most {INNER_MAX} together, and at most \
             {EXPERTS_ALL_MAX} in all layers"
        )
    })
}

fn activation(row: &FamilyRow, fields: &mut Fields<'_>) -> Activation {
    let Some(name) = fields.text(row.fields.activation) else { return row.activation };
    Activation::named(name).unwrap_or_else(|message| {
        fields.fault(row.fields.activation, message);
        row.activation
    })
}

fn refuse_unsupported(row: &FamilyRow, fields: &mut Fields<'_>) {
    for &(name, supported) in row.fixed {
        if fields.flag(name).is_some_and(|given| given != supported) {
            fields.fault(name, format!("is {}; expected {supported}, which is what is supported", !supported));
        }
    }
    for &(name, supported) in row.words {
        if let Some(given) = fields.text(name)
            && given != supported
        {
            fields.fault(name, format!("is {given:?}; expected {supported:?}, which is what is supported"));
        }
    }
    for &(name, supported) in row.numbers {
        if let Some(value) = fields.get(name)
            && value.as_f64() != Some(supported)
        {
            let given = crate::fields::quote(value);
            fields.fault(name, format!("is {given}; expected {supported}, which is what is supported"));
        }
    }
    // A list of layers that have an MLP in place of experts.
    if let Some(list) = fields.get("mlp_only_layers")
        && row.experts.is_some()
        && list.as_array().is_none_or(|list| !list.is_empty())
    {
        let given = crate::fields::quote(list);
        fields.fault("mlp_only_layers", format!("is {given}; expected no layers, which is what is supported"));
    }
    for &name in row.absent {
        if let Some(value) = fields.get(name) {
            let given = crate::fields::quote(value);
            fields.fault(name, format!("is {given}; expected null, which is what is supported"));
        }
    }
    // Which four bits, their files say.
    if let Some(config) = fields.get("quantization_config") {
        let by = config.get("quant_method").and_then(serde_json::Value::as_str);
        let is_read = by == Some("bitsandbytes")
            && config.get("load_in_4bit") == Some(&true.into())
            && config.get("bnb_4bit_quant_storage").is_none_or(|storage| storage == "uint8");
        if !is_read {
            let message = format!(
                "describes quantised weights{}; expected a folder with f32, bf16 or f16 weights, which `tune.quantization` holds in \
                 few bits where they are trained beside, or with those of bitsandbytes in 4 bits in bytes",
                by.map(|by| format!(" of {by}")).unwrap_or_default()
            );
            fields.fault("quantization_config", message);
        }
    }
    if fields.number("partial_rotary_factor", 0.0, 1.0).is_some_and(|factor| factor != 1.0) {
        fields.fault("partial_rotary_factor", "is not 1; expected heads that are turned as a whole");
    }
}
