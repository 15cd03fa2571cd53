//! Starts a pair of factors with the first columns of the weight's orthonormal factor and the rows that go with them, which are taken
//! out of it: an orthonormal start at a tenth of the price of singular values.
//!
//! # Update
//! ```text
//! W_oi = Q_ok R_ki        B_or = Q_1..r        A_ri = R_1..r        W_oi - s B A stays in its place
//! ```
//!
//! # Symbols
//! `A_ri`, `B_or` the factors, `r` the rank, `s` the factor on their product; `Q` has orthonormal columns, `R` is triangular with a
//! diagonal that is not negative, in 64 bits. What is taken out is the same pair, frozen, with the opposite sign.
//!
//! # Cost
//! A QR decomposition of each weight before the first step. A frozen pair beside the trained one: twice LoRA's products in a step.
//!
//! # Limits
//! It starts as the base.
//!
//! # Departures
//! The signs of `Q` and `R` are fixed by the diagonal, where PEFT's are its library's; their product is the same. The result is
//! written as LoRA of twice the rank.
//!
//! # Paper
//! OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models. Büyükakyüz, 2024.

use attune_points::adapter::{Adapter, Attachment, BaseEdit};
use attune_points::init::Init;
use attune_points::{Locals, Stats, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::linalg;
use attune_tensor::rng::Rng;
use candle_core::DType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::factors;

/// It has no parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {}

pub(super) struct Olora;

impl Method for Olora {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
            authors: "Kerim Büyükakyüz",
            year: 2024,
        }),
        start_numbers: "33*o*i",
        ..Card::new(
            "olora",
            Point::Init,
            "Starts a pair of factors with the first columns of the weight's orthonormal factor and the rows that go with them, \
             which are taken out of it: an orthonormal start at a tenth of the price of singular values.",
        )
    };
    type Config = Config;
    type Object = dyn Init;

    fn build(_: Config, _: &BuildCx<'_>) -> Result<Box<dyn Init>, Vec<Fault>> {
        Ok(Box::new(Self))
    }
}

impl Init for Olora {
    fn takes_out(&self) -> bool {
        true
    }

    fn init(
        &self,
        of: &dyn Adapter,
        at: &Attachment,
        weight: &dyn Weight,
        _: &Stats,
        _: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        let (a, _) = factors::pair(at)?;
        let rank = a.shape[0];
        // That the component is a product of factors.
        factors::scale(of, at)?;
        let (q_ok, r_ki) = linalg::qr(&weight.dense(DType::F64)?)?;
        factors::taken_out(at, &r_ki.narrow(0, 0, rank)?, &q_ok.narrow(1, 0, rank)?)
    }
}
