//! One job for each combination of values, so many at a time, of which the one of the lowest loss gives the results; for finding a
//! rate, a rank or a method, and for the same job with several seeds.
//!
//! # Update
//! ```text
//! job_n  = the file's fields beside `recipe`, with value i_k of axis k put at its field, for every (i_1 .. i_K)
//! loss_n = last validation loss of job_n on `best`, or the mean of those on all its sets
//! result = argmin_n loss_n over the jobs that have succeeded, the first of equals
//! ```
//! Values are put one axis after the other; a value that is a mapping takes the place of what was there whole. Each job has the label
//! `AXIS: VALUE` of every axis.
//!
//! # Symbols
//! A field is a path in the job file, such as `tune.optimizer.lr`; an axis has one that takes each of its values, or values by name,
//! each with the fields that it sets.
//!
//! # Cost
//! That of its jobs, at most `at_once` of which wait or run at a time.
//!
//! # Limits
//! One axis of one value is the job with that value.
//!
//! # Departures
//! None: there is nothing to depart from.
//!
//! # Paper
//! None; common practice.

use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Recipe;
use super::parts::{FIELDS, read};
use crate::axis::{self, Axis, Choice, Values};
use crate::fault::{Fault, FieldPath};
use crate::id::Name;
use crate::job::{JobSpec, Outputs, set_path};
use crate::method::{BuildCx, Card, Method, Point};
use crate::stages::{NAME_BYTES_MAX, Outcome, STAGES_MAX, StageSpec};

/// Parameters of the recipe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(crate) struct Config {
    /// What differs from job to job: a name, and either a `field` with a list of `values`, or `values` by name, each a mapping of
    /// fields.
    #[schemars(length(min = 1))]
    vary: Vec<Axis>,
    /// The most jobs that wait or run at a time; all when it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    at_once: Option<NonZeroU32>,
    /// How many jobs may fail or be cancelled while the others go on.
    may_fail: u32,
    /// The validation set by whose last loss the best job is chosen; the mean over all sets when it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    best: Option<Name>,
}

/// The recipe.
pub(crate) struct Sweep {
    config: Config,
}

impl Method for Sweep {
    const CARD: Card = Card::new(
        "sweep",
        Point::Recipe,
        "One job for each combination of values, so many at a time, of which the one of the lowest loss gives the results; for \
         finding a rate, a rank or a method, and for the same job with several seeds.",
    );
    type Config = Config;
    type Object = dyn Recipe;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Recipe>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

fn vary() -> FieldPath {
    FieldPath::from("recipe").field("vary")
}

impl Sweep {
    /// What is wrong with the axes by themselves.
    fn faults(&self) -> Vec<Fault> {
        let Config { vary: axes, may_fail, .. } = &self.config;
        let mut faults = axis::faults(axes, &vary());
        for (index, axis) in axes.iter().enumerate() {
            let path = vary().index(index);
            if let Err(error) = Name::new(axis.name.clone()) {
                faults.push(Fault::new(path.field("name"), format!("becomes a label of the jobs, and {error}")));
            }
            if axis.ordered.is_some() {
                faults.push(Fault::new(path.field("ordered"), "is for searches; all jobs of a sweep are run"));
            }
            let of_field = axis.field.as_deref().filter(|field| is_foreign(field));
            faults.extend(of_field.map(|field| foreign(path.field("field"), &format!("is {field}, which"))));
            if let Values::Named(_) = &axis.values {
                let set = axis.choices().into_iter().flat_map(|Choice { path: at, set, .. }| {
                    set.into_iter().map(move |(field, _)| (at.clone(), field))
                });
                let wrong = set.filter(|(_, field)| is_foreign(field));
                faults.extend(wrong.map(|(at, field)| foreign(path.join(&at).field(&field), "")));
            }
        }
        let n = axis::size(axes);
        if n > STAGES_MAX {
            let message = format!("makes {n} jobs; expected at most {STAGES_MAX}");
            faults.push(Fault::new(vary(), message));
        } else if faults.is_empty() && usize::try_from(*may_fail).is_ok_and(|may_fail| may_fail >= n) {
            let message = format!("is {may_fail} of {n} jobs; expected fewer, so that one is left");
            faults.push(Fault::new(FieldPath::from("recipe").field("may_fail"), message));
        }
        faults
    }

    /// The values of the job of this number on each axis; numbers start from 1, in the order of [`axis::product`].
    fn choices(&self, number: usize) -> Option<Vec<Choice>> {
        let mut rest = number.checked_sub(1)?;
        let mut choices = Vec::with_capacity(self.config.vary.len());
        for axis in self.config.vary.iter().rev() {
            choices.push(axis.choices().into_iter().nth(rest.checked_rem(axis.len())?)?);
            rest /= axis.len();
        }
        choices.reverse();
        (rest == 0).then_some(choices)
    }

    fn stage(&self, job: &JobSpec, name: Name, choices: &[Choice]) -> Result<StageSpec, Vec<Fault>> {
        let common = JobSpec {
            name: Name::new(format!("{}.{name}", job.name)).unwrap_or_else(|_| job.name.clone()),
            kind: Default::default(),
            recipe: None,
            // What the best is called is for the whole to say.
            outputs: Outputs { tag: None, merged_tag: None, ..job.outputs.clone() },
            ..job.clone()
        };
        let mut value = json!(common);
        for (axis, choice) in self.config.vary.iter().zip(choices) {
            for (field, set) in &choice.set {
                // JSON is YAML.
                set_path(&mut value, field, &set.to_string()).map_err(|fault| vec![fault])?;
            }
            value["labels"][&axis.name] = Value::String(choice.name.clone());
        }
        let job = read(&value)?;
        let mut faults = Vec::new();
        let outputs = [("outputs.tag", &job.outputs.tag), ("outputs.merged_tag", &job.outputs.merged_tag)];
        for (path, _) in outputs.into_iter().filter(|(_, tag)| tag.is_some()) {
            faults.push(Fault::new(
                path,
                "is set for one of several jobs; give it beside `recipe`, for the best of them",
            ));
        }
        if let Some(best) =
            self.config.best.as_ref().filter(|best| job.data.validation.iter().all(|set| set.name != **best))
        {
            let sets: Vec<&str> = job.data.validation.iter().map(|set| set.name.as_str()).collect();
            let sets =
                if sets.is_empty() { "there is none".to_owned() } else { format!("there are {}", sets.join(", ")) };
            faults.push(Fault::new(BEST, format!("is {best}, which is no validation set of the jobs; {sets}")));
        }
        if faults.is_empty() { Ok(StageSpec { name, job, after: Vec::new() }) } else { Err(faults) }
    }

    /// Where the field stands that leads through this path, if nothing but it does: the file has nothing there.
    fn field_through(&self, file: &Value, choices: &[Choice], path: &FieldPath) -> Option<FieldPath> {
        let pointer: String =
            path.as_str().split(['.', '[']).map(|part| format!("/{}", part.trim_end_matches(']'))).collect();
        if file.pointer(&pointer).is_some() {
            return None;
        }
        let leads = |field: &str| field.strip_prefix(path.as_str()).is_some_and(|rest| rest.starts_with(['.', '[']));
        choices.iter().enumerate().find_map(|(index, choice)| {
            let (field, _) = choice.set.iter().find(|(field, _)| leads(field))?;
            let own = vary().index(index);
            Some(match &self.config.vary[index].values {
                Values::Listed(_) => own.field("field"),
                Values::Named(_) => own.join(&choice.path).field(field),
            })
        })
    }

    /// What a job is judged by: less is better.
    fn loss(&self, outcome: &Outcome) -> Option<f64> {
        let Outcome { losses, .. } = outcome;
        match &self.config.best {
            Some(best) => losses.get(best.as_str()).copied(),
            None if losses.is_empty() => None,
            None => Some(losses.values().sum::<f64>() / losses.len() as f64),
        }
    }
}

/// Where the validation set is named that decides.
const BEST: &str = "recipe.best";

fn is_foreign(field: &str) -> bool {
    !FIELDS.contains(&field.split(['.', '[']).next().unwrap_or_default())
}

fn foreign(path: FieldPath, what: &str) -> Fault {
    Fault::new(
        path,
        format!("{what} cannot differ between the jobs; expected one of {}", FIELDS.join(", ")).trim_start(),
    )
}

/// The name of a job: its number, and its values as far as there is room and names can say them.
fn name_of(number: usize, choices: &[Choice]) -> Name {
    // A point within a value may stand beside none of those between values.
    let said = |text: &str| {
        let text = text.replace('.', "p").to_ascii_lowercase();
        let words = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
        words.collect::<Vec<_>>().join("-")
    };
    let values: Vec<String> = choices.iter().map(|choice| said(&choice.name)).filter(|text| !text.is_empty()).collect();
    let mut text = format!("{number}.{}", values.join("."));
    text.truncate(NAME_BYTES_MAX);
    let text = text.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
    Name::new(text).or_else(|_| Name::new(number.to_string())).expect("digits are a name")
}

impl Recipe for Sweep {
    fn expand(&self, job: &JobSpec) -> Result<Vec<StageSpec>, Vec<Fault>> {
        let mut faults = self.faults();
        if !faults.is_empty() {
            return Err(faults);
        }
        let common = json!(job);
        let mut made = Vec::new();
        for number in 1..=axis::size(&self.config.vary) {
            let choices = self.choices(number).unwrap_or_default();
            let name = name_of(number, &choices);
            match self.stage(job, name.clone(), &choices) {
                Ok(stage) => made.push(stage),
                Err(found) => faults.extend(found.into_iter().map(|Fault { path, message }| {
                    let of_field = self.field_through(&common, &choices, &path);
                    Fault::new(of_field.unwrap_or_else(|| self.place(&name, &path)), message)
                })),
            }
        }
        let is_judged = made.iter().all(|stage| !stage.job.data.validation.is_empty());
        if job.outputs.tag.is_some() && !is_judged {
            let message = "is given, but jobs without validation sets have no loss by which one is the best";
            faults.push(Fault::new("outputs.tag", message));
        }
        faults.sort();
        faults.dedup();
        if faults.is_empty() { Ok(made) } else { Err(faults) }
    }

    fn result(&self, stages: &[StageSpec], done: &[Outcome]) -> Option<Name> {
        let losses = stages.iter().filter_map(|stage| {
            let outcome = done.iter().find(|outcome| outcome.stage == stage.name)?;
            Some((self.loss(outcome)?, &stage.name))
        });
        let best = losses.min_by(|(one, _), (other, _)| one.total_cmp(other));
        best.map(|(_, name)| name.clone())
    }

    fn at_once(&self) -> usize {
        self.config.at_once.map_or(usize::MAX, |n| usize::try_from(n.get()).unwrap_or(usize::MAX))
    }

    fn may_fail(&self) -> u32 {
        self.config.may_fail
    }

    fn compares_losses(&self) -> bool {
        true
    }

    fn place(&self, stage: &Name, path: &FieldPath) -> FieldPath {
        let number = stage.as_str().split('.').next().and_then(|number| number.parse().ok());
        let choices = number.and_then(|number| self.choices(number)).unwrap_or_default();
        // What an axis sets stands over what those before it set.
        for (index, choice) in choices.iter().enumerate().rev() {
            for (field, _) in choice.set.iter().rev() {
                let Some(rest) = path.as_str().strip_prefix(field.as_str()) else { continue };
                if !(rest.is_empty() || rest.starts_with(['.', '['])) {
                    continue;
                }
                let own = vary().index(index).join(&choice.path);
                let own = match &self.config.vary[index].values {
                    Values::Listed(_) => own,
                    Values::Named(_) => own.field(field),
                };
                return FieldPath::parse(format!("{}{rest}", own.as_str()));
            }
        }
        path.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::job::{ReadError, read_value, read_yaml};
    use crate::method::Catalogue;
    use crate::stages::{self, Made, Manner, Next};

    const JOB: &str = r#"
version: 1
name: rates
kind: recipe
base: "base:latest"
labels: {team: a}
data:
  domains: [{name: chat, source: ./chat.jsonl}]
  validation: [{name: chat, source: ./valid.jsonl}, {name: law, source: ./law.jsonl}]
tune:
  adapter: {method: lora, rank: 4, alpha: 8}
  optimizer: {method: adamw, lr: 1e-3}
  steps: 10
outputs: {tag: "best:latest", merged: true}
recipe:
  method: sweep
  vary:
    - name: adapter
      values:
        small: {}
        dora: {tune.adapter: {method: dora, rank: 8}, tune.steps: 20}
    - {name: lr, field: tune.optimizer.lr, values: [1e-4, 2e-3, 0.01]}
  at_once: 2
  may_fail: 1
"#;

    fn read_job(text: &str) -> Result<JobSpec, Vec<String>> {
        match read_value(&read_yaml(text).unwrap(), Catalogue::embedded()) {
            Ok(job) => Ok(job),
            Err(ReadError::Faults(faults)) => Err(faults.iter().map(ToString::to_string).collect()),
            Err(other) => panic!("{other}"),
        }
    }

    fn job() -> JobSpec {
        read_job(JOB).unwrap()
    }

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn made(next: Next) -> Vec<String> {
        match next {
            Next::Make(stages) => stages.iter().map(|stage| stage.name.to_string()).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn outcome(stage: &str, chat: f64, law: f64) -> Outcome {
        let losses = BTreeMap::from([("chat".to_owned(), chat), ("law".to_owned(), law)]);
        Outcome { stage: name(stage), outputs: BTreeMap::new(), losses }
    }

    const NAMES: [&str; 6] =
        ["1.small.0p0001", "2.small.0p002", "3.small.0p01", "4.dora.0p0001", "5.dora.0p002", "6.dora.0p01"];

    #[test]
    fn each_combination_is_a_job_with_its_values() {
        let stages = stages::known(&job(), &[]).unwrap();
        assert_eq!(stages.iter().map(|stage| stage.name.as_str()).collect::<Vec<_>>(), NAMES);
        let of = |index: usize| &stages[index].job;
        assert_eq!((of(0).tune.steps, of(4).tune.steps), (Some(10), Some(20)));
        assert_eq!(of(4).tune.optimizer.params["lr"], json!(2e-3));
        let dora = of(4).tune.adapter.as_ref().unwrap();
        assert_eq!(dora.method.as_deref(), Some("dora"));
        assert!(!dora.params.contains_key("alpha"), "the other adapter's");
        let labels: Vec<(&str, &str)> =
            of(4).labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(labels, [("adapter", "dora"), ("lr", "0.002"), ("team", "a")]);
        assert!(of(4).outputs.merged && of(4).outputs.tag.is_none() && of(4).recipe.is_none());
        assert_eq!(stages::manner(&job()), Ok(Manner { may_fail: 1, compares_losses: true }));
    }

    /// So many at a time, whatever ends when; the best of those that succeeded gives the results.
    #[test]
    fn the_best_of_those_that_succeed_gives_the_results() {
        let job = job();
        let next = |done: &[Outcome], failed: &[&str], open: &[&str]| {
            let names = |texts: &[&str]| texts.iter().map(|text| name(text)).collect::<BTreeSet<_>>();
            stages::next(&job, &Made { done: done.to_vec(), failed: names(failed), open: names(open) }).unwrap()
        };
        assert_eq!(made(next(&[], &[], &[])), NAMES[..2]);
        assert_eq!(made(next(&[], &[], &NAMES[..1])), NAMES[1..2]);
        assert_eq!(next(&[], &[], &NAMES[..2]), Next::Wait);
        let (one, two) = (outcome(NAMES[0], 3.0, 1.0), outcome(NAMES[1], 1.0, 2.5));
        assert_eq!(made(next(std::slice::from_ref(&two), &[], &NAMES[..1])), NAMES[2..3]);
        let rest: Vec<Outcome> = NAMES[3..].iter().map(|stage| outcome(stage, 4.0, 4.0)).collect();
        let done: Vec<Outcome> = rest.iter().cloned().chain([two, one.clone()]).collect();
        assert_eq!(next(&done, &[], &NAMES[2..3]), Next::Wait);
        assert_eq!(next(&done, &NAMES[2..3], &[]), Next::Done(Some(name(NAMES[1]))), "by the mean");
        assert_eq!(next(&done[..3], &NAMES[..3], &[]), Next::Done(Some(name(NAMES[3]))), "the first of equals");
        let by_law = read_job(&JOB.replace("  at_once", "  best: law\n  at_once")).unwrap();
        let all = Made { done, failed: [name(NAMES[2])].into(), open: BTreeSet::new() };
        assert_eq!(stages::next(&by_law, &all), Ok(Next::Done(Some(one.stage))));
        // One whose loss is no number is never the best, and where none has one there is none.
        let blind: Vec<Outcome> = all.done.iter().map(|of| Outcome { losses: BTreeMap::new(), ..of.clone() }).collect();
        assert_eq!(stages::next(&job, &Made { done: blind, ..all }), Ok(Next::Done(None)));
    }

    #[test]
    fn one_value_is_the_job_with_it() {
        let head = JOB.split("recipe:\n  method").next().unwrap();
        let of_one = "recipe: {method: sweep, vary: [{name: seed, field: tune.seed, values: [7]}]}\n";
        let stages = stages::known(&read_job(&format!("{head}{of_one}")).unwrap(), &[]).unwrap();
        let alone = head.replace("kind: recipe\n", "").replace("name: rates", "name: rates.1.7");
        let alone = read_job(
            &alone.replace("  steps: 10", "  steps: 10\n  seed: 7").replace("{team: a}", "{team: a, seed: '7'}"),
        );
        let mut alone = alone.unwrap();
        alone.outputs.tag = None;
        let [only] = stages.as_slice() else { panic!("{stages:?}") };
        assert_eq!(only.job, alone);
    }

    #[test]
    fn a_name_says_what_it_can() {
        let choice = |name: &str| Choice { name: name.to_owned(), set: Vec::new(), path: FieldPath::root() };
        assert_eq!(name_of(12, &[choice("{\"method\":\"Lora\"}")]).as_str(), "12.method-lora");
        let long = name_of(3, &[choice(&"ab.".repeat(40)), choice("x")]);
        assert!(long.as_str().len() <= NAME_BYTES_MAX && long.as_str().starts_with("3.abpab"), "{long}");
        assert_eq!(name_of(4, &[choice("ß")]).as_str(), "4");
        assert_eq!(name_of(5, &[choice("-"), choice("")]).as_str(), "5");
    }

    #[test]
    fn a_fault_is_told_where_it_was_written() {
        let lr = "{name: lr, field: tune.optimizer.lr, values: [1e-4, 2e-3, 0.01]}";
        let cases = [
            (
                "tune.optimizer.lr",
                "tune.optimzer.lr",
                "`recipe.vary[1].field` is not a known field; did you mean \"optimizer\"?",
            ),
            ("tune.steps: 20", "tune.stps: 20", "`recipe.vary[0].values.dora.tune.stps` is not a known field"),
            ("tune.steps: 20", "tune.stps.x: 20", "`recipe.vary[0].values.dora.tune.stps.x` is not a known field"),
            ("2e-3, ", "-2e-3, ", "`recipe.vary[1].values[1]` is -0.002"),
            (
                "method: dora, rank: 8",
                "method: dora, rnk: 8",
                "`recipe.vary[0].values.dora.tune.adapter.rnk` is not a known",
            ),
            ("tune.steps: 20", "tune.steps: -20", "`recipe.vary[0].values.dora.tune.steps` is -20"),
            ("steps: 10\n", "steps: -10\n", "`tune.steps` is -10"),
            (
                "small: {}",
                "small: {after: [j-1]}",
                "`recipe.vary[0].values.small.after` cannot differ between the jobs",
            ),
            (lr, "{name: called, field: name, values: [a]}", "`recipe.vary[1].field` is name, which cannot differ"),
            (lr, "{name: lr, values: [1]}", "`recipe.vary[1].field` is missing"),
            ("name: lr,", "name: Rate,", "`recipe.vary[1].name` becomes a label"),
            ("name: lr,", "name: lr, ordered: true,", "`recipe.vary[1].ordered` is for searches"),
            ("may_fail: 1", "may_fail: 6", "`recipe.may_fail` is 6 of 6 jobs; expected fewer"),
            ("may_fail: 1", "may_fail: 1\n  best: lore", "`recipe.best` is lore, which is no validation set"),
            ("at_once: 2", "at_once: 0", "`recipe.at_once` is 0"),
            ("may_fail: 1", "may_fial: 1", "did you mean"),
            (
                lr,
                "{name: t, field: outputs.tag, values: ['a:b']}",
                "`recipe.vary[1].values[0]` is set for one of several jobs",
            ),
            (
                "  validation: [{name: chat, source: ./valid.jsonl}, {name: law, source: ./law.jsonl}]\n",
                "",
                "`outputs.tag` is given, but jobs without validation sets",
            ),
        ];
        for (from, to, expected) in cases {
            let text = JOB.replacen(from, to, 1);
            assert_ne!(text, JOB, "{from}");
            let faults = read_job(&text).unwrap_err();
            assert!(faults.iter().any(|fault| fault.contains(expected)), "{to}: {faults:#?}");
        }
    }

    /// However many jobs the axes come to, none is made before they are counted.
    #[test]
    fn more_jobs_than_stages_are_refused_at_once() {
        let axis =
            |name: usize| format!("    - {{name: a{name}, field: tune.seed, values: [{}]}}\n", "1,".repeat(1000));
        let axes: String = (0..3).map(axis).collect();
        let head = JOB.split("  vary:").next().unwrap();
        let faults = read_job(&format!("{head}  vary:\n{axes}")).unwrap_err();
        assert_eq!(faults, ["`recipe.vary` makes 1000000000 jobs; expected at most 1000"]);
    }
}
