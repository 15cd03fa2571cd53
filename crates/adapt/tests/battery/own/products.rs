//! Of changes that are products of other kinds than LoRA's.

use std::collections::HashMap;

use attune_adapt::{ADAPTERS, peft};
use attune_architecture::targets;
use attune_models::Base;
use attune_points::adapter::{Merged, Port, RowCx};
use attune_points::{Layout, Locals, Params};
use attune_spec::job::Precision;
use attune_tensor::{Rng, autograd};
use candle_core::{DType, Device, Tensor};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Own, PLAIN, rank};
use crate::support::{self, Setup, largest};
use crate::{build, gradient_of, merged_of};

pub(super) const OWN: [(&str, Own); 13] = [
    ("abba::its_rank_goes_beyond_loras", abba),
    ("bone::its_rank_goes_beyond_loras", bone),
    ("delora::larger_factors_change_no_more", delora),
    ("gralora::an_outlier_reaches_the_gradients_of_its_own_blocks_only", gralora),
    ("hira::zeros_of_a_weight_stay", hira),
    ("loha::its_rank_goes_beyond_loras", loha),
    ("lokr::its_rank_is_full_from_fewer_numbers_than_loras_of_2", lokr),
    ("mora::its_rank_is_full_from_the_numbers_of_loras_of_2", mora),
    ("products::every_form_has_exact_gradients_and_merges", forms),
    ("products::what_does_not_fit_a_linear_is_refused_with_what_would", refusals),
    ("randlora::a_repeat_of_what_is_shared_has_to_be_one", repeats),
    ("randlora::its_rank_is_full_from_fewer_numbers_than_loras_of_2", randlora),
    ("vera::its_rank_goes_beyond_loras_from_fewer_numbers", vera),
];

/// A linear of 32 outputs and 24 inputs.
const SITE: &str = "model.layers.1.mlp.up_proj";

/// A component at [`SITE`], moved from its start.
fn moved(method: Value) -> Result<Setup, Failed> {
    let mut setup = Setup::new(build(method).map_err(crate::fail)?, SITE, DType::F64);
    setup.disturb(0.3);
    Ok(setup)
}

/// What it changes about the weight.
fn change(setup: &Setup) -> Result<Tensor, Failed> {
    change_of(setup, &setup.weight(&setup.attachments[0])?.dense(DType::F64)?)
}

/// What it changes about a weight in place of its own.
fn change_of(setup: &Setup, weight: &Tensor) -> Result<Tensor, Failed> {
    let at = &setup.attachments[0];
    let locals = attune_models::stack::locals(at, &setup.params())?;
    Ok(match setup.adapter.merge(at, &locals, weight)? {
        Merged::Factors { left, right, scale } => (left.matmul(&right)? * scale)?,
        Merged::Weight { weight: merged, .. } => (merged - weight)?,
        other => return Err(format!("{other:?} does not merge").into()),
    })
}

/// The rank of a change, and how many trained numbers it is made of.
fn rank_and_numbers(method: Value) -> Result<(usize, usize), Failed> {
    let setup = moved(method)?;
    let numbers = setup.theta.trained().map(|(_, tensor)| tensor.elem_count()).sum();
    Ok((rank(&change(&setup)?)?, numbers))
}

/// The method has this rank with no more trained numbers than LoRA of rank `plain`, which stays at its own.
fn outranks(method: Value, reached: usize, plain: u32) -> Result<(), Failed> {
    let ((own, own_numbers), (of_plain, plain_numbers)) =
        (rank_and_numbers(method)?, rank_and_numbers(json!({"method": PLAIN, "rank": plain}))?);
    assert!(own_numbers <= plain_numbers, "{own_numbers} trained numbers against {plain_numbers}");
    assert_eq!(own, reached);
    assert_eq!(of_plain, plain as usize);
    assert!(own > of_plain);
    Ok(())
}

fn loha() -> Result<(), Failed> {
    // Once through factors, once through the weight.
    outranks(json!({"method": "loha", "rank": 3}), 9, 6)?;
    outranks(json!({"method": "loha", "rank": 4}), 16, 8)
}

fn lokr() -> Result<(), Failed> {
    outranks(json!({"method": "lokr", "rank": 4}), 24, 2)
}

/// The largest change of a weight's number that is 0, where every third is.
fn change_at_zeros(method: Value) -> Result<f64, Failed> {
    let setup = moved(method)?;
    let at = &setup.attachments[0];
    let weight = setup.weight(at)?.dense(DType::F64)?;
    let kept: Vec<f64> = (0..weight.elem_count()).map(|entry| f64::from(u8::from(entry % 3 > 0))).collect();
    let kept = Tensor::from_vec(kept, weight.shape(), weight.device())?;
    let change = change_of(&setup, &(weight * &kept)?)?;
    assert!(largest(&change) > 0.01, "nothing moved");
    Ok(largest(&(change * (1.0 - kept)?)?))
}

/// A pruned base stays pruned.
fn hira() -> Result<(), Failed> {
    for whole in [false, true] {
        assert_eq!(change_at_zeros(json!({"method": "hira", "rank": 2, "whole": whole}))?, 0.0);
    }
    assert!(change_at_zeros(json!({"method": PLAIN, "rank": 2}))? > 0.01);
    Ok(())
}

fn bone() -> Result<(), Failed> {
    outranks(json!({"method": "bone", "rank": 3}), 3, 2)?;
    outranks(json!({"method": "bone", "rank": 7}), 7, 4)
}

fn mora() -> Result<(), Failed> {
    outranks(json!({"method": "mora", "rank": 2}), 24, 2)?;
    outranks(json!({"method": "mora", "rank": 4, "form": "share"}), 15, 5)
}

/// The share of the numbers of the tensor `up` whose gradient another value of one input changes, at a component that adds to rows.
fn reached_by_an_outlier(method: Value, up: &'static str) -> Result<f64, Failed> {
    let setup = moved(method)?;
    let at = &setup.attachments[0];
    let tensors = attune_models::stack::locals(at, &setup.params())?;
    let (layout, mut rng) = (Layout::new(), Rng::new(5, "rows"));
    let cx = RowCx { site: &at.site, output: 32, dropout: None, layout: &layout, rows: None };
    let Port::Delta(map) = setup.adapter.port(at) else { return Err("it adds nothing to rows".into()) };
    let leaf = autograd::leaf(tensors.get(up)?)?;
    let own = |(name, tensor): (&'static str, &Tensor)| {
        (name, if name == up { leaf.as_tensor().clone() } else { tensor.clone() })
    };
    let tensors = Locals::new(at.site.as_str(), tensors.iter().map(own));
    let (x, dy) =
        (rng.normal_tensor(&[4, 24][..], 1.0, DType::F64)?, rng.normal_tensor(&[4, 32][..], 1.0, DType::F64)?);
    let gradient = |x: &Tensor| -> Result<Tensor, Failed> {
        let added = map.graph(x, &tensors, &cx)?;
        Ok(autograd::pull(&[&leaf], &[(&added, &dy)])?.remove(0).ok_or("no gradient")?)
    };
    let outlier: Vec<f64> = (0..4 * 24).map(|entry| if entry == 3 { 1000.0 } else { 0.0 }).collect();
    let with = (&x + Tensor::from_vec(outlier, (4, 24), x.device())?)?;
    let changes = (gradient(&with)? - gradient(&x)?)?.abs()?.flatten_all()?.to_vec1::<f64>()?;
    Ok(changes.iter().filter(|change| **change > 1e-9).count() as f64 / changes.len() as f64)
}

/// At the same number of parameters: an input has one of four blocks, in LoRA all.
fn gralora() -> Result<(), Failed> {
    let (grid, plain) = (
        reached_by_an_outlier(json!({"method": "gralora", "rank": 4, "blocks": 4}), "gralora_B")?,
        reached_by_an_outlier(json!({"method": PLAIN, "rank": 4}), "lora_B")?,
    );
    assert_eq!((grid, plain), (0.25, 1.0));
    outranks(json!({"method": "gralora", "rank": 4, "blocks": 4}), 16, 4)
}

/// How many times a change grows when its factors do by ten, by their names.
fn growth(method: Value, factors: [&str; 2]) -> Result<f64, Failed> {
    let mut setup = moved(method)?;
    let before = largest(&change(&setup)?);
    for (name, tensor) in setup.params().iter().filter(|(name, _)| factors.contains(&name.local())) {
        setup.theta = setup.with(name, (tensor * 10.0)?);
    }
    Ok(largest(&change(&setup)?) / before)
}

/// Directions and strength are apart.
fn delora() -> Result<(), Failed> {
    let (own, plain) = (
        growth(json!({"method": "delora", "rank": 2}), ["delora_A", "delora_B"])?,
        growth(json!({"method": PLAIN, "rank": 2}), ["lora_A", "lora_B"])?,
    );
    assert!((own - 1.0).abs() < 1e-9, "{own} times as large");
    assert!((plain - 100.0).abs() < 1e-9, "{plain} times as large");
    Ok(())
}

fn vera() -> Result<(), Failed> {
    outranks(json!({"method": "vera", "rank": 16}), 16, 1)
}

fn randlora() -> Result<(), Failed> {
    outranks(json!({"method": "randlora", "rank": 8}), 24, 2)
}

fn abba() -> Result<(), Failed> {
    // Once through factors, once through the weight.
    outranks(json!({"method": "abba", "rank_1": 2, "rank_2": 4}), 8, 6)?;
    outranks(json!({"method": "abba", "rank_1": 4, "rank_2": 5}), 20, 9)
}

/// The first fault of a method at [`SITE`].
fn refusal(method: &Value) -> Result<String, Failed> {
    let adapter = match build(method.clone()) {
        Ok(adapter) => adapter,
        Err(faults) => return Ok(faults[0].clone()),
    };
    let architecture = support::architecture();
    let site = architecture.site(SITE).ok_or("no site")?;
    match adapter.attach(&architecture, &[site]) {
        Ok(_) => Err(format!("{method} was accepted").into()),
        Err(faults) => Ok(faults[0].to_string()),
    }
}

fn refusals() -> Result<(), Failed> {
    let wide = "`rank` is 25; model.layers.1.mlp.up_proj is 32 by 24, so its rank is at most 24";
    for (method, start) in [
        (json!({"method": "loha", "rank": 25}), wide),
        (json!({"method": "hira", "rank": 25}), wide),
        (json!({"method": "delora", "rank": 25}), wide),
        (json!({"method": "gralora", "rank": 25, "blocks": 1}), wide),
        (
            json!({"method": "abba", "rank_1": 2, "rank_2": 25}),
            "`rank_2` is 25; model.layers.1.mlp.up_proj is 32 by 24",
        ),
        (json!({"method": "bone", "rank": 25}), "`rank` is 25; model.layers.1.mlp.up_proj has 24 inputs"),
        (
            json!({"method": "bone", "rank": 2, "form": "mini", "mini": 5}),
            "`mini` is 5, which does not divide the 32 outputs of",
        ),
        (json!({"method": "bone", "rank": 5, "form": "bat"}), "`rank` is 5, which does not divide the 32 outputs of"),
        (json!({"method": "bone", "rank": 16, "form": "bat"}), "`rank` is 16, which does not divide the 24 inputs of"),
        (
            json!({"method": "bone", "rank": 4, "form": "bat", "dropout": 0.1}),
            "`tune.adapter.dropout` is for rows that",
        ),
        (json!({"method": "gralora", "rank": 5}), "`tune.adapter.rank` is not a multiple of blocks"),
        (
            json!({"method": "gralora", "rank": 5, "blocks": 5}),
            "`blocks` is 5, which does not divide the widths 32 and 24",
        ),
        (
            json!({"method": "mora", "rank": 20}),
            "`rank` is 20, which makes a square 32 wide; model.layers.1.mlp.up_proj is",
        ),
        (
            json!({"method": "lokr", "rank_pattern": {"x": 0}}),
            "`tune.adapter.rank_pattern` has 0 for \"x\"; expected 1 to 4096",
        ),
        (json!({"method": "delora", "lambda_pattern": {"x": -1}}), "`tune.adapter.lambda_pattern` has -1 for \"x\""),
    ] {
        let found = refusal(&method)?;
        assert!(found.starts_with(start), "{method}: {found}");
    }
    Ok(())
}

/// Forms beside those that the battery sees by itself.
fn forms() -> Result<(), Failed> {
    for method in [
        json!({"method": "loha", "rank": 2}),
        json!({"method": "lokr", "rank": 1, "factor": 4, "decompose_both": true}),
        json!({"method": "hira", "rank": 2, "whole": true}),
        json!({"method": "bone", "rank": 4, "form": "bat"}),
        json!({"method": "bone", "rank": 5, "form": "mini", "mini": 4}),
        json!({"method": "mora", "rank": 2, "form": "share"}),
        json!({"method": "gralora", "rank": 4, "blocks": 4, "alpha": 6}),
        json!({"method": "randlora", "rank": 4, "alpha": 4, "bases": "sparse"}),
        json!({"method": "abba", "rank_1": 4, "rank_2": 4, "scale": 1}),
    ] {
        let card = method["method"].as_str().and_then(|name| ADAPTERS.card(name)).ok_or("no card")?;
        gradient_of(card, method.clone()).map_err(|why| format!("{method}: {why:?}"))?;
        merged_of(card, method)?;
    }
    Ok(())
}

/// PEFT writes what all linears share at each of them; a folder in which one of these is something else is no such adapter.
fn repeats() -> Result<(), Failed> {
    let here = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let golden = here.join("golden/llama_randlora/adapter");
    let base = Base::open(&here.join("../models/golden/llama"), Precision::F32)?;
    let folder = tempfile::tempdir()?;
    std::fs::copy(golden.join("adapter_config.json"), folder.path().join("adapter_config.json"))?;
    let tensors = candle_core::safetensors::load(golden.join("adapter_model.safetensors"), &Device::Cpu)?;
    let read = |tensors: &HashMap<String, Tensor>| -> Result<Result<Params, String>, Failed> {
        candle_core::safetensors::save(tensors, folder.path().join("adapter_model.safetensors"))?;
        let folder = peft::read(folder.path())?;
        let adapter = build(serde_json::to_value(&folder.method)?).map_err(crate::fail)?;
        let sites = targets::resolve(&folder.targets, None, base.architecture(), |_| true).map_err(crate::fail)?;
        let attachments = adapter.attach(base.architecture(), &sites).map_err(crate::fail)?;
        Ok(folder.params(&*adapter, &attachments).map_err(|error| error.to_string()))
    };
    assert!(read(&tensors)?.is_ok());
    let repeat = "base_model.model.model.layers.0.self_attn.k_proj.randlora_A";
    let mut other = tensors.clone();
    other.insert(repeat.to_owned(), (&tensors[repeat] + 1.0)?);
    let refused = read(&other)?.err().unwrap_or_default();
    assert!(refused.contains(&format!("tensor {repeat:?} belongs to no site of the base")), "{refused}");
    Ok(())
}
