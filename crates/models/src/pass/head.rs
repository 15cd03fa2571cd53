//! The loss over chunks of supervised rows: the last norm, the head and the cross-entropy of one chunk at a time, and at once
//! the gradient by its hidden rows.

use attune_architecture::Place;
use attune_points::engine::LossReport;
use attune_points::objective::{ChunkLoss, ChunkView};
use attune_points::{Error, Result};

use crate::block::site;
use crate::head::Head;
use crate::loss::{count, count_documents};
use crate::pass::arena::{Activations, Mat, Rows};
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
    let vocab = cx.architecture().vocab;
    let mut reports = Vec::with_capacity(tasks.len());
    for (part, task) in tasks.iter().enumerate() {
        let layout = task.part.layout;
        let supervised = layout.supervised();
        let mut report = LossReport::default();
        for rows in supervised.chunks(cx.architecture().logits_rows()) {
            if let Some(row) = rows.iter().find(|row| row.label as usize >= vocab) {
                let message = format!("label {} is outside of the model's vocabulary of {vocab}", row.label);
                return Err(Error::Refused(message));
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

impl Chunk<'_> {
    /// The negative log-likelihoods; gradients go where they should.
    fn run(
        &self,
        head: &Head,
        h_td: &Rows<f32>,
        cx: &PassCx<'_>,
        backward: &mut Option<Backward<'_, '_>>,
    ) -> Result<Vec<f32>> {
        let (c, hidden, vocab) = (self.ids.len(), cx.architecture().hidden, cx.architecture().vocab);
        let given = Given::Of { part: self.part, ids: self.ids };
        let start = cx.rows[self.part].start;
        let rows = || self.ids.iter().map(move |&id| start + id as usize);
        let (norm, linear) = (site(&head.sites, Place::FinalNorm)?, site(&head.sites, Place::Head)?);
        let mut h_cd = cx.arena.rows(c, hidden);
        gather(h_td.view(), rows(), h_cd.view_mut());
        let n_cd = cx.norm(norm, h_cd.view(), given)?;
        let mut logits_cv = cx.arena.rows(c, vocab);
        let thin = cx.linear(linear, n_cd.view(), given, logits_cv.view_mut(), false)?;
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
        let through = dh_td.is_some()
            || !wanted(cx.base, &cx.parts[self.part], std::slice::from_ref(norm), &*sinks[self.part])?.is_empty();
        let mut dn_cd = through.then(|| cx.arena.rows(c, hidden));
        let dn = dn_cd.as_mut().map(|dn| (dn.view_mut(), false));
        cx.linear_vjp(linear, n_cd.view(), given, &thin, dlogits, dn, sinks)?;
        let Some(dn_cd) = dn_cd else { return Ok(nll_c) };
        let mut dh_cd = cx.arena.zeros(c, hidden);
        cx.norm_vjp(norm, h_cd.view(), given, dn_cd.view(), dh_cd.view_mut(), sinks)?;
        let Some(dh_td) = dh_td else { return Ok(nll_c) };
        let mut to = dh_td.view_mut();
        for (place, row) in rows().enumerate() {
            to.row(row).copy_from_slice(dh_cd.view().row(place));
        }
        Ok(nll_c)
    }
}
