//! Rewards an answer that a regular expression matches: for a form that answers should have, beside a rule that says whether they
//! are right.
//!
//! # Update
//! ```text
//! R = 1 if `pattern` matches the answer, else 0
//! ```
//!
//! # Symbols
//! `pattern` is searched for anywhere in the answer; `^` and `$` are its ends, and `(?s)` lets a point match line breaks.
//!
//! # Cost
//! Linear in the answer's length, whatever the pattern: there is no going back.
//!
//! # Limits
//! What the data expects is not looked at.
//!
//! # Departures
//! none.
//!
//! # Paper
//! none: common practice.

use attune_points::reward::{Answer, Reward};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Point, Rule};
use regex::{Regex, RegexBuilder};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Parameters of the rule.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// The regular expression.
    pattern: String,
}

/// Groups and repetitions of a pattern within each other: compiling goes as deep.
const DEPTH_MAX: u32 = 40;

pub(super) struct RegexMatch {
    pattern: Regex,
}

impl Method for RegexMatch {
    const CARD: Card = Card {
        rules: &[Rule {
            when: "true",
            require: "pattern != \"\"",
            message: "is empty, which matches everything; expected a regular expression",
            path: "pattern",
        }],
        ..Card::new(
            "regex-match",
            Point::Reward,
            "Rewards an answer that a regular expression matches: for a form that answers should have, beside a rule that says \
             whether they are right.",
        )
    };
    type Config = Config;
    type Object = dyn Reward;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Reward>, Vec<Fault>> {
        let wrong = |error: regex::Error| {
            let what = error.to_string();
            let what = what.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
            vec![Fault::new("pattern", format!("is {:?}, which is no regular expression: {what}", config.pattern))]
        };
        Ok(Box::new(Self { pattern: RegexBuilder::new(&config.pattern).nest_limit(DEPTH_MAX).build().map_err(wrong)? }))
    }
}

impl Reward for RegexMatch {
    fn of(&self, answer: &Answer<'_>) -> Option<f64> {
        Some(f64::from(self.pattern.is_match(answer.text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(pattern: &str) -> Result<Box<dyn Reward>, Vec<Fault>> {
        let cx = BuildCx { steps: attune_spec::id::Step(1), domains: &[], words: None };
        RegexMatch::build(Config { pattern: pattern.to_owned() }, &cx)
    }

    #[test]
    fn a_form_is_matched_anywhere_and_a_bad_pattern_is_named() {
        let of = |pattern, text| {
            let answer = Answer { text, expected: "", tokens: 1, max_tokens: 9, finished: true };
            build(pattern).unwrap().of(&answer)
        };
        assert_eq!(of("<answer>.*</answer>", "so <answer>4</answer>"), Some(1.0));
        assert_eq!(of("^<answer>", "so <answer>4</answer>"), Some(0.0));
        let faults = build("(").err().unwrap();
        assert!(
            faults[0].to_string().starts_with("`pattern` is \"(\", which is no regular expression: "),
            "{}",
            faults[0]
        );
    }
}
