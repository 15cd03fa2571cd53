//! A job file as the command line reads it: YAML, changes from `--set`, checks against the methods of this build.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use attune_architecture::{Architecture, targets};
use attune_spec::id::Digest;
use attune_spec::job::{JobSpec, ReadError, Reference, Targets, read_value, read_yaml, set_path};
use attune_spec::method::Catalogue;
use attune_spec::{Fault, FieldPath, stages};
use serde_json::Value;

use crate::print::Failure;

/// The name under which standard input is given and spoken of.
const STDIN: &str = "-";

/// `path=value`: a field of the job file that the command line sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Assignment {
    path: String,
    value: String,
}

impl Assignment {
    /// A field that takes a value.
    pub(crate) fn new(path: &str, value: &serde_json::Value) -> Self {
        // JSON is YAML.
        Self { path: path.to_owned(), value: value.to_string() }
    }
}

impl FromStr for Assignment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((path, value)) if !path.is_empty() => Ok(Self { path: path.to_owned(), value: value.to_owned() }),
            _ => Err("expected PATH=VALUE, such as tune.adapter.rank=16".to_owned()),
        }
    }
}

/// Which job file, and what is different this time.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct JobFileArguments {
    /// The job file; `-` reads standard input.
    #[arg(value_name = "FILE")]
    pub(crate) file: String,
    /// Sets a field to a YAML value, such as `tune.adapter.rank=16`.
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub(crate) set: Vec<Assignment>,
}

/// A job file that has passed the checks.
#[derive(Debug, Clone)]
pub(crate) struct JobFile {
    /// The job.
    pub(crate) spec: JobSpec,
    /// What the file says, with what is different this time, and without defaults.
    pub(crate) written: Value,
    /// The folder that relative paths in it start from: its own.
    folder: PathBuf,
}

/// Reads a job file.
///
/// Fails with the line and column of what is not YAML, or with all faults of what is.
pub(crate) fn read(file: &str, set: &[Assignment]) -> Result<JobFile, Failure> {
    let text = text(file)?;
    let syntax = |error: ReadError| match error {
        ReadError::Syntax { line, column, message } => Failure::usage(format!("{file}:{line}:{column}: {message}")),
        ReadError::Faults(faults) => Failure::invalid(file, faults),
    };
    let mut value = read_yaml(&text).map_err(syntax)?;
    for Assignment { path, value: text } in set {
        set_path(&mut value, path, text).map_err(|fault| Failure::invalid("--set", vec![fault]))?;
    }
    let spec = read_value(&value, Catalogue::embedded()).map_err(syntax)?;
    let folder = if file == STDIN { None } else { Path::new(file).parent() };
    Ok(JobFile { spec, written: value, folder: folder.unwrap_or_else(|| Path::new("")).to_owned() })
}

fn text(file: &str) -> Result<String, Failure> {
    let read = if file == STDIN {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(file)
    };
    read.map_err(|error| Failure::file(Path::new(file), &error))
}

impl JobFile {
    /// Where a reference lies on this machine, if it names a file or folder: relative paths start from the job file.
    pub(crate) fn local(&self, reference: &Reference) -> Option<PathBuf> {
        place(&self.folder, reference)
    }

    /// Puts digests in the place of the paths that have one.
    pub(crate) fn replace_paths(&mut self, digests: &BTreeMap<PathBuf, Digest>) {
        let Self { spec, folder, .. } = self;
        let replaced: Result<(), Infallible> = spec.replace_references(|reference| {
            let digest = place(folder, reference).and_then(|path| digests.get(&path));
            Ok(digest.map_or_else(|| reference.clone(), |digest| Reference::Digest(*digest)))
        });
        match replaced {
            Ok(()) => {}
            Err(never) => match never {},
        }
    }

    /// A fault for each path that cannot be opened on this machine.
    pub(crate) fn absent(&self) -> Vec<Fault> {
        let paths = self.spec.references().into_iter();
        let paths = paths.filter_map(|(field, reference)| Some((field, self.local(&reference)?)));
        let absent = paths.filter_map(|(field, path)| Some((field, std::fs::metadata(&path).err()?, path)));
        absent.map(|(field, error, path)| Fault::new(field, format!("is {}: {error}", path.display()))).collect()
    }

    /// Faults of `targets` and `exclude` against the architecture of a base that lies here; `None` if it does not, so that
    /// only the server can tell.
    pub(crate) fn site_faults(&self) -> Result<Option<Vec<Fault>>, Failure> {
        let Some(config) = self.local(&self.spec.base).map(|folder| folder.join("config.json")) else {
            return Ok(None);
        };
        let json = match std::fs::read(&config) {
            Ok(json) => json,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::file(&config, &error)),
        };
        let architecture = match Architecture::from_json(&json) {
            Ok(architecture) => architecture,
            Err(error) => return Ok(Some(vec![Fault::new("base", format!("cannot be trained: {error}"))])),
        };
        if self.spec.recipe.is_none() {
            return Ok(Some(match operated(&self.spec, architecture) {
                Ok(architecture) => site_faults(&self.spec, &architecture),
                Err(faults) => faults,
            }));
        }
        // The file was read, so its stages are known; those on another base are the server's to look at.
        let mut faults = Vec::new();
        for stage in stages::known(&self.spec, &[]).unwrap_or_default() {
            if stage.job.base == self.spec.base {
                let found = match operated(&stage.job, architecture.clone()) {
                    Ok(architecture) => site_faults(&stage.job, &architecture),
                    Err(faults) => faults,
                };
                for Fault { path, message } in found {
                    let path = stages::place(&self.spec, &stage.name, &path).unwrap_or(path);
                    faults.push(Fault::new(path, message));
                }
            }
        }
        faults.sort();
        faults.dedup();
        Ok(Some(faults))
    }
}

/// What a job makes of its base before it trains.
fn operated(spec: &JobSpec, base: Architecture) -> Result<Architecture, Vec<Fault>> {
    let base = match &spec.tune.head {
        Some(head) => base.over(head).map_err(|fault| vec![fault])?,
        None => base,
    };
    let Some(surgery) = &spec.tune.surgery else { return Ok(base) };
    let Some(card) = Catalogue::embedded().get(&surgery.method) else { return Ok(base) };
    let path = FieldPath::from("tune").field("surgery");
    base.after(&Catalogue::embedded().resolve(surgery), card)
        .map_err(|faults| faults.into_iter().map(|fault| fault.under(&path)).collect())
}

/// Faults of `targets` and `exclude` of a job that trains.
fn site_faults(spec: &JobSpec, architecture: &Architecture) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (path, slot) in spec.tune.slots() {
        // The adapter that a slot starts from brings its own sites.
        let method = slot.method.as_deref().and_then(|method| Catalogue::embedded().get(method));
        let Some(document) = method.filter(|_| slot.from.is_none()) else { continue };
        let named = slot.targets.clone().unwrap_or_else(|| Targets::from(document.targets.as_str()));
        let applies = |site: &attune_architecture::Site| document.applies.contains(&site.offers());
        if let Err(found) = targets::resolve(&named, slot.exclude.as_ref(), architecture, applies) {
            faults.extend(found.into_iter().map(|fault| fault.under(&path)));
        }
    }
    faults
}

fn place(folder: &Path, reference: &Reference) -> Option<PathBuf> {
    match reference {
        Reference::Path(path) => Some(folder.join(path.trim_start_matches("./"))),
        Reference::Digest(_) | Reference::Tag(_) | Reference::Url(_) | Reference::Stage { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_assignment_is_a_path_and_a_value() {
        let assignment = "tune.optimizer={method: adamw, lr: 1e-3}".parse::<Assignment>().unwrap();
        assert_eq!(assignment.value, "{method: adamw, lr: 1e-3}");
        assert_eq!("a=b=c".parse::<Assignment>().unwrap().value, "b=c");
        assert!("=1".parse::<Assignment>().is_err() && "rank".parse::<Assignment>().is_err());
    }
    /// However the job file itself is named: beside the caller, below or above.
    #[test]
    fn a_path_is_replaced_by_what_was_found_at_it() {
        let text = "version: 1\nname: a\nbase: ./base\ndata: {domains: [{name: a, source: ./a.jsonl}]}\n\
                    tune: {adapter: {method: lora}, steps: 1}";
        for folder in ["", ".", "jobs", "../jobs", "/jobs"] {
            let spec = read_value(&read_yaml(text).unwrap(), Catalogue::embedded()).unwrap();
            let mut file = JobFile { spec, written: Value::Null, folder: folder.into() };
            let places = file.spec.references().into_iter().filter_map(|(_, reference)| file.local(&reference));
            let digests = places.map(|path| (path, Digest::from_bytes([7; 32]))).collect::<BTreeMap<_, _>>();
            assert_eq!(digests.len(), 2);
            file.replace_paths(&digests);
            let left = file.spec.references().into_iter().filter(|(_, reference)| file.local(reference).is_some());
            assert_eq!(left.map(|(field, _)| field.to_string()).collect::<Vec<_>>(), [""; 0], "{folder:?}");
        }
    }
}
