//! Starts a pair of factors where the data is: the rows of A are the directions in which the inputs vary most, and B is zero. Training
//! moves at once what makes a difference, and starts as the base.
//!
//! # Update
//! ```text
//! C_ii = Σ_t (x_t - m)(x_t - m)^T,  m the mean        C_ii = Σ_k λ_k v_k v_k^T,  λ descending
//! A_ri = v_1..r        B_or = 0        with `whiten`  A_ri = λ_k^(-1/4) v_k
//! ```
//!
//! # Symbols
//! `A_ri`, `B_or` the factors, `r` the rank; x_t what the linear reads, at the rows that count; λ, v the eigenvalues and eigenvectors of
//! their covariance, in 64 bits.
//!
//! # Cost
//! One pass over `examples` examples, up to the last block with such a linear, and an eigendecomposition of an `i` by `i` matrix for
//! each linear, or with `iterations` some products with thin matrices. While it is measured, four bytes for each number of a
//! covariance; queries, keys and values share one, and so do the halves of a gated MLP.
//!
//! # Limits
//! B = 0, so the component starts as the identity. With r = i, A is a rotation of all inputs.
//!
//! # Departures
//! Every linear keeps its rank: shares of ranks by explained variance (PEFT's `rho` above 1) are a budget of their own
//! (`tune.budget`). The covariance is exact where PEFT's is an incremental one of low rank, which ends when directions settle (`tau`). A row
//! counts if the token after it is learned, where PEFT counts rows that are such tokens themselves (`use_label_mask`). PEFT whitens
//! directions that several linears share once for each of them; here they are whitened once. Else it agrees with PEFT's
//! `init_lora_weights: eva` of `rho` 1, up to the sign of directions.
//!
//! # Paper
//! One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation. Paischer et al., 2024.

use attune_points::adapter::{Adapter, Attachment, BaseEdit};
use attune_points::init::Init;
use attune_points::stats::What;
use attune_points::{Locals, Stats, StatsRequest, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::linalg;
use attune_tensor::rng::Rng;
use candle_core::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::calibration::{self, Rows};
use crate::parts::factors;
use crate::parts::starts::{self, Start};

/// Parameters of the initialisation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How many examples of the training data are looked at, the first ones that are trained on.
    #[schemars(range(min = 1, max = 1_000_000))]
    examples: u64,
    /// Which of their rows count.
    rows: Rows,
    /// Whether directions are shorter the more inputs vary along them.
    whiten: bool,
    /// Rounds of a randomised decomposition, which is faster than the exact one where linears are wide; exact if left out.
    #[schemars(range(min = 1, max = 64))]
    iterations: Option<u32>,
}

impl Default for Config {
    fn default() -> Self {
        Self { examples: 128, rows: Rows::default(), whiten: false, iterations: None }
    }
}

pub(super) struct Eva {
    config: Config,
    request: StatsRequest,
}

impl Method for Eva {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
            authors: "Fabian Paischer, Lukas Hauzenberger, Thomas Schmied, Benedikt Alkin, Marc Peter Deisenroth, Sepp Hochreiter",
            year: 2024,
        }),
        input_statistics: "4*i*(i+3)",
        start_numbers: "33*i*i",
        ..Card::new(
            "eva",
            Point::Init,
            "Starts a pair of factors where the data is: the rows of A are the directions in which the inputs vary most, and B is \
             zero. Training moves at once what makes a difference, and starts as the base.",
        )
    };
    type Config = Config;
    type Object = dyn Init;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Init>, Vec<Fault>> {
        let what = What::InputCovariance { rows: config.rows.counted(), scaled: false };
        let request = StatsRequest { what, examples: config.examples, domains: None };
        Ok(Box::new(Self { config, request }))
    }
}

impl Init for Eva {
    fn calibrate(&self) -> Vec<StatsRequest> {
        vec![self.request.clone()]
    }

    fn init(
        &self,
        _: &dyn Adapter,
        at: &Attachment,
        _: &dyn Weight,
        stats: &Stats,
        rng: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        let (a, _) = factors::pair(at)?;
        let rank = a.shape[0];
        let found = stats.covariance(&self.request, &at.site)?;
        // About the mean there is one direction less than there are rows.
        calibration::enough(found.rows, rank, at.site.as_str())?;
        let c_ii = calibration::centred(found)?;
        let (values, vectors) = match self.config.iterations {
            None => {
                let all = linalg::eigen(&c_ii)?;
                (all.values.narrow(0, 0, rank)?, all.vectors.narrow(0, 0, rank)?)
            }
            Some(rounds) => {
                let some = linalg::randomised_svd(&c_ii, rank, rounds as usize, &mut rng.named("directions"))?;
                (some.s, some.v)
            }
        };
        let a_ri = if self.config.whiten { whitened(&vectors, &values)? } else { vectors };
        starts::each(at, rng, |spec| if spec.local == a.local { Start::Is(a_ri.clone()) } else { Start::Constant(0.0) })
    }
}

/// Directions by the roots of the singular values of the rows that they were found in.
fn whitened(vectors: &Tensor, values: &Tensor) -> attune_points::Result<Tensor> {
    let values: Vec<f64> = values.to_vec1()?;
    // Along a direction in which nothing varies but by rounding, length says nothing: it gets what a millionth of the first has.
    let least = values.first().map_or(0.0, |largest| largest * 1e-12).max(f64::MIN_POSITIVE);
    let factors: Vec<f64> = values.iter().map(|value| value.max(least).powf(-0.25)).collect();
    let rows = factors.len();
    Ok(vectors.broadcast_mul(&Tensor::from_vec(factors, (rows, 1), &Device::Cpu)?)?)
}
