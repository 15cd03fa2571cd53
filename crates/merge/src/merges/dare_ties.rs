//! Drops numbers of each at random, then elects a sign entry by entry and takes the mean of those that have it; for adapters with much to
//! spare that still pull the same numbers apart.
//!
//! # Update
//! ```text
//! t_n  = x_n · m_n / density          m_n ~ Bernoulli(density), entry by entry
//! made = Σ_n [sign t_n = s] w_n t_n / max(1, Σ_n [sign t_n = s])          s as for `ties`
//! ```
//!
//! # Symbols
//! As for `dare-linear` and `ties`.
//!
//! # Cost
//! Reads each adapter once.
//!
//! # Limits
//! With `density` 1 it is `ties` that trims nothing.
//!
//! # Departures
//! Agrees with PEFT, but for which numbers are drawn; as for `dare-linear` and `ties`.
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

use crate::parts::election::MajoritySign;
use crate::parts::stacked::Stacked;

/// Parameters of the merge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Share of the numbers that is kept.
    #[schemars(range(min = 0.0, max = 1.0))]
    density: f64,
    /// Whose sign counts where entries differ.
    majority_sign: MajoritySign,
}

impl Default for Config {
    fn default() -> Self {
        Self { density: 0.5, majority_sign: MajoritySign::Total }
    }
}

pub(super) struct DareTies {
    config: Config,
}

impl Method for DareTies {
    const CARD: Card = Card {
        aliases: &["dare_ties"],
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
            "dare-ties",
            Point::Merge,
            "Drops numbers of each at random, then elects a sign entry by entry and takes the mean of those that have it; for adapters \
             with much to spare that still pull the same numbers apart.",
        )
    };
    type Config = Config;
    type Object = dyn Merge;

    fn build(config: Config, _: &BuildCx<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Merge for DareTies {
    fn combine(&self, of: &[Weighted<'_>], keeps: &mut dyn Keeps) -> Result<Tensor> {
        let mut stacked = Stacked::of(of)?;
        stacked.keep_any(self.config.density, keeps)?;
        stacked.elected(self.config.majority_sign)
    }
}
