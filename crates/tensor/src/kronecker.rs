//! Kronecker products, block by block as they lie.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType};

use crate::scaled::{tensors, with};

/// `C_ab ⊗ D_cd`, `[a c, b d]`.
pub(crate) fn product(c_ab: &Tensor, d_cd: &Tensor) -> Result<Tensor> {
    let ((a, b), (c, d)) = (c_ab.dims2()?, d_cd.dims2()?);
    c_ab.contiguous()?.apply_op2(&d_cd.contiguous()?, Kronecker { a, b, c, d })
}

struct Kronecker {
    a: usize,
    b: usize,
    c: usize,
    d: usize,
}

impl Kronecker {
    /// Does `f` for every run of `d` numbers of the product: the places of the number of C and of the row of D that it is made of, and
    /// the run's own.
    fn runs(&self, mut f: impl FnMut(usize, usize, usize)) {
        let Self { a, b, c, d } = *self;
        for (p, r, q) in (0..a).flat_map(|p| (0..c).flat_map(move |r| (0..b).map(move |q| (p, r, q)))) {
            f(p * b + q, r * d, ((p * c + r) * b + q) * d);
        }
    }

    fn forward<T: WithDType>(&self, left: &[T], right: &[T]) -> Vec<T> {
        let mut y = vec![T::zero(); left.len() * right.len()];
        self.runs(|at, row, run| {
            let value = left[at];
            y[run..run + self.d].iter_mut().zip(&right[row..]).for_each(|(y, &r)| *y = value * r);
        });
        y
    }

    fn by_left<T: WithDType>(&self, right: &[T], dy: &[T]) -> Vec<T> {
        let mut dc = vec![T::zero(); self.a * self.b];
        self.runs(|at, row, run| {
            let sum = |sum, (&dy, &r): (&T, &T)| sum + dy * r;
            dc[at] += dy[run..run + self.d].iter().zip(&right[row..]).fold(T::zero(), sum);
        });
        dc
    }

    fn by_right<T: WithDType>(&self, left: &[T], dy: &[T]) -> Vec<T> {
        let mut dd = vec![T::zero(); self.c * self.d];
        self.runs(|at, row, run| {
            let value = left[at];
            dd[row..row + self.d].iter_mut().zip(&dy[run..]).for_each(|(dd, &dy)| *dd += value * dy);
        });
        dd
    }
}

impl CustomOp2 for Kronecker {
    fn name(&self) -> &'static str {
        "kronecker"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_at: &Layout, v: &CpuStorage, v_at: &Layout) -> Result<(CpuStorage, Shape)> {
        let made = with(
            (x, x_at),
            (v, v_at),
            |x, v| CpuStorage::F32(self.forward(x, v)),
            |x, v| CpuStorage::F64(self.forward(x, v)),
        )?;
        Ok((made, Shape::from((self.a * self.c, self.b * self.d))))
    }

    fn bwd(&self, left: &Tensor, right: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let by_left = |r: &[f32], dy: &[f32]| Tensor::from_vec(self.by_left(r, dy), left.shape(), left.device());
        let by_left_wide = |r: &[f64], dy: &[f64]| Tensor::from_vec(self.by_left(r, dy), left.shape(), left.device());
        let by_right = |l: &[f32], dy: &[f32]| Tensor::from_vec(self.by_right(l, dy), right.shape(), right.device());
        let by_right_wide =
            |l: &[f64], dy: &[f64]| Tensor::from_vec(self.by_right(l, dy), right.shape(), right.device());
        let dc = if left.track_op() { Some(tensors(right, &dy, by_left, by_left_wide)??) } else { None };
        let dd = if right.track_op() { Some(tensors(left, &dy, by_right, by_right_wide)??) } else { None };
        Ok((dc, dd))
    }
}
