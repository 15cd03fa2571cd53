//! Starts a pair of factors with a slice of the weight that data has ordered, which is taken out of it: the part that matters most for
//! the data, to learn it fast, or the part that matters least for data whose knowledge is to be kept.
//!
//! # Update
//! ```text
//! C_ii = 1/N Σ_n X_n^T X_n / max(X_n)²        C' = C + damp · mean(diag C) · 1
//! W C' = U diag(S) V^T,  S descending        V̂^T = V^T C'^-1,  so that W = U diag(S) V̂^T
//! K = 1..r (`ipm`) or the last r (`kpm`)        B_or = U_K diag(√(S_K / s))        A_ri = diag(√(S_K / s)) V̂_K^T
//! W - s B A stays in its place
//! ```
//!
//! # Symbols
//! `A_ri`, `B_or` the factors, `r` the rank, `s` the factor on their product; X_n what the linear reads of document n, max(X_n) its
//! largest number, N the number of documents; all in 64 bits from C on. What is taken out is the same pair, frozen, with the
//! opposite sign: the base itself is left as it is.
//!
//! # Cost
//! One pass over `examples` examples, up to the last block with such a linear; an inverse and a singular value decomposition for
//! each linear, or with `iterations` (`ipm` only) some products with thin matrices. While it is measured, four bytes for each number
//! of a covariance; queries, keys and values share one, and so do the halves of a gated MLP. A frozen pair beside the trained one:
//! twice LoRA's products in a step.
//!
//! # Limits
//! It starts as the base. Where inputs vary alike in all directions, `ipm` takes out what PiSSA does. With r = min(o, i) all of the
//! weight trains, as a product.
//!
//! # Departures
//! The inverse is made in 64 bits, in which the damping that is asked for suffices: PEFT doubles it until the inverse is good in 32
//! bits. The data is the job's own, of all domains or of those that are named. Else as PEFT's `init_lora_weights: corda`; the result
//! is written as LoRA of twice the rank.
//!
//! # Paper
//! CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware Parameter-Efficient Fine-tuning. Yang et
//! al., 2024.

use attune_points::adapter::{Adapter, Attachment, BaseEdit};
use attune_points::init::Init;
use attune_points::stats::What;
use attune_points::{Locals, Stats, StatsRequest, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::linalg::{self, Svd};
use attune_tensor::rng::Rng;
use candle_core::DType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::calibration::{self, Rows};
use crate::parts::factors;

/// Which slice of the weight trains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Mode {
    /// Instruction-previewed: what matters most for the data.
    #[default]
    Ipm,
    /// Knowledge-preserved: what matters least for it.
    Kpm,
}

/// Parameters of the initialisation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Which slice of the weight trains: what matters most for the data (`ipm`), or least (`kpm`), so that what the model knows of it
    /// stays.
    mode: Mode,
    /// How many examples of the training data are looked at, the first ones that are trained on.
    #[schemars(range(min = 1, max = 1_000_000))]
    examples: u64,
    /// The domains whose examples are looked at; all of them if left out.
    domains: Option<Vec<String>>,
    /// Which of their rows count.
    rows: Rows,
    /// What is added to the covariance, in its mean variance.
    #[schemars(range(min = 1e-6, max = 1.0))]
    damp: f64,
    /// Rounds of a randomised decomposition, which is faster than the exact one where linears are wide; exact if left out. `ipm` only.
    #[schemars(range(min = 1, max = 64))]
    iterations: Option<u32>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mode: Mode::Ipm,
            examples: 256,
            domains: None,
            rows: Rows::Tokens,
            damp: calibration::DAMP,
            iterations: None,
        }
    }
}

pub(super) struct Corda {
    config: Config,
    request: StatsRequest,
}

impl Method for Corda {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware Parameter-Efficient \
                    Fine-tuning",
            authors: "Yibo Yang, Xiaojie Li, Zhongzhu Zhou, et al.",
            year: 2024,
        }),
        input_statistics: "4*i*(i+3)",
        start_numbers: "31*i*i",
        ..Card::new(
            "corda",
            Point::Init,
            "Starts a pair of factors with a slice of the weight that data has ordered, which is taken out of it: the part that \
             matters most for the data, to learn it fast, or the part that matters least for data whose knowledge is to be kept.",
        )
    };
    type Config = Config;
    type Object = dyn Init;

    fn build(config: Config, cx: &BuildCx<'_>) -> Result<Box<dyn Init>, Vec<Fault>> {
        let domains = calibration::domains(config.domains.as_ref(), cx)?;
        if config.mode == Mode::Kpm && config.iterations.is_some() {
            let message = "is for the largest values (`mode: ipm`); the smallest (`kpm`) need the exact decomposition";
            return Err(vec![Fault::new("iterations", message)]);
        }
        let what = What::InputCovariance { rows: config.rows.counted(), scaled: true };
        let request = StatsRequest { what, examples: config.examples, domains };
        Ok(Box::new(Self { config, request }))
    }
}

impl Init for Corda {
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
        rng: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        let (a, _) = factors::pair(at)?;
        let (rank, scale) = (a.shape[0], factors::scale(of, at)?);
        let found = stats.covariance(&self.request, &at.site)?;
        let c_ii = calibration::damped(found, self.config.damp)?;
        let ordered_oi = weight.dense(DType::F64)?.matmul(&c_ii)?;
        let slice = match (self.config.mode, self.config.iterations) {
            (Mode::Ipm, Some(rounds)) => {
                linalg::randomised_svd(&ordered_oi, rank, rounds as usize, &mut rng.named("directions"))?
            }
            (Mode::Ipm, None) => linalg::svd(&ordered_oi)?.truncated(rank)?,
            (Mode::Kpm, _) => {
                let all = linalg::svd(&ordered_oi)?;
                all.triples(all.s.elem_count() - rank, rank)?
            }
        };
        let v = slice.v.matmul(&linalg::inverse(&c_ii)?)?;
        let (a_ri, b_or) = factors::balanced(&Svd { u: slice.u, s: (slice.s / scale)?, v })?;
        factors::taken_out(at, &a_ri, &b_or)
    }
}
