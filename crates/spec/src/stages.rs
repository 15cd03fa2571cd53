//! The stages of a job that is a recipe: which there are, what is wrong with them, and what follows from those that are done.
//!
//! ```text
//! job, outcomes -> known() -> stages -> next() -> make these | wait | done, with this stage's results
//! ```
//!
//! Everything follows from the job's specification and the outcomes of its stages, both of which are stored. So whoever starts
//! anew finds what it would have found, and asks it of the same functions.

use std::collections::{BTreeMap, BTreeSet};

use crate::fault::{Fault, FieldPath};
use crate::id::{Digest, Name, Step};
use crate::job::{JobKind, JobSpec, Reference, SlotSpec};
use crate::method::{BuildCx, Catalogue};
use crate::recipes::{RECIPES, Recipe};

/// The most bytes of a stage's name: a stage's id is its job's id and its name.
pub const NAME_BYTES_MAX: usize = 40;
/// The most stages of a job.
pub const STAGES_MAX: usize = 1000;

/// The role of a trained adapter.
const ADAPTER: &str = "adapter";
/// The role of a trained model.
const MODEL: &str = "model";
/// The role of a model with the adapter merged in.
const MERGED: &str = "merged";
/// The role of what was measured of the base.
const STATISTICS: &str = "statistics";

/// A job that is a part of another.
#[derive(Debug, Clone, PartialEq)]
pub struct StageSpec {
    /// Its name, unique among the stages.
    pub name: Name,
    /// What it does. It may start from what stages before it make.
    pub job: JobSpec,
    /// Stages before it that must have succeeded first, beside those whose results it names.
    pub after: Vec<Name>,
}

impl StageSpec {
    /// All stages that must have succeeded first.
    pub fn awaits(&self) -> BTreeSet<Name> {
        let named = self.job.references().into_iter().filter_map(|(_, reference)| match reference {
            Reference::Stage { stage, .. } => Some(stage),
            _ => None,
        });
        self.after.iter().cloned().chain(named).collect()
    }

    /// What it makes, the main result first.
    fn roles(&self) -> Vec<String> {
        let trains_base = |slot: &SlotSpec| {
            let method = slot.method.as_deref().and_then(|method| Catalogue::embedded().get(method));
            slot.train && method.is_some_and(|method| method.trains_base)
        };
        let slots = self.job.tune.slots();
        let outputs = &self.job.outputs;
        let merged = outputs.merged.then(|| MERGED.to_owned());
        let beside = merged.into_iter().chain(outputs.statistics.then(|| STATISTICS.to_owned()));
        if slots.iter().any(|(_, slot)| trains_base(slot)) {
            return std::iter::once(MODEL.to_owned()).chain(beside).collect();
        }
        let trained = slots.iter().filter(|(_, slot)| slot.train);
        let further = trained.skip(1).filter_map(|(_, slot)| Some(format!("{ADAPTER}-{}", slot.called()?)));
        std::iter::once(ADAPTER.to_owned()).chain(further).chain(beside).collect()
    }
}

/// A stage that has succeeded.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The stage.
    pub stage: Name,
    /// What it made, by role.
    pub outputs: BTreeMap<String, Digest>,
    /// Its last loss on each of its validation sets, of a recipe that compares them; one that is no number is left out.
    pub losses: BTreeMap<String, f64>,
}

/// The stages of a job that were made, by what has become of them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Made {
    /// Those that have succeeded.
    pub done: Vec<Outcome>,
    /// Those that have ended otherwise.
    pub failed: BTreeSet<Name>,
    /// Those that have not ended.
    pub open: BTreeSet<Name>,
}

/// What whoever runs the stages of a job must know of its recipe beside them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Manner {
    /// How many stages may fail or be cancelled while the others go on.
    pub may_fail: u32,
    /// Whether it asks for the losses of stages that have succeeded, when all have ended.
    pub compares_losses: bool,
}

/// What there is to do about the stages of a job.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// These can be made now; they name results by digest.
    Make(Vec<StageSpec>),
    /// Those that were made must end first.
    Wait,
    /// None is to be made or waited for any more; the results of this one are the job's, if it has any.
    Done(Option<Name>),
}

/// The stages of a job as far as they are known when those in `done` have succeeded, each after those that it awaits.
///
/// # Errors
/// Everything that is wrong with them, with paths of the job file.
pub fn known(job: &JobSpec, done: &[Outcome]) -> Result<Vec<StageSpec>, Vec<Fault>> {
    known_of(&*recipe(job)?, job, done)
}

/// Where in the job file that stands which is at `path` in a stage.
///
/// # Errors
/// What is wrong with the recipe itself.
pub fn place(job: &JobSpec, stage: &Name, path: &FieldPath) -> Result<FieldPath, Vec<Fault>> {
    Ok(recipe(job)?.place(stage, path))
}

/// How the stages of a job are to be run.
///
/// # Errors
/// What is wrong with the recipe itself.
pub fn manner(job: &JobSpec) -> Result<Manner, Vec<Fault>> {
    let recipe = recipe(job)?;
    Ok(Manner { may_fail: recipe.may_fail(), compares_losses: recipe.compares_losses() })
}

/// What there is to do when these stages were made.
///
/// # Errors
/// Everything that is wrong with stages that are known now.
pub fn next(job: &JobSpec, made: &Made) -> Result<Next, Vec<Fault>> {
    next_of(&*recipe(job)?, job, made)
}

fn recipe(job: &JobSpec) -> Result<Box<dyn Recipe>, Vec<Fault>> {
    let cx = BuildCx { steps: Step(0), domains: &[], words: None };
    let path = FieldPath::from("recipe");
    let named = job.recipe.as_ref().ok_or_else(|| vec![Fault::new(path.clone(), "is missing")])?;
    RECIPES.build(named, &path, &cx)
}

fn known_of(recipe: &dyn Recipe, job: &JobSpec, done: &[Outcome]) -> Result<Vec<StageSpec>, Vec<Fault>> {
    let mut stages = recipe.expand(job)?;
    let mut faults = check(recipe, &stages, 0);
    if !done.is_empty() && faults.is_empty() {
        let first = stages.len();
        let known: BTreeSet<Name> = stages.iter().map(|stage| stage.name.clone()).collect();
        stages.extend(recipe.next(job, done)?.into_iter().filter(|stage| !known.contains(&stage.name)));
        faults = check(recipe, &stages, first);
    }
    if stages.is_empty() {
        faults.push(Fault::new("recipe", "has no stage; expected at least one"));
    }
    if let Some(result) = recipe.named_result().filter(|name| stages.iter().all(|stage| stage.name != **name)) {
        faults.push(Fault::new("recipe.result", format!("is {result}, which no stage is called{}", listed(&stages))));
    }
    faults.sort();
    faults.dedup();
    if faults.is_empty() { Ok(stages) } else { Err(faults) }
}

fn next_of(recipe: &dyn Recipe, job: &JobSpec, made: &Made) -> Result<Next, Vec<Fault>> {
    let Made { done, failed, open } = made;
    let stages = known_of(recipe, job, done)?;
    let outcome = |name: &Name| done.iter().find(|outcome| outcome.stage == *name);
    // Whatever awaits a stage that has failed is never made.
    let mut lost = failed.clone();
    let mut room = recipe.at_once().saturating_sub(open.len());
    let mut waits = !open.is_empty();
    let mut make = Vec::new();
    for stage in &stages {
        let awaited = stage.awaits();
        if !awaited.is_disjoint(&lost) {
            lost.insert(stage.name.clone());
        }
        let is_made = open.contains(&stage.name) || outcome(&stage.name).is_some();
        if is_made || lost.contains(&stage.name) {
            continue;
        }
        if room == 0 || awaited.iter().any(|name| outcome(name).is_none()) {
            waits = true;
            continue;
        }
        room -= 1;
        let mut stage = stage.clone();
        stage.job.replace_references(|reference| match reference {
            Reference::Stage { stage: from, role } => {
                let made = outcome(from).and_then(|outcome| outcome.outputs.get(role.as_str()));
                let fault =
                    || vec![Fault::new("recipe", format!("names {reference}, which stage {from} did not make"))];
                made.map(|digest| Reference::Digest(*digest)).ok_or_else(fault)
            }
            other => Ok(other.clone()),
        })?;
        make.push(stage);
    }
    if !make.is_empty() {
        return Ok(Next::Make(make));
    }
    if waits {
        return Ok(Next::Wait);
    }
    Ok(Next::Done(recipe.result(&stages, done)))
}

/// What is wrong with the stages from `first` on.
fn check(recipe: &dyn Recipe, stages: &[StageSpec], first: usize) -> Vec<Fault> {
    let mut faults = Vec::new();
    if stages.len() > STAGES_MAX {
        faults.push(Fault::new("recipe", format!("has {} stages; expected at most {STAGES_MAX}", stages.len())));
    }
    for (at, stage) in stages.iter().enumerate().skip(first) {
        let (before, name) = (&stages[..at], &stage.name);
        let mut fault = |path: &FieldPath, message: String| {
            faults.push(Fault::new(recipe.place(name, path), message));
        };
        if before.iter().any(|other| other.name == *name) {
            fault(&"name".into(), format!("is {name} for the second time; give each stage its own"));
        }
        if name.as_str().len() > NAME_BYTES_MAX {
            fault(&"name".into(), format!("is {name:?}; a stage's name has at most {NAME_BYTES_MAX} characters"));
        }
        if stage.job.kind != JobKind::Tune || stage.job.recipe.is_some() {
            fault(&"kind".into(), "is a recipe, of which a stage cannot be one".to_owned());
        }
        for (index, after) in stage.after.iter().enumerate() {
            if before.iter().all(|other| other.name != *after) {
                let message = format!("is {after}, which is no stage before {name}{}", listed(before));
                fault(&FieldPath::from("after").index(index), message);
            }
        }
        for (path, reference) in stage.job.references() {
            let Reference::Stage { stage: from, role } = &reference else { continue };
            let Some(maker) = before.iter().find(|other| other.name == *from) else {
                fault(&path, format!("is {reference}, and no stage before {name} is called {from}{}", listed(before)));
                continue;
            };
            let wanted: &[&str] = match path.as_str() {
                "base" => &[MODEL, MERGED],
                path if path.starts_with("data.") => &[],
                _ => &[ADAPTER],
            };
            let made = maker.roles();
            // Several slots make an adapter each: the first has the bare role.
            let kind = if role.as_str().starts_with(&format!("{ADAPTER}-")) { ADAPTER } else { role.as_str() };
            if made.iter().all(|made| made != role.as_str()) {
                fault(&path, format!("is {reference}, but stage {from} makes {}", made.join(" and ")));
            } else if !wanted.contains(&kind) {
                let wanted = if wanted.is_empty() { "data" } else { wanted[0] };
                fault(&path, format!("is {reference}, a stage's {role}; expected {wanted} here"));
            }
        }
    }
    faults
}

fn listed(stages: &[StageSpec]) -> String {
    let names: Vec<&str> = stages.iter().map(|stage| stage.name.as_str()).take(16).collect();
    if names.is_empty() { "; there is none".to_owned() } else { format!("; there are {}", names.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{read_value, read_yaml};

    const JOB: &str = "version: 1\nname: j\nkind: recipe\nbase: b\ndata: {domains: [{name: a, source: a}]}\n\
                       tune: {adapter: {method: lora}, steps: 1}\n\
                       recipe: {method: pipeline, stages: [{name: x}]}\n";

    fn job() -> JobSpec {
        read_value(&read_yaml(JOB).unwrap(), Catalogue::embedded()).unwrap()
    }

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    /// Two starts, from the better of which it goes on; a stage follows that nobody knew at first.
    struct Halving;

    impl Halving {
        fn stage(job: &JobSpec, of: &str, from: Option<&str>) -> StageSpec {
            let mut job = JobSpec { kind: JobKind::Tune, recipe: None, ..job.clone() };
            let slot = job.tune.adapter.as_mut().unwrap();
            if let Some(from) = from {
                slot.method = None;
                slot.from = Some(Reference::Stage { stage: name(from), role: name(ADAPTER) });
            }
            StageSpec { name: name(of), job, after: Vec::new() }
        }
    }

    impl Recipe for Halving {
        fn expand(&self, job: &JobSpec) -> Result<Vec<StageSpec>, Vec<Fault>> {
            Ok(vec![Self::stage(job, "a", None), Self::stage(job, "b", None)])
        }

        fn next(&self, job: &JobSpec, done: &[Outcome]) -> Result<Vec<StageSpec>, Vec<Fault>> {
            let of = |stage: &str| done.iter().find(|outcome| outcome.stage.as_str() == stage);
            let (Some(a), Some(b)) = (of("a"), of("b")) else { return Ok(Vec::new()) };
            let better = if a.outputs[ADAPTER] < b.outputs[ADAPTER] { "a" } else { "b" };
            Ok(vec![Self::stage(job, "on", Some(better))])
        }

        fn place(&self, _: &Name, path: &FieldPath) -> FieldPath {
            path.clone()
        }
    }

    fn outcome(stage: &str, byte: u8) -> Outcome {
        let outputs = BTreeMap::from([(ADAPTER.to_owned(), Digest::from_bytes([byte; 32]))]);
        Outcome { stage: name(stage), outputs, losses: BTreeMap::new() }
    }

    fn made(next: &Next) -> Vec<&str> {
        match next {
            Next::Make(stages) => stages.iter().map(|stage| stage.name.as_str()).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_follows_is_found_again_from_the_same_outcomes() {
        let job = job();
        let next = |done: &[Outcome], names: &[&str]| {
            let open = names.iter().map(|text| name(text)).collect();
            next_of(&Halving, &job, &Made { done: done.to_vec(), open, ..Made::default() }).unwrap()
        };
        assert_eq!(made(&next(&[], &[])), ["a", "b"]);
        // Cut off between the two.
        assert_eq!(made(&next(&[], &["a"])), ["b"]);
        assert_eq!(next(&[], &["a", "b"]), Next::Wait);
        assert_eq!(next(&[outcome("a", 2)], &["b"]), Next::Wait);
        let both = [outcome("a", 2), outcome("b", 1)];
        let last = next(&both, &[]);
        assert_eq!((made(&last), &last), (vec!["on"], &next(&both, &[])));
        let Next::Make(stages) = last else { unreachable!() };
        let from = stages[0].job.tune.adapter.as_ref().unwrap().from.clone();
        assert_eq!(from, Some(Reference::Digest(Digest::from_bytes([1; 32]))), "the better one, by digest");
        assert_eq!(next(&both, &["on"]), Next::Wait);
        let [a, b] = both;
        assert_eq!(next(&[a, b, outcome("on", 9)], &[]), Next::Done(Some(name("on"))));
    }

    #[test]
    fn a_stage_that_did_not_make_what_another_names_is_a_fault() {
        let job = job();
        let empty = |stage: &str| Outcome {
            outputs: BTreeMap::from([(ADAPTER.to_owned(), Digest::from_bytes([1; 32]))]),
            ..outcome(stage, 1)
        };
        let done = [empty("a"), Outcome { outputs: BTreeMap::new(), ..outcome("b", 0) }];
        let stages = [Halving::stage(&job, "a", None), Halving::stage(&job, "c", Some("b"))];
        struct Fixed([StageSpec; 2]);
        impl Recipe for Fixed {
            fn expand(&self, _: &JobSpec) -> Result<Vec<StageSpec>, Vec<Fault>> {
                Ok(self.0.to_vec())
            }
            fn place(&self, _: &Name, path: &FieldPath) -> FieldPath {
                path.clone()
            }
        }
        let made = Made { done: done.to_vec(), ..Made::default() };
        let unknown = next_of(&Fixed(stages), &job, &made).unwrap_err();
        assert!(unknown[0].message.contains("no stage before c is called b"), "{unknown:?}");
        let stages = [Halving::stage(&job, "b", None), Halving::stage(&job, "c", Some("b"))];
        let missing = next_of(&Fixed(stages), &job, &made).unwrap_err();
        assert!(missing[0].message.contains("which stage b did not make"), "{missing:?}");
    }
}
