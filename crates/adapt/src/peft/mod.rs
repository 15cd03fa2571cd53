//! Adapter folders in Hugging Face PEFT's layout: `adapter_config.json`, `adapter_model.safetensors`, a model card.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use attune_artifacts::formats::peft::{CONFIG_FILE, PREFIX, WEIGHTS_FILE};
use attune_artifacts::formats::safetensors::{self, Dtype};
use attune_points::adapter::{Adapter, Attachment, Peft, PeftTensors, Port};
use attune_points::{Locals, Params, TensorName, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::MethodRef;
use attune_tensor::{Mapped, Rng};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde_json::{Map, Value};

use crate::adapters::{self, FROM_PEFT};
use crate::error::Error;
use crate::fused::unfused;

mod write;

pub use write::write;

/// How the names begin of tensors that belong to the whole base model: without a module's path.
const ROOT: &str = "base_model.";

/// The key by which PEFT says that the base's layers are repeated, and the only type for which it does so.
const REPEATS: &str = "layer_replication";
const REPEATING: &str = "LORA";

/// How the names end of the vectors by which PEFT compresses what its VeLoRA saves for the way back: what is computed forward, and so
/// what a folder means, does not depend on them.
const SAVES: &str = ".lora_velora_embed";

/// The key of modules that are kept whole.
const SAVED: &str = "modules_to_save";

/// The key of what the model is for.
const TASK: &str = "task_type";

/// The task of models that give vectors, which are a trunk alone.
const OF_TRUNK: &str = "FEATURE_EXTRACTION";

/// How the names end of weights of the base that PEFT keeps beside adapters at tables of tokens.
const OF_BASE: &str = ".base_layer.weight";

/// An adapter folder, read but not yet attached to a base.
#[derive(Debug)]
pub struct Folder {
    /// The method with its parameters.
    pub method: MethodRef,
    /// The sites.
    pub targets: Targets,
    /// The ranges whose layers are those of the base that it was trained on, where that repeats layers of the one that it names.
    pub ranges: Option<Vec<[u32; 2]>>,
    /// The modules that it keeps whole beside the adapter, as a component of their own.
    pub saved: Option<Box<Self>>,
    /// What the base is called that it was trained on: a hub id, a digest, or whatever else stands there.
    pub base: Option<String>,
    path: std::path::PathBuf,
    tensors: BTreeMap<String, Tensor>,
    /// Weights of the base, by module.
    of_base: BTreeMap<String, Tensor>,
    /// Whether it is of a trunk alone.
    of_trunk: bool,
}

/// A component as a folder keeps it.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    /// The component.
    pub adapter: &'a dyn Adapter,
    /// Where it is.
    pub attachments: &'a [Attachment],
    /// Its tensors.
    pub params: &'a Params,
}

/// Reads an adapter folder. Tensors of floats are widened to 32 bits.
///
/// # Errors
/// [`Error`] naming the file and the key or tensor at fault.
pub fn read(folder: &Path) -> Result<Folder, Error> {
    let mut config = read_config(folder)?;
    let saved = saved_modules(&mut config)
        .map_err(|fault| Error::Unsupported { folder: folder.to_owned(), faults: vec![fault] })?;
    let file = folder.join(WEIGHTS_FILE);
    // The header is checked as untrusted input before anything is mapped.
    let header = safetensors::Header::read(&file)?;
    let mapped = Mapped::open(&file)?;
    let (mut tensors, mut of_base, mut kept) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for (name, info) in header.tensors() {
        if info.dtype == Dtype::I32 {
            tensors.insert(name.clone(), integers(&file, info)?);
        } else if let Some(tensor) = mapped.get_number(name)? {
            let tensor = tensor.to_numbers()?;
            if let Some(module) = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(OF_BASE)) {
                of_base.insert(module.to_owned(), tensor);
            } else if of_saved(name, &saved).is_some() {
                kept.insert(name.clone(), tensor);
            } else if !is_off(name, &tensor) && !name.ends_with(SAVES) {
                tensors.insert(name.clone(), tensor);
            }
        }
    }
    let unsupported = |faults| Error::Unsupported { folder: folder.to_owned(), faults };
    let ranges = ranges_of(&config, folder)?;
    let base = config.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned);
    let of_trunk = config.get(TASK).and_then(Value::as_str) == Some(OF_TRUNK);
    let of = |(method, targets), tensors, of_base, saved| Folder {
        of_trunk,
        method,
        targets,
        ranges: ranges.clone(),
        base: base.clone(),
        saved,
        path: folder.to_owned(),
        tensors,
        of_base,
    };
    let modules_of = |kept: &BTreeMap<String, Tensor>| {
        let modules: BTreeSet<&str> = kept.keys().filter_map(|name| of_saved(name, &saved)).collect();
        adapters::saved(modules.into_iter().map(str::to_owned).collect())
    };
    if config.get("target_modules") == Some(&adapters::nowhere()) && !kept.is_empty() {
        return Ok(of(modules_of(&kept), kept, BTreeMap::new(), None));
    }
    unfused(&mut config, &mut tensors).map_err(unsupported)?;
    let peft_type = config.get("peft_type").and_then(Value::as_str).unwrap_or_default();
    let mut of_type = FROM_PEFT.iter().filter(|reader| reader.peft_type.is_none_or(|known| known == peft_type));
    let reader = of_type.find(|reader| (reader.claims)(&config)).ok_or_else(|| {
        let known: BTreeSet<&str> = FROM_PEFT.iter().filter_map(|reader| reader.peft_type).collect();
        let known: Vec<&str> = known.into_iter().collect();
        let message = format!("is {peft_type:?}; this version reads {}", known.join(", "));
        unsupported(vec![Fault::new("peft_type", message)])
    })?;
    let own = (reader.read)(&config, &modules(&tensors)).map_err(unsupported)?;
    let saved = (!kept.is_empty()).then(|| Box::new(of(modules_of(&kept), kept, BTreeMap::new(), None)));
    Ok(of(own, tensors, of_base, saved))
}

/// Takes the modules that are kept whole out of a configuration, so that it is of the adapter alone.
fn saved_modules(config: &mut Map<String, Value>) -> Result<Vec<String>, Fault> {
    let said = config.insert(SAVED.to_owned(), Value::Null).unwrap_or_default();
    let names: Result<Option<Vec<String>>, _> = serde_json::from_value(said.clone());
    names.map(Option::unwrap_or_default).map_err(|_| Fault::new(SAVED, format!("is {said}; expected names of modules")))
}

/// The module of a tensor, if it is one of these or in one of them.
fn of_saved<'n>(name: &'n str, saved: &[String]) -> Option<&'n str> {
    let (module, _) = name.strip_prefix(PREFIX)?.rsplit_once('.')?;
    let within = |name: &String| format!(".{module}.").contains(&format!(".{name}."));
    saved.iter().any(within).then_some(module)
}

/// What [`read`] would say of layers that are repeated.
///
/// # Errors
/// [`Error`] for a configuration that cannot be read.
pub fn ranges(folder: &Path) -> Result<Option<Vec<[u32; 2]>>, Error> {
    ranges_of(&read_config(folder)?, folder)
}

/// Other types than LoRA do not repeat layers, whatever stands there.
fn ranges_of(config: &Map<String, Value>, folder: &Path) -> Result<Option<Vec<[u32; 2]>>, Error> {
    let said = config.get(REPEATS).filter(|_| config.get("peft_type").is_some_and(|of| of == REPEATING));
    let Some(said) = said.filter(|said| !said.is_null()) else { return Ok(None) };
    let unsupported = |error: serde_json::Error| {
        let message = format!("is {said}; expected ranges of layers, such as [[0, 16], [8, 24]]: {error}");
        Error::Unsupported { folder: folder.to_owned(), faults: vec![Fault::new(REPEATS, message)] }
    };
    serde_json::from_value(said.clone()).map(Some).map_err(unsupported)
}

/// Whether a tensor is the zeros that PEFT keeps in the place of something that is off.
fn is_off(name: &str, tensor: &Tensor) -> bool {
    let values = || tensor.flatten_all().and_then(|values| values.to_vec1::<f32>());
    name.ends_with(".zeros") && values().is_ok_and(|values| values.iter().all(|value| *value == 0.0))
}

/// A tensor of integers, the places of sparse changes.
fn integers(file: &Path, info: &safetensors::Info) -> Result<Tensor, Error> {
    let failed =
        |source| Error::Tensor(attune_points::Error::Io { what: format!("reading {}", file.display()), source });
    let mut source = std::fs::File::open(file).map_err(failed)?;
    source.seek(SeekFrom::Start(info.bytes.start)).map_err(failed)?;
    // The header was held to the file's length.
    let mut bytes = vec![0; (info.bytes.end - info.bytes.start) as usize];
    source.read_exact(&mut bytes).map_err(failed)?;
    let values = bytes.chunks_exact(4).map(|word| i64::from(i32::from_le_bytes([word[0], word[1], word[2], word[3]])));
    Ok(Tensor::from_vec(values.collect::<Vec<_>>(), info.shape.as_slice(), &Device::Cpu)?)
}

pub(crate) fn read_config(folder: &Path) -> Result<Map<String, Value>, Error> {
    let path = folder.join(CONFIG_FILE);
    let mismatch = |message: String| Error::Mismatch { file: path.clone(), message };
    let text = std::fs::read(&path).map_err(|error| mismatch(format!("cannot be read: {error}")))?;
    match serde_json::from_slice(&text) {
        Ok(Value::Object(config)) => Ok(config),
        Ok(_) => Err(mismatch("is not a JSON object".to_owned())),
        Err(error) => Err(mismatch(format!("is not JSON: {error}"))),
    }
}

/// The modules that the tensors' names speak of: between the prefix and the method's own part.
fn modules(tensors: &BTreeMap<String, Tensor>) -> Vec<String> {
    let module = |name: &String| {
        let rest = name.strip_prefix(PREFIX)?;
        // The method's part is what follows the module: `lora_A.weight`, `ia3_l`, …
        let rest = rest.strip_suffix(".weight").unwrap_or(rest);
        Some(rest[..rest.rfind('.')?].to_owned())
    };
    tensors.keys().filter_map(module).collect::<BTreeSet<_>>().into_iter().collect()
}

impl Folder {
    /// Weights of the base that the folder has beside the adapter, by module, in 32 bits: PEFT keeps tables of tokens so that an adapter
    /// goes with those that it was trained beside. They have to be the base's own.
    pub fn of_base(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.of_base.iter().map(|(module, weight)| (module.as_str(), weight))
    }

    /// Finds what the folder leaves out because the weights of the base say it: [`Adapter::said_by_base`]. A folder that has all of it
    /// stays as it is, and no weight is asked for.
    ///
    /// # Errors
    /// Whatever a start raises.
    pub fn complete<'w>(
        &mut self,
        adapter: &dyn Adapter,
        attachments: &[Attachment],
        weight: impl Fn(&Attachment) -> attune_points::Result<Box<dyn Weight + 'w>> + Sync,
    ) -> Result<(), Error> {
        let said = adapter.said_by_base();
        if said.is_empty() {
            return Ok(());
        }
        let tensors = self.under_head(attachments);
        let out = places(adapter, attachments).into_iter();
        let out = out.filter(|place| said.contains(&place.spec.local) && !tensors.contains_key(&place.spelt));
        let out: Vec<Place<'_>> = out.collect();
        let at = attachments.iter().filter(|at| out.iter().any(|place| place.site == at.site.as_str()));
        let at: Vec<&Attachment> = at.collect();
        let start = |at: &&Attachment| -> attune_points::Result<(String, Locals)> {
            let (locals, _) = adapter.init(at, &*weight(at)?, &mut Rng::new(0, "found"))?;
            Ok((at.site.to_string(), locals))
        };
        let started: BTreeMap<String, Locals> = at.par_iter().map(start).collect::<attune_points::Result<_>>()?;
        let found = out.iter().filter_map(|place| Some((place, started.get(place.site)?)));
        let found = found.map(|(place, locals)| Ok((place.spelt.clone(), locals.get(place.spec.local)?.clone())));
        let found: Vec<(String, Tensor)> = found.collect::<attune_points::Result<_>>()?;
        self.tensors.extend(found);
        Ok(())
    }

    /// The parameters of `adapter` at `attachments`, which were made from the folder's own method and targets.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a tensor that is missing, has another shape, or belongs to no attachment.
    pub fn params(&self, adapter: &dyn Adapter, attachments: &[Attachment]) -> Result<Params, Error> {
        let mismatch = |message: String| Error::Mismatch { file: self.path.join(WEIGHTS_FILE), message };
        let tensors = &*self.under_head(attachments);
        let mut left: BTreeSet<&String> = tensors.keys().collect();
        let mut params = Params::new();
        if let Some(Peft { tensors: PeftTensors::Joined(name), .. }) = adapter.peft() {
            left.remove(&name.to_owned());
            self.joined(name, adapter, attachments, &mut params)?;
        }
        for place in places(adapter, attachments) {
            let spelt = &place.spelt;
            let tensor = tensors.get(spelt).ok_or_else(|| mismatch(format!("has no tensor {spelt:?}")))?;
            let shape = &place.spec.shape;
            if tensor.dims() != shape {
                return Err(mismatch(misshapen(spelt, tensor, shape)));
            }
            left.remove(spelt);
            match params.get(&place.name).filter(|first| !same_bits(first, tensor)) {
                None => params.insert_declared(place.spec, place.site, tensor.clone()),
                Some(_) => {
                    let message = format!("tensor {spelt:?} is another one than those of the sites that share it");
                    return Err(mismatch(message));
                }
            }
        }
        // PEFT repeats what all sites share at each of them.
        let repeats = |name: &str| {
            let (module, local) = name.strip_prefix(PREFIX)?.rsplit_once('.')?;
            attachments.iter().find(|at| at.site.as_str() == module)?;
            let shared = tensors.get(&format!("{ROOT}{local}"))?;
            let same = shared.dims() == tensors.get(name)?.dims();
            (same && same_bits(shared, tensors.get(name)?)).then_some(())
        };
        // So it does for a head that is tied to the table of tokens.
        let local = |name: &str| name.rsplit_once('.').map(|(_, local)| local.to_owned());
        let read: Vec<&String> = tensors.keys().filter(|name| !left.contains(*name)).collect();
        let copies = |name: &str| {
            let mut alike = read.iter().filter(|other| local(other) == local(name));
            alike.any(|other| {
                let (own, other) = (&tensors[name], &tensors[other.as_str()]);
                own.dims() == other.dims() && same_bits(own, other)
            })
        };
        let copied: Vec<&String> = left.iter().filter(|name| copies(name)).copied().collect();
        left.retain(|name| repeats(name).is_none() && !copied.contains(name));
        match left.first() {
            None => Ok(params),
            Some(name) => Err(mismatch(format!("tensor {name:?} belongs to no site of the base"))),
        }
    }

    /// The tensors under the names of a model with a head: those of an adapter of a trunk alone lack the module that holds the trunk.
    fn under_head(&self, attachments: &[Attachment]) -> Cow<'_, BTreeMap<String, Tensor>> {
        let trunk = attachments.iter().find_map(|at| at.site.as_str().split_once('.').map(|(trunk, _)| trunk));
        let (Some(trunk), true) = (trunk, self.of_trunk) else { return Cow::Borrowed(&self.tensors) };
        let renamed = |name: &String| match name.strip_prefix(PREFIX) {
            Some(rest) if rest.split('.').next() != Some(trunk) => format!("{PREFIX}{trunk}.{rest}"),
            _ => name.clone(),
        };
        Cow::Owned(self.tensors.iter().map(|(name, tensor)| (renamed(name), tensor.clone())).collect())
    }

    /// The parameters that make the keys and values which stand side by side in one tensor.
    fn joined(
        &self,
        name: &str,
        adapter: &dyn Adapter,
        attachments: &[Attachment],
        params: &mut Params,
    ) -> Result<(), Error> {
        let mismatch = |message: String| Error::Mismatch { file: self.path.join(WEIGHTS_FILE), message };
        let whole = self.tensors.get(name).ok_or_else(|| mismatch(format!("has no tensor {name:?}")))?;
        let mut maps = Vec::with_capacity(attachments.len());
        for at in attachments {
            // Values are as wide as keys.
            let numbers: usize = at.tensors.iter().map(|spec| spec.shape.iter().product::<usize>()).sum();
            match adapter.port(at) {
                Port::Attention(map) => maps.push((at, map, numbers / (2 * map.length().max(1)))),
                _ => return Err(mismatch(format!("has keys and values for {}, which is no attention", at.site))),
            }
        }
        let expected = [maps.first().map_or(0, |(_, map, _)| map.length()), maps.iter().map(|(.., k)| 2 * k).sum()];
        if whole.dims() != expected {
            return Err(mismatch(misshapen(name, whole, &expected)));
        }
        let mut start = 0;
        for (at, map, k) in maps {
            let columns = |start| whole.narrow(1, start, k)?.contiguous();
            let made_of = map.tensors(&columns(start)?, &columns(start + k)?)?;
            start += 2 * k;
            let made_of = made_of.ok_or_else(|| mismatch(format!("has what {} makes of something else", at.site)))?;
            for (local, tensor) in made_of {
                let spec = at.tensors.iter().find(|spec| spec.local == local && tensor.dims() == spec.shape);
                let spec =
                    spec.ok_or_else(|| mismatch(format!("has keys and values that are not those of {}", at.site)))?;
                params.insert_declared(spec, at.site.as_str(), tensor);
            }
        }
        Ok(())
    }
}

fn misshapen(spelt: &str, tensor: &Tensor, shape: &[usize]) -> String {
    let found = tensor.dims();
    format!("tensor {spelt:?} has shape {found:?}; the base and adapter_config.json make it {shape:?}")
}

fn same_bits(a: &Tensor, b: &Tensor) -> bool {
    let values = |x: &Tensor| x.flatten_all().and_then(|x| x.to_vec1::<f32>()).ok();
    let bits = |x: &Tensor| values(x).map(|values| values.into_iter().map(f32::to_bits).collect::<Vec<_>>());
    bits(a).is_some_and(|a| bits(b) == Some(a))
}

/// Where a tensor of an adapter is in its file.
struct Place<'a> {
    name: TensorName,
    spec: &'a TensorSpec,
    /// The first of the sites that have it.
    site: &'a str,
    /// The name in the file.
    spelt: String,
}

/// Where each tensor is that stands there by itself; those that several sites share once.
fn places<'a>(adapter: &dyn Adapter, attachments: &'a [Attachment]) -> Vec<Place<'a>> {
    let Some(peft) = adapter.peft() else { return Vec::new() };
    let mut places: Vec<Place<'_>> = Vec::new();
    for at in attachments {
        for spec in &at.tensors {
            let name = spec.name(at.site.as_str());
            let repeated = matches!(peft.tensors, PeftTensors::Repeated(_));
            if !repeated && places.iter().any(|place| place.name == name) {
                continue;
            }
            let spelt = match &peft.tensors {
                PeftTensors::Repeated(spellings) => {
                    let suffix = spellings.iter().find(|(local, _)| *local == spec.local);
                    let suffix = suffix.map_or(spec.local, |(_, suffix)| suffix);
                    format!("{PREFIX}{}.{suffix}", at.site)
                }
                PeftTensors::Prompt(name) => (*name).to_owned(),
                PeftTensors::Saved => format!("{PREFIX}{}.{}", at.site, spec.local),
                PeftTensors::Whole(names) => {
                    let name = names.iter().find(|(local, _)| *local == spec.local);
                    name.map_or(spec.local, |(_, name)| name).to_owned()
                }
                PeftTensors::Each(spellings) | PeftTensors::LastLayers(_, spellings) => {
                    let suffix = spellings.iter().find(|(local, _)| *local == spec.local);
                    let suffix = suffix.map_or(spec.local, |(_, suffix)| suffix);
                    if suffix.starts_with(ROOT) {
                        // Those that are several groups' end in a dot, and the group follows.
                        let group = if suffix.ends_with('.') { name.owner() } else { "" };
                        format!("{suffix}{group}")
                    } else {
                        let dot = if name.owner().is_empty() { "" } else { "." };
                        format!("{PREFIX}{}{dot}{suffix}", name.owner())
                    }
                }
                // Those of all attentions are one tensor.
                _ => continue,
            };
            places.push(Place { name, spec, site: at.site.as_str(), spelt });
        }
    }
    places
}
