//! The checks of a job file, in three layers: structure, methods, relations between fields.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use jsonschema::Validator;
use serde_json::Value;

use super::plan::{HEAD, head_slot, logical_shards, longest};
use super::tune::{RewardSpec, SlotSpec};
use super::{Bounds, Device, Form, HeadSpec, JobKind, JobSpec, MergedInto, Precision, Reference, VERSION, data};
use crate::fault::{Fault, FieldPath};
use crate::method::{Catalogue, Merges, MethodRef, Point, schema};
use crate::stages;

/// The most bytes of the name of a further slot that trains.
const FURTHER_BYTES_MAX: usize = 48;

static SCHEMA: LazyLock<(Value, Validator)> = LazyLock::new(|| {
    let schema = JobSpec::schema();
    let validator = jsonschema::validator_for(&schema).expect("generated schemas are valid");
    (schema, validator)
});

/// Faults against the schema of the job file.
pub(super) fn structure(value: &Value) -> Vec<Fault> {
    let (schema, validator) = &*SCHEMA;
    let mut faults = schema::check_with(validator, schema, value, &FieldPath::root());
    if let Some(version) = value.get("version").and_then(Value::as_u64).filter(|v| *v != u64::from(VERSION)) {
        faults.push(Fault::new("version", format!("is {version}; this build reads version {VERSION}")));
    }
    faults
}

/// Faults of methods and their parameters. Works on the value, so that they are found beside faults of structure.
pub(super) fn methods(value: &Value, catalogue: &Catalogue) -> Vec<Fault> {
    let mut faults = Vec::new();
    let tune = FieldPath::from("tune");
    for (field, point) in [
        ("surgery", Point::Surgery),
        ("quantization", Point::Quantization),
        ("budget", Point::Budget),
        ("objective", Point::Objective),
        ("step", Point::StepRule),
        ("optimizer", Point::Optimizer),
        ("schedule", Point::Schedule),
    ] {
        faults.extend(method_at(value.pointer(&format!("/tune/{field}")), point, &tune.field(field), catalogue));
    }
    let rewards = value.pointer("/tune/rewards").and_then(Value::as_array).into_iter().flatten().enumerate();
    for (index, reward) in rewards {
        let mut reward = reward.clone();
        if let Some(fields) = reward.as_object_mut() {
            fields.remove(RewardSpec::WEIGHT);
        }
        faults.extend(method_at(Some(&reward), Point::Reward, &tune.field("rewards").index(index), catalogue));
    }
    faults.extend(method_at(value.get("recipe"), Point::Recipe, &FieldPath::from("recipe"), catalogue));
    let mixing = FieldPath::from("data").field("mixing");
    faults.extend(method_at(value.pointer("/data/mixing"), Point::Mixing, &mixing, catalogue));
    let stack = value.pointer("/tune/stack").and_then(Value::as_array).into_iter().flatten().enumerate();
    let slots = stack.map(|(index, slot)| (tune.field("stack").index(index), slot));
    for (path, slot) in slots.chain(value.pointer("/tune/adapter").map(|slot| (tune.field("adapter"), slot))) {
        faults.extend(slot_at(slot, &path, catalogue));
    }
    faults
}

fn method_at(value: Option<&Value>, point: Point, path: &FieldPath, catalogue: &Catalogue) -> Vec<Fault> {
    // What is no method reference at all is a fault of structure, found there.
    let named = value.and_then(|value| serde_json::from_value::<MethodRef>(value.clone()).ok());
    named.map(|named| catalogue.check(point, &named, path)).unwrap_or_default()
}

fn slot_at(slot: &Value, path: &FieldPath, catalogue: &Catalogue) -> Vec<Fault> {
    let Some(fields) = slot.as_object() else { return Vec::new() };
    let mut faults = method_at(fields.get("init"), Point::Init, &path.field("init"), catalogue);
    let params = fields.iter().filter(|(name, _)| !SlotSpec::FIELDS.contains(&name.as_str()));
    let params: serde_json::Map<String, Value> = params.map(|(name, value)| (name.clone(), value.clone())).collect();
    match (fields.get("method").and_then(Value::as_str), fields.contains_key("from")) {
        (Some(method), false) => {
            let named = MethodRef { method: method.to_owned(), params };
            faults.extend(catalogue.check(Point::Adapter, &named, path));
        }
        (None, false) if !fields.contains_key("method") => faults.push(Fault::new(path.field("method"), "is missing")),
        (_, true) => {
            let taken = params.keys().map(String::as_str).chain(["method", "targets", "exclude", "init"]);
            for name in taken.filter(|name| fields.contains_key(*name)) {
                let message = "cannot be given together with `from`: it is read from the adapter";
                faults.push(Fault::new(path.field(name), message));
            }
        }
        _ => {}
    }
    faults
}

/// Faults between fields that are each right by themselves. Those of a recipe are those of its stages.
pub(super) fn relations(spec: &JobSpec, catalogue: &Catalogue) -> Vec<Fault> {
    let of_stages =
        spec.own_references().into_iter().filter(|(_, reference)| matches!(reference, Reference::Stage { .. }));
    let mut faults: Vec<Fault> = of_stages
        .map(|(path, reference)| Fault::new(path, format!("is {reference}, which only a stage of a recipe can name")))
        .collect();
    if let Err(message) = spec.limits.deadline_ms() {
        faults.push(Fault::new("limits.deadline", message));
    }
    match (spec.kind, &spec.recipe) {
        (JobKind::Tune, None) => faults.extend(stage_relations(spec, catalogue)),
        (JobKind::Tune, Some(_)) => faults.push(Fault::new("kind", "is tune, but `recipe` is given; expected recipe")),
        (JobKind::Recipe, None) => faults.push(Fault::new("recipe", "is missing")),
        (JobKind::Recipe, Some(_)) if faults.is_empty() => {
            faults.extend(stages::known(spec, &[]).err().unwrap_or_default());
        }
        (JobKind::Recipe, Some(_)) => {}
    }
    faults
}

/// Faults between fields of a job that trains, by itself or as a stage.
pub(super) fn stage_relations(spec: &JobSpec, catalogue: &Catalogue) -> Vec<Fault> {
    let mut faults = Vec::new();
    length(spec, &mut faults);
    slots(spec, catalogue, &mut faults);
    data::check(&spec.data, &mut faults);
    answers(spec, catalogue, &mut faults);
    beside(spec, catalogue, &mut faults);
    shards(spec, catalogue, &mut faults);
    share(spec, catalogue, &mut faults);
    surgery(spec, catalogue, &mut faults);
    budget(spec, catalogue, &mut faults);
    quantization(spec, catalogue, &mut faults);
    head(spec, catalogue, &mut faults);
    gate(spec, catalogue, &mut faults);
    for (path, slot) in spec.tune.slots().into_iter().filter(|_| spec.outputs.merged) {
        if let Some(method) = slot.method_ref().filter(|method| catalogue.stays_beside(method)) {
            let always = catalogue.get(&method.method).is_some_and(|document| document.merges == Merges::No);
            let so = if always { "" } else { " with these parameters" };
            let message =
                format!("is true, but `{path}` is {}, which cannot be merged into the base{so}", method.method);
            faults.push(Fault::new("outputs.merged", message));
        }
    }
    if spec.tune.from_scratch && spec.tune.precision == Precision::Bf16 {
        let message = "is bf16, but `tune.from_scratch` makes a base of f32; expected f32";
        faults.push(Fault::new("tune.precision", message));
    }
    if spec.outputs.merged_tag.is_some() && !spec.outputs.merged {
        faults.push(Fault::new("outputs.merged_tag", "is given, but `outputs.merged` is false"));
    }
    faults
}

fn length(spec: &JobSpec, faults: &mut Vec<Fault>) {
    let given = [
        ("steps", spec.tune.steps.is_some()),
        ("epochs", spec.tune.epochs.is_some()),
        ("tokens", spec.tune.tokens.is_some()),
    ];
    let given: Vec<&str> = given.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
    match given.as_slice() {
        [] => faults.push(Fault::new("tune", "says no length; expected one of `steps`, `epochs`, `tokens`")),
        [_] => {}
        several => {
            let message = format!("gives {}; expected exactly one of them", several.join(" and "));
            faults.push(Fault::new("tune", message));
        }
    }
}

fn slots(spec: &JobSpec, catalogue: &Catalogue, faults: &mut Vec<Fault>) {
    if spec.tune.adapter.is_some() && !spec.tune.stack.is_empty() {
        faults.push(Fault::new("tune.adapter", "cannot be given together with `tune.stack`; it is a stack of one"));
    }
    let slots = spec.tune.slots();
    if slots.is_empty() {
        faults.push(Fault::new("tune", "says nothing to train; expected an `adapter` or a `stack`"));
    } else if !slots.iter().any(|(_, slot)| slot.train) {
        faults.push(Fault::new("tune.stack", "trains nothing; expected one slot with `train: true`"));
    }
    // A result of a further slot is called after it, with `adapter-` before that.
    let further = slots.iter().filter(|(_, slot)| slot.train).skip(1);
    for (path, slot) in further {
        if let Some(name) = slot.name.as_ref().filter(|name| name.as_str().len() > FURTHER_BYTES_MAX) {
            let message = format!(
                "is {name:?}; the name of a second slot that trains has at most {FURTHER_BYTES_MAX} characters"
            );
            faults.push(Fault::new(path.field("name"), message));
        }
    }
    let mut names = BTreeSet::new();
    for (path, slot) in slots {
        let method = slot.method.as_deref().and_then(|method| catalogue.get(method));
        let name = slot.name.as_ref().map(ToString::to_string);
        let name = name.or_else(|| method.map(|document| document.name.clone())).unwrap_or_else(|| "from".to_owned());
        if !names.insert(name.clone()) {
            faults.push(Fault::new(
                path.field("name"),
                format!("is {name:?}, as another slot is called; give each its own"),
            ));
        }
        if slot.method.is_some() && slot.from.is_none() && !slot.train {
            faults.push(Fault::new(path.field("train"), "is false for a fresh component, which would do nothing"));
        }
    }
}

/// What stands beside documents of some domains is frozen, and these are domains of the job.
fn beside(spec: &JobSpec, catalogue: &Catalogue, faults: &mut Vec<Fault>) {
    let known: Vec<&str> = spec.data.domains.iter().map(|domain| domain.name.as_str()).collect();
    for (path, slot) in spec.tune.slots().into_iter().filter(|(_, slot)| !slot.domains.is_empty()) {
        let path = path.field("domains");
        if slot.from.is_none() || slot.train {
            let message = "is given for what trains; expected an adapter with `from` and `train: false`";
            faults.push(Fault::new(path.clone(), message));
        }
        if catalogue.answers(&spec.tune.objective).is_some() {
            let message = format!(
                "is given, but `tune.objective` is {}, which learns from answers that the model gives as it is",
                spec.tune.objective.method
            );
            faults.push(Fault::new(path.clone(), message));
        }
        for (index, name) in slot.domains.iter().enumerate() {
            let path = path.index(index);
            if !known.contains(&name.as_str()) {
                let hint = crate::suggest::hint(name.as_str(), known.iter().copied());
                let message = format!("is {name}, which no domain of `data.domains` is called{hint}");
                faults.push(Fault::new(path, message));
            } else if slot.domains[..index].contains(name) {
                faults.push(Fault::new(path, format!("is {name} for the second time")));
            }
        }
    }
}

/// Who learns from answers needs somebody who judges them, and room for them.
fn answers(spec: &JobSpec, catalogue: &Catalogue, faults: &mut Vec<Fault>) {
    let (objective, rewards) = (&spec.tune.objective.method, &spec.tune.rewards);
    let Some((_, tokens)) = catalogue.answers(&spec.tune.objective) else {
        if !rewards.is_empty() {
            let message = format!(
                "judges answers of the model, but `tune.objective` is {objective}, which learns what is in the data"
            );
            faults.push(Fault::new("tune.rewards", message));
        }
        return;
    };
    if rewards.is_empty() {
        let message = format!(
            "is empty, but `tune.objective` is {objective}, which learns from answers: expected what they are worth"
        );
        faults.push(Fault::new("tune.rewards", message));
    }
    if tokens >= spec.data.max_length {
        let message = format!(
            "is {}; with answers of {tokens} tokens no prompt has room: set it higher or these shorter",
            spec.data.max_length
        );
        faults.push(Fault::new("data.max_length", message));
    }
}

/// A base is shared as it is: whoever changes it, or splits its run over devices, needs a process alone.
fn share(spec: &JobSpec, catalogue: &Catalogue, faults: &mut Vec<Fault>) {
    if !spec.resources.share_base {
        return;
    }
    let mut refuse = |what: &str| {
        let message = format!("is true, but {what}; a shared base is frozen, and each job on it has one device");
        faults.push(Fault::new("resources.share_base", message));
    };
    if spec.tune.from_scratch {
        refuse("`tune.from_scratch` makes a base of the job's own");
    }
    if spec.tune.surgery.is_some() {
        refuse("`tune.surgery` makes another model of it");
    }
    if spec.resources.workers * spec.resources.devices_per_worker != 1 {
        refuse("the job asks for several devices");
    }
    for (path, slot) in spec.tune.slots() {
        let method = slot.method.as_deref().and_then(|method| catalogue.get(method));
        if method.is_some_and(|method| method.trains_base) {
            refuse(&format!("`{path}` trains the weights of the base"));
        }
        if slot.init.as_ref().is_some_and(|init| catalogue.owns_base(init)) {
            refuse(&format!("`{}` quantises the base anew", path.field("init")));
        }
    }
}

/// Classes need names that differ and rows that have them, vectors an objective that compares them; and such rows and objectives need
/// a head.
fn head(spec: &JobSpec, catalogue: &Catalogue, faults: &mut Vec<Fault>) {
    let (tune, head) = (&spec.tune, FieldPath::from("tune").field("head"));
    let data = FieldPath::from("data");
    let domains = spec.data.domains.iter().enumerate();
    let domains = domains.map(|(index, domain)| (data.field("domains").index(index), domain.form));
    let validation = spec.data.validation.iter().enumerate();
    let validation = validation.map(|(index, set)| (data.field("validation").index(index), set.form));
    let expected = tune.head.as_ref().map(|head| head.task.form());
    for (path, form) in domains.chain(validation) {
        let Some(form) = form else { continue };
        let nothing_says = match form {
            Form::Classification | Form::TokenClassification => Some("the classes"),
            Form::Retrieval => Some("that the model gives vectors"),
            _ => None,
        };
        let message = match expected {
            Some(expected) if form != expected => {
                format!("is {}, but `tune.head` learns from rows of {}", form.name(), expected.name())
            }
            None => match nothing_says {
                Some(what) => format!("is {}, and nothing says {what}: expected `tune.head`", form.name()),
                None => continue,
            },
            Some(_) => continue,
        };
        faults.push(Fault::new(path.field("form"), message));
    }
    let (objective, compares) = (&tune.objective.method, catalogue.compares_vectors(&tune.objective));
    let gives = tune.head.as_ref().is_some_and(HeadSpec::gives_vectors);
    let misfit = match (gives, compares) {
        (false, true) => Some("compares vectors, and the model gives none: expected `tune.head: {task: embedding}`"),
        (true, false) => {
            Some("compares no vectors, and `tune.head` gives nothing else: expected one such as `info-nce`")
        }
        _ => None,
    };
    if let Some(misfit) = misfit {
        faults.push(Fault::new("tune.objective", format!("is {objective}, which {misfit}")));
    }
    let Some(spec_of_head) = &tune.head else { return };
    if gives && !spec_of_head.labels.is_empty() {
        faults.push(Fault::new(head.field("labels"), "is given, but vectors have no classes: leave it out"));
    }
    if !gives && spec_of_head.labels.is_empty() {
        let message = "is missing; expected the names of the classes, in the order of their numbers";
        faults.push(Fault::new(head.field("labels"), message));
    }
    for (field, given) in [("pooling", spec_of_head.pooling.is_some()), ("bidirectional", spec_of_head.bidirectional)] {
        if given && !gives {
            let message = "is given, but is for `task: embedding` only: leave it out";
            faults.push(Fault::new(head.field(field), message));
        }
    }
    for (index, label) in spec_of_head.labels.iter().enumerate() {
        if spec_of_head.labels[..index].contains(label) {
            let path = head.field("labels").index(index);
            faults.push(Fault::new(path, format!("is {label:?} for the second time; give each class its own")));
        }
    }
    let mut refuse = |why: &str| faults.push(Fault::new(head.clone(), format!("is given, but {why}")));
    if tune.from_scratch {
        refuse("`tune.from_scratch` makes a model of the base's own head: leave one of them out");
    }
    if tune.surgery.is_some() {
        refuse("`tune.surgery` makes a model of the base's own head: leave one of them out");
    }
    if catalogue.answers(&tune.objective).is_some() {
        refuse(&format!(
            "`tune.objective` is {}, which learns from answers of a model that writes",
            tune.objective.method
        ));
    }
    if spec.resources.share_base {
        refuse("`resources.share_base` is true, and jobs share a base with the head that it has");
    }
    let added = head_slot(spec, catalogue).is_some();
    if let Some((path, _)) = tune.slots().into_iter().find(|(_, slot)| added && slot.called().as_deref() == Some(HEAD))
    {
        let message = format!("is {HEAD:?}, as the slot is called in which `tune.head` trains; give it another");
        faults.push(Fault::new(path.field("name"), message));
    }
}

/// What has to be reached is measured.
fn gate(spec: &JobSpec, catalogue: &Catalogue, faults: &mut Vec<Fault>) {
    let path = FieldPath::from("outputs").field("gate");
    let sets: Vec<&str> = spec.data.validation.iter().map(|set| set.name.as_str()).collect();
    for (set, bounds) in &spec.outputs.gate {
        let path = path.field(set.as_str());
        if !sets.contains(&set.as_str()) {
            let known = if sets.is_empty() { "there is none".to_owned() } else { sets.join(", ") };
            let message = format!("is no validation set; expected one of `data.validation`: {known}");
            faults.push(Fault::new(path.clone(), message));
        }
        if *bounds == Bounds::default() {
            let message = "bounds nothing; expected `loss`, `of_before`, `accuracy` or `reward`";
            faults.push(Fault::new(path.clone(), message));
        }
        if bounds.accuracy.is_some() && spec.tune.head.is_none() {
            let message = "is for models that give classes or vectors; expected `tune.head`, or a bound of the loss";
            faults.push(Fault::new(path.field("accuracy"), message));
        }
        let objective = &spec.tune.objective;
        if catalogue.answers(objective).is_some() {
            let losses = [("loss", bounds.loss), ("of_before", bounds.of_before)];
            for (field, _) in losses.into_iter().filter(|(_, bound)| bound.is_some()) {
                let message = format!(
                    "bounds a loss, but `tune.objective` is {}, which learns from what answers are worth; expected `reward`",
                    objective.method
                );
                faults.push(Fault::new(path.field(field), message));
            }
        } else if bounds.reward.is_some() {
            let message = format!(
                "is what answers of the model are worth, but `tune.objective` is {}, which learns what is in the data; \
                 expected `loss` or `of_before`",
                objective.method
            );
            faults.push(Fault::new(path.field("reward"), message));
        }
    }
}

/// Weights in few bits are read and never change, and what is merged has whole numbers: of which base, is said.
fn quantization(spec: &JobSpec, catalogue: &Catalogue, faults: &mut Vec<Fault>) {
    let (tune, outputs, into) = (&spec.tune, &spec.outputs, FieldPath::from("outputs").field("merged_into"));
    if outputs.merged_into.is_some() && !outputs.merged {
        faults.push(Fault::new(into.clone(), "is given, but `outputs.merged` is false"));
    }
    let starts = tune.slots().into_iter().filter_map(|(path, slot)| Some((path.field("init"), slot.init.as_ref()?)));
    if tune.quantization.is_none() {
        for (path, init) in starts {
            if catalogue.get(&init.method).is_some_and(|init| init.needs_quantization) {
                let message = format!(
                    "is {}, which makes up for what few bits lose, but the base has whole numbers; expected `tune.quantization`",
                    init.method
                );
                faults.push(Fault::new(path, message));
            }
        }
        if outputs.merged_into.is_some() {
            let message = "is given, but `tune.quantization` is not: there is one base to merge into";
            faults.push(Fault::new(into, message));
        }
        return;
    }
    let path = FieldPath::from("tune").field("quantization");
    let mut refuse = |why: String| faults.push(Fault::new(path.clone(), format!("is given, but {why}")));
    if tune.from_scratch {
        refuse("`tune.from_scratch` makes a base at random: expected a base that was trained".to_owned());
    }
    if let Some(surgery) = &tune.surgery
        && catalogue.get(&surgery.method).is_none_or(|document| document.on_quantized() != Some(true))
    {
        refuse(format!(
            "`tune.surgery` is {}, which makes another model of whole numbers: leave one of them out",
            surgery.method
        ));
    }
    for (path, slot) in tune.slots() {
        let method = slot.method.as_deref().and_then(|method| catalogue.get(method));
        if let Some(method) = method.filter(|method| method.on_quantized() == Some(false)) {
            refuse(format!(
                "`{path}` is {}, which trains the weights of the base, and weights in few bits do not train: leave it out, or \
                 train an adapter beside them, such as lora",
                method.name
            ));
        }
    }
    if !outputs.merged {
        return;
    }
    let makes_up = |init: &MethodRef| catalogue.get(&init.method).is_some_and(|init| init.needs_quantization);
    let owner = starts.into_iter().find(|(_, init)| makes_up(init));
    match (outputs.merged_into, owner) {
        (None, _) => {
            let message = "is missing: `tune.quantization` holds the base in few bits, into which nothing is merged; expected \
                           base (the weights of its folder) or dequantized (those that the adapter is trained beside)";
            faults.push(Fault::new(into, message));
        }
        (Some(MergedInto::Base), Some((path, init))) => {
            let message = format!(
                "is base, but `{path}` is {}, whose adapter makes up for what the few bits lose: on the weights of the folder \
                 it would be counted twice; expected dequantized",
                init.method
            );
            faults.push(Fault::new(into, message));
        }
        (Some(_), _) => {}
    }
}

/// What a surgery makes is kept as the model that the run ends with: an adapter would be of a model that nobody has, unless its folder
/// can say how that is made.
fn surgery(spec: &JobSpec, catalogue: &Catalogue, faults: &mut Vec<Fault>) {
    let Some(surgery) = &spec.tune.surgery else { return };
    let repeats = catalogue.get(&surgery.method).is_some_and(|surgery| surgery.repeats().is_some());
    for (path, slot) in spec.tune.slots() {
        let method = slot.method.as_deref().and_then(|method| catalogue.get(method));
        let keeps = method.is_some_and(|method| method.trains_base);
        if repeats {
            if let Some(method) = method.filter(|method| !keeps && !method.says_repeats()) {
                let able = catalogue.documents().filter(|other| other.says_repeats());
                let able: Vec<&str> = able.map(|other| other.name.as_str()).collect();
                let message = format!(
                    "is {}, whose folder cannot say that `tune.surgery` repeats layers; expected one of {}, or a method that trains the \
                     weights of the base",
                    method.name,
                    able.join(", ")
                );
                faults.push(Fault::new(path, message));
            }
            continue;
        }
        // A method that is not known is told of already.
        if !keeps && (slot.from.is_some() || method.is_some()) {
            let message = "is an adapter, and `tune.surgery` makes a model of its own, which only a method that trains the \
                           weights of the base keeps";
            faults.push(Fault::new(path, message));
        }
    }
}

/// The parameter by which single sites have ranks of their own.
const RANKS: &str = "rank_pattern";

/// Ranks are shared among the sites of a fresh component whose method lets sites differ, and which does not say by itself how.
fn budget(spec: &JobSpec, catalogue: &Catalogue, faults: &mut Vec<Fault>) {
    if spec.tune.budget.is_none() {
        return;
    }
    for (path, slot) in spec.tune.slots().into_iter().filter(|(_, slot)| slot.train) {
        if slot.from.is_some() {
            let message = format!("is given, but `{path}` starts from an adapter, whose ranks are what they are");
            faults.push(Fault::new("tune.budget", message));
        }
        let Some(method) = slot.method.as_deref().and_then(|method| catalogue.get(method)) else { continue };
        if method.schema["properties"].get(RANKS).is_none() {
            let able = catalogue.documents().filter(|other| other.schema["properties"].get(RANKS).is_some());
            let able: Vec<&str> = able.map(|other| other.name.as_str()).collect();
            let message = format!(
                "is given, but `{path}` is {}, whose sites have no ranks of their own; expected one of {}",
                method.name,
                able.join(", ")
            );
            faults.push(Fault::new("tune.budget", message));
        }
        for field in [RANKS, "alpha_pattern"].into_iter().filter(|field| slot.params.contains_key(*field)) {
            let message = "cannot be given together with `tune.budget`, which decides it";
            faults.push(Fault::new(path.field(field), message));
        }
    }
}

fn shards(spec: &JobSpec, catalogue: &Catalogue, faults: &mut Vec<Fault>) {
    let (batch, longest) = (spec.tune.batch_tokens, longest(spec, catalogue));
    let documents = match longest - spec.data.max_length {
        0 => "data.max_length".to_owned(),
        before => format!("(data.max_length + {before} rows before each document)"),
    };
    let shards = logical_shards(spec, catalogue);
    if u64::from(batch) < u64::from(longest) * u64::from(shards) {
        let message = if spec.tune.logical_shards.is_some() {
            format!(
                "is {batch}; expected at least logical_shards × {documents} = {}",
                u64::from(longest) * u64::from(shards)
            )
        } else {
            format!("is {batch}; expected at least {documents} = {longest}")
        };
        faults.push(Fault::new("tune.batch_tokens", message));
    }
    let ranks = spec.resources.workers * spec.resources.devices_per_worker;
    if ranks > 0 && !shards.is_multiple_of(ranks) {
        let message = format!(
            "makes {ranks} ranks, which do not divide the {shards} logical shards; set `tune.logical_shards` to a multiple"
        );
        let field = if spec.resources.workers > 1 { "resources.workers" } else { "resources.devices_per_worker" };
        faults.push(Fault::new(field, message));
    }
    if spec.resources.device == Device::Cuda && spec.resources.devices_per_worker > 1 {
        let message = format!(
            "is {}; expected 1: this version trains a job on one NVIDIA device",
            spec.resources.devices_per_worker
        );
        faults.push(Fault::new("resources.devices_per_worker", message));
    }
}
