//! Matrices of circulant blocks, each one row that is rotated from row to row.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};

use crate::scaled::{tensors, with};

/// What [`crate::ops::circulant`] says.
pub(crate) fn blocks(kernel_mnb: &Tensor) -> Result<Tensor> {
    let (m, n, b) = kernel_mnb.dims3()?;
    kernel_mnb.contiguous()?.apply_op1(Circulant { m, n, b })
}

struct Circulant {
    m: usize,
    n: usize,
    b: usize,
}

impl Circulant {
    /// Does `f` for each row of each block: how far it is rotated, where its kernel begins, and where it lies.
    fn rows(&self, mut f: impl FnMut(usize, usize, usize)) {
        let Self { m, n, b } = *self;
        for (p, k, q) in (0..m).flat_map(|p| (0..b).flat_map(move |k| (0..n).map(move |q| (p, k, q)))) {
            f(k, (p * n + q) * b, ((p * b + k) * n + q) * b);
        }
    }

    fn forward<T: WithDType>(&self, kernel: &[T]) -> Vec<T> {
        let (b, mut y) = (self.b, vec![T::zero(); kernel.len() * self.b]);
        self.rows(|k, from, to| {
            y[to + k..to + b].copy_from_slice(&kernel[from..from + b - k]);
            y[to..to + k].copy_from_slice(&kernel[from + b - k..from + b]);
        });
        y
    }

    fn backward<T: WithDType>(&self, dy: &[T]) -> Vec<T> {
        let (b, mut sums) = (self.b, vec![T::zero(); dy.len() / self.b.max(1)]);
        let add = |to: &mut [T], from: &[T]| to.iter_mut().zip(from).for_each(|(to, &from)| *to += from);
        self.rows(|k, from, to| {
            add(&mut sums[from..from + b - k], &dy[to + k..to + b]);
            add(&mut sums[from + b - k..from + b], &dy[to..to + k]);
        });
        sums
    }
}

impl CustomOp1 for Circulant {
    fn name(&self) -> &'static str {
        "circulant"
    }

    fn cpu_fwd(&self, x: &CpuStorage, at: &Layout) -> Result<(CpuStorage, Shape)> {
        let narrow = |x: &[f32], _: &[f32]| CpuStorage::F32(self.forward(x));
        let wide = |x: &[f64], _: &[f64]| CpuStorage::F64(self.forward(x));
        let made = with((x, at), (x, at), narrow, wide)?;
        Ok((made, Shape::from((self.m * self.b, self.n * self.b))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let narrow = |dy: &[f32], _: &[f32]| Tensor::from_vec(self.backward(dy), x.shape(), x.device());
        let wide = |dy: &[f64], _: &[f64]| Tensor::from_vec(self.backward(dy), x.shape(), x.device());
        tensors(&dy, &dy, narrow, wide)?.map(Some)
    }
}
