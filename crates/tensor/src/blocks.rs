//! Columns of a matrix turned block by block, as they lie: products of small squares, for which copies of the matrix in another order
//! would take longer than what is multiplied.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType, bail};

use crate::scaled::{tensors, with};

/// What [`crate::ops::turn_columns`] says.
pub(crate) fn turn(w_oi: &Tensor, r_nbb: &Tensor) -> Result<Tensor> {
    let ((_, i), (n, b, other)) = (w_oi.dims2()?, r_nbb.dims3()?);
    if b == 0 || b != other || !i.is_multiple_of(b) || (n != 1 && n * b != i) {
        bail!("{n} blocks [{b}, {other}] for {i} columns; expected squares that fill them, or one");
    }
    w_oi.contiguous()?.apply_op2(&r_nbb.contiguous()?, Turn { n, b })
}

struct Turn {
    n: usize,
    b: usize,
}

/// Each block with its rows and columns changed.
fn transposed<T: WithDType>(r: &[T], b: usize) -> Vec<T> {
    let block = |r: &[T]| (0..b * b).map(|at| r[at % b * b + at / b]).collect::<Vec<T>>();
    r.chunks_exact(b * b).flat_map(block).collect()
}

impl Turn {
    /// Each row, block by block, times the blocks as they lie: row c of a block is added to what is made, times number c of the row.
    fn times<T: WithDType>(&self, w: &[T], i: usize, blocks: &[T]) -> Vec<T> {
        let b = self.b;
        let mut y = vec![T::zero(); w.len()];
        for (y, w) in y.chunks_exact_mut(i).zip(w.chunks_exact(i)) {
            for (at, (y, w)) in y.chunks_exact_mut(b).zip(w.chunks_exact(b)).enumerate() {
                let block = &blocks[at % self.n * b * b..][..b * b];
                for (row, &value) in block.chunks_exact(b).zip(w) {
                    y.iter_mut().zip(row).for_each(|(y, &r)| *y += value * r);
                }
            }
        }
        y
    }

    /// `dR_pc = Σ_o dy_op w_oc` of each block.
    fn by_blocks<T: WithDType>(&self, w: &[T], dy: &[T], i: usize) -> Vec<T> {
        let b = self.b;
        let mut dr = vec![T::zero(); self.n * b * b];
        for (w, dy) in w.chunks_exact(i).zip(dy.chunks_exact(i)) {
            for (at, (w, dy)) in w.chunks_exact(b).zip(dy.chunks_exact(b)).enumerate() {
                let block = &mut dr[at % self.n * b * b..][..b * b];
                for (row, &value) in block.chunks_exact_mut(b).zip(dy) {
                    row.iter_mut().zip(w).for_each(|(dr, &w)| *dr += value * w);
                }
            }
        }
        dr
    }
}

impl CustomOp2 for Turn {
    fn name(&self) -> &'static str {
        "turn-columns"
    }

    fn cpu_fwd(&self, w: &CpuStorage, w_at: &Layout, r: &CpuStorage, r_at: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, i) = w_at.shape().dims2()?;
        let made = with(
            (w, w_at),
            (r, r_at),
            |w, r| CpuStorage::F32(self.times(w, i, &transposed(r, self.b))),
            |w, r| CpuStorage::F64(self.times(w, i, &transposed(r, self.b))),
        )?;
        Ok((made, w_at.shape().clone()))
    }

    fn bwd(&self, w: &Tensor, r: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ((_, i), dy) = (w.dims2()?, dy.contiguous()?);
        let by_w = |dy: &[f32], r: &[f32]| Tensor::from_vec(self.times(dy, i, r), w.shape(), w.device());
        let by_w_wide = |dy: &[f64], r: &[f64]| Tensor::from_vec(self.times(dy, i, r), w.shape(), w.device());
        let dw = if w.track_op() { Some(tensors(&dy, r, by_w, by_w_wide)??) } else { None };
        let by_r = |w: &[f32], dy: &[f32]| Tensor::from_vec(self.by_blocks(w, dy, i), r.shape(), r.device());
        let by_r_wide = |w: &[f64], dy: &[f64]| Tensor::from_vec(self.by_blocks(w, dy, i), r.shape(), r.device());
        let dr = if r.track_op() { Some(tensors(w, &dy, by_r, by_r_wide)??) } else { None };
        Ok((dw, dr))
    }
}
