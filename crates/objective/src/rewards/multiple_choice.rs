//! Rewards an answer that names the right one of several choices by its letter: for questions with options A, B, C and so on.
//!
//! # Update
//! ```text
//! R = 1 if the last letter that the answer names is that of expected, else 0
//! ```
//!
//! # Symbols
//! A letter that is named stands alone, as in `B`, `(B)`, `B.` or `answer: B`; it is one of the first `choices` capital letters.
//!
//! # Cost
//! One reading of both texts.
//!
//! # Limits
//! An answer that names no letter has reward 0; a row whose expected answer names none cannot be judged.
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How many letters there are to choose from.
    #[schemars(range(min = 2, max = 26))]
    choices: u8,
}

impl Default for Config {
    /// A to D, as in most tests.
    fn default() -> Self {
        Self { choices: 4 }
    }
}

pub(super) struct MultipleChoice {
    config: Config,
}

impl Method for MultipleChoice {
    const CARD: Card = Card::new(
        "multiple-choice",
        Point::Reward,
        "Rewards an answer that names the right one of several choices by its letter: for questions with options A, B, C and so on.",
    );
    type Config = Config;
    type Object = dyn Reward;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Reward>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Config {
    /// The last letter that a text names.
    fn named(&self, text: &str) -> Option<char> {
        let letters = 'A'..=char::from(b'A' + self.choices - 1);
        let alone = |word: &str| {
            let mut chars = word.chars();
            chars.next().filter(|letter| letters.contains(letter) && chars.next().is_none())
        };
        text.rsplit(|c: char| !c.is_alphanumeric()).find_map(alone)
    }
}

impl Reward for MultipleChoice {
    fn of(&self, answer: &Answer<'_>) -> Option<f64> {
        let expected = self.config.named(answer.expected)?;
        Some(f64::from(self.config.named(answer.text) == Some(expected)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_that_stands_alone_is_a_choice() {
        let of = |text, expected| {
            let answer = Answer { text, expected, tokens: 1, max_tokens: 9, finished: true };
            MultipleChoice { config: Config::default() }.of(&answer)
        };
        assert_eq!(of("First A seems right, but it is (C).", "C"), Some(1.0));
        assert_eq!(of("Because", "B"), Some(0.0));
        assert_eq!(of("E", "D"), Some(0.0), "E is no choice of four");
        assert_eq!(of("Answer: b", "B"), Some(0.0), "a small letter may be a word");
        assert_eq!(of("B", "the second"), None);
    }
}
