//! Exponentials of base 2, to about one unit in the last place.
//!
//! # Numerics
//! `2^x = 2^n 2^f` with `n = round(x)` and `|f| ≤ 1/2`, where a polynomial of degree 6 is 2e-9 off. Results below the normal
//! range are 0. What is not a number stays so.

use crate::kernels::simd::Simd;

/// `2^f` on `|f| ≤ 1/2`; lowest degree first.
const EXP2: [f32; 7] =
    [1.0, std::f32::consts::LN_2, 0.240_226_46, 0.055_503_286, 0.009_618_489, 0.001_339_993_1, 0.000_153_458_08];

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::checks::*;
    use crate::kernels::cpu::map::{Formula, update};
    use crate::kernels::simd::Body;

    struct Power;

    impl Formula<1, 1> for Power {
        #[inline(always)]
        fn at<S: Simd>(&self, s: S, [x]: [S::F; 1], _: [S::F; 1]) -> [S::F; 1] {
            [exp2(s, x)]
        }
    }

    /// Powers of two of some numbers.
    struct Powers<'a>(&'a [f32]);

    impl Body for Powers<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<f32> {
            let mut powers = vec![0.0; self.0.len()];
            update(s, [self.0], [&mut powers], &Power);
            powers
        }
    }

    #[test]
    fn powers_are_within_two_units_in_the_last_place() {
        let x: Vec<f32> = (-63_000..=63_000).map(|i| i as f32 / 500.0 + 1e-3).collect();
        for cpu in cpus() {
            for (x, power) in x.iter().zip(cpu.call_f32(Powers(&x))) {
                let expected = f64::from(*x).exp2();
                let off = (f64::from(power) - expected).abs() / expected;
                assert!(off <= 2.0 * f64::from(f32::EPSILON), "2^{x} = {power}, off by {off:e}");
            }
        }
    }

    #[test]
    fn extremes_are_zero_and_what_is_no_number_stays_so() {
        for cpu in cpus() {
            let found = cpu.call_f32(Powers(&[f32::NEG_INFINITY, -1e30, -127.0, f32::NAN, 0.0]));
            assert_eq!(found[..3], [0.0; 3]);
            assert!(found[3].is_nan());
            assert_eq!(found[4], 1.0);
        }
    }
}
