//! Elementary functions of vectors, from the operations of [`Simd`] alone.

use super::Simd;

/// Upper part of ln 2: few enough bits that its product with an exponent is exact.
const LN2_UPPER: f32 = 0.693_145_75;
/// What is missing from it.
const LN2_LOWER: f32 = 1.428_606_8e-6;

/// `e^x`, within two units in the last place; infinite above 88.72, gradually to zero below -87.3, NaN for NaN.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // Limits first: minimum and maximum return their second argument where one is NaN.
    let x = s.max(s.splat(-104.0), s.min(s.splat(89.0), x));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fnma(n, s.splat(LN2_LOWER), s.fnma(n, s.splat(LN2_UPPER), x));
    // e^r = 1 + r + r² p(r) on |r| <= ln 2 / 2.
    let p = s.splat(1.987_569_2e-4);
    let p = s.fma(p, r, s.splat(1.398_199_9e-3));
    let p = s.fma(p, r, s.splat(8.333_452e-3));
    let p = s.fma(p, r, s.splat(4.166_579_6e-2));
    let p = s.fma(p, r, s.splat(0.166_666_66));
    let p = s.fma(p, r, s.splat(0.5));
    let p = s.fma(p, s.mul(r, r), s.add(r, s.splat(1.0)));
    s.scale2(p, n)
}
