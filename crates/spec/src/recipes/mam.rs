//! A prefix at every attention and a wide bottleneck beside every MLP: where a component reads, and what it changes, each chosen for
//! the best; the strongest of the small networks beside frozen blocks for tasks that need much of them.
//!
//! # Update
//! ```text
//! stack = [prefix-tuning {length, hidden},                           keys and values before documents, made by a perceptron
//!          bottleneck {width, parallel, scale, composition, dropout}]           MLP(x) + scale · up(relu(down(x)))
//! job   = the file's, with these slots before its own
//! ```
//!
//! # Symbols
//! Those of the two methods.
//!
//! # Cost
//! Theirs: `2*l*k` numbers an attention once trained (`k` the width of its keys), `2*r*d + r + d` an MLP on rows `d` wide.
//!
//! # Limits
//! With a scale of 0 it is prefix tuning. Its methods' limits are their own.
//!
//! # Departures
//! The embedding that the perceptron reads is as wide as keys are, as in PEFT; the authors' is as wide as the stream.
//!
//! # Paper
//! Towards a Unified View of Parameter-Efficient Transfer Learning. Junxian He, Chunting Zhou, Xuezhe Ma, Taylor Berg-Kirkpatrick,
//! Graham Neubig. 2022.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Recipe;
use super::parts::preset::{self, Made, fixed, given};
use crate::fault::{Fault, FieldPath};
use crate::id::Name;
use crate::job::{JobSpec, Targets};
use crate::method::{BuildCx, Card, Method, Paper, Point};
use crate::stages::StageSpec;

/// Parameters of the recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(crate) struct Config {
    /// Keys and values before those of documents.
    #[schemars(range(min = 1, max = 4096))]
    length: u32,
    /// Width of the perceptron that makes them in training; 0 for none.
    #[schemars(range(max = 65536))]
    hidden: u32,
    /// Width of the bottlenecks.
    #[schemars(range(min = 1, max = 65536))]
    rank: u32,
    /// Factor on what they add.
    #[schemars(range(min = 0.0, max = 1000.0))]
    scale: f64,
    /// Trains that factor, each bottleneck its own.
    learned: bool,
    /// Share of the values within the bottlenecks that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// The MLPs, as they are called in the base.
    mlps: Targets,
}

impl Default for Config {
    /// The paper's, for summaries and translation.
    fn default() -> Self {
        Self {
            length: 30,
            hidden: 800,
            rank: 512,
            scale: 4.0,
            learned: false,
            dropout: 0.0,
            mlps: Targets::from("mlp"),
        }
    }
}

/// The recipe.
pub(crate) struct Mam {
    made: [Made; 2],
}

impl Method for Mam {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "Towards a Unified View of Parameter-Efficient Transfer Learning",
            authors: "Junxian He, Chunting Zhou, Xuezhe Ma, Taylor Berg-Kirkpatrick, Graham Neubig",
            year: 2022,
        }),
        ..Card::new(
            "mam",
            Point::Recipe,
            "A prefix at every attention and a wide bottleneck beside every MLP; the strongest of the small networks beside frozen \
             blocks for tasks that need much of them.",
        )
    };
    type Config = Config;
    type Object = dyn Recipe;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Recipe>, Vec<Fault>> {
        let Config { length, hidden, rank, scale, learned, dropout, mlps } = config;
        let composition = if learned { "learned" } else { "scaled" };
        let prefix = vec![given("length", "length", length), given("hidden", "hidden", hidden)];
        let bottleneck = vec![
            given("targets", "mlps", json!(mlps)),
            given("width", "rank", rank),
            given("scale", "scale", scale),
            given("composition", "learned", composition),
            given("dropout", "dropout", dropout),
            fixed("parallel", true),
        ];
        let made = [("prefix-tuning", prefix), ("bottleneck", bottleneck)];
        Ok(Box::new(Self { made: made.map(|(method, fields)| Made { method, fields }) }))
    }
}

impl Recipe for Mam {
    fn expand(&self, job: &JobSpec) -> Result<Vec<StageSpec>, Vec<Fault>> {
        preset::expand(job, &self.made)
    }

    fn place(&self, _: &Name, path: &FieldPath) -> FieldPath {
        preset::place(&self.made, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Plan, plan::Input};
    use crate::method::Catalogue;
    use crate::recipes::parts::preset::expanded;

    const JOB: &str = r#"
version: 1
name: summaries
kind: recipe
base: "base:latest"
data: {domains: [{name: one, source: ./one.jsonl}], max_length: 64}
tune: {stack: [{name: vectors, method: ia3}], steps: 10, seed: 3}
outputs: {tag: "summaries:latest"}
recipe: {method: mam, length: 6, rank: 24}
"#;

    #[test]
    fn it_is_a_stack_of_two_before_the_slots_of_the_file() {
        let stages = expanded(JOB).unwrap();
        let [stage] = stages.as_slice() else { panic!("{stages:?}") };
        let plan = Plan::resolve(&stage.job, Catalogue::embedded(), |reference| Ok(Input::Url(reference.to_string())));
        let plan = plan.unwrap();
        let slots: Vec<serde_json::Value> = plan.stack.iter().map(|slot| json!(slot.method)).collect();
        assert_eq!(slots[0], json!({"method": "prefix-tuning", "length": 6, "hidden": 800, "std": 1.0}));
        let bottleneck = json!({
            "method": "bottleneck", "reduction": 16, "width": 24, "activation": "relu", "parallel": true,
            "composition": "scaled", "scale": 4.0, "dropout": 0.0,
        });
        assert_eq!(slots[1], bottleneck);
        assert_eq!((plan.stack[2].name.as_str(), plan.seed), ("vectors", 3));
        assert_eq!(plan.stack[1].targets, Targets::from("mlp"));
        // What the whole is called is for the whole to say.
        assert!(stage.job.outputs.tag.is_none() && stage.job.tune.adapter.is_none());
    }

    #[test]
    fn what_does_not_fit_is_said_where_the_file_says_it() {
        let cases = [
            ("rank: 24", "rnak: 24", "`recipe.rnak` is not a known field; did you mean \"rank\"?"),
            ("rank: 24", "rank: 0", "`recipe.rank` is 0"),
            ("rank: 24", "scale: 0, learned: true", "`recipe.scale` is 0, and so is what it would stand before"),
            ("name: vectors, method: ia3", "name: bottleneck, method: ia3", "`tune.stack[0].name` is \"bottleneck\""),
            ("name: vectors, method: ia3", "method: lroa", "`tune.stack[0].method` is \"lroa\""),
            ("{tag: \"summaries:latest\"}", "{merged: true}", "cannot be merged into the base"),
            ("method: mam", "method: man", "did you mean \"mam\"?"),
        ];
        for (from, to, expected) in cases {
            let text = JOB.replacen(from, to, 1);
            assert_ne!(text, JOB, "{from}");
            let faults = expanded(&text).unwrap_err();
            assert!(faults.iter().any(|fault| fault.contains(expected)), "{to}: {faults:#?}");
        }
    }
}
