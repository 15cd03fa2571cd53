//! Rewards an answer whose last number is that of the answer which the data expects: for word problems, where the way there is free.
//!
//! # Update
//! ```text
//! R = 1 if |last number of the answer - last number of expected| <= tolerance · max(1, |expected|), else 0
//! ```
//!
//! # Symbols
//! A number is digits with a sign, commas between groups of three, a point and an exponent; `#### 42` and `\boxed{42}` end in 42.
//!
//! # Cost
//! One reading of both texts.
//!
//! # Limits
//! An answer without a number has reward 0; a row whose expected answer has none cannot be judged.
//!
//! # Departures
//! Fractions, units and roots are not understood: `1/2` ends in 2.
//!
//! # Paper
//! none: common practice.

use attune_points::reward::{Answer, Reward};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Point};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Parameters of the rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How far the number may be off, as a share of the expected one.
    #[schemars(range(min = 0.0, max = 1.0))]
    tolerance: f64,
}

impl Default for Config {
    /// What writing a decimal number out loses, no more.
    fn default() -> Self {
        Self { tolerance: 1e-6 }
    }
}

pub(super) struct NumericAnswer {
    config: Config,
}

impl Method for NumericAnswer {
    const CARD: Card = Card::new(
        "numeric-answer",
        Point::Reward,
        "Rewards an answer whose last number is that of the answer which the data expects: for word problems, where the way there \
         is free.",
    );
    type Config = Config;
    type Object = dyn Reward;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Reward>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

/// The last number of a text.
fn last_number(text: &str) -> Option<f64> {
    let bytes = text.as_bytes();
    let end = bytes.iter().rposition(u8::is_ascii_digit)? + 1;
    // What a number may hold, from its last digit back; then what of it starts too early is cut off.
    let holds = |byte: &u8| byte.is_ascii_digit() || b".,+-eE".contains(byte);
    let start = end - bytes[..end].iter().rev().take_while(|byte| holds(byte)).count();
    (start..end).filter(|&at| text.is_char_boundary(at)).find_map(|at| number(&text[at..end]))
}

/// A number as people write it.
fn number(text: &str) -> Option<f64> {
    let body = text.strip_prefix(['+', '-']).unwrap_or(text);
    let (whole, rest) = body.split_at(body.find(['.', 'e', 'E']).unwrap_or(body.len()));
    // A point may come first; a comma only between groups of three.
    let mut groups = whole.split(',');
    let first = groups.next()?;
    let grouped = whole.contains(',');
    let are_groups = groups.all(|group| group.len() == 3) && (!grouped || (1..=3).contains(&first.len()));
    let starts = body.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    if !starts || !are_groups || rest.contains(',') {
        return None;
    }
    format!("{}{}{rest}", if text.starts_with('-') { "-" } else { "" }, whole.replace(',', "")).parse().ok()
}

impl Reward for NumericAnswer {
    fn of(&self, answer: &Answer<'_>) -> Option<f64> {
        let expected = last_number(answer.expected)?;
        let is_right = |said: f64| (said - expected).abs() <= self.config.tolerance * expected.abs().max(1.0);
        Some(f64::from(last_number(answer.text).is_some_and(is_right)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_number_is_read_as_people_write_it() {
        for (text, expected) in [
            ("so 3 + 4 = 7.", Some(7.0)),
            ("#### 1,234.50", Some(1234.5)),
            ("\\boxed{-12}", Some(-12.0)),
            ("it costs $12,5", Some(5.0)),
            ("about 2e-3 of it", Some(0.002)),
            ("1,2,3", Some(3.0)),
            ("10-4", Some(-4.0)),
            (".5", Some(0.5)),
            ("zwölf", None),
            ("ö7", Some(7.0)),
        ] {
            assert_eq!(last_number(text), expected, "{text}");
        }
    }

    #[test]
    fn a_number_is_right_within_the_tolerance() {
        let of = |text, expected, tolerance| {
            let answer = Answer { text, expected, tokens: 1, max_tokens: 9, finished: true };
            NumericAnswer { config: Config { tolerance } }.of(&answer)
        };
        assert_eq!(of("The answer is 42.", "#### 42", 1e-6), Some(1.0));
        assert_eq!(of("420", "42", 1e-6), Some(0.0));
        assert_eq!(of("101", "100", 0.02), Some(1.0));
        assert_eq!(of("I do not know", "42", 1e-6), Some(0.0));
        assert_eq!(of("42", "none", 1e-6), None);
    }
}
