//! Holds the learning rate, after a warm-up if there is one.
//!
//! # Update
//! ```text
//! d < w: d / w        else: 1
//! ```
//!
//! # Symbols
//! `d` finished updates, `n` updates of the run, `w` updates of the warm-up; the factor is on the learning rate.
//!
//! # Cost
//! None.
//!
//! # Limits
//! Without warm-up the factor is 1 throughout.
//!
//! # Departures
//! none; agrees with the scheduler of the same name in `transformers`.
//!
//! # Paper
//! none: common practice.

use attune_points::schedule::Schedule;
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Method, Point};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::parts::Warmup;

/// Parameters of the schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How long the rate rises from 0: a share of the run below 1, or a number of steps.
    warmup: Warmup,
}

impl Default for Config {
    fn default() -> Self {
        Self { warmup: Warmup(0.0) }
    }
}

pub(super) struct Constant {
    warmup: Warmup,
}

impl Method for Constant {
    const CARD: Card =
        Card::new("constant", Point::Schedule, "Holds the learning rate, after a warm-up if there is one.");
    type Config = Config;
    type Object = dyn Schedule;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Schedule>, Vec<Fault>> {
        Ok(Box::new(Self { warmup: config.warmup }))
    }
}

impl Schedule for Constant {
    fn factor(&self, done: Step, total: Step) -> f64 {
        self.warmup.split(done.0, total.0).unwrap_or(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(warmup: f64) -> Vec<f64> {
        let schedule = Constant { warmup: Warmup(warmup) };
        [0, 2, 4, 8, 12].iter().map(|&done| schedule.factor(Step(done), Step(12))).collect()
    }

    #[test]
    fn it_has_its_values_at_the_corners() {
        assert_eq!(factors(0.0), [1.0; 5]);
        assert_eq!(factors(4.0), [0.0, 0.5, 1.0, 1.0, 1.0]);
    }
}
