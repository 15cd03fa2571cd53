//! Why several sets of weights do not become one.

/// Adapters that cannot be combined as it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The factors of a site have several ranks.
    #[error(
        "ranks are {}, and factors are combined entry by entry: expected one rank, or another space (`concatenated` for sums, \
         `changes` for all)", .ranks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    Ranks {
        /// The ranks, in the order of the adapters.
        ranks: Vec<usize>,
    },
    /// A merge that is no sum, of factors side by side.
    #[error("only sums keep factors side by side, which this merge is not: expected the space `factors` or `changes`")]
    NoSum,
    /// A share of numbers that is none.
    #[error("clamps at the quantile {0}; expected a share of 0 to 1")]
    Clamp(f64),
    /// A rank of nothing.
    #[error("has rank 0; expected 1 or more")]
    NoRank,
    /// Tensors that do not fit.
    #[error(transparent)]
    Tensor(#[from] attune_points::Error),
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Tensor(error.into())
    }
}
