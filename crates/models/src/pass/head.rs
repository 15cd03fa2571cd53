//! The loss over chunks of supervised rows: the last norm, the head and the cross-entropy of one chunk at a time, and at once
//! the gradient by its hidden rows.

use attune_architecture::{Place, Site};
use attune_points::engine::LossReport;
use attune_points::objective::{ChunkLoss, ChunkView};
use attune_points::{Error, Result};
use attune_tensor::view::MatRef;

use crate::head::Head;
use crate::loss::{count, count_documents, outside};
use crate::pass::arena::{Activations, Mat, Rows};
use crate::pass::linear::Thin;
use crate::pass::local::gather;
use crate::pass::parts::{Given, PassCx, Sinks, wanted};
use crate::pass::times::Work;
use crate::pass::walk::Task;

/// Where gradients go.
pub(crate) struct Backward<'b, 's> {
    /// The gradient by the hidden rows, if anything below needs it; zero at first.
    pub(crate) dh_td: Option<&'b mut Rows<f32>>,
    pub(crate) sinks: &'b mut Sinks<'s>,
}

/// The losses of all parts, part by part.
pub(crate) fn losses(
    head: &Head,
    h_td: &Rows<f32>,
    tasks: &[Task<'_>],
    cx: &PassCx<'_>,
    mut backward: Option<Backward<'_, '_>>,
) -> Result<Vec<LossReport>> {
    head.last(cx.architecture())?;
    let vocab = cx.architecture().logits_width();
    let mut reports = Vec::with_capacity(tasks.len());
    for (part, task) in tasks.iter().enumerate() {
        let layout = task.part.layout;
        let supervised = layout.supervised();
        let mut report = LossReport::default();
        for rows in supervised.chunks(cx.architecture().logits_rows()) {
            if let Some(row) = rows.iter().find(|row| row.label as usize >= vocab) {
                return Err(outside(row.label, cx.architecture()));
            }
            let ChunkLoss::CrossEntropy { weight_t } = task.objective.chunk(&ChunkView { layout, rows })? else {
                return Err(Error::Refused("this engine computes cross-entropies only".to_owned()));
            };
            let ids: Vec<u32> = rows.iter().map(|row| row.row).collect();
            let labels: Vec<u32> = rows.iter().map(|row| row.label).collect();
            let dnll = backward.is_some().then(|| weight_t.iter().map(|w| (w * task.scale) as f32).collect::<Vec<_>>());
            let chunk = Chunk { part, ids: &ids, labels: &labels, dnll_c: dnll.as_deref() };
            let nll_c = cx.meter.whole(Work::Head, || chunk.run(head, h_td, cx, &mut backward))?;
            count(&mut report, rows, &weight_t, nll_c.iter().map(|&nll| f64::from(nll)), layout);
        }
        count_documents(&mut report, &supervised, layout.docs());
        reports.push(report);
    }
    Ok(reports)
}

/// Supervised rows of one part.
struct Chunk<'c> {
    part: usize,
    /// Their numbers in the part's layout.
    ids: &'c [u32],
    labels: &'c [u32],
    /// The gradient by each row's loss, if gradients are taken.
    dnll_c: Option<&'c [f32]>,
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
    fn given(&self) -> Given<'_> {
        Given::Of { part: self.part, ids: self.ids }
    }

    /// The negative log-likelihoods; gradients go where they should.
    fn run(
        &self,
        head: &Head,
        h_td: &Rows<f32>,
        cx: &PassCx<'_>,
        backward: &mut Option<Backward<'_, '_>>,
    ) -> Result<Vec<f32>> {
        let (c, hidden, vocab) = (self.ids.len(), cx.architecture().hidden, cx.architecture().logits_width());
        let start = cx.rows[self.part].start;
        let rows = || self.ids.iter().map(move |&id| start + id as usize);
        let linear = head.last(cx.architecture())?;
        let mut h_cd = cx.arena.rows(c, hidden);
        gather(h_td.view(), rows(), h_cd.view_mut());
        let read = self.read(head, h_cd, cx)?;
        let mut logits_cv = cx.arena.rows(c, vocab);
        let thin = cx.linear(linear, read.view(), self.given(), logits_cv.view_mut(), false)?;
        let mut nll_c = vec![0.0; c];
        let mut rounded = match (cx.dtype, self.dnll_c) {
            (Activations::Bf16, Some(_)) => Some(cx.arena.mat(c, vocab, cx.dtype)),
            _ => None,
        };
        let narrow = match &mut rounded {
            Some(Mat::Bf16(rows)) => Some(rows.view_mut()),
            _ => None,
        };
        cx.kernels.cross_entropy(logits_cv.view_mut(), self.labels, self.dnll_c, narrow, &mut nll_c);
        let Some(Backward { dh_td, sinks }) = backward else { return Ok(nll_c) };
        let dlogits = rounded.as_ref().map_or_else(|| logits_cv.view().into(), Mat::view);
        let before: Vec<Site> = head.sites.iter().filter(|site| site.id != linear.id).cloned().collect();
        let through =
            dh_td.is_some() || !wanted(cx.base, &cx.parts[self.part], &before, &*sinks[self.part])?.is_empty();
        let mut dread_cd = through.then(|| cx.arena.rows(c, hidden));
        let dread = dread_cd.as_mut().map(|dread| (dread.view_mut(), false));
        cx.linear_vjp(linear, read.view(), self.given(), &thin, dlogits, dread, sinks)?;
        let Some(dread_cd) = dread_cd else { return Ok(nll_c) };
        let dh_cd = self.read_vjp(head, &read, dread_cd, cx, sinks)?;
        let Some(dh_td) = dh_td else { return Ok(nll_c) };
        let mut to = dh_td.view_mut();
        for (place, row) in rows().enumerate() {
            to.row(row).copy_from_slice(dh_cd.view().row(place));
        }
        Ok(nll_c)
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
        let Some(norm) = head.at(Place::FinalNorm) else { return Ok(d_cd) };
        let mut dh_cd = cx.arena.zeros(d_cd.n_rows(), d_cd.n_cols());
        cx.norm_vjp(norm, read.h_cd.view(), self.given(), d_cd.view(), dh_cd.view_mut(), sinks)?;
        Ok(dh_cd)
    }
}
