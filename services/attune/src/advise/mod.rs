//! Which method to try first: rules that say what did best in runs of every method on data of several sizes.
//!
//! The one invariant: a rule is made of the committed results of the runs that it names, by [`mod@derive`], and by nothing else.

pub(crate) mod derive;

use std::path::Path;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use crate::print::Failure;

/// What data is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Task {
    /// One of a few labels.
    Classification,
    /// Text.
    Generation,
}

/// What a method is chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Goal {
    /// The smallest loss.
    Quality,
    /// Nearly its best soonest.
    Time,
    /// The least memory while it trains.
    Memory,
    /// The smallest result.
    Storage,
}

/// What is tried first, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rule {
    /// What it is cited by.
    pub(crate) id: String,
    /// The task.
    pub(crate) task: Task,
    /// Rows of training data in the runs.
    pub(crate) examples: u64,
    /// What it is chosen by.
    pub(crate) goal: Goal,
    /// The method's value on the axis of methods.
    pub(crate) method: String,
    /// How much its best loss is below that before the first step, the mean over runs.
    pub(crate) gain: f64,
    /// The same of the method with the most.
    pub(crate) most: f64,
    /// Steps to nearly its best, the mean over runs.
    pub(crate) steps: f64,
    /// Seconds of training to there, the mean over runs.
    pub(crate) seconds: f64,
    /// The most memory of its process, the mean over runs.
    pub(crate) memory_bytes: f64,
    /// Parameters that trained.
    pub(crate) parameters: f64,
    /// The jobs that it is made of.
    pub(crate) runs: Vec<String>,
}

/// All rules.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rules {
    /// The version of the table's format.
    pub(crate) version: u32,
    /// The grid of the runs.
    pub(crate) experiment: String,
    /// The share of the most gain that a method has to keep to be chosen for something else.
    pub(crate) kept: f64,
    /// The rules.
    pub(crate) rules: Vec<Rule>,
}

/// What is said of a question.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Advice<'r> {
    /// What applies.
    pub(crate) rule: &'r Rule,
    /// Whether no run had that much data.
    pub(crate) is_beyond: bool,
}

/// The rules of this build: those of its own comparison.
pub(crate) static RULES: LazyLock<Rules> = LazyLock::new(|| {
    let text = include_str!("../../../../docs/comparisons/by-size/rules.json");
    serde_json::from_str(text).expect("a test reads the same file")
});

/// The file beside a grid's results that has its rules.
pub(crate) const RULES_FILE: &str = "rules.json";

impl Rules {
    /// Rules that a report of a grid has written.
    pub(crate) fn read(file: &Path) -> Result<Self, Failure> {
        let text = std::fs::read(file).map_err(|error| Failure::file(file, &error))?;
        serde_json::from_slice(&text).map_err(|error| Failure::usage(format!("{}: {error}", file.display())))
    }

    /// What is written.
    pub(crate) fn text(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// What to try on so many examples: by the runs of the smallest data that has as many, else of the largest.
    pub(crate) fn advise(&self, task: Task, examples: u64, goal: Goal) -> Option<Advice<'_>> {
        let of_task = self.rules.iter().filter(|rule| rule.task == task && rule.goal == goal);
        let enough = of_task.clone().filter(|rule| rule.examples >= examples).min_by_key(|rule| rule.examples);
        match enough {
            Some(rule) => Some(Advice { rule, is_beyond: false }),
            None => of_task.max_by_key(|rule| rule.examples).map(|rule| Advice { rule, is_beyond: true }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(task: Task, examples: u64, goal: Goal) -> Rule {
        Rule {
            id: format!("{examples}"),
            task,
            examples,
            goal,
            method: "lora".to_owned(),
            gain: 1.0,
            most: 1.0,
            steps: 10.0,
            seconds: 1.0,
            memory_bytes: 1.0,
            parameters: 1.0,
            runs: vec!["j-1".to_owned()],
        }
    }

    #[test]
    fn the_smallest_data_that_has_as_many_examples_counts() {
        let of = |examples| rule(Task::Generation, examples, Goal::Quality);
        let other = rule(Task::Classification, 5000, Goal::Quality);
        let rules = Rules { version: 1, experiment: String::new(), kept: 0.8, rules: vec![of(1000), of(100), other] };
        let found = |examples| {
            let advice = rules.advise(Task::Generation, examples, Goal::Quality).unwrap();
            (advice.rule.examples, advice.is_beyond)
        };
        assert_eq!(
            (found(1), found(100), found(101), found(1000)),
            ((100, false), (100, false), (1000, false), (1000, false))
        );
        assert_eq!(found(1001), (1000, true));
        assert_eq!(rules.advise(Task::Generation, 10, Goal::Memory), None);
    }

    /// Each question has an answer that names its runs.
    #[test]
    fn the_rules_of_this_build_answer_every_question() {
        for task in [Task::Classification, Task::Generation] {
            for goal in [Goal::Quality, Goal::Time, Goal::Memory, Goal::Storage] {
                for examples in [1, 100, 1000, 100_000] {
                    let advice = RULES.advise(task, examples, goal).unwrap();
                    assert!(advice.rule.runs.len() >= 3, "{advice:?}");
                    assert!(advice.rule.gain >= RULES.kept * advice.rule.most, "{advice:?}");
                }
            }
        }
    }
}
