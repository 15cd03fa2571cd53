//! Rewards an answer in which a text stands, word for word: for facts that may be told in any sentence.
//!
//! # Update
//! ```text
//! R = 1 if the words of `text` follow each other in the answer, else 0
//! ```
//!
//! # Symbols
//! `text` is what the data expects unless it is given; words are runs of letters and digits, and capital letters are as small ones.
//!
//! # Cost
//! One reading of both texts.
//!
//! # Limits
//! A part of a word does not count: `1` is not in `10`. A text without words cannot be judged.
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
    /// What has to be in the answer; what the data expects if it is left out.
    text: Option<String>,
}

pub(super) struct Contains {
    config: Config,
}

impl Method for Contains {
    const CARD: Card = Card::new(
        "contains",
        Point::Reward,
        "Rewards an answer in which a text stands, word for word: for facts that may be told in any sentence.",
    );
    type Config = Config;
    type Object = dyn Reward;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Reward>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

fn words(text: &str) -> Vec<String> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_lowercase).collect()
}

impl Reward for Contains {
    fn of(&self, answer: &Answer<'_>) -> Option<f64> {
        let wanted = words(self.config.text.as_deref().unwrap_or(answer.expected));
        if wanted.is_empty() {
            return None;
        }
        Some(f64::from(words(answer.text).windows(wanted.len()).any(|run| run == wanted)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_follow_each_other_or_do_not_count() {
        let of = |text, expected, given: Option<&str>| {
            let answer = Answer { text, expected, tokens: 1, max_tokens: 9, finished: true };
            Contains { config: Config { text: given.map(str::to_owned) } }.of(&answer)
        };
        assert_eq!(of("It is in Section NET, I think.", "section net", None), Some(1.0));
        assert_eq!(of("10", "1", None), Some(0.0));
        assert_eq!(of("net section", "section net", None), Some(0.0));
        assert_eq!(of("anything", "…", None), None);
        assert_eq!(of("please wait", "", Some("please")), Some(1.0));
    }
}
