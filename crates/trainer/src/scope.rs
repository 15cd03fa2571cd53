//! Objectives that see a whole step at once: a first pass over all micro-batches of all ranks finds log-probabilities, the
//! objective turns them into a loss and its gradient by each, and a second pass takes that to the parameters.
//!
//! Every rank computes the same loss from the same numbers in the same order, so nothing is sent back, and no bit depends on the
//! number of ranks.

use std::sync::Arc;

use attune_models::dropout::Dropout;
use attune_models::scope::of_step;
use attune_points::engine::LossReport;
use attune_points::layout::{Axis, Column, DLOGP, LOGP, REFERENCE, Values};
use attune_points::objective::{ChunkLoss, ChunkView, Denominator, Objective};
use attune_points::{Error, Layout, Result, Theta};

use crate::engine::{Message, RankEngine, groups};

/// Micro-batches by their numbers.
type Parts = Vec<(u32, Arc<Layout>)>;

impl RankEngine<'_> {
    /// The micro-batches with the gradient of the whole step's loss in the column [`DLOGP`], and that loss, which counts
    /// nothing.
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
            let (mut layouts, mut times) = self.shared.model.with_logp(LOGP, at, dropout, &layouts)?;
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
        let (report, dlogp_t) = of_step(of, &whole)?;
        let mut start = 0;
        for (part, layout) in all {
            let rows = start..start + layout.n_rows();
            start = rows.end;
            if let Some((_, own)) = own.iter_mut().find(|(number, _)| *number == part) {
                let values = Values::F64(dlogp_t[rows].to_vec());
                Arc::make_mut(own).set_column(DLOGP, Column { axis: Axis::Row, values })?;
            }
        }
        Ok((own, report))
    }
}

/// The objective of the second pass: the gradient by each log-probability is in the column [`DLOGP`]. Its losses say nothing.
pub(crate) struct ByColumn;

impl Objective for ByColumn {
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
