//! Rewards an answer that is the one which the data expects: for labels, names and other short texts with one right spelling.
//!
//! # Update
//! ```text
//! R = 1 if normal(answer) = normal(expected), else 0
//! ```
//!
//! # Symbols
//! `normal` takes white space off both ends, makes one space of any run of it, and without `case` small letters of capital ones.
//!
//! # Cost
//! One comparison of texts.
//!
//! # Limits
//! A row that expects nothing cannot be judged.
//!
//! # Departures
//! none.
//!
//! # Paper
//! none: common practice.

use attune_points::reward::{Answer, Reward};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Point};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Parameters of the rule.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Whether capital letters differ from small ones.
    case: bool,
}

pub(super) struct ExactMatch {
    config: Config,
}

impl Method for ExactMatch {
    const CARD: Card = Card::new(
        "exact-match",
        Point::Reward,
        "Rewards an answer that is the one which the data expects: for labels, names and other short texts with one right spelling.",
    );
    type Config = Config;
    type Object = dyn Reward;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Reward>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

/// A text with single spaces, in small letters unless `case`.
pub(super) fn normal(text: &str, case: bool) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if case { words } else { words.to_lowercase() }
}

impl Reward for ExactMatch {
    fn of(&self, answer: &Answer<'_>) -> Option<f64> {
        let [said, expected] = [answer.text, answer.expected].map(|text| normal(text, self.config.case));
        (!expected.is_empty()).then(|| f64::from(said == expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spelling_counts_and_spaces_do_not() {
        let of = |text, expected, case| {
            let answer = Answer { text, expected, tokens: 1, max_tokens: 9, finished: true };
            ExactMatch { config: Config { case } }.of(&answer)
        };
        assert_eq!(of(" Main\n archive ", "main archive", false), Some(1.0));
        assert_eq!(of("Main", "main", true), Some(0.0));
        assert_eq!(of("mains", "main", false), Some(0.0));
        assert_eq!(of("main", "  ", false), None);
    }
}
