//! Drops numbers of each at random, makes the others larger for it, and adds up; for adapters with much to spare, which then rarely meet.
//!
//! # Update
//! ```text
//! t_n  = x_n · m_n / density          m_n ~ Bernoulli(density), entry by entry
//! made = Σ_n w_n t_n
//! ```
//!
//! # Symbols
//! As for `task-arithmetic`, whose spaces `factors` and `changes` it has. What is drawn depends on the seed, the site and the adapter's place.
//!
//! # Cost
//! Reads each adapter once.
//!
//! # Limits
//! In the mean over seeds it is the sum; with `density` 1 it always is. In `factors` both are thinned out, and a change has `density` squared
//! of its products.
//!
//! # Departures
//! Agrees with PEFT, but for which numbers are drawn. The paper drops nine in ten of the numbers of changes, which for factors of low
//! rank are too many: half is what is kept if nothing else is said.
//!
//! # Paper
//! Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch. Yu, Yu, Yu, Huang, Li, 2024.

use attune_points::Result;
use attune_points::merge::{Keeps, Merge, Weighted};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point, Rule};
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::stacked::Stacked;

/// Parameters of the merge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Share of the numbers that is kept.
    #[schemars(range(min = 0.0, max = 1.0))]
    density: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { density: 0.5 }
    }
}

pub(super) struct DareLinear {
    density: f64,
}

impl Method for DareLinear {
    const CARD: Card = Card {
        aliases: &["dare_linear"],
        paper: Some(Paper {
            title: "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
            authors: "Le Yu, Bowen Yu, Haiyang Yu, Fei Huang, Yongbin Li",
            year: 2024,
        }),
        rules: &[Rule {
            when: "true",
            require: "density > 0",
            message: "is 0, by which what is kept would be divided; expected more",
            path: "density",
        }],
        ..Card::new(
            "dare-linear",
            Point::Merge,
            "Drops numbers of each at random, makes the others larger for it, and adds up; for adapters with much to spare, which then \
             rarely meet.",
        )
    };
    type Config = Config;
    type Object = dyn Merge;

    fn build(config: Config, _: &BuildCx<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Fault>> {
        Ok(Box::new(Self { density: config.density }))
    }
}

impl Merge for DareLinear {
    fn combine(&self, of: &[Weighted<'_>], keeps: &mut dyn Keeps) -> Result<Tensor> {
        let mut stacked = Stacked::of(of)?;
        stacked.keep_any(self.density, keeps)?;
        stacked.sum()
    }
}
