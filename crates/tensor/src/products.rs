//! Products of candle's tensors by the kernels: twice as fast as candle's own in f32, and weights are read where they lie. A factor that
//! no gradient goes to has none computed.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oiᵀ      dx_ti = dy_to W_oi      dW_oi = dy_toᵀ x_ti
//! y_mn = a_mk b_kn       da_mk = dy_mn b_knᵀ     db_kn = a_mkᵀ dy_mn         or many of one shape, [p, m, k] and [p, k, n]
//! ```

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};

use crate::kernels::{self, Gemm, Kernels as _, Operand, Right};
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
    let ((t, i), (o, width)) = (x_ti.dims2()?, w_oi.dims2()?);
    if i != width {
        bail!("a linear [{o}, {width}] on [{t}, {i}]; expected a last axis of {width}");
    }
    x_ti.contiguous()?.apply_op2(&w_oi.contiguous()?, Product { a: Side::Plain, b: Side::Turned })
}

/// `a_mk b_kn` with gradients for both, which are f32; of many, one by one.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op2(&b.contiguous()?, Product { a: Side::Plain, b: Side::Plain })
}

/// `a_kmᵀ b_kn` with gradients for both, which are f32.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn turned(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op2(&b.contiguous()?, Product { a: Side::Turned, b: Side::Plain })
}

/// A factor, as it is or turned.
#[derive(Clone, Copy)]
enum Side {
    Plain,
    Turned,
}

impl Side {
    const fn other(self) -> Self {
        match self {
            Self::Plain => Self::Turned,
            Self::Turned => Self::Plain,
        }
    }
}

/// How many matrices a tensor is, and how large they are.
fn matrices(shape: &Shape) -> Result<(usize, usize, usize)> {
    match *shape.dims() {
        [rows, cols] => Ok((1, rows, cols)),
        [count, rows, cols] => Ok((count, rows, cols)),
        _ => bail!("a product of {shape:?}; expected a matrix, or many"),
    }
}

fn values<'s>(storage: &'s CpuStorage, at: &Layout) -> Result<&'s [f32]> {
    match (storage, at.contiguous_offsets()) {
        (CpuStorage::F32(all), Some((start, end))) => Ok(&all[start..end]),
        (CpuStorage::F32(_), None) => bail!("a product of numbers that are not in order"),
        _ => bail!("a product of other types than f32"),
    }
}

/// The products of the matrices of two factors, one by one.
fn products(
    (a, (count, a_rows, a_cols), a_side): (&[f32], (usize, usize, usize), Side),
    (b, (others, b_rows, b_cols), b_side): (&[f32], (usize, usize, usize), Side),
) -> Result<(Vec<f32>, (usize, usize))> {
    let turned = |(rows, cols), side| match side {
        Side::Plain => (rows, cols),
        Side::Turned => (cols, rows),
    };
    let ((m, k), (inner, n)) = (turned((a_rows, a_cols), a_side), turned((b_rows, b_cols), b_side));
    if k != inner || count != others {
        bail!("a product of {count} matrices [{m}, {k}] and {others} of [{inner}, {n}]; expected as many, {k} high");
    }
    let mut to = vec![0.0; count * m * n];
    if to.is_empty() || k == 0 {
        return Ok((to, (m, n)));
    }
    let operand = |values, rows, cols, side| match side {
        Side::Plain => Operand::plain(View::new(values, rows, cols)),
        Side::Turned => Operand::transposed(View::new(values, rows, cols)),
    };
    let pairs = a.chunks_exact(a_rows * a_cols).zip(b.chunks_exact(b_rows * b_cols));
    let each = to.chunks_exact_mut(m * n).zip(pairs).map(|(to, (a, b))| {
        let of = Gemm::new(operand(a, a_rows, a_cols, a_side), operand(b, b_rows, b_cols, b_side));
        (ViewMut::new(to, m, n), of)
    });
    match count {
        1 => each.for_each(|(to, of)| kernels::cpu().gemm(to, &of)),
        _ => kernels::cpu().gemms(each.collect()),
    }
    Ok((to, (m, n)))
}

/// The gradient by a factor, as a tensor of its shape, if one goes there: the product of two others.
fn gradient(of: &Tensor, (a, a_side): (&Tensor, Side), (b, b_side): (&Tensor, Side)) -> Result<Option<Tensor>> {
    if !of.track_op() {
        return Ok(None);
    }
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let ((a_read, a_at), (b_read, b_at)) = (a.storage_and_layout(), b.storage_and_layout());
    let (candle_core::Storage::Cpu(a_read), candle_core::Storage::Cpu(b_read)) = (&*a_read, &*b_read) else {
        bail!("a product on a device; expected one in memory")
    };
    let (to, _) = products(
        (values(a_read, a_at)?, matrices(a.shape())?, a_side),
        (values(b_read, b_at)?, matrices(b.shape())?, b_side),
    )?;
    Tensor::from_vec(to, of.shape(), of.device()).map(Some)
}

/// A product of two factors, each as it is or turned.
struct Product {
    a: Side,
    b: Side,
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(&self, a: &CpuStorage, a_at: &Layout, b: &CpuStorage, b_at: &Layout) -> Result<(CpuStorage, Shape)> {
        let of_a = (values(a, a_at)?, matrices(a_at.shape())?, self.a);
        let (to, (m, n)) = products(of_a, (values(b, b_at)?, matrices(b_at.shape())?, self.b))?;
        let shape = match *a_at.dims() {
            [count, _, _] => Shape::from((count, m, n)),
            _ => Shape::from((m, n)),
        };
        Ok((CpuStorage::F32(to), shape))
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let da = match self.a {
            Side::Plain => gradient(a, (dy, Side::Plain), (b, self.b.other()))?,
            Side::Turned => gradient(a, (b, self.b), (dy, Side::Turned))?,
        };
        let db = match self.b {
            Side::Plain => gradient(b, (a, self.a.other()), (dy, Side::Plain))?,
            Side::Turned => gradient(b, (dy, Side::Turned), (a, self.a))?,
        };
        Ok((da, db))
    }
}

/// Whether [`linear`] takes a product.
pub(crate) fn takes(x_ti: &Tensor, w_oi: &Tensor) -> bool {
    (x_ti.dtype(), w_oi.dtype()) == (DType::F32, DType::F32) && (x_ti.rank(), w_oi.rank()) == (2, 2)
}

/// Whether [`matmul`] takes a product.
pub(crate) fn takes_matmul(a: &Tensor, b: &Tensor) -> bool {
    (a.dtype(), b.dtype()) == (DType::F32, DType::F32) && matches!((a.rank(), b.rank()), (2, 2) | (3, 3))
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

    /// The same of products that are not turned, of one and of many; one factor may be a transpose.
    #[test]
    fn products_of_many_and_their_gradients_are_those_of_f64() {
        for (shape_a, shape_b) in
            [(vec![7, 5], vec![5, 3]), (vec![6, 16, 4], vec![6, 4, 9]), (vec![1, 40, 33], vec![1, 33, 2])]
        {
            let run = |dtype| {
                let last = shape_a.len() - 1;
                let mut turned = shape_a.clone();
                turned.swap(last - 1, last);
                let a = autograd::leaf(&normal("a", &turned, dtype)).unwrap();
                let b = autograd::leaf(&normal("b", &shape_b, dtype)).unwrap();
                let y = ops::matmul(&a.t().unwrap(), &b).unwrap();
                let dy = normal("dy", y.dims(), dtype);
                let mut gradients = autograd::pull(&[&a, &b], &[(&y, &dy)]).unwrap().into_iter().map(Option::unwrap);
                (y.detach(), gradients.next().unwrap(), gradients.next().unwrap())
            };
            let (found, exact) = (run(DType::F32), run(DType::F64));
            assert_close("product", &found.0, &exact.0, 40);
            assert_close("by the left", &found.1, &exact.1, 40);
            assert_close("by the right", &found.2, &exact.2, 40);
        }
    }

    #[test]
    fn products_with_a_turned_factor_and_their_gradients_are_those_of_f64() {
        let run = |dtype| {
            let a = autograd::leaf(&normal("a", &[40, 7], dtype)).unwrap();
            let b = autograd::leaf(&normal("b", &[40, 9], dtype)).unwrap();
            let y = ops::matmul_turned(&a, &b).unwrap();
            let dy = normal("dy", y.dims(), dtype);
            let mut gradients = autograd::pull(&[&a, &b], &[(&y, &dy)]).unwrap().into_iter().map(Option::unwrap);
            (y.detach(), gradients.next().unwrap(), gradients.next().unwrap())
        };
        let (found, exact) = (run(DType::F32), run(DType::F64));
        assert_close("product", &found.0, &exact.0, 40);
        assert_close("by the left", &found.1, &exact.1, 9);
        assert_close("by the right", &found.2, &exact.2, 7);
    }

    #[test]
    fn what_is_frozen_has_no_gradient_and_others_have_theirs() {
        let (x, w) = (autograd::leaf(&normal("x", &[4, 6], DType::F32)).unwrap(), normal("w", &[3, 6], DType::F32));
        let y = ops::linear(&x, &w, None).unwrap();
        let dy = y.ones_like().unwrap();
        let op = Product { a: Side::Plain, b: Side::Turned };
        let (by_x, by_w) = op.bwd(&x, &w, &y, &dy).unwrap();
        assert!(by_x.is_some() && by_w.is_none());
        let turned = ops::linear(&w, &x, None).unwrap();
        let by_w = op.bwd(&w, &x, &turned, &turned.ones_like().unwrap()).unwrap();
        assert!(by_w.0.is_none() && by_w.1.is_some());
    }

    #[test]
    fn widths_that_do_not_fit_are_named() {
        let message = ops::linear(&normal("x", &[2, 4], DType::F32), &normal("w", &[3, 5], DType::F32), None);
        let message = message.unwrap_err().to_string();
        assert!(message.contains("a linear [3, 5] on [2, 4]; expected a last axis of 5"), "{message}");
    }
}
