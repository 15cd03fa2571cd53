//! Folders that cannot be loaded say which file and which tensor is at fault.

use std::path::Path;

use attune_models::Base;
use attune_spec::job::Precision;
use candle_core::{DType, Device, Tensor};

use crate::support::golden;

/// A copy of a golden folder with something done to it.
fn broken(case: &str, damage: impl FnOnce(&Path)) -> String {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(case)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    damage(folder.path());
    let error = Base::open(folder.path(), Precision::F32).unwrap_err();
    error.to_string().replace(&folder.path().display().to_string(), "DIR")
}

fn rewrite(folder: &Path, change: impl FnOnce(&mut std::collections::HashMap<String, Tensor>)) {
    let file = folder.join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, file).unwrap();
}

#[test]
fn a_truncated_file_is_named() {
    let message = broken("llama", |folder| {
        let file = folder.join("model.safetensors");
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() - 5]).unwrap();
    });
    assert!(message.starts_with("DIR/model.safetensors: is no complete safetensors file"), "{message}");
}

#[test]
fn a_missing_tensor_and_a_missing_file_are_named() {
    let name = "model.layers.1.self_attn.q_proj.weight";
    let message = broken("llama", |folder| rewrite(folder, |tensors| drop(tensors.remove(name).unwrap())));
    assert_eq!(message, format!("DIR: no file holds tensor {name:?}, which a model with this config.json needs"));
    let message = broken("llama", |folder| std::fs::remove_file(folder.join("model.safetensors")).unwrap());
    assert!(message.starts_with("DIR/model.safetensors: cannot be opened"), "{message}");
    let message = broken("llama", |folder| std::fs::remove_file(folder.join("config.json")).unwrap());
    assert!(message.starts_with("DIR/config.json: "), "{message}");
}

#[test]
fn a_tensor_of_another_shape_is_named_with_both_shapes() {
    let name = "model.norm.weight";
    let message = broken("llama", |folder| {
        rewrite(folder, |tensors| {
            tensors.insert(name.to_owned(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
        });
    });
    let start = format!("DIR/model.safetensors: tensor {name:?} has shape [3]; config.json makes it [");
    assert!(message.starts_with(&start), "{message}");
}

#[test]
fn an_index_names_files_of_its_folder_only() {
    let message = broken("mistral", |folder| {
        let text = r#"{"weight_map": {"model.norm.weight": "../../etc/passwd"}}"#;
        std::fs::write(folder.join("model.safetensors.index.json"), text).unwrap();
    });
    assert!(message.contains("names file \"../../etc/passwd\"; expected a file of the same folder"), "{message}");
}

#[test]
fn another_model_type_is_refused_by_name() {
    let message = broken("llama", |folder| {
        let file = folder.join("config.json");
        let text = std::fs::read_to_string(&file).unwrap().replace("\"llama\"", "\"mamba\"");
        std::fs::write(file, text).unwrap();
    });
    assert!(message.contains("mamba") && message.contains("llama"), "{message}");
}

#[test]
fn a_base_in_bfloat16_stays_close_and_a_base_from_scratch_needs_no_weights() {
    let exact = Base::open(&golden("llama"), Precision::F32).unwrap();
    let rounded = Base::open(&golden("llama"), Precision::Bf16).unwrap();
    let name = attune_points::TensorName::from_path("lm_head.weight");
    let (a, b) = (exact.tensor(&name, DType::F32).unwrap(), rounded.tensor(&name, DType::F32).unwrap());
    // bfloat16 has 8 bits of precision: rounding is off by at most 2^-9 of the value.
    assert!(crate::support::difference(&a, &b) <= crate::support::largest(&a) * 2f64.powi(-8));
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(golden("llama").join("config.json"), folder.path().join("config.json")).unwrap();
    let fresh = |seed| Base::from_scratch(folder.path(), seed).unwrap().tensor(&name, DType::F32).unwrap();
    assert_eq!(crate::support::difference(&fresh(1), &fresh(1)), 0.0);
    assert!(crate::support::difference(&fresh(1), &fresh(2)) > 0.0);
}
