//! Objectives that see a whole step at once: a first pass over all micro-batches of all ranks finds log-probabilities, or vectors of
//! documents, the objective turns them into a loss and its gradient by each, and a second pass takes that to the parameters. The
//! gradient is that of one pass over the whole step.
//!
//! Every rank computes the same loss from the same numbers in the same order, so nothing is sent back, and no bit depends on the
//! number of ranks.

use std::ops::Range;
use std::sync::Arc;

use attune_models::dropout::Dropout;
use attune_models::scope::of_step;
use attune_models::vectors;
use attune_points::engine::LossReport;
use attune_points::layout::{Axis, Column, DLOGP, DVECTORS, LOGP, LabelCounts, REFERENCE, Values};
use attune_points::objective::{ChunkLoss, ChunkView, Denominator, Level, Needs, Objective, VectorsLoss, VectorsView};
use attune_points::{Error, Layout, Result, Theta};

use crate::engine::{Message, RankEngine, groups};

/// Micro-batches by their numbers.
type Parts = Vec<(u32, Arc<Layout>)>;

impl RankEngine<'_> {
    /// The micro-batches with the gradient of the whole step's loss in the column [`DLOGP`] or [`DVECTORS`], and that loss. One by
    /// log-probabilities counts nothing.
    pub(crate) fn scope(
        &mut self,
        at: &Theta,
        parts: &[(u32, Arc<Layout>)],
        dropout: Option<Dropout>,
        of: &dyn Objective,
    ) -> Result<(Parts, LossReport)> {
        let mut own: Parts = Vec::with_capacity(parts.len());
        for group in groups(parts, self.rows_per_pass) {
            let layouts: Vec<Arc<Layout>> = group.iter().map(|(_, layout)| Arc::clone(layout)).collect();
            let (mut layouts, mut times) = if of.needs().vectors {
                self.shared.model.with_vectors(at, dropout, &layouts)?
            } else {
                self.shared.model.with_logp(LOGP, at, dropout, &layouts)?
            };
            if of.needs().reference {
                let (with, took) = self.shared.model.with_logp(REFERENCE, &at.untrained(), None, &layouts)?;
                layouts = with;
                times += took;
            }
            self.spent.passes += times;
            own.extend(group.iter().map(|(part, _)| *part).zip(layouts));
        }
        let messages = own.iter().map(|(part, layout)| (*part, Message::Scored(Arc::clone(layout)))).collect();
        let mut all: Parts = Vec::new();
        for (part, message) in self.exchange(messages)? {
            let Message::Scored(layout) = message else {
                return Err(Error::Refused("a rank sent something else where a scored batch was due".to_owned()));
            };
            all.push((part, layout));
        }
        let whole = Layout::concat(all.iter().map(|(_, layout)| &**layout));
        if of.needs().vectors {
            let (mut report, dy_nd) = vectors::of_step(of, &whole)?;
            let width = dy_nd.len() / whole.docs().len().max(1);
            let column = |docs: Range<usize>| Column {
                axis: Axis::Doc,
                values: Values::Vectors { width, numbers: dy_nd[docs.start * width..docs.end * width].to_vec() },
            };
            put(&mut own, &all, DVECTORS, |layout| layout.docs().len(), column)?;
            report.counts = LabelCounts::default();
            report.by_domain.iter_mut().for_each(|(_, counts)| *counts = LabelCounts::default());
            return Ok((own, report));
        }
        let (report, dlogp_t) = of_step(of, &whole)?;
        let column = |rows: Range<usize>| Column { axis: Axis::Row, values: Values::F64(dlogp_t[rows].to_vec()) };
        put(&mut own, &all, DLOGP, Layout::n_rows, column)?;
        Ok((own, report))
    }
}

/// Gives each of this rank's micro-batches its piece of a column of all, of which a micro-batch has `length` values.
fn put(
    own: &mut Parts,
    all: &Parts,
    name: &str,
    length: impl Fn(&Layout) -> usize,
    column: impl Fn(Range<usize>) -> Column,
) -> Result<()> {
    let mut start = 0;
    for (part, layout) in all {
        let range = start..start + length(layout);
        start = range.end;
        if let Some((_, own)) = own.iter_mut().find(|(number, _)| number == part) {
            Arc::make_mut(own).set_column(name, column(range))?;
        }
    }
    Ok(())
}

/// The objective of the second pass: the gradient by each log-probability is in the column [`DLOGP`], or that by each vector in
/// [`DVECTORS`]. Its losses say nothing.
pub(crate) struct ByColumn {
    pub(crate) vectors: bool,
}

impl Objective for ByColumn {
    fn level(&self) -> Level {
        if self.vectors { Level::Part } else { Level::Chunk }
    }

    fn needs(&self) -> Needs {
        Needs { vectors: self.vectors, ..Needs::default() }
    }

    fn vectors(&self, vectors: &VectorsView<'_>) -> Result<VectorsLoss> {
        let dy_nd = vectors::column(vectors.layout, DVECTORS)?.to_dtype(vectors.y_nd.dtype())?;
        Ok(VectorsLoss { loss_n: vec![0.0; vectors.layout.docs().len()], dy_nd, beside: Vec::new() })
    }

    fn denominator(&self) -> Denominator {
        Denominator::Tokens
    }

    fn chunk(&self, chunk: &ChunkView<'_>) -> Result<ChunkLoss> {
        match chunk.layout.column(DLOGP) {
            Some(Column { values: Values::F64(dlogp_t), .. }) => Ok(ChunkLoss::CrossEntropy {
                weight_t: chunk.rows.iter().map(|row| -dlogp_t[row.row as usize]).collect(),
            }),
            _ => Err(Error::Refused(format!("a batch lacks the column {DLOGP:?}"))),
        }
    }
}
