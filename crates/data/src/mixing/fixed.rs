//! Draws each document's domain by the weights of the job file, the same throughout the run.
//!
//! # Update
//! ```text
//! p_d = weight_d / Σ weight
//! ```
//!
//! # Symbols
//! `p_d` the probability that the next document is of domain `d`.
//!
//! # Cost
//! None.
//!
//! # Limits
//! With one domain every document is of it; a domain of weight 0 is never drawn.
//!
//! # Departures
//! none.
//!
//! # Paper
//! none: common practice.

use attune_points::mixing::{Feedback, Mixing, Simplex};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Method, Point};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// It has no parameters: the weights stand with the domains.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {}

pub(super) struct Fixed {
    shares: Simplex,
}

impl Method for Fixed {
    const CARD: Card = Card::new(
        "static",
        Point::Mixing,
        "Draws each document's domain by the weights of the job file, the same throughout the run.",
    );
    type Config = Config;
    type Object = dyn Mixing;

    fn build(_: Config, cx: &BuildCx<'_>) -> Result<Box<dyn Mixing>, Vec<Fault>> {
        let weights = cx.domains.iter().map(|(_, weight)| *weight).collect();
        let shares = Simplex::new(weights).map_err(|error| vec![Fault::new("", error.to_string())])?;
        Ok(Box::new(Self { shares }))
    }
}

impl Mixing for Fixed {
    fn decide(&mut self, _: Step, _: &Feedback) -> attune_points::Result<Simplex> {
        Ok(self.shares.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_the_weights_whatever_the_feedback() {
        let domains = [("a".parse().unwrap(), 1.0), ("b".parse().unwrap(), 0.0), ("c".parse().unwrap(), 3.0)];
        let mut mixing = Fixed::build(Config {}, &BuildCx { steps: Step(1), domains: &domains, words: None }).unwrap();
        let feedback = Feedback { loss: vec![Some(9.0), None, Some(0.1)] };
        assert_eq!(mixing.decide(Step(7), &feedback).unwrap().shares(), [0.25, 0.0, 0.75]);
    }
}
