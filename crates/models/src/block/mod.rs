//! The blocks of a decoder. Each is its `graph`: differentiable operations, valid in f32 and f64, that define it, serve as
//! its oracle, and give its backward by a local reverse pass.

mod attention;
mod embedding;
mod mlp;

use attune_architecture::{Architecture, BlockKind, Site};
use attune_points::Result;
use candle_core::Tensor;

pub use crate::cache::BlockCache;
use crate::context::GraphCx;

/// A piece of the trunk between two points of the residual stream.
pub trait Block: Send + Sync {
    /// Its sites, in the order in which it uses them.
    fn sites(&self) -> &[Site];

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
                BlockKind::Head => return None,
            })
        })
        .collect()
}
