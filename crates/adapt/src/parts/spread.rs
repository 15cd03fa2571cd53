//! How far the numbers of the stream are from their mean where it enters attentions, but for the few that are far from all others.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use attune_architecture::SiteId;
use attune_points::engine::{Batch, Engine, Tensors};
use attune_points::{Result, Tap};
use attune_tensor::kernels::Kernels;
use attune_tensor::view::MatRef;
use candle_core::{Device, Tensor};

/// Standard deviations beyond which a number is pulled in, and how often.
const BOUND: f64 = 3.0;
const ROUNDS: usize = 5;

/// The standard deviations at some sites, by those of each micro-batch at the engine's parameters: the mean of their squares, weighed by
/// rows. The same on every rank.
///
/// # Errors
/// Whatever the engine raises.
pub(crate) fn of_stream(engine: &mut dyn Engine, batch: &Batch, sites: &[SiteId]) -> Result<BTreeMap<SiteId, f64>> {
    let theta = engine.theta().clone();
    let mut mine = Vec::with_capacity(batch.parts.len());
    for (part, layout) in &batch.parts {
        let spread = Spread { sites, found: Mutex::default() };
        engine.look(&theta, layout, &spread)?;
        let found = spread.found.into_inner().unwrap_or_else(PoisonError::into_inner);
        let said = found.into_iter().map(|(site, (rows, variance))| {
            Ok((site.to_string(), Tensor::new(&[rows as f64, variance], &Device::Cpu)?))
        });
        mine.push((*part, said.collect::<Result<Tensors>>()?));
    }
    let mut sums: BTreeMap<String, [f64; 2]> = BTreeMap::new();
    for (_, said) in engine.gather(mine)? {
        for (site, numbers) in said {
            let numbers = numbers.to_vec1::<f64>()?;
            let sum = sums.entry(site).or_default();
            sum[0] += numbers[0];
            sum[1] += numbers[0] * numbers[1];
        }
    }
    let spread = |site: &SiteId| {
        let [rows, squares] = sums.get(site.as_str()).copied().unwrap_or_default();
        (site.clone(), if rows > 0.0 { (squares / rows).sqrt() } else { 0.0 })
    };
    Ok(sites.iter().map(spread).collect())
}

/// Looks at the stream at some sites: rows, and the variance of their numbers.
struct Spread<'a> {
    sites: &'a [SiteId],
    found: Mutex<BTreeMap<SiteId, (usize, f64)>>,
}

impl Tap for Spread<'_> {
    fn wants(&self, site: &SiteId) -> bool {
        self.sites.contains(site)
    }

    fn read(&self, site: &SiteId, _: usize, _: Option<&[u32]>, x_td: MatRef<'_>, _: &dyn Kernels) -> Result<()> {
        let rows = x_td.rows();
        let mut numbers = Vec::with_capacity(rows * x_td.cols());
        match x_td {
            MatRef::F32(view) => (0..rows).for_each(|row| numbers.extend_from_slice(view.row(row))),
            MatRef::Bf16(view) => (0..rows).for_each(|row| numbers.extend(view.row(row).iter().map(|x| x.to_f32()))),
        }
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.insert(site.clone(), (rows, clipped(&mut numbers)));
        Ok(())
    }
}

/// The variance of numbers, those beyond three standard deviations of the mean pulled in to there, five times over.
fn clipped(numbers: &mut [f32]) -> f64 {
    for _ in 0..ROUNDS {
        let (mean, variance) = moments(numbers);
        if !variance.is_finite() {
            return variance;
        }
        let reach = BOUND * variance.sqrt();
        let (least, most) = ((mean - reach) as f32, (mean + reach) as f32);
        numbers.iter_mut().for_each(|x| *x = x.clamp(least, most));
    }
    moments(numbers).1
}

/// The mean of numbers, and that of the squares of what they are off it.
pub(crate) fn moments(numbers: &[f32]) -> (f64, f64) {
    let n = numbers.len().max(1) as f64;
    let mean = numbers.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
    (mean, numbers.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / n)
}

#[cfg(test)]
mod tests {
    use attune_tensor::Rng;

    use super::*;

    /// One number of a thousand that is a hundred times as large makes the standard deviation three times what it is without; pulled in
    /// again and again it counts for little.
    #[test]
    fn what_is_far_from_all_others_counts_for_little() {
        let mut rng = Rng::new(1, "numbers");
        let mut numbers: Vec<f32> = (0..1000).map(|_| 2.0 + rng.normal() as f32).collect();
        let plain = moments(&numbers).1.sqrt();
        assert!((plain - 1.0).abs() < 0.1, "{plain}");
        let alone = clipped(&mut numbers.clone()).sqrt();
        assert!((alone - plain).abs() < 0.02, "{alone} of {plain}");
        numbers[17] = 102.0;
        assert!(moments(&numbers).1.sqrt() > 3.0);
        let found = clipped(&mut numbers).sqrt();
        assert!((found - plain).abs() < 0.02, "{found} of {plain}");
    }

    #[test]
    fn numbers_that_are_all_the_same_have_none() {
        assert_eq!(clipped(&mut [5.0; 7]), 0.0);
        assert_eq!(clipped(&mut []), 0.0);
    }
}
