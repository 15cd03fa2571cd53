//! Rotary positions: pairs of numbers of a head are turned by the angles of their row.
#![expect(unsafe_code, reason = "tasks write disjoint rows of one view")]

use std::ops::Range;

use super::map::{Formula, update};
use super::rows::{Shared, for_chunks};
use crate::kernels::cpu::Cpu;
use crate::kernels::simd::{Body, Simd};
use crate::view::{View, ViewMut};

/// See [`crate::kernels::Kernels::rope`].
pub(super) fn rope(
    cpu: &Cpu,
    x: ViewMut<'_, f32>,
    head_dim: usize,
    cos: View<'_, f32>,
    sin: View<'_, f32>,
    inverse: bool,
) {
    let (rows, cols) = (x.rows(), x.cols());
    assert!(
        head_dim > 0 && head_dim.is_multiple_of(2) && cols.is_multiple_of(head_dim),
        "{cols} of heads of {head_dim}"
    );
    assert_eq!((cos.rows(), cos.cols()), (rows, head_dim / 2), "shape of cos");
    assert_eq!((sin.rows(), sin.cols()), (rows, head_dim / 2), "shape of sin");
    let x = Shared::new(x);
    for_chunks(rows, cols, |rows| cpu.call_f32(Turn { x: &x, cols, half: head_dim / 2, cos, sin, inverse, rows }));
}

/// Turns pairs `a, b` by angles whose sines get a sign.
struct Rotation {
    sign: f32,
}

impl Formula<2, 2> for Rotation {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [cos, sin]: [S::F; 2], [a, b]: [S::F; 2]) -> [S::F; 2] {
        let sin = s.mul(sin, s.splat(self.sign));
        [s.fnma(b, sin, s.mul(a, cos)), s.fma(a, sin, s.mul(b, cos))]
    }
}

/// Some rows.
struct Turn<'a> {
    x: &'a Shared<'a, f32>,
    cols: usize,
    half: usize,
    cos: View<'a, f32>,
    sin: View<'a, f32>,
    inverse: bool,
    rows: Range<usize>,
}

impl Body for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rotation = Rotation { sign: if self.inverse { -1.0 } else { 1.0 } };
        for row in self.rows {
            let (cos, sin) = (self.cos.row(row), self.sin.row(row));
            // SAFETY: a task has its rows to itself.
            let heads = unsafe { self.x.row(row, 0..self.cols) };
            for head in heads.chunks_exact_mut(2 * self.half) {
                let (a, b) = head.split_at_mut(self.half);
                update(s, [cos, sin], [a, b], &rotation);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;
    use crate::kernels::cpu::checks::*;

    #[test]
    fn pairs_are_turned_and_turned_back() {
        for (rows, heads, width) in [(1, 1, 2), (5, 3, 6), (300, 2, 34), (9, 14, 64), (4, 2, 128)] {
            let (half, stride) = (width / 2, heads * width + 3);
            let angles = normal("angles", rows * half);
            let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
            let (cos, sin) = (View::new(&cos, rows, half), View::new(&sin, rows, half));
            let start = normal("x", rows * stride);
            for cpu in cpus() {
                let mut x = start.clone();
                cpu.rope(ViewMut::strided(&mut x, rows, heads * width, stride), width, cos, sin, false);
                for row in 0..rows {
                    for (at, &found) in x[row * stride..][..heads * width].iter().enumerate() {
                        let (head, i) = (at / width * width, at % width);
                        let of = |i: usize| f64::from(start[row * stride + head + i]);
                        let (cos, sin) = (f64::from(cos.row(row)[i % half]), f64::from(sin.row(row)[i % half]));
                        let expected =
                            if i < half { of(i) * cos - of(i + half) * sin } else { of(i) * cos + of(i - half) * sin };
                        assert_within(
                            "x",
                            &[found],
                            &[expected],
                            3e-7 * (of(i % half).abs() + of(i % half + half).abs()),
                        );
                    }
                    // Numbers between the rows are nobody's.
                    let gap = row * stride + heads * width..((row + 1) * stride).min(x.len());
                    assert_eq!(x[gap.clone()], start[gap]);
                }
                for threads in [1, 4] {
                    let mut again = start.clone();
                    let view = ViewMut::strided(&mut again, rows, heads * width, stride);
                    with_threads(threads, || cpu.rope(view, width, cos, sin, false));
                    assert_eq!(bits(&again), bits(&x));
                }
                cpu.rope(ViewMut::strided(&mut x, rows, heads * width, stride), width, cos, sin, true);
                assert_within("there and back", &x, &doubles(&start), 3e-6);
            }
        }
    }
}
