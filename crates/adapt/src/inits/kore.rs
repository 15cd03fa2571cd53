//! Starts a pair of factors in the directions that data leaves unused, and takes what the weight does there out of it: with A as it is,
//! nothing that B learns changes what the linear says of that data.
//!
//! # Update
//! ```text
//! C_ii = Σ_t x_t x_t^T = Σ_k λ_k v_k v_k^T        Û_ir = the r eigenvectors of smallest λ        P = Û Û^T
//! W P = U diag(S) V^T        B_or = U diag(√(S / s))        A_ri = diag(√(S / s)) V^T        W - s B A stays in its place
//! ```
//!
//! # Symbols
//! `A_ri`, `B_or` the factors, `r` the rank, `s` the factor on their product; x_t what the linear reads, at the rows that count; all in
//! 64 bits from C on. A stays as it is (`trains: b`). What is taken out is the same pair, frozen, with the opposite sign: the base
//! itself is left as it is.
//!
//! # Cost
//! `o r` parameters that train. One pass over `examples` examples, up to the last block with such a linear; an eigendecomposition of an
//! `i` by `i` matrix for each linear. While it is measured, four bytes for each number of a covariance; queries, keys and values
//! share one, and so do the halves of a gated MLP. A frozen pair beside the trained one: twice LoRA's products in a step.
//!
//! # Limits
//! It starts as the base. Where the data spans no more than i - r directions, A x_t = 0 on all of it, and its answers stay whatever
//! B becomes; else they move as little as the variance along the smallest directions allows.
//!
//! # Departures
//! The constraint alone: what the paper makes of its training data is for whoever makes the data. The covariance is not damped, which
//! would hide the directions that are looked for.
//!
//! # Paper
//! KORE: Enhancing Knowledge Injection for Large Multimodal Models via Knowledge-Oriented Augmentations and Constraints. Jiang et al.,
//! 2025.

use attune_points::adapter::{Adapter, Attachment, BaseEdit};
use attune_points::init::Init;
use attune_points::stats::What;
use attune_points::{Error, Locals, Stats, StatsRequest, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::linalg::{self, Svd};
use attune_tensor::rng::Rng;
use candle_core::DType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::calibration::{self, Rows};
use crate::parts::factors;

/// Parameters of the initialisation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How many examples of the training data are looked at, the first ones that are trained on.
    #[schemars(range(min = 1, max = 1_000_000))]
    examples: u64,
    /// The domains whose examples are looked at: those whose answers are to stay; all of them if left out.
    domains: Option<Vec<String>>,
    /// Which of their rows count.
    rows: Rows,
}

impl Default for Config {
    fn default() -> Self {
        Self { examples: 256, domains: None, rows: Rows::Tokens }
    }
}

pub(super) struct Kore {
    request: StatsRequest,
}

impl Method for Kore {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "KORE: Enhancing Knowledge Injection for Large Multimodal Models via Knowledge-Oriented Augmentations and \
                    Constraints",
            authors: "Kailin Jiang, Hongbo Jiang, Ning Jiang, et al.",
            year: 2025,
        }),
        input_statistics: "4*i*(i+3)",
        start_numbers: "33*i*i",
        ..Card::new(
            "kore",
            Point::Init,
            "Starts a pair of factors in the directions that data leaves unused, and takes what the weight does there out of it: with \
             A as it is, nothing that B learns changes what the linear says of that data.",
        )
    };
    type Config = Config;
    type Object = dyn Init;

    fn build(config: Config, cx: &BuildCx<'_>) -> Result<Box<dyn Init>, Vec<Fault>> {
        let domains = calibration::domains(config.domains.as_ref(), cx)?;
        let what = What::InputCovariance { rows: config.rows.counted(), scaled: false };
        Ok(Box::new(Self { request: StatsRequest { what, examples: config.examples, domains } }))
    }
}

impl Init for Kore {
    fn calibrate(&self) -> Vec<StatsRequest> {
        vec![self.request.clone()]
    }

    fn takes_out(&self) -> bool {
        true
    }

    fn init(
        &self,
        of: &dyn Adapter,
        at: &Attachment,
        weight: &dyn Weight,
        stats: &Stats,
        _: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        let (a, _) = factors::pair(at)?;
        let (rank, input, scale) = (a.shape[0], a.shape[1], factors::scale(of, at)?);
        if a.train {
            let message =
                format!("A has to stay as it is at {}, or what is learned reaches the data: set `trains: b`", at.site);
            return Err(Error::Refused(message));
        }
        let found = stats.covariance(&self.request, &at.site)?;
        let all = linalg::eigen(&found.sum_ii.to_dtype(DType::F64)?)?;
        let unused_ri = all.vectors.narrow(0, input - rank, rank)?;
        // W P = (W Û) Û^T, whose right vectors are those of the thin matrix, turned back.
        let thin_or = weight.dense(DType::F64)?.matmul(&unused_ri.t()?.contiguous()?)?;
        let Svd { u, s, v } = linalg::svd(&thin_or)?;
        let (a_ri, b_or) = factors::balanced(&Svd { u, s: (s / scale)?, v: v.matmul(&unused_ri.contiguous()?)? })?;
        factors::taken_out(at, &a_ri, &b_or)
    }
}
