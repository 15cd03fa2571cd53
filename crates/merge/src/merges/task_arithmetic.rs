//! Adds what was learned, each with a weight of its own, and subtracts what has a negative one; for skills that do not meet in the same
//! numbers, and for unlearning.
//!
//! # Update
//! ```text
//! made = Σ_n w_n x_n
//! ```
//!
//! # Symbols
//! `x_n` the tensor of adapter n, `w_n` its weight. In the space `factors` x is A or B, and w the root of `weight · scale`, with its sign at A; in
//! `changes` x is `scale · B A`, and singular directions of the sum become factors; in `concatenated` factors stand side by side.
//!
//! # Cost
//! Reads each adapter once. `concatenated` adds up the ranks; `changes` has a singular value decomposition of each site's weight's size.
//!
//! # Limits
//! `concatenated` and `changes` of enough rank are the sum exactly; `factors` is it only where adapters have one factor in common, for
//! `(B_1 + B_2)(A_1 + A_2)` has products that nobody learned.
//!
//! # Departures
//! Agrees with PEFT, whose combination types `linear`, `cat` and `svd` are its three spaces; ranks of sites are no larger than their weights.
//!
//! # Paper
//! Editing Models with Task Arithmetic. Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi, 2023.

use attune_points::Result;
use attune_points::merge::{Keeps, Merge, Weighted};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::stacked::Stacked;

/// It has no parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {}

pub(super) struct TaskArithmetic;

impl Method for TaskArithmetic {
    const CARD: Card = Card {
        aliases: &["task_arithmetic"],
        paper: Some(Paper {
            title: "Editing Models with Task Arithmetic",
            authors: "Gabriel Ilharco, Marco Tulio Ribeiro, Mitchell Wortsman, Suchin Gururangan, Ludwig Schmidt, Hannaneh \
                      Hajishirzi, Ali Farhadi",
            year: 2023,
        }),
        ..Card::new(
            "task-arithmetic",
            Point::Merge,
            "Adds what was learned, each with a weight of its own, and subtracts what has a negative one; for skills that do not meet \
             in the same numbers, and for unlearning.",
        )
    };
    type Config = Config;
    type Object = dyn Merge;

    fn build(_: Config, _: &BuildCx<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Fault>> {
        Ok(Box::new(Self))
    }
}

impl Merge for TaskArithmetic {
    fn combine(&self, of: &[Weighted<'_>], _: &mut dyn Keeps) -> Result<Tensor> {
        Stacked::of(of)?.sum()
    }

    fn is_sum(&self) -> bool {
        true
    }
}
