//! The loss over chunks of supervised rows: the last norm, the head and the cross-entropy of one chunk at a time, and at once
//! the gradient by its hidden rows.

use attune_architecture::Place;
use attune_points::engine::LossReport;
use attune_points::layout::NO_LABEL;
use attune_points::objective::ChunkLoss;
use attune_points::{Error, Result};
use attune_tensor::autograd;
use attune_tensor::view::MatRef;
use candle_core::{Device, Tensor};

use crate::head::{self as graphs, Head};
use crate::loss::{checked, outside, sweeps};
use crate::pass::arena::{Activations, Mat, Rows};
use crate::pass::linear::Thin;
use crate::pass::parts::{Given, PassCx, Sinks, wanted};
use crate::pass::times::Work;
use crate::pass::walk::Task;
use crate::pass::{local, outputs};
use crate::vectors;

/// Where gradients go.
pub(crate) struct Backward<'b, 's> {
    /// The gradient by the hidden rows, if anything below needs it; zero at first.
    pub(crate) dh_td: Option<&'b mut Rows<f32>>,
    pub(crate) sinks: &'b mut Sinks<'s>,
}

impl<'s> Backward<'_, 's> {
    /// The same for one chunk.
    fn again(&mut self) -> Backward<'_, 's> {
        Backward { dh_td: self.dh_td.as_deref_mut(), sinks: &mut *self.sinks }
    }
}

/// The losses of all parts, part by part.
pub(crate) fn losses(
    head: &Head,
    h_td: &Rows<f32>,
    tasks: &[Task<'_>],
    cx: &PassCx<'_>,
    mut backward: Option<Backward<'_, '_>>,
) -> Result<Vec<LossReport>> {
    let (width, length) = (cx.architecture().logits_width(), cx.architecture().logits_rows());
    let mut reports = Vec::with_capacity(tasks.len());
    for (part, task) in tasks.iter().enumerate() {
        let layout = task.part.layout;
        if task.objective.needs().vectors {
            let backward = backward.as_mut().map(Backward::again);
            reports.push(cx.meter.whole(Work::Head, || of_vectors(head, h_td, (part, task), cx, backward))?);
            continue;
        }
        head.last(cx.architecture())?;
        if let Some(&label) = layout.labels().iter().find(|&&label| label != NO_LABEL && label as usize >= width) {
            return Err(outside(label, cx.architecture()));
        }
        let reverse = backward.is_some();
        reports.push(sweeps(task.objective, layout, length, reverse, |rows, loss, reverse| {
            let ids: Vec<u32> = rows.iter().map(|row| row.row).collect();
            let labels: Vec<u32> = rows.iter().map(|row| row.label).collect();
            let chunk = Chunk { at: At { part, ids: &ids }, labels: &labels, loss, scale: task.scale };
            let backward = backward.as_mut().filter(|_| reverse).map(Backward::again);
            let values = cx.meter.whole(Work::Head, || chunk.run(head, h_td, cx, backward))?;
            Ok(values.into_iter().map(f64::from).collect())
        })?);
    }
    Ok(reports)
}

/// The losses of a part whose documents have vectors: pooling, in 32 bits whatever the type of the activations, runs by its graph.
fn of_vectors(
    head: &Head,
    h_td: &Rows<f32>,
    (part, task): (usize, &Task<'_>),
    cx: &PassCx<'_>,
    backward: Option<Backward<'_, '_>>,
) -> Result<LossReport> {
    let (layout, pooling) = (task.part.layout, Head::pooling(cx.architecture())?);
    let ids: Vec<u32> = (0..layout.n_rows() as u32).collect();
    let at = At { part, ids: &ids };
    let mut h_cd = cx.arena.rows(ids.len(), h_td.n_cols());
    cx.kernels.gather(h_td.view().into(), &at.rows(cx), h_cd.view_mut().into(), false);
    let n_cd = autograd::leaf(&outputs::normed(head, &h_cd, at.given(), cx)?)?;
    let y_nd = graphs::pool(n_cd.as_tensor(), layout, pooling)?;
    let (report, dy_nd) = vectors::losses(task.objective, layout, &y_nd.detach())?;
    let Some(Backward { dh_td, sinks }) = backward else { return Ok(report) };
    if dh_td.is_none() && wanted(cx.base, &cx.parts[part], &head.sites, &*sinks[part]).is_empty() {
        return Ok(report);
    }
    let dy_nd = (dy_nd * task.scale)?;
    let Some(dn) = autograd::pull(&[&n_cd], &[(&y_nd, &dy_nd)])?.pop().flatten() else { return Ok(report) };
    let mut dn_cd = cx.arena.rows(h_cd.n_rows(), h_cd.n_cols());
    local::write(&dn, dn_cd.view_mut(), false)?;
    let dh_cd = at.norm_vjp(head, &h_cd, dn_cd, cx, sinks)?;
    if let Some(dh_td) = dh_td {
        cx.kernels.scatter(dh_cd.view(), &at.rows(cx), dh_td.view_mut());
    }
    Ok(report)
}

/// Logits of rows `ids` of a part, `[C, V]` or `[C, classes]`.
///
/// # Errors
/// A head without logits; whatever a component raises.
pub(crate) fn logits(head: &Head, h_td: &Rows<f32>, part: usize, ids: &[u32], cx: &PassCx<'_>) -> Result<Rows<f32>> {
    let logits = cx.meter.whole(Work::Head, || At { part, ids }.logits(head, h_td, cx))?;
    cx.finish()?;
    Ok(logits.logits_cv)
}

/// Some rows of a part.
#[derive(Clone, Copy)]
struct At<'c> {
    part: usize,
    /// Their numbers in the part's layout.
    ids: &'c [u32],
}

/// Supervised rows of one part.
struct Chunk<'c> {
    at: At<'c>,
    labels: &'c [u32],
    loss: &'c ChunkLoss,
    /// Factor on the loss before the gradient is taken.
    scale: f64,
}

/// What comes of a head on some rows.
struct Logits {
    read: Read,
    logits_cv: Rows<f32>,
    /// Of the last linear.
    thin: Thin,
}

/// What the last linear of a head reads, and what the reverse of that needs.
struct Read {
    h_cd: Rows<f32>,
    /// After the last norm.
    n_cd: Mat,
    /// After the pooler: its low-rank rows, its tanh, and that in the type of the activations.
    pooled: Option<(Thin, Rows<f32>, Mat)>,
}

impl Read {
    fn view(&self) -> MatRef<'_> {
        self.pooled.as_ref().map_or_else(|| self.n_cd.view(), |(_, _, pooled)| pooled.view())
    }
}

impl Chunk<'_> {
    /// What the loss computes of each row, before weights; gradients go where they should.
    fn run(
        &self,
        head: &Head,
        h_td: &Rows<f32>,
        cx: &PassCx<'_>,
        backward: Option<Backward<'_, '_>>,
    ) -> Result<Vec<f32>> {
        let (at, linear) = (self.at, head.last(cx.architecture())?);
        let Logits { read, mut logits_cv, thin } = at.logits(head, h_td, cx)?;
        let (c, vocab) = (logits_cv.n_rows(), logits_cv.n_cols());
        let mut rounded = match (cx.dtype, &backward) {
            (Activations::Bf16, Some(_)) => Some(cx.arena.mat(c, vocab, cx.dtype)),
            _ => None,
        };
        let values_c = self.values(&mut logits_cv, rounded.as_mut(), backward.is_some(), cx)?;
        let Some(Backward { dh_td, sinks }) = backward else { return Ok(values_c) };
        let dlogits = rounded.as_ref().map_or_else(|| logits_cv.view().into(), Mat::view);
        // The sites of a head are in the order of use, the last linear at the end.
        let before = head.sites.split_last().map_or(&[][..], |(_, before)| before);
        let through = dh_td.is_some() || !wanted(cx.base, &cx.parts[at.part], before, &*sinks[at.part]).is_empty();
        let mut dread_cd = through.then(|| cx.arena.rows(c, h_td.n_cols()));
        let dread = dread_cd.as_mut().map(|dread| (dread.view_mut(), false));
        cx.linear_vjp(linear, read.view(), at.given(), &thin, dlogits, dread, sinks)?;
        let Some(dread_cd) = dread_cd else { return Ok(values_c) };
        let dh_cd = at.read_vjp(head, &read, dread_cd, cx, sinks)?;
        let Some(dh_td) = dh_td else { return Ok(values_c) };
        cx.kernels.scatter(dh_cd.view(), &at.rows(cx), dh_td.view_mut());
        Ok(values_c)
    }

    /// What the loss computes of each row. Where gradients are taken, that by the logits takes the place of these, and goes
    /// to `rounded` where there is one.
    fn values(
        &self,
        logits_cv: &mut Rows<f32>,
        rounded: Option<&mut Mat>,
        reverse: bool,
        cx: &PassCx<'_>,
    ) -> Result<Vec<f32>> {
        match self.loss {
            ChunkLoss::CrossEntropy { weight_t } => {
                let dnll_c = reverse.then(|| weight_t.iter().map(|w| (w * self.scale) as f32).collect::<Vec<_>>());
                let narrow = match rounded {
                    Some(Mat::Bf16(rows)) => Some(rows.view_mut()),
                    _ => None,
                };
                let mut nll_c = vec![0.0; self.at.ids.len()];
                let to = logits_cv.view_mut();
                cx.kernels.cross_entropy(to, self.labels, dnll_c.as_deref(), narrow, &mut nll_c);
                Ok(nll_c)
            }
            ChunkLoss::Logits(loss) => {
                let leaf = autograd::leaf(&local::tensor(logits_cv.view().into())?)?;
                let loss_c = checked(loss.graph(leaf.as_tensor())?, self.at.ids.len())?;
                if reverse {
                    let scale_c = Tensor::full(self.scale as f32, loss_c.elem_count(), &Device::Cpu)?;
                    let gradient = autograd::pull(&[&leaf], &[(&loss_c, &scale_c)])?.pop().flatten();
                    match gradient {
                        Some(gradient) => local::write(&gradient, logits_cv.view_mut(), false)?,
                        None => cx.kernels.fill(logits_cv.view_mut(), 0.0),
                    }
                    if let Some(rounded) = rounded {
                        cx.kernels.convert(logits_cv.view().into(), rounded.view_mut());
                    }
                }
                Ok(loss_c.detach().to_vec1()?)
            }
            _ => Err(Error::Refused("this engine does not know how to compute such a loss".to_owned())),
        }
    }
}

impl At<'_> {
    fn given(&self) -> Given<'_> {
        Given::Of { part: self.part, ids: self.ids }
    }

    /// Their numbers in the pass.
    fn rows(&self, cx: &PassCx<'_>) -> Vec<u32> {
        let start = cx.rows[self.part].start as u32;
        self.ids.iter().map(|&id| start + id).collect()
    }

    fn logits(&self, head: &Head, h_td: &Rows<f32>, cx: &PassCx<'_>) -> Result<Logits> {
        let linear = head.last(cx.architecture())?;
        let mut h_cd = cx.arena.rows(self.ids.len(), h_td.n_cols());
        cx.kernels.gather(h_td.view().into(), &self.rows(cx), h_cd.view_mut().into(), false);
        let read = self.read(head, h_cd, cx)?;
        let mut logits_cv = cx.arena.rows(self.ids.len(), cx.architecture().logits_width());
        let thin = cx.linear(linear, read.view(), self.given(), logits_cv.view_mut(), false)?;
        Ok(Logits { read, logits_cv, thin })
    }

    /// Hidden rows through the last norm and the pooler, where there are such.
    fn read(&self, head: &Head, h_cd: Rows<f32>, cx: &PassCx<'_>) -> Result<Read> {
        let n_cd = match head.at(Place::FinalNorm) {
            Some(norm) => cx.norm(norm, h_cd.view(), self.given())?,
            None => cx.narrow(h_cd.view()),
        };
        let pooled = match head.at(Place::Pooler) {
            Some(pooler) => {
                let mut tanh_cd = cx.arena.rows(h_cd.n_rows(), h_cd.n_cols());
                let thin = cx.linear(pooler, n_cd.view(), self.given(), tanh_cd.view_mut(), false)?;
                tanh_cd.values_mut().iter_mut().for_each(|x| *x = x.tanh());
                let narrow = cx.narrow(tanh_cd.view());
                Some((thin, tanh_cd, narrow))
            }
            None => None,
        };
        Ok(Read { h_cd, n_cd, pooled })
    }

    /// The gradient by the hidden rows, from the one by what the last linear read.
    fn read_vjp(
        &self,
        head: &Head,
        read: &Read,
        mut d_cd: Rows<f32>,
        cx: &PassCx<'_>,
        sinks: &mut Sinks<'_>,
    ) -> Result<Rows<f32>> {
        if let (Some((thin, tanh_cd, _)), Some(pooler)) = (&read.pooled, head.at(Place::Pooler)) {
            // d tanh(z) / dz = 1 - tanh(z)²
            d_cd.values_mut().iter_mut().zip(tanh_cd.values()).for_each(|(d, tanh)| *d *= 1.0 - tanh * tanh);
            let mut dn_cd = cx.arena.rows(d_cd.n_rows(), d_cd.n_cols());
            let narrowed = cx.as_activations(d_cd.view());
            let to = Some((dn_cd.view_mut(), false));
            cx.linear_vjp(pooler, read.n_cd.view(), self.given(), thin, narrowed.view(d_cd.view()), to, sinks)?;
            d_cd = dn_cd;
        }
        self.norm_vjp(head, &read.h_cd, d_cd, cx, sinks)
    }

    /// The gradient by the hidden rows, from the one by what the last norm makes of them.
    fn norm_vjp(
        &self,
        head: &Head,
        h_cd: &Rows<f32>,
        dn_cd: Rows<f32>,
        cx: &PassCx<'_>,
        sinks: &mut Sinks<'_>,
    ) -> Result<Rows<f32>> {
        let Some(norm) = head.at(Place::FinalNorm) else { return Ok(dn_cd) };
        let mut dh_cd = cx.arena.zeros(dn_cd.n_rows(), dn_cd.n_cols());
        cx.norm_vjp(norm, h_cd.view(), self.given(), dn_cd.view(), dh_cd.view_mut(), sinks)?;
        Ok(dh_cd)
    }
}
