//! Numbers moved from one place or type to another, and sums of rows.
#![expect(unsafe_code, reason = "tasks write disjoint rows of one view")]

use std::ops::Range;

use super::map::{Added, PIECE, Same, narrow, update, widen, widened};
use super::rows::{Row, RowMut, Scratch, Shared, SharedMat, for_chunks, sum_over_chunks};
use crate::kernels::cpu::Cpu;
use crate::kernels::simd::{Body, Simd};
use crate::view::{MatMut, MatRef, View, ViewMut};

/// See [`crate::kernels::Kernels::convert`].
pub(super) fn convert(cpu: &Cpu, x: MatRef<'_>, y: MatMut<'_>) {
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "shape of the copy");
    let y = SharedMat::new(y);
    for_chunks(x.rows(), x.cols(), |rows| cpu.call(Convert { x, y: &y, rows }));
}

/// Some rows.
struct Convert<'a> {
    x: MatRef<'a>,
    y: &'a SharedMat<'a>,
    rows: Range<usize>,
}

impl Body for Convert<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.x.cols();
        for row in self.rows {
            // SAFETY: a task has its rows to itself.
            match (Row::of(&self.x, row, 0..cols), unsafe { self.y.row(row, 0..cols) }) {
                (Row::F32(x), RowMut::F32(y)) => y.copy_from_slice(x),
                (Row::Bf16(x), RowMut::Bf16(y)) => y.copy_from_slice(x),
                (Row::F32(x), RowMut::Bf16(y)) => narrow(s, x, y, &Same),
                (Row::Bf16(x), RowMut::F32(y)) => widen(s, x, y),
            }
        }
    }
}

/// See [`crate::kernels::Kernels::add`].
pub(super) fn add(cpu: &Cpu, x: MatRef<'_>, y: ViewMut<'_, f32>) {
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "shape of the sum");
    let y = Shared::new(y);
    for_chunks(x.rows(), x.cols(), |rows| cpu.call(Add { x, y: &y, rows }));
}

/// Some rows.
struct Add<'a> {
    x: MatRef<'a>,
    y: &'a Shared<'a, f32>,
    rows: Range<usize>,
}

impl Body for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut room = Scratch::new(PIECE);
        for row in self.rows.clone() {
            for from in (0..self.x.cols()).step_by(PIECE) {
                let cols = from..(from + PIECE).min(self.x.cols());
                let x = widened(s, Row::of(&self.x, row, cols.clone()), &mut room);
                // SAFETY: a task has its rows to itself.
                let y = unsafe { self.y.row(row, cols) };
                update(s, [x], [y], &Added);
            }
        }
    }
}

/// Does `f` to each row.
pub(super) fn each_row(mut y: ViewMut<'_, f32>, f: impl Fn(&mut [f32])) {
    (0..y.rows()).for_each(|row| f(y.row(row)));
}

/// See [`crate::kernels::Kernels::multiply`].
pub(super) fn multiply(x: MatRef<'_>, mut y: ViewMut<'_, f32>) {
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "shape of the product");
    for row in 0..y.rows() {
        match &x {
            MatRef::F32(x) => y.row(row).iter_mut().zip(x.row(row)).for_each(|(y, x)| *y *= x),
            MatRef::Bf16(x) => y.row(row).iter_mut().zip(x.row(row)).for_each(|(y, x)| *y *= x.to_f32()),
        }
    }
}

/// See [`crate::kernels::Kernels::gather`].
pub(super) fn gather(cpu: &Cpu, x: MatRef<'_>, rows: &[u32], mut y: MatMut<'_>, accumulate: bool) {
    assert_eq!((rows.len(), x.cols()), (y.rows(), y.cols()), "shape of what is gathered");
    for (place, &row) in rows.iter().enumerate() {
        let from = x.sub_rows(row as usize, row as usize + 1);
        let to = y.reborrow().into_sub_rows(place, place + 1);
        match to {
            MatMut::F32(to) if accumulate => add(cpu, from, to),
            MatMut::Bf16(_) if accumulate => panic!("a sum of rows in bf16"),
            to => convert(cpu, from, to),
        }
    }
}

/// See [`crate::kernels::Kernels::scatter`].
pub(super) fn scatter(x: View<'_, f32>, rows: &[u32], mut y: ViewMut<'_, f32>) {
    assert_eq!((rows.len(), y.cols()), (x.rows(), x.cols()), "shape of what is scattered");
    for (place, &row) in rows.iter().enumerate() {
        y.row(row as usize).copy_from_slice(x.row(place));
    }
}

/// See [`crate::kernels::Kernels::sum_rows`].
pub(super) fn sum_rows(cpu: &Cpu, x_td: View<'_, f32>, y_d: &mut [f32], accumulate: bool) {
    assert_eq!(x_td.cols(), y_d.len(), "length of the sum");
    if !accumulate {
        y_d.fill(0.0);
    }
    sum_over_chunks(x_td.rows(), x_td.cols(), [y_d], |rows, [sum_d]| cpu.call(Sum { x_td, rows, sum_d }));
}

/// Some rows.
struct Sum<'a> {
    x_td: View<'a, f32>,
    rows: Range<usize>,
    sum_d: &'a mut [f32],
}

impl Body for Sum<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.rows {
            update(s, [self.x_td.row(row)], [&mut *self.sum_d], &Added);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;
    use crate::kernels::cpu::checks::*;
    use candle_core::DType;
    use half::bf16;

    const SHAPES: [(usize, usize); 5] = [(1, 1), (3, 17), (200, 300), (2, 1500), (0, 4)];

    #[test]
    fn conversions_round_to_nearest_even() {
        for (rows, cols) in SHAPES {
            let x = normal("x", rows * cols);
            for cpu in cpus() {
                let (mut narrow, mut back) = (vec![bf16::NAN; rows * cols], vec![f32::NAN; rows * cols]);
                cpu.convert(View::new(&x, rows, cols).into(), ViewMut::new(&mut narrow, rows, cols).into());
                assert_eq!(narrow, rounded(&x));
                cpu.convert(View::new(&narrow, rows, cols).into(), ViewMut::new(&mut back, rows, cols).into());
                assert_eq!(bits(&back), bits(&wide(&narrow)));
                let (mut same, mut same16) = (back.clone(), vec![bf16::NAN; rows * cols]);
                cpu.convert(View::new(&x, rows, cols).into(), ViewMut::new(&mut same, rows, cols).into());
                cpu.convert(View::new(&narrow, rows, cols).into(), ViewMut::new(&mut same16, rows, cols).into());
                assert_eq!((bits(&same), same16), (bits(&x), narrow));
            }
        }
    }

    #[test]
    fn sums_are_those_of_f64_in_either_type() {
        for (rows, cols) in SHAPES {
            let (x, start) = (rounded(&normal("x", rows * cols)), normal("y", rows * cols));
            let x32 = wide(&x);
            for cpu in cpus() {
                let (mut y, mut y16) = (start.clone(), start.clone());
                cpu.add(View::new(&x32, rows, cols).into(), ViewMut::new(&mut y, rows, cols));
                cpu.add(View::new(&x, rows, cols).into(), ViewMut::new(&mut y16, rows, cols));
                let expected: Vec<f32> = start.iter().zip(&x32).map(|(y, x)| y + x).collect();
                assert_eq!((bits(&y), bits(&y16)), (bits(&expected), bits(&expected)));
            }
        }
    }

    #[test]
    fn rows_are_summed_in_an_order_that_threads_do_not_change() {
        for (rows, cols) in SHAPES {
            let stride = cols + 2;
            let x = normal("x", rows * stride);
            let view = View::strided(&x, rows, cols, stride);
            for cpu in cpus() {
                let run = |accumulate: bool| {
                    let mut y = vec![1.0; cols];
                    cpu.sum_rows(view, &mut y, accumulate);
                    y
                };
                let expected = |start: f64| {
                    let of = |col: usize| start + (0..rows).map(|row| f64::from(view.row(row)[col])).sum::<f64>();
                    (0..cols).map(of).collect::<Vec<_>>()
                };
                assert_sums("overwritten", DType::F32, &run(false), &expected(0.0), rows, 1.0);
                assert_sums("added", DType::F32, &run(true), &expected(1.0), rows + 1, 1.0);
                for threads in [1, 2, 4] {
                    assert_eq!(bits(&with_threads(threads, || run(true))), bits(&run(true)));
                }
            }
        }
    }

    #[test]
    fn rows_are_gathered_scattered_multiplied_scaled_and_filled() {
        let x = normal("gathered", 4 * 3);
        let (narrow, wanted) = (rounded(&x), [2u32, 0, 2]);
        for cpu in cpus() {
            let mut y = vec![1.0f32; 9];
            cpu.gather(View::new(&x, 4, 3).into(), &wanted, ViewMut::new(&mut y, 3, 3).into(), true);
            let expected: Vec<f32> =
                wanted.iter().flat_map(|&row| &x[3 * row as usize..][..3]).map(|x| 1.0 + x).collect();
            assert_eq!(bits(&y), bits(&expected));
            let mut copied = vec![bf16::ZERO; 9];
            cpu.gather(View::new(&narrow, 4, 3).into(), &wanted, ViewMut::new(&mut copied, 3, 3).into(), false);
            assert_eq!((copied[0], copied[3], copied[8]), (narrow[6], narrow[0], narrow[8]));
            let mut back = vec![7.0f32; 12];
            cpu.scatter(View::new(&expected, 3, 3).sub_rows(0, 2), &[3, 1], ViewMut::new(&mut back, 4, 3));
            assert_eq!((&back[9..], &back[3..6], back[0], back[6]), (&expected[..3], &expected[3..6], 7.0, 7.0));
            cpu.multiply(View::new(&narrow, 4, 3).into(), ViewMut::new(&mut back, 4, 3));
            assert_eq!(back[0], 7.0 * narrow[0].to_f32());
            cpu.scale(ViewMut::new(&mut back, 4, 3), 0.5);
            assert_eq!(back[0], 3.5 * narrow[0].to_f32());
            cpu.fill(ViewMut::strided(&mut back, 4, 2, 3), 2.0);
            assert_eq!((back[0], back[1], back[2] == 2.0, back[10]), (2.0, 2.0, false, 2.0));
        }
    }
}
