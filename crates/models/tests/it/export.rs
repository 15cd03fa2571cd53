//! A written folder is read back as the same model.

use std::collections::BTreeMap;

use attune_models::{Base, export};
use attune_points::TensorName;
use attune_spec::job::Precision;
use candle_core::DType;

use crate::support::{difference, golden};

#[test]
fn a_written_folder_is_the_same_model_with_the_replaced_weights() {
    // Linears stored as they are used, transposed, and transposed without the prefix.
    written_and_read("mistral", "model.layers.0.mlp.up_proj.weight");
    written_and_read("gpt2", "transformer.h.0.attn.c_attn.weight");
    written_and_read("gpt2_bare", "transformer.h.1.mlp.c_proj.weight");
}

fn written_and_read(case: &str, name: &str) {
    let base = Base::open(&golden(case), Precision::F32).unwrap();
    let name = TensorName::from_path(name);
    let doubled = (base.tensor(&name, DType::F32).unwrap() * 2.0).unwrap();
    let replaced = BTreeMap::from([(name.clone(), doubled.clone())]);
    let folder = tempfile::tempdir().unwrap();
    let write = |to: &str| {
        let to = folder.path().join(to);
        export::write(&base, &replaced, DType::F32, &golden(case), &to).unwrap();
        to
    };
    let (first, second) = (write("first"), write("second"));
    let read = Base::open(&first, Precision::F32).unwrap();
    assert_eq!(read.architecture(), base.architecture());
    for info in base.architecture().tensors() {
        let at = TensorName::from_path(&info.name);
        let expected = if at == name { doubled.clone() } else { base.tensor(&at, DType::F32).unwrap() };
        assert_eq!(difference(&read.tensor(&at, DType::F32).unwrap(), &expected), 0.0, "{at}");
    }
    for file in ["model.safetensors", "config.json", "generation_config.json"] {
        assert_eq!(std::fs::read(first.join(file)).unwrap(), std::fs::read(second.join(file)).unwrap(), "{file}");
    }
}

#[test]
fn a_weight_that_the_model_does_not_have_is_refused() {
    let base = Base::open(&golden("qwen2"), Precision::F32).unwrap();
    let name = TensorName::from_path("lm_head.weight");
    let tensor = base.tensor(&TensorName::from_path("model.embed_tokens.weight"), DType::F32).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let replaced = BTreeMap::from([(name, tensor)]);
    let error = export::write(&base, &replaced, DType::F32, &golden("qwen2"), folder.path()).unwrap_err();
    assert!(error.to_string().ends_with("tensor lm_head.weight is not one of the model's"), "{error}");
}
