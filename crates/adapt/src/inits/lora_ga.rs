//! Starts a pair of factors with singular vectors of the gradient, which are taken out of the base: the first steps change the weight
//! as full tuning would, as far as the rank allows.
//!
//! # Update
//! ```text
//! G_oi = dL/dW_oi, the mean over the data        G_oi = Σ_k σ_k u_k v_k^T,  σ descending
//! A_ri = c_a v_K^T        B_or = c_b u_L diag(σ_L)        K, L of 1..2r        W - s B A stays in its place
//! `direction`  ArB2r: K = 1..r, L = r+1..2r    A2rBr: the other way round    ArBr: K even, L odd    random: K = L at random
//! `scale`      stable: c_b = o^(1/4) / √gamma    weight_svd: c_b = σ_1(W) / σ of L's first    gd_scale: c_a = c_b = 1/s    unit: 1
//! ```
//!
//! # Symbols
//! `A_ri`, `B_or` the factors, `r` the rank, `s` the factor on their product, L the job's loss; σ, u, v the singular triples of the
//! gradient, in 64 bits. c_a and c_b are 1 where nothing is said. What is taken out is the same pair, frozen, with the opposite sign:
//! the base itself is left as it is.
//!
//! # Cost
//! A forward and a backward pass over `examples` examples, and the gradients of all such linears at once, four bytes for each number
//! of their weights; a singular value decomposition of each, or with `iterations` some products with thin matrices. A frozen pair beside the
//! trained one: twice LoRA's products in a step.
//!
//! # Limits
//! It starts as the base. With vectors of length one on both sides (`unit`, without `by_gradient`) the first step of plain gradient
//! descent changes the weight by the best approximation of the gradient that has rank 2r.
//!
//! # Departures
//! The paper gives all columns of B one length, and A the factor of B; PEFT's are as long as their singular values say
//! (`by_gradient`), and only B has the factor. The defaults are PEFT's (`init_lora_weights: lora_ga`), whose decomposition is a
//! randomised one, and whose gradient is that of a base in training, with its own dropout: here nothing is dropped. The result is
//! written as LoRA of twice the rank.
//!
//! # Paper
//! LoRA-GA: Low-Rank Adaptation with Gradient Approximation. Wang, Yu, Li, 2024.

use attune_points::adapter::{Adapter, Attachment, BaseEdit};
use attune_points::init::Init;
use attune_points::stats::What;
use attune_points::{Error, Locals, Stats, StatsRequest, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::linalg;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::factors;

/// Which singular vectors go where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
enum Direction {
    /// The first r to A, the next r to B.
    #[default]
    ArB2r,
    /// The first r to B, the next r to A.
    A2rBr,
    /// Each second to B, from the first on; the others to A.
    ArBr,
    /// The same r of 2r to both, at random.
    #[serde(rename = "random")]
    Random,
}

/// How long the factors are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Scale {
    /// By the output width, so that what they give does not grow with it.
    #[default]
    Stable,
    /// B as long as the weight's largest singular value.
    WeightSvd,
    /// Without the factor on the product.
    #[serde(rename = "gd_scale")]
    Descent,
    /// As they are.
    Unit,
}

/// Parameters of the initialisation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How many examples of the training data the gradient is taken of, the first ones that are trained on.
    #[schemars(range(min = 1, max = 1_000_000))]
    examples: u64,
    /// Which singular vectors go to A, and which to B.
    direction: Direction,
    /// How long the factors are.
    scale: Scale,
    /// The larger, the shorter B is with `scale: stable`.
    #[schemars(range(min = 1e-3, max = 1e6))]
    gamma: f64,
    /// Whether the columns of B are as long as their singular values say, as PEFT makes them; the paper has them of length one.
    by_gradient: bool,
    /// Rounds of a randomised decomposition, which is faster than the exact one where linears are wide; exact if left out.
    #[schemars(range(min = 1, max = 64))]
    iterations: Option<u32>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            examples: 64,
            direction: Direction::default(),
            scale: Scale::default(),
            gamma: 16.0,
            by_gradient: true,
            iterations: None,
        }
    }
}

pub(super) struct LoraGa {
    config: Config,
    request: StatsRequest,
}

impl Method for LoraGa {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
            authors: "Shaowen Wang, Linxi Yu, Jian Li",
            year: 2024,
        }),
        weight_statistics: "4*i*o",
        start_numbers: "50*o*i",
        ..Card::new(
            "lora-ga",
            Point::Init,
            "Starts a pair of factors with singular vectors of the gradient, which are taken out of the base: the first steps change \
             the weight as full tuning would, as far as the rank allows.",
        )
    };
    type Config = Config;
    type Object = dyn Init;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Init>, Vec<Fault>> {
        let request = StatsRequest { what: What::Gradient, examples: config.examples, domains: None };
        Ok(Box::new(Self { config, request }))
    }
}

impl LoraGa {
    /// The places of the singular vectors that go to A, and to B.
    fn chosen(&self, rank: usize, rng: &mut Rng) -> (Vec<u32>, Vec<u32>) {
        let r = rank as u32;
        let (first, second): (Vec<u32>, Vec<u32>) = ((0..r).collect(), (r..2 * r).collect());
        match self.config.direction {
            Direction::ArB2r => (first, second),
            Direction::A2rBr => (second, first),
            Direction::ArBr => ((0..r).map(|k| 2 * k + 1).collect(), (0..r).map(|k| 2 * k).collect()),
            Direction::Random => {
                let mut left: Vec<u32> = (0..2 * r).collect();
                let drawn: Vec<u32> = (0..r).map(|_| left.swap_remove(rng.below(left.len() as u64) as usize)).collect();
                (drawn.clone(), drawn)
            }
        }
    }
}

impl Init for LoraGa {
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
        let (a, b) = factors::pair(at)?;
        let (rank, output, input, scale) = (a.shape[0], b.shape[0], a.shape[1], factors::scale(of, at)?);
        if 2 * rank > output.min(input) {
            let message = format!(
                "{} is {output} by {input}, and its gradient has {} singular vectors; rank {rank} needs twice as many",
                at.site,
                output.min(input)
            );
            return Err(Error::Refused(message));
        }
        let found = stats.gradient(&self.request, &at.site)?;
        let mean_oi = (found.sum_oi.to_dtype(DType::F64)? / found.denominator)?;
        let triples = match self.config.iterations {
            None => linalg::svd(&mean_oi)?.truncated(2 * rank)?,
            Some(rounds) => linalg::randomised_svd(&mean_oi, 2 * rank, rounds as usize, &mut rng.named("directions"))?,
        };
        let (to_a, to_b) = self.chosen(rank, &mut rng.named("vectors"));
        let place = |places: Vec<u32>| Tensor::new(places, &Device::Cpu);
        let (to_a, to_b) = (place(to_a)?, place(to_b)?);
        let s_r = triples.s.index_select(&to_b, 0)?;
        let (mut a_ri, mut b_or) = (triples.v.index_select(&to_a, 0)?, triples.u.index_select(&to_b, 1)?);
        if self.config.by_gradient {
            b_or = b_or.broadcast_mul(&s_r)?;
        }
        match self.config.scale {
            Scale::Stable => b_or = (b_or * ((output as f64).powf(0.25) / self.config.gamma.sqrt()))?,
            Scale::WeightSvd => {
                let largest: f64 = linalg::svd(&weight.dense(DType::F64)?)?.s.get(0)?.to_scalar()?;
                let own: f64 = if self.config.by_gradient { s_r.get(0)?.to_scalar()? } else { 1.0 };
                if own > 0.0 {
                    b_or = (b_or * (largest / own))?;
                }
            }
            Scale::Descent => (a_ri, b_or) = ((a_ri / scale)?, (b_or / scale)?),
            Scale::Unit => {}
        }
        factors::taken_out(at, &a_ri, &b_or)
    }
}
