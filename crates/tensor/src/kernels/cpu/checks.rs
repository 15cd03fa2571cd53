//! How the kernels are tested: on every instruction set that the machine has, with several numbers of threads, against plain
//! f64.

use candle_core::DType;
use half::bf16;

use super::{Cpu, Isa};
use crate::rng::Rng;
use crate::testing::tolerance;

/// Every instruction set that the machine has, the portable one first.
pub(super) fn cpus() -> Vec<Cpu> {
    Isa::ALL.into_iter().filter_map(Cpu::with).collect()
}

/// Runs `f` with so many threads.
pub(super) fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

/// Normally distributed numbers that their name decides.
pub(super) fn normal(name: &str, len: usize) -> Vec<f32> {
    let mut rng = Rng::new(7, name);
    (0..len).map(|_| rng.normal() as f32).collect()
}

/// Rounded to bf16.
pub(super) fn rounded(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

pub(super) fn wide(x: &[bf16]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

pub(super) fn doubles(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

pub(super) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Asserts that no number is further from what is expected than `limit`.
pub(super) fn assert_within(what: &str, found: &[f32], expected: &[f64], limit: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths differ");
    for (at, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let difference = (f64::from(found) - expected).abs();
        // Also false for what is not a number.
        assert!(difference <= limit, "{what}: {found} instead of {expected} at {at}: {difference:e} exceeds {limit:e}");
    }
}

/// Asserts that sums of `terms` terms in `dtype` are as expected; `amplified` is by how much errors of the inputs grow.
pub(super) fn assert_sums(what: &str, dtype: DType, found: &[f32], expected: &[f64], terms: usize, amplified: f64) {
    let max = expected.iter().fold(0.0, |max: f64, value| max.max(value.abs()));
    assert_within(what, found, expected, tolerance(dtype, terms, max.max(1e-3)) * amplified);
}

/// Central differences of `loss` by every number of `at`.
pub(super) fn differences(at: &[f64], loss: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 6e-6;
    let mut moved = at.to_vec();
    (0..at.len())
        .map(|index| {
            let mut at_step = |step: f64| {
                moved[index] = at[index] + step;
                loss(&moved)
            };
            let slope = (at_step(STEP) - at_step(-STEP)) / (2.0 * STEP);
            moved[index] = at[index];
            slope
        })
        .collect()
}

/// Asserts that gradients in f64 are those by [`differences`].
pub(super) fn assert_slopes(what: &str, found: &[f64], slopes: &[f64]) {
    let max = slopes.iter().fold(1.0, |max: f64, slope| max.max(slope.abs()));
    for (at, (found, slope)) in found.iter().zip(slopes).enumerate() {
        assert!((found - slope).abs() <= 1e-7 * max, "{what}: {found} instead of {slope} at {at}");
    }
}
