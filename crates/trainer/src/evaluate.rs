//! Validation loss, set by set.

use std::collections::BTreeMap;
use std::sync::Arc;

use attune_points::engine::{Batch, Engine, LossReport, Source};
use attune_points::objective::{Answers, Level};
use attune_points::{Error, Result};

use crate::engine::{Asking, Message, RankEngine, groups};

/// The loss on each validation set, at the current parameters; the same on every rank: of an objective that needs answers, the
/// mean reward of the likeliest ones, negated, else its mean loss. Batches are dealt out to the ranks, and what they find is added in file order.
pub(crate) fn validation(engine: &mut RankEngine<'_>) -> Result<BTreeMap<String, f64>> {
    let names: Vec<String> = engine.shared.validation.iter().map(|(name, _)| name.clone()).collect();
    let mut losses = BTreeMap::new();
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
            losses.insert(name, report.loss_sum / objective.denominator().of(batch.counts));
            continue;
        }
        let mut mine = Vec::with_capacity(parts.len());
        for group in groups(&parts, engine.rows_per_pass) {
            let found = engine.pass(&theta, group, None, &Asking::Shared(Arc::clone(&objective)), None)?;
            mine.extend(group.iter().zip(found).map(|((part, _), (_, report))| (*part, Message::Report(report))));
        }
        let mut total = LossReport::default();
        for (_, message) in engine.exchange(mine)? {
            let Message::Report(report) = message else {
                return Err(Error::Refused("a rank sent a gradient where a validation loss was due".to_owned()));
            };
            total.add(&report);
        }
        losses.insert(name, total.loss_sum / objective.denominator().of(total.counts));
    }
    Ok(losses)
}
