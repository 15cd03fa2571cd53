//! Keys and values that components put before those of documents, merged with attention by the logarithms of its sums.
//!
//! With `lse` that of a row's own keys and `lse'` that of the ones before them, the row finds among both
//! ```text
//! o'' = e^(lse - lse'') o + e^(lse' - lse'') o'          lse'' = log(e^lse + e^lse')
//! ```
//! and the gradients of each are those of an attention whose output and sums are `o''` and `lse''`, as all its keys were one
//! set. Axes: T rows, P keys before, K key heads, G query heads of one, W width.

use std::ops::Range;

use attune_architecture::Site;
use attune_points::adapter::{AttentionMap, Port};
use attune_points::{BankKind, Result, Rows as Bound, TensorId};
use attune_tensor::autograd;
use attune_tensor::view::{MatRef, View, ViewMut};
use candle_core::{D, Device, Tensor, Var};

use crate::pass::Mat;
use crate::pass::local::{self, Together};
use crate::pass::parts::{Given, Part, PassCx, Placed, Sinks};
use crate::regions;

type Prefix<'a> = Placed<'a, &'a dyn AttentionMap>;

/// How many places are taken before each document of a part.
pub(crate) fn lengths(part: &Part<'_>) -> Vec<usize> {
    let mut lengths = vec![0; part.layout.docs().len()];
    for binding in &part.theta.bindings {
        let bank = part.theta.banks.get(binding.slot as usize).filter(|bank| bank.kind == BankKind::Adapter);
        let Some(slot) = bank.and_then(|_| part.stack.slot(binding.slot)) else { continue };
        let length = slot.attachments().find_map(|at| match slot.adapter().port(at) {
            Port::Attention(map) => Some(map.length()),
            _ => None,
        });
        let Some(length) = length else { continue };
        for (doc, sum) in part.layout.docs().iter().zip(&mut lengths) {
            let is_bound = match &binding.rows {
                Bound::All(_) => true,
                Bound::Segments(segments) => segments.iter().any(|(rows, _)| rows.contains(&doc.rows.start)),
                Bound::Domains(domains) => domains.iter().any(|(domain, _)| *domain == doc.domain),
            };
            *sum += if is_bound { length } else { 0 };
        }
    }
    lengths
}

/// The shape of an attention's heads.
#[derive(Clone, Copy)]
struct Heads {
    kv: usize,
    group: usize,
    width: usize,
}

impl Heads {
    /// `[T, H W]`, scaled, to `[K, T G, W]`.
    fn rows(self, x: MatRef<'_>, scale: f64) -> Result<Tensor> {
        let (t, Self { kv, group, width }) = (x.rows(), self);
        let x = local::tensor(x)?.reshape((t, kv, group, width))?.permute((1, 0, 2, 3))?.contiguous()?;
        Ok((x.reshape((kv, t * group, width))? * scale)?)
    }

    /// The way back.
    fn back(self, x: &Tensor) -> Result<Tensor> {
        let (t, Self { kv, group, width }) = (x.dim(1)? / self.group, self);
        let x = x.reshape((kv, t, group, width))?.permute((1, 0, 2, 3))?.contiguous()?;
        Ok(x.reshape((t, kv * group * width))?)
    }

    /// `[P, K W]` to `[K, P, W]`.
    fn keys(self, x: &Tensor) -> Result<Tensor> {
        Ok(x.reshape((x.dim(0)?, self.kv, self.width))?.transpose(0, 1)?.contiguous()?)
    }

    /// `[T, H]` to `[K, T G, 1]`.
    fn sums(self, lse_th: &[f32]) -> Result<Tensor> {
        let (t, Self { kv, group, .. }) = (lse_th.len() / (self.kv * self.group), self);
        let lse = Tensor::from_slice(lse_th, (t, kv, group), &Device::Cpu)?.transpose(0, 1)?.contiguous()?;
        Ok(lse.reshape((kv, t * group, 1))?)
    }

    /// The way back.
    fn sums_back(self, lse: &Tensor) -> Result<Vec<f32>> {
        let (t, Self { kv, group, .. }) = (lse.dim(1)? / self.group, self);
        Ok(lse.reshape((kv, t, group))?.transpose(0, 1)?.contiguous()?.flatten_all()?.to_vec1()?)
    }
}

impl<'a> PassCx<'a> {
    fn prefixes(&self, block: &Site) -> Vec<Prefix<'a>> {
        let placed = self.placed(&block.id, Given::All).into_iter();
        let prefixes = placed.filter_map(|placed| match placed.port {
            Port::Attention(map) => Some(placed.with(map)),
            _ => None,
        });
        prefixes.collect()
    }

    fn heads(&self) -> (Heads, f64) {
        let of = self.architecture();
        let heads = Heads { kv: of.kv_heads, group: of.heads / of.kv_heads, width: of.head_dim };
        (heads, 1.0 / (of.head_dim as f64).sqrt())
    }

    /// Merges what queries find among the keys that components put before documents with what they found among their
    /// documents': `o` and the logarithms of sums, `lse_th`.
    ///
    /// # Errors
    /// Whatever a component raises.
    pub(crate) fn merge_prefixes(&self, block: &Site, q: MatRef<'_>, o: &mut Mat, lse_th: &mut [f32]) -> Result<()> {
        let (heads, scale) = self.heads();
        for placed in self.prefixes(block) {
            let (k, v) = placed.port.graph(&local::locals(self.parts, &placed, &[])?)?;
            let (k, v) = (heads.keys(&k)?, heads.keys(&v)?);
            for Together { rows, .. } in local::together(self, &placed) {
                let of_rows = heads.kv * heads.group * rows.start..heads.kv * heads.group * rows.end;
                let scores = heads.rows(q.sub_rows(rows.start, rows.end), scale)?.matmul(&k.t()?)?;
                let most = scores.max_keepdim(D::Minus1)?;
                let weights = scores.broadcast_sub(&most)?.exp()?;
                let sum = weights.sum_keepdim(D::Minus1)?;
                let (found, lse) = (weights.matmul(&v)?.broadcast_div(&sum)?, (most + sum.log()?)?);
                let (own, own_lse) =
                    (heads.rows(o.view().sub_rows(rows.start, rows.end), 1.0)?, heads.sums(&lse_th[of_rows.clone()])?);
                // log(e^a + e^b) = max + log(1 + e^-|a - b|)
                let both = (own_lse.maximum(&lse)? + ((&own_lse - &lse)?.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
                let share = |x: &Tensor, lse: &Tensor| x.broadcast_mul(&(lse - &both)?.exp()?);
                let merged = heads.back(&(share(&own, &own_lse)? + share(&found, &lse)?)?)?;
                let mut room = self.arena.rows(rows.len(), merged.dim(1)?);
                local::write(&merged, room.view_mut(), false)?;
                self.kernels.convert(room.view().into(), o.view_mut().into_sub_rows(rows.start, rows.end));
                lse_th[of_rows].copy_from_slice(&heads.sums_back(&both)?);
            }
        }
        Ok(())
    }

    /// The reverse of [`PassCx::merge_prefixes`] as far as those keys and values go: adds the gradient by queries to `dq`;
    /// those of the components' tensors go to the sinks. `o` and `lse_th` are the merged ones.
    ///
    /// # Errors
    /// Whatever a component or a sink raises.
    #[expect(clippy::too_many_arguments, reason = "the operands of one operation, spelt out")]
    pub(crate) fn prefixes_vjp(
        &self,
        block: &Site,
        q: MatRef<'_>,
        o: MatRef<'_>,
        lse_th: &[f32],
        d_o: View<'_, f32>,
        mut dq: ViewMut<'_, f32>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        let (heads, scale) = self.heads();
        for placed in self.prefixes(block) {
            let leaves: Vec<(TensorId, Var)> = local::leaves(self.parts, &placed, sinks)?;
            let (keys, values) = placed.port.graph(&local::locals(self.parts, &placed, &leaves)?)?;
            let (k, v) = (heads.keys(&keys.detach())?, heads.keys(&values.detach())?);
            let rows: Range<usize> = placed.rows.clone();
            let of_rows = heads.kv * heads.group * rows.start..heads.kv * heads.group * rows.end;
            let q = heads.rows(q.sub_rows(rows.start, rows.end), scale)?;
            let o = heads.rows(o.sub_rows(rows.start, rows.end), 1.0)?;
            let d_o = heads.rows(d_o.sub_rows(rows.start, rows.end).into(), 1.0)?;
            let p = q.matmul(&k.t()?)?.broadcast_sub(&heads.sums(&lse_th[of_rows])?)?.exp()?;
            let mean = (&d_o * o)?.sum_keepdim(D::Minus1)?;
            let ds = (&p * d_o.matmul(&v.t()?)?.broadcast_sub(&mean)?)?;
            let own = heads.back(&(ds.matmul(&k)? * scale)?)?;
            local::write(&own, dq.reborrow().into_sub_rows(rows.start, rows.end), true)?;
            if leaves.is_empty() {
                continue;
            }
            let flat = |x: Tensor| x.transpose(0, 1)?.contiguous()?.reshape((k.dim(1)?, heads.kv * heads.width));
            let (dk, dv) = (flat(ds.t()?.contiguous()?.matmul(&q)?)?, flat(p.t()?.contiguous()?.matmul(&d_o)?)?);
            let all: Vec<&Var> = leaves.iter().map(|(_, var)| var).collect();
            let gradients = autograd::pull(&all, &[(&keys, &dk), (&values, &dv)])?;
            for ((id, _), gradient) in leaves.iter().zip(gradients) {
                gradient.map(|gradient| regions::put(&mut *sinks[placed.part], id, &gradient)).transpose()?;
            }
        }
        Ok(())
    }

    /// Whether components put keys before those of documents.
    pub(crate) fn is_prefixed(&self, block: &Site) -> bool {
        !self.prefixes(block).is_empty()
    }
}
