//! Rows before documents: what methods that make them share.

use attune_architecture::{Architecture, Place, Site};
use attune_points::adapter::{Attachment, Peft, PeftTensors};
use attune_points::params::Scope;
use attune_points::{Result, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_tensor::rng::Rng;
use candle_core::{DType, Tensor};
use serde_json::{Map, Value, json};

/// The most rows of one component.
const LENGTH_MAX: u64 = 4096;

/// Why such a component does not merge.
pub(crate) const UNMERGED: &str = "rows before documents are no change of a weight";

/// The sites of such a component: it takes the table of tokens among those that it finds.
pub(crate) const TARGETS: &str = "all";

/// A tensor that trains: it is the component's, not that of a site.
pub(crate) fn trained(local: &'static str, shape: impl Into<Vec<usize>>) -> TensorSpec {
    TensorSpec { scope: Scope::Model, ..TensorSpec::trained(local, shape) }
}

/// Attaches `length` rows, made of these tensors, to the table of tokens.
///
/// # Errors
/// A fault if that is not among the sites, or the base has no positions for more than the rows.
pub(crate) fn attach(
    arch: &Architecture,
    sites: &[Site],
    length: u32,
    tensors: Vec<TensorSpec>,
) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
    let mut faults = Vec::new();
    let table = sites.iter().find(|site| site.place == Place::Embedding);
    if table.is_none() {
        let message =
            "names no table of tokens, before whose rows its own would stand: leave it out, or name that table";
        faults.push(Fault::new("targets", message));
    }
    if u64::from(length) >= arch.max_position {
        let message = format!("is {length}; the base has {} positions in all", arch.max_position);
        faults.push(Fault::new("length", message));
    }
    match table {
        Some(table) if faults.is_empty() => Ok(vec![Attachment { site: table.id.clone(), tensors }]),
        _ => Err(faults),
    }
}

/// The rows of a table of tokens at these places.
///
/// # Errors
/// A storage that cannot be read.
pub(crate) fn rows_at(table: &dyn Weight, tokens: impl IntoIterator<Item = u32>) -> Result<Tensor> {
    let row = |id: u32| table.rows(id as usize..id as usize + 1, DType::F32);
    let rows = tokens.into_iter().map(row).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&rows, 0)?)
}

/// So many places of a table of tokens, drawn at random.
pub(crate) fn drawn(table: &dyn Weight, length: u32, rng: &mut Rng) -> Vec<u32> {
    (0..length).map(|_| rng.below(table.shape().0 as u64) as u32).collect()
}

/// PEFT's layout: the rows as they are made, and what is `own` to a method.
pub(crate) fn peft(peft_type: &str, length: u32, own: &Value) -> Peft {
    let common = json!({
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "inference_mode": true,
        "num_virtual_tokens": length,
        "num_transformer_submodules": 1,
    });
    let config = [&common, own].into_iter().filter_map(Value::as_object).flatten();
    Peft {
        config: config.map(|(key, value)| (key.clone(), value.clone())).collect(),
        tensors: PeftTensors::Prompt("prompt_embeddings"),
    }
}

/// How many rows a PEFT configuration says, and where they stand.
///
/// # Errors
/// The fault of a key that says something else.
pub(crate) fn from_peft(config: &Map<String, Value>) -> std::result::Result<(u64, Targets), Vec<Fault>> {
    let said = |key: &str| config.get(key).cloned().unwrap_or_default();
    let length = said("num_virtual_tokens").as_u64().filter(|length| (1..=LENGTH_MAX).contains(length));
    let Some(length) = length else {
        let message = format!("is {}; expected 1 to {LENGTH_MAX}", said("num_virtual_tokens"));
        return Err(vec![Fault::new("num_virtual_tokens", message)]);
    };
    let submodules = said("num_transformer_submodules");
    if !submodules.is_null() && submodules != 1 {
        let message = format!("is {submodules}; expected 1: a model that is no pair of encoder and decoder");
        return Err(vec![Fault::new("num_transformer_submodules", message)]);
    }
    Ok((length, Targets::from(TARGETS)))
}
