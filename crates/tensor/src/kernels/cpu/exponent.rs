//! Exponentials for the kernels that consist of them, to about one unit in the last place.
//!
//! # Numerics
//! `2^x = 2^n 2^f` with `n = round(x)` and `|f| ≤ 1/2`, and `e^x = 2^n e^r` with `n = round(x / ln 2)` and `|r| ≤ ln 2 / 2`: there
//! polynomials of degree 6 are 2e-9 off. Results below the normal range are 0, which saves a third of the instructions of
//! [`crate::kernels::simd::math::exp`]. What is not a number stays so.

use crate::kernels::simd::Simd;

/// `2^f` on `|f| ≤ 1/2`; lowest degree first.
const EXP2: [f32; 7] =
    [1.0, std::f32::consts::LN_2, 0.240_226_46, 0.055_503_286, 0.009_618_489, 0.001_339_993_1, 0.000_153_458_08];

/// `e^r` on `|r| ≤ ln 2 / 2`; lowest degree first.
const EXP: [f32; 7] = [1.0, 1.0, 0.499_999_9, 0.166_664_2, 0.041_668_225, 0.008_374_816, 0.001_383_684_2];

/// ln 2 in two parts, the first of which has so few digits that its product with a whole number below 256 is exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];

/// At and below this exponent the result is 0.
const LOWEST: f32 = -127.0;

/// The value of a polynomial, lowest degree first.
#[inline(always)]
pub(super) fn polynomial<S: Simd, const N: usize>(s: S, of: [f32; N], x: S::F) -> S::F {
    let mut sum = s.splat(of[N - 1]);
    for &coefficient in of[..N - 1].iter().rev() {
        sum = s.fma(sum, x, s.splat(coefficient));
    }
    sum
}

/// `2^x` for `x < 128`.
#[inline(always)]
pub(super) fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.max(s.splat(LOWEST), x);
    let whole = s.round(x);
    s.mul(polynomial(s, EXP2, s.sub(x, whole)), s.power2(whole))
}

/// `e^x`; from 88.3 on it no longer grows.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // Limits first: minimum and maximum return their second argument where one is NaN.
    let x = s.max(s.splat(LOWEST * std::f32::consts::LN_2), s.min(s.splat(88.3), x));
    let whole = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let rest = s.fnma(whole, s.splat(LN_2[1]), s.fnma(whole, s.splat(LN_2[0]), x));
    s.mul(polynomial(s, EXP, rest), s.power2(whole))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::checks::*;
    use crate::kernels::cpu::map::{Formula, update};
    use crate::kernels::simd::Body;

    struct Power;

    impl Formula<1, 2> for Power {
        #[inline(always)]
        fn at<S: Simd>(&self, s: S, [x]: [S::F; 1], _: [S::F; 2]) -> [S::F; 2] {
            [exp2(s, x), exp(s, x)]
        }
    }

    /// `2^x` and `e^x` of some numbers.
    struct Powers<'a>(&'a [f32]);

    impl Body for Powers<'_> {
        type Output = [Vec<f32>; 2];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [Vec<f32>; 2] {
            let [mut two, mut e] = [vec![0.0; self.0.len()], vec![0.0; self.0.len()]];
            update(s, [self.0], [&mut two, &mut e], &Power);
            [two, e]
        }
    }

    #[test]
    fn powers_are_within_two_units_in_the_last_place() {
        let x: Vec<f32> = (-43_500..=44_100).map(|i| i as f32 / 500.0 + 1e-3).collect();
        for cpu in cpus() {
            let [two, e] = cpu.call_f32(Powers(&x));
            for ((x, two), e) in x.iter().zip(two).zip(e) {
                for (power, expected) in [(two, f64::from(*x).exp2()), (e, f64::from(*x).exp())] {
                    let off = (f64::from(power) - expected).abs() / expected;
                    assert!(off <= 2.0 * f64::from(f32::EPSILON), "at {x}: {power}, off by {off:e}");
                }
            }
        }
    }

    #[test]
    fn extremes_are_zero_and_what_is_no_number_stays_so() {
        for cpu in cpus() {
            for found in cpu.call_f32(Powers(&[f32::NEG_INFINITY, -1e30, -127.0, f32::NAN, 0.0])) {
                assert_eq!(found[..3], [0.0; 3]);
                assert!(found[3].is_nan());
                assert_eq!(found[4], 1.0);
            }
            let [_, e] = cpu.call_f32(Powers(&[89.0, f32::INFINITY]));
            assert!(e[0] > 2e38 && e[0].is_finite() && e[0] == e[1]);
        }
    }
}
