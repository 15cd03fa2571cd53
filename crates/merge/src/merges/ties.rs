//! Keeps the largest numbers of each, elects a sign entry by entry, and takes the mean of those that have it; for adapters that pull the
//! same numbers apart.
//!
//! # Update
//! ```text
//! t_n  = x_n where |x_n| is among the ⌊density · numbers⌋ largest of its tensor, else 0
//! s    = sign Σ_n t_n      or, with majority_sign: frequency,  sign Σ_n sign t_n            0 counts as +
//! made = Σ_n [sign t_n = s] w_n t_n / max(1, Σ_n [sign t_n = s])
//! ```
//!
//! # Symbols
//! As for `task-arithmetic`, whose spaces `factors` and `changes` it has.
//!
//! # Cost
//! Reads each adapter once, and finds the largest numbers of each tensor.
//!
//! # Limits
//! With `density` 1 and copies of one adapter it is that adapter, times its weight. A tensor of so few numbers that the share of them is none
//! is left out as a whole.
//!
//! # Departures
//! Agrees with PEFT: numbers are trimmed tensor by tensor, not over all of a model's at once as in the paper, weights have no vote, and
//! the divisor counts adapters rather than their weights.
//!
//! # Paper
//! TIES-Merging: Resolving Interference When Merging Models. Yadav, Tam, Choshen, Raffel, Bansal, 2023.

use attune_points::Result;
use attune_points::merge::{Keeps, Merge, Weighted};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
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
    /// Share of each tensor's numbers that is kept.
    #[schemars(range(min = 0.0, max = 1.0))]
    density: f64,
    /// Whose sign counts where entries differ.
    majority_sign: MajoritySign,
}

impl Default for Config {
    fn default() -> Self {
        Self { density: 0.2, majority_sign: MajoritySign::Total }
    }
}

pub(super) struct Ties {
    config: Config,
}

impl Method for Ties {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "TIES-Merging: Resolving Interference When Merging Models",
            authors: "Prateek Yadav, Derek Tam, Leshem Choshen, Colin Raffel, Mohit Bansal",
            year: 2023,
        }),
        ..Card::new(
            "ties",
            Point::Merge,
            "Keeps the largest numbers of each, elects a sign entry by entry, and takes the mean of those that have it; for adapters \
             that pull the same numbers apart.",
        )
    };
    type Config = Config;
    type Object = dyn Merge;

    fn build(config: Config, _: &BuildCx<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Merge for Ties {
    fn combine(&self, of: &[Weighted<'_>], _: &mut dyn Keeps) -> Result<Tensor> {
        let mut stacked = Stacked::of(of)?;
        stacked.keep_largest(self.config.density);
        stacked.elected(self.config.majority_sign)
    }
}
