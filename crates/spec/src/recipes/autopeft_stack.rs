//! A bottleneck after MLPs, one beside them and a prefix at attentions, each of any size or none, in some layers: a point of the space
//! that AutoPEFT searches.
//!
//! # Update
//! ```text
//! stack = [prefix-tuning {length: prefix}                         where prefix > 0, at attentions of the layers
//!          bottleneck {reduction: serial}                         where serial is given, after MLPs of the layers
//!          bottleneck {reduction: parallel, parallel: true}]      where parallel is given, beside them
//! job   = the file's, with these slots before its own
//! ```
//!
//! # Symbols
//! Those of the two methods; a reduction of `2^j` is a bottleneck of `D / 2^j`.
//!
//! # Cost
//! `2*k` numbers for each row of a prefix at an attention (`k` the width of its keys), `2*r*D + r + D` for each bottleneck of width `r`.
//!
//! # Limits
//! With nothing but `parallel` and a scale of 4 it is MAM's half at the MLPs. Layers that are off have no component and no parameter.
//!
//! # Departures
//! A prefix has a length of its own, where the paper's is the width by a power of two as well.
//!
//! # Paper
//! AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning. Han Zhou, Xingchen Wan, Ivan Vulić, Anna Korhonen. 2024.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Recipe;
use super::parts::preset::{self, Made, fixed, given};
use crate::fault::{Fault, FieldPath};
use crate::id::Name;
use crate::job::{JobSpec, Targets};
use crate::method::{BuildCx, Card, Method, Paper, Point, Rule};
use crate::stages::StageSpec;

/// Parameters of the recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(crate) struct Config {
    /// By how much the bottleneck after an MLP is narrower than the stream; null for none.
    #[schemars(range(min = 1, max = 65536))]
    serial: Option<u32>,
    /// By how much the bottleneck beside an MLP is narrower than the stream; null for none.
    #[schemars(range(min = 1, max = 65536))]
    parallel: Option<u32>,
    /// Keys and values before those of documents; 0 for none.
    #[schemars(range(max = 4096))]
    prefix: u32,
    /// Which layers have them, by number; all if none is named.
    layers: BTreeMap<u32, bool>,
    /// The MLPs, as the end of their path in the base.
    mlps: String,
    /// The attentions, as the end of their path in the base.
    attentions: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            serial: Some(16),
            parallel: Some(16),
            prefix: 4,
            layers: BTreeMap::new(),
            mlps: "mlp".to_owned(),
            attentions: "self_attn".to_owned(),
        }
    }
}

impl Config {
    /// The sites of this name in the layers that are on.
    fn targets(&self, name: &str) -> Targets {
        if self.layers.is_empty() {
            return Targets::from(name);
        }
        let on = self.layers.iter().filter(|(_, is_on)| **is_on);
        Targets::Many(on.map(|(layer, _)| format!("{layer}.{name}")).collect())
    }
}

/// The recipe.
pub(crate) struct AutoPeftStack {
    made: Vec<Made>,
}

impl Method for AutoPeftStack {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning",
            authors: "Han Zhou, Xingchen Wan, Ivan Vulić, Anna Korhonen",
            year: 2024,
        }),
        rules: &[Rule {
            when: "serial == null",
            require: "parallel != null or prefix > 0",
            message: "is null, and so is `parallel`, and `prefix` is 0: nothing would train; expected one of them",
            path: "serial",
        }],
        ..Card::new(
            "autopeft-stack",
            Point::Recipe,
            "A bottleneck after MLPs, one beside them and a prefix at attentions, each of any size or none, in some layers: a point \
             of the space that AutoPEFT searches.",
        )
    };
    type Config = Config;
    type Object = dyn Recipe;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Recipe>, Vec<Fault>> {
        if !config.layers.is_empty() && config.layers.values().all(|is_on| !is_on) {
            return Err(vec![Fault::new("layers", "are all off, and nothing would train; expected one that is on")]);
        }
        let mlps = json!(config.targets(&config.mlps));
        let mut made = Vec::new();
        if config.prefix > 0 {
            let attentions = given("targets", "attentions", json!(config.targets(&config.attentions)));
            let fields = vec![fixed("name", "prefix"), given("length", "prefix", config.prefix), attentions];
            made.push(Made { method: "prefix-tuning", fields });
        }
        for (name, reduction, parallel) in [("serial", config.serial, false), ("parallel", config.parallel, true)] {
            let Some(reduction) = reduction else { continue };
            let fields = vec![
                fixed("name", name),
                given("reduction", name, reduction),
                fixed("parallel", parallel),
                given("targets", "mlps", mlps.clone()),
            ];
            made.push(Made { method: "bottleneck", fields });
        }
        Ok(Box::new(Self { made }))
    }
}

impl Recipe for AutoPeftStack {
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
    use crate::recipes::parts::preset::expanded;

    const JOB: &str = r#"
version: 1
name: point
kind: recipe
base: "base:latest"
data: {domains: [{name: one, source: ./one.jsonl}], max_length: 64}
tune: {steps: 10}
recipe: {method: autopeft-stack, serial: 8, parallel: 4, prefix: 6}
"#;

    fn slots(text: &str) -> Vec<serde_json::Value> {
        let stages = expanded(text).unwrap();
        stages[0].job.tune.stack.iter().map(|slot| json!(slot)).collect()
    }

    #[test]
    fn it_is_a_stack_of_what_is_on_in_the_layers_that_are() {
        let of = slots(&JOB.replace("prefix: 6", "prefix: 6, layers: {0: true, 1: false, 10: true}"));
        let methods: Vec<&str> = of.iter().map(|slot| slot["name"].as_str().unwrap()).collect();
        assert_eq!(methods, ["prefix", "serial", "parallel"]);
        assert_eq!((&of[0]["length"], &of[0]["targets"]), (&json!(6), &json!(["0.self_attn", "10.self_attn"])));
        assert_eq!((&of[1]["reduction"], &of[1]["parallel"]), (&json!(8), &json!(false)));
        assert_eq!((&of[2]["reduction"], &of[2]["parallel"]), (&json!(4), &json!(true)));
        assert_eq!(of[2]["targets"], json!(["0.mlp", "10.mlp"]));
        let one = slots(&JOB.replace("serial: 8, parallel: 4, prefix: 6", "serial: null, parallel: 2, prefix: 0"));
        assert_eq!((one.len(), &one[0]["targets"]), (1, &json!("mlp")));
    }

    #[test]
    fn what_does_not_fit_is_said_where_the_file_says_it() {
        let own = "serial: 8, parallel: 4, prefix: 6";
        let cases = [
            ("serial: null, parallel: null, prefix: 0", "`recipe.serial` is null, and so is `parallel`"),
            ("layers: {0: false, 1: false}", "`recipe.layers` are all off"),
            ("serial: 0", "`recipe.serial`"),
            ("prefix: 5000", "`recipe.prefix` is 5000"),
            ("layers: {first: true}", "`recipe.layers"),
        ];
        for (more, expected) in cases {
            let faults = expanded(&JOB.replace(own, more)).unwrap_err();
            assert!(faults.iter().any(|fault| fault.contains(expected)), "{more}: {faults:#?}");
        }
    }
}
