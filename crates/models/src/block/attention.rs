//! Norm, grouped-query attention over turned or plain queries and keys, residual.

use attune_architecture::{Place, Projections, QkNorm, Site};
use attune_points::Result;
use attune_tensor::ops;
use candle_core::Tensor;

use super::{Block, BlockCache, residual, site};
use crate::attention::{attend, mask};
use crate::context::GraphCx;
use crate::rope::RopeTables;

pub(super) struct Attention {
    /// Norm, query, key and value (or all three in one), norms of queries and keys, output.
    pub(super) sites: Vec<Site>,
    pub(super) window: Option<u64>,
}

impl Attention {
    /// Queries `[T, H, W]`, keys and values `[T, K, W]`, not yet rotated.
    fn project(&self, h_td: &Tensor, cx: &GraphCx<'_>) -> Result<(Tensor, Tensor, Tensor)> {
        let architecture = cx.base.architecture();
        let (query, kv) = (architecture.query_width(), architecture.kv_width());
        let linear = |place| cx.linear(site(&self.sites, place)?, h_td);
        let (q, k, v) = match architecture.projections {
            Projections::Separate => (linear(Place::Query)?, linear(Place::Key)?, linear(Place::Value)?),
            Projections::Fused => {
                let y_to = linear(Place::QueryKeyValue)?;
                (y_to.narrow(1, 0, query)?, y_to.narrow(1, query, kv)?, y_to.narrow(1, query + kv, kv)?)
            }
        };
        let heads = |y_to: &Tensor| -> Result<Tensor> {
            let (t, o) = y_to.dims2()?;
            Ok(y_to.reshape((t, o / architecture.head_dim, architecture.head_dim))?)
        };
        let norm = |place, x: &Tensor| cx.norm(site(&self.sites, place)?, x);
        let (q, k) = match architecture.qk_norm {
            QkNorm::None => (heads(&q)?, heads(&k)?),
            QkNorm::PerHead => (norm(Place::QueryNorm, &heads(&q)?)?, norm(Place::KeyNorm, &heads(&k)?)?),
            QkNorm::Whole => (heads(&norm(Place::QueryNorm, &q)?)?, heads(&norm(Place::KeyNorm, &k)?)?),
        };
        Ok((q, k, heads(&v)?))
    }

    fn output(&self, o_td: &Tensor, cx: &GraphCx<'_>) -> Result<Tensor> {
        cx.linear(site(&self.sites, Place::Output)?, o_td)
    }
}

/// Queries and keys turned by `tables`, or as they are where positions are learned.
fn turned(q: Tensor, k: Tensor, tables: Option<&RopeTables>) -> Result<(Tensor, Tensor)> {
    match tables {
        Some(RopeTables { cos, sin }) => Ok((ops::rope(&q, cos, sin)?, ops::rope(&k, cos, sin)?)),
        None => Ok((q, k)),
    }
}

impl Block for Attention {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn graph(&self, x: &[Tensor], cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        let y_td = residual(&x[0], site(&self.sites, Place::AttentionNorm)?, cx, |h_td| {
            let (q, k, v) = self.project(h_td, cx)?;
            let (q, k) = turned(q, k, cx.plan.rope.as_ref())?;
            self.output(&cx.plan.attend(&q, &k, &v, self.window)?, cx)
        })?;
        Ok(vec![y_td])
    }

    fn decode(&self, x: &[Tensor], cache: &mut BlockCache, cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        let y_td = residual(&x[0], site(&self.sites, Place::AttentionNorm)?, cx, |h_td| {
            let (q, k, v) = self.project(h_td, cx)?;
            let (start, rows, architecture) = (cache.rows(), q.dim(0)?, cx.base.architecture());
            let tables = RopeTables::new(architecture, &[rows], start, cx.dtype)?;
            let (q, k) = turned(q, k, tables.as_ref())?;
            let (k, v) = cache.extend(&k, &v)?;
            let mask = mask(rows, start + rows, self.window, architecture.causal, cx.dtype)?;
            let o_td = attend(&q.unsqueeze(0)?, &k.unsqueeze(0)?, &v.unsqueeze(0)?, mask.as_ref())?;
            self.output(&o_td, cx)
        })?;
        Ok(vec![y_td])
    }
}
