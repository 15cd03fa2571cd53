//! Norm, rotary grouped-query attention, residual.

use attune_architecture::Site;
use attune_points::Result;
use attune_tensor::ops;
use candle_core::Tensor;

use super::{Block, BlockCache};
use crate::attention::{attend, mask};
use crate::context::GraphCx;
use crate::rope::RopeTables;

pub(super) struct Attention {
    /// `[input_layernorm, q_proj, k_proj, v_proj, o_proj]`.
    pub(super) sites: Vec<Site>,
    pub(super) window: Option<u64>,
}

impl Attention {
    /// Queries `[T, H, W]`, keys and values `[T, K, W]`, not yet rotated.
    fn project(&self, x_td: &Tensor, cx: &GraphCx<'_>) -> Result<(Tensor, Tensor, Tensor)> {
        let h_td = cx.norm(&self.sites[0], x_td)?;
        let width = cx.base.architecture().head_dim;
        let heads = |site: &Site| -> Result<Tensor> {
            let y = cx.linear(site, &h_td)?;
            let (t, o) = y.dims2()?;
            Ok(y.reshape((t, o / width, width))?)
        };
        Ok((heads(&self.sites[1])?, heads(&self.sites[2])?, heads(&self.sites[3])?))
    }
}

impl Block for Attention {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn graph(&self, x: &[Tensor], cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        let x_td = &x[0];
        let (q, k, v) = self.project(x_td, cx)?;
        let RopeTables { cos, sin } = &cx.plan.rope;
        let (q, k) = (ops::rope(&q, cos, sin)?, ops::rope(&k, cos, sin)?);
        let o = cx.plan.attend(&q, &k, &v, self.window)?;
        Ok(vec![(x_td + cx.linear(&self.sites[4], &o)?)?])
    }

    fn decode(&self, x: &[Tensor], cache: &mut BlockCache, cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        let x_td = &x[0];
        let (q, k, v) = self.project(x_td, cx)?;
        let (start, rows) = (cache.rows(), q.dim(0)?);
        let RopeTables { cos, sin } = RopeTables::new(cx.base.architecture(), &[rows], start, cx.dtype)?;
        let (q, k) = (ops::rope(&q, &cos, &sin)?, ops::rope(&k, &cos, &sin)?);
        let (k, v) = cache.extend(&k, &v)?;
        let keys = start + rows;
        let mask = mask(rows, keys, self.window, cx.dtype)?;
        let o = attend(&q.unsqueeze(0)?, &k.unsqueeze(0)?, &v.unsqueeze(0)?, mask.as_ref())?;
        Ok(vec![(x_td + cx.linear(&self.sites[4], &o)?)?])
    }
}
