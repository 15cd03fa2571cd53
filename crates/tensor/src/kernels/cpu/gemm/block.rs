//! One task of a product: a block of its rows and columns.
#![expect(unsafe_code, reason = "packed layouts and register tiles are reached by pointers")]

use std::ops::Range;
use std::ptr;

use super::columns::Piece;
use super::micro::{self, Stretch, Tile};
use super::pack::{APART, Factor};
use super::scratch::{Buffer, Scratch};
#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{Product, Units};
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
pub(super) struct Panels {
    pub(super) at: *const f32,
    /// Numbers or pairs along the contraction.
    pub(super) depth: usize,
    /// Numbers from panel to panel.
    pub(super) apart: usize,
    /// Numbers from one vector to the next, where panels are not packed.
    unpacked: Option<usize>,
    /// Parts of each number, one after the other in a panel.
    pub(super) parts: usize,
}

impl Body for Block<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of, rows, cols, scratch } = self;
        let [left, right, thin_left, thin_right, widened] = scratch.parts();
        #[cfg(target_arch = "x86_64")]
        let tiles = match of.units {
            Units::Tiles(amx) | Units::Parts(amx) => Some(amx.configure()),
            Units::Numbers | Units::Pairs => None,
        };
        let depth = of.a.depth();
        let stretch = match of.units {
            Units::Numbers => DEPTH,
            Units::Pairs => DEPTH_PAIRS,
            #[cfg(target_arch = "x86_64")]
            Units::Tiles(_) => tiles::DEPTH,
            #[cfg(target_arch = "x86_64")]
            Units::Parts(_) => tiles::DEPTH_PARTS,
        };
        // A contraction of nothing still has a bias, thin terms and zeros to write.
        let stretches = depth.div_ceil(stretch).max(1);
        for at in 0..stretches {
            let ks = at * stretch..depth.min((at + 1) * stretch);
            let last = at + 1 == stretches;
            let panels = match unpacked(s, of, &cols, &ks) {
                Some(panels) => panels,
                None => {
                    let Piece { of: b, outer, ks } = of.b.piece(cols.clone(), ks.clone(), widened);
                    pack_columns(s, &b, &outer, ks, of.units, !of.a.along, right)
                }
            };
            let mut row = rows.start;
            while row < rows.end {
                let (end, term) = if last { term_at(of.low_rank, row, rows.end) } else { (rows.end, None) };
                let thin = term.map(|term| {
                    let right = Factor::right(term.right);
                    let (depth, units) = (0..right.depth(), of.thin_units(term));
                    (term, pack_columns(s, &right, &cols, depth, units, !of.a.along, thin_right))
                });
                #[cfg(target_arch = "x86_64")]
                if let Some(tiles) = &tiles {
                    for row in (row..end).step_by(tiles::ROWS) {
                        let rows = row..end.min(row + tiles::ROWS);
                        let part = Part { of, rows, cols: cols.clone(), ks: ks.clone(), last };
                        part.multiply_tiles(s, tiles, panels, thin, left, thin_left);
                    }
                    row = end;
                    continue;
                }
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
    let (at, apart) = of.b.across(cols.start, ks.start).filter(|_| few && !of.units.in_pairs())?;
    let whole = cols.len().is_multiple_of(2 * S::LANES);
    whole.then_some(Panels { at, depth: ks.len(), apart: 2 * S::LANES, unpacked: Some(apart), parts: 1 })
}

#[inline(always)]
fn pack_columns<S: Simd>(
    s: S,
    b: &Factor<'_>,
    cols: &Range<usize>,
    ks: Range<usize>,
    units: Units,
    beside: bool,
    room: &mut Buffer,
) -> Panels {
    let pairs = units.in_pairs();
    let step = 1 + usize::from(pairs);
    let depth = ks.len().next_multiple_of(units.group()) / step;
    // Tiles always have two vectors of columns.
    let beside = beside || units.group() > 2;
    let zeros = ks.len().div_ceil(step)..depth;
    let apart = units.parts() * 2 * S::LANES * depth + APART;
    let to = room.reserve(cols.len().div_ceil(2 * S::LANES) * apart);
    #[cfg(target_arch = "x86_64")]
    if units.parts() > 1 {
        // SAFETY: each panel has room for two vectors of columns of each part; the columns and numbers exist.
        unsafe { b.split_panels(s, cols.clone(), ks, depth, apart, to) }
        return Panels { at: to, depth, apart, unpacked: None, parts: units.parts() };
    }
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
        if !zeros.is_empty() {
            for panel in 0..cols.len().div_ceil(2 * S::LANES) {
                let to = to.add(panel * apart + zeros.start * 2 * S::LANES);
                to.write_bytes(0, zeros.len() * 2 * S::LANES);
            }
        }
    }
    Panels { at: to, depth, apart, unpacked: None, parts: 1 }
}

/// Rows of a thin term and panels.
#[derive(Clone, Copy)]
pub(super) struct Thin {
    a: *const f32,
    /// Bytes from row to row.
    apart: usize,
    panels: Panels,
}

impl Thin {
    /// The rows from `row` on and one panel.
    #[inline(always)]
    pub(super) const fn stretch(self, row: usize, panel: usize) -> Stretch {
        Stretch {
            a: self.a.wrapping_byte_add(row * self.apart),
            apart: Some(self.apart),
            b: self.panels.at.wrapping_add(panel * self.panels.apart),
            unpacked: self.panels.unpacked,
            depth: self.panels.depth,
        }
    }
}

/// Rows that stay in a cache while all panels pass.
pub(super) struct Part<'p, 'a> {
    pub(super) of: &'p Product<'a>,
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
    pub(super) ks: Range<usize>,
    /// Whether the contraction ends with `ks`.
    pub(super) last: bool,
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
        let thin = self.thin(s, thin, thin_left);
        for (panel, col) in self.cols.clone().step_by(2 * S::LANES).enumerate() {
            let cols = (self.cols.end - col).min(2 * S::LANES);
            let bias = of.bias.filter(|_| self.last).map_or(ptr::null(), |bias| bias[col..].as_ptr());
            for row in (0..self.rows.len()).step_by(tile) {
                let (i, target) = (self.rows.start + row, of.c);
                let place = if target.turned { col * target.stride + i } else { i * target.stride + col };
                let to = Tile {
                    main: Stretch {
                        a: a.wrapping_byte_add(row / tile * tile_apart),
                        apart,
                        b: panels.at.wrapping_add(panel * panels.apart),
                        unpacked: panels.unpacked,
                        depth: panels.depth,
                    },
                    thin: thin.map_or(Stretch::NONE, |thin| thin.stretch(row, panel)),
                    c: target.at.wrapping_add(place),
                    c_stride: target.stride,
                    turned: target.turned,
                    cols,
                    add: of.accumulate || self.ks.start > 0,
                    bias,
                };
                // SAFETY: rows and panels are what was prepared, the tile lies within this task's block.
                unsafe { to.compute(s, tile.min(self.rows.len() - row), of.units.in_pairs()) }
            }
        }
    }

    /// The thin term's rows, where they can be read, with its panels.
    #[inline(always)]
    pub(super) fn thin<S: Simd>(&self, s: S, of: Option<(&LowRank<'a>, Panels)>, room: &mut Buffer) -> Option<Thin> {
        let (term, panels) = of?;
        let factor = Factor { mat: term.left, along: true };
        let rows = self.rows.start - term.rows.start..self.rows.end - term.rows.start;
        let (a, apart) = factor.in_place(rows.start, &(0..panels.depth), false).unwrap_or_else(|| {
            let to = room.reserve(rows.len() * panels.depth);
            // SAFETY: there is room for the rows, which exist.
            unsafe { factor.widen(s, rows.clone(), 0..panels.depth, false, panels.depth, to) }
            (to.cast_const(), 4 * panels.depth)
        });
        Some(Thin { a, apart, panels })
    }

    /// Where the rows can be read: the first, bytes from row to row (if they are not side by side), bytes from tile to tile.
    #[inline(always)]
    fn prepare<S: Simd>(&self, s: S, depth: usize, room: &mut Buffer) -> (*const f32, Option<usize>, usize) {
        let (of, tile, pairs) = (self.of, micro::rows::<S>(), self.of.units.in_pairs());
        if let Some((a, apart)) = of.a.in_place(self.rows.start, &self.ks, pairs) {
            return (a, Some(apart), tile * apart);
        }
        let (rows, ks) = (self.rows.clone(), self.ks.clone());
        if of.a.along {
            let apart = depth + APART;
            let to = room.reserve(rows.len() * apart);
            // SAFETY: there is room for the rows, which exist.
            unsafe { of.a.widen(s, rows, ks, pairs, apart, to) }
            (to, Some(4 * apart), tile * 4 * apart)
        } else {
            let apart = tile * depth + APART;
            let to = room.reserve(rows.len().div_ceil(tile) * apart + S::LANES);
            // SAFETY: there is room for the panels and a vector; the rows exist.
            unsafe { of.a.pack_narrow(s, rows, ks, pairs, tile, apart, to) }
            (to, None, 4 * apart)
        }
    }
}
