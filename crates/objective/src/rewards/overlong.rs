//! Takes from the reward of answers that come near to the limit, or are cut off there: so that answers do not grow without end.
//!
//! # Update
//! ```text
//! R = 0                              n <= M - m
//!   = (M - m - n) / m                M - m < n, and the model ended the answer
//!   = -1                             it was cut off
//! ```
//!
//! # Symbols
//! `n` the answer's tokens, `M` the most that it can have, `margin` m.
//!
//! # Cost
//! none.
//!
//! # Limits
//! With a margin of 1 only what is cut off is punished, or ends with its very last token.
//!
//! # Departures
//! none.
//!
//! # Paper
//! DAPO: An Open-Source LLM Reinforcement Learning System at Scale. Yu et al., 2025 (soft overlong punishment).

use attune_points::reward::{Answer, Reward};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Parameters of the rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How many tokens before the limit it begins.
    #[schemars(range(min = 1, max = 1_048_576))]
    margin: u32,
}

impl Default for Config {
    /// A fifth of the longest answer of a group-relative job's defaults, as the paper has it.
    fn default() -> Self {
        Self { margin: 51 }
    }
}

pub(super) struct Overlong {
    config: Config,
}

impl Method for Overlong {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
            authors: "Qiying Yu, Zheng Zhang, Ruofei Zhu, Yufeng Yuan, Xiaochen Zuo, Yu Yue and others",
            year: 2025,
        }),
        ..Card::new(
            "overlong",
            Point::Reward,
            "Takes from the reward of answers that come near to the limit, or are cut off there: so that answers do not grow \
             without end.",
        )
    };
    type Config = Config;
    type Object = dyn Reward;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Reward>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Reward for Overlong {
    fn of(&self, answer: &Answer<'_>) -> Option<f64> {
        if !answer.finished {
            return Some(-1.0);
        }
        let margin = f64::from(self.config.margin);
        let beyond = answer.tokens as f64 - (answer.max_tokens as f64 - margin);
        Some(if beyond <= 0.0 { 0.0 } else { -(beyond / margin).min(1.0) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_falls_from_the_margin_to_the_limit() {
        let of = |tokens, finished| {
            let answer = Answer { text: "", expected: "", tokens, max_tokens: 100, finished };
            Overlong { config: Config { margin: 20 } }.of(&answer).unwrap()
        };
        assert_eq!([of(10, true), of(80, true), of(85, true), of(100, true)], [0.0, 0.0, -0.25, -1.0]);
        assert_eq!(of(100, false), -1.0);
    }
}
