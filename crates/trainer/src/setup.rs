//! From a plan to the parts of a run: base, data, components, rules.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use attune_adapt::peft;
use attune_architecture::{Architecture, HeadKind};
use attune_artifacts::canonical;
use attune_data::loader::{Domain, Room, in_order};
use attune_data::stream::Cap;
use attune_data::{ChatTemplate, Dataset, Encoder, Loader, MIXINGS, Packing, Reading, Source, Tokenizer};
use attune_models::pass::walk::Keep;
use attune_models::{Base, LoadBalance, Model, Stack, surgery};
use attune_objective::{OBJECTIVES, REWARDS};
use attune_optim::{OPTIMIZERS, SCHEDULES};
use attune_points::engine::Job;
use attune_points::{Bank, BankKind, Owner, Row, TensorId, Theta};
use attune_spec::id::{Digest, Name, Step};
use attune_spec::job::plan::{Input, Length, PlanDomain, PlanReward, PlanSlot};
use attune_spec::job::{Activations, Form, HeadSpec, Matmul, MergedInto, Plan, Precision, ProvenanceClass};
use attune_spec::method::{BuildCx, Catalogue};
use attune_spec::{Fault, FieldPath};

use crate::answers::{self, Judge};
use crate::calibration::Calibration;
use crate::card;
use crate::checkpoint;
use crate::classes;
use crate::component::{self, Begun, Component, SharesOfSlots};
use crate::control::Control;
use crate::engine::Shared;
use crate::error::Error;
use crate::few;
use crate::fit::{fits, has_room, of_objective, remarks};
use crate::pin::{self, Pins};
use crate::protocol::{Event, Phase, Request};
use crate::resident;
use crate::trained;
use crate::turns::Turns;

/// Everything that a run is made of.
pub(crate) struct Prepared {
    pub(crate) shared: Shared,
    pub(crate) theta: Theta,
    pub(crate) domains: Vec<Domain>,
    pub(crate) packing: Packing,
    pub(crate) base_folder: PathBuf,
    /// The slots that train, in their order; at least one.
    pub(crate) trained_slots: Vec<usize>,
    /// What reading each file found, by domain or validation set.
    pub(crate) reports: BTreeMap<String, attune_data::dataset::Report>,
    /// Content digests of inputs that are read where they lie.
    pub(crate) pinned: Pins,
    pub(crate) plan_digest: Digest,
    /// The ranks that a budget has given the sites of what trains.
    pub(crate) shares: SharesOfSlots,
}

/// A base by its folder, its precision, the format of its linears, its products, the device that it lies on, and the head that stands in
/// the place of its own, with the seed that this may start from.
type Opened = (PathBuf, Precision, Option<String>, Matmul, Option<u32>, Option<(HeadSpec, u64)>);

/// The bases that the lanes of a process share: each is opened once.
#[derive(Debug, Default)]
pub(crate) struct Bases {
    open: Mutex<BTreeMap<Opened, Arc<Base>>>,
}

impl Bases {
    /// The base in a folder, on the device of this number or on the processor.
    fn open(&self, folder: &Path, plan: &Plan, card: Option<u32>) -> Result<Arc<Base>, Error> {
        // Lanes that start together wait here for the first, which opens it.
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let format = plan.quantization.as_ref().map(|format| serde_json::to_string(format).unwrap_or_default());
        let head = plan.head.clone().map(|head| (head, plan.seed));
        let key = (folder.to_owned(), plan.precision, format, plan.matmul, card, head);
        if let Some(base) = open.get(&key) {
            return Ok(Arc::clone(base));
        }
        let base = few::open_of(plan, folder, plan.quantization.as_ref())?;
        let base = Arc::new(base.on(card::kernels(card, plan.matmul)?)?);
        open.insert(key, Arc::clone(&base));
        Ok(base)
    }
}

/// The name of a plan in a lineage.
pub(crate) fn plan_digest(plan: &Plan) -> Digest {
    canonical::digest(&serde_json::to_value(plan).unwrap_or_default())
}

/// Reads everything that the plan names. `rows_beside` are the most rows of a pass that the run may share with others.
pub(crate) fn prepare(
    request: &Request,
    control: &dyn Control,
    bases: &Bases,
    rows_beside: u64,
) -> Result<Prepared, Error> {
    let plan = &request.plan;
    let mut pinned = Pins::new();
    control.emit(Event::Starting { phase: Phase::Base });
    if let (Some(card), 2..) = (request.card, request.ranks) {
        let message = format!("{} ranks share NVIDIA device {card}: this version uses one a job", request.ranks);
        control.emit(Event::Note { topic: "device".to_owned(), message });
    }
    let base_folder = folder(request, &plan.base, &mut pinned)?;
    let mut base = match &plan.surgery {
        Some(_) => {
            let made = operated(opened(plan, &base_folder)?, plan)?;
            Arc::new(made.on(card::kernels(request.card, plan.matmul)?)?)
        }
        None if plan.from_scratch => {
            Arc::new(opened(plan, &base_folder)?.on(card::kernels(request.card, plan.matmul)?)?)
        }
        None => bases.open(&base_folder, plan, request.card)?,
    };
    if base.is_few_only() && plan.merged_into == Some(MergedInto::Base) {
        let message = "is base, but the base's folder holds its linears in few bits only; expected dequantized";
        return Err(Error::Faults(vec![Fault::new("outputs.merged_into", message)]));
    }
    let tokenizer = Tokenizer::open(&base_folder)?;
    check_fit(plan, base.architecture(), &tokenizer)?;
    classes::agree(plan, &base_folder)?;
    let encoder = Encoder::new(tokenizer.clone(), plan.template.as_deref(), plan.max_length, plan.too_long)?
        .with_classes(plan.head.as_ref().and_then(|head| classes::of(head, base.architecture())));

    control.emit(Event::Starting { phase: Phase::Data });
    let mut reports = BTreeMap::new();
    let mut domains = Vec::new();
    for domain in &plan.domains {
        let data = read(request, &domain.input, domain.form, domain.rows, &encoder, &mut pinned)?;
        reports.insert(format!("data/{}", domain.name), data.report().clone());
        domains.push(Domain { name: domain.name.to_string(), data: Arc::new(data) });
    }
    let mut validation = Vec::new();
    for set in &plan.validation {
        let data = read(request, &set.input, set.form, set.rows, &encoder, &mut pinned)?;
        reports.insert(format!("validation/{}", set.name), data.report().clone());
        validation.push((set.name.to_string(), data));
    }
    // Who goes on has been told.
    if request.resume.is_none() {
        for (place, report) in &reports {
            for message in remarks(report, plan.head.as_ref().map_or(&[], |head| &head.labels)) {
                control.emit(Event::Note { topic: place.clone(), message });
            }
        }
    }
    let weights = weights(plan);
    let tune = FieldPath::from("tune");
    let answers = Catalogue::embedded().answers(&plan.objective);
    let answers = answers.map(|(each, max_tokens)| Room { each: each as u16, max_tokens });
    let before = rows_before(request, base.architecture(), &mut pinned)?;
    let packing = Packing {
        answers,
        before: before.into(),
        batch_tokens: plan.batch_tokens,
        logical_shards: plan.logical_shards,
        accumulation: plan.accumulation,
        max_length: plan.max_length,
    };
    fits(&domains, &validation, &packing)?;
    let total_steps = loader(plan, domains.clone(), packing.clone())?.steps(plan.length)?;

    let cx = BuildCx { steps: total_steps, domains: &weights, words: Some(encoder.tokenizer()) };
    let objective = OBJECTIVES.build(&plan.objective, &tune.field("objective"), &cx).map_err(Error::Faults)?;
    let mut faults = Vec::new();
    let domains_data = domains.iter().map(|domain| &*domain.data).zip(0..);
    let sets = domains_data.map(|(data, at)| ("domains", at, data));
    let validation_data = validation.iter().map(|(_, data)| data).zip(0..);
    for (field, at, data) in sets.chain(validation_data.map(|(data, at)| ("validation", at, data))) {
        let path = FieldPath::from("data").field(field).index(at);
        faults.extend(of_objective(data, &plan.objective.method, objective.needs(), path.clone()));
        faults.extend(answers.and_then(|answers| has_room(data, plan.max_length, answers, path)));
    }
    if !faults.is_empty() {
        return Err(Error::Faults(faults));
    }
    let batched = |(name, data): (String, Dataset)| {
        let longest = plan.max_length as usize + packing.before.len();
        let tokens = packing.shard_tokens().max(longest);
        (name, in_order(&data, tokens, &packing.before).into_iter().map(Arc::new).collect())
    };
    let validation = validation.into_iter().map(batched).collect();
    let optimizer = OPTIMIZERS.build(&plan.optimizer, &tune.field("optimizer"), &cx).map_err(Error::Faults)?;
    let schedule = SCHEDULES.build(&plan.schedule, &tune.field("schedule"), &cx).map_err(Error::Faults)?;

    let mut begun = Vec::with_capacity(plan.stack.len());
    for (index, planned) in plan.stack.iter().enumerate() {
        begun.push(begin(request, planned, &base, &tune.field("stack").index(index), &cx, &mut pinned)?);
    }
    let held = few::of(plan);
    for (index, begun) in begun.iter().enumerate() {
        let Slotted::Read(read) = begun else { continue };
        few::fits(read.held.as_ref(), held.as_ref(), &tune.field("stack").index(index))?;
        if let Some(less) = &read.requantized {
            base = Arc::new(few::requantized(&base, &read.slot, less)?);
        }
    }
    let keep = keep(plan, &base, (request.ranks, request.all_ranks()), rows_beside);
    let calibration = Calibration {
        request,
        pinned: &mut pinned,
        plan,
        control,
        base: &base,
        objective: &*objective,
        domains: &domains,
        packing: packing.clone(),
        keep,
    };
    let stats = calibration.of(&begun)?;

    let mut shares = match &request.resume {
        Some(folder) => checkpoint::load_shares(folder)?,
        None => SharesOfSlots::new(),
    };
    let (mut slots, mut banks, mut specs) = (Vec::new(), Vec::new(), BTreeMap::new());
    // What was taken out of the base, by the slot that it was taken out for.
    let mut taken_out = Vec::new();
    // What the base is less where weights were quantised anew, in the same way; and whether the base is so already.
    let mut less = Vec::new();
    // The modules that adapters keep whole, with what each is called.
    let mut saved = Vec::new();
    for (index, (planned, begun)) in plan.stack.iter().zip(begun).enumerate() {
        let path = tune.field("stack").index(index);
        let is_fresh = matches!(begun, Slotted::Begun(_));
        let mut made = match begun {
            Slotted::Read(component) => component,
            // What trains is in the checkpoint.
            Slotted::Begun(begun) if request.resume.is_some() && planned.train => {
                let own = shares.get(planned.name.as_str());
                begun.with(own, &base, &cx)?.resume(planned.name.as_str(), plan.seed, &base)?
            }
            Slotted::Begun(begun) if planned.train => {
                let own = begun.shares(&base, &stats)?;
                let begun = begun.with(own.as_ref(), &base, &cx)?;
                shares.extend(own.map(|own| (planned.name.to_string(), own)));
                begun.start(planned.name.as_str(), plan.seed, &base, &stats)?
            }
            Slotted::Begun(begun) => begun.start(planned.name.as_str(), plan.seed, &base, &stats)?,
        };
        component::fits(&made.slot, &slots, &path)?;
        if let Some(kept) = made.saved.take() {
            if !planned.domains.is_empty() {
                let message = "is given for an adapter that keeps modules whole, which stand beside all documents";
                return Err(Error::Faults(vec![Fault::new(path.field("domains"), message)]));
            }
            saved.push((format!("{}-saved", planned.name), kept.slot, kept.params));
        }
        if is_fresh && made.kind == BankKind::Weights {
            few::whole(&made.slot, &base, &path)?;
            component::take_over(&mut made, &mut saved);
        }
        if is_fresh {
            component::made_of_blended(&mut made, (&slots, &banks), &base, &path)?;
        }
        if planned.train {
            let owner = Owner::Bank { slot: index as u16, set: 0 };
            for at in made.slot.attachments() {
                for spec in at.tensors.iter().filter(|spec| spec.train) {
                    let id = TensorId { owner, name: spec.name(at.site.as_str()) };
                    specs.insert(id, spec.clone());
                }
            }
        }
        banks.push(Bank {
            slot: planned.name.as_str().into(),
            kind: made.kind,
            sets: vec![Arc::new(made.params)],
            train: planned.train,
        });
        taken_out.extend(made.beside.map(|params| (index as u16, made.slot.clone(), params)));
        if let Some(params) = made.requantized {
            let is_new = is_fresh && request.resume.is_none();
            if is_new {
                base = Arc::new(few::requantized(&base, &made.slot, &params)?);
            }
            less.push((index as u16, params, is_new || !is_fresh));
        }
        slots.push(made.slot);
    }
    for (name, slot, params) in saved.into_iter().filter(|(_, _, params)| !params.is_empty()) {
        banks.push(Bank { slot: name.into(), kind: BankKind::Weights, sets: vec![Arc::new(params)], train: false });
        slots.push(slot);
    }
    let mut beside = BTreeMap::new();
    for (index, slot, params) in taken_out {
        beside.insert(index, slots.len() as u16);
        let name = format!("{}-start", plan.stack[usize::from(index)].name).into();
        banks.push(Bank { slot: name, kind: BankKind::Adapter, sets: vec![Arc::new(params)], train: false });
        slots.push(slot);
    }
    let mut theta = Theta { beside, ..Theta::single(banks) };
    for (index, mut params, is_done) in less {
        let bank = theta.banks.len() as u16;
        if let (Some(folder), false) = (&request.resume, is_done) {
            checkpoint::load_some(folder, bank, &mut params)?;
            base = Arc::new(few::requantized(&base, &slots[usize::from(index)], &params)?);
        }
        theta.requantized.insert(index, bank);
        let slot = format!("{}-less", plan.stack[usize::from(index)].name).into();
        theta.banks.push(Bank { slot, kind: BankKind::Adapter, sets: vec![Arc::new(params)], train: false });
    }
    classes::trains(&base, &specs)?;
    let turns = Turns::of(plan);
    turns.bind(&mut theta, None);
    let narrow = base.activations() == attune_models::pass::Activations::Bf16;
    let job = Job { objective: &*objective, theta: &theta, optimizer: &*optimizer, narrow };
    let mut model = Model::new(base, Stack::new(slots));
    // Experts that a surgery has just made are all alike: without it few of them would ever learn.
    let balance = plan.surgery.as_ref().and_then(|_| LoadBalance::of(model.base().architecture()));
    if let Some(balance) = balance.filter(|balance| balance.coefficient > 0.0) {
        model = model.with_auxiliary(Arc::new(balance));
    }
    let model = Arc::new(model);
    let trained_slots = trained::slots(plan, &model)?;
    let rule = trained::step_rule(plan, total_steps, &model)?;
    if let Some(message) = rule.misfit(&job) {
        return Err(Error::Faults(vec![Fault::new("tune.step", message)]));
    }
    if !rule.takes_gradients() {
        trained::without_gradients(plan)?;
    }
    if model.rows_before(&theta) != *packing.before {
        let message = "puts other rows before documents than its card says".to_owned();
        return Err(Error::Faults(vec![Fault::new("tune.stack", message)]));
    }
    let judge = answers.map(|_| judge(plan, tokenizer, encoder.template(), &cx)).transpose()?;
    let shared = Shared {
        judge,
        turns,
        keep,
        model,
        objective: objective.into(),
        optimizer,
        schedule,
        specs,
        validation,
        total_steps,
        max_grad_norm: plan.max_grad_norm,
        logical_shards: plan.logical_shards,
        accumulation: plan.accumulation,
        seed: plan.seed,
    };
    Ok(Prepared {
        shared,
        theta,
        domains,
        packing,
        base_folder,
        trained_slots,
        reports,
        pinned,
        plan_digest: plan_digest(plan),
        shares,
    })
}

/// A base of the job's own.
fn opened(plan: &Plan, folder: &Path) -> Result<Base, Error> {
    if plan.from_scratch {
        return Ok(Base::from_scratch(folder, plan.seed)?);
    }
    few::open_of(plan, folder, plan.quantization.as_ref())
}

/// What the job makes of its base before anything trains: the base itself for most.
pub(crate) fn operated(base: Base, plan: &Plan) -> Result<Base, Error> {
    let Some(surgery) = &plan.surgery else { return Ok(base) };
    surgery::operate(&base, surgery, plan.seed).map_err(|error| match error {
        attune_models::Error::Refused(faults) => Error::Faults(faults),
        error => error.into(),
    })
}

/// The rows that the components of the stack put before every document.
///
/// # Errors
/// An adapter that cannot be read; a base without positions for the rows and a document after them.
fn rows_before(request: &Request, architecture: &Architecture, pinned: &mut Pins) -> Result<Vec<Row>, Error> {
    let plan = &request.plan;
    let mut before = Vec::new();
    for (slot, planned) in (0u16..).zip(&plan.stack) {
        let length = match (&planned.from, &planned.method) {
            (Some(from), _) => Catalogue::embedded().rows_before(&peft::read(&folder(request, from, pinned)?)?.method),
            (None, Some(method)) => Catalogue::embedded().rows_before(method),
            (None, None) => 0,
        };
        if length > 0 && !planned.domains.is_empty() {
            let path = FieldPath::from("tune").field("stack").index(usize::from(slot)).field("domains");
            let message = "is given for an adapter that puts rows before documents, which stand before all or none";
            return Err(Error::Faults(vec![Fault::new(path, message)]));
        }
        before.extend((0..length).map(|index| Row::Virtual { slot, index }));
    }
    let (longest, context) = (u64::from(plan.max_length) + before.len() as u64, architecture.max_position);
    if !before.is_empty() && longest > context && !architecture.positions.changes_at(longest as usize) {
        let message = format!(
            "is {}; with {} rows before each document it goes beyond the base's context of {context}",
            plan.max_length,
            before.len()
        );
        return Err(Error::Faults(vec![Fault::new("data.max_length", message)]));
    }
    Ok(before)
}

/// What forward passes keep: as the job says, or as much as half of the memory that the device or the machine has left holds.
fn keep(plan: &Plan, base: &Base, (here, all): (u32, u32), rows_beside: u64) -> Keep {
    let element_bytes = match base.activations() {
        attune_models::pass::Activations::F32 => 4,
        attune_models::pass::Activations::Bf16 => 2,
    };
    let free = base.arena().kernels().free_bytes().or_else(resident::available_bytes);
    let rows = (plan.rows_at_once(all) * u64::from(here)).max(rows_beside);
    let all = base.architecture().kept_bytes_per_row(element_bytes, false) * rows;
    match plan.activations {
        Activations::Keep => Keep::All,
        Activations::Recompute => Keep::Inputs,
        Activations::Auto if free.is_some_and(|free| all > free / 2) => Keep::Inputs,
        Activations::Auto => Keep::All,
    }
}

/// What judges the answers of the model.
fn judge(plan: &Plan, tokenizer: Tokenizer, template: Option<&ChatTemplate>, cx: &BuildCx<'_>) -> Result<Judge, Error> {
    let path = FieldPath::from("tune").field("rewards");
    let (mut rules, mut faults) = (Vec::new(), Vec::new());
    for (index, PlanReward { weight, reward }) in plan.rewards.iter().enumerate() {
        match REWARDS.build(reward, &path.index(index), cx) {
            Ok(built) => rules.push(answers::Rule { name: reward.method.clone(), weight: *weight, reward: built }),
            Err(found) => faults.extend(found),
        }
    }
    let stop = tokenizer.stops(template);
    if faults.is_empty() { Ok(Judge { tokenizer, stop, rules }) } else { Err(Error::Faults(faults)) }
}

/// The batches of a run, from its beginning.
pub(crate) fn loader(plan: &Plan, domains: Vec<Domain>, packing: Packing) -> Result<Loader, Error> {
    loader_of(plan, domains, packing, plan.length)
}

/// The same of another length.
pub(crate) fn loader_of(plan: &Plan, domains: Vec<Domain>, packing: Packing, length: Length) -> Result<Loader, Error> {
    let weights = weights(plan);
    // How the shares develop may depend on the number of steps only after that number is known, which needs the shares.
    let cx = BuildCx { steps: Step(0), domains: &weights, words: None };
    let mixing = MIXINGS.build(&plan.mixing, &"data.mixing".into(), &cx).map_err(Error::Faults)?;
    Ok(Loader::new(plan.seed, domains, mixing, packing, length).capped(caps(plan)))
}

/// The bounds on documents by where they come from.
fn caps(plan: &Plan) -> Vec<Cap> {
    let class = |domain: &PlanDomain| domain.provenance.as_ref().map(|provenance| provenance.class);
    let of = |wanted: ProvenanceClass| {
        let domains = plan.domains.iter().enumerate();
        domains.filter(|(_, domain)| class(domain) == Some(wanted)).map(|(at, _)| at).collect()
    };
    plan.caps.iter().map(|(wanted, share)| Cap { domains: of(*wanted), share: *share }).collect()
}

pub(crate) fn weights(plan: &Plan) -> Vec<(Name, f64)> {
    plan.domains.iter().map(|domain| (domain.name.clone(), domain.weight)).collect()
}

/// What the plan and the base have to agree on.
fn check_fit(plan: &Plan, architecture: &Architecture, tokenizer: &Tokenizer) -> Result<(), Error> {
    let mut faults = Vec::new();
    let (needs, has) = (tokenizer.vocabulary() as usize, architecture.vocab);
    if needs > has {
        let message =
            format!("has a tokenizer of {needs} tokens and a vocabulary of {has}; they do not belong together");
        faults.push(Fault::new("base", message));
    }
    if plan.head.is_none() && (architecture.head != HeadKind::Tokens || !architecture.causal) {
        let message = format!(
            "is a {}, which gives no tokens from left to right; expected a model with causal attention and a head over \
             tokens, or classes that it is to tell apart (`tune.head`)",
            architecture.class_name()
        );
        faults.push(Fault::new("base", message));
    }
    let context = architecture.max_position;
    if u64::from(plan.max_length) > context && !architecture.positions.changes_at(plan.max_length as usize) {
        faults.push(Fault::new("data.max_length", format!("is {}; the base's context is {context}", plan.max_length)));
    }
    if faults.is_empty() { Ok(()) } else { Err(Error::Faults(faults)) }
}

/// A slot of the stack before anything starts.
pub(crate) enum Slotted {
    /// From an adapter.
    Read(Component),
    /// By its method.
    Begun(Begun),
}

fn begin(
    request: &Request,
    planned: &PlanSlot,
    base: &Base,
    path: &FieldPath,
    cx: &BuildCx<'_>,
    pinned: &mut Pins,
) -> Result<Slotted, Error> {
    match (&planned.from, &planned.method) {
        (Some(from), _) => Ok(Slotted::Read(Component::read(&folder(request, from, pinned)?, base, path, cx)?)),
        (None, Some(method)) => {
            let budget = request.plan.budget.as_ref().filter(|_| planned.train);
            Ok(Slotted::Begun(Begun::new(planned, method, budget, base, path, cx)?))
        }
        (None, None) => Err(Error::Faults(vec![Fault::new(path.field("method"), "is missing")])),
    }
}

/// Where an input lies.
pub(crate) fn folder(request: &Request, input: &Input, pinned: &mut Pins) -> Result<PathBuf, Error> {
    match input {
        Input::Artifact(digest) => {
            let missing = || Error::Input { input: digest.to_string(), message: "was not handed over".to_owned() };
            request.inputs.get(digest).cloned().ok_or_else(missing)
        }
        Input::Path(path) => {
            let path = PathBuf::from(path);
            // What is missing is told by whoever reads it.
            if path.is_file() || path.is_dir() {
                pinned.insert(path.display().to_string(), pin::content(&path)?);
            }
            Ok(path)
        }
        Input::Url(url) => Err(Error::Input {
            input: url.clone(),
            message: "is a URL; a base or an adapter has to be an artifact or a folder".to_owned(),
        }),
    }
}

/// Reads a data set.
fn read(
    request: &Request,
    input: &Input,
    form: Option<Form>,
    rows: Option<u64>,
    encoder: &Encoder,
    pinned: &mut Pins,
) -> Result<Dataset, Error> {
    let source = match input {
        Input::Url(url) => Source::parse(url)?,
        Input::Artifact(_) | Input::Path(_) => {
            let path = folder(request, input, pinned)?;
            let file = if path.is_dir() { only_file(&path)? } else { path };
            let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            Source::cached(&file, &name)?
        }
    };
    let dataset = Dataset::read(&source, encoder, Reading { form, on_bad_row: request.plan.on_bad_row, rows })?;
    if let Input::Url(url) = input {
        pinned.insert(url.clone(), Digest::from_bytes(dataset.digest()));
    }
    Ok(dataset)
}

/// The one file of a data set's folder.
fn only_file(folder: &Path) -> Result<PathBuf, Error> {
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io(folder))?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if path.is_file() && !hidden {
            files.push(path);
        }
    }
    match files.as_slice() {
        [file] => Ok(file.clone()),
        _ => Err(Error::Input {
            input: folder.display().to_string(),
            message: format!("holds {} files; expected the one file of a data set", files.len()),
        }),
    }
}
