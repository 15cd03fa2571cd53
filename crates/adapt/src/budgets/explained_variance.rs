//! Gives more rank to the linears whose inputs vary in few directions, a larger share of it along each, before anything trains: beside
//! `init: {method: eva}`, which starts along these directions.
//!
//! # Update
//! ```text
//! C_ii = Σ_t (x_t - m)(x_t - m)^T = Σ_k λ_k v_k v_k^T       λ descending, m the mean
//! e_k  = λ_k / Σ_k λ_k                                      the share of direction k, of each linear
//! r    = how many of a linear's e are among the R largest of all linears           R = N rank, least <= r <= rho rank
//! ```
//!
//! # Symbols
//! `x_t` what the linear reads, at the rows that count; N the linears of the slot, `rank` the slot's own. The first `least` directions of
//! each linear come before all others, so that all train. Of equal shares that of the earlier direction comes first, then that of the
//! linear whose name does.
//!
//! # Cost
//! One pass over `examples` examples, up to the last block with such a linear, and an eigendecomposition of an `i` by `i` matrix for each
//! of its inputs; with `init: {method: eva}` on as many examples of the same rows they are measured once for both. While it is measured,
//! four bytes for each number of a covariance: queries, keys and values have one between them, and so do the halves of a gated MLP. What
//! trains has N `rank` ranks as without it. A forecast counts `rank` everywhere.
//!
//! # Limits
//! With `rho` 1 all linears have `rank`. Linears that read the same rows have ranks that differ by one at most.
//!
//! # Departures
//! PEFT leaves out linears none of whose directions is among the largest; here each keeps `least`, 1 or more. Of linears that read the same
//! rows it gives most to the one that comes first. The factor on products is `alpha / rank` everywhere, as with PEFT's
//! `adjust_scaling_factors`.
//!
//! # Paper
//! One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation. Paischer et al., 2024.

use std::cmp::Ordering;

use attune_points::adapter::{Attachment, WeightOf};
use attune_points::budget::{Budget, Share};
use attune_points::stats::What;
use attune_points::{Error, Result, Stats, StatsRequest};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::linalg;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::calibration::{self, Rows};

/// Parameters of the budget.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How many examples of the training data are looked at, the first ones that are trained on.
    #[schemars(range(min = 1, max = 1_000_000))]
    examples: u64,
    /// Which of their rows count.
    rows: Rows,
    /// How many times the slot's rank a linear can have.
    #[schemars(range(min = 1.0, max = 1000.0))]
    rho: f64,
    /// The least rank of a linear.
    #[schemars(range(min = 1, max = 4096))]
    least: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self { examples: 128, rows: Rows::default(), rho: 2.0, least: 1 }
    }
}

pub(super) struct ExplainedVariance {
    config: Config,
    request: StatsRequest,
}

impl Method for ExplainedVariance {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
            authors: "Fabian Paischer, Lukas Hauzenberger, Thomas Schmied, Benedikt Alkin, Marc Peter Deisenroth, Sepp Hochreiter",
            year: 2024,
        }),
        input_statistics: "4*i*(i+3)",
        ..Card::new(
            "explained-variance",
            Point::Budget,
            "Gives more rank to the linears whose inputs vary in few directions, a larger share of it along each, before anything \
             trains: beside `init: {method: eva}`, which starts along these directions.",
        )
    };
    type Config = Config;
    type Object = dyn Budget;

    fn build(config: Config, _: &BuildCx<'_>) -> std::result::Result<Box<dyn Budget>, Vec<Fault>> {
        let what = What::InputCovariance { rows: config.rows.counted(), scaled: false };
        let request = StatsRequest { what, examples: config.examples, domains: None };
        Ok(Box::new(Self { config, request }))
    }
}

impl Budget for ExplainedVariance {
    fn calibrate(&self) -> Vec<StatsRequest> {
        vec![self.request.clone()]
    }

    fn share(&self, mean: u32, at: &[Attachment], weight: &WeightOf<'_, '_>, stats: &Stats) -> Result<Vec<Share>> {
        let least = self.config.least;
        let most = (f64::from(mean) * self.config.rho).round() as u32;
        if mean < least {
            let message = format!("ranks are {mean} on average; expected at least `least`, {least}");
            return Err(Error::Refused(message));
        }
        let shares = self.shares(at, stats)?;
        let mut ranks = vec![0u32; at.len()];
        let mut candidates = Vec::new();
        for (index, (at, shares)) in at.iter().zip(&shares).enumerate() {
            let (o, i) = weight(at)?.shape();
            let name = at.site.as_str();
            if o.min(i) < mean as usize {
                return Err(Error::Refused(format!("rank {mean} is beyond what {name}, {o} by {i}, can have")));
            }
            ranks[index] = least;
            let beyond = shares.iter().enumerate().take(o.min(i).min(most as usize)).skip(least as usize);
            candidates.extend(beyond.map(|(direction, share)| (*share, direction, name, index)));
        }
        let order = |a: &(f64, usize, &str, usize), b: &(f64, usize, &str, usize)| -> Ordering {
            b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)).then_with(|| a.2.cmp(b.2))
        };
        candidates.sort_unstable_by(order);
        // Each linear has room for the mean, so that all of them is enough.
        for (.., index) in candidates.into_iter().take((mean - least) as usize * at.len()) {
            ranks[index] += 1;
        }
        let share = |(rank, shares): (u32, &Vec<f64>)| {
            let explained = shares.iter().take(rank as usize).sum();
            Share { rank, scores: vec![("explained_variance", explained)] }
        };
        Ok(ranks.into_iter().zip(&shares).map(share).collect())
    }
}

impl ExplainedVariance {
    /// The shares of directions of each linear, the largest first. Linears that read the same rows have them between them.
    fn shares(&self, at: &[Attachment], stats: &Stats) -> Result<Vec<Vec<f64>>> {
        let found = at.iter().map(|at| stats.covariance(&self.request, &at.site)).collect::<Result<Vec<_>>>()?;
        calibration::once_for_each(
            &found,
            |found| found.sum_ii.id(),
            |found| {
                let values: Vec<f64> = linalg::eigen(&calibration::centred(found)?)?.values.to_vec1()?;
                let all: f64 = values.iter().filter(|value| **value > 0.0).sum();
                // What does not vary at all has no direction before another.
                let share = |value: f64| if all > 0.0 { value.max(0.0) / all } else { 0.0 };
                Ok(values.into_iter().map(share).collect())
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use attune_architecture::SiteId;
    use attune_points::stats::{Covariance, Stat};
    use attune_points::{TensorSpec, Weight};
    use candle_core::{DType, Device, Tensor};

    use super::*;

    /// Linears of 12 outputs whose inputs vary along the axes by these variances, on average by 0.
    fn ranks(mean: u32, config: Config, variances: &[(&str, Vec<f64>)]) -> Result<Vec<u32>> {
        let cx = BuildCx { steps: attune_spec::id::Step(1), domains: &[], words: None };
        let budget = ExplainedVariance::build(config, &cx).unwrap();
        let (mut stats, mut weights, mut at) = (Stats::none(), BTreeMap::new(), Vec::new());
        for (name, variances) in variances {
            let i = variances.len();
            let rows: Vec<f64> = (0..i * i).map(|at| if at % (i + 1) == 0 { variances[at / i] } else { 0.0 }).collect();
            let sum_ii = Tensor::from_vec(rows, (i, i), &Device::Cpu)?.to_dtype(DType::F32)?;
            let sum_i = Tensor::zeros(i, DType::F64, &Device::Cpu)?;
            let site = SiteId::new(*name);
            let covariance = Covariance { sum_ii, sum_i, rows: 100, documents: 1 };
            stats.insert(budget.calibrate().remove(0), site.clone(), Stat::Covariance(covariance));
            weights.insert(site.clone(), Tensor::zeros((12, i), DType::F32, &Device::Cpu)?);
            at.push(Attachment { site, tensors: vec![TensorSpec::trained("a", [mean as usize, i])] });
        }
        let weight = |at: &Attachment| Ok(Box::new(weights[&at.site].clone()) as Box<dyn Weight>);
        Ok(budget.share(mean, &at, &weight, &stats)?.into_iter().map(|share| share.rank).collect())
    }

    /// One direction has nearly everything; all have the same.
    fn unlike() -> Vec<(&'static str, Vec<f64>)> {
        let narrow = |n: usize| [vec![8.0; n], vec![0.01; 10 - n]].concat();
        vec![("a", narrow(1)), ("b", narrow(3)), ("c", narrow(5)), ("d", vec![1.0; 10])]
    }

    #[test]
    fn the_directions_with_the_largest_shares_of_all_linears_are_taken() {
        // One of 1, three of a third, five of a fifth; what is left goes to the tenths of the last.
        assert_eq!(ranks(3, Config::default(), &unlike()).unwrap(), [1, 3, 5, 3]);
        // Whatever the size of inputs is.
        let larger = |(at, (name, variances)): (usize, (&'static str, Vec<f64>))| {
            (name, variances.into_iter().map(|v| v * 10f64.powi(at as i32)).collect())
        };
        let scaled: Vec<_> = unlike().into_iter().enumerate().map(larger).collect();
        assert_eq!(ranks(3, Config::default(), &scaled).unwrap(), [1, 3, 5, 3]);
        let turned: Vec<_> = unlike().into_iter().rev().collect();
        assert_eq!(ranks(3, Config::default(), &turned).unwrap(), [3, 5, 3, 1]);
    }

    #[test]
    fn ranks_add_up_and_stay_within_their_bounds() {
        for mean in 1..=10 {
            for rho in [1.0, 1.5, 2.0, 1000.0] {
                for least in (1..=mean).take(3) {
                    let ranks = ranks(mean, Config { rho, least, ..Config::default() }, &unlike()).unwrap();
                    assert_eq!(ranks.iter().sum::<u32>(), 4 * mean, "{ranks:?}");
                    let most = ((f64::from(mean) * rho).round() as u32).min(10);
                    assert!(ranks.iter().all(|rank| (least..=most).contains(rank)), "{ranks:?}");
                }
            }
        }
        assert_eq!(ranks(4, Config { rho: 1.0, ..Config::default() }, &unlike()).unwrap(), [4; 4]);
    }

    #[test]
    fn equal_shares_go_by_direction_and_then_by_name() {
        let alike: Vec<_> = ["a", "b", "c"].map(|name| (name, vec![1.0; 6])).into();
        assert_eq!(ranks(2, Config::default(), &alike).unwrap(), [2; 3]);
        let still: Vec<_> = ["a", "b"].map(|name| (name, vec![0.0; 6])).into();
        assert_eq!(ranks(3, Config::default(), &still).unwrap(), [3; 2], "nothing varies");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let error = ranks(2, Config { least: 3, ..Config::default() }, &unlike()).unwrap_err().to_string();
        assert!(error.contains("ranks are 2 on average; expected at least `least`, 3"), "{error}");
        let error = ranks(11, Config::default(), &unlike()).unwrap_err().to_string();
        assert!(error.contains("rank 11 is beyond what a, 12 by 10, can have"), "{error}");
    }
}
