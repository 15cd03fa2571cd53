//! Parts of products by AMX's tiles.
#![expect(unsafe_code, reason = "packed layouts and tiles are reached by pointers")]

use std::ops::Range;

use super::block::{Panels, Part};
use super::micro::{self, Tile};
use super::pack::{APART, Factor};
use super::scratch::Buffer;
use crate::kernels::LowRank;
use crate::kernels::simd::Simd;
use crate::kernels::simd::amx::{SIDE, Stretch, Tiles};

/// Numbers along the contraction in a row of a tile.
pub(super) const DEEP: usize = 2 * SIDE;
/// Rows and columns that are multiplied at a time: two tiles by two.
pub(super) const BLOCK: usize = 2 * SIDE;
/// Rows whose pairs of one stretch stay in the second cache while all panels pass.
pub(super) const ROWS: usize = 128;
/// Numbers of a stretch of the contraction.
pub(super) const DEPTH: usize = 1024;
/// The same for numbers in two parts.
pub(super) const DEPTH_PARTS: usize = 512;

impl<'a> Part<'_, 'a> {
    /// As [`Part::multiply`]; thin terms and the bias are added to what tiles have stored.
    #[inline(always)]
    pub(super) fn multiply_tiles<S: Simd>(
        &self,
        s: S,
        tiles: &Tiles,
        panels: Panels,
        thin: Option<(&LowRank<'a>, Panels)>,
        left: &mut Buffer,
        thin_left: &mut Buffer,
    ) {
        let (of, target) = (self.of, self.of.c);
        let (a, apart) = prepare(s, &of.a, self.rows.clone(), self.ks.clone(), panels, left);
        // A thin term by tiles, or, with its numbers in 32 bits, after them.
        let (thin_tiles, thin) = match thin {
            Some((term, panels)) if of.thin_units(term).in_pairs() => {
                let factor = Factor { mat: term.left, along: true };
                let rows = self.rows.start - term.rows.start..self.rows.end - term.rows.start;
                let (a, apart) = prepare(s, &factor, rows, 0..factor.depth(), panels, thin_left);
                (Some((a, apart, panels)), None)
            }
            thin => (None, self.thin(s, thin, thin_left)),
        };
        let add = of.accumulate || self.ks.start > 0;
        let place = |i: usize, j: usize| if target.turned { j * target.stride + i } else { i * target.stride + j };
        for (panel, col) in self.cols.clone().step_by(BLOCK).enumerate() {
            let cols = (self.cols.end - col).min(BLOCK);
            for row in (0..self.rows.len()).step_by(BLOCK) {
                let rows = (self.rows.len() - row).min(BLOCK);
                let c = target.at.wrapping_add(place(self.rows.start + row, col));
                let mut stretch = Stretch {
                    a: a.wrapping_byte_add(row * apart),
                    apart,
                    b: panels.at.wrapping_add(panel * panels.apart),
                    tiles: panels.depth / SIDE,
                    c,
                    c_stride: target.stride,
                    add,
                };
                let whole = rows.is_multiple_of(SIDE) && cols == BLOCK && !target.turned;
                // SAFETY: rows and panels are what was prepared, whole tiles of them; the place lies within this task's block,
                // or is a room of its own.
                unsafe {
                    let thin = thin_tiles.map(|(a, apart, panels)| Stretch {
                        a: a.wrapping_byte_add(row * apart),
                        apart,
                        b: panels.at.wrapping_add(panel * panels.apart),
                        tiles: panels.depth / SIDE,
                        add: true,
                        ..stretch
                    });
                    if whole {
                        for i in 0..rows {
                            tiles.prefetch_to_write(c.wrapping_add(i * target.stride));
                            tiles.prefetch_to_write(c.wrapping_add(i * target.stride + SIDE));
                        }
                        multiply(tiles, rows, stretch, panels.parts);
                        if let Some(thin) = thin {
                            multiply(tiles, rows, thin, panels.parts);
                        }
                        continue;
                    }
                    let mut room = Room([0.0; BLOCK * BLOCK]);
                    let numbers = || (0..rows).flat_map(|i| (0..cols).map(move |j| (i * BLOCK + j, place(i, j))));
                    if add {
                        numbers().for_each(|(at, place)| room.0[at] = c.add(place).read());
                    }
                    (stretch.c, stretch.c_stride) = (room.0.as_mut_ptr(), BLOCK);
                    multiply(tiles, rows, stretch, panels.parts);
                    if let Some(thin) = thin {
                        multiply(tiles, rows, Stretch { c: stretch.c, c_stride: BLOCK, ..thin }, panels.parts);
                    }
                    numbers().for_each(|(at, place)| c.add(place).write(room.0[at]));
                }
            }
            let bias = of.bias.filter(|_| self.last);
            if thin.is_none() && bias.is_none() {
                continue;
            }
            for row in (0..self.rows.len()).step_by(micro::rows::<S>()) {
                let tile = Tile {
                    main: micro::Stretch { apart: of.a.along.then_some(0), ..micro::Stretch::NONE },
                    thin: thin.map_or(micro::Stretch::NONE, |thin| thin.stretch(row, panel)),
                    c: target.at.wrapping_add(place(self.rows.start + row, col)),
                    c_stride: target.stride,
                    turned: target.turned,
                    cols,
                    add: true,
                    bias: bias.map_or(std::ptr::null(), |bias| bias[col..].as_ptr()),
                };
                // SAFETY: as above.
                unsafe { tile.compute(s, micro::rows::<S>().min(self.rows.len() - row), false) }
            }
        }
    }
}

/// Where whole tiles of rows of pairs of a factor can be read, in as many parts and padded with zeros to as many pairs as `panels`
/// have: the first, and bytes from row to row.
#[inline(always)]
fn prepare<S: Simd>(
    s: S,
    factor: &Factor<'_>,
    rows: Range<usize>,
    ks: Range<usize>,
    panels: Panels,
    room: &mut Buffer,
) -> (*const f32, usize) {
    let depth = panels.depth;
    if panels.parts > 1 {
        let apart = panels.parts * depth + APART;
        let to = room.reserve(rows.len().next_multiple_of(SIDE) * apart);
        // SAFETY: there is room for the rows, which exist; rows beyond the last change none of the others.
        unsafe { factor.split_rows(s, rows, ks, depth, apart, to) }
        return (to, 4 * apart);
    }
    if rows.len().is_multiple_of(SIDE)
        && ks.len().is_multiple_of(DEEP)
        && let Some(place) = factor.in_place(rows.start, &ks, true)
    {
        return place;
    }
    let apart = depth + APART;
    let to = room.reserve(rows.len().next_multiple_of(SIDE) * apart);
    let zeros = ks.len().div_ceil(2)..depth;
    // SAFETY: there is room for the rows, which exist; rows beyond the last change none of the others.
    unsafe {
        if factor.along {
            factor.widen(s, rows.clone(), ks, true, apart, to);
        } else {
            factor.turn_rows(s, rows.clone(), ks, apart, to);
        }
        for row in 0..rows.len() {
            to.add(row * apart + zeros.start).write_bytes(0, zeros.len());
        }
    }
    (to, 4 * apart)
}

/// Where tiles that are not whole are stored first.
#[repr(align(64))]
struct Room([f32; BLOCK * BLOCK]);

/// One or two tiles of rows.
///
/// # Safety
/// As [`Tiles::multiply`]; further parts lie after the first in rows and panels.
#[inline(always)]
unsafe fn multiply(tiles: &Tiles, rows: usize, of: Stretch, parts: usize) {
    // SAFETY: the caller's.
    unsafe {
        match (rows > SIDE, parts) {
            (true, 1) => tiles.multiply::<2>(of),
            (false, 1) => tiles.multiply::<1>(of),
            (true, _) => tiles.multiply_parts::<2>(of),
            (false, _) => tiles.multiply_parts::<1>(of),
        }
    }
}
