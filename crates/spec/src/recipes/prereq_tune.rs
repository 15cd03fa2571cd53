//! An adapter that learns a skill while others know the facts for it; for answers from what a model knows, and none made up.
//!
//! # Update
//! ```text
//! for each entry k of `knowledge`, by itself:   ψ_k <- argmin_ψ  E_{text of k} [ L_lm(text; W + ΔW_ψ) ]
//! skill:                                        θ   <- argmin_θ  E_{(v, x)} [ L(x; W + ΔW_ψk(v, t) + ΔW_θ) ]
//! k(v, t) = the entries that name domain v, one after the other from step t to step t + 1
//! result:  ΔW_θ alone
//! ```
//!
//! # Symbols
//! `ψ_k` are the parameters of a knowledge adapter, frozen while the skill is learned; `θ` those of the skill's, which is what the
//! file's `tune` describes; `v` is a domain of `data.domains`, whose rows `x` fit the facts of one version; `L` is the file's
//! objective. Entries that name one domain are the same facts written in other forms, such as passages and statements.
//!
//! # Cost
//! One job for each entry, side by side where there are devices, and one for the skill, in whose forward and backward passes one
//! frozen adapter more takes part.
//!
//! # Limits
//! For a domain that no entry names the skill learns as without the recipe; with no entry for any domain it is the job itself.
//!
//! # Departures
//! The reference puts rows of one version into a batch and takes the versions in random order. Here rows of all versions are in a
//! batch, each beside an adapter of its own version, so that no row has to be left out of the loss; the order is that of the
//! mixture. Rows for which the skill has to do without knowledge are a domain of their own, whose weight is that of the mixture.
//!
//! # Paper
//! Fictitious Synthetic Data Can Improve LLM Factuality via Prerequisite Learning. Yujian Liu, Shiyu Chang, Tommi Jaakkola,
//! Yang Zhang. 2024.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Recipe;
use super::parts::read;
use super::parts::set::{put, says};
use crate::fault::{Fault, FieldPath};
use crate::id::Name;
use crate::job::{DataSpec, DomainSpec, Form, JobSpec, Outputs, Reference, SlotSpec, TuneSpec};
use crate::method::{BuildCx, Card, Method, Paper, Point};
use crate::stages::StageSpec;

/// The name of the last stage.
const SKILL: &str = "skill";

/// Parameters of the recipe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(crate) struct Config {
    /// What is known: one adapter each.
    #[schemars(length(min = 1, max = 900))]
    knowledge: Vec<Knowledge>,
    /// Fields of `tune` that are different where knowledge is learned; its loss is that of language modelling in any case.
    learn: Map<String, Value>,
    /// The longest text of knowledge, in tokens; `data.max_length` when it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 2, max = 1_048_576))]
    max_length: Option<u32>,
}

/// Texts of one version of the facts, in one form.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(deny_unknown_fields)]
struct Knowledge {
    /// Its name, and that of the stage in which it is learned.
    #[schemars(with = "String")]
    name: Name,
    /// Rows with `text`: a path, a URL, an artifact digest or a tag.
    #[schemars(with = "String")]
    source: Reference,
    /// The domains of the file whose rows fit these facts.
    #[schemars(with = "Vec<String>", length(min = 1))]
    domains: Vec<Name>,
}

/// The recipe.
pub(crate) struct PrereqTune {
    config: Config,
}

impl Method for PrereqTune {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "Fictitious Synthetic Data Can Improve LLM Factuality via Prerequisite Learning",
            authors: "Yujian Liu, Shiyu Chang, Tommi Jaakkola, Yang Zhang",
            year: 2024,
        }),
        ..Card::new(
            "prereq-tune",
            Point::Recipe,
            "An adapter that learns a skill while others know the facts for it; for answers from what a model knows, and none made \
             up.",
        )
    };
    type Config = Config;
    type Object = dyn Recipe;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Recipe>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Recipe for PrereqTune {
    fn expand(&self, job: &JobSpec) -> Result<Vec<StageSpec>, Vec<Fault>> {
        let mut stages = Vec::with_capacity(self.config.knowledge.len() + 1);
        let mut faults = Vec::new();
        for knowledge in &self.config.knowledge {
            match self.learned(job, knowledge) {
                Ok(of) => stages.push(StageSpec { name: knowledge.name.clone(), job: of, after: Vec::new() }),
                Err(found) => faults.extend(self.placed(&knowledge.name, found)),
            }
        }
        let name = Name::new(SKILL).expect("a literal name");
        match self.skill(job, &name) {
            Ok(of) => stages.push(StageSpec { name, job: of, after: Vec::new() }),
            Err(found) => faults.extend(self.placed(&name, found)),
        }
        if faults.is_empty() { Ok(stages) } else { Err(faults) }
    }

    fn place(&self, stage: &Name, path: &FieldPath) -> FieldPath {
        let Config { knowledge, learn, max_length } = &self.config;
        let recipe = FieldPath::from("recipe");
        let entry = |index: usize| recipe.field("knowledge").index(index);
        let text = path.as_str();
        if let Some(index) = knowledge.iter().rposition(|entry| entry.name == *stage) {
            return match text.strip_prefix("tune.") {
                _ if text == "name" => entry(index).field("name"),
                _ if text == "tune" && !learn.is_empty() => recipe.field("learn"),
                _ if text == "data.max_length" && max_length.is_some() => recipe.field("max_length"),
                _ if text.starts_with("data.domains[0].") => entry(index).field(&text["data.domains[0].".len()..]),
                Some(field) if says(learn, field) => recipe.field("learn").join(&FieldPath::parse(field)),
                _ => path.clone(),
            };
        }
        // The adapters that know stand before the slots of the file.
        let slot = text.strip_prefix("tune.stack[").and_then(|rest| rest.split_once(']'));
        match slot.and_then(|(index, rest)| Some((index.parse::<usize>().ok()?, rest))) {
            Some((index, rest)) if index < knowledge.len() => {
                entry(index).join(&FieldPath::parse(rest.trim_start_matches('.')))
            }
            Some((index, rest)) => {
                let slot = FieldPath::from("tune").field("stack").index(index - knowledge.len());
                slot.join(&FieldPath::parse(rest.trim_start_matches('.')))
            }
            None => path.clone(),
        }
    }
}

impl PrereqTune {
    fn placed(&self, stage: &Name, faults: Vec<Fault>) -> impl Iterator<Item = Fault> {
        faults.into_iter().map(move |Fault { path, message }| Fault::new(self.place(stage, &path), message))
    }

    /// The job that learns an entry of knowledge.
    fn learned(&self, job: &JobSpec, knowledge: &Knowledge) -> Result<JobSpec, Vec<Fault>> {
        let domain = DomainSpec {
            name: knowledge.name.clone(),
            source: knowledge.source.clone(),
            weight: 1.0,
            form: Some(Form::Text),
            rows: None,
            provenance: None,
        };
        let mut data =
            DataSpec { domains: vec![domain], caps: BTreeMap::new(), validation: Vec::new(), ..job.data.clone() };
        data.max_length = self.config.max_length.unwrap_or(data.max_length);
        let of_text = TuneSpec::default();
        let tune =
            TuneSpec { objective: of_text.objective, rewards: of_text.rewards, step: of_text.step, ..job.tune.clone() };
        let mut value = json!(JobSpec { data, tune, ..stage_of(job, &knowledge.name, Outputs::default()) });
        put(&mut value["tune"], &Value::Object(self.config.learn.clone()));
        read(&value)
    }

    /// The job that learns the skill beside them.
    fn skill(&self, job: &JobSpec, name: &Name) -> Result<JobSpec, Vec<Fault>> {
        let role = Name::new("adapter").expect("a literal name");
        let known = self.config.knowledge.iter().map(|knowledge| SlotSpec {
            name: Some(knowledge.name.clone()),
            method: None,
            targets: None,
            exclude: None,
            init: None,
            from: Some(Reference::Stage { stage: knowledge.name.clone(), role: role.clone() }),
            train: false,
            domains: knowledge.domains.clone(),
            params: Map::new(),
        });
        let tune = &job.tune;
        let own = tune.stack.iter().chain(&tune.adapter).cloned();
        let tune = TuneSpec { stack: known.chain(own).collect(), adapter: None, ..tune.clone() };
        let Outputs { merged, ref gate, .. } = job.outputs;
        let outputs = Outputs { merged, gate: gate.clone(), ..Outputs::default() };
        read(&json!(JobSpec { tune, ..stage_of(job, name, outputs) }))
    }
}

/// A stage with what all of them have of the file.
fn stage_of(job: &JobSpec, name: &Name, outputs: Outputs) -> JobSpec {
    JobSpec {
        name: Name::new(format!("{}.{name}", job.name)).unwrap_or_else(|_| job.name.clone()),
        kind: Default::default(),
        recipe: None,
        // What the whole is called is for the whole to say.
        outputs,
        ..job.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{ReadError, read_value, read_yaml};
    use crate::method::Catalogue;
    use crate::stages;

    const JOB: &str = r#"
version: 1
name: bios
kind: recipe
base: "base:latest"
data:
  domains:
    - {name: one, source: ./one.jsonl}
    - {name: two, source: ./two.jsonl}
    - {name: real, source: ./real.jsonl, weight: 0.5}
  max_length: 64
tune:
  adapter: {method: lora, rank: 8, alpha: 16}
  objective: {method: dpo, beta: 0.2}
  steps: 10
outputs: {tag: "bios:latest", merged: true}
recipe:
  method: prereq-tune
  learn: {adapter: {rank: 4, dropout: 0.05}, optimizer: {method: adamw, lr: 3e-5, weight_decay: 0.1}, steps: null, epochs: 15}
  max_length: 32
  knowledge:
    - {name: one-passages, source: ./one.passages.jsonl, domains: [one]}
    - {name: one-statements, source: ./one.statements.jsonl, domains: [one]}
    - {name: two-passages, source: ./two.passages.jsonl, domains: [two]}
"#;

    fn expand(text: &str) -> Result<Vec<StageSpec>, Vec<String>> {
        let told = |faults: Vec<Fault>| faults.iter().map(ToString::to_string).collect::<Vec<_>>();
        match read_value(&read_yaml(text).unwrap(), Catalogue::embedded()) {
            Ok(job) => stages::known(&job, &[]).map_err(told),
            Err(ReadError::Faults(faults)) => Err(told(faults)),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn each_text_is_learned_by_itself_and_the_skill_beside_all() {
        let stages = expand(JOB).unwrap();
        let names: Vec<&str> = stages.iter().map(|stage| stage.name.as_str()).collect();
        assert_eq!(names, ["one-passages", "one-statements", "two-passages", "skill"]);
        let first = &stages[0].job;
        assert!(stages[..3].iter().all(|stage| stage.awaits().is_empty()), "side by side");
        assert_eq!((first.data.domains.len(), first.data.domains[0].form), (1, Some(Form::Text)));
        assert_eq!((first.data.max_length, first.tune.steps, first.tune.epochs), (32, None, Some(15.0)));
        assert_eq!(first.tune.objective, TuneSpec::default().objective, "plain language modelling");
        let adapter = first.tune.adapter.as_ref().unwrap();
        assert_eq!(
            (adapter.method.as_deref(), &adapter.params["rank"], &adapter.params["alpha"]),
            (Some("lora"), &json!(4), &json!(16))
        );
        assert!(!first.outputs.merged);

        let skill = &stages[3];
        assert_eq!(skill.awaits().len(), 3);
        let stack: Vec<_> = skill.job.tune.stack.iter().map(|slot| (slot.train, slot.domains.len())).collect();
        assert_eq!(stack, [(false, 1), (false, 1), (false, 1), (true, 0)]);
        assert_eq!(skill.job.tune.stack[3].params["rank"], json!(8));
        assert!(skill.job.outputs.merged && skill.job.outputs.tag.is_none());
        assert_eq!((skill.job.tune.objective.method.as_str(), skill.job.data.domains.len()), ("dpo", 3));
    }

    #[test]
    fn a_fault_is_told_where_it_was_written() {
        let cases = [
            ("domains: [two]}", "domains: [tow]}", "`recipe.knowledge[2].domains[0]` is tow, which no domain"),
            ("rank: 4,", "rank: 0,", "`recipe.learn.adapter.rank` is 0; expected 1 or more"),
            ("rank: 8,", "rank: 0,", "`tune.adapter.rank` is 0; expected 1 or more"),
            ("steps: null, ", "", "`recipe.learn"),
            (
                "name: two-passages",
                "name: one-passages",
                "`recipe.knowledge[2].name` is \"one-passages\", as another slot",
            ),
            ("name: two-passages", "name: skill", "is skill for the second time"),
            ("  max_length: 32", "  max_length: 1", "`recipe.max_length` is 1; expected 2 or more"),
            ("adapter: {rank: 4, dropout: 0.05}", "adapter: {method: full}", "stage one-passages makes model"),
            ("source: ./two.passages.jsonl", "source: two passages", "`recipe.knowledge[2].source`"),
        ];
        for (from, to, expected) in cases {
            let text = JOB.replacen(from, to, 1);
            assert_ne!(text, JOB, "{from}");
            let faults = expand(&text).unwrap_err();
            assert!(faults.iter().any(|fault| fault.contains(expected)), "{to}: {faults:#?}");
        }
    }

    /// Its limit: what no entry names is learned as without the recipe.
    #[test]
    fn a_domain_without_knowledge_is_learned_alone() {
        let stages = expand(JOB).unwrap();
        let named: Vec<&str> =
            stages[3].job.tune.stack.iter().flat_map(|slot| slot.domains.iter().map(Name::as_str)).collect();
        assert_eq!(named, ["one", "one", "two"]);
    }
}
