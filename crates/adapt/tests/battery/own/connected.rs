//! Of modules that a second stream connects.

use attune_adapt::ADAPTERS;
use attune_architecture::Architecture;
use attune_models::Base;
use attune_points::adapter::{Port, RowCx};
use attune_points::{Layout, Locals, Params};
use attune_spec::job::Targets;
use attune_tensor::{Rng, autograd};
use candle_core::{DType, Device, Tensor, Var};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Own, PLAIN};
use crate::support::{self, Setup, batch, difference};
use crate::{build, cost_of, fail, gradient_of};

pub(super) const OWN: &[(&str, Own)] = &[
    ("connected_adapter::gradients_reach_its_first_module_past_blocks_that_pass_none", past_blocks),
    ("connected_adapter::without_what_it_injects_its_modules_know_nothing_of_each_other", scattered),
    ("connected_adapter::its_first_and_its_last_module_learn_more_alike", alike),
    ("connected_adapter::every_form_has_exact_gradients_and_counts_its_tensors", forms),
];

/// Of the battery's widths.
fn method() -> Value {
    json!({"method": "connected-adapter", "width": 5, "side": 3})
}

fn setup(method: &Value, dtype: DType) -> Result<Setup, Failed> {
    let card = ADAPTERS.card(method["method"].as_str().ok_or("no name")?).ok_or("no card")?;
    let mut setup = Setup::of(card, build(method.clone()).map_err(fail)?, dtype);
    setup.disturb(0.3);
    Ok(setup)
}

/// The same with nothing that the second stream gives to the first.
fn without_injection(setup: &Setup) -> Result<Params, Failed> {
    let mut params = setup.params();
    for (name, tensor) in setup.params().iter().filter(|(name, _)| name.local() == "inject") {
        params.insert(name.clone(), tensor.zeros_like()?);
    }
    Ok(params)
}

/// The norms of the gradients of a component's modules, from the first on, where `block` stands for each block of the frozen model.
fn learned(setup: &Setup, block: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Vec<f64>, Failed> {
    let (params, layout) = (setup.params(), Layout::new());
    let mut h_td = Rng::new(3, "rows").normal_tensor((4, 24), 1.0, DType::F64)?;
    let (mut z_tz, mut modules) = (None, Vec::new());
    for at in &setup.attachments {
        let mut locals = attune_models::stack::locals(at, &params)?;
        if !at.site.as_str().ends_with("embed_tokens") {
            h_td = block(&h_td)?;
            let leaves: Vec<(&'static str, Var)> = locals
                .iter()
                .map(|(local, tensor)| Ok((local, autograd::leaf(tensor)?)))
                .collect::<Result<_, Failed>>()?;
            locals = Locals::new(at.site.as_str(), leaves.iter().map(|(local, var)| (*local, var.as_tensor().clone())));
            modules.push(leaves);
        }
        let cx = RowCx { site: &at.site, output: 24, dropout: None, layout: &layout, rows: None };
        match setup.adapter.port(at) {
            Port::Side(map) => {
                let zeros = || Tensor::zeros((4, map.width()), DType::F64, &Device::Cpu);
                let given = z_tz.take().map_or_else(zeros, Ok)?;
                let (h, z) = map.graph(&h_td, &given, &locals, &cx)?;
                (h_td, z_tz) = (h, Some(z));
            }
            Port::Delta(map) => h_td = (&h_td + map.graph(&h_td, &locals, &cx)?)?,
            _ => return Err("it takes part otherwise".into()),
        }
    }
    let leaves: Vec<&Var> = modules.iter().flatten().map(|(_, var)| var).collect();
    let mut gradients = autograd::pull(&leaves, &[(&h_td, &h_td)])?.into_iter();
    let of_module = |leaves: &Vec<(&'static str, Var)>| -> Result<f64, Failed> {
        let mut sum = 0.0;
        for gradient in gradients.by_ref().take(leaves.len()).flatten() {
            sum += gradient.sqr()?.sum_all()?.to_scalar::<f64>()?;
        }
        Ok(sum.sqrt())
    };
    modules.iter().map(of_module).collect()
}

/// What the first module learns where nothing comes back through a block.
fn past_stopped_blocks(setup: &Setup) -> Result<f64, Failed> {
    let norms = learned(setup, |h_td| Ok((h_td.roll(1, 1)? * 1.3)?.tanh()?.detach()))?;
    Ok(norms[0])
}

fn past_blocks() -> Result<(), Failed> {
    let mut connected = setup(&method(), DType::F64)?;
    let mut plain = Setup::new(build(json!({"method": PLAIN, "rank": 2})).map_err(fail)?, "q_proj", DType::F64);
    plain.disturb(0.3);
    let (by_stream, by_blocks) = (past_stopped_blocks(&connected)?, past_stopped_blocks(&plain)?);
    connected.theta = connected.with_params(without_injection(&connected)?);
    let alone = past_stopped_blocks(&connected)?;
    assert!(by_stream > 1e-3 && by_blocks == 0.0 && alone == 0.0, "{by_stream}, {by_blocks} and {alone}");
    Ok(())
}

fn scattered() -> Result<(), Failed> {
    let connected = setup(&method(), DType::F32)?;
    let alone = without_injection(&connected)?;
    let moved = |params: &Params| -> Result<Params, Failed> {
        let (mut moved, mut rng) = (params.clone(), Rng::new(5, "moved"));
        for (name, tensor) in
            params.iter().filter(|(name, _)| name.local() == "start" || name.local().starts_with("aside"))
        {
            moved.insert(name.clone(), (tensor + rng.normal_tensor(tensor.shape(), 0.5, DType::F32)?)?);
        }
        Ok(moved)
    };
    let by = |params: Params| connected.clone_with(connected.with_params(params)).logits(&batch());
    let off = difference(&by(moved(&alone)?)?, &by(alone)?);
    let on = difference(&by(moved(&connected.params())?)?, &by(connected.params())?);
    assert!(off == 0.0 && on > 1e-2, "{off} and {on}");
    Ok(())
}

/// How many times less the first of twelve modules learns than the last, where each block leaves half of what comes back to it.
fn faded(setup: &Setup) -> Result<f64, Failed> {
    let own = Rng::new(4, "block").normal_tensor((4, 24), 1.0, DType::F64)?;
    let norms = learned(setup, |h_td| (h_td.roll(1, 1)?.tanh()? * 0.5)? + &own)?;
    assert_eq!(norms.len(), 12);
    Ok(norms[11] / norms[0])
}

fn alike() -> Result<(), Failed> {
    let card = ADAPTERS.card("connected-adapter").ok_or("no card")?;
    let mut deep: Value = serde_json::from_str(support::CONFIG)?;
    deep["num_hidden_layers"] = 12.into();
    let base = Base::random(Architecture::from_json(deep.to_string().as_bytes())?, 5, DType::F64)?;
    let adapter = build(method()).map_err(fail)?;
    let mut connected = Setup::on(base, adapter, &Targets::from(card.targets), card.applies, DType::F64);
    connected.disturb(0.1);
    let by_stream = faded(&connected)?;
    connected.theta = connected.with_params(without_injection(&connected)?);
    let alone = faded(&connected)?;
    let unlike = |ratio: f64| ratio.max(1.0 / ratio);
    assert!(unlike(by_stream) < 10.0 && unlike(alone) > 100.0, "{by_stream} and {alone}");
    Ok(())
}

fn forms() -> Result<(), Failed> {
    let card = ADAPTERS.card("connected-adapter").ok_or("no card")?;
    for insertion in ["block", "attention", "both"] {
        for inside in [true, false] {
            let mut method = method();
            method["insertion"] = insertion.into();
            method["inside"] = inside.into();
            gradient_of(card, method.clone()).map_err(|why| format!("{method}: {why:?}"))?;
            cost_of(card, &method).map_err(|why| format!("{method}: {why:?}"))?;
        }
    }
    let adapter = build(method()).map_err(fail)?;
    let setup = setup(&method(), DType::F32)?;
    let architecture = setup.model.base().architecture();
    let sites = architecture.sites();
    let (table, blocks): (Vec<_>, Vec<_>) = sites.into_iter().partition(|site| site.layer.is_none());
    for (sites, told) in [(blocks, "`targets` names no table"), (table, "`insertion` is left without a block")] {
        let faults = adapter.attach(architecture, &sites).err().unwrap_or_default();
        assert!(faults.iter().any(|fault| fault.to_string().starts_with(told)), "{told}: {faults:?}");
    }
    Ok(())
}
