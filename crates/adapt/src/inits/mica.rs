//! Starts a pair of factors with the weight's left singular vectors of the smallest values as B, which stays as it is, and A zero: what is
//! learned goes where the base does least; for new knowledge that shall not disturb the old.
//!
//! # Update
//! ```text
//! W_oi = Σ_k σ_k u_k v_k^T,  σ descending        B_or = (u_(m-r+1), …, u_m),  m = min(o, i)        A_ri = 0
//! ```
//!
//! # Symbols
//! `A_ri`, `B_or` the factors, `r` the rank; σ, u, v the singular triples of the weight, in 64 bits.
//!
//! # Cost
//! A singular value decomposition of each weight before the first step.
//!
//! # Limits
//! A = 0, so the component starts as the identity. What it adds stays at right angles to all that the weight's larger singular values give.
//!
//! # Departures
//! none; agrees with PEFT's `init_lora_weights: mica`, under which B is frozen as well: here the component says so itself, by `trains: a`.
//!
//! # Paper
//! MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning. Rüdiger, Raschka, 2026.

use attune_points::adapter::{Adapter, Attachment, BaseEdit};
use attune_points::init::Init;
use attune_points::{Error, Locals, Stats, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::linalg;
use attune_tensor::rng::Rng;
use candle_core::DType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::factors;
use crate::parts::starts::{self, Start};

/// It has no parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {}

pub(super) struct Mica;

impl Method for Mica {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning",
            authors: "Sten Rüdiger, Sebastian Raschka",
            year: 2026,
        }),
        start_numbers: "42*o*i",
        ..Card::new(
            "mica",
            Point::Init,
            "Starts a pair of factors with the weight's left singular vectors of the smallest values as B, which stays as it is, and A \
             zero: what is learned goes where the base does least; for new knowledge that shall not disturb the old.",
        )
    };
    type Config = Config;
    type Object = dyn Init;

    fn build(_: Config, _: &BuildCx<'_>) -> Result<Box<dyn Init>, Vec<Fault>> {
        Ok(Box::new(Self))
    }
}

impl Init for Mica {
    fn init(
        &self,
        _: &dyn Adapter,
        at: &Attachment,
        weight: &dyn Weight,
        _: &Stats,
        rng: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        let (a, b) = factors::pair(at)?;
        if b.train {
            let message = "this initialisation is for a pair whose B stays as it is: expected `trains: a`";
            return Err(Error::Refused(message.to_owned()));
        }
        let (triples, rank) = (linalg::svd(&weight.dense(DType::F64)?)?, a.shape[0]);
        let smallest = triples.triples(triples.s.dim(0)? - rank, rank)?;
        starts::each(
            at,
            rng,
            |spec| {
                if spec.local == b.local { Start::Is(smallest.u.clone()) } else { Start::Constant(0.0) }
            },
        )
    }
}
