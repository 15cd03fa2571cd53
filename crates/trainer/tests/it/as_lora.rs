//! Adapters that become plain LoRA: as PEFT makes them, and as what they were.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use attune_adapt::joined::pairs;
use attune_adapt::{ADAPTERS, peft};
use attune_architecture::{Architecture, SiteId, targets};
use attune_spec::id::Step;
use attune_spec::method::BuildCx;
use attune_trainer::to_lora::{Converted, Keep, ToLora};
use candle_core::Tensor;
use serde::Deserialize;

/// What a case was made of.
#[derive(Deserialize)]
struct How {
    adapter: String,
    base: String,
    rank: Option<usize>,
    share: Option<f64>,
}

fn of(crate_: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(crate_).join("golden")
}

fn converted(adapter: &str, base: &str, keep: Keep, to: &Path) -> Result<Converted, String> {
    let (base, folder) = (of("models").join(base), of("adapt").join(adapter).join("adapter"));
    let convert = ToLora { base: &base, name: adapter, folder: &folder, keep };
    convert.run(to).map_err(|error| error.to_string())
}

/// The changes of a folder of LoRA, and their ranks.
fn changes(folder: &Path, base: &str) -> BTreeMap<SiteId, (Tensor, usize)> {
    let text = std::fs::read(of("models").join(base).join("config.json")).unwrap();
    let architecture = Architecture::from_json(&text).unwrap();
    let cx = BuildCx { steps: Step(0), domains: &[], words: None };
    let read = peft::read(folder).unwrap();
    assert_eq!(read.method.method, "lora");
    let adapter = ADAPTERS.build(&read.method, &"adapter".into(), &cx).unwrap();
    let sites = targets::resolve(&read.targets, None, &architecture, |_| true).unwrap();
    let attachments = adapter.attach(&architecture, &sites).unwrap();
    let params = read.params(&*adapter, &attachments).unwrap();
    let pairs = pairs(&*adapter, &attachments, &params, &architecture).unwrap();
    let change = |(b, a, scale): (Tensor, Tensor, f64)| ((b.matmul(&a).unwrap() * scale).unwrap(), a.dim(0).unwrap());
    pairs.into_iter().map(|(site, pair)| (site, change(pair))).collect()
}

fn largest(x: &Tensor) -> f32 {
    x.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

#[test]
fn changes_become_the_factors_that_peft_makes_of_them() {
    let mut seen = 0;
    for case in std::fs::read_dir(of("trainer").join("as_lora")).unwrap().map(|entry| entry.unwrap().path()) {
        let how: How = serde_json::from_slice(&std::fs::read(case.join("how.json")).unwrap()).unwrap();
        let keep = how.rank.map(Keep::Rank).or_else(|| how.share.map(Keep::Share)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let made = converted(&how.adapter, &how.base, keep, folder.path()).unwrap();
        let (own, theirs) = (changes(folder.path(), &how.base), changes(&case, &how.base));
        assert_eq!(own.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{case:?}");
        assert_eq!(made.sites.len(), own.len());
        for (site, (change, rank)) in &own {
            let (their_change, their_rank) = &theirs[site];
            assert_eq!((rank, made.sites[site.as_str()].rank), (their_rank, *rank), "{case:?} at {site}");
            let off = largest(&(change - their_change).unwrap());
            assert!(off < 1e-5 * largest(their_change).max(1.0), "{case:?} at {site}: {off}");
        }
        seen += 1;
    }
    assert_eq!(seen, 7);
}

/// Also methods that PEFT does not convert: those that turn or scale a weight, and those that take something out of it.
#[test]
fn all_directions_are_the_adapter_itself_and_fewer_are_as_far_from_it_as_is_said() {
    for (adapter, base) in [
        ("llama_hra", "llama"),
        ("qwen2_oft", "qwen2"),
        ("llama_kasa", "llama"),
        ("qwen2_osf", "qwen2"),
        ("llama_psoft", "llama"),
        ("qwen2_dora", "qwen2"),
        ("gpt2_frod", "gpt2"),
    ] {
        let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let whole = converted(adapter, base, Keep::Share(1.0), folders[0].path()).unwrap();
        assert!(whole.sites.values().all(|kept| kept.share > 1.0 - 1e-9), "{adapter}");
        let few = converted(adapter, base, Keep::Rank(2), folders[1].path()).unwrap();
        let [all, two] = [0, 1].map(|at| changes(folders[at].path(), base));
        for (site, (change, _)) in &all {
            let square = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            let (kept, (nearest, _)) = (few.sites[site.as_str()], &two[site]);
            let off = square(&(change - nearest).unwrap()) / square(change);
            assert!(kept.rank == 2 && (f64::from(off) - (1.0 - kept.share)).abs() < 1e-4, "{adapter} at {site}: {off}");
        }
        let load = |file: PathBuf| candle_core::safetensors::load(file, &candle_core::Device::Cpu).unwrap();
        let model = load(of("models").join(base).join("model.safetensors"));
        let merged: BTreeMap<String, Tensor> =
            load(of("adapt").join(adapter).join("merged.safetensors")).into_iter().collect();
        for (name, merged) in merged {
            let site = name.strip_suffix(".weight").unwrap();
            let change = (merged - &model[&name]).unwrap();
            let change = if base == "gpt2" { change.t().unwrap() } else { change };
            let off = largest(&(change - &all[&SiteId::new(site)].0).unwrap());
            assert!(off < 1e-4, "{adapter} at {site}: {off}");
        }
    }
}

#[test]
fn what_lora_has_no_place_for_is_refused_with_the_site() {
    let folder = tempfile::tempdir().unwrap();
    for (adapter, base, message) in [
        ("qwen2_norms", "qwen2", "which is no linear"),
        ("llama_prefix", "llama", "which is no linear"),
        ("qwen2_beft", "qwen2", "changes the bias of"),
        ("llama_lily", "llama", "does not merge at"),
    ] {
        let error = converted(adapter, base, Keep::Rank(4), folder.path()).unwrap_err();
        assert!(error.contains(message), "{adapter}: {error}");
    }
    for (keep, message) in [(Keep::Rank(0), "rank 0"), (Keep::Share(1.5), "share 1.5"), (Keep::Share(0.0), "share 0")] {
        let error = converted("llama_hra", "llama", keep, folder.path()).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
