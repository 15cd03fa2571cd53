//! The loss over chunks of supervised rows: the logits of one chunk exist at a time.

use attune_architecture::{Architecture, HeadKind};
use attune_points::engine::LossReport;
use attune_points::layout::{LabelCounts, Supervised};
use attune_points::objective::{ChunkLoss, ChunkView, Objective};
use attune_points::{Doc, Error, GradSink, Layout, Result, TensorId};
use attune_tensor::{autograd, ops};
use candle_core::{D, DType, Device, Tensor, Var};

use crate::context::{GraphCx, Tracked};
use crate::head::Head;

/// A label that the head has no logit for.
pub(crate) fn outside(label: u32, architecture: &Architecture) -> Error {
    let width = architecture.logits_width();
    Error::Refused(match architecture.head {
        HeadKind::Tokens => format!("label {label} is outside of the model's vocabulary of {width}"),
        _ => format!("label {label} is outside of the model's {width} classes"),
    })
}

/// The negative log-likelihoods of a chunk, `[C]`.
fn nll(head: &Head, h_cd: &Tensor, rows: &[Supervised], cx: &GraphCx<'_>) -> Result<Tensor> {
    let logits_cv = head.graph(h_cd, cx)?;
    let labels: Vec<u32> = rows.iter().map(|row| row.label).collect();
    let vocab = logits_cv.dim(D::Minus1)?;
    if let Some(label) = labels.iter().find(|label| **label as usize >= vocab) {
        return Err(outside(*label, cx.base.architecture()));
    }
    let labels_c1 = Tensor::new(labels, &Device::Cpu)?.unsqueeze(1)?;
    Ok(ops::log_softmax(&logits_cv)?.gather(&labels_c1, 1)?.squeeze(1)?.neg()?)
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

/// Walks the supervised rows of the batch, chunk by chunk.
pub(crate) fn losses(
    head: &Head,
    h_td: &Tensor,
    objective: &dyn Objective,
    cx: &GraphCx<'_>,
    mut backward: Option<Backward<'_>>,
) -> Result<Losses> {
    let supervised = cx.layout.supervised();
    let mut report = LossReport::default();
    let mut dh_td = match &backward {
        Some(backward) if backward.below => Some(h_td.zeros_like()?),
        _ => None,
    };
    for rows in supervised.chunks(cx.base.architecture().logits_rows()) {
        let ids: Vec<u32> = rows.iter().map(|row| row.row).collect();
        let ids_c = Tensor::new(ids.as_slice(), &Device::Cpu)?;
        let h_cd = h_td.index_select(&ids_c, 0)?;
        let ChunkLoss::CrossEntropy { weight_t } = objective.chunk(&ChunkView { layout: cx.layout, rows })? else {
            return Err(Error::Refused("this engine computes cross-entropies only".to_owned()));
        };
        let nll_c = match &mut backward {
            None => nll(head, &h_cd, rows, &cx.with(cx.tracked, Some(&ids)))?,
            Some(backward) => {
                let h_leaf = autograd::leaf(&h_cd)?;
                let nll_c = nll(head, h_leaf.as_tensor(), rows, &cx.with(backward.tracked, Some(&ids)))?;
                let dnll: Vec<f64> = weight_t.iter().map(|weight| weight * backward.scale).collect();
                let dnll_c = Tensor::new(dnll, &Device::Cpu)?.to_dtype(nll_c.dtype())?;
                let leaves: Vec<&Var> = backward.leaves.iter().map(|(_, var)| var).chain([&h_leaf]).collect();
                let mut gradients = autograd::pull(&leaves, &[(&nll_c, &dnll_c)])?;
                if let (Some(sum), Some(Some(dh_cd))) = (&dh_td, gradients.pop()) {
                    dh_td = Some(sum.index_add(&ids_c, &dh_cd, 0)?);
                }
                for ((id, _), gradient) in backward.leaves.iter().zip(gradients) {
                    if let Some(gradient) = gradient {
                        backward.sink.put(id, &gradient)?;
                    }
                }
                nll_c
            }
        };
        let values = nll_c.detach().to_dtype(DType::F64)?.to_vec1::<f64>()?;
        count(&mut report, rows, &weight_t, values, cx.layout);
    }
    count_documents(&mut report, &supervised, cx.layout.docs());
    Ok(Losses { report, dh_td })
}

/// Counts each document with a supervised row once, however many chunks it was cut into.
pub(crate) fn count_documents(report: &mut LossReport, supervised: &[Supervised], docs: &[Doc]) {
    let mut last = None;
    for row in supervised {
        let index = docs.partition_point(|doc| doc.rows.end <= row.row);
        if last.replace(index) != Some(index) {
            report.counts.documents += 1;
            if let Some((_, counts)) = report.by_domain.get_mut(usize::from(docs[index].domain)) {
                counts.documents += 1;
            }
        }
    }
}

/// Adds a chunk to the report, in f64.
pub(crate) fn count(
    report: &mut LossReport,
    rows: &[Supervised],
    weight_t: &[f64],
    nll_t: impl IntoIterator<Item = f64>,
    layout: &Layout,
) {
    let docs = layout.docs();
    for ((row, weight), value) in rows.iter().zip(weight_t).zip(nll_t) {
        let loss = weight * value;
        report.loss_sum += loss;
        report.counts.tokens += 1;
        let domain = usize::from(docs[docs.partition_point(|doc| doc.rows.end <= row.row)].domain);
        if report.by_domain.len() <= domain {
            report.by_domain.resize(domain + 1, Default::default());
        }
        let sum = &mut report.by_domain[domain];
        *sum = (sum.0 + loss, sum.1 + LabelCounts { tokens: 1, documents: 0 });
    }
}
