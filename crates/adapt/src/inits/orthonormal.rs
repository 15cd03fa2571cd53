//! Starts a pair of factors with random rows of A that are orthonormal, and B zero: what a factor A that stays as it is should be.
//!
//! # Update
//! ```text
//! A_ri A_ri^T = 1        B_or = 0
//! ```
//!
//! # Symbols
//! `A_ri`, `B_or` the factors, `r` the rank; the rows of A are those of the orthonormal factor of a random normal matrix.
//!
//! # Cost
//! A QR decomposition of an `i` by `r` matrix a linear before the first step.
//!
//! # Limits
//! B = 0, so the component starts as the identity.
//!
//! # Departures
//! The authors take the right singular vectors of a random uniform matrix; both are random rotations.
//!
//! # Paper
//! Asymmetry in Low-Rank Adapters of Foundation Models. Zhu et al., 2024.

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
use crate::parts::starts::{self, Start};

/// It has no parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {}

pub(super) struct Orthonormal;

impl Method for Orthonormal {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "Asymmetry in Low-Rank Adapters of Foundation Models",
            authors: "Jiacheng Zhu, Kristjan Greenewald, Kimia Nadjahi, et al.",
            year: 2024,
        }),
        ..Card::new(
            "orthonormal",
            Point::Init,
            "Starts a pair of factors with random rows of A that are orthonormal, and B zero: what a factor A that stays as it is \
             should be.",
        )
    };
    type Config = Config;
    type Object = dyn Init;

    fn build(_: Config, _: &BuildCx<'_>) -> Result<Box<dyn Init>, Vec<Fault>> {
        Ok(Box::new(Self))
    }
}

impl Init for Orthonormal {
    fn init(
        &self,
        _: &dyn Adapter,
        at: &Attachment,
        _: &dyn Weight,
        _: &Stats,
        rng: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        let (a, _) = factors::pair(at)?;
        let random_ir = rng.named(a.local).normal_tensor((a.shape[1], a.shape[0]), 1.0, DType::F64)?;
        let (q_ir, _) = linalg::qr(&random_ir)?;
        let a_ri = q_ir.t()?.contiguous()?;
        starts::each(at, rng, |spec| if spec.local == a.local { Start::Is(a_ri.clone()) } else { Start::Constant(0.0) })
    }
}
