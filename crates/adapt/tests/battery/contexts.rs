//! Folders under `golden/` of what stands before documents and starts as a text, computed by PEFT (`contexts.py`).

use std::path::PathBuf;
use std::sync::Arc;

use attune_adapt::{ADAPTERS, peft};
use attune_models::{Base, Pass};
use attune_points::Grads;
use attune_points::adapter::Port;
use attune_spec::job::{Precision, Targets};
use candle_core::{DType, Tensor};
use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};

use crate::golden::{KEYS, TOLERANCE, Tensors, keep, layout, open, tensors, write, written_back};
use crate::own::steps::Slope;
use crate::support::{CrossEntropy, Setup, build_told, difference, largest};
use crate::{build, fail};

type Compare = fn(&Golden) -> Result<(), Failed>;

const CASES: [(&str, &str, Compare); 5] = [
    ("gpt2_cartridge", "gpt2", cartridge),
    ("llama_cartridge", "llama", cartridge),
    ("qwen2_cartridge", "qwen2", cartridge),
    ("gpt2_context", "gpt2", prompt),
    ("llama_context", "llama", prompt),
];

pub(crate) fn trials() -> impl Iterator<Item = Trial> {
    let trial = |(case, base, run): (&'static str, &'static str, Compare)| {
        Trial::test(format!("golden::{case}::agrees_with_peft"), move || run(&Golden { case, base }))
    };
    CASES.into_iter().map(trial)
}

/// A case and the base that it was made on.
struct Golden {
    case: &'static str,
    base: &'static str,
}

impl Golden {
    fn folder(&self) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(self.case)
    }

    fn opened(&self, name: &str) -> Result<Tensors, Failed> {
        open(self.folder().join(name))?.ok_or_else(|| Failed::from(format!("no {name}")))
    }

    /// The configuration as PEFT wrote it.
    fn config(&self) -> Result<Value, Failed> {
        Ok(serde_json::from_slice(&std::fs::read(self.folder().join("adapter/adapter_config.json"))?)?)
    }

    /// A component at its targets on the case's base.
    fn on(&self, method: &Value, told: Option<&[u32]>) -> Result<Setup, Failed> {
        let card = ADAPTERS.card(method["method"].as_str().ok_or("no name")?).ok_or("no card")?;
        let adapter = match told {
            Some(tokens) => build_told(method.clone(), tokens).map_err(fail)?,
            None => build(method.clone()).map_err(fail)?,
        };
        let models = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/golden");
        let base = Base::open(&models.join(self.base), Precision::F32)?;
        Ok(Setup::on(base, adapter, &Targets::from(card.targets), card.applies, DType::F32))
    }

    /// The gradients of a component that answers as PEFT's does.
    fn gradients(&self, setup: &Setup) -> Result<Grads, Failed> {
        let expected = self.opened("expected.safetensors")?;
        let layout = setup.begun(&layout(&expected)?);
        let pass = Pass { theta: &setup.theta, layout: &layout, dropout: None };
        let off = difference(&setup.model.logits(&pass)?, &expected["logits"]);
        assert!(off < TOLERANCE, "logits are off by {off}");
        let mut sink = Grads::wanting(setup.theta.trained().map(|(id, _)| id));
        let report = setup.model.grad(&pass, &CrossEntropy, 1.0 / layout.counts().tokens as f64, &mut sink)?;
        let loss: f64 = expected["loss"].to_dtype(DType::F64)?.to_vec1::<f64>()?[0];
        assert!((report.mean() - loss).abs() < TOLERANCE * loss, "the loss is {} against {loss}", report.mean());
        Ok(sink)
    }

    /// Leaves what we write of it for PEFT to read, where that is asked for.
    fn keep(&self, setup: &Setup) -> Result<(), Failed> {
        let Some(folder) = std::env::var_os("ATTUNE_WRITTEN") else { return Ok(()) };
        keep(setup, &PathBuf::from(folder).join(self.case), self.base, &self.folder().join("expected.safetensors"))
    }
}

/// What trains and what does not of keys and values that stand side by side, layer after layer.
fn parted(setup: &Setup, whole: &Tensor) -> Result<Vec<(String, Tensor)>, Failed> {
    let k = setup.model.base().architecture().kv_width();
    let mut parts = Vec::new();
    for (layer, at) in setup.attachments.iter().enumerate() {
        let Port::Attention(map) = setup.adapter.port(at) else { return Err("another port".into()) };
        let columns = |which: usize| whole.narrow(1, (2 * layer + which) * k, k)?.contiguous();
        let made_of = map.tensors(&columns(0)?, &columns(1)?)?.ok_or("made of something else")?;
        parts.extend(made_of.into_iter().map(|(local, part)| (format!("{}.{local}", at.site), part)));
    }
    Ok(parts)
}

/// Keys and values that start as a text's, the first of which do not train.
fn cartridge(golden: &Golden) -> Result<(), Failed> {
    let folder = peft::read(&golden.folder().join("adapter"))?;
    let method = serde_json::to_value(&folder.method)?;
    let mut setup = golden.on(&method, None)?;
    setup.theta = setup.with_params(folder.params(&*setup.adapter, &setup.attachments)?);
    let sink = golden.gradients(&setup)?;
    let mut compared = 0;
    for (name, reference) in parted(&setup, &golden.opened("gradients.safetensors")?["prompt_embeddings"])? {
        match sink.iter().find(|(id, _)| id.name.to_string() == name) {
            Some((_, gradient)) => {
                let off = difference(gradient.ok_or("no gradient")?, &reference) / largest(&reference);
                assert!(off < TOLERANCE, "the gradient of {name} is off by a factor of {off}");
                compared += 1;
            }
            None => assert_eq!(largest(&reference), 0.0, "{name} trains"),
        }
    }
    assert_eq!(compared, 2 * setup.attachments.len());
    written_back(&setup, &golden.folder().join("adapter"))?;
    golden.keep(&setup)?;

    // What the base makes of a text.
    let start = golden.opened("start.safetensors")?;
    let text: Vec<u32> = start["text"].to_dtype(DType::U32)?.to_vec1()?;
    let mut told = method;
    told["start"] = "text".into();
    told["text"] = "told".into();
    let told = golden.on(&told, Some(&text))?.params();
    for (name, reference) in parted(&setup, &start["prompt_embeddings"])? {
        let (_, found) = told.iter().find(|(own, _)| own.to_string() == name).ok_or("no such tensor")?;
        let off = difference(found, &reference);
        assert!(off < TOLERANCE, "{name} starts off by {off}");
    }
    Ok(())
}

/// Demonstrations that moved a little, which PEFT keeps as rows.
fn prompt(golden: &Golden) -> Result<(), Failed> {
    let said = golden.config()?;
    let method = json!({
        "method": "context-aware-prompt",
        "tokens": said["cpt_token_ids"],
        "types": said["cpt_tokens_type_mask"],
        "bound": said["opt_projection_epsilon"],
        "format_bound": said["opt_projection_format_epsilon"],
        "decay": said["opt_loss_decay_factor"],
    });
    let mut setup = golden.on(&method, None)?;
    let moved = golden.opened("delta.safetensors")?;
    let (id, _) = setup.theta.trained().next().ok_or("nothing trains")?;
    setup.theta = setup.with(&id.name, moved["delta"].clone());
    let sink = golden.gradients(&setup)?;
    let (gradient, reference) =
        (sink.get(&id).ok_or("no gradient")?, &golden.opened("gradients.safetensors")?["delta"]);
    let off = difference(gradient, reference) / largest(reference);
    assert!(off < TOLERANCE, "the gradient is off by a factor of {off}");

    // A step by PEFT's own loss, in which the demonstrations' labels count.
    let (expected, stepped) = (golden.opened("expected.safetensors")?, golden.opened("step.safetensors")?);
    let number = |name: &str| -> Result<f64, Failed> { Ok(stepped[name].to_dtype(DType::F64)?.to_vec1::<f64>()?[0]) };
    let layout = Arc::new(setup.begun(&layout(&expected)?));
    let mut slope = Slope { setup: setup.clone_with(setup.theta.clone()), layout, lr: number("rate")? };
    let (mut found, loss) = (0.0, number("loss")?);
    slope.steps(1, |_, report, _| {
        found = report.loss.mean();
        Ok(())
    })?;
    assert!((found - loss).abs() < TOLERANCE * loss, "the loss with labels is {found} against {loss}");
    let after = slope.setup.theta.get(&id).ok_or("no value")?;
    let (off, moved) = (difference(after, &stepped["delta"]), difference(&moved["delta"], &stepped["delta"]));
    assert!(off < TOLERANCE && moved > 100.0 * TOLERANCE, "a step of up to {moved} is off by {off}");

    // PEFT's file, and ours, hold the rows that were made.
    let written = tempfile::tempdir()?;
    write(&setup, &setup.params(), written.path())?;
    let ours: Value = serde_json::from_slice(&std::fs::read(written.path().join("adapter_config.json"))?)?;
    let own = [
        "cpt_token_ids",
        "cpt_mask",
        "cpt_tokens_type_mask",
        "opt_weighted_loss_type",
        "opt_loss_decay_factor",
        "opt_projection_epsilon",
        "opt_projection_format_epsilon",
    ];
    for key in KEYS.iter().chain(&own) {
        assert_eq!(ours[key], said[key], "{key}");
    }
    let (ours, theirs) = (tensors(written.path())?, tensors(&golden.folder().join("adapter"))?);
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
    assert!(ours.iter().all(|(name, rows)| difference(rows, &theirs[name]) < TOLERANCE));
    golden.keep(&setup)?;
    let read = peft::read(&golden.folder().join("adapter"))?;
    let mut rows = golden.on(&serde_json::to_value(&read.method)?, None)?;
    rows.theta = rows.with_params(read.params(&*rows.adapter, &rows.attachments)?);
    golden.gradients(&rows).map(drop)
}
