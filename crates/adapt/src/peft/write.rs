//! What is written: an adapter with its tensors, as PEFT and we read it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use attune_architecture::{Architecture, HeadKind, Place as At};
use attune_artifacts::formats::peft::{CARD_FILE, CONFIG_FILE, PREFIX, WEIGHTS_FILE, is_hub_id};
use attune_artifacts::formats::safetensors::{self, Dtype};
use attune_points::adapter::{Adapter, Attachment, PeftTensors, Port};
use attune_points::{Locals, Params, TensorSpec};
use attune_spec::Fault;
use attune_spec::id::Digest;
use candle_core::{DType, Tensor};
use serde_json::Value;

use super::{OF_TRUNK, Part, REPEATING, REPEATS, SAVED, TASK, places};
use crate::adapters;
use crate::error::Error;

/// Writes an adapter folder, with modules that were trained whole beside the adapter. `base_name` is a hub id or a digest, never a
/// local path. The same parameters give the same bytes.
///
/// # Errors
/// [`Error::Unsupported`] if the method has no such layout or the base is named by a path; whatever writing raises.
pub fn write(
    folder: &Path,
    Part { adapter, attachments, params }: Part<'_>,
    saved: Option<Part<'_>>,
    architecture: &Architecture,
    base_name: &str,
    card: &str,
) -> Result<(), Error> {
    let unsupported = |path: &str, message: &str| Error::Unsupported {
        folder: folder.to_owned(),
        faults: vec![Fault::new(path, message)],
    };
    let peft = adapter.peft().ok_or_else(|| unsupported("method", "makes a whole model, not an adapter"))?;
    if !is_hub_id(base_name) && base_name.parse::<Digest>().is_err() {
        let message = format!("is {base_name:?}; expected a hub id (`owner/name`) or a digest, never a local path");
        return Err(unsupported("base_model_name_or_path", &message));
    }
    let mut config: BTreeMap<String, Value> = peft.config.into_iter().collect();
    config.insert("base_model_name_or_path".to_owned(), base_name.into());
    match &peft.tensors {
        PeftTensors::Joined(_) => {
            let (heads, width) = (architecture.kv_heads, architecture.kv_width());
            let sizes = [("num_layers", architecture.layers), ("num_attention_heads", heads), ("token_dim", width)];
            config.extend(sizes.map(|(key, size)| (key.to_owned(), size.into())));
        }
        PeftTensors::LastLayers(key, _) => {
            let attached: Vec<&str> = attachments.iter().map(|at| at.site.as_str()).collect();
            let mut attentions = architecture.sites();
            attentions.retain(|site| site.place == At::Attention);
            let from = attentions.len().saturating_sub(attached.len());
            if !attentions[from..].iter().map(|site| site.id.as_str()).eq(attached.iter().copied()) {
                let message = "names attentions of other layers than the last ones, which this layout cannot say";
                return Err(unsupported("target_modules", message));
            }
            let name = attached.first().map_or("", |path| path.rsplit('.').next().unwrap_or(path));
            config.insert("target_modules".to_owned(), name.into());
            config.insert((*key).to_owned(), attached.len().into());
        }
        PeftTensors::Saved => {
            config.insert("target_modules".to_owned(), adapters::nowhere());
            config.insert(SAVED.to_owned(), target_modules(attachments, architecture).into());
        }
        PeftTensors::Prompt(_) | PeftTensors::Whole(_) => {
            let (heads, width) = (architecture.heads, architecture.hidden);
            let sizes = [("num_layers", architecture.layers), ("num_attention_heads", heads), ("token_dim", width)];
            config.extend(sizes.map(|(key, size)| (key.to_owned(), size.into())));
        }
        _ => {
            let targets = target_modules(attachments, architecture);
            let whole = targets.iter().any(|name| name.contains('.'));
            for at in attachments {
                for key in adapter.peft_lists(at) {
                    let path = at.site.as_str();
                    let name = if whole { path } else { path.rsplit('.').next().unwrap_or(path) };
                    let name = in_file(name, architecture);
                    let list = config.entry((*key).to_owned()).or_insert_with(|| Value::Array(Vec::new()));
                    if let Value::Array(list) = list
                        && !list.iter().any(|listed| *listed == name)
                    {
                        list.push(name.into());
                    }
                }
            }
            config.insert("target_modules".to_owned(), targets.into());
        }
    }
    if let Some(ranges) = architecture.ranges() {
        if config.get("peft_type").is_none_or(|of| of != REPEATING) {
            let message = "has no word for a base whose layers are repeated, which PEFT has for LoRA alone";
            return Err(unsupported("peft_type", message));
        }
        config.insert(REPEATS.to_owned(), serde_json::json!(ranges));
    }
    if let Some(saved) = saved {
        config.insert(SAVED.to_owned(), target_modules(saved.attachments, architecture).into());
    }
    if let Some(task) = config.get_mut(TASK) {
        *task = task_type(architecture).into();
    }
    // Said where the method has such a key; PEFT looks at it layer by layer and lets it pass for plain linears.
    if let Some(flag) = config.get_mut("fan_in_fan_out") {
        *flag = any_transposed(attachments, architecture).into();
    }
    let text = serde_json::to_string_pretty(&config).unwrap_or_default();

    let mut wholes: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
    let own = match peft.tensors {
        PeftTensors::Prompt(name) | PeftTensors::Joined(name) => {
            wholes.insert(name.to_owned(), made_rows(adapter, attachments, params)?);
            None
        }
        _ => Some(Part { adapter, attachments, params }),
    };
    for Part { adapter, attachments, params } in own.into_iter().chain(saved) {
        for place in places(adapter, attachments) {
            let tensor = params.get(&place.name);
            let tensor = tensor.ok_or_else(|| unsupported(&place.spelt, "is not among the parameters"))?;
            wholes.entry(in_file(&place.spelt, architecture)).or_default().push(tensor.clone());
        }
    }
    let mut bytes = Vec::new();
    for (spelt, parts) in wholes {
        let whole = Tensor::cat(&parts, if parts.len() > 1 { 1 } else { 0 })?;
        let values = whole.flatten_all()?;
        let (dtype, data): (Dtype, Vec<u8>) = match values.dtype() {
            DType::I64 => (Dtype::I64, values.to_vec1::<i64>()?.iter().flat_map(|value| value.to_le_bytes()).collect()),
            _ => {
                let values = values.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                (Dtype::F32, attune_tensor::bytes::of_f32(&values).into_owned())
            }
        };
        bytes.push((spelt, dtype, whole.dims().to_vec(), data));
    }
    let tensors: Vec<safetensors::Tensor<'_>> = bytes
        .iter()
        .map(|(name, dtype, shape, data)| safetensors::Tensor {
            name: name.clone(),
            dtype: *dtype,
            shape: shape.clone(),
            data,
        })
        .collect();
    std::fs::create_dir_all(folder).map_err(|error| io(folder, error))?;
    safetensors::write(
        &folder.join(WEIGHTS_FILE),
        &tensors,
        &BTreeMap::from([("format".to_owned(), "pt".to_owned())]),
    )?;
    for (name, text) in [(CARD_FILE, card), (CONFIG_FILE, text.as_str())] {
        std::fs::write(folder.join(name), text).map_err(|error| io(&folder.join(name), error))?;
    }
    Ok(())
}

/// The name of a module or tensor in files of an adapter of this model: in those of a trunk alone, as PEFT has it under a head without
/// weights, without the module that holds the trunk.
fn in_file(name: &str, architecture: &Architecture) -> String {
    let HeadKind::Embedding(_) = architecture.head else { return name.to_owned() };
    let (before, module) = name.strip_prefix(PREFIX).map_or(("", name), |module| (PREFIX, module));
    format!("{before}{}", module.strip_prefix(architecture.trunk_prefix()).unwrap_or(module))
}

/// What PEFT calls what a model of this head is for.
fn task_type(architecture: &Architecture) -> &'static str {
    match architecture.head {
        HeadKind::Tokens => "CAUSAL_LM",
        HeadKind::Sequence { .. } => "SEQ_CLS",
        HeadKind::Rows { .. } => "TOKEN_CLS",
        HeadKind::Embedding(_) => OF_TRUNK,
    }
}

/// The rows before documents, or the keys and values before theirs, as a component makes them of its parameters.
fn made_rows(adapter: &dyn Adapter, attachments: &[Attachment], params: &Params) -> Result<Vec<Tensor>, Error> {
    let mut made = Vec::new();
    for at in attachments {
        let held = |spec: &TensorSpec| Some((spec.local, params.get(&spec.name(at.site.as_str()))?.clone()));
        let tensors = Locals::new(at.site.as_str(), at.tensors.iter().filter_map(held));
        match adapter.port(at) {
            Port::Sequence(map) => made.push(map.graph(&tensors)?),
            Port::Attention(map) => {
                let (keys, values) = map.graph(&tensors)?;
                made.extend([keys, values]);
            }
            _ => {}
        }
    }
    Ok(made)
}

fn io(path: &Path, source: std::io::Error) -> Error {
    Error::Tensor(attune_points::Error::Io { what: format!("writing {}", path.display()), source })
}

/// Whether the base's files hold the weight of an adapted site as `[in, out]`.
fn any_transposed(attachments: &[Attachment], architecture: &Architecture) -> bool {
    let sites = architecture.sites();
    let transposed = sites.iter().filter(|site| site.kind.transposed());
    transposed.map(|site| &site.id).any(|id| attachments.iter().any(|at| at.site == *id))
}

/// `target_modules`: module names where every site of that name has an attachment (which servers understand best), else
/// whole paths.
fn target_modules(attachments: &[Attachment], architecture: &Architecture) -> Vec<String> {
    let attached: BTreeSet<&str> = attachments.iter().map(|at| at.site.as_str()).collect();
    let module = |path: &str| path.rsplit('.').next().unwrap_or(path).to_owned();
    let names: BTreeSet<String> = attached.iter().map(|path| module(path)).collect();
    let named = architecture.sites().into_iter().filter(|site| names.contains(&module(site.id.as_str())));
    if named.clone().all(|site| attached.contains(site.id.as_str())) {
        names.into_iter().collect()
    } else {
        attached.into_iter().map(|path| in_file(path, architecture)).collect()
    }
}
