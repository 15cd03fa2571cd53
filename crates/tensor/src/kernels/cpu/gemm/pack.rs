//! Factors as numbers along the contraction, and how they are laid out for register tiles.
#![expect(unsafe_code, reason = "vector loads and stores at pointers")]

use std::ops::Range;

use half::bf16;

use crate::kernels::Operand;
use crate::kernels::simd::Simd;
use crate::view::MatRef;

/// A factor seen as rows along the contraction: the left one as it is, the right one transposed.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a> {
    pub(super) mat: MatRef<'a>,
    /// Whether numbers along the contraction lie side by side; else those across it do.
    pub(super) along: bool,
}

/// Numbers by which packed rows and panels are moved apart, so that they do not compete for the same lines of a cache.
pub(super) const APART: usize = 16;

/// How many rows ahead numbers that lie side by side are asked for.
pub(super) const AHEAD: usize = 8;

impl<'a> Factor<'a> {
    pub(super) fn left(of: Operand<'a>) -> Self {
        Self { mat: of.mat, along: !of.transposed }
    }

    pub(super) fn right(of: Operand<'a>) -> Self {
        Self { mat: of.mat, along: of.transposed }
    }

    /// Rows across the contraction.
    pub(super) const fn outer(&self) -> usize {
        if self.along { self.mat.rows() } else { self.mat.cols() }
    }

    /// Numbers along the contraction.
    pub(super) const fn depth(&self) -> usize {
        if self.along { self.mat.cols() } else { self.mat.rows() }
    }

    /// Where the number (outer, p) is.
    #[inline(always)]
    fn place(&self, outer: usize, p: usize, stride: usize) -> usize {
        if self.along { outer * stride + p } else { p * stride + outer }
    }

    /// Where the rows from `outer` on can be read as they are, from `ks` on: the place of the first, and how many bytes apart
    /// they begin. Not if they would have to be widened, padded to a pair or turned.
    pub(super) fn in_place(&self, outer: usize, ks: &Range<usize>, pairs: bool) -> Option<(*const f32, usize)> {
        match self.mat {
            _ if !self.along => None,
            MatRef::F32(view) if !pairs => {
                let at = self.place(outer, ks.start, view.stride());
                Some((view.data().as_ptr().wrapping_add(at), 4 * view.stride()))
            }
            MatRef::Bf16(view) if pairs && ks.len().is_multiple_of(2) => {
                let at = self.place(outer, ks.start, view.stride());
                Some((view.data().as_ptr().wrapping_add(at).cast(), 2 * view.stride()))
            }
            MatRef::F32(_) | MatRef::Bf16(_) => None,
        }
    }

    /// Where the numbers of the rows from `outer` on lie side by side, from `p` on: the place of the first, and how many numbers
    /// further the next ones are. Not if they would have to be widened or turned.
    pub(super) fn across(&self, outer: usize, p: usize) -> Option<(*const f32, usize)> {
        match self.mat {
            MatRef::F32(view) if !self.along => {
                let at = self.place(outer, p, view.stride());
                Some((view.data().as_ptr().wrapping_add(at), view.stride()))
            }
            _ => None,
        }
    }

    /// Lays rows `outer`, which lie along the contraction, out as a panel: for each number (or pair) along `ks` one of each row,
    /// `width` of them, a multiple of the vector's length; zeros where there is no row.
    ///
    /// # Safety
    /// At `to` there is room for `width` numbers for each number or pair of `ks`. The rows and numbers exist.
    #[inline(always)]
    pub(super) unsafe fn turn_panel<S: Simd>(
        &self,
        s: S,
        outer: Range<usize>,
        ks: Range<usize>,
        pairs: bool,
        width: usize,
        to: *mut f32,
    ) {
        debug_assert!(self.along && outer.len() <= width && width.is_multiple_of(S::LANES));
        for group in (0..width).step_by(S::LANES) {
            let rows = (outer.start + group).min(outer.end)..(outer.start + group + S::LANES).min(outer.end);
            // SAFETY: the group lies within the panel, whose rows the caller vouches for.
            unsafe {
                let to = to.add(group);
                if pairs {
                    self.turn_pairs(s, rows, ks.clone(), width, to);
                } else {
                    self.turn(s, rows, ks.clone(), width, to);
                }
            }
        }
    }

    /// Lays rows `outer`, which lie across the contraction, out as panels of two vectors of rows, `apart` numbers after each
    /// other: for each number (or pair) along `ks` one of each row. The rows of a last panel that is not full are `last` wide,
    /// zeros where there is no row. What lies side by side is read from one end to the other.
    ///
    /// # Safety
    /// At `to` there is room for the panels. The rows and numbers exist.
    #[inline(always)]
    pub(super) unsafe fn copy_panels<S: Simd>(
        &self,
        s: S,
        outer: Range<usize>,
        ks: Range<usize>,
        pairs: bool,
        (apart, last): (usize, usize),
        to: *mut f32,
    ) {
        debug_assert!(!self.along);
        let (width, step) = (2 * S::LANES, 1 + usize::from(pairs));
        let full = outer.len() / width;
        for (unit, p) in ks.clone().step_by(step).enumerate() {
            // SAFETY: the caller's; the loops end with the rows.
            unsafe {
                match self.mat {
                    MatRef::F32(view) if !pairs => {
                        let from = view.data().as_ptr().add(p * view.stride() + outer.start);
                        for panel in 0..full {
                            let (from, to) = (from.add(panel * width), to.add(panel * apart + unit * width));
                            s.prefetch(from.wrapping_add(AHEAD * view.stride()));
                            s.store_at(to, s.load_at(from));
                            s.store_at(to.add(S::LANES), s.load_at(from.add(S::LANES)));
                        }
                    }
                    MatRef::Bf16(view) if !pairs => {
                        let from = view.data().as_ptr().add(p * view.stride() + outer.start);
                        for panel in 0..full {
                            let (from, to) = (from.add(panel * width), to.add(panel * apart + unit * width));
                            s.store_at(to, s.load_bf16_at(from));
                            s.store_at(to.add(S::LANES), s.load_bf16_at(from.add(S::LANES)));
                        }
                    }
                    MatRef::Bf16(view) if p + 1 < ks.end => {
                        let from = view.data().as_ptr().add(p * view.stride() + outer.start);
                        for panel in 0..full {
                            let (even, to) = (from.add(panel * width), to.add(panel * apart + unit * width));
                            let odd = even.add(view.stride());
                            s.prefetch(even.wrapping_add(2 * AHEAD * view.stride()).cast());
                            s.prefetch(odd.wrapping_add(2 * AHEAD * view.stride()).cast());
                            for group in [0, S::LANES] {
                                let pairs = s.pair(s.load_bf16_at(even.add(group)), s.load_bf16_at(odd.add(group)));
                                s.store_at(to.add(group), pairs);
                            }
                        }
                    }
                    _ => {
                        for panel in 0..full {
                            for group in [0, S::LANES] {
                                let x = self.load_across(
                                    s,
                                    outer.start + panel * width + group,
                                    S::LANES,
                                    p..ks.end,
                                    pairs,
                                );
                                s.store_at(to.add(panel * apart + unit * width + group), x);
                            }
                        }
                    }
                }
                if full * width < outer.len() {
                    for group in (0..last).step_by(S::LANES) {
                        let row = (outer.start + full * width + group).min(outer.end);
                        let x = self.load_across(s, row, (outer.end - row).min(S::LANES), p..ks.end, pairs);
                        s.store_at(to.add(full * apart + unit * last + group), x);
                    }
                }
            }
        }
    }

    /// Lays rows `outer` out as panels of `width` rows each, `apart` numbers after each other, for rows that lie across the
    /// contraction. Lanes beyond a panel's width are overwritten by what follows, and beyond the last row left as they are.
    ///
    /// # Safety
    /// At `to` there is room for all panels and a vector; `apart >= width ·` numbers or pairs of `ks`. The rows and numbers
    /// exist.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "a layout, spelt out")]
    pub(super) unsafe fn pack_narrow<S: Simd>(
        &self,
        s: S,
        outer: Range<usize>,
        ks: Range<usize>,
        pairs: bool,
        width: usize,
        apart: usize,
        to: *mut f32,
    ) {
        debug_assert!(!self.along && width <= S::LANES);
        let step = 1 + usize::from(pairs);
        // Panels of which a whole vector can be read.
        let whole = if outer.len() < S::LANES { 0 } else { (outer.len() - S::LANES) / width + 1 };
        let panels = outer.len().div_ceil(width);
        for (unit, p) in ks.clone().step_by(step).enumerate() {
            // SAFETY: as many numbers exist as are read; a vector at each panel's place is within the room, and what it
            // overwrites of a later place is written after it.
            unsafe {
                let to = to.add(unit * width);
                match self.mat {
                    MatRef::F32(view) if !pairs => {
                        let from = view.data().as_ptr().add(p * view.stride() + outer.start);
                        for panel in 0..whole {
                            let from = from.add(panel * width);
                            s.prefetch(from.wrapping_add(AHEAD * view.stride()));
                            s.store_at(to.add(panel * apart), s.load_at(from));
                        }
                    }
                    MatRef::Bf16(view) if !pairs => {
                        let from = view.data().as_ptr().add(p * view.stride() + outer.start);
                        for panel in 0..whole {
                            s.store_at(to.add(panel * apart), s.load_bf16_at(from.add(panel * width)));
                        }
                    }
                    _ => {
                        for panel in 0..whole {
                            let x = self.load_across(s, outer.start + panel * width, S::LANES, p..ks.end, pairs);
                            s.store_at(to.add(panel * apart), x);
                        }
                    }
                }
                for panel in whole..panels {
                    let row = outer.start + panel * width;
                    let x = self.load_across(s, row, (outer.end - row).min(S::LANES), p..ks.end, pairs);
                    s.store_at(to.add(panel * apart), x);
                }
            }
        }
    }

    /// Widens rows `outer`, or copies their pairs with a zero after the last of an odd number: `apart` numbers or pairs from
    /// row to row, for rows along the contraction.
    ///
    /// # Safety
    /// There is room for the rows at `to`. The rows and numbers exist.
    #[inline(always)]
    pub(super) unsafe fn widen<S: Simd>(
        &self,
        s: S,
        outer: Range<usize>,
        ks: Range<usize>,
        pairs: bool,
        apart: usize,
        to: *mut f32,
    ) {
        debug_assert!(self.along);
        for (row, outer) in outer.enumerate() {
            // SAFETY: `ks` of a row exist, and the room for them.
            unsafe {
                let to = to.add(row * apart);
                if pairs {
                    let to = to.cast::<bf16>();
                    let MatRef::Bf16(view) = self.mat else { unreachable!("pairs are of bf16") };
                    let from = view.data().as_ptr().add(self.place(outer, ks.start, view.stride()));
                    std::ptr::copy_nonoverlapping(from, to, ks.len());
                    if !ks.len().is_multiple_of(2) {
                        to.add(ks.len()).write(bf16::ZERO);
                    }
                    continue;
                }
                let full = ks.len() / S::LANES * S::LANES;
                for p in (0..full).step_by(S::LANES) {
                    s.store_at(to.add(p), self.load(s, outer, ks.start + p));
                }
                let rest = ks.len() - full;
                if rest > 0 {
                    s.store_part_at(to.add(full), rest, self.load_part(s, outer, ks.start + full, rest));
                }
            }
        }
    }

    /// Lays rows `outer`, which lie across the contraction, out as rows of pairs along it, `apart` pairs from row to row, with
    /// a zero after the last of an odd number.
    ///
    /// # Safety
    /// There is room for the rows at `to`, and `apart` is at least the next multiple of a vector's length. The rows and numbers
    /// exist.
    #[inline(always)]
    pub(super) unsafe fn turn_rows<S: Simd>(
        &self,
        s: S,
        outer: Range<usize>,
        ks: Range<usize>,
        apart: usize,
        to: *mut f32,
    ) {
        debug_assert!(!self.along);
        let units = ks.len().div_ceil(2);
        for row in outer.clone().step_by(S::LANES) {
            let n = (outer.end - row).min(S::LANES);
            for unit in (0..units).step_by(S::LANES) {
                s.transpose(
                    #[inline(always)]
                    |i| {
                        let p = ks.start + 2 * (unit + i);
                        // SAFETY: the caller's; numbers beyond the last are not asked for.
                        if p < ks.end { unsafe { self.load_across(s, row, n, p..ks.end, true) } } else { s.zero() }
                    },
                    #[inline(always)]
                    |j, x| {
                        if j < n {
                            // SAFETY: the caller's.
                            unsafe { s.store_at(to.add((row - outer.start + j) * apart + unit), x) }
                        }
                    },
                );
            }
        }
    }

    /// Where (outer, p) would be.
    #[inline(always)]
    pub(super) fn address(&self, outer: usize, p: usize) -> *const f32 {
        match self.mat {
            MatRef::F32(view) => view.data().as_ptr().wrapping_add(self.place(outer, p, view.stride())),
            MatRef::Bf16(view) => view.data().as_ptr().wrapping_add(self.place(outer, p, view.stride())).cast(),
        }
    }

    /// A vector from (outer, p) on, along what lies side by side.
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, s: S, outer: usize, p: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe {
            match self.mat {
                MatRef::F32(view) => s.load_at(view.data().as_ptr().add(self.place(outer, p, view.stride()))),
                MatRef::Bf16(view) => s.load_bf16_at(view.data().as_ptr().add(self.place(outer, p, view.stride()))),
            }
        }
    }

    /// The first `n` of it, then zeros.
    #[inline(always)]
    pub(super) unsafe fn load_part<S: Simd>(&self, s: S, outer: usize, p: usize, n: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe {
            if n == S::LANES {
                return self.load(s, outer, p);
            }
            match self.mat {
                MatRef::F32(view) => s.load_part_at(view.data().as_ptr().add(self.place(outer, p, view.stride())), n),
                MatRef::Bf16(view) => {
                    s.load_bf16_part_at(view.data().as_ptr().add(self.place(outer, p, view.stride())), n)
                }
            }
        }
    }

    /// For the first number or pair of `ks` one of each of `n` rows from `row` on, then zeros, where rows lie across.
    #[inline(always)]
    unsafe fn load_across<S: Simd>(&self, s: S, row: usize, n: usize, ks: Range<usize>, pairs: bool) -> S::F {
        // SAFETY: the caller's.
        unsafe {
            let first = self.load_part(s, row, ks.start, n);
            if !pairs {
                return first;
            }
            s.pair(first, if ks.len() > 1 { self.load_part(s, row, ks.start + 1, n) } else { s.zero() })
        }
    }

    /// A group of a panel whose rows lie along the contraction.
    #[inline(always)]
    unsafe fn turn<S: Simd>(&self, s: S, rows: Range<usize>, ks: Range<usize>, width: usize, to: *mut f32) {
        let full = if rows.len() == S::LANES { ks.len() / S::LANES * S::LANES } else { 0 };
        for p in (0..full).step_by(S::LANES) {
            // SAFETY: the caller's; whole vectors exist.
            unsafe {
                s.transpose(
                    #[inline(always)]
                    |i| {
                        s.prefetch(self.address(rows.start + i, ks.start + p + AHEAD * S::LANES));
                        self.load(s, rows.start + i, ks.start + p)
                    },
                    #[inline(always)]
                    |j, x| s.store_at(to.add((p + j) * width), x),
                );
            }
        }
        for p in (full..ks.len()).step_by(S::LANES) {
            let n = (ks.len() - p).min(S::LANES);
            // SAFETY: the caller's; parts are asked for where whole vectors may not exist.
            unsafe {
                s.transpose(
                    #[inline(always)]
                    |i| {
                        if i < rows.len() { self.load_part(s, rows.start + i, ks.start + p, n) } else { s.zero() }
                    },
                    #[inline(always)]
                    |j, x| {
                        if j < n {
                            s.store_at(to.add((p + j) * width), x);
                        }
                    },
                );
            }
        }
    }

    /// The same in pairs.
    #[inline(always)]
    unsafe fn turn_pairs<S: Simd>(&self, s: S, rows: Range<usize>, ks: Range<usize>, width: usize, to: *mut f32) {
        let MatRef::Bf16(view) = self.mat else { unreachable!("pairs are of bf16") };
        let units = ks.len().div_ceil(2);
        for unit in (0..units).step_by(S::LANES) {
            let numbers = (ks.len() - 2 * unit).min(2 * S::LANES);
            s.transpose(
                #[inline(always)]
                |i| {
                    if i >= rows.len() {
                        return s.zero();
                    }
                    // SAFETY: the caller's; what is missing of a vector is taken from zeros.
                    unsafe {
                        let at = self.place(rows.start + i, ks.start + 2 * unit, view.stride());
                        let from = view.data().as_ptr().add(at);
                        if numbers == 2 * S::LANES {
                            s.prefetch(from.cast::<f32>().wrapping_add(AHEAD * S::LANES));
                            return s.load_at(from.cast());
                        }
                        let mut rest = [bf16::ZERO; 32];
                        std::ptr::copy_nonoverlapping(from, rest.as_mut_ptr(), numbers);
                        s.load_at(rest.as_ptr().cast())
                    }
                },
                #[inline(always)]
                |j, x| {
                    if unit + j < units {
                        // SAFETY: the caller's.
                        unsafe { s.store_at(to.add((unit + j) * width), x) }
                    }
                },
            );
        }
    }
}
