//! Rows of heads as f32 beside each other, as the tiles want them.

use std::ops::Range;

use super::KEYS;
use crate::kernels::cpu::map::{Product, sums, widened};
use crate::kernels::cpu::rows::Row;
use crate::kernels::simd::Simd;
use crate::view::MatRef;

/// `to = factor · from`, and zeros behind it.
#[inline(always)]
pub(super) fn row<S: Simd>(s: S, from: Row<'_>, factor: f32, to: &mut [f32]) {
    let len = match from {
        Row::F32(from) => {
            for (to, from) in to.iter_mut().zip(from) {
                *to = from * factor;
            }
            from.len()
        }
        Row::Bf16(from) => {
            for (to, from) in to.iter_mut().zip(from) {
                *to = from.to_f32() * factor;
            }
            from.len()
        }
    };
    to[len..].fill(0.0);
    let _ = s;
}

/// Rows `rows` of columns `cols`, each followed by zeros up to `padded`.
#[inline(always)]
pub(super) fn block<S: Simd>(
    s: S,
    from: &MatRef<'_>,
    rows: Range<usize>,
    cols: Range<usize>,
    padded: usize,
    to: &mut [f32],
) {
    for (from_row, to) in rows.zip(to.chunks_exact_mut(padded)) {
        row(s, Row::of(from, from_row, cols.clone()), 1.0, to);
    }
}

/// A block of rows turned: panels of `tile` rows, in which numbers of the same column are beside each other. What is missing
/// to [`KEYS`] rows is zero.
#[inline(always)]
pub(super) fn turned(from: &[f32], rows: usize, cols: usize, padded: usize, tile: usize, to: &mut [f32]) {
    for (panel, to) in to.chunks_exact_mut(tile * cols).enumerate().take(KEYS / tile) {
        let first = panel * tile;
        let filled = rows.saturating_sub(first).min(tile);
        for (col, to) in to.chunks_exact_mut(tile).enumerate() {
            for (row, to) in to[..filled].iter_mut().enumerate() {
                *to = from[(first + row) * padded + col];
            }
            to[filled..].fill(0.0);
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
