//! Negative log-likelihoods of labels under rows of logits, and their gradients in place.
//!
//! # Numerics
//! One pass takes, piece by piece, the largest logit `m` and `z = Σ e^(x - m)`, rescaling `z` when a piece raises `m`; then
//! `nll = (m - x_label) + log z`. A second pass writes `weight (e^(x - m) / z - [label])`.
#![expect(unsafe_code, reason = "tasks write disjoint rows of one view")]

use half::bf16;

use super::exponent::exp;
use super::map::{Formula, highest, narrow, sums, update};
use super::rows::{Shared, for_tasks};
use crate::kernels::cpu::Cpu;
use crate::kernels::simd::{Body, Simd};
use crate::view::ViewMut;

/// Logits whose maximum is taken at a time: what stays in the first cache.
const PIECE: usize = 2048;

/// See [`crate::kernels::Kernels::cross_entropy`].
pub(super) fn cross_entropy(
    cpu: &Cpu,
    logits_cv: ViewMut<'_, f32>,
    labels_c: &[u32],
    weight_c: Option<&[f32]>,
    rounded: Option<ViewMut<'_, bf16>>,
    nll_c: &mut [f32],
) {
    let (rows, vocab) = (logits_cv.rows(), logits_cv.cols());
    assert_eq!((labels_c.len(), nll_c.len()), (rows, rows), "rows of labels and results");
    assert!(weight_c.is_none_or(|weight_c| weight_c.len() == rows), "rows of weights");
    assert!(labels_c.iter().all(|label| (*label as usize) < vocab), "a label of {vocab} or more");
    if let Some(rounded) = &rounded {
        assert_eq!((rounded.rows(), rounded.cols()), (rows, vocab), "shape of the rounded gradient");
    }
    let (logits, rounded) = (Shared::new(logits_cv), rounded.map(Shared::new));
    let nll = Shared::new(ViewMut::new(nll_c, rows, 1));
    for_tasks(rows, rows * vocab >= 1 << 15, |row| {
        // SAFETY: a task has its row to itself.
        let (logits, rounded, nll) = unsafe {
            (
                logits.row(row, 0..vocab),
                rounded.as_ref().map(|rounded| rounded.row(row, 0..vocab)),
                &mut nll.row(row, 0..1)[0],
            )
        };
        *nll = cpu.call_f32(Likelihood {
            logits,
            label: labels_c[row] as usize,
            weight: weight_c.map(|weight_c| weight_c[row]),
            rounded,
        });
    });
}

/// `factor e^(x - max)`, of an input or of what is there.
struct Exponential {
    max: f32,
    factor: f32,
}

impl Formula<1, 1> for Exponential {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x]: [S::F; 1], _: [S::F; 1]) -> [S::F; 1] {
        [s.mul(exp(s, s.sub(x, s.splat(self.max))), s.splat(self.factor))]
    }
}

impl Formula<0, 1> for Exponential {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, []: [S::F; 0], x: [S::F; 1]) -> [S::F; 1] {
        Formula::<1, 1>::at(self, s, x, x)
    }
}

/// One row.
struct Likelihood<'a> {
    logits: &'a mut [f32],
    label: usize,
    weight: Option<f32>,
    rounded: Option<&'a mut [bf16]>,
}

impl Body for Likelihood<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (max, total) = log_sum(s, self.logits);
        let nll = (max - self.logits[self.label]) + total.ln();
        let Some(weight) = self.weight else { return nll };
        let probability = Exponential { max, factor: weight / total };
        let [label] = probability.at(s, [s.splat(self.logits[self.label])], [s.zero(); 1]);
        let at_label = s.reduce_max(label) - weight;
        match self.rounded {
            None => {
                update(s, [], [&mut *self.logits], &probability);
                self.logits[self.label] = at_label;
            }
            Some(rounded) => {
                narrow(s, self.logits, rounded, &probability);
                rounded[self.label] = bf16::from_f32(at_label);
            }
        }
        nll
    }
}

/// The largest number, and the sum of `e^(x - max)`.
#[inline(always)]
fn log_sum<S: Simd>(s: S, x: &[f32]) -> (f32, f32) {
    let (mut max, mut total) = (f32::NEG_INFINITY, 0.0f32);
    for piece in x.chunks(PIECE) {
        let highest = highest(s, piece);
        if highest > max {
            // The first piece finds nothing to rescale.
            total *= (max - highest).exp();
            max = highest;
        }
        if max > f32::NEG_INFINITY {
            total += sums(s, [piece], [f32::NEG_INFINITY], &Exponential { max, factor: 1.0 })[0];
        }
    }
    (max, total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;
    use crate::kernels::cpu::Cpu;
    use crate::kernels::cpu::checks::*;

    /// The negative log-likelihood in f64.
    fn reference(x: &[f64], label: usize) -> f64 {
        let max = x.iter().fold(f64::NEG_INFINITY, |max, x| max.max(*x));
        max - x[label] + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
    }

    /// Its gradient.
    fn gradient(x: &[f64], label: usize) -> Vec<f64> {
        let nll = reference(x, label);
        let of = |(at, value): (usize, &f64)| (value - x[label] - nll).exp() - f64::from(at == label);
        x.iter().enumerate().map(of).collect()
    }

    /// Rows of logits; the seventh of each eight is what a mask makes.
    fn logits(rows: usize, vocab: usize, spread: f32) -> Vec<f32> {
        let mut x = normal("logits", rows * vocab);
        for (at, x) in x.iter_mut().enumerate() {
            *x = if at % 8 == 6 && vocab > 8 { f32::NEG_INFINITY } else { *x * spread };
        }
        x
    }

    /// Losses, gradients, and the gradients that were rounded.
    fn run(cpu: &Cpu, x: &[f32], vocab: usize, labels: &[u32], weights: &[f32]) -> (Vec<f32>, Vec<f32>, Vec<bf16>) {
        let rows = labels.len();
        let (mut plain, mut wide, mut scratch) = (x.to_vec(), x.to_vec(), x.to_vec());
        let (mut nll, mut again) = (vec![f32::NAN; rows], vec![f32::NAN; rows]);
        cpu.cross_entropy(ViewMut::new(&mut plain, rows, vocab), labels, None, None, &mut nll);
        assert_eq!(bits(&plain), bits(x), "logits without weights are read only");
        cpu.cross_entropy(ViewMut::new(&mut wide, rows, vocab), labels, Some(weights), None, &mut again);
        assert_eq!(bits(&nll), bits(&again));
        let mut narrow = vec![bf16::NAN; rows * vocab];
        let view = ViewMut::new(&mut narrow, rows, vocab);
        cpu.cross_entropy(ViewMut::new(&mut scratch, rows, vocab), labels, Some(weights), Some(view), &mut again);
        assert_eq!(bits(&nll), bits(&again));
        (nll, wide, narrow)
    }

    #[test]
    fn losses_and_gradients_are_those_of_f64() {
        for (rows, vocab, spread) in
            [(1, 1, 1.0), (3, 2, 1.0), (5, 17, 3.0), (40, 1000, 2.0), (2, 2049, 1e4), (3, 151_936, 3.0)]
        {
            let x = logits(rows, vocab, spread);
            let labels: Vec<u32> = (0..rows).map(|row| ((row * 13) % vocab / 8 * 8) as u32).collect();
            let weights: Vec<f32> = (0..rows).map(|row| 0.5 - row as f32).collect();
            for cpu in cpus() {
                let (nll, wide, narrow) = run(&cpu, &x, vocab, &labels, &weights);
                assert_eq!(narrow, rounded(&wide));
                for row in 0..rows {
                    let x = doubles(&x[row * vocab..][..vocab]);
                    let label = labels[row] as usize;
                    let weight = f64::from(weights[row]);
                    let expected = reference(&x, label);
                    // Differences of logits are rounded.
                    let steep = 1.0 + f64::from(spread);
                    assert_within("nll", &nll[row..=row], &[expected], 1e-6 * (1.0 + expected.abs()));
                    let expected: Vec<f64> = gradient(&x, label).iter().map(|d| d * weight).collect();
                    let limit = 1e-6 * steep * weight.abs();
                    assert_within("gradient", &wide[row * vocab..][..vocab], &expected, limit);
                }
            }
        }
    }

    #[test]
    fn the_gradient_has_the_slopes_of_the_reference() {
        let x = doubles(&normal("x", 9));
        assert_slopes("logits", &gradient(&x, 4), &differences(&x, |x| reference(x, 4)));
    }

    #[test]
    fn bits_depend_neither_on_threads_nor_on_other_rows() {
        let (rows, vocab) = (40, 3000);
        let x = logits(rows, vocab, 2.0);
        let (labels, weights) = (vec![8; rows], normal("weights", rows));
        for cpu in cpus() {
            let all = run(&cpu, &x, vocab, &labels, &weights);
            for threads in [1, 2, 4] {
                assert!(with_threads(threads, || run(&cpu, &x, vocab, &labels, &weights)) == all, "{threads} threads");
            }
            let (nll, wide, _) = run(&cpu, &x[17 * vocab..18 * vocab], vocab, &labels[..1], &weights[17..18]);
            assert_eq!((bits(&nll), bits(&wide)), (bits(&all.0[17..18]), bits(&all.1[17 * vocab..18 * vocab])));
        }
    }

    #[test]
    fn what_is_not_a_number_shows() {
        for cpu in cpus() {
            let mut x = logits(2, 50, 1.0);
            x[70] = f32::NAN;
            let (nll, _, _) = run(&cpu, &x, 50, &[0, 0], &[1.0, 1.0]);
            assert!(nll[0].is_finite() && nll[1].is_nan());
        }
    }
}
