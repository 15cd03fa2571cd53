//! What PEFT computes where several LoRAs are mixed (`golden/blends.py`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use attune_adapt::{peft, slot};
use attune_architecture::{Site, targets};
use attune_models::{Base, Model, Pass, Slot, Stack, stack};
use attune_points::adapter::{Adapter, Attachment, Port};
use attune_points::{Bank, BankKind, Grads, Params, Stats, TensorId, Theta};
use attune_spec::job::Precision;
use attune_spec::method::SiteKind;
use attune_tensor::Rng;
use candle_core::{DType, Tensor};
use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};

use crate::golden::{TOLERANCE, Tensors, layout, open};
use crate::support::{CrossEntropy, difference, largest};

/// Each case and the base that it was made on.
const CASES: &[(&str, &str)] = &[
    ("llama_arrow", "llama"),
    ("llama_xlora", "llama"),
    ("llama_xlora_deep", "llama"),
    ("qwen2_arrow", "qwen2"),
    ("qwen2_xlora", "qwen2"),
];

pub(crate) fn trials() -> Vec<Trial> {
    let trial = |(case, base): &(&'static str, &'static str)| {
        let (case, base) = (*case, *base);
        Trial::test(format!("golden::{case}::agrees_with_peft"), move || run(case, base))
    };
    CASES.iter().map(trial).collect()
}

/// What mixes so many adapters, in our words.
fn method(said: &Value, adapters: usize) -> Value {
    if let Some(temperature) = said.get("router_temperature") {
        return json!({"method": "arrow", "adapters": adapters, "top_k": said["top_k"], "temperature": temperature});
    }
    json!({
        "method": "xlora",
        "adapters": adapters,
        "depth": said["xlora_depth"],
        "size": said["xlora_size"],
        "dropout": said["xlora_dropout_p"],
        "softmax": said["enable_softmax"],
        "softmax_top": said["enable_softmax_topk"],
        "temperature": said["softmax_temperature"],
        "layerwise": said["layerwise_scalings"],
        "top_k": said["top_k_lora"].as_u64().unwrap_or(0),
        "scaling": said["global_scaling_weight"],
    })
}

/// A tensor of ours at the linear of this number, from those of PEFT's network: its linears in their order, the last of which has the
/// scores of all linears below each other, if they differ.
fn of_network(local: &str, (number, linears): (usize, usize), theirs: &Tensors) -> Result<Tensor, Failed> {
    let part = if local.ends_with("bias") { "bias" } else { "weight" };
    let number_of = |name: &str| name.split('.').nth(1).and_then(|n| n.parse::<usize>().ok());
    let mut all: Vec<(usize, &Tensor)> = theirs
        .iter()
        .filter(|(name, _)| name.ends_with(part))
        .filter_map(|(name, tensor)| Some((number_of(name)?, tensor)))
        .collect();
    all.sort_by_key(|(number, _)| *number);
    let all: Vec<&Tensor> = all.into_iter().map(|(_, tensor)| tensor).collect();
    let (last, before) = all.split_last().ok_or("no network")?;
    Ok(match local.trim_end_matches("_bias") {
        "first" => (*before.first().ok_or("one linear")?).clone(),
        "inner" => Tensor::cat(&before[1..], 0)?,
        _ => {
            let rows = last.dim(0)? / linears;
            last.narrow(0, number * rows, rows)?.contiguous()?
        }
    })
}

/// A component at its sites, with its tensors.
fn banked(adapter: Arc<dyn Adapter>, attachments: Vec<Attachment>, params: Params, train: bool) -> (Slot, Bank) {
    let bank = Bank { slot: "x".into(), kind: BankKind::Adapter, sets: vec![Arc::new(params)], train };
    (Slot::new(adapter, attachments), bank)
}

fn run(case: &str, base_name: &str) -> Result<(), Failed> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let golden = here.join("golden").join(case);
    let expected = open(golden.join("expected.safetensors"))?.ok_or("no file")?;
    let said: Value = serde_json::from_slice(&std::fs::read(golden.join("mixture.json"))?)?;
    let base = Base::open(&here.join("../models/golden").join(base_name), Precision::F32)?;

    let lora = |folder: &Path| -> Result<(Vec<Site>, (Slot, Bank)), Failed> {
        let read = peft::read(folder)?;
        let adapter: Arc<dyn Adapter> = crate::build(serde_json::to_value(&read.method)?).map_err(crate::fail)?.into();
        let takes = |site: &Site| site.offers() == SiteKind::Linear;
        let sites = targets::resolve(&read.targets, None, base.architecture(), takes).map_err(crate::fail)?;
        let attachments = adapter.attach(base.architecture(), &sites).map_err(crate::fail)?;
        let params = read.params(&*adapter, &attachments)?;
        Ok((sites, banked(adapter, attachments, params, false)))
    };
    let folders = (0..).map(|n| golden.join(format!("lora-{n}"))).take_while(|folder| folder.is_dir());
    let loras = folders.map(|folder| lora(&folder)).collect::<Result<Vec<_>, _>>()?;
    let sites = loras.first().ok_or("no LoRA")?.0.clone();
    let mut banks: Vec<(Slot, Bank)> = loras.into_iter().map(|(_, banked)| banked).collect();

    let adapter: Arc<dyn Adapter> = crate::build(method(&said, banks.len())).map_err(crate::fail)?.into();
    let attachments = adapter.attach(base.architecture(), &sites).map_err(crate::fail)?;
    let weight = |at: &Attachment| -> attune_points::Result<Box<dyn attune_points::Weight + '_>> {
        let site = sites.iter().find(|site| site.id == at.site);
        let missing = || attune_points::Error::Refused("it is no target".to_owned());
        Ok(Box::new(base.weight(site.ok_or_else(missing)?)))
    };
    let fresh = slot::fresh(&*adapter, None, &attachments, weight, &Stats::none(), &Rng::new(7, "init"))?;
    let (mut params, theirs) = (fresh.own, open(golden.join("classifier.safetensors"))?);
    let linears = if said["layerwise_scalings"] == true { attachments.len() } else { 1 };
    for (number, at) in attachments.iter().enumerate() {
        let Port::Blend(map) = adapter.port(at) else { return Err("it blends nothing".into()) };
        let merged = banks.iter().map(|(slot, bank)| {
            let own = slot.at(&at.site).ok_or("it is elsewhere")?;
            Ok::<_, Failed>(slot.adapter().merge(own, &stack::locals(own, &bank.sets[0])?, &*weight(own)?)?)
        });
        let made = map.made_of(at, &merged.collect::<Result<Vec<_>, _>>()?)?;
        for spec in &at.tensors {
            let tensor = match (&made, &theirs) {
                (Some(made), _) => made.get(spec.local)?.clone(),
                (None, Some(theirs)) => of_network(spec.local, (number % linears, linears), theirs)?,
                (None, None) => return Err("its tensors are nowhere".into()),
            };
            params.insert(spec.name(at.site.as_str()), tensor);
        }
    }
    banks.push(banked(adapter, attachments.clone(), params, true));

    let (slots, banks): (Vec<Slot>, Vec<Bank>) = banks.into_iter().unzip();
    let theta = Theta::single(banks);
    let model = Model::new(base, Stack::new(slots));
    let layout = layout(&expected)?;
    let pass = Pass { theta: &theta, layout: &layout, dropout: None };
    let off = difference(&model.logits(&pass)?, &expected["logits"]);
    assert!(off < TOLERANCE, "logits are off by {off}");

    let embeddings = TensorId::input_embeddings();
    let wanted = theta.trained().map(|(id, _)| id).chain([embeddings.clone()]);
    let mut sink = Grads::wanting(wanted);
    let report = model.grad(&pass, &CrossEntropy, 1.0 / layout.counts().tokens as f64, &mut sink)?;
    let loss = expected["loss"].to_dtype(DType::F64)?.to_vec1::<f64>()?[0];
    assert!((report.mean() - loss).abs() < TOLERANCE * loss, "the loss is {} against {loss}", report.mean());
    // Against the largest value of the whole tensor, as PEFT has it.
    let close = |name: &str, reference: &Tensor, whole: &Tensor, id: &TensorId| -> Result<(), Failed> {
        let off = difference(sink.get(id).ok_or("no gradient")?, reference) / largest(whole);
        assert!(off < TOLERANCE, "the gradient of {name} is off by a factor of {off}");
        Ok(())
    };
    close("embeddings", &expected["grad.inputs_embeds"], &expected["grad.inputs_embeds"], &embeddings)?;
    let Some(gradients) = open(golden.join("classifier_gradients.safetensors"))? else { return Ok(()) };
    let mut compared = 0;
    for (number, at) in attachments.iter().enumerate() {
        for spec in &at.tensors {
            let name = spec.name(at.site.as_str());
            let id = theta.trained().map(|(id, _)| id).find(|id| id.name == name).ok_or("it does not train")?;
            let of = |place| of_network(spec.local, place, &gradients);
            close(&name.to_string(), &of((number % linears, linears))?, &of((0, 1))?, &id)?;
            compared += 1;
        }
    }
    assert!(compared > 0, "nothing was compared");
    Ok(())
}
