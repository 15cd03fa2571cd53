//! Folders that cannot be loaded say which file and which tensor is at fault.

use std::path::Path;

use attune_models::{Base, Model, Pass, Stack};
use attune_points::{Layout, Theta};
use attune_spec::job::Precision;
use attune_spec::method::MethodRef;
use candle_core::{DType, Device, Tensor};

use crate::support::{Golden, golden};

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

/// What is there of bases in few bits: matrices, and folders as transformers saves them.
pub(crate) const FEW: [&str; 3] = ["llama_nf4", "llama_nf4_double", "nf4"];

fn nf4(double_quant: bool) -> MethodRef {
    serde_json::from_value(serde_json::json!({"method": "nf4", "double_quant": double_quant})).unwrap()
}

/// A folder that transformers saved in four bits has its logits, and so has the folder that it was made of, quantised here.
#[test]
fn a_folder_in_four_bits_has_the_logits_of_transformers() {
    for (case, double_quant) in [("llama_nf4", false), ("llama_nf4_double", true)] {
        assert!(FEW.contains(&case));
        let format = nf4(double_quant);
        let expected = Golden::open(case, "expected.safetensors").unwrap();
        let ids: Vec<u32> = expected.ints("input_ids").into_iter().map(|id| id as u32).collect();
        let layout = Layout::single(&ids);
        let theta = Theta::default();
        let stored = Base::open_quantized(&golden(case), Precision::F32, &format).unwrap();
        let own = Base::open_quantized(&golden("llama"), Precision::F32, &format).unwrap();
        assert!(stored.is_few_only() && !own.is_few_only());
        assert_eq!(stored.bytes(), own.bytes());
        assert!(own.bytes() < Base::open(&golden("llama"), Precision::F32).unwrap().bytes() / 2);
        for base in [stored, own] {
            let model = Model::new(base, Stack::default());
            let found = model.logits(&Pass { theta: &theta, layout: &layout, dropout: None }).unwrap();
            let off = crate::support::difference(&found, expected.tensor("logits"));
            assert!(off < 1e-4, "{case}: off by {off}");
        }
    }
}

#[test]
fn a_folder_in_four_bits_is_read_as_it_says_and_not_otherwise() {
    let open = |case: &str, format: Option<&MethodRef>| {
        let opened = match format {
            Some(format) => Base::open_quantized(&golden(case), Precision::F32, format),
            None => Base::open(&golden(case), Precision::F32),
        };
        opened.map(|_| ()).unwrap_err().to_string()
    };
    let message = open("llama_nf4", None);
    assert!(
        message.contains("is held in few bits (bitsandbytes__nf4); expected `tune.quantization` to say so"),
        "{message}"
    );
    let message = open("llama_nf4", Some(&nf4(true)));
    assert!(message.contains("has scales in 32 bits; expected `tune.quantization.double_quant: false`"), "{message}");
    let message = open("llama_nf4_double", Some(&nf4(false)));
    assert!(message.contains("has scales in eight bits; expected `tune.quantization.double_quant: true`"), "{message}");
    let message = open("llama", Some(&serde_json::from_value(serde_json::json!({"method": "nf5"})).unwrap()));
    assert!(message.contains("`tune.quantization.method` is \"nf5\""), "{message}");
    // What is written of it has whole numbers, and says so.
    let base = Base::open_quantized(&golden("llama_nf4"), Precision::F32, &nf4(false)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let none = std::collections::BTreeMap::new();
    attune_models::export::write(&base, &none, DType::F32, &golden("llama_nf4"), folder.path()).unwrap();
    let again = Base::open(folder.path(), Precision::F32).unwrap();
    let name = attune_points::TensorName::from_path("model.layers.1.mlp.up_proj.weight");
    let (a, b) = (base.tensor(&name, DType::F32).unwrap(), again.tensor(&name, DType::F32).unwrap());
    assert_eq!(crate::support::difference(&a, &b), 0.0);
    let config = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
    assert!(!config.contains("quantization_config"), "{config}");
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
