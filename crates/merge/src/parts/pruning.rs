//! Entries that are left out before tensors are combined.

use attune_points::Result;
use attune_points::merge::Keeps;

use super::stacked::Stacked;

impl Stacked {
    /// Keeps the share `density` of each tensor's entries, those of largest magnitude; of equal ones those that come first.
    pub(crate) fn keep_largest(&mut self, density: f64) {
        if density >= 1.0 {
            return;
        }
        for numbers in &mut self.numbers {
            let kept = (density * numbers.len() as f64) as usize;
            let mut order: Vec<usize> = (0..numbers.len()).collect();
            let largest = |a: &usize, b: &usize| numbers[*b].abs().total_cmp(&numbers[*a].abs()).then(a.cmp(b));
            if kept > 0 {
                order.select_nth_unstable_by(kept - 1, largest);
            }
            for at in order.into_iter().skip(kept) {
                numbers[at] = 0.0;
            }
        }
    }

    /// Keeps each entry with the probability `density`, as that which it is divided by, so that in the mean nothing changes.
    pub(crate) fn keep_any(&mut self, density: f64, keeps: &mut dyn Keeps) -> Result<()> {
        if density >= 1.0 {
            return Ok(());
        }
        for (of, numbers) in self.numbers.iter_mut().enumerate() {
            let kept = keeps.keep(of, numbers.len(), density)?;
            for (number, kept) in numbers.iter_mut().zip(kept) {
                *number = if kept { *number / density } else { 0.0 };
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use attune_points::merge::Weighted;
    use candle_core::{Device, Tensor};

    use super::*;

    fn kept(numbers: &[f64], density: f64) -> Vec<f64> {
        let tensor = Tensor::new(numbers, &Device::Cpu).unwrap();
        let mut stacked = Stacked::of(&[Weighted { tensor: &tensor, weight: 1.0 }]).unwrap();
        stacked.keep_largest(density);
        stacked.numbers.remove(0)
    }

    #[test]
    fn the_largest_are_kept_and_of_equal_ones_the_first() {
        assert_eq!(kept(&[1.0, -3.0, 2.0, -2.0, 0.5], 0.4), [0.0, -3.0, 2.0, 0.0, 0.0]);
        // A share is rounded down.
        assert_eq!(kept(&[1.0, -3.0, 2.0], 0.99), [0.0, -3.0, 2.0]);
        assert_eq!(kept(&[1.0, -3.0, 2.0], 0.3), [0.0; 3]);
        assert_eq!(kept(&[1.0, -3.0, 2.0], 1.0), [1.0, -3.0, 2.0]);
    }
}
