//! The register tile: a few rows of the left factor times one packed panel of the right one.
#![expect(unsafe_code, reason = "the innermost loop reads and writes at pointers")]

use crate::kernels::simd::{Body, Simd};

/// Rows of a tile: with two vectors of columns they fill the registers but for what is being multiplied.
pub(super) const fn rows<S: Simd>() -> usize {
    if S::REGISTERS >= 32 { 12 } else { (S::REGISTERS - 4) / 2 }
}

/// Columns of a panel of which `n` are asked for: two vectors, or one if that is enough and rows do not lie side by side.
pub(super) const fn width<S: Simd>(n: usize, beside: bool) -> usize {
    if n > S::LANES || beside { 2 * S::LANES } else { S::LANES }
}

/// Whether tiles of pairs are compiled: where there is an instruction for them, and for tests with eight lanes.
pub(super) const fn multiplies_pairs<S: Simd>() -> bool {
    S::NATIVE_PAIRS || (cfg!(test) && S::LANES == 8 && S::REGISTERS == 16)
}

/// Numbers of a cache line.
const LINE: usize = 16;
/// How far ahead rows that lie side by side are asked for.
const AHEAD: usize = 64;

/// Rows of a factor and a panel that they are multiplied with.
#[derive(Clone, Copy)]
pub(super) struct Stretch {
    /// The first row's first number, or pair.
    pub(super) a: *const f32,
    /// Bytes from row to row, where numbers along the contraction lie side by side; else rows lie side by side, as many as a
    /// whole tile has.
    pub(super) apart: Option<usize>,
    /// The panel.
    pub(super) b: *const f32,
    /// Numbers from one vector of the panel to the next, where it is not packed.
    pub(super) unpacked: Option<usize>,
    /// Numbers, or pairs, along the contraction.
    pub(super) depth: usize,
}

impl Stretch {
    /// None.
    pub(super) const NONE: Self =
        Self { a: std::ptr::null(), apart: Some(0), b: std::ptr::null(), unpacked: None, depth: 0 };
}

/// What is done to a block of the result of some rows and at most one panel's columns.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) main: Stretch,
    /// A second stretch of the same chain, always of f32 with rows apart; its depth may be zero.
    pub(super) thin: Stretch,
    /// The tile's first number in the result.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// Whether rows of the tile are columns of the result.
    pub(super) turned: bool,
    pub(super) cols: usize,
    /// Whether the result is added to what is there.
    pub(super) add: bool,
    /// Added to each row, or null.
    pub(super) bias: *const f32,
}

impl Tile {
    /// Computes `rows` rows, at most a tile's.
    ///
    /// # Safety
    /// The rows, the panels (of the [`width`] of `cols`) and the place of the result
    /// exist, and no one else uses the latter.
    #[inline(always)]
    pub(super) unsafe fn compute<S: Simd>(mut self, s: S, mut rows: usize, pairs: bool) {
        while rows > 0 {
            // SAFETY: the caller's.
            let done = unsafe {
                match rows {
                    12.. if const { self::rows::<S>() >= 12 } => self.sized::<S, 12>(s, pairs),
                    6.. if const { self::rows::<S>() >= 6 } => self.sized::<S, 6>(s, pairs),
                    4.. if const { self::rows::<S>() >= 4 } => self.sized::<S, 4>(s, pairs),
                    2.. => self.sized::<S, 2>(s, pairs),
                    _ => self.sized::<S, 1>(s, pairs),
                }
            };
            rows -= done;
            self.main.a = self.main.a.wrapping_byte_add(self.main.apart.unwrap_or(4) * done);
            self.thin.a = self.thin.a.wrapping_byte_add(self.thin.apart.unwrap_or(4) * done);
            self.c = self.c.wrapping_add(if self.turned { done } else { self.c_stride * done });
        }
    }

    /// Computes `M` rows; says so.
    #[inline(always)]
    unsafe fn sized<S: Simd, const M: usize>(&self, s: S, pairs: bool) -> usize {
        let of = self;
        // Pairs are multiplied where that is an instruction, and in tests of one other set.
        let pairs = pairs && const { multiplies_pairs::<S>() };
        match (self.main.apart.is_some(), self.cols > S::LANES, pairs) {
            (true, true, false) => s.call(Micro::<M, 2, false, false> { of }),
            (true, false, false) => s.call(Micro::<M, 1, false, false> { of }),
            (false, _, false) => s.call(Micro::<M, 2, true, false> { of }),
            (true, true, true) if const { multiplies_pairs::<S>() } => s.call(Micro::<M, 2, false, true> { of }),
            (true, false, true) if const { multiplies_pairs::<S>() } => s.call(Micro::<M, 1, false, true> { of }),
            (false, _, true) if const { multiplies_pairs::<S>() } => s.call(Micro::<M, 2, true, true> { of }),
            (_, _, true) => unreachable!("pairs are not multiplied by this instruction set"),
        }
        M
    }
}

/// A tile of `M` rows and `V` vectors of columns. `BESIDE`: rows lie side by side. Built by [`Tile::compute`] only, whose
/// caller vouches for the pointers.
struct Micro<'a, const M: usize, const V: usize, const BESIDE: bool, const PAIRS: bool> {
    of: &'a Tile,
}

impl<const M: usize, const V: usize, const BESIDE: bool, const PAIRS: bool> Body for Micro<'_, M, V, BESIDE, PAIRS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Tile { main, thin, c, c_stride, turned, cols, add, bias } = *self.of;
        let mut sums = [[s.zero(); V]; M];
        if !turned {
            for i in 0..M {
                s.prefetch(c.wrapping_add(i * c_stride));
                s.prefetch(c.wrapping_add(i * c_stride + cols - 1));
            }
        }
        // SAFETY: the caller of `compute` vouches for the pointers.
        unsafe {
            chain::<S, M, V, BESIDE, PAIRS>(s, &mut sums, &main);
            if thin.depth > 0 {
                chain::<S, M, V, false, false>(s, &mut sums, &thin);
            }
            if turned {
                // By way of memory that is not the sums' own, which have to stay in registers.
                let mut rows = [[0f32; 32]; M];
                for (row, sums) in rows.iter_mut().zip(sums) {
                    for (v, sum) in sums.into_iter().enumerate() {
                        s.store(&mut row[v * S::LANES..], sum);
                    }
                }
                return scatter(&rows, c, c_stride, cols, add);
            }
            for v in 0..V {
                let at = v * S::LANES;
                // A tile at the right edge may have no column left for its last vectors.
                let n = cols.saturating_sub(at).min(S::LANES);
                if n == 0 {
                    break;
                }
                let bias = if bias.is_null() { None } else { Some(s.load_part_at(bias.add(at), n)) };
                for (i, sums) in sums.into_iter().enumerate() {
                    let c = c.add(i * c_stride + at);
                    let mut x = sums[v];
                    if n == S::LANES {
                        if add {
                            x = s.add(s.load_at(c), x);
                        }
                        if let Some(bias) = bias {
                            x = s.add(x, bias);
                        }
                        s.store_at(c, x);
                    } else {
                        if add {
                            x = s.add(s.load_part_at(c, n), x);
                        }
                        if let Some(bias) = bias {
                            x = s.add(x, bias);
                        }
                        s.store_part_at(c, n, x);
                    }
                }
            }
        }
    }
}

/// Goes on with the chains of a tile along a stretch.
#[inline(always)]
unsafe fn chain<S: Simd, const M: usize, const V: usize, const BESIDE: bool, const PAIRS: bool>(
    s: S,
    sums: &mut [[S::F; V]; M],
    along: &Stretch,
) {
    let apart = along.apart.unwrap_or(0);
    let mut at = Places { rows: [along.a; 4], apart, b: along.b };
    if !BESIDE {
        for (i, row) in at.rows.iter_mut().enumerate() {
            *row = along.a.wrapping_byte_add(opaque(i * 3 * apart));
        }
    }
    let b_apart = along.unpacked.unwrap_or(V * S::LANES);
    let lines = along.depth / LINE;
    for _ in 0..lines {
        if along.unpacked.is_some() {
            for i in 0..LINE {
                s.prefetch(at.b.wrapping_add((LINE + i) * b_apart));
            }
        }
        // The next tile's rows, which no hardware foresees.
        for i in 0..if BESIDE { rows::<S>() } else { M } {
            let ahead = if BESIDE { AHEAD * rows::<S>() * 4 + i * 64 } else { (i + M) * apart };
            s.prefetch(at.rows[0].wrapping_byte_add(ahead));
        }
        for _ in 0..LINE / UNROLLED {
            for p in 0..UNROLLED {
                // SAFETY: the caller's.
                unsafe { step::<S, M, V, BESIDE, PAIRS>(s, sums, &at, p, b_apart) }
            }
            at.advance::<S, BESIDE>(UNROLLED, b_apart);
        }
    }
    for _ in lines * LINE..along.depth {
        // SAFETY: the caller's.
        unsafe { step::<S, M, V, BESIDE, PAIRS>(s, sums, &at, 0, b_apart) }
        at.advance::<S, BESIDE>(1, b_apart);
    }
}

/// Numbers, or pairs, that a loop of chains goes on by at a time.
const UNROLLED: usize = 4;

/// Where a tile's chains are along the contraction.
struct Places {
    /// Every third row, so that an instruction can reach the two after it by itself; one place where rows lie side by side.
    rows: [*const f32; 4],
    apart: usize,
    b: *const f32,
}

impl Places {
    #[inline(always)]
    fn advance<S: Simd, const BESIDE: bool>(&mut self, n: usize, b_apart: usize) {
        for row in &mut self.rows {
            *row = row.wrapping_add(if BESIDE { n * rows::<S>() } else { n });
        }
        self.b = self.b.wrapping_add(n * b_apart);
    }
}

/// The same number, of which the compiler does not know how it was computed: it would compute each row's place from the one
/// before, by an instruction that takes the place of a multiply-add.
#[inline(always)]
fn opaque(mut x: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: no instruction at all.
    unsafe {
        std::arch::asm!("/* {} */", inout(reg) x, options(pure, nomem, nostack, preserves_flags));
    }
    x
}

/// Number, or pair, `p` of each chain of a tile.
#[inline(always)]
unsafe fn step<S: Simd, const M: usize, const V: usize, const BESIDE: bool, const PAIRS: bool>(
    s: S,
    sums: &mut [[S::F; V]; M],
    at: &Places,
    p: usize,
    b_apart: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut columns = [s.zero(); V];
        for (v, columns) in columns.iter_mut().enumerate() {
            *columns = s.load_at(at.b.add(p * b_apart + v * S::LANES));
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            let x = if BESIDE {
                at.rows[0].add(p * rows::<S>() + i).read()
            } else {
                at.rows[i / 3].byte_add(i % 3 * at.apart).add(p).read_unaligned()
            };
            let x = s.splat(x);
            for (sum, columns) in sums.iter_mut().zip(columns) {
                *sum = if PAIRS { s.dot_pairs(x, columns, *sum) } else { s.fma(x, columns, *sum) };
            }
        }
    }
}

/// Stores the rows of a tile as columns of the result.
///
/// # Safety
/// The place of the result exists, and no one else uses it.
#[inline(never)]
unsafe fn scatter<const M: usize>(rows: &[[f32; 32]; M], c: *mut f32, c_stride: usize, cols: usize, add: bool) {
    for j in 0..cols {
        for (i, row) in rows.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe {
                let c = c.add(j * c_stride + i);
                c.write(if add { c.read() + row[j] } else { row[j] });
            }
        }
    }
}
