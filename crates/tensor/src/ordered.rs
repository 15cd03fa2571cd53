//! Columns of a matrix in another order.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType, bail};

use crate::scaled::{tensors, with};

/// What [`crate::ops::permute_columns`] says.
pub(crate) fn permute(x_tw: &Tensor, order: &[usize]) -> Result<Tensor> {
    let (_, width) = x_tw.dims2()?;
    let mut back = vec![usize::MAX; width];
    for (at, &from) in order.iter().enumerate() {
        match back.get_mut(from) {
            Some(back) if *back == usize::MAX => *back = at,
            _ => bail!("column {from} of {width}, or twice; expected each of them once"),
        }
    }
    if order.len() != width {
        bail!("{} columns of {width}; expected each of them once", order.len());
    }
    x_tw.contiguous()?.apply_op1(Permuted { order: order.to_vec(), back })
}

struct Permuted {
    order: Vec<usize>,
    back: Vec<usize>,
}

fn ordered<T: WithDType>(x: &[T], order: &[usize]) -> Vec<T> {
    let mut y = Vec::with_capacity(x.len());
    x.chunks_exact(order.len().max(1)).for_each(|row| y.extend(order.iter().map(|&from| row[from])));
    y
}

impl CustomOp1 for Permuted {
    fn name(&self) -> &'static str {
        "permute-columns"
    }

    fn cpu_fwd(&self, x: &CpuStorage, at: &Layout) -> Result<(CpuStorage, Shape)> {
        let made = with(
            (x, at),
            (x, at),
            |x, _| CpuStorage::F32(ordered(x, &self.order)),
            |x, _| CpuStorage::F64(ordered(x, &self.order)),
        )?;
        Ok((made, at.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let narrow = |dy: &[f32], _: &[f32]| Tensor::from_vec(ordered(dy, &self.back), x.shape(), x.device());
        let wide = |dy: &[f64], _: &[f64]| Tensor::from_vec(ordered(dy, &self.back), x.shape(), x.device());
        tensors(&dy, &dy, narrow, wide)?.map(Some)
    }
}
