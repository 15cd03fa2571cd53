//! What a run leaves behind: an adapter or a model, a merged model, a report. The same run gives the same bytes: no times,
//! no speeds, no paths.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use attune_adapt::joined::joined;
use attune_adapt::peft::{self, Part};
use attune_adapt::{headed, held};
use attune_artifacts::formats::card::Card;
use attune_artifacts::formats::sentence_transformers;
use attune_models::{Base, export};
use attune_points::adapter::Compacted;
use attune_points::{Params, Theta};
use attune_spec::job::plan::Input;
use attune_spec::job::{HeadTask, MergedInto};
use candle_core::DType;
use serde::Serialize;

use crate::calibration;
use crate::checkpoint::{self, Measured, State};
use crate::component::SharesOfSlots;
use crate::engine::params;
use crate::error::Error;
use crate::experts;
use crate::few;
use crate::merged;
use crate::pin;
use crate::protocol::{OutputKind, OutputRole, Request};
use crate::setup::{Prepared, operated};

/// An output folder.
pub(crate) struct Output {
    pub(crate) role: OutputRole,
    pub(crate) kind: OutputKind,
    pub(crate) folder: PathBuf,
}

/// What was measured, as kept beside the result.
#[derive(Debug, Serialize)]
struct Report<'a> {
    steps: u64,
    tokens: u64,
    trained_parameters: u64,
    validation: &'a [Measured],
    data: &'a BTreeMap<String, attune_data::dataset::Report>,
    documents: BTreeMap<&'a str, u64>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    ranks: &'a SharesOfSlots,
}

/// Whether what trains has no layout of its own, and is kept as a model.
fn is_whole(prepared: &Prepared) -> bool {
    let slots = prepared.shared.model.stack().slots();
    prepared.trained_slots.iter().any(|at| slots[*at].adapter().peft().is_none())
}

/// Says before the first step what would come out after the last: that a component has to stay beside this base.
///
/// # Errors
/// The sites that do not merge, and why.
pub(crate) fn check(request: &Request, prepared: &Prepared, theta: &Theta) -> Result<(), Error> {
    if !request.plan.merged && !is_whole(prepared) {
        return Ok(());
    }
    let model = &prepared.shared.model;
    merged::check(model.base(), model.stack(), theta, |at| !prepared.shared.turns.has(at))
}

/// Writes all outputs of a finished run, and what its steps have found out.
pub(crate) fn write(
    request: &Request,
    prepared: &Prepared,
    theta: &Theta,
    state: &State,
    found: Option<&serde_json::Value>,
) -> Result<Vec<Output>, Error> {
    let mut outputs = Vec::new();
    let dtype = attune_models::base::dtype(request.plan.precision);
    let whole_model = is_whole(prepared);
    if whole_model {
        let folder = request.work.join("model");
        model(request, prepared, prepared.shared.model.base(), theta, dtype, &folder)?;
        outputs.push(Output { role: OutputRole::Result, kind: OutputKind::Model, folder });
    } else {
        let base_name = match &request.plan.base {
            Input::Artifact(digest) => digest.to_string(),
            // A path means nothing elsewhere, so the base is named by its content.
            Input::Path(_) | Input::Url(_) => pin::content(&prepared.base_folder)?.to_string(),
        };
        // What trains modules whole goes with the first of the others; by itself it has a folder of its own.
        let is_beside = |at: &&usize| prepared.shared.model.stack().slots()[**at].adapter().is_kept_beside();
        let saved: Vec<usize> = prepared.trained_slots.iter().filter(is_beside).copied().collect();
        let (adapters, saved) = match prepared.trained_slots.iter().find(|at| !is_beside(at)) {
            Some(_) => (prepared.trained_slots.iter().filter(|at| !is_beside(at)).copied().collect(), saved),
            None => (saved, Vec::new()),
        };
        for (number, at) in adapters.into_iter().enumerate() {
            let name = &request.plan.stack[at].name;
            let (role, folder) = match number {
                0 => (OutputRole::Result, "adapter".to_owned()),
                _ => (OutputRole::Further(name.clone()), format!("adapter-{name}")),
            };
            let folder = request.work.join(folder);
            let saved = if number == 0 { saved.as_slice() } else { &[] };
            adapter(request, prepared, theta, state, (at, saved, &base_name), &folder)?;
            // Others go with it: by themselves they lack the head.
            if let (0, Some(head)) = (number, &request.plan.head) {
                let width = prepared.shared.model.base().architecture().hidden;
                headed::write(&folder, head, width, Some(request.plan.max_length))?;
            }
            outputs.push(Output { role, kind: OutputKind::Adapter, folder });
        }
    }
    if request.plan.merged && !whole_model {
        let folder = request.work.join("merged");
        match request.plan.merged_into {
            // Read once more: the run had it in few bits only.
            Some(MergedInto::Base) => {
                let base = few::open_of(&request.plan, &prepared.base_folder, None)?;
                model(request, prepared, &operated(base, &request.plan)?, theta, dtype, &folder)?;
            }
            Some(MergedInto::Dequantized) | None => {
                model(request, prepared, prepared.shared.model.base(), theta, dtype, &folder)?;
            }
        }
        outputs.push(Output { role: OutputRole::Merged, kind: OutputKind::Model, folder });
    }
    if request.plan.keep_statistics {
        let folder = calibration::kept(&request.work);
        outputs.push(Output { role: OutputRole::Statistics, kind: OutputKind::Statistics, folder });
    }
    let folder = request.work.join("report");
    std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    let report = Report {
        steps: state.step.0,
        tokens: state.tokens.0,
        trained_parameters: prepared.shared.trained_parameters(),
        validation: &state.validation,
        data: &prepared.reports,
        documents: prepared
            .domains
            .iter()
            .map(|domain| domain.name.as_str())
            .zip(state.data.counters.documents.iter().copied())
            .collect(),
        ranks: &prepared.shares,
    };
    let path = folder.join("report.json");
    let mut text = serde_json::to_string_pretty(&report).unwrap_or_default();
    text.push('\n');
    std::fs::write(&path, text).map_err(Error::io(path))?;
    if let Some(found) = found {
        let path = folder.join("found.json");
        let text = format!("{}\n", serde_json::to_string_pretty(found).unwrap_or_default());
        std::fs::write(&path, text).map_err(Error::io(path))?;
    }
    if let Some(together) = experts::together(prepared, theta)? {
        let path = folder.join("experts.json");
        let text = serde_json::to_vec(&together).unwrap_or_default();
        std::fs::write(&path, text).map_err(Error::io(path))?;
    }
    outputs.push(Output { role: OutputRole::Report, kind: OutputKind::Report, folder });
    Ok(outputs)
}

/// Writes what the slot `at` became, with what was taken out of the base for it and the modules that slots `saved` trained whole.
fn adapter(
    request: &Request,
    prepared: &Prepared,
    theta: &Theta,
    state: &State,
    (at, saved, base_name): (usize, &[usize], &str),
    folder: &Path,
) -> Result<(), Error> {
    let model = &prepared.shared.model;
    let (slot, architecture) = (&model.stack().slots()[at], model.base().architecture());
    let attachments: Vec<_> = slot.attachments().cloned().collect();
    let trained = params(theta, at).cloned().unwrap_or_default();
    let card = card(request, at, base_name, state);
    let beside = theta.beside.get(&(at as u16));
    let (mut whole, mut of_whole) = (Vec::new(), Params::new());
    for &at in saved {
        whole.extend(model.stack().slots()[at].attachments().cloned());
        for (name, tensor) in params(theta, at).into_iter().flat_map(Params::iter) {
            of_whole.insert(name.clone(), tensor.clone());
        }
    }
    let saved = saved.first().map(|&at| Part {
        adapter: model.stack().slots()[at].adapter(),
        attachments: &whole,
        params: &of_whole,
    });
    let write = |part: Part<'_>| peft::write(folder, part, saved, architecture, base_name, &card);
    match beside.and_then(|beside| params(theta, usize::from(*beside))) {
        None => match slot.adapter().compacted(&attachments, &trained)? {
            None => write(Part { adapter: slot.adapter(), attachments: &attachments, params: &trained })?,
            Some(Compacted { adapter, attachments, params }) => {
                write(Part { adapter: &*adapter, attachments: &attachments, params: &params })?;
            }
        },
        Some(beside) => {
            let whole = joined(slot.adapter(), &attachments, &trained, beside, architecture)?;
            let (adapter, attachments) = (&*whole.adapter, &whole.attachments);
            write(Part { adapter, attachments, params: &whole.params })?;
        }
    }
    if let Some(held) = few::of(&request.plan) {
        let less = theta.requantized.get(&(at as u16)).and_then(|less| params(theta, usize::from(*less)));
        held::write(folder, &held, less)?;
    }
    Ok(())
}

fn card(request: &Request, slot: usize, base_name: &str, state: &State) -> String {
    let method = request.plan.stack[slot].method.as_ref().map_or("adapter", |method| method.method.as_str());
    let mut facts = vec![
        ("method", method.to_owned()),
        ("steps", state.step.to_string()),
        ("tokens", state.tokens.to_string()),
        ("seed", request.plan.seed.to_string()),
    ];
    if let Some(head) = &request.plan.head {
        facts.push(match head.task {
            HeadTask::Embedding => ("head", format!("to {}", headed::spelt(head))),
            _ => ("classes, from 0", head.labels.join(", ")),
        });
    }
    facts.extend(few::of(&request.plan).map(|held| ("base held as", few::spelt(&held))));
    let ends = (state.validation.first(), state.validation.last());
    if let (Some(before), Some(after)) = ends {
        for (set, loss) in &after.loss {
            let started = before.loss.get(set).copied().unwrap_or(f64::NAN);
            facts.push(("validation loss", format!("{set}: {started:.4} before, {loss:.4} after")));
        }
    }
    facts.extend(checkpoint::accuracies(ends).into_iter().map(|words| ("accuracy", words)));
    let card = Card {
        title: &request.name,
        base_model: Some(base_name),
        method,
        pipeline_tag: match request.plan.head.as_ref().map(|head| head.task) {
            None => "text-generation",
            Some(HeadTask::Classification) => "text-classification",
            Some(HeadTask::TokenClassification) => "token-classification",
            Some(HeadTask::Embedding) => "sentence-similarity",
        },
        facts: &facts,
    };
    card.render()
}

/// Writes a plain model folder with every component merged into `base`, in the order of the stack.
fn model(
    request: &Request,
    prepared: &Prepared,
    base: &Base,
    theta: &Theta,
    dtype: DType,
    folder: &Path,
) -> Result<(), Error> {
    let model = &prepared.shared.model;
    let replaced = merged::weights(base, model.stack(), theta, |at| !prepared.shared.turns.has(at))?;
    // A model from scratch has no weights but those: all of them are written, trained or not.
    export::write(base, &replaced, dtype, &prepared.base_folder, folder)?;
    if let Some(head) = &request.plan.head {
        if !head.labels.is_empty() {
            export::name_classes(folder, &head.labels)?;
        }
        if head.gives_vectors() {
            let (width, pooling) = (base.architecture().hidden, head.pooling.unwrap_or_default());
            sentence_transformers::write(folder, width, pooling, Some(request.plan.max_length))
                .map_err(attune_adapt::Error::from)?;
        }
    }
    Ok(())
}
