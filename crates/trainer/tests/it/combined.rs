//! Adapters combined: what PEFT's `add_weighted_adapter` makes of the same folders (`crates/merge/golden`).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use attune_adapt::joined::pairs;
use attune_adapt::{ADAPTERS, peft};
use attune_architecture::{Architecture, SiteId, targets};
use attune_merge::words::{self, MajoritySign};
use attune_points::merge::Keeps;
use attune_spec::id::Step;
use attune_spec::method::BuildCx;
use attune_trainer::combine::{Combine, Combined, Part};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../merge/golden")
}

fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/golden/llama")
}

/// How a case was made.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct How {
    of: BTreeMap<String, f64>,
    combination_type: String,
    density: Option<f64>,
    majority_sign_method: Option<String>,
    svd_rank: Option<usize>,
    svd_clamp: Option<f64>,
}

/// The masks that PEFT drew, one after the other.
struct Recorded {
    masks: Rc<RefCell<Vec<Tensor>>>,
    is_table: bool,
}

impl Keeps for Recorded {
    fn keep(&mut self, _: usize, entries: usize, _: f64) -> attune_points::Result<Vec<bool>> {
        let mask = self.masks.borrow_mut().pop().unwrap();
        assert_eq!(mask.elem_count(), entries);
        // Changes of a table are drawn the other way around; its factors are no larger than its width.
        let turned = self.is_table && mask.dim(0)? > 8 && mask.dim(1)? > 8;
        let mask = if turned { mask.t()?.contiguous()? } else { mask };
        Ok(mask.flatten_all()?.to_vec1::<u8>()?.into_iter().map(|kept| kept == 1).collect())
    }
}

fn parts(of: &[(&str, f64)]) -> Vec<Part> {
    let part =
        |(name, weight): &(&str, f64)| Part { name: (*name).to_owned(), folder: golden().join(name), weight: *weight };
    of.iter().map(part).collect()
}

fn combined(how: &How, masks: Vec<Tensor>, seed: u64, to: &Path) -> Result<Combined, Box<attune_trainer::Error>> {
    let sign = how.majority_sign_method.as_deref().map(|sign| match sign {
        "frequency" => MajoritySign::Frequency,
        _ => MajoritySign::Total,
    });
    let (method, space) = words::of(&how.combination_type, how.density, sign, how.svd_rank, how.svd_clamp).unwrap();
    let of: Vec<(&str, f64)> = how.of.iter().map(|(name, weight)| (name.as_str(), *weight)).collect();
    let of = parts(&of);
    let combine = Combine { base: &base(), of: &of, method: &method, space, seed };
    if masks.is_empty() {
        return combine.run(to).map_err(Box::new);
    }
    let masks = Rc::new(RefCell::new(masks.into_iter().rev().collect::<Vec<_>>()));
    let made = combine.run_with(to, &|site| {
        Box::new(Recorded { masks: Rc::clone(&masks), is_table: site.as_str().ends_with("embed_tokens") })
    });
    assert!(masks.borrow().is_empty());
    made.map_err(Box::new)
}

/// The factors of a folder by site, the one on products on the left one.
fn factors(folder: &Path) -> BTreeMap<SiteId, (Tensor, Tensor)> {
    let cx = BuildCx { steps: Step(1), domains: &[], words: None };
    let architecture = Architecture::from_json(&std::fs::read(base().join("config.json")).unwrap()).unwrap();
    let read = peft::read(folder).unwrap();
    let adapter = ADAPTERS.build(&read.method, &"adapter".into(), &cx).unwrap();
    let sites = targets::resolve(&read.targets, None, &architecture, |_| true).unwrap();
    let attachments = adapter.attach(&architecture, &sites).unwrap();
    let params = read.params(&*adapter, &attachments).unwrap();
    let pairs = pairs(&*adapter, &attachments, &params, &architecture).unwrap();
    pairs.into_iter().map(|(site, (b, a, scale))| (site, ((b * scale).unwrap(), a))).collect()
}

fn off(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

#[test]
fn every_combination_type_makes_the_factors_that_peft_makes() {
    let mut seen = 0;
    for case in std::fs::read_dir(golden()).unwrap().map(|entry| entry.unwrap().path()) {
        let Ok(how) = std::fs::read(case.join("how.json")) else { continue };
        let how: How = serde_json::from_slice(&how).unwrap();
        let kept = case.join("kept.safetensors");
        let kept = kept.is_file().then(|| candle_core::safetensors::load(kept, &Device::Cpu).unwrap());
        let kept: BTreeMap<String, Tensor> = kept.into_iter().flatten().collect();
        let folder = tempfile::tempdir().unwrap();
        combined(&how, kept.into_values().collect(), 0, folder.path())
            .unwrap_or_else(|error| panic!("{case:?}: {error}"));
        let (own, theirs) = (factors(folder.path()), factors(&case));
        assert_eq!(own.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{case:?}");
        for (site, (b, a)) in &own {
            let (their_b, their_a) = &theirs[site];
            assert!(off(&b.matmul(a).unwrap(), &their_b.matmul(their_a).unwrap()) < 1e-5, "{case:?} at {site}");
            // Singular vectors have no sign of their own, and where an adapter has fewer sites PEFT fills ranks up with zeros.
            if a.dims() == their_a.dims() && !how.combination_type.ends_with("svd") {
                assert!(off(a, their_a).max(off(b, their_b)) < 1e-5, "{case:?} at {site}");
            }
        }
        seen += 1;
    }
    assert_eq!(seen, 13);
}

fn how(combination_type: &str, of: &[(&str, f64)]) -> How {
    How {
        of: of.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect(),
        combination_type: combination_type.to_owned(),
        density: combination_type.starts_with("dare").then_some(0.5),
        majority_sign_method: None,
        svd_rank: None,
        svd_clamp: None,
    }
}

#[test]
fn the_same_seed_makes_the_same_bytes_and_another_one_others() {
    let of = how("dare_ties", &[("a", 0.7), ("b", -0.5)]);
    let made = |seed| {
        let folder = tempfile::tempdir().unwrap();
        let made = combined(&of, Vec::new(), seed, folder.path()).unwrap();
        assert_eq!((made.sites, made.rank), (5, 4));
        let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
        [read("adapter_model.safetensors"), read("adapter_config.json"), read("README.md")]
    };
    assert_eq!(made(1), made(1));
    assert_ne!(made(1)[0], made(2)[0]);
    let card = String::from_utf8(made(1)[2].clone()).unwrap();
    assert!(card.contains("| of | 0.7 times a, -0.5 times b |") && card.contains("dare-ties"), "{card}");
}

#[test]
fn an_adapter_less_itself_is_nothing() {
    let folder = tempfile::tempdir().unwrap();
    combined(&how("svd", &[("a", 1.0)]), Vec::new(), 0, folder.path()).unwrap();
    let (own, theirs) = (factors(folder.path()), factors(&golden().join("a")));
    assert!(own.iter().all(|(site, (b, a))| {
        let (their_b, their_a) = &theirs[site];
        off(&b.matmul(a).unwrap(), &their_b.matmul(their_a).unwrap()) < 1e-5
    }));
    let of = [("a", 1.0), ("a", -1.0)];
    let (method, space) = words::of("cat", None, None, None, None).unwrap();
    let parts = parts(&of);
    let to = tempfile::tempdir().unwrap();
    Combine { base: &base(), of: &parts, method: &method, space, seed: 0 }.run(to.path()).unwrap();
    let zeros = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
    for (b, a) in factors(to.path()).values() {
        let whole = b.matmul(a).unwrap();
        assert!(off(&whole, &zeros.broadcast_as(whole.shape()).unwrap()) < 1e-5);
    }
}

#[test]
fn what_cannot_be_combined_is_said_by_its_name() {
    let to = tempfile::tempdir().unwrap();
    let why = |how: &How| combined(how, Vec::new(), 0, to.path()).unwrap_err().to_string();
    let ranks = why(&how("linear", &[("a", 1.0), ("c", 1.0)]));
    assert!(ranks.contains("q_proj: ranks are 4, 3, and factors are combined entry by entry"), "{ranks}");
    let infinite = why(&how("svd", &[("a", f64::INFINITY)]));
    assert!(infinite.contains("has the weight inf; expected a number"), "{infinite}");
    assert!(why(&how("svd", &[])).contains("names no adapter"));
    // Another base, by its digest.
    let (other, of) = (tempfile::tempdir().unwrap(), |folder: &Path, name: &str, digit: &str| {
        let at = folder.join(name);
        std::fs::create_dir(&at).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(golden().join("a").join(file), at.join(file)).unwrap();
        }
        let config = std::fs::read_to_string(at.join("adapter_config.json")).unwrap();
        let digest = format!("blake3:{}", digit.repeat(64));
        std::fs::write(at.join("adapter_config.json"), config.replace("attune/llama", &digest)).unwrap();
        Part { name: name.to_owned(), folder: at, weight: 1.0 }
    });
    let of = [of(other.path(), "x", "1"), of(other.path(), "y", "2")];
    let (method, space) = words::of("cat", None, None, None, None).unwrap();
    let combine = Combine { base: &base(), of: &of, method: &method, space, seed: 0 };
    let differs = combine.run(to.path()).unwrap_err().to_string();
    assert!(differs.contains("their changes mean nothing together"), "{differs}");
    // A method that multiplies.
    let dora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../adapt/golden/qwen2_dora/adapter");
    let of = [Part { name: "dora".to_owned(), folder: dora, weight: 1.0 }];
    let qwen2 = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/golden/qwen2");
    let combine = Combine { base: &qwen2, of: &of, method: &method, space, seed: 0 };
    let multiplies = combine.run(to.path()).unwrap_err().to_string();
    assert!(multiplies.contains("is of dora, which is no product of two factors"), "{multiplies}");
}
