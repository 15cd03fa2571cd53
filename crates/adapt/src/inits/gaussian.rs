//! Starts a pair of factors with a normal A and B zero: a width-independent start, as some LoRA implementations have it.
//!
//! # Update
//! ```text
//! A_ri ~ normal(0, std²)        B_or = 0        std = 1/r unless it is given
//! ```
//!
//! # Symbols
//! `A_ri`, `B_or` the factors; `r` the rank.
//!
//! # Cost
//! None.
//!
//! # Limits
//! B = 0, so the component starts as the identity.
//!
//! # Departures
//! none; without `std` it is PEFT's `init_lora_weights: gaussian`.
//!
//! # Paper
//! LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., 2021.

use attune_points::adapter::{Adapter, Attachment, BaseEdit};
use attune_points::init::Init;
use attune_points::{Locals, Stats, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::rng::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::factors;

/// Parameters of the initialisation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Standard deviation of A; one over the rank when it is left out.
    #[schemars(range(min = 0.0, max = 10.0))]
    std: Option<f64>,
}

pub(super) struct Gaussian {
    config: Config,
}

impl Method for Gaussian {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "LoRA: Low-Rank Adaptation of Large Language Models",
            authors: "Edward J. Hu et al.",
            year: 2021,
        }),
        ..Card::new(
            "gaussian",
            Point::Init,
            "Starts a pair of factors with a normal A and B zero: a width-independent start, as some LoRA implementations \
             have it.",
        )
    };
    type Config = Config;
    type Object = dyn Init;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Init>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Init for Gaussian {
    fn init(
        &self,
        _: &dyn Adapter,
        at: &Attachment,
        _: &dyn Weight,
        _: &Stats,
        rng: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        let (a, _) = factors::pair(at)?;
        let std = self.config.std.unwrap_or(1.0 / a.shape[0] as f64);
        factors::gaussian(at, std, rng)
    }
}
