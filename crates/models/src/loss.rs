//! The loss over chunks of supervised rows: the logits of one chunk exist at a time.

use std::collections::BTreeSet;

use attune_architecture::{Architecture, HeadKind};
use attune_points::engine::LossReport;
use attune_points::layout::{LabelCounts, Supervised};
use attune_points::objective::{ChunkLoss, ChunkView, Level, Objective};
use attune_points::{Doc, Error, GradSink, Layout, Result, TensorId};
use attune_tensor::{autograd, ops};
use candle_core::{D, DType, Device, Tensor, Var};

use crate::context::{GraphCx, Tracked};
use crate::head::Head;
use crate::{regions, scope, vectors};

/// A label that the head has no logit for.
pub(crate) fn outside(label: u32, architecture: &Architecture) -> Error {
    let width = architecture.logits_width();
    Error::Refused(match architecture.head {
        HeadKind::Tokens => format!("label {label} is outside of the model's vocabulary of {width}"),
        _ => format!("label {label} is outside of the model's {width} classes"),
    })
}

/// The negative log-likelihoods of a chunk, `[C]`.
fn nll(logits_cv: &Tensor, rows: &[Supervised], cx: &GraphCx<'_>) -> Result<Tensor> {
    let labels: Vec<u32> = rows.iter().map(|row| row.label).collect();
    let vocab = logits_cv.dim(D::Minus1)?;
    if let Some(label) = labels.iter().find(|label| **label as usize >= vocab) {
        return Err(outside(*label, cx.base.architecture()));
    }
    let labels_c1 = Tensor::new(labels, &Device::Cpu)?.unsqueeze(1)?;
    Ok(ops::log_softmax(logits_cv)?.gather(&labels_c1, 1)?.squeeze(1)?.neg()?)
}

/// The report of all chunks and, where a sink is given, the gradient by the hidden rows.
pub(crate) struct Losses {
    pub(crate) report: LossReport,
    pub(crate) dh_td: Option<Tensor>,
}

/// What a backward pass needs beside a forward one.
pub(crate) struct Backward<'a> {
    pub(crate) scale: f64,
    pub(crate) leaves: &'a [(TensorId, Var)],
    pub(crate) tracked: &'a Tracked,
    pub(crate) sink: &'a mut dyn GradSink,
    /// Whether the gradient by the hidden rows is needed at all.
    pub(crate) below: bool,
}

/// The losses of a batch by the head's graph.
pub(crate) fn losses(
    head: &Head,
    h_td: &Tensor,
    objective: &dyn Objective,
    cx: &GraphCx<'_>,
    mut backward: Option<Backward<'_>>,
) -> Result<Losses> {
    if objective.needs().vectors {
        return of_vectors(head, h_td, objective, cx, backward);
    }
    let dh_td = match &backward {
        Some(backward) if backward.below => Some(h_td.zeros_like()?),
        _ => None,
    };
    let mut sweep = Sweep { head, h_td, cx, dh_td };
    let (reverse, length) = (backward.is_some(), cx.base.architecture().logits_rows());
    let report = sweeps(objective, cx.layout, length, reverse, |rows, loss, reverse| {
        sweep.chunk(rows, loss, backward.as_mut().filter(|_| reverse))
    })?;
    Ok(Losses { report, dh_td: sweep.dh_td })
}

/// The losses of a batch whose documents have vectors.
fn of_vectors(
    head: &Head,
    h_td: &Tensor,
    objective: &dyn Objective,
    cx: &GraphCx<'_>,
    backward: Option<Backward<'_>>,
) -> Result<Losses> {
    let pooling = Head::pooling(cx.base.architecture())?;
    let Some(backward) = backward else {
        let y_nd = head.pooled(h_td, pooling, cx)?;
        return Ok(Losses { report: vectors::losses(objective, cx.layout, &y_nd)?.0, dh_td: None });
    };
    let h_leaf = autograd::leaf(h_td)?;
    let y_nd = head.pooled(h_leaf.as_tensor(), pooling, &cx.with(backward.tracked, None))?;
    let (report, dy_nd) = vectors::losses(objective, cx.layout, &y_nd.detach())?;
    let leaves: Vec<&Var> = backward.leaves.iter().map(|(_, var)| var).chain([&h_leaf]).collect();
    let mut gradients = autograd::pull(&leaves, &[(&y_nd, &(dy_nd * backward.scale)?)])?;
    let dh_td = gradients.pop().flatten();
    for ((id, _), gradient) in backward.leaves.iter().zip(gradients) {
        gradient.map(|gradient| regions::put(&mut *backward.sink, id, &gradient)).transpose()?;
    }
    Ok(Losses { report, dh_td })
}

/// The loss of an objective on a layout, by sweeps over its supervised rows, `length` of them at a time: one, or, where the
/// objective sees more than a chunk, one that finds log-probabilities and, if gradients are taken, one that takes the scopes'
/// gradients back. `sweep` gives what a loss computes of each row, before weights, and takes gradients if it is told to.
pub(crate) fn sweeps(
    objective: &dyn Objective,
    layout: &Layout,
    length: usize,
    reverse: bool,
    mut sweep: impl FnMut(&[Supervised], &ChunkLoss, bool) -> Result<Vec<f64>>,
) -> Result<LossReport> {
    let supervised = layout.supervised();
    let mut report = LossReport::default();
    if objective.level() == Level::Chunk {
        let copies = objective.copies().max(1);
        for rows in supervised.chunks((length / copies).max(1)) {
            let loss = objective.chunk(&ChunkView { layout, rows })?;
            let values = if copies == 1 {
                sweep(rows, &loss, reverse)?
            } else {
                sweep(&copied(rows, layout, copies, &loss)?, &loss, reverse)?
            };
            if values.len() != rows.len() {
                let (got, expected) = (values.len(), rows.len());
                return Err(Error::Refused(format!("an objective gave {got} losses for {expected} supervised rows")));
            }
            count(&mut report, rows, &weighted(&loss, values), layout);
        }
    } else {
        let mut logp_t = Vec::with_capacity(supervised.len());
        for rows in supervised.chunks(length) {
            let loss = ChunkLoss::CrossEntropy { weight_t: vec![1.0; rows.len()] };
            logp_t.extend(sweep(rows, &loss, false)?.into_iter().map(|nll| -nll));
            count(&mut report, rows, &vec![0.0; rows.len()], layout);
        }
        let dlogp_t = scope::losses(objective, layout, &supervised, &logp_t, &mut report)?;
        for (rows, dlogp_c) in supervised.chunks(length).zip(dlogp_t.chunks(length)).filter(|_| reverse) {
            let loss = ChunkLoss::CrossEntropy { weight_t: dlogp_c.iter().map(|dlogp| -dlogp).collect() };
            sweep(rows, &loss, true)?;
        }
    }
    count_documents(&mut report, &supervised, layout.docs());
    Ok(report)
}

/// All copies of the rows of a chunk, of which the layout has the first.
fn copied(rows: &[Supervised], layout: &Layout, copies: usize, loss: &ChunkLoss) -> Result<Vec<Supervised>> {
    let n_rows = layout.n_rows();
    if !n_rows.is_multiple_of(copies) || rows.iter().any(|row| row.row as usize >= n_rows / copies) {
        return Err(Error::Refused(format!("a batch of {n_rows} rows does not hold its documents {copies} times")));
    }
    if !matches!(loss, ChunkLoss::Logits(_)) {
        return Err(Error::Refused("the loss of several copies of a row has to be one by their logits".to_owned()));
    }
    let apart = (n_rows / copies) as u32;
    let copy = |at: u32| rows.iter().map(move |row| Supervised { row: row.row + at * apart, ..*row });
    Ok((0..copies as u32).flat_map(copy).collect())
}

/// The loss of each row of a chunk: what was computed of it, times its weight.
fn weighted(loss: &ChunkLoss, values: Vec<f64>) -> Vec<f64> {
    match loss {
        ChunkLoss::CrossEntropy { weight_t } => weight_t.iter().zip(values).map(|(weight, nll)| weight * nll).collect(),
        _ => values,
    }
}

/// One walk over the supervised rows.
struct Sweep<'s, 'a> {
    head: &'s Head,
    h_td: &'s Tensor,
    cx: &'s GraphCx<'a>,
    /// The gradient by the hidden rows so far, where it is asked for.
    dh_td: Option<Tensor>,
}

impl Sweep<'_, '_> {
    /// What a loss computes of each row of a chunk, in f64, before weights; gradients, where they are asked for, go on.
    fn chunk(
        &mut self,
        rows: &[Supervised],
        loss: &ChunkLoss,
        backward: Option<&mut Backward<'_>>,
    ) -> Result<Vec<f64>> {
        let (head, cx) = (self.head, self.cx);
        let ids: Vec<u32> = rows.iter().map(|row| row.row).collect();
        let ids_c = Tensor::new(ids.as_slice(), &Device::Cpu)?;
        let h_cd = self.h_td.index_select(&ids_c, 0)?;
        let values = |logits_cv: &Tensor| match loss {
            ChunkLoss::CrossEntropy { .. } => nll(logits_cv, rows, cx),
            ChunkLoss::Logits(loss) => checked(loss.graph(logits_cv)?, rows.len()),
            _ => Err(Error::Refused("this engine does not know how to compute such a loss".to_owned())),
        };
        let values_c = match backward {
            None => values(&head.graph(&h_cd, &cx.with(cx.tracked, Some(&ids)))?)?,
            Some(backward) => {
                let h_leaf = autograd::leaf(&h_cd)?;
                let logits_cv = head.graph(h_leaf.as_tensor(), &cx.with(backward.tracked, Some(&ids)))?;
                let values_c = values(&logits_cv)?;
                let dvalues: Vec<f64> = match loss {
                    ChunkLoss::CrossEntropy { weight_t } => weight_t.iter().map(|w| w * backward.scale).collect(),
                    _ => vec![backward.scale; values_c.elem_count()],
                };
                let dvalues_c = Tensor::new(dvalues, &Device::Cpu)?.to_dtype(values_c.dtype())?;
                let leaves: Vec<&Var> = backward.leaves.iter().map(|(_, var)| var).chain([&h_leaf]).collect();
                let mut gradients = autograd::pull(&leaves, &[(&values_c, &dvalues_c)])?;
                if let (Some(sum), Some(Some(dh_cd))) = (&self.dh_td, gradients.pop()) {
                    self.dh_td = Some(sum.index_add(&ids_c, &dh_cd, 0)?);
                }
                for ((id, _), gradient) in backward.leaves.iter().zip(gradients) {
                    if let Some(gradient) = gradient {
                        regions::put(&mut *backward.sink, id, &gradient)?;
                    }
                }
                values_c
            }
        };
        Ok(values_c.detach().to_dtype(DType::F64)?.to_vec1::<f64>()?)
    }
}

/// Losses of a chunk, if there is one for each row, or for each row of which it has several copies.
pub(crate) fn checked(loss_c: Tensor, rows: usize) -> Result<Tensor> {
    match loss_c.dims() {
        [n] if *n > 0 && rows.is_multiple_of(*n) => Ok(loss_c),
        dims => {
            Err(Error::Refused(format!("a loss by logits has shape {dims:?}; expected one number a row, [{rows}]")))
        }
    }
}

/// Counts each document and each group with a supervised row once, however many chunks it was cut into.
pub(crate) fn count_documents(report: &mut LossReport, supervised: &[Supervised], docs: &[Doc]) {
    let (mut last, mut groups) = (None, BTreeSet::new());
    for row in supervised {
        let index = docs.partition_point(|doc| doc.rows.end <= row.row);
        if last.replace(index) == Some(index) {
            continue;
        }
        let groups = u64::from(groups.insert(docs[index].group));
        let counts = LabelCounts { tokens: 0, documents: 1, groups };
        report.counts = report.counts + counts;
        if let Some((_, of_domain)) = report.by_domain.get_mut(usize::from(docs[index].domain)) {
            *of_domain = *of_domain + counts;
        }
    }
}

/// Adds the losses of a chunk's rows to the report, in f64.
pub(crate) fn count(report: &mut LossReport, rows: &[Supervised], loss_t: &[f64], layout: &Layout) {
    let (docs, token) = (layout.docs(), LabelCounts { tokens: 1, ..LabelCounts::default() });
    for (row, loss) in rows.iter().zip(loss_t) {
        report.loss_sum += loss;
        report.counts = report.counts + token;
        let domain = usize::from(docs[docs.partition_point(|doc| doc.rows.end <= row.row)].domain);
        if report.by_domain.len() <= domain {
            report.by_domain.resize(domain + 1, Default::default());
        }
        let sum = &mut report.by_domain[domain];
        *sum = (sum.0 + loss, sum.1 + token);
    }
}
