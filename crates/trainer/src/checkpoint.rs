//! The whole state of a run in a folder: values, optimiser buffers, counters. It holds everything, or it is an error.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use attune_artifacts::formats::safetensors::{Dtype, Due, write_as_due};
use attune_data::loader;
use attune_points::{Owner, Params, TensorId, TensorName, Theta};
use attune_spec::id::{Digest, Step, Tokens};
use attune_tensor::bytes;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::component::SharesOfSlots;
use crate::error::Error;
use crate::guard::Guard;
use crate::pin::{self, Pins};

/// The version of this layout.
const FORMAT: u32 = 2;
const STATE_FILE: &str = "state.json";
const VALUES_FILE: &str = "values.safetensors";
const BUFFERS_FILE: &str = "optimizer.safetensors";
const RULE_FILE: &str = "step_rule.safetensors";

/// Everything of a run that is no tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    /// The version of the layout.
    pub(crate) format: u32,
    /// The plan that the run follows.
    pub(crate) plan: Digest,
    /// The code that wrote it.
    pub(crate) code_version: String,
    /// The kernel profiles that the run was computed with so far, in order of use.
    pub(crate) kernel_profiles: Vec<String>,
    /// Steps done.
    pub(crate) step: Step,
    /// Tokens seen.
    pub(crate) tokens: Tokens,
    /// The data's counters and the mixing method's state.
    pub(crate) data: loader::State,
    /// What the guard has seen.
    pub(crate) guard: Guard,
    /// Validation loss by set at each step where it was measured.
    pub(crate) validation: Vec<Measured>,
    /// Content digests of inputs that are read where they lie.
    pub(crate) pinned: Pins,
    /// The ranks that a budget has given the sites of what trains; nothing without one.
    #[serde(default, skip_serializing_if = "SharesOfSlots::is_empty")]
    pub(crate) shares: SharesOfSlots,
}

/// Validation losses at a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Measured {
    /// Steps done.
    pub(crate) step: Step,
    /// Mean loss a supervised token, by set.
    pub(crate) loss: BTreeMap<String, f64>,
    /// Share of documents or words whose likeliest class is their own, by set, of a head over classes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) accuracy: BTreeMap<String, f64>,
}

/// What share of classes was found before and after, set by set, in words; nothing for a head over tokens.
pub(crate) fn accuracies((before, after): (Option<&Measured>, Option<&Measured>)) -> Vec<String> {
    let after = after.into_iter().flat_map(|after| &after.accuracy);
    let started = |set: &str| before.and_then(|before| before.accuracy.get(set)).copied().unwrap_or(f64::NAN);
    after.map(|(set, share)| format!("{set}: {:.4} before, {share:.4} after", started(set))).collect()
}

/// Optimiser buffers by tensor and name.
pub(crate) type Buffers = BTreeMap<TensorId, Vec<Vec<f32>>>;

/// One buffer of a checkpoint: its name there, whose it is, which of that tensor's, and how long it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Buffer {
    pub(crate) name: String,
    pub(crate) of: TensorId,
    pub(crate) place: usize,
    pub(crate) length: usize,
}

/// All buffers of a run in the order of their file, of each tensor's names and lengths.
pub(crate) fn buffers<'t>(all: impl IntoIterator<Item = (&'t TensorId, Vec<(&'static str, usize)>)>) -> Vec<Buffer> {
    let of_tensor = |(id, of): (&'t TensorId, Vec<(&'static str, usize)>)| {
        let named = of.into_iter().enumerate();
        let made = named.map(|(place, (name, length))| Buffer {
            name: format!("{}/{name}", key(id)),
            of: id.clone(),
            place,
            length,
        });
        made.collect::<Vec<_>>()
    };
    let mut all: Vec<Buffer> = all.into_iter().flat_map(of_tensor).collect();
    all.sort();
    all
}

/// Writes a checkpoint into `folder`, which is made. `rule` is the step rule's state; `give` gives the numbers of each of the
/// buffers in turn.
pub(crate) fn save(
    folder: &Path,
    state: &State,
    theta: &Theta,
    rule: BTreeMap<String, Tensor>,
    buffers: &[Buffer],
    mut give: impl FnMut(&Buffer, &mut dyn FnMut(&[f32]) -> std::io::Result<()>) -> Result<(), Error>,
) -> Result<(), Error> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let values: BTreeMap<String, Tensor> = theta.held().map(|(id, tensor)| (key(&id), tensor.clone())).collect();
    write(&folder.join(VALUES_FILE), values)?;
    let due = |buffer: &Buffer| Due { name: buffer.name.clone(), dtype: Dtype::F32, shape: vec![buffer.length] };
    let due: Vec<Due> = buffers.iter().map(due).collect();
    let mut lost = None;
    let path = folder.join(BUFFERS_FILE);
    let written = write_as_due(&path, &due, &BTreeMap::new(), |place, file| {
        let mut put = |numbers: &[f32]| file.write_all(&bytes::of_f32(numbers));
        give(&buffers[place], &mut put).map_err(|error| {
            let message = error.to_string();
            lost = Some(error);
            std::io::Error::other(message)
        })
    });
    match (written, lost) {
        (_, Some(error)) => return Err(error),
        (Err(error), None) => return Err(unwritten(folder, &error)),
        (Ok(()), None) => {}
    }
    write(&folder.join(RULE_FILE), rule)?;
    let path = folder.join(STATE_FILE);
    let text = serde_json::to_vec_pretty(&State { format: FORMAT, ..state.clone() })
        .map_err(|error| wrong(folder, error.to_string()))?;
    std::fs::write(&path, text).map_err(Error::io(path))
}

/// Reads the state of a checkpoint that must be of the plan `plan`, and of inputs that have not changed since.
pub(crate) fn load_state(folder: &Path, plan: Digest, pinned: &Pins) -> Result<State, Error> {
    let state = read_state(folder)?;
    if state.format != FORMAT {
        return Err(wrong(folder, format!("has format {}; this build reads {FORMAT}", state.format)));
    }
    if state.plan != plan {
        return Err(wrong(folder, format!("is of plan {}; this run follows {plan}", state.plan)));
    }
    pin::unchanged(&state.pinned, pinned)?;
    Ok(state)
}

fn read_state(folder: &Path) -> Result<State, Error> {
    let path = folder.join(STATE_FILE);
    let text = std::fs::read(&path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|error| wrong(folder, format!("{STATE_FILE}: {error}")))
}

/// Reads the ranks of sites alone: they say what tensors a checkpoint has. Whose it is, [`load_state`] sees to.
pub(crate) fn load_shares(folder: &Path) -> Result<SharesOfSlots, Error> {
    Ok(read_state(folder)?.shares)
}

/// Reads the values of some tensors alone, in place of those that are there: the base itself depends on them.
pub(crate) fn load_some(folder: &Path, slot: u16, params: &mut Params) -> Result<(), Error> {
    let mut values = read(&folder.join(VALUES_FILE))?;
    let names: Vec<(TensorName, Vec<usize>)> =
        params.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect();
    for (name, shape) in names {
        let id = TensorId { owner: Owner::Bank { slot, set: 0 }, name };
        let tensor = take(folder, VALUES_FILE, &mut values, &key(&id), &shape)?;
        params.insert(id.name, tensor);
    }
    Ok(())
}

/// Reads the step rule's state.
pub(crate) fn load_rule(folder: &Path) -> Result<BTreeMap<String, Tensor>, Error> {
    read(&folder.join(RULE_FILE))
}

/// Reads the values of trained components into those of a fresh run, which say what has to be there, and those of `buffers` that are
/// among the `known` ones.
pub(crate) fn load_tensors(
    folder: &Path,
    theta: &mut Theta,
    known: &[Buffer],
    buffers: &mut Buffers,
) -> Result<(), Error> {
    let mut values = read(&folder.join(VALUES_FILE))?;
    let ids: Vec<(TensorId, Vec<usize>)> = theta.held().map(|(id, tensor)| (id, tensor.dims().to_vec())).collect();
    for (id, shape) in ids {
        let tensor = take(folder, VALUES_FILE, &mut values, &key(&id), &shape)?;
        theta.put(&id, tensor);
    }
    none_left(folder, VALUES_FILE, &values)?;
    let flat = attune_tensor::Mapped::open(&folder.join(BUFFERS_FILE)).map_err(attune_models::Error::from)?;
    let mut left: BTreeSet<&str> = flat.names().collect();
    for buffer in known {
        left.remove(buffer.name.as_str());
        let found = flat.get_number(&buffer.name).map_err(attune_models::Error::from)?;
        let found = found.ok_or_else(|| missing(folder, BUFFERS_FILE, &buffer.name))?;
        if found.shape() != [buffer.length] {
            return Err(misshaped(folder, BUFFERS_FILE, &buffer.name, found.shape(), &[buffer.length]));
        }
        // Of what others keep, that it is there is all that matters here.
        if let Some(own) = buffers.get_mut(&buffer.of).and_then(|own| own.get_mut(buffer.place)) {
            *own = found.to_numbers()?.to_vec1()?;
        }
    }
    match left.first() {
        None => Ok(()),
        Some(name) => Err(unknown(folder, BUFFERS_FILE, name)),
    }
}

pub(crate) fn wrong(folder: &Path, message: String) -> Error {
    Error::Checkpoint { folder: folder.to_owned(), message }
}

fn key(id: &TensorId) -> String {
    match id.owner {
        Owner::Base => format!("base/{}", id.name),
        Owner::Input => format!("input/{}", id.name),
        Owner::Bank { slot, set } => format!("{slot}/{set}/{}", id.name),
    }
}

fn write(path: &Path, tensors: BTreeMap<String, Tensor>) -> Result<(), Error> {
    let folder = path.parent().unwrap_or(path);
    safetensors::serialize_to_file(tensors, None, path).map_err(|error| unwritten(folder, &error))
}

/// A file of a checkpoint that was not written: by the system's own account, where it has one, so that a full disk is called one.
fn unwritten(folder: &Path, error: &(dyn std::error::Error + 'static)) -> Error {
    let mut at = Some(error);
    while let Some(cause) = at {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            let source = io.raw_os_error().map_or_else(|| io.kind().into(), std::io::Error::from_raw_os_error);
            return Error::Io { path: folder.to_owned(), source };
        }
        at = cause.source();
    }
    wrong(folder, error.to_string())
}

fn read(path: &Path) -> Result<BTreeMap<String, Tensor>, Error> {
    let mapped = attune_tensor::Mapped::open(path).map_err(attune_models::Error::from)?;
    let names: Vec<String> = mapped.names().map(str::to_owned).collect();
    let mut tensors = BTreeMap::new();
    for name in names {
        if let Some(tensor) = mapped.get_number(&name).map_err(attune_models::Error::from)? {
            tensors.insert(name, tensor.to_numbers()?);
        }
    }
    Ok(tensors)
}

fn take(
    folder: &Path,
    file: &str,
    tensors: &mut BTreeMap<String, Tensor>,
    name: &str,
    shape: &[usize],
) -> Result<Tensor, Error> {
    let tensor = tensors.remove(name).ok_or_else(|| missing(folder, file, name))?;
    if tensor.dims() == shape { Ok(tensor) } else { Err(misshaped(folder, file, name, tensor.dims(), shape)) }
}

fn missing(folder: &Path, file: &str, name: &str) -> Error {
    wrong(folder, format!("{file} has no tensor {name:?}"))
}

fn misshaped(folder: &Path, file: &str, name: &str, found: &[usize], shape: &[usize]) -> Error {
    wrong(folder, format!("{file}: tensor {name:?} has shape {found:?}; this run makes it {shape:?}"))
}

fn unknown(folder: &Path, file: &str, name: &str) -> Error {
    wrong(folder, format!("{file} has tensor {name:?}, which this run does not know"))
}

fn none_left(folder: &Path, file: &str, tensors: &BTreeMap<String, Tensor>) -> Result<(), Error> {
    match tensors.keys().next() {
        None => Ok(()),
        Some(name) => Err(unknown(folder, file, name)),
    }
}
