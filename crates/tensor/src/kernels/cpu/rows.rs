//! Rows that several tasks write at once, chunks of rows whose bounds depend on the shape alone, and rows as f32 whatever
//! their type.
#![expect(unsafe_code, reason = "tasks write disjoint parts of one view, which the borrow checker cannot see")]

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

use half::bf16;
use rayon::prelude::*;

use crate::view::{MatMut, MatRef, ViewMut};

/// Below this many numbers a thread has finished before another has woken up.
const WORTH_SHARING: usize = 1 << 15;

/// Numbers in a chunk of rows: enough to hide what a task costs, few enough to balance.
const CHUNK: usize = 1 << 14;

/// Runs `f` on ranges of `rows` rows of `cols` numbers. The ranges depend on nothing else.
pub(super) fn for_chunks(rows: usize, cols: usize, f: impl Fn(Range<usize>) + Sync) {
    let each = (CHUNK / cols.max(1)).max(1);
    for_tasks(rows.div_ceil(each), rows * cols >= WORTH_SHARING, |chunk| {
        f(chunk * each..((chunk + 1) * each).min(rows));
    });
}

/// Runs `f` for each of `count` tasks: on all threads if that is worth it, else here.
pub(super) fn for_tasks(count: usize, worth_sharing: bool, f: impl Fn(usize) + Sync) {
    if worth_sharing && count > 1 {
        (0..count).into_par_iter().with_max_len(1).for_each(&f);
    } else {
        (0..count).for_each(f);
    }
}

/// A view that is written by several tasks, each its own part.
#[derive(Debug)]
pub(super) struct Shared<'a, T> {
    first: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a mutable borrow of numbers; that its parts do not overlap is the contract of `row` and `rows`.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(mut view: ViewMut<'a, T>) -> Self {
        let (rows, cols, stride) = (view.rows(), view.cols(), view.stride());
        Self { first: view.data().as_mut_ptr(), rows, cols, stride, borrow: PhantomData }
    }

    /// Columns `cols` of a row.
    ///
    /// # Safety
    /// No other reference to these numbers lives.
    #[expect(clippy::mut_from_ref, reason = "that is what it is for")]
    #[inline(always)]
    pub(super) unsafe fn row(&self, row: usize, cols: Range<usize>) -> &mut [T] {
        assert!(row < self.rows && cols.start <= cols.end && cols.end <= self.cols, "row {row} of {}", self.rows);
        // SAFETY: within the view by the assertion; nobody else's by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.stride + cols.start), cols.len()) }
    }
}

/// [`Shared`] rows of either type.
#[derive(Debug)]
pub(super) enum SharedMat<'a> {
    F32(Shared<'a, f32>),
    Bf16(Shared<'a, bf16>),
}

impl<'a> SharedMat<'a> {
    pub(super) fn new(mat: MatMut<'a>) -> Self {
        match mat {
            MatMut::F32(view) => Self::F32(Shared::new(view)),
            MatMut::Bf16(view) => Self::Bf16(Shared::new(view)),
        }
    }

    /// Columns `cols` of a row.
    ///
    /// # Safety
    /// No other reference to these numbers lives.
    #[inline(always)]
    pub(super) unsafe fn row(&self, row: usize, cols: Range<usize>) -> RowMut<'_> {
        match self {
            // SAFETY: the caller's promise.
            Self::F32(shared) => RowMut::F32(unsafe { shared.row(row, cols) }),
            // SAFETY: the caller's promise.
            Self::Bf16(shared) => RowMut::Bf16(unsafe { shared.row(row, cols) }),
        }
    }
}

/// Part of a row, in one of the types of a [`MatRef`].
#[derive(Debug, Clone, Copy)]
pub(super) enum Row<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// The same, to be written.
#[derive(Debug)]
pub(super) enum RowMut<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl<'a> Row<'a> {
    #[inline(always)]
    pub(super) fn of(mat: &MatRef<'a>, row: usize, cols: Range<usize>) -> Self {
        match mat {
            MatRef::F32(view) => Self::F32(&view.row(row)[cols]),
            MatRef::Bf16(view) => Self::Bf16(&view.row(row)[cols]),
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Numbers of this thread's own memory, which it gets back when they are dropped. Several may live at once, also when a
/// thread that waits for others takes up another task.
#[derive(Debug)]
pub(super) struct Scratch {
    buffer: Vec<f32>,
    /// Where the numbers begin: at a cache line.
    first: usize,
    len: usize,
}

impl Scratch {
    /// `len` numbers, whatever they were.
    pub(super) fn new(len: usize) -> Self {
        let mut buffer = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
        if buffer.len() < len + LINE {
            buffer.resize(len + LINE, 0.0);
        }
        let first = buffer.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        Self { buffer, first, len }
    }
}

impl Deref for Scratch {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.buffer[self.first..][..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[self.first..][..self.len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        SCRATCH.with_borrow_mut(|buffers| buffers.push(buffer));
    }
}

/// Numbers in a cache line.
pub(super) const LINE: usize = 16;

/// Takes `len` numbers, rounded up to whole cache lines, off the front.
pub(super) fn take<'a>(scratch: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (taken, rest) = std::mem::take(scratch).split_at_mut(len.next_multiple_of(LINE));
    *scratch = rest;
    &mut taken[..len]
}

/// Rows in a chunk of a sum over rows.
const SUMMED: usize = 32;

/// `totals += Σ_chunks f(chunk)`: `f` is given rows, and zeros to add their share of each total to. Totals are of one
/// length; the chunks depend on the number of rows alone, and are added in order.
pub(super) fn sum_over_chunks<const N: usize>(
    rows: usize,
    cols: usize,
    totals: [&mut [f32]; N],
    f: impl Fn(Range<usize>, [&mut [f32]; N]) + Sync,
) {
    let (chunks, len) = (rows.div_ceil(SUMMED), totals.first().map_or(0, |total| total.len()));
    let mut parts = Scratch::new(chunks * N * len);
    let shared = Shared::new(ViewMut::new(&mut parts, chunks * N, len));
    for_tasks(chunks, rows * cols >= WORTH_SHARING, |chunk| {
        // SAFETY: a task has its parts to itself.
        let parts = std::array::from_fn(|part| unsafe { shared.row(chunk * N + part, 0..len) });
        let parts = parts.map(|part: &mut [f32]| {
            part.fill(0.0);
            part
        });
        f(chunk * SUMMED..((chunk + 1) * SUMMED).min(rows), parts);
    });
    for (part, total) in totals.into_iter().enumerate() {
        for chunk in 0..chunks {
            let from = &parts[(chunk * N + part) * len..][..len];
            total.iter_mut().zip(from).for_each(|(total, from)| *total += from);
        }
    }
}
