//! Rows moved, widened, rounded and added up.

use rayon::prelude::*;

use super::Cpu;
use crate::kernels::simd::{Body, Simd};
use crate::view::{MatMut, MatRef, View, ViewMut};

/// A row in f32.
pub(super) fn read(from: &MatRef<'_>, row: usize, to: &mut [f32]) {
    match from {
        MatRef::F32(view) => to.copy_from_slice(view.row(row)),
        MatRef::Bf16(view) => to.iter_mut().zip(view.row(row)).for_each(|(to, from)| *to = from.to_f32()),
    }
}

/// A row in the type of the matrix.
pub(super) fn write(to: &mut MatMut<'_>, row: usize, from: &[f32]) {
    match to {
        MatMut::F32(view) => view.row(row).copy_from_slice(from),
        MatMut::Bf16(view) => {
            view.row(row).iter_mut().zip(from).for_each(|(to, from)| *to = half::bf16::from_f32(*from));
        }
    }
}

/// `y = x`.
pub(super) fn convert(_: &Cpu, x: MatRef<'_>, mut y: MatMut<'_>) {
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "shapes differ");
    let mut wide = vec![0.0; x.cols()];
    for row in 0..x.rows() {
        read(&x, row, &mut wide);
        write(&mut y, row, &wide);
    }
}

/// `y += x` of one row.
struct AddRow<'a> {
    x: MatRef<'a>,
    y: &'a mut [f32],
}

impl Body for AddRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut y = self.y.chunks_exact_mut(S::LANES);
        match self.x {
            MatRef::F32(x) => {
                let mut x = x.row(0).chunks_exact(S::LANES);
                for (x, y) in (&mut x).zip(&mut y) {
                    s.store(y, s.add(s.load(y), s.load(x)));
                }
                let (x, y) = (x.remainder(), y.into_remainder());
                s.store_part(y, s.add(s.load_part(y), s.load_part(x)));
            }
            MatRef::Bf16(x) => {
                let mut x = x.row(0).chunks_exact(S::LANES);
                for (x, y) in (&mut x).zip(&mut y) {
                    s.store(y, s.add(s.load(y), s.load_bf16(x)));
                }
                let (x, y) = (x.remainder(), y.into_remainder());
                s.store_part(y, s.add(s.load_part(y), s.load_bf16_part(x)));
            }
        }
    }
}

/// `y += x`.
pub(super) fn add(cpu: &Cpu, x: MatRef<'_>, mut y: ViewMut<'_, f32>) {
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "shapes differ");
    let (cols, stride) = (y.cols(), y.stride().max(1));
    y.data().par_chunks_mut(stride).with_min_len(16).enumerate().for_each(|(row, y)| {
        cpu.call(AddRow { x: x.sub_rows(row, row + 1), y: &mut y[..cols] });
    });
}

/// `y_d (+)= Σ_t x_td`.
pub(super) fn sum_rows(_: &Cpu, x_td: View<'_, f32>, y_d: &mut [f32], accumulate: bool) {
    assert_eq!(x_td.cols(), y_d.len(), "widths differ");
    if !accumulate {
        y_d.fill(0.0);
    }
    for row in 0..x_td.rows() {
        y_d.iter_mut().zip(x_td.row(row)).for_each(|(y, x)| *y += x);
    }
}
