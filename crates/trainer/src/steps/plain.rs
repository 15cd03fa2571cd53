//! The usual step: the gradient of the loss over the batch, then one update.
//!
//! # Update
//! ```text
//! g = ∇ (1/N) Σ_parts L_part(θ)        θ <- update(θ, clip(g))
//! ```
//!
//! # Symbols
//! `parts` are the micro-batches of all logical shards, summed in their order; `N` is the objective's denominator over all
//! of them.
//!
//! # Cost
//! One forward and one backward pass.
//!
//! # Limits
//! With one part it is plain gradient descent on a batch.
//!
//! # Departures
//! none.
//!
//! # Paper
//! none: common practice.

use attune_points::engine::{self, Engine, StepReport, StepRule};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Method, Point};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// It has no parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {}

pub(super) struct Plain;

impl Method for Plain {
    const CARD: Card = Card::new(
        "plain",
        Point::StepRule,
        "The usual step: the gradient of the loss over the batch, then one update.",
    );
    type Config = Config;
    type Object = dyn StepRule;

    fn build(_: Config, _: &BuildCx<'_>) -> Result<Box<dyn StepRule>, Vec<Fault>> {
        Ok(Box::new(Self))
    }
}

impl StepRule for Plain {
    fn step(&mut self, _: Step, engine: &mut dyn Engine) -> attune_points::Result<StepReport> {
        engine::usual_step(engine)
    }
}
