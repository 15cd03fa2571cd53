//! Tries places at random, spread evenly over each axis: what any other search has to be better than, and enough for few jobs.
//!
//! # Update
//! ```text
//! evaluations places of a Latin hypercube: each axis is cut into as many strata, and each stratum is met once
//! ```
//!
//! # Symbols
//! None.
//!
//! # Cost
//! None beside its jobs.
//!
//! # Limits
//! With as many evaluations as places it is the grid.
//!
//! # Departures
//! none: common practice.
//!
//! # Paper
//! Random Search for Hyper-Parameter Optimization. Bergstra, Bengio, 2012.

use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::parts::Taken;
use crate::{Place, Search, Space, Tried};

/// Parameters of the search.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Jobs that it runs.
    #[schemars(range(min = 1, max = 10000))]
    evaluations: u32,
    /// Which random numbers it draws.
    seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { evaluations: 20, seed: 0 }
    }
}

pub(super) struct Random {
    config: Config,
}

impl Method for Random {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "Random Search for Hyper-Parameter Optimization",
            authors: "James Bergstra, Yoshua Bengio",
            year: 2012,
        }),
        ..Card::new(
            "random-search",
            Point::Search,
            "Tries places at random, spread evenly over each axis: what any other search has to be better than, and enough for few \
             jobs.",
        )
    };
    type Config = Config;
    type Object = dyn Search;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Search>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Search for Random {
    fn evaluations(&self) -> usize {
        self.config.evaluations as usize
    }

    fn next(&self, space: &Space, tried: &[Tried], fits: &mut dyn FnMut(&Place) -> bool) -> Vec<Place> {
        if !tried.is_empty() {
            return Vec::new();
        }
        let mut rng = Rng::new(self.config.seed, "search");
        Taken::of(tried).spread(space, self.evaluations(), &mut rng, fits)
    }
}
