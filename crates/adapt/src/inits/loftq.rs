//! Starts a pair of factors with what few bits lose of the weight: the weight and the pair together begin nearer to the weight as it was
//! than few bits alone, the more so the fewer they are.
//!
//! # Update
//! ```text
//! P_0 = 0        Q_t = q(W_oi - P_{t-1})        Σ_k σ_k u_k v_k^T = W - Q_t,  σ descending        S = σ_1..r / s
//! B = U_1..r diag(√S)        A = diag(√S) V_1..r^T        P_t = s B A        t = 1..T
//! ```
//! The base is Q_T, the pair is that of P_T.
//!
//! # Symbols
//! `A_ri`, `B_or` the factors, `r` the rank, `s` the factor on their product, `T` the rounds; W the weight before it was quantised, as it
//! is in the type of products; q quantises and widens again, in the job's own format. Singular triples are in 64 bits.
//!
//! # Cost
//! T singular value decompositions of each weight before the first step. From the second round on the weights in few bits are the job's
//! own: no other job shares them, and a copy of them is made.
//!
//! # Limits
//! A weight that few bits lose nothing of starts as with zeros. An objective's reference is the base in few bits, without the pair. With r = min(o, i) it starts as the weight before it was quantised.
//!
//! # Departures
//! Agrees with PEFT's `loftq_init` (`num_bits: 4`) for a factor of 1; PEFT leaves the factor out, which then scales what makes up for the
//! loss. With one round the adapter is PEFT's on a base that bitsandbytes quantised. With more, whoever reads it has to make Q_T:
//! P_{T-1} stands in files beside the adapter's; PEFT keeps a second base.
//!
//! # Paper
//! LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models. Li, Yu, Liang, He, Karampatziakis, Chen, Zhao, 2023.

use attune_points::adapter::{Adapter, Attachment, BaseEdit};
use attune_points::init::Init;
use attune_points::weight::Unquantized;
use attune_points::{Error, Locals, Stats, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::linalg::{self, Svd};
use attune_tensor::rng::Rng;
use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::factors;

/// Parameters of the initialisation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rounds of quantising and decomposing; from two on the base in few bits is the job's own.
    #[schemars(range(min = 1, max = 64))]
    iterations: u32,
}

impl Default for Config {
    /// As in PEFT: one, which leaves the base as everybody has it.
    fn default() -> Self {
        Self { iterations: 1 }
    }
}

pub(super) struct Loftq {
    config: Config,
}

impl Method for Loftq {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
            authors: "Yixiao Li, Yifan Yu, Chen Liang, Pengcheng He, Nikos Karampatziakis, Weizhu Chen, Tuo Zhao",
            year: 2023,
        }),
        moves: Some("it starts nearer to what the base was before it was held in few bits"),
        needs_quantization: true,
        own_base: "iterations > 1",
        ..Card::new(
            "loftq",
            Point::Init,
            "Starts a pair of factors with what few bits lose of the weight: the weight and the pair together begin nearer to the \
             weight as it was than few bits alone, the more so the fewer they are.",
        )
    };
    type Config = Config;
    type Object = dyn Init;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Init>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Init for Loftq {
    fn requantizes(&self) -> bool {
        self.config.iterations > 1
    }

    fn init(
        &self,
        of: &dyn Adapter,
        at: &Attachment,
        weight: &dyn Weight,
        _: &Stats,
        _: &mut Rng,
    ) -> attune_points::Result<(Locals, BaseEdit)> {
        let (a, b) = factors::pair(at)?;
        let (rank, scale) = (a.shape[0], factors::scale(of, at)?);
        let before = weight.unquantized().ok_or_else(|| {
            let message = format!(
                "{} is not held in few bits, so there is nothing to make up for; expected linears of attentions or MLPs",
                at.site
            );
            Error::Refused(message)
        })?;
        let w_oi = before.weight.dense(before.dtype)?.to_dtype(DType::F64)?;
        let pair = |(a_ri, b_or): (Tensor, Tensor)| Locals::new(at.site.as_str(), [(a.local, a_ri), (b.local, b_or)]);
        let mut taken: Option<(Tensor, Tensor)> = None;
        for _ in 1..self.config.iterations {
            taken = Some(lost(&w_oi, &few(weight, &before, taken.as_ref(), scale)?, rank, scale)?);
        }
        let start = pair(lost(&w_oi, &few(weight, &before, taken.as_ref(), scale)?, rank, scale)?);
        Ok((start, taken.map_or(BaseEdit::None, |taken| BaseEdit::Requantized(pair(taken)))))
    }
}

/// The weight in few bits, less a product first, in 64 bits.
fn few(
    weight: &dyn Weight,
    before: &Unquantized<'_>,
    taken: Option<&(Tensor, Tensor)>,
    scale: f64,
) -> attune_points::Result<Tensor> {
    match taken {
        None => weight.dense(DType::F64),
        Some((a_ri, b_or)) => {
            let few = before.without(b_or, a_ri, scale)?;
            Ok(few.rows(0..few.shape().0, DType::F64)?)
        }
    }
}

/// The pair whose product, times the factor, is nearest to what is lost.
fn lost(w_oi: &Tensor, q_oi: &Tensor, rank: usize, scale: f64) -> attune_points::Result<(Tensor, Tensor)> {
    let first = linalg::svd(&(w_oi - q_oi)?)?.truncated(rank)?;
    let (a_ri, b_or) = factors::balanced(&Svd { s: (first.s / scale)?, ..first })?;
    Ok((a_ri.to_dtype(DType::F32)?.contiguous()?, b_or.to_dtype(DType::F32)?.contiguous()?))
}
