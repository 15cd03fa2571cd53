//! Starts a pair of factors with the largest singular values of the weight, which are taken out of it: training begins where a
//! change of the weight matters most, and loses less time than from zero.
//!
//! # Update
//! ```text
//! W_oi = Σ_k σ_k u_k v_k^T,  σ descending        S = σ_1..r / s
//! B_or = U_1..r diag(√S)        A_ri = diag(√S) V_1..r^T        W_oi - s B A stays in its place
//! ```
//!
//! # Symbols
//! `A_ri`, `B_or` the factors, `r` the rank, `s` the factor on their product; σ, u, v the singular triples of the weight, in 64 bits.
//! What is taken out is the same pair, frozen, with the opposite sign: the base itself is left as it is.
//!
//! # Cost
//! A singular value decomposition of each weight before the first step, or with `iterations` some products with thin matrices. A
//! frozen pair beside the trained one: twice LoRA's products in a step.
//!
//! # Limits
//! It starts as the base. With r = min(o, i) all of the weight trains, as a product.
//!
//! # Departures
//! none; agrees with PEFT's `init_lora_weights: pissa` and `pissa_niter_…`. The result is written as LoRA of twice the rank, which any
//! server adds to the unchanged base.
//!
//! # Paper
//! PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models. Meng, Wang, Zhang, 2024.

use attune_points::adapter::{Adapter, Attachment, BaseEdit};
use attune_points::init::Init;
use attune_points::{Locals, Stats, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::linalg::{self, Svd};
use attune_tensor::rng::Rng;
use candle_core::DType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::factors;

/// Parameters of the initialisation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rounds of a randomised decomposition, which is much faster than the exact one and close to it from 4 on; exact if left out.
    #[schemars(range(min = 1, max = 64))]
    iterations: Option<u32>,
}

pub(super) struct Pissa {
    config: Config,
}

impl Method for Pissa {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
            authors: "Fanxu Meng, Zhaohui Wang, Muhan Zhang",
            year: 2024,
        }),
        start_numbers: "38*o*i",
        ..Card::new(
            "pissa",
            Point::Init,
            "Starts a pair of factors with the largest singular values of the weight, which are taken out of it: training begins \
             where a change of the weight matters most, and loses less time than from zero.",
        )
    };
    type Config = Config;
    type Object = dyn Init;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Init>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Init for Pissa {
    fn takes_out(&self) -> bool {
        true
    }

    fn init(
        &self,
        of: &dyn Adapter,
        at: &Attachment,
        weight: &dyn Weight,
        _: &Stats,
        rng: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        let (a, _) = factors::pair(at)?;
        let (rank, scale) = (a.shape[0], factors::scale(of, at)?);
        let w_oi = weight.dense(DType::F64)?;
        let first = match self.config.iterations {
            None => linalg::svd(&w_oi)?.truncated(rank)?,
            Some(rounds) => linalg::randomised_svd(&w_oi, rank, rounds as usize, &mut rng.named("directions"))?,
        };
        let (a_ri, b_or) = factors::balanced(&Svd { s: (first.s / scale)?, ..first })?;
        factors::taken_out(at, &a_ri, &b_or)
    }
}
