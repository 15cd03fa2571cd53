//! LoRA of which one factor alone trains, the other staying the random rotation that it starts as: half the numbers at the same rank, or
//! twice the rank for the same numbers, and next to nothing lost.
//!
//! # Update
//! ```text
//! stack = [lora {rank, alpha, dropout, trains: b, init, targets}]        y_to = x_ti W_oi^T + s (x_ti A_ri^T) B_or^T, A frozen
//! job   = the file's, with this slot before its own
//! ```
//!
//! # Symbols
//! `A_ri` with orthonormal rows, `A_ri A_ri^T = 1`, frozen; `B_or` trained, from 0; `s = alpha / r`. `trains: a` turns the two round, with
//! an `init` that starts B away from 0.
//!
//! # Cost
//! `r*o` parameters a linear (`r*i` where A trains). A is in the adapter, as PEFT's servers expect it.
//!
//! # Limits
//! With B = 0 it is the base. The change stays in the rows that A spans; with `rank` as large as a linear is wide, A is a rotation and the
//! change is any.
//!
//! # Departures
//! A is kept as numbers, not as a seed: whoever reads the adapter need not draw it again. Twice the rank of LoRA's usual 8 is the
//! default, as the authors recommend for a comparison.
//!
//! # Paper
//! Asymmetry in Low-Rank Adapters of Foundation Models. Jiacheng Zhu, Kristjan Greenewald, Kimia Nadjahi, Haitz Sáez de Ocáriz Borde,
//! Rickard Brüel Gabrielsson, Leshem Choshen, Marzyeh Ghassemi, Mikhail Yurochkin, Justin Solomon. 2024.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Recipe;
use super::parts::preset::{self, Made, given};
use crate::fault::{Fault, FieldPath};
use crate::id::Name;
use crate::job::{JobSpec, Targets};
use crate::method::{BuildCx, Card, Method, MethodRef, Paper, Point, Rule};
use crate::stages::StageSpec;

/// The factor that trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Trains {
    /// B, from what A takes of a linear's input.
    B,
    /// A, whose result B turns.
    A,
}

/// Parameters of the recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(crate) struct Config {
    /// Rank of the change.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// The factor that trains.
    trains: Trains,
    /// What both factors start as.
    init: MethodRef,
    /// The linears.
    targets: Targets,
}

impl Default for Config {
    /// The paper's.
    fn default() -> Self {
        let init = MethodRef::named("orthonormal");
        Self { rank: 16, alpha: 32.0, dropout: 0.0, trains: Trains::B, init, targets: Targets::from("all-linear") }
    }
}

/// The recipe.
pub(crate) struct AsymmetricLora {
    made: [Made; 1],
}

impl Method for AsymmetricLora {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "Asymmetry in Low-Rank Adapters of Foundation Models",
            authors: "Jiacheng Zhu, Kristjan Greenewald, Kimia Nadjahi, et al.",
            year: 2024,
        }),
        rules: &[Rule {
            when: "trains == \"a\"",
            require: "init.method != \"orthonormal\"",
            message: "starts B at 0, with which nothing moves where A alone trains; expected {method: pissa} or another start away \
                      from 0",
            path: "init",
        }],
        ..Card::new(
            "asymmetric-lora",
            Point::Recipe,
            "LoRA of which one factor alone trains, the other staying the random rotation that it starts as: half the numbers at the \
             same rank, and next to nothing lost.",
        )
    };
    type Config = Config;
    type Object = dyn Recipe;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Recipe>, Vec<Fault>> {
        let Config { rank, alpha, dropout, trains, init, targets } = config;
        let fields = vec![
            given("rank", "rank", rank),
            given("alpha", "alpha", alpha),
            given("dropout", "dropout", dropout),
            given("trains", "trains", json!(trains)),
            given("init", "init", json!(init)),
            given("targets", "targets", json!(targets)),
        ];
        Ok(Box::new(Self { made: [Made { method: "lora", fields }] }))
    }
}

impl Recipe for AsymmetricLora {
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
name: halves
kind: recipe
base: "base:latest"
data: {domains: [{name: one, source: ./one.jsonl}], max_length: 64}
tune: {steps: 10}
outputs: {merged: true}
recipe: {method: asymmetric-lora, targets: [q_proj, v_proj]}
"#;

    #[test]
    fn it_is_one_slot_whose_first_factor_stays() {
        let stages = expanded(JOB).unwrap();
        let [stage] = stages.as_slice() else { panic!("{stages:?}") };
        let slot = json!(stage.job.tune.stack[0]);
        let expected = json!({
            "method": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.0, "trains": "b",
            "init": {"method": "orthonormal"}, "targets": ["q_proj", "v_proj"], "train": true,
        });
        assert_eq!((slot, stage.job.outputs.merged), (expected, true));
    }

    #[test]
    fn what_does_not_fit_is_said_where_the_file_says_it() {
        let with = |more: &str| JOB.replacen("method: asymmetric-lora", &format!("method: asymmetric-lora, {more}"), 1);
        let cases = [
            ("rank: 0", "`recipe.rank` is 0; expected 1 or more"),
            ("trains: a", "`recipe.init` starts B at 0"),
            ("trains: both", "`recipe.trains` is \"both\""),
            ("init: {method: orthonormale}", "`recipe.init.method` is \"orthonormale\""),
            ("alhpa: 3", "did you mean \"alpha\"?"),
        ];
        for (more, expected) in cases {
            let faults = expanded(&with(more)).unwrap_err();
            assert!(faults.iter().any(|fault| fault.contains(expected)), "{more}: {faults:#?}");
        }
    }
}
