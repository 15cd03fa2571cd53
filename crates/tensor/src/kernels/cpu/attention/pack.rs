//! Rows of heads as f32 beside each other, as the tiles want them.
#![expect(unsafe_code, reason = "blocks are turned through pointers into slices whose lengths were compared")]

use std::ops::Range;

use super::KEYS;
use crate::kernels::cpu::map::{Product, sums, widened};
use crate::kernels::cpu::rows::{LINE, Row};
use crate::kernels::simd::Simd;
use crate::view::MatRef;

/// Rows ahead of the one that is packed that the caches are told of: rows of one head are too far apart to be foreseen.
const AHEAD: usize = 8;

/// `to = factor · from`, and zeros behind it up to a whole number of vectors.
#[inline(always)]
pub(super) fn row<S: Simd>(s: S, from: Row<'_>, factor: f32, to: &mut [f32]) {
    let factor = s.splat(factor);
    match from {
        Row::F32(from) => {
            for (from, to) in from.chunks(S::LANES).zip(to.chunks_exact_mut(S::LANES)) {
                let x = if from.len() == S::LANES { s.load(from) } else { s.load_part(from) };
                s.store(to, s.mul(x, factor));
            }
        }
        Row::Bf16(from) => {
            for (from, to) in from.chunks(S::LANES).zip(to.chunks_exact_mut(S::LANES)) {
                let x = if from.len() == S::LANES { s.load_bf16(from) } else { s.load_bf16_part(from) };
                s.store(to, s.mul(x, factor));
            }
        }
    }
}

/// Says that columns `cols` of the row [`AHEAD`] of `at` will be needed.
#[inline(always)]
pub(super) fn ahead<S: Simd>(s: S, of: &MatRef<'_>, at: usize, cols: Range<usize>) {
    if at + AHEAD >= of.rows() {
        return;
    }
    let (first, lines) = match Row::of(of, at + AHEAD, cols) {
        Row::F32(row) => (row.as_ptr(), row.len().div_ceil(LINE)),
        Row::Bf16(row) => (row.as_ptr().cast(), row.len().div_ceil(2 * LINE)),
    };
    for line in 0..lines {
        s.prefetch(first.wrapping_add(line * LINE));
    }
}

/// Rows `rows` of columns `cols`, each followed by zeros up to `padded`, and rows of zeros up to [`KEYS`].
#[inline(always)]
pub(super) fn block<S: Simd>(
    s: S,
    from: &MatRef<'_>,
    rows: Range<usize>,
    cols: Range<usize>,
    padded: usize,
    to: &mut [f32],
) {
    let (filled, rest) = to.split_at_mut(rows.len() * padded);
    for (at, to) in rows.zip(filled.chunks_exact_mut(padded)) {
        ahead(s, from, at, cols.clone());
        row(s, Row::of(from, at, cols.clone()), 1.0, to);
    }
    rest.fill(0.0);
}

/// [`KEYS`] rows of `padded` numbers turned: panels of as many rows as a tile is wide, in which numbers of the same column are
/// beside each other.
#[inline(always)]
pub(super) fn turned<S: Simd>(s: S, from: &[f32], padded: usize, to: &mut [f32]) {
    let tile = 2 * S::LANES;
    assert!(from.len() >= KEYS * padded && to.len() >= KEYS * padded);
    assert!(padded.is_multiple_of(S::LANES) && KEYS.is_multiple_of(tile));
    for row in (0..KEYS).step_by(S::LANES) {
        let panel = row / tile * tile * padded + row % tile;
        for col in (0..padded).step_by(S::LANES) {
            // SAFETY: both blocks have KEYS rows of `padded` numbers, which the lanes divide.
            unsafe {
                let first = from.as_ptr().add(row * padded + col);
                let to = to.as_mut_ptr().add(panel + col * tile);
                s.transpose(|i| s.load_at(first.add(i * padded)), |j, column| s.store_at(to.add(j * tile), column));
            }
        }
    }
}

/// `Σ a b`; `b` may go on behind `a`.
#[inline(always)]
pub(super) fn dot<S: Simd>(s: S, a: Row<'_>, b: &[f32]) -> f32 {
    match a {
        Row::F32(a) => sums(s, [a, &b[..a.len()]], [0.0; 2], &Product)[0],
        Row::Bf16(a) => {
            let (mut room, mut total) = ([0.0; 128], 0.0);
            for (a, b) in a.chunks(room.len()).zip(b.chunks(room.len())) {
                let a = widened(s, Row::Bf16(a), &mut room);
                total += sums(s, [a, &b[..a.len()]], [0.0; 2], &Product)[0];
            }
            total
        }
    }
}
