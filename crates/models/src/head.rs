//! The last norm and the head, on chosen rows.

use attune_architecture::{Architecture, BlockKind, Site};
use attune_points::Result;
use candle_core::Tensor;

use crate::context::GraphCx;

pub(crate) struct Head {
    /// `[norm, lm_head]`.
    pub(crate) sites: Vec<Site>,
}

impl Head {
    pub(crate) fn new(architecture: &Architecture) -> Self {
        let head = architecture.blocks().into_iter().find(|block| block.kind == BlockKind::Head);
        Self { sites: head.map(|head| head.sites).unwrap_or_default() }
    }

    /// Logits of hidden rows: `h_td` to `logits_tv`.
    pub(crate) fn graph(&self, h_td: &Tensor, cx: &GraphCx<'_>) -> Result<Tensor> {
        cx.linear(&self.sites[1], &cx.norm(&self.sites[0], h_td)?)
    }
}
