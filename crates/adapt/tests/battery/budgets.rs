//! The battery of the point `Budget`: what any way to share ranks keeps to, and that what trains then is the plain method.

use std::collections::BTreeMap;
use std::path::PathBuf;

use attune_adapt::{ADAPTERS, BUDGETS, budgets, peft};
use attune_architecture::{Site, targets};
use attune_models::{Base, Model, Stack};
use attune_points::TensorName;
use attune_points::adapter::Attachment;
use attune_points::budget::{Budget, Share};
use attune_spec::id::Step;
use attune_spec::job::{Precision, Targets};
use attune_spec::method::{BuildCx, Card, MethodRef, SiteKind};
use candle_core::{DType, Tensor};
use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};

use crate::support::{Setup, batch, stats};
use crate::{fail, golden};

type Property = fn(&'static Card) -> Result<(), Failed>;

const PROPERTIES: [(&str, Property); 6] = [
    ("defaults_parse", defaults_parse),
    ("an_unknown_field_is_refused_with_its_path", unknown_field),
    ("ranks_add_up_whatever_the_order_of_sites", adds_up),
    ("sites_do_not_get_the_same", differs),
    ("what_trains_is_the_plain_method_with_ranks_at_sites", plain),
    ("peft_reads_what_is_written", written),
];

pub(crate) fn trials() -> Vec<Trial> {
    let trial = |card: &'static Card| {
        PROPERTIES
            .into_iter()
            .map(move |(name, run)| Trial::test(format!("budget::{}::{name}", card.name), move || run(card)))
    };
    BUDGETS.cards().flat_map(trial).collect()
}

fn build(budget: Value) -> Result<Box<dyn Budget>, Vec<String>> {
    let budget: MethodRef = serde_json::from_value(budget).map_err(|error| vec![error.to_string()])?;
    let cx = BuildCx { steps: Step(10), domains: &[], words: None };
    BUDGETS
        .build(&budget, &"tune.budget".into(), &cx)
        .map_err(|faults| faults.iter().map(ToString::to_string).collect())
}

fn defaults_parse(card: &'static Card) -> Result<(), Failed> {
    let document = BUDGETS.documents().find(|document| document.name == card.name).ok_or("no document")?;
    let mut budget = document.defaults.clone();
    budget["method"] = card.name.into();
    build(budget).map_err(fail)?;
    for field in document.defaults.as_object().ok_or("the defaults are no mapping")?.keys() {
        assert!(document.schema["properties"][field]["description"].is_string(), "parameter {field} is not described");
    }
    Ok(())
}

fn unknown_field(card: &'static Card) -> Result<(), Failed> {
    let Err(faults) = build(json!({"method": card.name, "no_such_field": 1})) else { return Err("accepted".into()) };
    assert!(faults[0].starts_with("`tune.budget.no_such_field` is not a known field"), "{faults:?}");
    Ok(())
}

/// A model one of whose linears answers ten times as loudly as the others.
fn planted() -> Result<Base, Failed> {
    let base = Base::random(crate::support::architecture(), 5, DType::F32)?;
    let tensors = base.architecture().tensors().into_iter().map(|info| {
        let tensor = base.tensor(&TensorName::from_path(&info.name), DType::F32)?;
        let factor = if info.name == "model.layers.1.mlp.up_proj.weight" { 10.0 } else { 1.0 };
        Ok((info.name, (tensor * factor)?))
    });
    let tensors: BTreeMap<String, Tensor> = tensors.collect::<Result<_, attune_points::Error>>()?;
    Ok(Base::from_tensors(base.architecture().clone(), &tensors)?)
}

/// A method at all linears of a model, with the ranks that a budget gives them for a batch.
struct Shared {
    method: MethodRef,
    base: Base,
    ranks: BTreeMap<String, u32>,
}

fn shared(card: &Card, base: Base, method: Value, turned: bool) -> Result<Shared, Failed> {
    let (method, budget): (MethodRef, _) = (serde_json::from_value(method)?, build(json!({"method": card.name})));
    let budget = budget.map_err(fail)?;
    let cx = BuildCx { steps: Step(10), domains: &[], words: None };
    let adapter = ADAPTERS.build(&method, &"adapter".into(), &cx).map_err(fail)?;
    let takes = |site: &Site| site.offers() == SiteKind::Linear;
    let sites = targets::resolve(&Targets::from("all-linear"), None, base.architecture(), takes).map_err(fail)?;
    let mut at = adapter.attach(base.architecture(), &sites).map_err(fail)?;
    if turned {
        at.reverse();
    }
    let model = Model::new(base, Stack::default());
    let stats = stats(&model, &budget.calibrate(), &sites, &[batch()]);
    let base = model.base();
    let weight = |at: &Attachment| {
        let site = sites.iter().find(|site| site.id == at.site);
        let site = site.ok_or_else(|| attune_points::Error::Refused("no site".to_owned()))?;
        Ok(Box::new(base.weight(site)) as Box<dyn attune_points::Weight + '_>)
    };
    let mean = budgets::rank(&method).ok_or("no rank")?;
    let shares: Vec<Share> = budget.share(mean, &at, &weight, &stats)?;
    assert!(shares.iter().all(|share| share.scores.iter().all(|(_, score)| score.is_finite())));
    let ranks = at.iter().zip(&shares).map(|(at, share)| (at.site.to_string(), share.rank)).collect();
    let base = Base::random(crate::support::architecture(), 5, DType::F32)?;
    Ok(Shared { method, base, ranks })
}

fn adds_up(card: &'static Card) -> Result<(), Failed> {
    for rank in [2, 3, 5, 8] {
        let of = |turned| shared(card, planted()?, json!({"method": "lora", "rank": rank}), turned);
        let ranks = of(false)?.ranks;
        assert_eq!(ranks.values().sum::<u32>(), rank * 14, "{ranks:?}");
        assert_eq!(ranks, of(true)?.ranks);
    }
    Ok(())
}

/// What LoRA's sites have without it.
fn differs(card: &'static Card) -> Result<(), Failed> {
    let ranks = shared(card, planted()?, json!({"method": "lora", "rank": 5}), false)?.ranks;
    assert!(ranks.values().any(|rank| *rank > 5) && ranks.values().any(|rank| *rank < 5), "{ranks:?}");
    Ok(())
}

fn plain(card: &'static Card) -> Result<(), Failed> {
    for (method, scale) in [
        (json!({"method": "lora", "rank": 4, "alpha": 6.0, "dropout": 0.0}), Some(1.5)),
        (json!({"method": "lora", "rank": 4, "alpha": 6.0, "rslora": true}), None),
        (json!({"method": "dora", "rank": 4, "alpha": 6.0}), Some(1.5)),
        (json!({"method": "delora", "rank": 4}), None),
    ] {
        let Shared { method, base, ranks } = shared(card, planted()?, method, false)?;
        let ranked = budgets::ranked(&method, &ranks);
        assert_eq!(ranked.method, method.method);
        let built = crate::build(serde_json::to_value(&ranked)?).map_err(fail)?;
        let setup = Setup::new(built, "all-linear", DType::F32);
        let params = setup.params();
        for at in &setup.attachments {
            let rank = ranks[at.site.as_str()];
            let of = at.tensors.iter().filter(|spec| spec.shape.len() == 2).map(|spec| spec.shape.clone());
            assert!(of.clone().all(|shape| shape.contains(&(rank as usize))), "{}: {rank}", at.site);
            let Some(scale) = scale else { continue };
            let alpha = ranked.params["alpha_pattern"].get(at.site.as_str()).and_then(Value::as_f64).unwrap_or(6.0);
            assert!((alpha / f64::from(rank) - scale).abs() < 1e-12, "{}: {alpha} and {rank}", at.site);
        }
        assert!(scale.is_some() || ranked.params.get("alpha_pattern").is_none());
        // A folder of it is read as that method, and has the same sites, ranks and factors.
        let folder = tempfile::tempdir()?;
        peft::write(folder.path(), setup.part(&params), None, base.architecture(), "owner/base", "")?;
        let read = peft::read(folder.path())?;
        assert_eq!(read.method.method, method.method);
        let again = crate::build(serde_json::to_value(&read.method)?).map_err(fail)?;
        let again = Setup::on(base, again, &read.targets, &[SiteKind::Linear], DType::F32);
        assert_eq!(again.attachments, setup.attachments);
        read.params(&*again.adapter, &again.attachments)?;
    }
    Ok(())
}

/// With `ATTUNE_WRITTEN` a folder is left for PEFT, which is to answer as we do.
fn written(card: &'static Card) -> Result<(), Failed> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let open = || Base::open(&here.join("../models/golden/llama"), Precision::F32);
    let Shared { method, ranks, .. } =
        shared(card, open()?, json!({"method": "lora", "rank": 12, "alpha": 24.0}), false)?;
    let built = crate::build(serde_json::to_value(budgets::ranked(&method, &ranks))?).map_err(fail)?;
    let mut setup = Setup::on(open()?, built, &Targets::from("all-linear"), &[SiteKind::Linear], DType::F32);
    setup.disturb(0.2);
    let folder = tempfile::tempdir()?;
    golden::write(&setup, &setup.params(), folder.path())?;
    let config: Value = serde_json::from_slice(&std::fs::read(folder.path().join("adapter_config.json"))?)?;
    assert_eq!((&config["peft_type"], &config["r"]), (&json!("LORA"), &json!(12)));
    assert!(ranks.values().any(|rank| *rank != 12), "{ranks:?}");
    for (site, rank) in &ranks {
        let of = |pattern: &str| {
            let patterns = config[pattern].as_object();
            patterns.and_then(|all| all.iter().find(|(key, _)| key.ends_with(site.as_str()))).map(|(_, value)| value)
        };
        assert_eq!(of("rank_pattern"), (*rank != 12).then(|| json!(rank)).as_ref(), "{site}");
        let alpha = of("alpha_pattern").and_then(Value::as_f64);
        assert_eq!(alpha, (*rank != 12).then(|| 2.0 * f64::from(*rank)), "{site}");
    }
    if let Some(folder) = std::env::var_os("ATTUNE_WRITTEN") {
        let to = PathBuf::from(folder).join(format!("llama_{}", card.name.replace('-', "_")));
        golden::keep(&setup, &to, "llama", &here.join("golden/llama_all_linear/expected.safetensors"))?;
    }
    Ok(())
}
