//! Functions of vectors applied along slices and rows: a number's result is the same wherever in its row it stands.
#![expect(
    unsafe_code,
    reason = "vectors are loaded and stored through pointers into slices whose lengths were compared"
)]

use std::ops::Range;

use half::bf16;

use super::rows::{Row, RowMut, Scratch, SharedMat, for_chunks};
use crate::kernels::cpu::Cpu;
use crate::kernels::simd::{Body, Simd};
use crate::view::{MatMut, MatRef};

/// The most lanes of any instruction set.
const LANES: usize = 16;

/// Numbers that are widened at a time: what fits the first cache a few times.
pub(super) const PIECE: usize = 512;

/// What maps vectors to vectors on every instruction set. It is a type with an `#[inline(always)]` function, not a closure:
/// closures are compiled without the instructions that they consist of.
pub(super) trait Formula<const I: usize, const O: usize>: Sync {
    /// The results where the inputs are `x` and the outputs were `y`.
    fn at<S: Simd>(&self, s: S, x: [S::F; I], y: [S::F; O]) -> [S::F; O];
}

/// `outputs = f(inputs, outputs)`, number by number.
#[inline(always)]
pub(super) fn update<S: Simd, const I: usize, const O: usize>(
    s: S,
    inputs: [&[f32]; I],
    mut outputs: [&mut [f32]; O],
    f: &impl Formula<I, O>,
) {
    let len = outputs[0].len();
    assert!(inputs.iter().all(|input| input.len() == len) && outputs.iter().all(|output| output.len() == len));
    let whole = len / S::LANES * S::LANES;
    let (mut x, mut y) = ([s.zero(); I], [s.zero(); O]);
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: a vector from there ends within all the slices.
        unsafe {
            for (x, input) in x.iter_mut().zip(&inputs) {
                *x = s.load_at(input.as_ptr().add(at));
            }
            for (y, output) in y.iter_mut().zip(&outputs) {
                *y = s.load_at(output.as_ptr().add(at));
            }
            let results = f.at(s, x, y);
            for (result, output) in results.into_iter().zip(&mut outputs) {
                s.store_at(output.as_mut_ptr().add(at), result);
            }
        }
    }
    if whole < len {
        for (x, input) in x.iter_mut().zip(&inputs) {
            *x = s.load_part(&input[whole..]);
        }
        for (y, output) in y.iter_mut().zip(&outputs) {
            *y = s.load_part(&output[whole..]);
        }
        let results = f.at(s, x, y);
        for (result, output) in results.into_iter().zip(&mut outputs) {
            s.store_part(&mut output[whole..], result);
        }
    }
}

/// Sums of `f(inputs)` over all numbers. Behind their ends the inputs are as `beyond` says, where `f` has to be 0.
#[inline(always)]
pub(super) fn sums<S: Simd, const I: usize, const N: usize>(
    s: S,
    inputs: [&[f32]; I],
    beyond: [f32; I],
    f: &impl Formula<I, N>,
) -> [f32; N] {
    /// Sums beside each other, so that no addition waits for the one before.
    const BESIDE: usize = 4;
    let len = inputs[0].len();
    assert!(inputs.iter().all(|input| input.len() == len));
    let mut sums = [[s.zero(); N]; BESIDE];
    let mut x = [s.zero(); I];
    let mut at = 0;
    while at + BESIDE * S::LANES <= len {
        for (beside, sums) in sums.iter_mut().enumerate() {
            for (x, input) in x.iter_mut().zip(&inputs) {
                // SAFETY: the numbers lie within the slices by the loop's condition.
                *x = unsafe { s.load_at(input.as_ptr().add(at + beside * S::LANES)) };
            }
            let terms = f.at(s, x, [s.zero(); N]);
            for (sum, term) in sums.iter_mut().zip(terms) {
                *sum = s.add(*sum, term);
            }
        }
        at += BESIDE * S::LANES;
    }
    while at < len {
        let count = (len - at).min(S::LANES);
        for ((x, input), beyond) in x.iter_mut().zip(&inputs).zip(beyond) {
            let mut padded = [beyond; LANES];
            padded[..count].copy_from_slice(&input[at..at + count]);
            *x = s.load(&padded);
        }
        let terms = f.at(s, x, [s.zero(); N]);
        for (sum, term) in sums[0].iter_mut().zip(terms) {
            *sum = s.add(*sum, term);
        }
        at += count;
    }
    let [mut total, rest @ ..] = sums;
    for sums in rest {
        for (total, sum) in total.iter_mut().zip(sums) {
            *total = s.add(*total, sum);
        }
    }
    let mut result = [0.0; N];
    for (result, total) in result.iter_mut().zip(total) {
        *result = s.reduce_add(total);
    }
    result
}

/// `x ↦ x`.
pub(super) struct Same;

impl Formula<1, 1> for Same {
    #[inline(always)]
    fn at<S: Simd>(&self, _: S, x: [S::F; 1], _: [S::F; 1]) -> [S::F; 1] {
        x
    }
}

/// `x, y ↦ y + x`.
pub(super) struct Added;

impl Formula<1, 1> for Added {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x]: [S::F; 1], [y]: [S::F; 1]) -> [S::F; 1] {
        [s.add(y, x)]
    }
}

/// `a, b ↦ a b`.
pub(super) struct Product;

impl Formula<2, 1> for Product {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [a, b]: [S::F; 2], _: [S::F; 1]) -> [S::F; 1] {
        [s.mul(a, b)]
    }
}

/// The largest number, or minus infinity; numbers that are none may be passed over.
#[inline(always)]
pub(super) fn highest<S: Simd>(s: S, x: &[f32]) -> f32 {
    let lowest = s.splat(f32::NEG_INFINITY);
    let (mut pairs, mut max) = (x.chunks_exact(2 * S::LANES), [lowest; 2]);
    for pair in &mut pairs {
        max = [s.max(max[0], s.load(pair)), s.max(max[1], s.load(&pair[S::LANES..]))];
    }
    let rest = pairs.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    s.reduce_max(s.max(max[0], max[1])).max(rest)
}

/// `to = from`.
#[inline(always)]
pub(super) fn widen<S: Simd>(s: S, from: &[bf16], to: &mut [f32]) {
    let (mut from, mut to) = (from.chunks_exact(S::LANES), to.chunks_exact_mut(S::LANES));
    for (from, to) in (&mut from).zip(&mut to) {
        s.store(to, s.load_bf16(from));
    }
    for (from, to) in from.remainder().iter().zip(to.into_remainder()) {
        *to = from.to_f32();
    }
}

/// `to = f(from)`, rounded.
#[inline(always)]
pub(super) fn narrow<S: Simd>(s: S, from: &[f32], to: &mut [bf16], f: &impl Formula<1, 1>) {
    let (mut from, mut to) = (from.chunks_exact(S::LANES), to.chunks_exact_mut(S::LANES));
    for (from, to) in (&mut from).zip(&mut to) {
        let [y] = f.at(s, [s.load(from)], [s.zero()]);
        s.store_bf16(to, y);
    }
    let (from, to) = (from.remainder(), to.into_remainder());
    if !to.is_empty() {
        let [y] = f.at(s, [s.load_part(from)], [s.zero()]);
        s.store_bf16_part(to, y);
    }
}

/// The numbers of a row as f32: itself, or widened into `room`.
#[inline(always)]
pub(super) fn widened<'a, S: Simd>(s: S, row: Row<'a>, room: &'a mut [f32]) -> &'a [f32] {
    match row {
        Row::F32(row) => row,
        Row::Bf16(row) => {
            let room = &mut room[..row.len()];
            widen(s, row, room);
            room
        }
    }
}

/// `outputs = formula(inputs)` for matrices of one shape.
pub(super) fn map<const I: usize, const O: usize>(
    cpu: &Cpu,
    inputs: [MatRef<'_>; I],
    outputs: [MatMut<'_>; O],
    formula: &impl Formula<I, O>,
) {
    let shape = (outputs[0].rows(), outputs[0].cols());
    assert!(inputs.iter().all(|input| (input.rows(), input.cols()) == shape), "inputs of another shape than {shape:?}");
    assert!(outputs.iter().all(|output| (output.rows(), output.cols()) == shape), "outputs of another shape");
    let outputs = outputs.map(SharedMat::new);
    for_chunks(shape.0, shape.1, |rows| {
        cpu.call_f32(Rows { inputs, outputs: &outputs, rows, cols: shape.1, formula });
    });
}

/// Some rows of a [`map`].
struct Rows<'a, const I: usize, const O: usize, F> {
    inputs: [MatRef<'a>; I],
    outputs: &'a [SharedMat<'a>; O],
    rows: Range<usize>,
    cols: usize,
    formula: &'a F,
}

impl<const I: usize, const O: usize, F: Formula<I, O>> Body for Rows<'_, I, O, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut room = Scratch::new((I + O) * PIECE);
        for row in self.rows.clone() {
            for from in (0..self.cols).step_by(PIECE) {
                let cols = from..(from + PIECE).min(self.cols);
                let (room_in, room_out) = room.split_at_mut(I * PIECE);
                let mut inputs: [&[f32]; I] = [&[]; I];
                for ((input, mat), room) in inputs.iter_mut().zip(&self.inputs).zip(room_in.chunks_exact_mut(PIECE)) {
                    *input = widened(s, Row::of(mat, row, cols.clone()), room);
                }
                // SAFETY: a task has its rows to itself, and the formula's outputs are different matrices.
                let outputs = self.outputs.each_ref().map(|output| unsafe { output.row(row, cols.clone()) });
                write(s, inputs, outputs, room_out, self.formula);
            }
        }
    }
}

/// `outputs = f(inputs)` by way of `room` where an output is narrower.
#[inline(always)]
pub(super) fn write<S: Simd, const I: usize, const O: usize>(
    s: S,
    inputs: [&[f32]; I],
    mut outputs: [RowMut<'_>; O],
    room: &mut [f32],
    f: &impl Formula<I, O>,
) {
    let len = inputs[0].len();
    let mut rooms = room.chunks_exact_mut(PIECE);
    let wide = outputs.each_mut().map(|output| match output {
        RowMut::F32(output) => &mut **output,
        RowMut::Bf16(_) => &mut rooms.next().unwrap_or_default()[..len],
    });
    update(s, inputs, wide, f);
    let mut rooms = room.chunks_exact(PIECE);
    for output in outputs {
        if let RowMut::Bf16(output) = output {
            narrow(s, &rooms.next().unwrap_or_default()[..len], output, &Same);
        }
    }
}
