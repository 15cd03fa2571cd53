//! The last norm and the head, on chosen rows.

use attune_architecture::{Architecture, BlockKind, Place, Site};
use attune_points::Result;
use candle_core::Tensor;

use crate::block::site;
use crate::context::GraphCx;

pub(crate) struct Head {
    /// The last norm and the head.
    pub(crate) sites: Vec<Site>,
}

impl Head {
    pub(crate) fn new(architecture: &Architecture) -> Self {
        let head = architecture.blocks().into_iter().find(|block| block.kind == BlockKind::Head);
        Self { sites: head.map(|head| head.sites).unwrap_or_default() }
    }

    /// Logits of hidden rows: `h_td` to `logits_tv`.
    pub(crate) fn graph(&self, h_td: &Tensor, cx: &GraphCx<'_>) -> Result<Tensor> {
        let h_td = cx.norm(site(&self.sites, Place::FinalNorm)?, h_td)?;
        cx.linear(site(&self.sites, Place::Head)?, &h_td)
    }
}
