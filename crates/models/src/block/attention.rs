//! Norm, grouped-query attention over turned or plain queries and keys, residual.

use attune_architecture::{Architecture, Place, Projections, QkNorm, Site};
use attune_points::Result;
use attune_tensor::kernels::{self, Mask};
use attune_tensor::ops;
use attune_tensor::view::{MatRef, ViewMut};
use candle_core::Tensor;

use super::residual::{Joined, Last};
use super::{Block, BlockCache, residual, site};
use crate::block;
use crate::context::GraphCx;
use crate::pass::arena::Buffer;
use crate::pass::linear::Thin;
use crate::pass::parts::Given;
use crate::pass::times::Work;
use crate::pass::walk::Run;
use crate::pass::{Mat, PassCx, Rows, Sinks};
use crate::rope::RopeTables;

/// What the reverse pass needs: the rest is computed again.
pub struct Saved {
    /// Normed and turned already.
    q: Mat,
    k: Mat,
    v: Mat,
    o: Mat,
    /// `o` without what was found among rows of components, where there are some.
    own: Option<Mat>,
    lse: Buffer<f32>,
    /// Before their norms, where they have some.
    raw_q: Option<Rows<f32>>,
    raw_k: Option<Rows<f32>>,
    sum: Option<Rows<f32>>,
    /// What the block gave, where components make something else of it.
    given: Option<Rows<f32>>,
    /// Of the linears that make queries, keys and values.
    thin: Vec<Thin>,
    thin_o: Thin,
}

/// Queries, keys and values of the rows of a pass.
struct Asked {
    q: Mat,
    k: Mat,
    v: Mat,
    raw_q: Option<Rows<f32>>,
    raw_k: Option<Rows<f32>>,
    thin: Vec<Thin>,
}

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

impl Attention {
    /// The stream that comes in, with what components add to it; none where they add nothing. Whoever looks at the pass sees it as it
    /// comes.
    fn enter(&self, x_td: &Rows<f32>, cx: &PassCx<'_>) -> Result<Option<Rows<f32>>> {
        let block = site(&self.sites, Place::Attention)?;
        cx.show(&block.id, x_td.view().into(), Given::All)?;
        cx.meter.time(Work::Adapter, || cx.enter(block, x_td))
    }

    /// Queries, keys and values of the rows that come in.
    fn ask(&self, x_td: &Rows<f32>, cx: &PassCx<'_>) -> Result<Asked> {
        let n_td = residual::read(site(&self.sites, Place::AttentionNorm)?, x_td, cx)?;
        let ([q, k, v], thin) = self.rows(n_td.view(), cx)?;
        drop(n_td);
        let ((q, raw_q), (k, raw_k)) = (self.ready(q, Place::QueryNorm, cx)?, self.ready(k, Place::KeyNorm, cx)?);
        let v = cx.meter.time(Work::Elementwise, || cx.narrowed(v));
        Ok(Asked { q, k, v, raw_q, raw_k, thin })
    }

    /// What they find among keys and values, and the logarithms of the sums of exponentials.
    fn find(&self, q: &Mat, k: MatRef<'_>, v: MatRef<'_>, cx: &PassCx<'_>) -> Result<(Mat, Buffer<f32>)> {
        let mut o = cx.arena.mat(cx.n_rows(), cx.architecture().query_width(), cx.dtype);
        let mut lse = cx.arena.take::<f32>(cx.n_rows() * cx.architecture().heads);
        cx.meter.time(Work::Attention, || {
            let lse_th = ViewMut::new(lse.span_mut(), cx.n_rows(), cx.architecture().heads);
            cx.kernels.attention(&self.how(cx), q.view(), k, v, o.view_mut(), lse_th);
        });
        let block = site(&self.sites, Place::Attention)?;
        if cx.is_prefixed(block) {
            cx.meter.time(Work::Adapter, || cx.merge_prefixes(block, q.view(), &mut o, lse.as_mut()))?;
        }
        Ok((o, lse))
    }

    /// Adds what they find among rows of components; gives what they have found before, if there are some.
    fn look_aside(&self, q: &Mat, o: &mut Mat, cx: &PassCx<'_>) -> Result<Option<Mat>> {
        let block = site(&self.sites, Place::Attention)?;
        cx.meter.time(Work::Adapter, || cx.add_asides(block, &self.sites, q.view(), o))
    }

    /// Joins what was found to the stream.
    fn join(&self, x_td: &Rows<f32>, o: &Mat, cx: &PassCx<'_>, run: Run) -> Result<Joined> {
        let block = site(&self.sites, Place::Attention)?;
        let last = Last { block, linear: site(&self.sites, Place::Output)?, x_ti: o.view() };
        residual::join(site(&self.sites, Place::AttentionNorm)?, x_td, &last, cx, run)
    }

    /// How rows attend on a pass.
    fn how<'c>(&self, cx: &'c PassCx<'_>) -> kernels::Attention<'c> {
        let Architecture { heads, kv_heads, head_dim, causal, .. } = *cx.architecture();
        let window = self.window.map(|window| window as usize);
        let mask = if causal { Mask::Causal { window } } else { Mask::Bidirectional };
        let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
        kernels::Attention {
            heads,
            kv_heads,
            head_dim,
            scale,
            mask,
            docs: &cx.docs,
            keys: cx.kept.as_ref().map(|kept| &kept.rows[..]),
        }
    }

    /// Queries, keys and values on a pass, neither normed nor turned, and what the reverse of their linears needs.
    fn rows(&self, n_td: MatRef<'_>, cx: &PassCx<'_>) -> Result<([Rows<f32>; 3], Vec<Thin>)> {
        let architecture = cx.architecture();
        let (t, query, kv) = (cx.n_rows(), architecture.query_width(), architecture.kv_width());
        let linear = |place, width| -> Result<(Rows<f32>, Thin)> {
            let mut y = cx.arena.rows(t, width);
            let thin = cx.linear(site(&self.sites, place)?, n_td, Given::All, y.view_mut(), false)?;
            Ok((y, thin))
        };
        match architecture.projections {
            Projections::Separate => {
                let ((q, of_q), (k, of_k)) = (linear(Place::Query, query)?, linear(Place::Key, kv)?);
                let (v, of_v) = linear(Place::Value, kv)?;
                Ok(([q, k, v], vec![of_q, of_k, of_v]))
            }
            Projections::Fused => {
                let (all, thin) = linear(Place::QueryKeyValue, query + 2 * kv)?;
                let mut start = 0;
                let parts = [query, kv, kv].map(|width| {
                    let mut part = cx.arena.rows(t, width);
                    let columns = all.view().sub_cols(start, start + width);
                    cx.meter.time(Work::Elementwise, || cx.kernels.convert(columns.into(), part.view_mut().into()));
                    start += width;
                    part
                });
                Ok((parts, vec![thin]))
            }
        }
    }

    /// The reverse of [`Attention::rows`]: the gradient by what it reads, if it is asked for.
    fn rows_vjp(
        &self,
        n_td: MatRef<'_>,
        d_qkv: [Rows<f32>; 3],
        thin: &[Thin],
        mut dn_td: Option<&mut Rows<f32>>,
        cx: &PassCx<'_>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        let dys: Vec<(Place, Mat)> = cx.meter.time(Work::Elementwise, || match cx.architecture().projections {
            Projections::Separate => {
                let [q, k, v] = d_qkv.map(|dy| cx.narrowed(dy));
                vec![(Place::Query, q), (Place::Key, k), (Place::Value, v)]
            }
            Projections::Fused => {
                let width = d_qkv.iter().map(Rows::n_cols).sum();
                let mut all = cx.arena.rows(cx.n_rows(), width);
                let mut start = 0;
                for part in &d_qkv {
                    let end = start + part.n_cols();
                    let columns = all.view_mut().into_sub_cols(start, end);
                    cx.kernels.convert(part.view().into(), columns.into());
                    start = end;
                }
                vec![(Place::QueryKeyValue, cx.narrowed(all))]
            }
        });
        for (i, ((place, dy), thin)) in dys.iter().zip(thin).enumerate() {
            let to = dn_td.as_mut().map(|dn| (dn.view_mut(), i > 0));
            cx.linear_vjp(site(&self.sites, *place)?, n_td, Given::All, thin, dy.view(), to, sinks)?;
        }
        Ok(())
    }

    /// The norm of queries or keys at `place`: how many rows of it a row of the pass is, if there is one.
    fn head_norm(&self, place: Place, cx: &PassCx<'_>) -> Result<Option<(&Site, usize)>> {
        let Architecture { heads, kv_heads, qk_norm, .. } = *cx.architecture();
        let per_row = match (qk_norm, place) {
            (QkNorm::None, _) => return Ok(None),
            (QkNorm::Whole, _) => 1,
            (QkNorm::PerHead, Place::QueryNorm) => heads,
            (QkNorm::PerHead, _) => kv_heads,
        };
        Ok(Some((site(&self.sites, place)?, per_row)))
    }

    /// Queries or keys ready to be compared: normed and turned. The raw ones are returned where the reverse needs them.
    fn ready(&self, raw: Rows<f32>, norm: Place, cx: &PassCx<'_>) -> Result<(Mat, Option<Rows<f32>>)> {
        let (mut x, raw) = match self.head_norm(norm, cx)? {
            Some((site, per_row)) => (cx.norm_heads(site, &raw, per_row)?, Some(raw)),
            None => (raw, None),
        };
        turn(&mut x, cx, false);
        Ok((cx.meter.time(Work::Elementwise, || cx.narrowed(x)), raw))
    }

    /// The reverse of [`Attention::ready`].
    fn ready_vjp(
        &self,
        mut dx: Rows<f32>,
        raw: Option<&Rows<f32>>,
        norm: Place,
        cx: &PassCx<'_>,
        sinks: &mut Sinks<'_>,
    ) -> Result<Rows<f32>> {
        turn(&mut dx, cx, true);
        match (self.head_norm(norm, cx)?, raw) {
            (Some((site, per_row)), Some(raw)) => cx.norm_heads_vjp(site, raw, per_row, &dx, sinks),
            _ => Ok(dx),
        }
    }
}

/// Turns heads by their rows' positions, where positions are turned.
fn turn(x: &mut Rows<f32>, cx: &PassCx<'_>, inverse: bool) {
    if let Some((cos, sin)) = &cx.angles {
        let width = cx.architecture().head_dim;
        cx.meter.time(Work::Elementwise, || cx.kernels.rope(x.view_mut(), width, cos.view(), sin.view(), inverse));
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
        let (block, norm) = (site(&self.sites, Place::Attention)?, site(&self.sites, Place::AttentionNorm)?);
        let x_td = cx.add_places(block, x[0].clone())?;
        let y_td = super::residual(&x_td, norm, block, cx, |h_td| {
            let (q, k, v) = self.project(h_td, cx)?;
            let (q, k) = turned(q, k, cx.plan.rope.as_ref())?;
            let before = cx.keys_before(block, k.dim(1)?)?;
            let o = cx.plan.attend(&q, &k, &v, self.window, &before)?;
            self.output(&cx.add_asides(block, &self.sites, &q, o)?, cx)
        })?;
        Ok(vec![y_td])
    }

    fn forward(&self, x: &[Rows<f32>], cx: &PassCx<'_>, run: Run) -> Result<(Vec<Rows<f32>>, Option<block::Saved>)> {
        let entered = self.enter(&x[0], cx)?;
        let x_td = entered.as_ref().unwrap_or(&x[0]);
        let Asked { q, k, v, raw_q, raw_k, thin } = self.ask(x_td, cx)?;
        cx.show_keys(&site(&self.sites, Place::Attention)?.id, k.view(), v.view())?;
        let (mut o, lse) = self.find(&q, k.view(), v.view(), cx)?;
        let own = self.look_aside(&q, &mut o, cx)?;
        let Joined { y, sum, thin: thin_o, given } = self.join(x_td, &o, cx, run)?;
        let saved = Saved { q, k, v, o, own, lse, raw_q, raw_k, sum, given, thin, thin_o };
        Ok((y, run.saves().then(|| block::Saved::Attention(Box::new(saved)))))
    }

    fn vjp(
        &self,
        x: &[Rows<f32>],
        saved: Option<block::Saved>,
        dy: Vec<Rows<f32>>,
        below: bool,
        cx: &PassCx<'_>,
        sinks: &mut Sinks<'_>,
    ) -> Result<Vec<Rows<f32>>> {
        let Some(block::Saved::Attention(saved)) = saved else { return Err(super::nothing_saved("attention")) };
        let norm = site(&self.sites, Place::AttentionNorm)?;
        let (t, query, kv) = (cx.n_rows(), cx.architecture().query_width(), cx.architecture().kv_width());
        let block = site(&self.sites, Place::Attention)?;
        let dsum = residual::join_vjp(norm, saved.sum.as_ref(), super::only(dy)?, cx, sinks)?;
        let entered = cx.meter.time(Work::Adapter, || cx.enter(block, &x[0]))?;
        let x_td = entered.as_ref().unwrap_or(&x[0]);
        let through = residual::reads(norm, below || cx.wants_places(block, sinks), cx, sinks);
        let parted = residual::part_vjp(norm, block, x_td, saved.given.as_ref(), (&dsum, through), cx, sinks)?;
        let mut do_th = cx.arena.rows(t, query);
        {
            let dgiven = parted.as_ref().map_or(&dsum, |(dgiven, _)| dgiven);
            let (output, dy) = (site(&self.sites, Place::Output)?, cx.as_activations(dgiven.view()));
            let to = Some((do_th.view_mut(), false));
            cx.linear_vjp(output, saved.o.view(), Given::All, &saved.thin_o, dy.view(dgiven.view()), to, sinks)?;
        }
        let beside = parted.and_then(|(_, dn_td)| dn_td);
        let (mut dq, mut dk, mut dv) = (cx.arena.rows(t, query), cx.arena.rows(t, kv), cx.arena.rows(t, kv));
        cx.meter.time(Work::Attention, || {
            let Saved { q, k, v, o, own, lse, .. } = &*saved;
            let (q, k, v, o) = (q.view(), k.view(), v.view(), own.as_ref().unwrap_or(o).view());
            let (dq, dk, dv) = (dq.view_mut(), dk.view_mut(), dv.view_mut());
            cx.kernels.attention_vjp(&self.how(cx), q, k, v, o, lse.span(), do_th.view(), None, dq, dk, dv);
        });
        if cx.is_prefixed(block) {
            let o = saved.own.as_ref().unwrap_or(&saved.o).view();
            let (q, lse, dq) = (saved.q.view(), saved.lse.as_ref(), dq.view_mut());
            cx.meter.time(Work::Adapter, || cx.prefixes_vjp(block, q, o, lse, do_th.view(), dq, sinks))?;
        }
        if saved.own.is_some() {
            let (q, d_o, dq) = (saved.q.view(), do_th.view(), dq.view_mut());
            cx.meter.time(Work::Adapter, || cx.asides_vjp(block, &self.sites, q, d_o, dq, sinks))?;
        }
        drop(do_th);
        let dq = self.ready_vjp(dq, saved.raw_q.as_ref(), Place::QueryNorm, cx, sinks)?;
        let dk = self.ready_vjp(dk, saved.raw_k.as_ref(), Place::KeyNorm, cx, sinks)?;
        let n_td = residual::read(norm, x_td, cx)?;
        let mut dn_td = through.then(|| cx.arena.rows(t, x_td.n_cols()));
        self.rows_vjp(n_td.view(), [dq, dk, dv], &saved.thin, dn_td.as_mut(), cx, sinks)?;
        if let (Some(dn_td), Some(beside)) = (&mut dn_td, beside) {
            cx.kernels.add(beside.view().into(), dn_td.view_mut());
        }
        let dx_td = residual::read_vjp(norm, x_td, dsum, dn_td, cx, sinks)?;
        if entered.is_some() {
            cx.meter.time(Work::Adapter, || cx.places_vjp(block, dx_td.view(), sinks))?;
        }
        Ok(vec![dx_td])
    }

    fn decode(&self, x: &[Rows<f32>], cache: &mut BlockCache, cx: &PassCx<'_>) -> Result<Vec<Rows<f32>>> {
        let Some(kept) = &cx.kept else { return Ok(self.forward(x, cx, Run::Output)?.0) };
        let entered = self.enter(&x[0], cx)?;
        let x_td = entered.as_ref().unwrap_or(&x[0]);
        let Asked { q, k, v, .. } = self.ask(x_td, cx)?;
        let [all_k, all_v] = cx.meter.time(Work::Elementwise, || cache.extend(&k, &v, kept, cx));
        let (mut o, _) = self.find(&q, all_k, all_v, cx)?;
        self.look_aside(&q, &mut o, cx)?;
        Ok(self.join(x_td, &o, cx, Run::Output)?.y)
    }
}
