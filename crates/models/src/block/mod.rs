//! The blocks of a decoder. Each is its `graph`: differentiable operations, valid in f32 and f64, that define it, serve as
//! its oracle, and give its backward by a local reverse pass.

mod attention;
mod embedding;
mod experts;
mod mlp;

use attune_architecture::{Architecture, BlockKind, NormPlacement, Place, Site};
use attune_points::{Error, Result};
use candle_core::Tensor;

pub use crate::cache::BlockCache;
use crate::context::GraphCx;

/// A piece of the trunk between two points of the residual stream.
pub trait Block: Send + Sync {
    /// Its sites, in the order in which it uses them.
    fn sites(&self) -> &[Site];

    /// The layer whose rows it sends to experts, if it does. Its graph's last output is then their probabilities
    /// `probs_te`, which are no stream: nothing above reads them, but a loss may.
    fn routes(&self) -> Option<u32> {
        None
    }

    /// The block's output for the stream `x` (the residual stream, then any side streams), in differentiable operations
    /// only.
    ///
    /// # Errors
    /// Whatever its operations raise.
    fn graph(&self, x: &[Tensor], cx: &GraphCx<'_>) -> Result<Vec<Tensor>>;

    /// The same for rows that follow those in `cache`. Blocks that look at one row at a time need no cache.
    ///
    /// # Errors
    /// Whatever its operations raise.
    fn decode(&self, x: &[Tensor], _cache: &mut BlockCache, cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        self.graph(x, cx)
    }
}

/// The site at `place` among a block's.
pub(crate) fn site(sites: &[Site], place: Place) -> Result<&Site> {
    let found = sites.iter().find(|site| site.place == place);
    found
        .ok_or_else(|| Error::Refused(format!("this model's structure has no {place:?} where its block looks for one")))
}

/// `x + f(norm(x))`, or `norm(x + f(x))` where norms come last.
fn residual(x_td: &Tensor, norm: &Site, cx: &GraphCx<'_>, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    match cx.base.architecture().placement {
        NormPlacement::Pre => Ok((x_td + f(&cx.norm(norm, x_td)?)?)?),
        NormPlacement::Post => cx.norm(norm, &(x_td + f(x_td)?)?),
    }
}

/// The blocks below the head, from the embedding upwards.
pub(crate) fn trunk(architecture: &Architecture) -> Vec<Box<dyn Block>> {
    let blocks = architecture.blocks().into_iter();
    blocks
        .filter_map(|block| -> Option<Box<dyn Block>> {
            Some(match block.kind {
                BlockKind::Embedding => Box::new(embedding::Embedding { sites: block.sites }),
                BlockKind::Attention { layer } => {
                    Box::new(attention::Attention { window: architecture.windows[layer as usize], sites: block.sites })
                }
                BlockKind::Mlp { .. } => Box::new(mlp::Mlp { sites: block.sites }),
                BlockKind::Experts { layer } => {
                    Box::new(experts::Experts { mixture: architecture.experts?, layer, sites: block.sites })
                }
                BlockKind::Head => return None,
            })
        })
        .collect()
}
