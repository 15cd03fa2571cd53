//! Losses of documents' vectors, and how they are counted. The vectors of a pass are a part's own; those of a whole step
//! ([`of_step`]) are for whoever has all of its passes.

use std::sync::{Mutex, PoisonError};

use attune_points::engine::LossReport;
use attune_points::layout::{Column, VECTORS, Values};
use attune_points::objective::{Denominator, Level, Needs, Objective, VectorsLoss, VectorsView};
use attune_points::{Error, Layout, Result};
use candle_core::{Device, Tensor};

use crate::loss::{count, count_documents};

/// What an objective makes of vectors `y_nd`, and the gradient of the sum by each.
pub(crate) fn losses(objective: &dyn Objective, layout: &Layout, y_nd: &Tensor) -> Result<(LossReport, Tensor)> {
    let docs = layout.docs();
    let VectorsLoss { loss_n, dy_nd, beside } = objective.vectors(&VectorsView { layout, y_nd })?;
    if loss_n.len() != docs.len() || dy_nd.dims() != y_nd.dims() {
        let (losses, shape, expected) = (loss_n.len(), dy_nd.dims(), y_nd.dims());
        return Err(Error::Refused(format!(
            "an objective gave {losses} losses and gradients {shape:?} for vectors {expected:?}"
        )));
    }
    let (mut report, supervised) = (LossReport::default(), layout.supervised());
    count(&mut report, &supervised, &vec![0.0; supervised.len()], layout);
    count_documents(&mut report, &supervised, docs);
    for (doc, loss) in docs.iter().zip(loss_n) {
        report.loss_sum += loss;
        if let Some((sum, _)) = report.by_domain.get_mut(usize::from(doc.domain)) {
            *sum += loss;
        }
    }
    for (name, number) in beside {
        *report.beside.entry(name.into()).or_default() += number;
    }
    Ok((report, dy_nd))
}

/// What an objective of level [`Level::Step`] makes of the vectors of a step's documents, which are in the layout's column
/// [`VECTORS`]; with their gradients, one after the other.
///
/// # Errors
/// A column that is not there; whatever the objective raises.
pub fn of_step(objective: &dyn Objective, layout: &Layout) -> Result<(LossReport, Vec<f32>)> {
    let y_nd = column(layout, VECTORS)?;
    let (report, dy_nd) = losses(objective, layout, &y_nd)?;
    Ok((report, dy_nd.flatten_all()?.to_vec1()?))
}

/// A column of vectors, `[N, D]`.
///
/// # Errors
/// A column that is not there.
pub fn column(layout: &Layout, name: &str) -> Result<Tensor> {
    match layout.column(name) {
        Some(Column { values: Values::Vectors { width, numbers }, .. }) => {
            Ok(Tensor::from_slice(numbers, (layout.docs().len(), *width), &Device::Cpu)?)
        }
        _ => Err(Error::Refused(format!("a batch lacks the column {name:?}, which the objective reads"))),
    }
}

/// An objective that listens to the vectors of each part, one after the other; `toward` is their gradient, of one part, if it is not
/// nothing.
#[derive(Default)]
pub(crate) struct Heard {
    pub(crate) toward: Option<Tensor>,
    pub(crate) parts: Mutex<Vec<Tensor>>,
}

impl Heard {
    pub(crate) fn into_parts(self) -> Vec<Tensor> {
        self.parts.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Objective for Heard {
    fn level(&self) -> Level {
        Level::Part
    }

    fn needs(&self) -> Needs {
        Needs { vectors: true, ..Needs::default() }
    }

    fn denominator(&self) -> Denominator {
        Denominator::Documents
    }

    fn vectors(&self, vectors: &VectorsView<'_>) -> Result<VectorsLoss> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).push(vectors.y_nd.clone());
        let dy_nd = match &self.toward {
            Some(toward) => toward.clone(),
            None => vectors.y_nd.zeros_like()?,
        };
        Ok(VectorsLoss { loss_n: vec![0.0; vectors.layout.docs().len()], dy_nd, beside: Vec::new() })
    }
}
