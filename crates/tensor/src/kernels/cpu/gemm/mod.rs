//! Products of matrices.
//!
//! A product is cut into blocks of rows and columns, one task each; a block packs the columns of the right factor into
//! panels as wide as a register tile, and multiplies rows of the left one, read where they lie, with one panel after
//! another.
//!
//! The one invariant: what a number of the result is depends on its row of the left factor, its column of the right one and
//! the instruction set only. Each is a chain of multiply-adds along the contraction, from the first to the last of stretches
//! of fixed length, and these sums are added in order; blocks, tiles and their remainders only say where a chain runs.
#![expect(unsafe_code, reason = "tasks write disjoint blocks of one matrix")]

use std::ops::Range;

use rayon::prelude::*;

use super::{Cpu, Isa, Proof};
#[cfg(target_arch = "x86_64")]
use crate::kernels::simd::amx::Amx;
use crate::kernels::simd::{Body, Simd};
use crate::kernels::{Gemm, LowRank, Matmul, Right};
use crate::view::{MatRef, ViewMut};

mod block;
mod columns;
mod micro;
mod pack;
mod scratch;
#[cfg(target_arch = "x86_64")]
mod split;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tiles;

use block::Block;
use columns::Columns;
use pack::Factor;

/// Multiply-adds below which the pool costs more than it brings.
const SERIAL: usize = 1 << 18;
/// Multiply-adds that a task should have at least.
const TASK: usize = 1 << 19;
/// Widths up to which numbers of f32 are not multiplied by parts.
const THIN: usize = 32;
/// Tasks a thread of products by parts.
const SLACK: usize = 1;
/// Columns of a block of these at most.
const COLS_PARTS: usize = 512;
/// Columns of a block at most: its packed panels stay in the second cache.
const COLS: usize = 256;

/// A product with its factors as numbers along the contraction, and where the result goes.
struct Product<'a> {
    /// Its rows are the rows of register tiles.
    a: Factor<'a>,
    /// The columns of register tiles.
    b: Columns<'a>,
    low_rank: &'a [LowRank<'a>],
    bias: Option<&'a [f32]>,
    accumulate: bool,
    c: Target,
    units: Units,
}

impl Product<'_> {
    /// What is multiplied at a time of a thin term: tiles where all else is and both its factors are of its type.
    fn thin_units(&self, term: &LowRank<'_>) -> Units {
        match (self.units, term.left, term.right.mat) {
            #[cfg(target_arch = "x86_64")]
            (Units::Tiles(_), MatRef::Bf16(_), MatRef::Bf16(_)) | (Units::Parts(_), MatRef::F32(_), MatRef::F32(_)) => {
                self.units
            }
            _ => Units::Numbers,
        }
    }
}

/// What is multiplied at a time.
#[derive(Clone, Copy)]
enum Units {
    /// Numbers of f32.
    Numbers,
    /// Pairs of bf16.
    Pairs,
    /// Tiles of pairs.
    #[cfg(target_arch = "x86_64")]
    Tiles(Amx),
    /// Tiles of pairs of two parts of each number of f32.
    #[cfg(target_arch = "x86_64")]
    Parts(Amx),
}

impl Units {
    /// Whether factors are packed in pairs.
    const fn in_pairs(self) -> bool {
        !matches!(self, Self::Numbers)
    }

    /// Numbers along the contraction that are packed together.
    const fn group(self) -> usize {
        match self {
            Self::Numbers => 1,
            Self::Pairs => 2,
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(_) | Self::Parts(_) => tiles::DEEP,
        }
    }

    /// Parts of a number.
    const fn parts(self) -> usize {
        match self {
            Self::Numbers | Self::Pairs => 1,
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(_) => 1,
            #[cfg(target_arch = "x86_64")]
            Self::Parts(_) => 2,
        }
    }
}

/// Where the result goes.
#[derive(Clone, Copy)]
struct Target {
    at: *mut f32,
    stride: usize,
    /// Whether rows of tiles are columns of the result.
    turned: bool,
}

// SAFETY: blocks of one product are disjoint, and no other reference to the result exists while they are computed.
unsafe impl Sync for Target {}

/// What [`Gemm`] says.
pub(super) fn gemm(cpu: &Cpu, c_mn: ViewMut<'_, f32>, of: &Gemm<'_>) {
    product(cpu, c_mn, of, multiplies_pairs(cpu, of));
}

fn multiplies_pairs(cpu: &Cpu, of: &Gemm<'_>) -> bool {
    let both = matches!(of.a.mat, MatRef::Bf16(_)) && of.b.is_narrow();
    both && matches!(cpu.isa(), Isa::Avx512Bf16 | Isa::Amx)
}

/// Several products, whose tasks are shared out together.
pub(super) fn gemms(cpu: &Cpu, products: &mut [(ViewMut<'_, f32>, Gemm<'_>)]) {
    let mut cut: Vec<(Cut, Product<'_>)> = Vec::with_capacity(products.len());
    for (c_mn, of) in products {
        if let Some(of) = prepared(cpu, c_mn.reborrow(), of, multiplies_pairs(cpu, of)) {
            cut.push((cpu.call(Grid { of: &of }), of));
        }
    }
    let products = cut;
    let tasks = |at: usize| (0..products[at].0.tasks()).map(move |task| (at, task));
    let tasks: Vec<(usize, usize)> = (0..products.len()).flat_map(tasks).collect();
    let run = |&(at, task): &(usize, usize)| products[at].0.run(cpu, &products[at].1, task);
    if tasks.len() < 2 {
        tasks.iter().for_each(run);
    } else {
        tasks.par_iter().with_max_len(1).for_each(run);
    }
}

fn product(cpu: &Cpu, c_mn: ViewMut<'_, f32>, of: &Gemm<'_>, pairs: bool) {
    let Some(of) = prepared(cpu, c_mn, of, pairs) else { return };
    let grid = cpu.call(Grid { of: &of });
    if grid.tasks() == 1 {
        grid.run(cpu, &of, 0);
    } else {
        (0..grid.tasks()).into_par_iter().with_max_len(1).for_each(|task| grid.run(cpu, &of, task));
    }
}

/// A product ready to be cut; none if it has no number. It holds the place of the result, which the caller keeps from others as
/// long as it runs.
fn prepared<'a>(cpu: &Cpu, mut c_mn: ViewMut<'_, f32>, of: &Gemm<'a>, pairs: bool) -> Option<Product<'a>> {
    let (m, n) = (c_mn.rows(), c_mn.cols());
    check(m, n, of);
    if m == 0 || n == 0 {
        return None;
    }
    // Thin results are as fast in numbers. How many rows there are must not matter.
    let wide = matches!(of.a.mat, MatRef::F32(_)) && !of.b.is_narrow() && n > THIN;
    let units = match cpu.proof {
        #[cfg(target_arch = "x86_64")]
        Proof::Amx(_, tiles) if wide && cpu.matmul == Matmul::High => Units::Parts(tiles),
        _ if !pairs => Units::Numbers,
        #[cfg(target_arch = "x86_64")]
        Proof::Amx(_, tiles) => Units::Tiles(tiles),
        _ if cpu.call(MultipliesPairs) => Units::Pairs,
        _ => Units::Numbers,
    };
    let a = Factor::left(of.a);
    // Thin results of a transposed left factor: its columns lie side by side as panels want them. Not by parts, where the order
    // of the sums says which factor is the left one.
    let thin = n < m && n <= 64 && of.low_rank.is_empty() && of.bias.is_none();
    let turns = thin && !a.along && units.parts() == 1;
    let (a, b, turned) = match of.b {
        Right::Dense(b) if turns => (Factor::right(b), Columns::Dense(a), true),
        Right::Dense(b) => (a, Columns::Dense(Factor::right(b)), false),
        Right::Quantized { mat, transposed } => (a, Columns::Quantized { mat, along: transposed }, false),
    };
    let c = Target { at: c_mn.data().as_mut_ptr(), stride: c_mn.stride(), turned };
    Some(Product { a, b, low_rank: of.low_rank, bias: of.bias, accumulate: of.accumulate, c, units })
}

fn check(m: usize, n: usize, of: &Gemm<'_>) {
    let (a, b) = (of.a.shape(), of.b.shape());
    assert!(a == (m, b.0) && b.1 == n, "[{m}, {n}] is not a product of {a:?} and {b:?}");
    assert!(of.bias.is_none_or(|bias| bias.len() == n), "a bias of other width than {n}");
    let mut end = 0;
    for term in of.low_rank {
        assert!(end <= term.rows.start && term.rows.start <= term.rows.end && term.rows.end <= m, "rows of terms");
        assert_eq!(term.left.rows(), term.rows.len(), "rows of a thin term");
        assert_eq!((term.left.cols(), n), term.right.shape(), "a thin term does not fit");
        end = term.rows.end;
    }
}

/// Asks whether tiles of pairs are compiled.
struct MultipliesPairs;

impl Body for MultipliesPairs {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> bool {
        micro::multiplies_pairs::<S>()
    }
}

/// How a product is cut into tasks.
struct Cut {
    rows: usize,
    cols: usize,
    /// Rows and columns of tasks.
    tasks: (usize, usize),
    /// Rows and columns of a register tile.
    tile: (usize, usize),
}

/// Finds the cut; a body because tiles depend on the instruction set.
struct Grid<'p, 'a> {
    of: &'p Product<'a>,
}

impl Body for Grid<'_, '_> {
    type Output = Cut;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Cut {
        let (rows, cols, depth) = (self.of.a.outer(), self.of.b.outer(), self.of.a.depth());
        let tile = match self.of.units {
            #[cfg(target_arch = "x86_64")]
            Units::Tiles(_) | Units::Parts(_) => (tiles::BLOCK, tiles::BLOCK),
            _ => (micro::rows::<S>(), 2 * S::LANES),
        };
        let work = rows * cols * (depth + self.of.low_rank.iter().map(|term| term.left.cols()).max().unwrap_or(0));
        let threads = rayon::current_num_threads();
        let panels = cols.div_ceil(tile.1);
        let least = cols.div_ceil(COLS);
        if work < SERIAL || threads == 1 {
            return Cut { rows, cols, tasks: (1, least), tile };
        }
        #[cfg(target_arch = "x86_64")]
        if let Units::Parts(_) = self.of.units {
            // Both factors are laid out anew for each task: as few times as leave something to share out.
            let most = rows.div_ceil(tiles::ROWS);
            let cuts = (1..=panels).map(|across| (((SLACK * threads).div_ceil(across)).min(most), across));
            let apart = |&(down, across): &(usize, usize)| rows * across + cols * down;
            let wide = cuts.filter(|&(_, across)| across >= cols.div_ceil(COLS_PARTS));
            return Cut { rows, cols, tasks: wide.min_by_key(apart).unwrap_or((1, least)), tile };
        }
        let wanted = (4 * threads).min(work.div_ceil(TASK));
        // Columns first: what is packed for a block is used by all its rows.
        let across = least.max(wanted.min(panels / 4)).max(1).next_multiple_of(threads).min(panels);
        let down = wanted.div_ceil(across).min(rows.div_ceil(8 * tile.0));
        Cut { rows, cols, tasks: (down, across), tile }
    }
}

impl Cut {
    fn tasks(&self) -> usize {
        self.tasks.0 * self.tasks.1
    }

    fn run(&self, cpu: &Cpu, of: &Product<'_>, task: usize) {
        let rows = part(self.rows, self.tile.0, task / self.tasks.1, self.tasks.0);
        let cols = part(self.cols, self.tile.1, task % self.tasks.1, self.tasks.1);
        scratch::with(|scratch| cpu.call(Block { of, rows, cols, scratch }));
    }
}

/// The part `at` of `parts` of `len` numbers, cut between groups of `group`.
fn part(len: usize, group: usize, at: usize, parts: usize) -> Range<usize> {
    let groups = len.div_ceil(group);
    (groups * at / parts * group).min(len)..(groups * (at + 1) / parts * group).min(len)
}
