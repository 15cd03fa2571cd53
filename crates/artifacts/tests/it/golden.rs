//! Adapter folders that PEFT 0.21.2 wrote (`crates/adapt/golden/README.md`, pins in `benches/peers/requirements.txt`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use attune_artifacts::formats::peft::{self, Factor, LoraConfig, Modules};
use attune_artifacts::formats::safetensors::{Dtype, Tensor};
use attune_artifacts::{Bundle, Kind};

/// Those of LoRA and its options.
fn adapters() -> Vec<(String, PathBuf)> {
    let mut found = all_adapters();
    found.retain(|(_, folder)| json(&folder.join(peft::CONFIG_FILE))["peft_type"] == "LORA");
    assert!(found.len() >= 5, "only {} adapters are of LoRA", found.len());
    found
}

fn all_adapters() -> Vec<(String, PathBuf)> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../adapt/golden");
    let mut found: Vec<_> = fs::read_dir(&golden)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("adapter").is_dir())
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), path.join("adapter")))
        .filter(|(_, adapter)| json(&adapter.join(peft::CONFIG_FILE))["peft_type"] == "LORA")
        .filter(|(_, adapter)| peft::read_folder(adapter).unwrap().0.others.is_empty())
        .collect();
    found.sort();
    assert!(found.len() >= 5, "only {} adapters in {}", found.len(), golden.display());
    found
}

#[test]
fn every_adapter_of_peft_is_read_with_its_ranks() {
    for (name, folder) in adapters() {
        let (config, header) = peft::read_folder(&folder).unwrap();
        assert_eq!(config.peft_version.as_deref(), Some(peft::PEFT_VERSION), "{name}");
        if config.use_dora || config.lora_bias {
            continue;
        }
        assert!(config.beyond_plain().is_empty(), "{name}");
        let patterns = config.patterns().unwrap();
        let mut modules: BTreeMap<String, [Option<&[usize]>; 2]> = BTreeMap::new();
        // What PEFT compresses by, on the way back, is no factor, and neither are tables of the base.
        let others = [".lora_velora_embed", ".base_layer.weight"];
        let factors = header.tensors().iter().filter(|(tensor, _)| others.iter().all(|end| !tensor.ends_with(end)));
        for (tensor, info) in factors {
            // Those of a table of tokens are spelt otherwise.
            let spelt = match tensor.split_once(".lora_embedding_") {
                Some((module, letter)) => format!("{module}.lora_{letter}.weight"),
                None => tensor.clone(),
            };
            let (module, factor) = peft::parse_tensor_name(&spelt).unwrap_or_else(|| panic!("{name}: {tensor}"));
            let module = module.to_owned();
            assert_eq!(info.dtype, Dtype::F32);
            modules.entry(module).or_default()[usize::from(factor == Factor::B)] = Some(&info.shape);
        }
        assert!(!modules.is_empty(), "{name}");
        for (module, shapes) in modules {
            let rank = patterns.rank(&module) as usize;
            let [Some([a_r, _]), Some([_, b_r])] = shapes else { panic!("{name}: {module} has {shapes:?}") };
            assert_eq!((*a_r, *b_r), (rank, rank), "{name}: {module}");
        }
    }
}

/// The scales are those that PEFT trained with; `crates/adapt/golden/README.md` says which.
#[test]
fn scales_follow_rslora_and_the_patterns() {
    let all: BTreeMap<_, _> = adapters().into_iter().collect();
    let scaling = |case: &str, module: &str| {
        let (config, _) = peft::read_folder(&all[case]).unwrap();
        config.patterns().unwrap().scaling(module)
    };
    assert_eq!(scaling("llama_some", "model.layers.0.self_attn.q_proj"), 2.0);
    assert_eq!(scaling("qwen2_some_rslora", "model.layers.0.self_attn.k_proj"), 4.0);
    assert_eq!(scaling("llama_patterns", "model.layers.1.self_attn.q_proj"), 8.0 / 6.0);
    assert_eq!(scaling("llama_patterns", "model.layers.1.self_attn.o_proj"), 2.0);
    assert_eq!(scaling("llama_patterns", "model.layers.1.mlp.up_proj"), 2.5);
    assert_eq!(scaling("llama_patterns", "model.layers.1.mlp.down_proj"), 0.75);
}

#[test]
fn all_linear_is_written_as_whole_paths_or_ends_of_them() {
    for (name, folder) in adapters().into_iter().filter(|(name, _)| name.ends_with("all_linear")) {
        let (config, header) = peft::read_folder(&folder).unwrap();
        let Some(Modules::Names(names)) = &config.target_modules else { panic!("{name}: {:?}", config.target_modules) };
        let found: BTreeSet<_> = header
            .tensors()
            .keys()
            .filter_map(|tensor| peft::parse_tensor_name(tensor))
            .map(|(module, _)| module)
            .collect();
        for module in found {
            let named = names.iter().any(|name| module == name || module.ends_with(&format!(".{name}")));
            assert!(named, "{name}: {module} is not in {names:?}");
        }
    }
}

/// What is read and written again has the same keys and values wherever this version writes a key, and the same tensors.
#[test]
fn an_adapter_written_again_says_the_same() {
    for (name, folder) in adapters() {
        let (config, header) = peft::read_folder(&folder).unwrap();
        let whole = fs::read(folder.join(peft::WEIGHTS_FILE)).unwrap();
        let tensors: Vec<_> = header
            .tensors()
            .iter()
            .map(|(tensor, info)| Tensor {
                name: tensor.clone(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                data: &whole[info.bytes.start as usize..info.bytes.end as usize],
            })
            .collect();
        let out = tempfile::tempdir().unwrap();
        peft::write_folder(out.path(), &config, &tensors, None).unwrap();
        let (config_again, header_again) = peft::read_folder(out.path()).unwrap();
        assert_eq!(config_again, config, "{name}");
        assert_eq!(header_again.metadata(), header.metadata(), "{name}");
        let theirs: serde_json::Value = json(&folder.join(peft::CONFIG_FILE));
        let ours: serde_json::Value = json(&out.path().join(peft::CONFIG_FILE));
        for (key, value) in ours.as_object().unwrap() {
            assert_eq!(theirs.get(key), Some(value), "{name}: {key}");
        }
        assert_eq!(header_again.tensors().len(), tensors.len());
        let again = fs::read(out.path().join(peft::WEIGHTS_FILE)).unwrap();
        for tensor in &tensors {
            let place = &header_again.tensors()[&tensor.name].bytes;
            assert!(again[place.start as usize..place.end as usize] == *tensor.data, "{name}: {}", tensor.name);
        }
        // PEFT writes tensors sorted by name; with one type in the file so does this room, and the files are equal.
        assert!(again == whole, "{name}: the weights differ from PEFT's file");
    }
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[tokio::test]
async fn every_adapter_of_peft_is_an_artifact() {
    for (name, folder) in all_adapters() {
        let bundle = Bundle::read(&folder, None).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(bundle.kind(), Kind::Adapter, "{name}");
    }
}

#[test]
fn a_missing_file_of_an_adapter_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = peft::read_folder(folder.path()).unwrap_err().to_string();
    assert!(error.starts_with("adapter_config.json is not in"), "{error}");
    fs::write(folder.path().join(peft::CONFIG_FILE), LoraConfig::default().render().unwrap()).unwrap();
    let error = peft::read_folder(folder.path()).unwrap_err().to_string();
    assert!(error.starts_with("adapter_model.safetensors is not in"), "{error}");
}
