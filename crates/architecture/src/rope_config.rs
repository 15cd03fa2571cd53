//! Reads `rope_theta`, `rope_scaling` and `rope_parameters`.

use attune_spec::{FieldPath, suggest};

use crate::config::POSITIONS_MAX;
use crate::fields::Fields;
use crate::rope::{Rope, RopeScaling, yarn_mscale};

const ROPE_TYPES: &[&str] = &["default", "linear", "dynamic", "llama3", "yarn"];

/// Reads `rope_theta` with `rope_scaling`, or the newer `rope_parameters`; a `rope_scaling` that is not null wins, as in
/// Hugging Face's own reading. Where no theta is given it is `theta`.
pub(crate) fn rope(fields: &mut Fields<'_>, max_position: u64, theta: f64) -> Rope {
    let theta = fields.number("rope_theta", 1.0, 1e18).unwrap_or(theta);
    let outside_original = fields.count("original_max_position_embeddings", POSITIONS_MAX);
    let name = if fields.get("rope_scaling").is_some() { "rope_scaling" } else { "rope_parameters" };
    let Some(object) = fields.object(name) else {
        return Rope { theta, scaling: RopeScaling::Default };
    };
    let mut inner = Fields::new(object, FieldPath::root().field(name));
    let theta = inner.number("rope_theta", 1.0, 1e18).unwrap_or(theta);
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
