//! Starts a pair of factors as PyTorch's linears start: A uniform by its input width, B zero. The default of LoRA.
//!
//! # Update
//! ```text
//! A_ri ~ uniform(-1/sqrt(i), 1/sqrt(i))        B_or = 0
//! ```
//!
//! # Symbols
//! `A_ri`, `B_or` the factors; `i` the input width.
//!
//! # Cost
//! None.
//!
//! # Limits
//! B = 0, so the component starts as the identity.
//!
//! # Departures
//! none; PEFT's `init_lora_weights: true`.
//!
//! # Paper
//! Delving Deep into Rectifiers. He, Zhang, Ren, Sun, 2015.

use attune_points::adapter::{Adapter, Attachment, BaseEdit};
use attune_points::init::Init;
use attune_points::{Locals, Stats, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::rng::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::factors;

/// It has no parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {}

pub(super) struct Kaiming;

impl Method for Kaiming {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet Classification",
            authors: "Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun",
            year: 2015,
        }),
        ..Card::new(
            "kaiming",
            Point::Init,
            "Starts a pair of factors as PyTorch's linears start: A uniform by its input width, B zero. The default of LoRA.",
        )
    };
    type Config = Config;
    type Object = dyn Init;

    fn build(_: Config, _: &BuildCx<'_>) -> Result<Box<dyn Init>, Vec<Fault>> {
        Ok(Box::new(Self))
    }
}

impl Init for Kaiming {
    fn init(
        &self,
        _: &dyn Adapter,
        at: &Attachment,
        _: &dyn Weight,
        _: &Stats,
        rng: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        factors::kaiming(at, rng)
    }
}
