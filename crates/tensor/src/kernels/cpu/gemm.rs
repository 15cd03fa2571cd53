//! Products of matrices.

use super::Cpu;
use super::copy::read;
use crate::kernels::{Gemm, Operand};
use crate::view::ViewMut;

/// All of a factor, `[rows, cols]` of it.
fn wide(of: &Operand<'_>) -> Vec<f32> {
    let (rows, cols) = of.shape();
    let mut stored = vec![0.0; rows * cols];
    for (row, out) in stored.chunks_exact_mut(of.mat.cols().max(1)).enumerate() {
        read(&of.mat, row, out);
    }
    if !of.transposed {
        return stored;
    }
    (0..rows * cols).map(|at| stored[at % cols * rows + at / cols]).collect()
}

/// See [`Gemm`].
pub(super) fn gemm(_: &Cpu, mut c_mn: ViewMut<'_, f32>, of: &Gemm<'_>) {
    let ((m, k), (k_b, n)) = (of.a.shape(), of.b.shape());
    assert_eq!((k, m, n), (k_b, c_mn.rows(), c_mn.cols()), "shapes of a product do not fit");
    let (a, b) = (wide(&of.a), wide(&of.b));
    for i in 0..m {
        let c = c_mn.row(i);
        if !of.accumulate {
            c.fill(0.0);
        }
        for (p, a) in a[i * k..][..k].iter().enumerate() {
            c.iter_mut().zip(&b[p * n..][..n]).for_each(|(c, b)| *c += a * b);
        }
        if let Some(bias) = of.bias {
            c.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
        }
    }
    for term in of.low_rank {
        let right = wide(&term.right);
        let mut left = vec![0.0; term.left.cols()];
        for (at, i) in term.rows.clone().enumerate() {
            read(&term.left, at, &mut left);
            for (r, left) in left.iter().enumerate() {
                c_mn.row(i).iter_mut().zip(&right[r * n..][..n]).for_each(|(c, b)| *c += left * b);
            }
        }
    }
}
