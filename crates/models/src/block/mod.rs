//! The blocks of a decoder. Each is its `graph`: differentiable operations, valid in f32 and f64, that define it, serve as
//! its oracle, and give its backward by a local reverse pass.

mod attention;
mod embedding;
mod experts;
mod mlp;
mod residual;

use attune_architecture::{Architecture, BlockKind, NormPlacement, Place, Site};
use attune_points::{Error, Result};
use candle_core::Tensor;

pub use crate::cache::BlockCache;
use crate::context::GraphCx;
use crate::pass::walk::Run;
use crate::pass::{PassCx, Rows, Sinks, local};

/// What a block keeps between its forward and its reverse pass, beside its input.
pub enum Saved {
    /// Of attention.
    Attention(Box<attention::Saved>),
    /// Of an MLP.
    Mlp(Box<mlp::Saved>),
    /// Of a mixture of experts.
    Experts(Box<experts::Saved>),
}

/// A piece of the trunk between two points of the residual stream.
///
/// Its `graph` defines it. `forward` and `vjp` are the same on views of rows and over several parts at once; without an own
/// form they run the graph.
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

    /// The block's output for the streams `x` on the rows of a pass, and what its reverse needs, as `run` asks.
    ///
    /// # Errors
    /// Whatever its operations raise.
    fn forward(&self, x: &[Rows<f32>], cx: &PassCx<'_>, run: Run) -> Result<(Vec<Rows<f32>>, Option<Saved>)> {
        let y = if run == Run::Saved { Vec::new() } else { local::block(&|x, cx| self.graph(x, cx), x, cx)? };
        Ok((y, None))
    }

    /// The gradients by the streams `x` (nothing of value if nobody `below` asks), from those by the output; those of its
    /// tensors go to the sinks.
    ///
    /// # Errors
    /// Whatever its operations or a sink raise.
    fn vjp(
        &self,
        x: &[Rows<f32>],
        _saved: Option<Saved>,
        dy: Vec<Rows<f32>>,
        below: bool,
        cx: &PassCx<'_>,
        sinks: &mut Sinks<'_>,
    ) -> Result<Vec<Rows<f32>>> {
        local::block_vjp(&|x, cx| self.graph(x, cx), self.sites(), x, &dy, below, cx, sinks)
    }

    /// The block's output for rows that follow those in `cache`, which takes in what it needs of them. Blocks that look at
    /// one row at a time need no cache.
    ///
    /// # Errors
    /// Whatever its operations raise.
    fn decode(&self, x: &[Rows<f32>], _cache: &mut BlockCache, cx: &PassCx<'_>) -> Result<Vec<Rows<f32>>> {
        Ok(self.forward(x, cx, Run::Output)?.0)
    }
}

/// The site at `place` among a block's.
pub(crate) fn site(sites: &[Site], place: Place) -> Result<&Site> {
    let found = sites.iter().find(|site| site.place == place);
    found
        .ok_or_else(|| Error::Refused(format!("this model's structure has no {place:?} where its block looks for one")))
}

/// `x + f(norm(x))`, or `norm(x + f(x))` where norms come last, with what components make of `f`.
fn residual(
    x_td: &Tensor,
    norm: &Site,
    block: &Site,
    cx: &GraphCx<'_>,
    f: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let parted = |read_td: &Tensor| cx.branch(block, read_td, f(read_td)?);
    match cx.base.architecture().placement {
        NormPlacement::Pre => Ok((x_td + parted(&cx.norm(norm, x_td)?)?)?),
        NormPlacement::Post => cx.norm(norm, &(x_td + parted(x_td)?)?),
    }
}

/// The one stream that a block of the residual stream is given.
fn only(mut streams: Vec<Rows<f32>>) -> Result<Rows<f32>> {
    match streams.len() {
        1 => Ok(streams.remove(0)),
        n => Err(Error::Refused(format!("a block was given {n} streams; expected the residual stream"))),
    }
}

fn nothing_saved(block: &str) -> Error {
    Error::Refused(format!("the reverse of {block} was asked for without its forward pass"))
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
