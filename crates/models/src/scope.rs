//! Scoped objectives between the two sweeps of the head: from log-probabilities to a loss and its gradient by each. The scopes of
//! a pass are its own; that of a whole step ([`of_step`]) is for whoever has all of its passes.

use std::ops::Range;

use attune_points::engine::LossReport;
use attune_points::layout::{Axis, Column, LOGP, REFERENCE, Supervised, Values};
use attune_points::objective::{Level, Objective, ScopeView};
use attune_points::{Doc, Error, Layout, Result};

/// The documents of each scope, in order.
fn scopes(docs: &[Doc], level: Level) -> Result<Vec<Range<usize>>> {
    let mut scopes: Vec<Range<usize>> = Vec::new();
    match level {
        Level::Document => scopes.extend((0..docs.len()).map(|doc| doc..doc + 1)),
        Level::Group => {
            for group in docs.chunk_by(|a, b| a.group == b.group) {
                let start = scopes.last().map_or(0, |scope| scope.end);
                if docs[..start].iter().any(|doc| doc.group == group[0].group) {
                    return Err(Error::Refused(format!(
                        "documents of group {} do not follow each other in the batch",
                        group[0].group
                    )));
                }
                scopes.push(start..start + group.len());
            }
        }
        Level::Part | Level::Step => scopes.push(0..docs.len()),
        _ => return Err(Error::Refused(format!("this engine has no scopes of level {level:?}"))),
    }
    Ok(scopes)
}

/// The loss of an objective of level [`Level::Step`] on all documents of a step, whose columns have the log-probabilities of
/// labels, and the layout's column of its gradient by them.
///
/// # Errors
/// Columns that are not there; whatever the objective raises.
pub fn of_step(objective: &dyn Objective, layout: &Layout) -> Result<(LossReport, Vec<f64>)> {
    let supervised = layout.supervised();
    let logp_t = of_rows(layout, LOGP, &supervised)?;
    let mut report = LossReport::default();
    let found = losses(objective, layout, &supervised, &logp_t, &mut report)?;
    let mut dlogp_t = vec![0.0; layout.n_rows()];
    supervised.iter().zip(found).for_each(|(row, dlogp)| dlogp_t[row.row as usize] = dlogp);
    Ok((report, dlogp_t))
}

/// What a column of numbers has for supervised rows.
fn of_rows(layout: &Layout, name: &str, supervised: &[Supervised]) -> Result<Vec<f64>> {
    match layout.column(name) {
        Some(Column { axis: Axis::Row, values: Values::F64(logp_t) }) => {
            Ok(supervised.iter().map(|row| logp_t[row.row as usize]).collect())
        }
        _ => Err(Error::Refused(format!("a batch lacks the column {name:?}, which the objective reads"))),
    }
}

/// The losses of all scopes with a supervised row, added to the report, and the gradient of their sum by the log-probability
/// of each supervised row.
pub(crate) fn losses(
    objective: &dyn Objective,
    layout: &Layout,
    supervised: &[Supervised],
    logp_t: &[f64],
    report: &mut LossReport,
) -> Result<Vec<f64>> {
    let (docs, mut dlogp_t) = (layout.docs(), vec![0.0; logp_t.len()]);
    if docs.is_empty() {
        return Ok(dlogp_t);
    }
    let reference_t = if objective.needs().reference { of_rows(layout, REFERENCE, supervised)? } else { Vec::new() };
    for scope in scopes(docs, objective.level())? {
        let at = |row: u32| supervised.partition_point(|supervised| supervised.row < row);
        let rows = at(docs[scope.start].rows.start)..at(docs[scope.end - 1].rows.end);
        if rows.is_empty() {
            continue;
        }
        let domain = usize::from(docs[scope.start].domain);
        let view = ScopeView {
            layout,
            docs: scope,
            rows: &supervised[rows.clone()],
            logp_t: &logp_t[rows.clone()],
            reference_t: reference_t.get(rows.clone()).unwrap_or_default(),
        };
        let loss = objective.scope(&view)?;
        if loss.dlogp_t.len() != rows.len() {
            let (got, expected) = (loss.dlogp_t.len(), rows.len());
            return Err(Error::Refused(format!("an objective gave {got} gradients for {expected} supervised rows")));
        }
        dlogp_t[rows].copy_from_slice(&loss.dlogp_t);
        report.loss_sum += loss.loss;
        for (name, number) in loss.beside {
            *report.beside.entry(name.into()).or_default() += number;
        }
        if report.by_domain.len() <= domain {
            report.by_domain.resize(domain + 1, Default::default());
        }
        report.by_domain[domain].0 += loss.loss;
    }
    Ok(dlogp_t)
}
