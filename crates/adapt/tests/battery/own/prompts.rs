//! Rows before documents: what they reach, and what moves them.

use std::collections::BTreeMap;

use attune_models::{Base, Pass};
use attune_points::adapter::Port;
use attune_points::{Layout, Row, TensorName};
use attune_spec::job::Targets;
use attune_spec::method::SiteKind;
use candle_core::{DType, Tensor};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Own, PLAIN};
use crate::support::{self, Setup, batch, difference};
use crate::{build, fail};

pub(super) const OWN: [(&str, Own); 5] = [
    ("cartridge::started_from_a_text_it_is_the_base_with_the_text_before_documents", text_before),
    ("multitask_prompt_tuning::one_number_scales_a_column_of_its_rows", scaled_together),
    ("adaption_prompt::a_number_at_each_site_shuts_it_off", shut),
    ("prompt_tuning::documents_know_of_its_rows_by_attention_alone", by_attention),
    ("p_tuning::one_number_moves_all_of_its_rows", moved_together),
];

/// A text of five tokens.
const TEXT: [u32; 5] = [8, 30, 2, 8, 19];

/// Documents with a text before each.
fn behind(text: &[u32], layout: &Layout) -> Layout {
    layout.begun_with(&text.iter().map(|token| Row::Token(*token)).collect::<Vec<_>>())
}

/// How far what a component answers on documents is from what the base does with a text before them.
fn off_text(setup: &Setup, text: &[u32]) -> Result<f64, Failed> {
    let (told, off) = (behind(text, &batch()), setup.theta.adapters_off());
    let logits = setup.model.logits(&Pass { theta: &off, layout: &told, dropout: None })?;
    let own = told.docs().iter().flat_map(|doc| doc.rows.clone().skip(text.len())).collect::<Vec<u32>>();
    let logits = logits.index_select(&Tensor::new(own, logits.device())?, 0)?;
    Ok(difference(&setup.logits(&batch())?, &logits))
}

/// Random keys and values are no text, nor is a change of weights.
fn text_before() -> Result<(), Failed> {
    let of = |method: Value, targets: &str, applies: SiteKind| -> Result<Setup, Failed> {
        let base = Base::random(support::architecture(), 5, DType::F32)?;
        let adapter = support::build_told(method, &TEXT).map_err(fail)?;
        Ok(Setup::on(base, adapter, &Targets::from(targets), &[applies], DType::F32))
    };
    for (length, sinks) in [(5, 1), (5, 0), (3, 2)] {
        let method = json!({"method": "cartridge", "length": length, "sinks": sinks, "start": "text", "text": "told"});
        let cartridge = of(method, "all", SiteKind::Attention)?;
        let off = off_text(&cartridge, &TEXT[..length])?;
        // Both sides compute in f32; those of the goldens' bound are logits of this size.
        assert!(off < 1e-4, "{length} keys, {sinks} of them sinks: off by {off}");
        let trains = cartridge.theta.trained().filter(|(id, _)| id.name.local().starts_with("sink")).count();
        assert_eq!(trains, 0, "sinks train");
    }
    let random = of(json!({"method": "prefix-tuning", "length": 5}), "all", SiteKind::Attention)?;
    let plain = of(json!({"method": PLAIN}), "all-linear", SiteKind::Linear)?;
    for other in [random, plain] {
        let off = off_text(&other, &TEXT)?;
        assert!(off > 0.1, "off by {off}");
    }
    Ok(())
}

fn setup(base: Base, method: Value) -> Result<Setup, Failed> {
    let (targets, applies) = match method["method"] == PLAIN {
        true => ("all-linear", SiteKind::Linear),
        false => ("all", SiteKind::Embedding),
    };
    let mut setup = Setup::on(base, build(method).map_err(fail)?, &Targets::from(targets), &[applies], DType::F64);
    setup.disturb(0.3);
    Ok(setup)
}

/// How much a component moves the logits of documents, in a base whose attentions add nothing, or what they do.
fn moves(method: Value, attends: bool) -> Result<f64, Failed> {
    let base = Base::random(support::architecture(), 5, DType::F64)?;
    let named = |name: &str| base.tensor(&TensorName::from_path(name), DType::F64);
    let tensors = base.architecture().tensors().into_iter().map(|info| {
        let tensor = named(&info.name)?;
        let silent = !attends && info.name.contains("o_proj");
        Ok((info.name, if silent { tensor.zeros_like()? } else { tensor }))
    });
    let tensors = tensors.collect::<Result<BTreeMap<String, Tensor>, attune_points::Error>>()?;
    let setup = setup(Base::from_tensors(support::architecture(), &tensors)?, method)?;
    let off = setup.theta.adapters_off();
    let without = setup.model.logits(&Pass { theta: &off, layout: &batch(), dropout: None })?;
    Ok(difference(&setup.logits(&batch())?, &without))
}

fn by_attention() -> Result<(), Failed> {
    let prompt = || json!({"method": "prompt-tuning", "length": 3});
    // As many numbers: 72 before documents, and 112 in two small factors.
    let plain = json!({"method": PLAIN, "rank": 1});
    let (seen, unseen) = (moves(prompt(), true)?, moves(prompt(), false)?);
    assert!(seen > 0.1, "documents are moved by {seen}");
    // Rows turn by their positions; where nothing looks at them, that is all the same.
    assert!(unseen < 1e-12, "documents are moved by {unseen}");
    let moved = moves(plain, false)?;
    assert!(moved > 0.1, "a change of weights moves them by {moved}");
    Ok(())
}

/// How much a component that was moved from its start moves the logits still, with one number of each site put to 0.
fn moves_without_one(method: Value, targets: &str, applies: SiteKind, local: &str) -> Result<f64, Failed> {
    let base = Base::random(support::architecture(), 5, DType::F64)?;
    let mut setup = Setup::on(base, build(method).map_err(fail)?, &Targets::from(targets), &[applies], DType::F64);
    setup.disturb(0.3);
    let off = setup.theta.adapters_off();
    let without = setup.model.logits(&Pass { theta: &off, layout: &batch(), dropout: None })?;
    assert!(difference(&setup.logits(&batch())?, &without) > 0.01, "nothing moved");
    let mut params = setup.params();
    for (name, tensor) in setup.params().iter().filter(|(name, _)| name.local() == local) {
        let mut values = tensor.flatten_all()?.to_vec1::<f64>()?;
        values[0] = 0.0;
        params.insert(name.clone(), Tensor::from_vec(values, tensor.shape(), tensor.device())?);
    }
    setup.theta = setup.with_params(params);
    Ok(difference(&setup.logits(&batch())?, &without))
}

/// A gate of 0 is the base exactly, whatever the rows behind it are; no single number of two factors is such a gate.
fn shut() -> Result<(), Failed> {
    let gated = json!({"method": "adaption-prompt", "length": 3});
    let moved = moves_without_one(gated, "all", SiteKind::Attention, "adaption_gate")?;
    assert_eq!(moved, 0.0);
    let plain = json!({"method": PLAIN, "rank": 2});
    let moved = moves_without_one(plain, "all-linear", SiteKind::Linear, "lora_B")?;
    assert!(moved > 0.01, "one number less and it moves documents by {moved}");
    Ok(())
}

/// Of an entry of the rows of a prompt of its own there is no such number, nor of a change of weights.
fn scaled_together() -> Result<(), Failed> {
    let moved = |method: Value| rows_moved(method);
    assert_eq!(moved(json!({"method": "multitask-prompt-tuning", "length": 5}))?, (5, 5));
    assert_eq!(moved(json!({"method": "prompt-tuning", "length": 5}))?, (1, 5));
    assert_eq!(moved(json!({"method": PLAIN, "rank": 1}))?, (0, 0));
    Ok(())
}

/// How many of the rows that a component makes of its parameters move with the first number of its first one.
fn rows_moved(method: Value) -> Result<(usize, usize), Failed> {
    let setup = setup(Base::random(support::architecture(), 5, DType::F64)?, method)?;
    let at = &setup.attachments[0];
    let Port::Sequence(map) = setup.adapter.port(at) else { return Ok((0, 0)) };
    let rows = |theta: &attune_points::Theta| -> Result<Vec<Vec<f64>>, Failed> {
        let set = theta.set(0, 0).ok_or("no set")?;
        Ok(map.graph(&attune_models::stack::locals(at, set)?)?.to_vec2()?)
    };
    let name = at.tensors.last().ok_or("no tensor")?.name(at.site.as_str());
    let before = setup.params().get(&name).ok_or("no value")?.clone();
    let mut values = before.flatten_all()?.to_vec1::<f64>()?;
    values[0] += 1.0;
    let moved = setup.with(&name, Tensor::from_vec(values, before.shape(), before.device())?);
    let (before, after) = (rows(&setup.theta)?, rows(&moved)?);
    let changed = before.iter().zip(&after).filter(|(before, after)| before != after).count();
    Ok((changed, before.len()))
}

/// And none of plain rows, nor of a change of weights, does so.
fn moved_together() -> Result<(), Failed> {
    for encoder in ["mlp", "lstm"] {
        let method = json!({"method": "p-tuning", "length": 5, "encoder": encoder});
        assert_eq!(rows_moved(method)?, (5, 5), "{encoder}");
    }
    assert_eq!(rows_moved(json!({"method": "prompt-tuning", "length": 5}))?, (1, 5));
    assert_eq!(rows_moved(json!({"method": PLAIN, "rank": 1}))?, (0, 0));
    Ok(())
}
