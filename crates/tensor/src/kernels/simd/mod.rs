//! Vectors of f32 for one instruction set at a time: a kernel is written once against [`Simd`] and compiled for each set.
//!
//! A kernel is a [`Body`]: a struct of its arguments whose `run` is `#[inline(always)]`. [`Simd::call`] compiles it inside a
//! function that has the instruction set enabled, so every operation below becomes one or a few instructions. A value of
//! an implementing type is the proof that the machine has the set: it is made only where the processor says so.
//!
//! Every operation is exact or rounds once, in the same way for each set, except where its documentation says otherwise;
//! sums across lanes add in a fixed order.
#![expect(unsafe_code, reason = "vector instructions and loads at pointers")]
#![allow(dead_code, reason = "a vocabulary: which words are in use changes with the kernels")]

use half::bf16;

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod math;
mod portable;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

/// What is compiled once for each instruction set.
pub(crate) trait Body {
    /// What it returns.
    type Output;

    /// The work; implementations are `#[inline(always)]`, and so is what they call with vectors.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// An instruction set. `F` is a vector of `LANES` numbers, `M` a truth value for each.
///
/// The functions on pointers and those on slices do the same; those on slices check that the numbers are there.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// A vector of f32.
    type F: Copy;
    /// What a comparison gives.
    type M: Copy;
    /// Numbers in a vector: 8 or 16.
    const LANES: usize;
    /// Vectors that registers hold.
    const REGISTERS: usize;
    /// Whether [`Simd::dot_pairs`] is an instruction, twice as fast as multiplying f32.
    const NATIVE_PAIRS: bool = false;

    /// Runs a body in a function of its own that has the instruction set enabled.
    fn call<B: Body>(self, body: B) -> B::Output;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;

    /// All lanes zero.
    #[inline(always)]
    fn zero(self) -> Self::F {
        self.splat(0.0)
    }

    /// The `LANES` numbers at `at`.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn load_at(self, at: *const f32) -> Self::F;
    /// The first `n <= LANES` numbers at `at`, then zeros.
    ///
    /// # Safety
    /// `n` numbers can be read.
    unsafe fn load_part_at(self, at: *const f32, n: usize) -> Self::F;
    /// Writes all lanes.
    ///
    /// # Safety
    /// They can be written.
    unsafe fn store_at(self, at: *mut f32, x: Self::F);
    /// Writes the first `n <= LANES` lanes.
    ///
    /// # Safety
    /// They can be written.
    unsafe fn store_part_at(self, at: *mut f32, n: usize, x: Self::F);
    /// As [`Simd::load_at`], widened.
    ///
    /// # Safety
    /// `LANES` numbers can be read.
    unsafe fn load_bf16_at(self, at: *const bf16) -> Self::F;
    /// As [`Simd::load_part_at`], widened.
    ///
    /// # Safety
    /// `n` numbers can be read.
    unsafe fn load_bf16_part_at(self, at: *const bf16, n: usize) -> Self::F;
    /// As [`Simd::store_at`], rounded to nearest even; NaN stays NaN.
    ///
    /// # Safety
    /// `LANES` numbers can be written.
    unsafe fn store_bf16_at(self, at: *mut bf16, x: Self::F);
    /// As [`Simd::store_part_at`], rounded to nearest even; NaN stays NaN.
    ///
    /// # Safety
    /// `n` numbers can be written.
    unsafe fn store_bf16_part_at(self, at: *mut bf16, n: usize, x: Self::F);

    /// The first `LANES` numbers of `from`.
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::F {
        assert!(from.len() >= Self::LANES);
        // SAFETY: checked above.
        unsafe { self.load_at(from.as_ptr()) }
    }
    /// All of `from`, which is no longer than a vector, then zeros.
    #[inline(always)]
    fn load_part(self, from: &[f32]) -> Self::F {
        assert!(from.len() <= Self::LANES);
        // SAFETY: as many numbers as the slice has.
        unsafe { self.load_part_at(from.as_ptr(), from.len()) }
    }
    /// Writes the first `LANES` numbers of `to`.
    #[inline(always)]
    fn store(self, to: &mut [f32], x: Self::F) {
        assert!(to.len() >= Self::LANES);
        // SAFETY: checked above.
        unsafe { self.store_at(to.as_mut_ptr(), x) }
    }
    /// Fills `to`, which is no longer than a vector.
    #[inline(always)]
    fn store_part(self, to: &mut [f32], x: Self::F) {
        assert!(to.len() <= Self::LANES);
        // SAFETY: as many numbers as the slice has.
        unsafe { self.store_part_at(to.as_mut_ptr(), to.len(), x) }
    }
    /// As [`Simd::load`], widened.
    #[inline(always)]
    fn load_bf16(self, from: &[bf16]) -> Self::F {
        assert!(from.len() >= Self::LANES);
        // SAFETY: checked above.
        unsafe { self.load_bf16_at(from.as_ptr()) }
    }
    /// As [`Simd::load_part`], widened.
    #[inline(always)]
    fn load_bf16_part(self, from: &[bf16]) -> Self::F {
        assert!(from.len() <= Self::LANES);
        // SAFETY: as many numbers as the slice has.
        unsafe { self.load_bf16_part_at(from.as_ptr(), from.len()) }
    }
    /// As [`Simd::store`], rounded to nearest even.
    #[inline(always)]
    fn store_bf16(self, to: &mut [bf16], x: Self::F) {
        assert!(to.len() >= Self::LANES);
        // SAFETY: checked above.
        unsafe { self.store_bf16_at(to.as_mut_ptr(), x) }
    }
    /// As [`Simd::store_part`], rounded to nearest even.
    #[inline(always)]
    fn store_bf16_part(self, to: &mut [bf16], x: Self::F) {
        assert!(to.len() <= Self::LANES);
        // SAFETY: as many numbers as the slice has.
        unsafe { self.store_bf16_part_at(to.as_mut_ptr(), to.len(), x) }
    }

    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a b + c`, rounded once; [`Portable`] rounds twice where the processor has no such instruction.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `c - a b`, rounded as in [`Simd::fma`].
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a` where `a > b`, else `b`: so `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a` where `a < b`, else `b`: so `b` where either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Square roots.
    fn sqrt(self, a: Self::F) -> Self::F;
    /// Absolute values.
    fn abs(self, a: Self::F) -> Self::F;
    /// The integer next to each, the even one of two.
    fn round(self, a: Self::F) -> Self::F;
    /// `a 2^n` for integers `n` of at most 252 in magnitude, rounded once.
    fn scale2(self, a: Self::F, n: Self::F) -> Self::F;
    /// `2^n` for integers `n` in -126..=127, and 0 for -127.
    fn power2(self, n: Self::F) -> Self::F;
    /// `a < b`; never for NaN.
    fn lt(self, a: Self::F, b: Self::F) -> Self::M;
    /// `a <= b`; never for NaN.
    fn le(self, a: Self::F, b: Self::F) -> Self::M;
    /// `yes` where the mask says so, else `no`.
    fn select(self, mask: Self::M, yes: Self::F, no: Self::F) -> Self::F;
    /// The sum of the lanes: halves are added until one number is left.
    fn reduce_add(self, a: Self::F) -> f32;
    /// The largest lane; NaN lanes may be passed over.
    fn reduce_max(self, a: Self::F) -> f32;

    /// Transposes `LANES` vectors of `LANES`: `row(i)` is asked for each, `put(j, column)` is told each. Bits are moved, never
    /// read as numbers.
    fn transpose(self, row: impl Fn(usize) -> Self::F, put: impl FnMut(usize, Self::F));

    /// Pairs of bf16 from two vectors of widened ones, `even` in the lower halves.
    fn pair(self, even: Self::F, odd: Self::F) -> Self::F;
    /// The lower halves of pairs, widened.
    fn even(self, pairs: Self::F) -> Self::F;
    /// The upper halves of pairs, widened.
    fn odd(self, pairs: Self::F) -> Self::F;
    /// `c + a_even b_even + a_odd b_odd` of pairs; the instruction takes numbers below the normal range for zero.
    #[inline(always)]
    fn dot_pairs(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        let c = self.fma(self.even(a), self.even(b), c);
        self.fma(self.odd(a), self.odd(b), c)
    }
    /// Asks for the cache line of `at`, which need not be readable.
    fn prefetch(self, at: *const f32);
}
