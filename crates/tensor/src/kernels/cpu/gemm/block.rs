//! One task of a product: a block of its rows and columns.
#![expect(unsafe_code, reason = "packed layouts and register tiles are reached by pointers")]

use std::ops::Range;
use std::ptr;

use super::Product;
use super::micro::{self, Stretch, Tile};
use super::pack::{APART, Factor};
use super::scratch::{Buffer, Scratch};
use crate::kernels::LowRank;
use crate::kernels::simd::{Body, Simd};

/// Rows whose numbers of one stretch stay in the second cache while all panels pass.
const ROWS: usize = 96;
/// Numbers of a stretch of the contraction: a panel of that depth stays in the first cache.
const DEPTH: usize = 256;
/// The same for pairs of bf16, which are half as large.
const DEPTH_PAIRS: usize = 512;
/// Register tiles of rows up to which columns are read where they lie.
const TILES_UNPACKED: usize = 4;

/// Rows and columns of a product.
pub(super) struct Block<'p, 'a> {
    pub(super) of: &'p Product<'a>,
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
    pub(super) scratch: &'p mut Scratch,
}

/// Columns of one stretch: a panel for every two vectors of columns.
#[derive(Clone, Copy)]
struct Panels {
    at: *const f32,
    /// Numbers or pairs along the contraction.
    depth: usize,
    /// Numbers from panel to panel.
    apart: usize,
    /// Numbers from one vector to the next, where panels are not packed.
    unpacked: Option<usize>,
}

impl Body for Block<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of, rows, cols, scratch } = self;
        let [left, right, thin_left, thin_right] = scratch.parts();
        let (depth, stretch) = (of.a.depth(), if of.pairs { DEPTH_PAIRS } else { DEPTH });
        // A contraction of nothing still has a bias, thin terms and zeros to write.
        let stretches = depth.div_ceil(stretch).max(1);
        for at in 0..stretches {
            let ks = at * stretch..depth.min((at + 1) * stretch);
            let last = at + 1 == stretches;
            let panels = match unpacked(s, of, &cols, &ks) {
                Some(panels) => panels,
                None => pack_columns(s, &of.b, &cols, ks.clone(), of.pairs, !of.a.along, right),
            };
            let mut row = rows.start;
            while row < rows.end {
                let (end, term) = if last { term_at(of.low_rank, row, rows.end) } else { (rows.end, None) };
                let thin = term.map(|term| {
                    let right = Factor::right(term.right);
                    (term, pack_columns(s, &right, &cols, 0..right.depth(), false, !of.a.along, thin_right))
                });
                for row in (row..end).step_by(ROWS) {
                    let part = Part { of, rows: row..end.min(row + ROWS), cols: cols.clone(), ks: ks.clone(), last };
                    part.multiply(s, panels, thin, left, thin_left);
                }
                row = end;
            }
        }
    }
}

/// The thin term of a row, and where the rows end that share it.
fn term_at<'p, 'a>(terms: &'p [LowRank<'a>], row: usize, end: usize) -> (usize, Option<&'p LowRank<'a>>) {
    match terms.iter().find(|term| term.rows.end > row) {
        Some(term) if term.rows.start <= row => (term.rows.end.min(end), Some(term)),
        Some(term) => (term.rows.start.min(end), None),
        None => (end, None),
    }
}

/// Columns that are read where they lie: whole panels of them, side by side, for so few rows that packing would cost more than
/// it brings.
#[inline(always)]
fn unpacked<S: Simd>(_: S, of: &Product<'_>, cols: &Range<usize>, ks: &Range<usize>) -> Option<Panels> {
    let few = of.a.outer() <= TILES_UNPACKED * micro::rows::<S>();
    let (at, apart) = of.b.across(cols.start, ks.start).filter(|_| few && !of.pairs)?;
    let whole = cols.len().is_multiple_of(2 * S::LANES);
    whole.then_some(Panels { at, depth: ks.len(), apart: 2 * S::LANES, unpacked: Some(apart) })
}

#[inline(always)]
fn pack_columns<S: Simd>(
    s: S,
    b: &Factor<'_>,
    cols: &Range<usize>,
    ks: Range<usize>,
    pairs: bool,
    beside: bool,
    room: &mut Buffer,
) -> Panels {
    let depth = if pairs { ks.len().div_ceil(2) } else { ks.len() };
    let apart = 2 * S::LANES * depth + APART;
    let to = room.reserve(cols.len().div_ceil(2 * S::LANES) * apart);
    // SAFETY: each panel has room for two vectors of columns; the columns and numbers exist.
    unsafe {
        if b.along {
            for (panel, col) in cols.clone().step_by(2 * S::LANES).enumerate() {
                let n = (cols.end - col).min(2 * S::LANES);
                let width = micro::width::<S>(n, beside);
                b.turn_panel(s, col..col + n, ks.clone(), pairs, width, to.add(panel * apart));
            }
        } else {
            let last = micro::width::<S>(cols.len() % (2 * S::LANES), beside);
            b.copy_panels(s, cols.clone(), ks, pairs, (apart, last), to);
        }
    }
    Panels { at: to, depth, apart, unpacked: None }
}

/// Rows that stay in a cache while all panels pass.
struct Part<'p, 'a> {
    of: &'p Product<'a>,
    rows: Range<usize>,
    cols: Range<usize>,
    ks: Range<usize>,
    /// Whether the contraction ends with `ks`.
    last: bool,
}

impl<'a> Part<'_, 'a> {
    #[inline(always)]
    fn multiply<S: Simd>(
        &self,
        s: S,
        panels: Panels,
        thin: Option<(&LowRank<'a>, Panels)>,
        left: &mut Buffer,
        thin_left: &mut Buffer,
    ) {
        let (of, tile) = (self.of, micro::rows::<S>());
        // Where the rows of a tile are, from the block's first row on.
        let (a, apart, tile_apart) = self.prepare(s, panels.depth, left);
        let none = Stretch { a: ptr::null(), apart: Some(0), b: ptr::null(), unpacked: None, depth: 0 };
        let thin = thin.map(|(term, panels)| {
            let factor = Factor { mat: term.left, along: true };
            let rows = self.rows.start - term.rows.start..self.rows.end - term.rows.start;
            let (a, apart) = factor.in_place(rows.start, &(0..panels.depth), false).unwrap_or_else(|| {
                let to = thin_left.reserve(rows.len() * panels.depth);
                // SAFETY: there is room for the rows, which exist.
                unsafe { factor.widen(s, rows.clone(), 0..panels.depth, false, panels.depth, to) }
                (to.cast_const(), 4 * panels.depth)
            });
            (a, apart, panels)
        });
        for (panel, col) in self.cols.clone().step_by(2 * S::LANES).enumerate() {
            let cols = (self.cols.end - col).min(2 * S::LANES);
            let bias = of.bias.filter(|_| self.last).map_or(ptr::null(), |bias| bias[col..].as_ptr());
            for row in (0..self.rows.len()).step_by(tile) {
                let (i, target) = (self.rows.start + row, of.c);
                let place = if target.turned { col * target.stride + i } else { i * target.stride + col };
                let panel_of = |panels: Panels| panels.at.wrapping_add(panel * panels.apart);
                let to = Tile {
                    main: Stretch {
                        a: a.wrapping_byte_add(row / tile * tile_apart),
                        apart,
                        b: panel_of(panels),
                        unpacked: panels.unpacked,
                        depth: panels.depth,
                    },
                    thin: thin.map_or(none, |(a, apart, panels)| Stretch {
                        a: a.wrapping_byte_add(row * apart),
                        apart: Some(apart),
                        b: panel_of(panels),
                        unpacked: panels.unpacked,
                        depth: panels.depth,
                    }),
                    c: target.at.wrapping_add(place),
                    c_stride: target.stride,
                    turned: target.turned,
                    cols,
                    add: of.accumulate || self.ks.start > 0,
                    bias,
                };
                // SAFETY: rows and panels are what was prepared, the tile lies within this task's block.
                unsafe { to.compute(s, tile.min(self.rows.len() - row), of.pairs) }
            }
        }
    }

    /// Where the rows can be read: the first, bytes from row to row (if they are not side by side), bytes from tile to tile.
    #[inline(always)]
    fn prepare<S: Simd>(&self, s: S, depth: usize, room: &mut Buffer) -> (*const f32, Option<usize>, usize) {
        let (of, tile) = (self.of, micro::rows::<S>());
        if let Some((a, apart)) = of.a.in_place(self.rows.start, &self.ks, of.pairs) {
            return (a, Some(apart), tile * apart);
        }
        let (rows, ks) = (self.rows.clone(), self.ks.clone());
        if of.a.along {
            let apart = depth + APART;
            let to = room.reserve(rows.len() * apart);
            // SAFETY: there is room for the rows, which exist.
            unsafe { of.a.widen(s, rows, ks, of.pairs, apart, to) }
            (to, Some(4 * apart), tile * 4 * apart)
        } else {
            let apart = tile * depth + APART;
            let to = room.reserve(rows.len().div_ceil(tile) * apart + S::LANES);
            // SAFETY: there is room for the panels and a vector; the rows exist.
            unsafe { of.a.pack_narrow(s, rows, ks, of.pairs, tile, apart, to) }
            (to, None, 4 * apart)
        }
    }
}
