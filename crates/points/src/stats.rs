//! What is measured of a model on data before anything trains: what a component asks for, and what it gets.
//!
//! Nobody who asks runs a model: requests are plain values, one pass answers those of all slots, and what it found is a value as
//! well.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use attune_architecture::SiteId;
use candle_core::Tensor;

use crate::error::{Error, Result};

/// Which rows of a document count where inputs of linears are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Counted {
    /// Every token. Rows that hold no token (those of a prompt that is learned) never count.
    Tokens,
    /// Those whose next token is learned.
    Supervised,
}

/// What is measured at a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum What {
    /// `Σ_t x_t x_tᵀ` over the rows that the site reads, and `Σ_t x_t`.
    InputCovariance {
        /// Which rows count.
        rows: Counted,
        /// Whether the rows of each document are divided by the absolute value of the largest number among those that count.
        scaled: bool,
    },
    /// `Σ_t x_t²`, number by number: the diagonal of the former.
    InputNorms {
        /// Which rows count.
        rows: Counted,
    },
    /// The gradient of the job's loss by the site's weight, summed over what is supervised.
    Gradient,
    /// The squares of the gradients of single examples' losses by the site's weight, summed over examples: the diagonal of the
    /// empirical Fisher information.
    Fisher,
}

impl What {
    /// Whether it is found in reverse passes, from what is learned.
    pub const fn is_of_gradients(self) -> bool {
        matches!(self, Self::Gradient | Self::Fisher)
    }

    /// The word for it in messages and files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::InputCovariance { .. } => "input_covariance",
            Self::InputNorms { .. } => "input_norms",
            Self::Gradient => "gradient",
            Self::Fisher => "fisher",
        }
    }
}

/// What a component wants measured at each of its sites.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StatsRequest {
    /// What.
    pub what: What,
    /// On how many examples of the job's training data, the first ones that the job would train on; on fewer, if a run through the data has fewer. All
    /// documents of an example count.
    pub examples: u64,
    /// Which domains' examples count; those of all domains if `None`.
    pub domains: Option<BTreeSet<u16>>,
}

impl fmt::Display for StatsRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.what {
            What::InputCovariance { rows, scaled } => {
                let scaled = if scaled { " of scaled rows" } else { "" };
                write!(f, "the covariance of inputs{scaled} ({rows:?})")?;
            }
            What::InputNorms { rows } => write!(f, "the norms of inputs ({rows:?})")?,
            What::Gradient => write!(f, "the gradient")?,
            What::Fisher => write!(f, "the Fisher information")?,
        }
        write!(f, " over {} examples", self.examples)?;
        match &self.domains {
            None => Ok(()),
            Some(domains) => write!(f, " of domains {domains:?}"),
        }
    }
}

/// Sums over the rows that a linear read. Sums over micro-batches are made in 64 bits, in the order of the data.
#[derive(Debug, Clone)]
pub struct Covariance {
    /// `Σ_t x_t x_tᵀ`, `[i, i]` in f32.
    pub sum_ii: Tensor,
    /// `Σ_t x_t`, `[i]` in f64.
    pub sum_i: Tensor,
    /// How many rows counted.
    pub rows: u64,
    /// How many documents had a row that counted.
    pub documents: u64,
}

/// Sums of squares over the rows that a linear read.
#[derive(Debug, Clone)]
pub struct Norms {
    /// `Σ_t x_t²`, `[i]` in f64.
    pub sum_i: Tensor,
    /// How many rows counted.
    pub rows: u64,
    /// How many documents had a row that counted.
    pub documents: u64,
}

/// A gradient of the sum of losses.
#[derive(Debug, Clone)]
pub struct Gradient {
    /// `Σ dL/dW_oi`, `[o, i]` in f32.
    pub sum_oi: Tensor,
    /// What the loss is divided by over the same data: `sum_oi` over this is the gradient of the mean loss.
    pub denominator: f64,
}

/// Squares of gradients of single examples.
#[derive(Debug, Clone)]
pub struct Fisher {
    /// `Σ_e (dL_e/dW_oi)²`, `[o, i]` in f32, `L_e` the sum of the losses of an example's documents.
    pub sum_oi: Tensor,
    /// How many examples there were.
    pub examples: u64,
}

/// What an attention made of a text that went through the model alone.
#[derive(Debug, Clone)]
pub struct KeysValues {
    /// Keys `[T, k]` in f32, as queries are compared with them: turned by their positions where these are.
    pub keys_tk: Tensor,
    /// Values `[T, k]` in f32.
    pub values_tk: Tensor,
}

/// One statistic.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Stat {
    /// An answer to [`What::InputCovariance`].
    Covariance(Covariance),
    /// An answer to [`What::InputNorms`].
    Norms(Norms),
    /// An answer to [`What::Gradient`].
    Gradient(Gradient),
    /// An answer to [`What::Fisher`].
    Fisher(Fisher),
}

/// Statistics by request and site. Sites that read the same rows share a tensor.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    found: BTreeMap<(StatsRequest, SiteId), Stat>,
    /// By the tokens of texts, attention by attention.
    texts: BTreeMap<Vec<u32>, BTreeMap<SiteId, KeysValues>>,
}

impl Stats {
    /// None: for those who ask for nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// Adds a statistic.
    pub fn insert(&mut self, request: StatsRequest, site: SiteId, stat: Stat) {
        self.found.insert((request, site), stat);
    }

    /// Adds all of others.
    pub fn extend(&mut self, others: Self) {
        self.found.extend(others.found);
        for (tokens, sites) in others.texts {
            self.texts.entry(tokens).or_default().extend(sites);
        }
    }

    /// Adds what an attention made of a text.
    pub fn insert_text(&mut self, tokens: &[u32], site: SiteId, made: KeysValues) {
        self.texts.entry(tokens.to_vec()).or_default().insert(site, made);
    }

    /// What an attention made of a text.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] with the site.
    pub fn of_text(&self, tokens: &[u32], site: &SiteId) -> Result<&KeysValues> {
        let found = self.texts.get(tokens).and_then(|sites| sites.get(site));
        found.ok_or_else(|| {
            let what = format!("what an attention makes of a text of {} tokens", tokens.len());
            Error::NotMeasured { what, site: site.clone() }
        })
    }

    /// All statistics of data, request by request, in the order of the sites.
    pub fn iter(&self) -> impl Iterator<Item = (&StatsRequest, &SiteId, &Stat)> {
        self.found.iter().map(|((request, site), stat)| (request, site, stat))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty() && self.texts.is_empty()
    }

    /// What was measured at a site; none if nobody asked for it.
    pub fn get(&self, request: &StatsRequest, site: &SiteId) -> Option<&Stat> {
        self.found.get(&(request.clone(), site.clone()))
    }

    /// The covariance of a site's inputs.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] with the site and what was asked for; [`Error::Refused`] if no row counted there.
    pub fn covariance(&self, request: &StatsRequest, site: &SiteId) -> Result<&Covariance> {
        match self.get(request, site) {
            Some(Stat::Covariance(found)) if found.rows > 0 => Ok(found),
            Some(Stat::Covariance(_)) => Err(nothing_counted(request, site)),
            _ => Err(not_measured(request, site)),
        }
    }

    /// The squared norms of a site's inputs.
    ///
    /// # Errors
    /// As for [`Stats::covariance`].
    pub fn norms(&self, request: &StatsRequest, site: &SiteId) -> Result<&Norms> {
        match self.get(request, site) {
            Some(Stat::Norms(found)) if found.rows > 0 => Ok(found),
            Some(Stat::Norms(_)) => Err(nothing_counted(request, site)),
            _ => Err(not_measured(request, site)),
        }
    }

    /// The gradient by a site's weight.
    ///
    /// # Errors
    /// As for [`Stats::covariance`].
    pub fn gradient(&self, request: &StatsRequest, site: &SiteId) -> Result<&Gradient> {
        match self.get(request, site) {
            Some(Stat::Gradient(found)) => Ok(found),
            _ => Err(not_measured(request, site)),
        }
    }

    /// The squared gradients by a site's weight.
    ///
    /// # Errors
    /// As for [`Stats::covariance`].
    pub fn fisher(&self, request: &StatsRequest, site: &SiteId) -> Result<&Fisher> {
        match self.get(request, site) {
            Some(Stat::Fisher(found)) if found.examples > 0 => Ok(found),
            Some(Stat::Fisher(_)) => Err(nothing_counted(request, site)),
            _ => Err(not_measured(request, site)),
        }
    }
}

fn not_measured(request: &StatsRequest, site: &SiteId) -> Error {
    Error::NotMeasured { what: request.to_string(), site: site.clone() }
}

fn nothing_counted(request: &StatsRequest, site: &SiteId) -> Error {
    Error::Refused(format!("no row of the data counted for {request} at {site}"))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_site() {
        let request = StatsRequest { what: What::Gradient, examples: 8, domains: None };
        let site = SiteId::from("model.layers.0.mlp.up_proj");
        let mut stats = Stats::none();
        let error = stats.gradient(&request, &site).unwrap_err().to_string();
        assert_eq!(error, "the gradient over 8 examples was not measured at model.layers.0.mlp.up_proj");
        let sum_oi = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        stats.insert(request.clone(), site.clone(), Stat::Gradient(Gradient { sum_oi, denominator: 2.0 }));
        assert!(stats.gradient(&request, &site).is_ok());
        assert!(stats.norms(&request, &site).is_err(), "of another kind");
        let more = StatsRequest { examples: 9, ..request };
        assert!(stats.gradient(&more, &site).is_err(), "over other data");
    }

    #[test]
    fn a_covariance_of_no_rows_is_none() {
        let what = What::InputCovariance { rows: Counted::Supervised, scaled: false };
        let request = StatsRequest { what, examples: 8, domains: Some(BTreeSet::from([1])) };
        let site = SiteId::from("q_proj");
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
        let (sum_ii, sum_i) = (zeros(&[2, 2], DType::F32), zeros(&[2], DType::F64));
        let mut stats = Stats::none();
        stats.insert(
            request.clone(),
            site.clone(),
            Stat::Covariance(Covariance { sum_ii, sum_i, rows: 0, documents: 0 }),
        );
        let error = stats.covariance(&request, &site).unwrap_err().to_string();
        assert_eq!(
            error,
            "no row of the data counted for the covariance of inputs (Supervised) over 8 examples of domains {1} at q_proj"
        );
    }
}
