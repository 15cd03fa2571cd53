//! Factors of f32 as sums of two of bf16, laid out for tiles.
//!
//! # Update
//! ```text
//! x ≈ x¹ + x²      x¹ = bf16(x)      x² = bf16(x − x¹)
//! a b ≈ a¹ b¹ + a¹ b² + a² b¹
//! ```
//! What is left out of a product is at most `2^-16` of its magnitude, give or take: sixteen bits of twenty-four.
#![expect(unsafe_code, reason = "vector loads and stores at pointers")]

use std::ops::Range;

use super::pack::{AHEAD, Factor};
use crate::kernels::simd::Simd;

/// Vectors of pairs that are turned at a time.
const MOST: usize = 16;

/// The nearest bf16, widened; of two the one further from zero.
#[inline(always)]
fn rounded<S: Simd>(s: S, x: S::F) -> S::F {
    let below = s.odd(x);
    s.odd(s.fma(s.splat(2.0), s.sub(x, below), below))
}

/// Pairs of the two parts of `even` and `odd`.
#[inline(always)]
fn parts<S: Simd>(s: S, even: S::F, odd: S::F) -> (S::F, S::F) {
    let high = (rounded(s, even), rounded(s, odd));
    let low = (rounded(s, s.sub(even, high.0)), rounded(s, s.sub(odd, high.1)));
    (s.pair(high.0, high.1), s.pair(low.0, low.1))
}

/// Numbers along the contraction whose pairs are laid out together: a number's other half is a vector's length after it.
#[inline(always)]
const fn group<S: Simd>() -> usize {
    2 * S::LANES
}

impl Factor<'_> {
    /// Pairs of both parts of a group of numbers of a row that lies along the contraction; zeros after its end.
    #[inline(always)]
    unsafe fn parts_along<S: Simd>(&self, s: S, outer: usize, ks: Range<usize>) -> (S::F, S::F) {
        // SAFETY: the caller's; no more is asked for than there is.
        unsafe {
            s.prefetch(self.address(outer, ks.start + AHEAD * S::LANES));
            s.prefetch(self.address(outer, ks.start + (AHEAD + 1) * S::LANES));
            let even = self.load_part(s, outer, ks.start, ks.len().min(S::LANES));
            let rest = ks.len().saturating_sub(S::LANES).min(S::LANES);
            let odd = if rest == 0 { s.zero() } else { self.load_part(s, outer, ks.start + S::LANES, rest) };
            parts(s, even, odd)
        }
    }

    /// Pairs of both parts of one number of each of `n` rows, and of another a vector's length further, where rows lie across.
    #[inline(always)]
    unsafe fn parts_across<S: Simd>(&self, s: S, outer: usize, n: usize, ks: Range<usize>) -> (S::F, S::F) {
        // SAFETY: the caller's; numbers beyond the last are not asked for.
        unsafe {
            let even = if ks.is_empty() { s.zero() } else { self.load_part(s, outer, ks.start, n) };
            let odd = if ks.len() <= S::LANES { s.zero() } else { self.load_part(s, outer, ks.start + S::LANES, n) };
            parts(s, even, odd)
        }
    }

    /// Lays rows `outer` out as rows of pairs along the contraction, `apart` pairs from row to row: `depth` pairs of the first
    /// parts, then as many of the second ones.
    ///
    /// # Safety
    /// There is room for the rows at `to`; `depth` is that of `ks` in whole groups. The rows and numbers exist.
    #[inline(always)]
    pub(super) unsafe fn split_rows<S: Simd>(
        &self,
        s: S,
        outer: Range<usize>,
        ks: Range<usize>,
        depth: usize,
        apart: usize,
        to: *mut f32,
    ) {
        if self.along {
            for (row, outer) in outer.enumerate() {
                for at in (0..ks.len()).step_by(group::<S>()) {
                    // SAFETY: the caller's.
                    unsafe {
                        let (high, low) = self.parts_along(s, outer, ks.start + at..ks.end);
                        let to = to.add(row * apart + at / 2);
                        s.store_at(to, high);
                        s.store_at(to.add(depth), low);
                    }
                }
            }
            return;
        }
        for row in outer.clone().step_by(S::LANES) {
            let n = (outer.end - row).min(S::LANES);
            for at in (0..ks.len()).step_by(group::<S>()) {
                // SAFETY: the caller's.
                unsafe {
                    let to = to.add((row - outer.start) * apart + at / 2);
                    turned(
                        s,
                        #[inline(always)]
                        |i| self.parts_across(s, row, n, (ks.start + at + i).min(ks.end)..ks.end),
                        #[inline(always)]
                        |j, high, low| {
                            if j < n {
                                s.store_at(to.add(j * apart), high);
                                s.store_at(to.add(j * apart + depth), low);
                            }
                        },
                    );
                }
            }
        }
    }

    /// Lays rows `outer` out as panels of two vectors of rows, `apart` numbers after each other: for each pair along `ks` one of
    /// each row, zeros where there is no row; `depth` pairs of the first parts, then as many of the second ones.
    ///
    /// # Safety
    /// There is room for the panels at `to`; `depth` is that of `ks` in whole groups. The rows and numbers exist.
    #[inline(always)]
    pub(super) unsafe fn split_panels<S: Simd>(
        &self,
        s: S,
        outer: Range<usize>,
        ks: Range<usize>,
        depth: usize,
        apart: usize,
        to: *mut f32,
    ) {
        let width = 2 * S::LANES;
        let vectors = outer.len().div_ceil(width) * 2;
        for at in (0..ks.len()).step_by(group::<S>()) {
            if self.along {
                for vector in 0..vectors {
                    // SAFETY: the caller's; rows that do not exist are not asked for.
                    unsafe {
                        let to = to.add(vector / 2 * apart + vector % 2 * S::LANES + at / 2 * width);
                        turned(
                            s,
                            #[inline(always)]
                            |i| {
                                let row = outer.start + vector * S::LANES + i;
                                if row >= outer.end {
                                    return (s.zero(), s.zero());
                                }
                                self.parts_along(s, row, ks.start + at..ks.end)
                            },
                            #[inline(always)]
                            |j, high, low| {
                                s.store_at(to.add(j * width), high);
                                s.store_at(to.add((depth + j) * width), low);
                            },
                        );
                    }
                }
                continue;
            }
            for i in 0..S::LANES {
                let p = (ks.start + at + i).min(ks.end);
                for vector in 0..vectors {
                    let row = outer.start + vector * S::LANES;
                    // SAFETY: as above.
                    unsafe {
                        s.prefetch(self.address(row, p + AHEAD));
                        s.prefetch(self.address(row, p + AHEAD + S::LANES));
                        let to = to.add(vector / 2 * apart + vector % 2 * S::LANES + (at / 2 + i) * width);
                        let n = outer.end.saturating_sub(row).min(S::LANES);
                        let (high, low) =
                            if n == 0 { (s.zero(), s.zero()) } else { self.parts_across(s, row, n, p..ks.end) };
                        s.store_at(to, high);
                        s.store_at(to.add(depth * width), low);
                    }
                }
            }
        }
    }
}

/// Transposes as many vectors of both parts as a vector has numbers.
#[inline(always)]
fn turned<S: Simd>(s: S, mut of: impl FnMut(usize) -> (S::F, S::F), mut put: impl FnMut(usize, S::F, S::F)) {
    let (mut high, mut low) = ([s.zero(); MOST], [s.zero(); MOST]);
    for i in 0..S::LANES {
        (high[i], low[i]) = of(i);
    }
    let mut columns = [s.zero(); MOST];
    s.transpose(
        #[inline(always)]
        |i| high[i],
        #[inline(always)]
        |j, x| columns[j] = x,
    );
    s.transpose(
        #[inline(always)]
        |i| low[i],
        #[inline(always)]
        |j, x| put(j, columns[j], x),
    );
}
