//! What a job must pass before it is taken in: every reference means something, of the right kind, and the base is a
//! model that has the sites that the job adapts. All faults come at once, with the job file's field paths.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use attune_architecture::{Architecture, Site, targets};
use attune_artifacts::{Kind, canonical};
use attune_proto::error::invalid_argument;
use attune_proto::v1;
use attune_scheduler_core::JobKey;
use attune_spec::id::{Digest, JobId, Project};
use attune_spec::job::{JobKind, JobSpec, Plan, Reference, plan};
use attune_spec::method::Catalogue;
use attune_spec::{Fault, FieldPath, stages};
use attune_store::UtcMs;
use attune_store::job::{Input, NewJob, Stage, State};
use serde_json::json;
use tonic::Status;

use crate::clock::Clock;
use crate::context::Context;
use crate::{addresses, forecast, status};

/// Largest `config.json` that is read.
const CONFIG_BYTES_MAX: u64 = 16 << 20;

/// A job that may be taken in.
#[derive(Debug)]
pub(crate) struct Admitted {
    /// As it was written.
    pub(crate) spec: JobSpec,
    /// With every reference replaced by what it means.
    pub(crate) resolved: JobSpec,
    /// What will run; nothing of a recipe, whose stages run.
    pub(crate) plan: Option<Plan>,
    /// The artifacts it uses.
    pub(crate) inputs: Vec<Input>,
    /// The structure of the base, or of what a surgery makes of it, where it could be read.
    pub(crate) architecture: Option<Architecture>,
}

/// The specification of a request.
pub(crate) fn read(project: &Project, message: Option<&v1::JobSpec>) -> Result<JobSpec, Status> {
    let Some(message) = message else { return Err(invalid_argument(&[Fault::new("spec", "is missing")])) };
    let spec = attune_proto::convert::job::from_message(message).map_err(|faults| invalid_argument(&faults))?;
    match &spec.project {
        Some(own) if own != project => {
            let message = format!("is \"{own}\", but the request is for project \"{project}\"");
            Err(invalid_argument(&[Fault::new("project", message)]))
        }
        _ => Ok(spec),
    }
}

/// Checks a specification against what is there.
pub(crate) async fn admit(context: &Context, project: &Project, spec: JobSpec) -> Result<Admitted, Status> {
    let mut faults = Vec::new();
    let mut meanings: BTreeMap<Reference, Result<plan::Input, String>> = BTreeMap::new();
    let mut inputs = Vec::new();
    for (path, reference) in spec.references() {
        // What a stage makes is known when it has made it.
        if matches!(reference, Reference::Stage { .. }) {
            continue;
        }
        let meaning = resolve(context, project, &path, &reference).await?;
        if let Ok(plan::Input::Artifact(digest)) = &meaning {
            inputs.push(Input { role: path.as_str().to_owned(), digest: *digest });
        }
        // The same artifact as base and as data is right once and wrong once: a fault is told where it is.
        if let Err(message) = &meaning {
            faults.push(Fault::new(path, message.clone()));
        }
        let known = meanings.entry(reference).or_insert_with(|| meaning.clone());
        if known.is_err() {
            known.clone_from(&meaning);
        }
    }
    if let Ok(Some(deadline)) = spec.limits.deadline_ms()
        && deadline <= Clock::utc().0
    {
        faults.push(Fault::new("limits.deadline", "has passed; expected a time to come"));
    }
    for (index, job) in spec.after.iter().enumerate() {
        match context.store.job(project, job).await {
            Ok(_) => {}
            Err(attune_store::Error::NotFound { .. }) => {
                let path = FieldPath::from("after").index(index);
                faults.push(Fault::new(path, format!("is \"{job}\", which is no job of project \"{project}\"")));
            }
            Err(error) => return Err(status::store(error)),
        }
    }
    let mut architecture = Architectures { context, project, known: BTreeMap::new() };
    let (plan, architecture) = if spec.recipe.is_some() {
        of_stages(&spec, &meanings, &mut architecture, &mut faults).await?;
        (None, None)
    } else {
        let (plan, architecture) = of_job(&spec, &meanings, &mut architecture, &mut faults).await?;
        (Some(plan), architecture)
    };
    if !faults.is_empty() {
        faults.sort();
        faults.dedup();
        return Err(invalid_argument(&faults));
    }
    let mut resolved = spec.clone();
    let replace = |reference: &Reference| {
        Ok::<_, Status>(match meanings.get(reference) {
            Some(Ok(plan::Input::Artifact(digest))) => Reference::Digest(*digest),
            Some(Ok(plan::Input::Path(path))) => Reference::Path(path.clone()),
            _ => reference.clone(),
        })
    };
    resolved.replace_references(replace)?;
    inputs.sort();
    inputs.dedup();
    Ok(Admitted { spec, resolved, plan, inputs, architecture })
}

type Meanings = BTreeMap<Reference, Result<plan::Input, String>>;

/// The plan of a job that trains, and the structure of its base where it could be read.
async fn of_job(
    spec: &JobSpec,
    meanings: &Meanings,
    architectures: &mut Architectures<'_>,
    faults: &mut Vec<Fault>,
) -> Result<(Plan, Option<Architecture>), Status> {
    let meaning = |reference: &Reference| {
        let known = meanings.get(reference).cloned();
        // A reference with a fault was told before; any input lets the rest be looked at.
        known.and_then(Result::ok).map_or_else(|| Ok(plan::Input::Url(reference.to_string())), Ok)
    };
    let plan = Plan::resolve(spec, Catalogue::embedded(), meaning).map_err(|faults| invalid_argument(&faults))?;
    let is_base_known = faults.iter().all(|fault| fault.path.as_str() != "base");
    let base = match &plan.base {
        base if is_base_known => architectures.of(base, faults).await?,
        _ => None,
    };
    let architecture = match (base, &plan.surgery) {
        (Some(base), Some(surgery)) => {
            match Catalogue::embedded().get(&surgery.method).map(|card| base.after(surgery, card)) {
                Some(Ok(made)) => Some(made),
                Some(Err(found)) => {
                    let path = FieldPath::from("tune").field("surgery");
                    faults.extend(found.into_iter().map(|fault| fault.under(&path)));
                    None
                }
                None => None,
            }
        }
        (base, _) => base,
    };
    let architecture = match (architecture, &plan.head) {
        (Some(trunk), Some(head)) => trunk.over(head).map_err(|fault| faults.push(fault)).ok(),
        (architecture, _) => architecture,
    };
    if let Some(architecture) = &architecture {
        for ((path, _), slot) in spec.tune.slots().iter().zip(&plan.stack) {
            if let Err(found) = sites(slot, architecture) {
                faults.extend(found.into_iter().map(|fault| fault.under(path)));
            }
        }
    }
    Ok((plan, architecture))
}

/// Checks the stages of a recipe that are known before any of them has run.
async fn of_stages(
    spec: &JobSpec,
    meanings: &Meanings,
    architectures: &mut Architectures<'_>,
    faults: &mut Vec<Fault>,
) -> Result<(), Status> {
    for stage in stages::known(spec, &[]).map_err(|faults| invalid_argument(&faults))? {
        let mut found = Vec::new();
        of_job(&stage.job, meanings, architectures, &mut found).await?;
        for Fault { path, message } in found {
            let path = stages::place(spec, &stage.name, &path).map_err(|faults| invalid_argument(&faults))?;
            faults.push(Fault::new(path, message));
        }
    }
    Ok(())
}

/// The structures of bases, each read once.
struct Architectures<'a> {
    context: &'a Context,
    project: &'a Project,
    known: BTreeMap<String, Result<Option<Architecture>, String>>,
}

impl Architectures<'_> {
    /// The base's structure; faults of its `config.json` are told at `base`.
    async fn of(&mut self, base: &plan::Input, faults: &mut Vec<Fault>) -> Result<Option<Architecture>, Status> {
        let name = format!("{base:?}");
        if !self.known.contains_key(&name) {
            let read = read_base(self.context, self.project, base).await?;
            self.known.insert(name.clone(), read);
        }
        match &self.known[&name] {
            Ok(architecture) => Ok(architecture.clone()),
            Err(message) => {
                faults.push(Fault::new("base", message.clone()));
                Ok(None)
            }
        }
    }
}

/// The sites that a slot adapts; of an adapter that is started from, the adapter itself knows.
pub(crate) fn sites(slot: &plan::PlanSlot, architecture: &Architecture) -> Result<Vec<Site>, Vec<Fault>> {
    let method = slot.method.as_ref().and_then(|method| Catalogue::embedded().get(&method.method));
    let Some(method) = method else { return Ok(Vec::new()) };
    let applies = |site: &Site| method.applies.contains(&site.offers());
    targets::resolve(&slot.targets, slot.exclude.as_ref(), architecture, applies)
}

/// What a reference means, or why it means nothing.
async fn resolve(
    context: &Context,
    project: &Project,
    path: &FieldPath,
    reference: &Reference,
) -> Result<Result<plan::Input, String>, Status> {
    let digest = match reference {
        Reference::Digest(digest) => *digest,
        Reference::Tag(tag) => match context.store.resolve_tag(project, tag).await {
            Ok(digest) => digest,
            Err(attune_store::Error::NotFound { .. }) => {
                return Ok(Err(format!("is \"{tag}\", which is no tag of project \"{project}\"")));
            }
            Err(error) => return Err(status::store(error)),
        },
        Reference::Path(text) => {
            return Ok(path_of(context.data_root.as_deref(), text)
                .await
                .map(|path| plan::Input::Path(path.display().to_string())));
        }
        Reference::Url(url) => return Ok(addresses::check(url).map(|()| plan::Input::Url(url.clone()))),
        Reference::Stage { .. } => return Ok(Err(format!("is {reference}, which only a stage of a recipe can name"))),
    };
    let row = match context.store.artifact(project, digest).await {
        Ok(row) => row,
        Err(attune_store::Error::NotFound { .. }) => {
            return Ok(Err(format!("is \"{reference}\", which is no artifact of project \"{project}\"")));
        }
        Err(error) => return Err(status::store(error)),
    };
    let wanted = kind_at(path);
    if row.kind != wanted.as_str() {
        return Ok(Err(format!(
            "is \"{reference}\", an artifact of kind {}; expected {}",
            row.kind,
            with_article(wanted)
        )));
    }
    Ok(Ok(plan::Input::Artifact(digest)))
}

/// The kind of artifact that belongs at a path of the job file.
fn kind_at(path: &FieldPath) -> Kind {
    match path.as_str().rsplit('.').next() {
        Some("base") => Kind::Model,
        Some("source") => Kind::Dataset,
        Some("statistics") => Kind::Statistics,
        _ => Kind::Adapter,
    }
}

/// A kind with its article.
fn with_article(kind: Kind) -> String {
    match kind {
        Kind::Adapter => format!("an {kind}"),
        Kind::Statistics => kind.to_string(),
        _ => format!("a {kind}"),
    }
}

/// A path of this machine that jobs may read.
async fn path_of(root: Option<&Path>, text: &str) -> Result<PathBuf, String> {
    let Some(root) = root else {
        return Err(format!(
            "is {text:?}, a path of the server's machine, and this server reads none; push it with `attune artifacts \
             push` and name its digest or tag, or start the server with --data-root"
        ));
    };
    let found =
        tokio::fs::canonicalize(text).await.map_err(|error| format!("is {text:?}, which cannot be read: {error}"))?;
    if found.starts_with(root) {
        Ok(found)
    } else {
        Err(format!("is {text:?}, which is not under the server's --data-root {}", root.display()))
    }
}

/// The base's structure, or what is wrong with its `config.json`.
async fn read_base(
    context: &Context,
    project: &Project,
    base: &plan::Input,
) -> Result<Result<Option<Architecture>, String>, Status> {
    let bytes = match base {
        plan::Input::Artifact(digest) => config_of(context, project, digest).await?,
        plan::Input::Path(path) => {
            let path = Path::new(path).join("config.json");
            tokio::fs::read(&path).await.map_err(|error| format!("has no readable config.json: {error}"))
        }
        // Read where it lies, by the worker.
        plan::Input::Url(_) => return Ok(Ok(None)),
    };
    let architecture =
        bytes.and_then(|bytes| Architecture::from_json(&bytes).map_err(|error| format!("cannot be used: {error}")));
    Ok(architecture.map(Some))
}

async fn config_of(context: &Context, project: &Project, digest: &Digest) -> Result<Result<Vec<u8>, String>, Status> {
    let read = |error| status::artifacts(error, "base");
    file_of(context, project, digest, "config.json", CONFIG_BYTES_MAX).await.map_err(read)
}

/// A small file of an artifact, or why it is not read.
pub(crate) async fn file_of(
    context: &Context,
    project: &Project,
    digest: &Digest,
    name: &str,
    bytes_max: u64,
) -> Result<Result<Vec<u8>, String>, attune_artifacts::Error> {
    let manifest = context.blobs.manifest(project, digest).await?;
    let Some(file) = manifest.file(name) else {
        return Ok(Err(format!("has no {name}")));
    };
    if file.size_bytes > bytes_max {
        return Ok(Err(format!("has a {name} of {} bytes; at most {bytes_max} are read", file.size_bytes)));
    }
    Ok(Ok(context.blobs.bytes(project, file.blob()).await?.to_vec()))
}

/// What jobs that share a process must have in common, beside their project and resources; nothing for a job that runs alone.
fn share_key(spec: &JobSpec, plan: &Plan) -> Option<Digest> {
    let mut key = json!({"base": plan.base, "precision": plan.precision, "matmul": spec.tune.matmul});
    if let Some(format) = &plan.quantization {
        key["quantization"] = json!(format);
    }
    spec.resources.share_base.then(|| canonical::digest(&key))
}

/// What the core must know of an admitted job. What a recipe comes after, its stages come after.
pub(crate) fn request(admitted: &Admitted, stage: Option<&Stage>) -> attune_scheduler_core::Request {
    use attune_scheduler_core as core;
    let spec = &admitted.spec;
    let Some(plan) = &admitted.plan else {
        let may_fail = attune_spec::stages::manner(spec).map_or(0, |manner| manner.may_fail);
        return core::Request { priority: spec.priority, is_staged: true, may_fail, ..core::Request::default() };
    };
    use std::num::NonZeroU32;
    let at_least_one = |n: u32| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN);
    core::Request {
        priority: spec.priority,
        resources: core::Resources {
            n_workers: at_least_one(spec.resources.workers),
            n_devices: at_least_one(spec.resources.devices_per_worker),
            device: match spec.resources.device {
                attune_spec::job::Device::Any => core::Wanted::Any,
                attune_spec::job::Device::Cpu => core::Wanted::Only(core::Device::Cpu),
                attune_spec::job::Device::Cuda => core::Wanted::Only(core::Device::Cuda),
            },
            labels: spec.resources.labels.clone(),
        },
        max_attempts: at_least_one(spec.limits.max_attempts),
        after: spec.after.iter().cloned().collect(),
        share: share_key(spec, plan),
        memory: forecast::memory(admitted).unwrap_or_default(),
        is_staged: false,
        may_fail: 0,
        parent: stage.map(|stage| stage.parent.clone()),
    }
}

/// What is stored of an admitted job.
pub(crate) fn new_job(
    admitted: Admitted,
    key: JobKey,
    stage: Option<Stage>,
    retry_of: Option<JobId>,
) -> Result<NewJob, Status> {
    let Admitted { spec, resolved, inputs, .. } = admitted;
    let unwritable = |error: serde_json::Error| attune_proto::Class::Internal.status(error.to_string());
    Ok(NewJob {
        project: key.project,
        job: key.job,
        version: 1,
        name: spec.name.to_string(),
        kind: match spec.kind {
            JobKind::Tune => "tune".to_owned(),
            JobKind::Recipe => "recipe".to_owned(),
        },
        spec: serde_json::to_value(&spec).map_err(unwritable)?,
        resolved: serde_json::to_value(&resolved).map_err(unwritable)?,
        state: State::Queued,
        reason: String::new(),
        message: String::new(),
        priority: spec.priority,
        labels: spec.labels.iter().map(|(name, value)| (name.to_string(), value.clone())).collect(),
        inputs,
        core: json!(null),
        retry_of,
        stage,
        run_limit_ms: spec.limits.run_seconds.map(|seconds| seconds.saturating_mul(1000)),
        deadline: spec.limits.deadline_ms().ok().flatten().map(UtcMs),
        now: Clock::utc(),
    })
}
