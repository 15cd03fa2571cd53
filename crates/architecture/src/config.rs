//! `config.json` to [`Architecture`].

use attune_spec::{FieldPath, suggest};
use serde_json::{Map, Value};

use crate::decoder::Architecture;
use crate::error::Error;
use crate::family::{FAMILIES, FamilyRow, MAX_WINDOW_LAYERS_DEFAULT, WINDOW_DEFAULT, WindowRule};
use crate::fields::Fields;
use crate::rope::{Rope, RopeScaling, yarn_mscale};

// Far above any model that exists, and low enough that no count of parameters, FLOPs or bytes overflows 64 bits:
// 2^12 layers of three 2^20 x 2^22 matrices are below 2^56 parameters.
const WIDTH_MAX: u64 = 1 << 20;
const INNER_MAX: u64 = 1 << 22;
const LAYERS_MAX: u64 = 1 << 12;
const HEADS_MAX: u64 = 1 << 14;
const VOCAB_MAX: u64 = 1 << 24;
const POSITIONS_MAX: u64 = 1 << 32;

/// `rms_norm_eps` of all families when the field is missing.
const RMS_EPS_DEFAULT: f64 = 1e-6;
/// `rope_theta` of all families when the field is missing.
const THETA_DEFAULT: f64 = 10_000.0;
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
    let hidden = fields.required("hidden_size", WIDTH_MAX);
    let inner = fields.required("intermediate_size", INNER_MAX);
    let layers = fields.required("num_hidden_layers", LAYERS_MAX);
    let heads = fields.required("num_attention_heads", HEADS_MAX);
    let vocab = fields.required("vocab_size", VOCAB_MAX);
    // A null means "as many as query heads", a missing field the family's own default.
    let kv_default = if fields.has("num_key_value_heads") { None } else { row.kv_heads };
    let kv_heads = fields.count("num_key_value_heads", HEADS_MAX).or(kv_default).unwrap_or(heads);
    // A stand-in for a faulty number would contradict the others, and the reader is told of the cause already.
    if fields.faults.is_empty() && !heads.is_multiple_of(kv_heads) {
        fields.fault(
            "num_key_value_heads",
            format!("is {kv_heads}; expected a divisor of `num_attention_heads`, which is {heads}"),
        );
    }
    let head_dim = head_dim(fields, hidden, heads);
    let max_position = fields.count("max_position_embeddings", POSITIONS_MAX).unwrap_or(row.max_position);
    refuse_unsupported(fields);

    let bias = |fields: &mut Fields<'_>, name| row.bias_fields && fields.flag(name).unwrap_or(false);
    let attention_bias = bias(fields, "attention_bias");
    let mlp_bias = bias(fields, "mlp_bias");
    Architecture {
        family: row.family,
        hidden: hidden as usize,
        inner: inner as usize,
        layers: layers as usize,
        heads: heads as usize,
        kv_heads: kv_heads as usize,
        head_dim: head_dim as usize,
        vocab: vocab as usize,
        max_position,
        rms_eps: fields.number("rms_norm_eps", 0.0, 1.0).unwrap_or(RMS_EPS_DEFAULT),
        rope: rope(fields, max_position),
        windows: windows(row, fields, layers),
        tied: fields.flag("tie_word_embeddings").unwrap_or(false),
        qkv_bias: row.qkv_bias || attention_bias,
        output_bias: attention_bias,
        mlp_bias,
        initializer_range: fields.number("initializer_range", 0.0, 1.0).unwrap_or(INITIALIZER_RANGE_DEFAULT),
        bos: fields.tokens("bos_token_id", vocab, row.bos),
        eos: fields.tokens("eos_token_id", vocab, row.eos),
    }
}

fn head_dim(fields: &mut Fields<'_>, hidden: u64, heads: u64) -> u64 {
    let head_dim = match fields.count("head_dim", 1 << 12) {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None if !fields.faults.is_empty() => return 2,
        None => {
            fields.fault(
                "num_attention_heads",
                format!("is {heads}; expected a divisor of `hidden_size`, which is {hidden}, or a `head_dim`"),
            );
            return 2;
        }
    };
    if fields.faults.is_empty() && !head_dim.is_multiple_of(2) {
        fields.fault("head_dim", format!("is {head_dim}; expected an even number, since rotary embedding turns pairs"));
    }
    if heads * head_dim > INNER_MAX {
        fields.fault("head_dim", format!("is {head_dim} in {heads} heads; expected at most {INNER_MAX} together"));
    }
    head_dim
}

fn refuse_unsupported(fields: &mut Fields<'_>) {
    if let Some(act) = fields.text("hidden_act")
        && act != "silu"
    {
        fields.fault("hidden_act", format!("is {act:?}; expected \"silu\", the only activation that is supported"));
    }
    if fields.get("quantization_config").is_some() {
        fields.fault(
            "quantization_config",
            "describes quantised weights; expected a folder with f32, bf16 or f16 weights",
        );
    }
    if fields.number("partial_rotary_factor", 0.0, 1.0).is_some_and(|factor| factor != 1.0) {
        fields.fault("partial_rotary_factor", "is not 1; expected heads that are turned as a whole");
    }
}

/// The attention window of each layer, from whichever fields the family reads.
fn windows(row: &FamilyRow, fields: &mut Fields<'_>, layers: u64) -> Vec<Option<u64>> {
    let full = vec![None; layers as usize];
    let switched_on = match row.window {
        WindowRule::None => return full,
        WindowRule::Every => true,
        WindowRule::ByLayer => fields.flag("use_sliding_window").unwrap_or(false),
    };
    let missing = if fields.has("sliding_window") { None } else { Some(WINDOW_DEFAULT) };
    let window = fields.count("sliding_window", POSITIONS_MAX).or(missing).filter(|_| switched_on);
    let types = layer_types(fields, layers);
    match (row.window, types, window) {
        (_, None, None) => full,
        (WindowRule::ByLayer, None, Some(window)) => {
            let first = match fields.get("max_window_layers") {
                // 0 is meaningful here: windows from the first layer on.
                Some(Value::Number(n)) if n.as_u64() == Some(0) => 0,
                _ => fields.count("max_window_layers", LAYERS_MAX).unwrap_or(MAX_WINDOW_LAYERS_DEFAULT),
            };
            (0..layers).map(|layer| (layer >= first).then_some(window)).collect()
        }
        (_, None, Some(window)) => vec![Some(window); layers as usize],
        (rule, Some(types), window) => {
            let contradicts = |sliding: &bool| {
                (*sliding && window.is_none()) || (rule == WindowRule::Every && *sliding != window.is_some())
            };
            if let Some(layer) = types.iter().position(contradicts) {
                let kind = if types[layer] { "sliding_attention" } else { "full_attention" };
                let have =
                    window.map_or_else(|| "no window in use".to_owned(), |w| format!("a window of {w} in every layer"));
                fields.fault(
                    &format!("layer_types[{layer}]"),
                    format!("is {kind:?}, but `sliding_window` gives {have}; expected the two to agree"),
                );
            }
            types.iter().map(|sliding| window.filter(|_| *sliding)).collect()
        }
    }
}

/// Whether each layer slides, if `layer_types` says so.
fn layer_types(fields: &mut Fields<'_>, layers: u64) -> Option<Vec<bool>> {
    let value = fields.get("layer_types")?;
    let list = value.as_array().filter(|list| list.len() as u64 == layers);
    let Some(list) = list else {
        let found = value.as_array().map_or_else(|| "no list".to_owned(), |list| format!("a list of {}", list.len()));
        fields.fault("layer_types", format!("is {found}; expected one entry for each of {layers} layers"));
        return None;
    };
    let mut sliding = Vec::with_capacity(list.len());
    for (layer, kind) in list.iter().enumerate() {
        match kind.as_str() {
            Some("full_attention") => sliding.push(false),
            Some("sliding_attention") => sliding.push(true),
            _ => {
                let given = crate::fields::quote(kind);
                fields.fault(
                    &format!("layer_types[{layer}]"),
                    format!("is {given}; expected \"full_attention\" or \"sliding_attention\""),
                );
                return None;
            }
        }
    }
    Some(sliding)
}

const ROPE_TYPES: &[&str] = &["default", "linear", "dynamic", "llama3", "yarn"];

/// Reads `rope_theta` with `rope_scaling`, or the newer `rope_parameters`; a `rope_scaling` that is not null wins, as in
/// Hugging Face's own reading.
fn rope(fields: &mut Fields<'_>, max_position: u64) -> Rope {
    let theta_outside = fields.number("rope_theta", 1.0, 1e18);
    let outside_original = fields.count("original_max_position_embeddings", POSITIONS_MAX);
    let name = if fields.get("rope_scaling").is_some() { "rope_scaling" } else { "rope_parameters" };
    let Some(object) = fields.object(name) else {
        return Rope { theta: theta_outside.unwrap_or(THETA_DEFAULT), scaling: RopeScaling::Default };
    };
    let mut inner = Fields::new(object, FieldPath::root().field(name));
    let theta = inner.number("rope_theta", 1.0, 1e18).or(theta_outside).unwrap_or(THETA_DEFAULT);
    if inner.number("partial_rotary_factor", 0.0, 1.0).is_some_and(|factor| factor != 1.0) {
        inner.fault("partial_rotary_factor", "is not 1; expected heads that are turned as a whole");
    }
    let kind_field = if inner.get("rope_type").is_some() { "rope_type" } else { "type" };
    let kind = inner.text(kind_field).unwrap_or("default");
    let original = outside_original
        .or_else(|| inner.count("original_max_position_embeddings", POSITIONS_MAX))
        .unwrap_or(max_position);
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: factor(&mut inner) },
        "dynamic" => RopeScaling::Dynamic { factor: factor(&mut inner), max_position },
        "llama3" => llama3(&mut inner, original),
        "yarn" => yarn(&mut inner, theta, original, max_position),
        other => {
            let hint = suggest::hint(other, ROPE_TYPES.iter().copied());
            inner.fault(kind_field, format!("is {other:?}; supported are {}{hint}", ROPE_TYPES.join(", ")));
            RopeScaling::Default
        }
    };
    fields.faults.append(&mut inner.faults);
    Rope { theta, scaling }
}

const FACTOR_MAX: f64 = 1e6;

fn factor(fields: &mut Fields<'_>) -> f64 {
    if fields.get("factor").is_none() {
        fields.fault("factor", format!("is missing; expected a number in 1 ..= {FACTOR_MAX}"));
    }
    fields.number("factor", 1.0, FACTOR_MAX).unwrap_or(1.0)
}

fn llama3(fields: &mut Fields<'_>, original: u64) -> RopeScaling {
    let factor = factor(fields);
    let mut required = |name: &str| {
        if fields.get(name).is_none() {
            fields.fault(name, format!("is missing; expected a number in 0.001 ..= {FACTOR_MAX}"));
        }
        fields.number(name, 0.001, FACTOR_MAX)
    };
    let low = required("low_freq_factor");
    let high = required("high_freq_factor");
    if let (Some(low), Some(high)) = (low, high)
        && low >= high
    {
        fields.fault("high_freq_factor", format!("is {high}; expected more than `low_freq_factor`, which is {low}"));
    }
    RopeScaling::Llama3 { factor, low_freq_factor: low.unwrap_or(1.0), high_freq_factor: high.unwrap_or(4.0), original }
}

fn yarn(fields: &mut Fields<'_>, theta: f64, original: u64, max_position: u64) -> RopeScaling {
    let extended = max_position as f64 / original as f64;
    let factor = fields.number("factor", 1.0, FACTOR_MAX).unwrap_or(extended);
    let positive = |fields: &mut Fields<'_>, name| fields.number(name, 0.0, FACTOR_MAX).filter(|x| *x > 0.0);
    let (mscale, mscale_all) = (positive(fields, "mscale"), positive(fields, "mscale_all_dim"));
    let attention_factor =
        fields.number("attention_factor", 1e-3, FACTOR_MAX).unwrap_or_else(|| match (mscale, mscale_all) {
            (Some(mscale), Some(all)) => yarn_mscale(factor, mscale) / yarn_mscale(factor, all),
            _ => yarn_mscale(factor, 1.0),
        });
    let beta_fast = positive(fields, "beta_fast").unwrap_or(32.0);
    let beta_slow = positive(fields, "beta_slow").unwrap_or(1.0);
    if beta_fast < beta_slow {
        fields.fault("beta_fast", format!("is {beta_fast}; expected at least `beta_slow`, which is {beta_slow}"));
    }
    if theta <= 1.0 {
        fields.fault("rope_theta", format!("is {theta}; expected more than 1 under yarn"));
    }
    let truncate = fields.flag("truncate").unwrap_or(true);
    RopeScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, original, truncate }
}
