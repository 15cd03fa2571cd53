//! Norm, SwiGLU, residual.

use attune_architecture::Site;
use attune_points::Result;
use attune_tensor::ops;
use candle_core::Tensor;

use super::Block;
use crate::context::GraphCx;

pub(super) struct Mlp {
    /// `[post_attention_layernorm, gate_proj, up_proj, down_proj]`.
    pub(super) sites: Vec<Site>,
}

impl Block for Mlp {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn graph(&self, x: &[Tensor], cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        let x_td = &x[0];
        let h_td = cx.norm(&self.sites[0], x_td)?;
        let gate_ti = ops::silu(&cx.linear(&self.sites[1], &h_td)?)?;
        let inner_ti = (gate_ti * cx.linear(&self.sites[2], &h_td)?)?;
        Ok(vec![(x_td + cx.linear(&self.sites[3], &inner_ti)?)?])
    }
}
