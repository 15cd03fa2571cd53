//! Starts a pair of factors away from zero on both sides, by halves of a random rotation whose product is zero: both factors have gradients
//! from the first step, and the base is left as it is.
//!
//! # Update
//! ```text
//! Q_rr random orthonormal,  E its even rows and D its odd ones (r/2 each)
//! A_ri = c · D^T N_hi        B_or = c · M_oh E        h = r/2
//! B A = c² · M E D^T N = 0,  since rows of Q are orthogonal
//! ```
//!
//! # Symbols
//! `A_ri`, `B_or` the factors, `r` the rank, which is even; `N_hi` and `M_oh` standard normal; `c` is `size`. All in 64 bits, and then
//! 32.
//!
//! # Cost
//! A QR decomposition of an `r` by `r` matrix and two thin products a linear before the first step.
//!
//! # Limits
//! It starts as the base to rounding, 1e-6 of what the linear gives, not bit for bit.
//!
//! # Departures
//! none; PEFT's `init_lora_weights: orthogonal` but for the random numbers. PEFT's A takes the rows from 0 in steps of two, here
//! called D.
//!
//! # Paper
//! none: an idea of D. Datta's, in PEFT; LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., 2021, is what starts.

use attune_points::adapter::{Adapter, Attachment, BaseEdit};
use attune_points::init::Init;
use attune_points::{Error, Locals, Stats, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Point};
use attune_tensor::rng::Rng;
use attune_tensor::{linalg, ops};
use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::factors;
use crate::parts::starts::{self, Start};

/// Parameters of the start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Standard deviation of the numbers of both factors.
    #[schemars(range(min = 1e-6, max = 10.0))]
    size: f64,
}

impl Default for Config {
    /// PEFT's value.
    fn default() -> Self {
        Self { size: 0.1 }
    }
}

pub(super) struct Orthogonal {
    size: f64,
}

impl Method for Orthogonal {
    const CARD: Card = Card::new(
        "orthogonal",
        Point::Init,
        "Starts a pair of factors away from zero on both sides, by halves of a random rotation whose product is zero: both factors have \
         gradients from the first step, and the base is left as it is.",
    );
    type Config = Config;
    type Object = dyn Init;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Init>, Vec<Fault>> {
        Ok(Box::new(Self { size: config.size }))
    }
}

impl Init for Orthogonal {
    fn init(
        &self,
        _: &dyn Adapter,
        at: &Attachment,
        _: &dyn Weight,
        _: &Stats,
        rng: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        let (a, b) = factors::pair(at)?;
        let (rank, input, output) = (a.shape[0], a.shape[1], b.shape[0]);
        if rank % 2 == 1 {
            return Err(Error::Refused(format!(
                "orthogonal starts halves of a rank, and that of {} is {rank}: expected an even one",
                at.site
            )));
        }
        let half = rank / 2;
        let normal = |name: &str, shape: (usize, usize)| rng.named(name).normal_tensor(shape, 1.0, DType::F64);
        let (q_rr, _) = linalg::qr(&normal("rotation", (rank, rank))?)?;
        let rows = |first: usize| -> attune_points::Result<Tensor> {
            let chosen: Vec<Tensor> =
                (first..rank).step_by(2).map(|row| q_rr.narrow(0, row, 1)).collect::<candle_core::Result<_>>()?;
            Ok(Tensor::cat(&chosen, 0)?)
        };
        let (for_a, for_b) = (rows(0)?, rows(1)?);
        let a_ri = (ops::matmul(&for_a.t()?.contiguous()?, &normal(a.local, (half, input))?)? * self.size)?;
        let b_or = (ops::matmul(&normal(b.local, (output, half))?, &for_b)? * self.size)?;
        let (first, second) = (a.local, b.local);
        starts::each(at, rng, |spec| match spec.local {
            local if local == first => Start::Is(a_ri.clone()),
            local if local == second => Start::Is(b_or.clone()),
            _ => Start::Constant(0.0),
        })
    }
}
