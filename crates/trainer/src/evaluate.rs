//! Validation loss, and the share of classes, or of what belongs to queries, that is found, set by set.

use std::collections::BTreeMap;
use std::sync::Arc;

use attune_points::engine::{Batch, Engine, LossReport, Source};
use attune_points::objective::{Answers, ChunkLoss, ChunkView, Denominator, Level, LogitsLoss, Objective};
use attune_points::{Error, Layout, Result, Theta};
use candle_core::{D, Tensor};

use crate::engine::{Asking, Message, RankEngine, groups};

/// What is found on each validation set.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Of an objective that needs answers, the mean reward of the likeliest ones, negated, else its mean loss.
    pub(crate) loss: BTreeMap<String, f64>,
    /// The share of labelled rows whose likeliest class is their own, of a head over classes; of queries whose most similar passage of
    /// the set belongs to them, of one that gives vectors.
    pub(crate) accuracy: BTreeMap<String, f64>,
}

/// What is found on each validation set at the current parameters; the same on every rank. Batches are dealt out to the ranks, and what
/// they find is added in file order.
pub(crate) fn validation(engine: &mut RankEngine<'_>) -> Result<Found> {
    let names: Vec<String> = engine.shared.validation.iter().map(|(name, _)| name.clone()).collect();
    let Found { loss: mut losses, mut accuracy } = Found::default();
    let has_classes = engine.shared.model.base().architecture().head.labels().is_some();
    for (index, name) in (0u16..).zip(names) {
        let batch = engine.batch(Source::Validation(index))?;
        let (objective, theta) = (engine.objective(), engine.theta().clone());
        let (rank, size) = (engine.collective.rank(), engine.collective.size());
        let parts: Vec<_> = batch.parts.iter().filter(|(part, _)| part % size == rank).cloned().collect();
        if let Some(how) = objective.needs().answers {
            let likeliest = Answers { each: 1, temperature: 0.0, ..how };
            let (_, judged) = engine.answered(&theta, &Batch { parts, ..batch }, &likeliest)?;
            let Some(reward) = judged.reward() else {
                return Err(Error::Refused(format!(
                    "no answer to the validation set {name:?} can be judged by `tune.rewards`"
                )));
            };
            losses.insert(name, -reward);
            continue;
        }
        if objective.level() == Level::Step {
            let (_, report) = engine.scope(&theta, &parts, None, &*objective)?;
            let divisor = objective.denominator().of(batch.counts);
            if let Some(found) = report.beside.get("accuracy").filter(|_| objective.needs().vectors) {
                accuracy.insert(name.clone(), found / divisor);
            }
            losses.insert(name, report.loss_sum / divisor);
            continue;
        }
        let found = total(engine, &theta, &parts, &objective)?;
        losses.insert(name.clone(), found.loss_sum / objective.denominator().of(found.counts));
        if has_classes {
            let missed: Arc<dyn Objective> = Arc::new(Missed);
            let found = total(engine, &theta, &parts, &missed)?;
            accuracy.insert(name, 1.0 - found.loss_sum / missed.denominator().of(found.counts));
        }
    }
    Ok(Found { loss: losses, accuracy })
}

/// What an objective finds on the parts of all ranks, of which these are this rank's.
fn total(
    engine: &mut RankEngine<'_>,
    theta: &Theta,
    parts: &[(u32, Arc<Layout>)],
    objective: &Arc<dyn Objective>,
) -> Result<LossReport> {
    let mut mine = Vec::with_capacity(parts.len());
    for group in groups(parts, engine.rows_per_pass) {
        let found = engine.pass(theta, group, None, &Asking::Shared(Arc::clone(objective)), None)?;
        mine.extend(group.iter().zip(found).map(|((part, _), (_, report))| (*part, Message::Report(report))));
    }
    let mut total = LossReport::default();
    for (_, message) in engine.exchange(mine)? {
        let Message::Report(report) = message else {
            return Err(Error::Refused("a rank sent a gradient where a validation loss was due".to_owned()));
        };
        total.add(&report);
    }
    Ok(total)
}

/// Counts the labelled rows whose likeliest class is another one.
struct Missed;

impl Objective for Missed {
    fn denominator(&self) -> Denominator {
        Denominator::Tokens
    }

    fn chunk(&self, chunk: &ChunkView<'_>) -> Result<ChunkLoss> {
        let labels = chunk.rows.iter().map(|row| row.label).collect();
        Ok(ChunkLoss::Logits(Arc::new(MissedOf { labels })))
    }
}

/// The same of rows with these labels.
#[derive(Debug)]
struct MissedOf {
    labels: Vec<u32>,
}

impl LogitsLoss for MissedOf {
    fn graph(&self, logits_cv: &Tensor) -> Result<Tensor> {
        let labels_c = Tensor::new(self.labels.as_slice(), logits_cv.device())?;
        Ok(logits_cv.argmax(D::Minus1)?.ne(&labels_c)?.to_dtype(logits_cv.dtype())?)
    }
}

#[cfg(test)]
mod tests {
    use attune_points::layout::Supervised;
    use candle_core::Device;

    use super::*;

    #[test]
    fn rows_whose_likeliest_class_is_another_are_missed() {
        let rows = [2, 0, 1].map(|label| Supervised { row: 0, label });
        let layout = Layout::new();
        let loss = Missed.chunk(&ChunkView { layout: &layout, rows: &rows }).unwrap();
        let logits = Tensor::new(&[[0.0f32, 1.0, 5.0], [2.0, 2.5, 0.0], [-3.0, -1.0, -2.0]], &Device::Cpu).unwrap();
        let ChunkLoss::Logits(loss) = loss else { panic!("a loss by logits") };
        assert_eq!(loss.graph(&logits).unwrap().to_vec1::<f32>().unwrap(), [0.0, 1.0, 0.0]);
    }
}
