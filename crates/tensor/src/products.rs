//! Products of candle's tensors by the kernels: twice as fast as candle's own in f32, and weights are read where they lie.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oiᵀ      dx_ti = dy_to W_oi      dW_oi = dy_toᵀ x_ti
//! ```

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};

use crate::kernels::{self, Gemm, Kernels as _, Operand, Right};
use crate::reading;
use crate::view::{View, ViewMut};

/// A product of matrices in f32, row after row.
pub(crate) fn product<'a>(rows: usize, cols: usize, a: Operand<'a>, b: impl Into<Right<'a>>) -> Vec<f32> {
    let mut to = vec![0.0; rows * cols];
    if !to.is_empty() {
        kernels::cpu().gemm(ViewMut::new(&mut to, rows, cols), &Gemm::new(a, b));
    }
    to
}

/// `x_ti W_oiᵀ` with gradients for both, which are f32.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn linear(x_ti: &Tensor, w_oi: &Tensor) -> Result<Tensor> {
    x_ti.contiguous()?.apply_op2(&w_oi.contiguous()?, Linear)
}

struct Linear;

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "trained-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_at: &Layout, w: &CpuStorage, w_at: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((t, i), (o, width)) = (x_at.shape().dims2()?, w_at.shape().dims2()?);
        if i != width {
            bail!("a linear [{o}, {width}] on [{t}, {i}]; expected a last axis of {width}");
        }
        let (CpuStorage::F32(x), CpuStorage::F32(w)) = (x, w) else { bail!("a linear of other types than f32") };
        let (Some((x_start, x_end)), Some((w_start, w_end))) = (x_at.contiguous_offsets(), w_at.contiguous_offsets())
        else {
            bail!("a linear on numbers that are not in order")
        };
        let (x, w) = (View::new(&x[x_start..x_end], t, i), View::new(&w[w_start..w_end], o, i));
        Ok((CpuStorage::F32(product(t, o, Operand::plain(x), Operand::transposed(w))), Shape::from((t, o))))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, dy_to: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ((t, i), (o, _), dy_to) = (x.dims2()?, w.dims2()?, dy_to.contiguous()?);
        let (x_read, w_read, dy_read) = (reading::read(x)?, reading::read(w)?, reading::read(&dy_to)?);
        let dx = product(t, i, Operand::plain(dy_read.mat()), Operand::plain(w_read.mat()));
        let dw = product(o, i, Operand::transposed(dy_read.mat()), Operand::plain(x_read.mat()));
        Ok((Some(Tensor::from_vec(dx, (t, i), x.device())?), Some(Tensor::from_vec(dw, (o, i), x.device())?)))
    }
}

/// Whether [`linear`] takes a product.
pub(crate) fn takes(x_ti: &Tensor, w_oi: &Tensor) -> bool {
    (x_ti.dtype(), w_oi.dtype()) == (DType::F32, DType::F32) && (x_ti.rank(), w_oi.rank()) == (2, 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd;
    use crate::ops;
    use crate::rng::Rng;
    use crate::testing::assert_close;

    fn normal(name: &str, shape: &[usize], dtype: DType) -> Tensor {
        Rng::new(6, name).normal_tensor(shape, 1.0, DType::F64).unwrap().to_dtype(dtype).unwrap()
    }

    /// What candle makes of the same numbers in f64 is the reference; strides and offsets are as in use.
    #[test]
    fn products_and_their_gradients_are_those_of_f64() {
        for (t, i, o) in [(7, 5, 3), (1, 40, 33), (130, 64, 96)] {
            let run = |dtype| {
                let x = autograd::leaf(&normal("x", &[i, t + 2], dtype)).unwrap();
                let w = autograd::leaf(&normal("w", &[o, i], dtype)).unwrap();
                let cut = x.t().unwrap().narrow(0, 1, t).unwrap();
                let y = ops::linear(&cut, &w, None).unwrap();
                let dy = normal("dy", &[t, o], dtype);
                let mut gradients = autograd::pull(&[&x, &w], &[(&y, &dy)]).unwrap().into_iter().map(Option::unwrap);
                (y.detach(), gradients.next().unwrap(), gradients.next().unwrap())
            };
            let (found, exact) = (run(DType::F32), run(DType::F64));
            assert_close("product", &found.0, &exact.0, i);
            assert_close("by rows", &found.1, &exact.1, o);
            assert_close("by weight", &found.2, &exact.2, t);
        }
    }

    #[test]
    fn widths_that_do_not_fit_are_named() {
        let message = ops::linear(&normal("x", &[2, 4], DType::F32), &normal("w", &[3, 5], DType::F32), None);
        let message = message.unwrap_err().to_string();
        assert!(message.contains("a linear [3, 5] on [2, 4]; expected a last axis of 5"), "{message}");
    }
}
