//! Keeps the largest numbers of each and adds them up; for adapters whose small numbers are noise.
//!
//! # Update
//! ```text
//! t_n  = x_n where |x_n| is among the ⌊density · numbers⌋ largest of its tensor, else 0
//! made = Σ_n w_n t_n
//! ```
//!
//! # Symbols
//! As for `task-arithmetic`, whose spaces `factors` and `changes` it has.
//!
//! # Cost
//! Reads each adapter once, and finds the largest numbers of each tensor.
//!
//! # Limits
//! With `density` 1 it is the sum. What is kept is not made larger: changes become smaller.
//!
//! # Departures
//! Agrees with PEFT.
//!
//! # Paper
//! None of its own: it is the first step of TIES-Merging, then a sum.

use attune_points::Result;
use attune_points::merge::{Keeps, Merge, Weighted};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Point};
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::stacked::Stacked;

/// Parameters of the merge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Share of each tensor's numbers that is kept.
    #[schemars(range(min = 0.0, max = 1.0))]
    density: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { density: 0.5 }
    }
}

pub(super) struct MagnitudePrune {
    density: f64,
}

impl Method for MagnitudePrune {
    const CARD: Card = Card {
        aliases: &["magnitude_prune"],
        ..Card::new(
            "magnitude-prune",
            Point::Merge,
            "Keeps the largest numbers of each and adds them up; for adapters whose small numbers are noise.",
        )
    };
    type Config = Config;
    type Object = dyn Merge;

    fn build(config: Config, _: &BuildCx<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Fault>> {
        Ok(Box::new(Self { density: config.density }))
    }
}

impl Merge for MagnitudePrune {
    fn combine(&self, of: &[Weighted<'_>], _: &mut dyn Keeps) -> Result<Tensor> {
        let mut stacked = Stacked::of(of)?;
        stacked.keep_largest(self.density);
        stacked.sum()
    }
}
