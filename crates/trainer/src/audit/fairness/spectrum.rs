//! How much of a change of weights few directions hold.

use attune_tensor::linalg;
use candle_core::Tensor;
use serde::Serialize;

/// Squares of the singular values of a change, the largest first.
#[derive(Debug, Clone, PartialEq)]
pub struct Spectrum(Vec<f64>);

/// What is told of the change of one linear.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// The linear.
    pub site: String,
    /// Its norm.
    pub norm: f64,
    /// `Σ σ² / σ₁²`: near the rank where the directions count alike, near 1 where one is all.
    pub stable_rank: f64,
    /// Share of `Σ σ²` in as many of the largest directions as each of the ranks that were asked for.
    pub energy: Vec<f64>,
}

impl Spectrum {
    /// Of a matrix.
    ///
    /// # Errors
    /// Something else than a matrix of finite numbers.
    pub fn of(change_oi: &Tensor) -> candle_core::Result<Self> {
        let values = linalg::svd(change_oi)?.s.to_vec1::<f64>()?;
        Ok(Self(values.into_iter().map(|value| value * value).collect()))
    }

    /// `Σ σ²`.
    pub fn total(&self) -> f64 {
        self.0.iter().sum()
    }

    /// The share of the largest `rank` directions; all of a change that is none.
    pub fn energy(&self, rank: usize) -> f64 {
        let total = self.total();
        if total == 0.0 { 1.0 } else { self.0.iter().take(rank).sum::<f64>() / total }
    }

    /// `Σ σ² / σ₁²`; 0 of no change.
    pub fn stable_rank(&self) -> f64 {
        self.0.first().filter(|first| **first > 0.0).map_or(0.0, |first| self.total() / first)
    }

    /// In words for a report.
    pub fn told(&self, site: &str, ranks: &[usize]) -> Change {
        Change {
            site: site.to_owned(),
            norm: self.total().sqrt(),
            stable_rank: self.stable_rank(),
            energy: ranks.iter().map(|rank| self.energy(*rank)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn shares_are_those_of_known_singular_values() {
        // Singular values 4, 2, 1, turned by nothing that would change them.
        let diagonal =
            Tensor::new(&[[0.0f64, 2.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0; 3]], &Device::Cpu).unwrap();
        let spectrum = Spectrum::of(&diagonal).unwrap();
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        near(spectrum.total(), 21.0);
        near(spectrum.stable_rank(), 21.0 / 16.0);
        near(spectrum.energy(1), 16.0 / 21.0);
        near(spectrum.energy(2), 20.0 / 21.0);
        near(spectrum.energy(9), 1.0);
        let none = Spectrum::of(&Tensor::zeros((2, 3), DType::F64, &Device::Cpu).unwrap()).unwrap();
        assert_eq!((none.energy(0), none.stable_rank()), (1.0, 0.0));
    }
}
