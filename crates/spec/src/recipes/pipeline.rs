//! Jobs one after another, each on what those before it made; for training in several steps, such as on answers first and on
//! preferences then.
//!
//! # Update
//! ```text
//! job_n   = set_n over the fields of the file beside `recipe`      n = 1 .. stages
//! ${stages.NAME.ROLE} = what stage NAME made in that role
//! ```
//! `set` goes over the file's fields one by one, at any depth. A mapping that names a method, or an adapter to start from, takes
//! the place of the other whole, and so does everything that is no mapping. What the file says in `outputs` is about the stage whose
//! results are the job's; a stage's own `outputs.gate` lets those after it run only where its validation losses are good enough.
//!
//! # Symbols
//! `ROLE` is `adapter`, `adapter-SLOT` (of one in which several slots train: the further ones), `model` (of one that trains the base's
//! weights) or `merged` (of one with `outputs.merged`).
//!
//! # Cost
//! That of its stages. Those that await none another run side by side where there are devices.
//!
//! # Limits
//! One stage whose `set` is empty is the job without a recipe.
//!
//! # Departures
//! None: there is nothing to depart from.
//!
//! # Paper
//! None; common practice.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Recipe;
use super::parts::set::{put, says};
use super::parts::{FIELDS, read};
use crate::fault::{Fault, FieldPath};
use crate::id::Name;
use crate::job::{JobSpec, Outputs};
use crate::method::{BuildCx, Card, Method, Point};
use crate::stages::StageSpec;

/// Parameters of the recipe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(crate) struct Config {
    /// The stages, in their order.
    #[schemars(length(min = 1, max = 1000))]
    stages: Vec<Stage>,
    /// The stage whose results are the job's; the last one when it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    result: Option<Name>,
}

/// A job of the pipeline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(deny_unknown_fields)]
struct Stage {
    /// Its name.
    #[schemars(with = "String")]
    name: Name,
    /// What is different in it from the fields of the file.
    #[serde(default)]
    set: Map<String, Value>,
    /// Stages that must have succeeded first, beside those whose results it names; the one before it when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<String>>")]
    after: Option<Vec<Name>>,
}

/// The recipe.
pub(crate) struct Pipeline {
    config: Config,
}

impl Method for Pipeline {
    const CARD: Card = Card::new(
        "pipeline",
        Point::Recipe,
        "Jobs one after another, each on what those before it made; for training in several steps, such as on answers first and \
         on preferences then.",
    );
    type Config = Config;
    type Object = dyn Recipe;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Recipe>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Recipe for Pipeline {
    fn expand(&self, job: &JobSpec) -> Result<Vec<StageSpec>, Vec<Fault>> {
        let Config { stages, result } = &self.config;
        let (mut made, mut faults) = (Vec::with_capacity(stages.len()), Vec::new());
        let last = stages.last().map(|stage| &stage.name);
        let mut before = None;
        for (index, stage) in stages.iter().enumerate() {
            let set = FieldPath::from("recipe").field("stages").index(index).field("set");
            let foreign = stage.set.keys().filter(|name| !FIELDS.contains(&name.as_str()));
            faults.extend(foreign.map(|name| {
                let message = format!("cannot be set for a stage; expected one of {}", FIELDS.join(", "));
                Fault::new(set.field(name), message)
            }));
            let is_result = Some(&stage.name) == result.as_ref().or(last);
            match stage_of(job, stage, is_result) {
                Ok(of) => {
                    let after = stage.after.clone().unwrap_or_else(|| before.into_iter().collect());
                    made.push(StageSpec { name: stage.name.clone(), job: of, after });
                }
                Err(found) => faults.extend(
                    found
                        .into_iter()
                        .map(|Fault { path, message }| Fault::new(self.place(&stage.name, &path), message)),
                ),
            }
            before = Some(stage.name.clone());
        }
        if faults.is_empty() { Ok(made) } else { Err(faults) }
    }

    fn named_result(&self) -> Option<&Name> {
        self.config.result.as_ref()
    }

    fn place(&self, stage: &Name, path: &FieldPath) -> FieldPath {
        // Of two stages with one name the second is at fault.
        let Some((index, stage)) = self.config.stages.iter().enumerate().rfind(|(_, own)| own.name == *stage) else {
            return path.clone();
        };
        let own = FieldPath::from("recipe").field("stages").index(index);
        match path.as_str() {
            text if text == "name" || text.starts_with("after") => own.join(path),
            text if says(&stage.set, text) => own.field("set").join(path),
            _ => path.clone(),
        }
    }
}

/// The job of a stage.
fn stage_of(job: &JobSpec, stage: &Stage, is_result: bool) -> Result<JobSpec, Vec<Fault>> {
    let Outputs { merged, statistics, ref gate, .. } = job.outputs;
    let gate = if is_result { gate.clone() } else { Default::default() };
    let common = JobSpec {
        name: Name::new(format!("{}.{}", job.name, stage.name)).unwrap_or_else(|_| job.name.clone()),
        kind: Default::default(),
        recipe: None,
        // What the whole is called is for the whole to say.
        outputs: Outputs {
            merged: merged && is_result,
            statistics: statistics && is_result,
            gate,
            ..Outputs::default()
        },
        ..job.clone()
    };
    let mut value = json!(common);
    for (name, set) in stage.set.iter().filter(|(name, _)| FIELDS.contains(&name.as_str())) {
        put(&mut value[name.as_str()], set);
    }
    read(&value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{ReadError, read_value, read_yaml};
    use crate::method::Catalogue;
    use crate::stages;

    const JOB: &str = r#"
version: 1
name: helper
kind: recipe
base: "base:latest"
data: {domains: [{name: chat, source: ./chat.jsonl}], max_length: 64}
tune:
  adapter: {method: lora, rank: 4, alpha: 8}
  optimizer: {method: adamw, lr: 1e-3}
  steps: 10
outputs: {tag: "helper:latest", merged: true}
after: [j-1]
recipe:
  method: pipeline
  stages:
    - {name: answers}
    - name: preferences
      set:
        data: {domains: [{name: pairs, source: ./pairs.jsonl}]}
        tune:
          adapter: {from: "${stages.answers.adapter}"}
          objective: {method: dpo, beta: 0.2}
          optimizer: {method: adamw, beta2: 0.9}
          steps: 4
"#;

    fn expand(text: &str) -> Result<(JobSpec, Vec<StageSpec>), Vec<String>> {
        let told = |faults: Vec<Fault>| faults.iter().map(ToString::to_string).collect::<Vec<_>>();
        let job = match read_value(&read_yaml(text).unwrap(), Catalogue::embedded()) {
            Ok(job) => job,
            Err(ReadError::Faults(faults)) => return Err(told(faults)),
            Err(other) => panic!("{other}"),
        };
        let stages = stages::known(&job, &[]).map_err(told)?;
        Ok((job, stages))
    }

    #[test]
    fn a_stage_is_the_file_with_what_it_sets() {
        let (job, stages) = expand(JOB).unwrap();
        let [first, second] = stages.as_slice() else { panic!("{stages:?}") };
        let plain = JobSpec {
            kind: Default::default(),
            recipe: None,
            name: "helper.answers".parse().unwrap(),
            outputs: Outputs::default(),
            ..job.clone()
        };
        assert_eq!((first.name.as_str(), &first.job, first.after.len()), ("answers", &plain, 0));
        assert_eq!(second.after, std::slice::from_ref(&first.name));
        let tune = &second.job.tune;
        assert_eq!((tune.steps, tune.objective.method.as_str(), tune.batch_tokens), (Some(4), "dpo", 4096));
        // A method is chosen whole: the rate was the other's.
        assert!(!tune.optimizer.params.contains_key("lr") && tune.adapter.as_ref().unwrap().params.is_empty());
        assert_eq!((second.job.data.domains.len(), second.job.data.max_length), (1, 64));
        assert!(second.job.outputs.merged && second.job.outputs.tag.is_none() && second.job.after == job.after);
        let paths: Vec<String> = job.references().iter().map(|(path, _)| path.to_string()).collect();
        assert_eq!(
            paths,
            [
                "base",
                "data.domains[0].source",
                "recipe.stages[1].set.data.domains[0].source",
                "recipe.stages[1].set.tune.adapter.from"
            ]
        );
    }

    /// Its limit: one stage that sets nothing is the job without a recipe.
    #[test]
    fn one_stage_that_sets_nothing_is_the_job_itself() {
        let head = JOB.split("recipe:\n  method").next().unwrap();
        let (_, stages) = expand(&format!("{head}recipe: {{method: pipeline, stages: [{{name: all}}]}}\n")).unwrap();
        let alone = head.replace("kind: recipe\n", "").replace("name: helper", "name: helper.all");
        let alone = read_value(&read_yaml(&alone).unwrap(), Catalogue::embedded()).unwrap();
        assert_eq!(stages[0].job.tune, alone.tune);
        assert_eq!(JobSpec { outputs: alone.outputs.clone(), ..stages[0].job.clone() }, alone);
    }

    #[test]
    fn a_fault_is_told_where_it_was_written() {
        let cases = [
            ("steps: 4", "steps: -4", "`recipe.stages[1].set.tune.steps` is -4; expected 1 or more"),
            ("beta: 0.2", "bta: 0.2", "`recipe.stages[1].set.tune.objective.bta` is not a known field"),
            ("          steps: 4", "          epochs: 2", "`recipe.stages[1].set.tune` gives steps and epochs"),
            ("  steps: 10\n", "", "`tune` says no length"),
            ("${stages.answers.adapter}", "${stages.answer.adapter}", "no stage before preferences is called answer"),
            ("${stages.answers.adapter}", "${stages.answers.model}", "stage answers makes adapter"),
            (
                "${stages.answers.adapter}",
                "${stage.answers.adapter}",
                "`recipe.stages[1].set.tune.adapter.from` is wrong",
            ),
            (
                "base: \"base:latest\"",
                "base: \"${stages.answers.model}\"",
                "`base` is ${stages.answers.model}, which only",
            ),
            (
                "- {name: answers}",
                "- {name: preferences}",
                "`recipe.stages[1].name` is preferences for the second time",
            ),
            ("- {name: answers}", "- {name: answers, set: {kind: tune}}", "`recipe.stages[0].set.kind` cannot be set"),
            (
                "- {name: answers}",
                "- {name: answers, after: [x]}",
                "`recipe.stages[0].after[0]` is x, which is no stage",
            ),
            ("- {name: answers}", "- {nme: answers}", "`recipe.stages[0].nme` is not a known field"),
            ("kind: recipe\n", "", "`kind` is tune, but `recipe` is given"),
            ("method: pipeline", "method: pipe-line", "did you mean \"pipeline\"?"),
            ("  method: pipeline\n", "  method: pipeline\n  result: last\n", "`recipe.result` is last, which no stage"),
        ];
        for (from, to, expected) in cases {
            let text = JOB.replacen(from, to, 1);
            assert_ne!(text, JOB, "{from}");
            let faults = expand(&text).unwrap_err();
            assert!(faults.iter().any(|fault| fault.contains(expected)), "{to}: {faults:#?}");
        }
    }
}
