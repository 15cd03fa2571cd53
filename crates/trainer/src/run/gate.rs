//! What a job has to come to, so that its result is kept.

use std::collections::BTreeMap;

use attune_spec::id::Name;
use attune_spec::job::Bounds;
use attune_spec::{Fault, FieldPath};

use crate::checkpoint::Measured;

/// Whether each validation set came to what it is bound to, by what was measured before the first step and after the last.
///
/// # Errors
/// A fault at each bound that was not kept, with what was found.
pub(super) fn pass(
    gate: &BTreeMap<Name, Bounds>,
    before: Option<&Measured>,
    after: Option<&Measured>,
) -> Result<(), Vec<Fault>> {
    let path = FieldPath::from("outputs").field("gate");
    let mut faults = Vec::new();
    for (set, bounds) in gate {
        let set = set.as_str();
        let loss = |measured: Option<&Measured>| measured.and_then(|measured| measured.loss.get(set).copied());
        let mut fault = |field: &str, message: String| faults.push(Fault::new(path.field(set).field(field), message));
        let (first, last) = (loss(before), loss(after));
        // What was not measured is not good enough: no number passes for one.
        let last_in_words = last.map_or_else(|| "was not measured".to_owned(), |last| format!("came to {last:.4}"));
        if let Some(bound) = bounds.loss.filter(|bound| last.is_none_or(|last| last > *bound)) {
            fault("loss", format!("is {bound}, and the loss of {set} {last_in_words}"));
        }
        let is_worse = |bound: f64| first.zip(last).is_none_or(|(first, last)| last > bound * first);
        if let Some(bound) = bounds.of_before.filter(|bound| is_worse(*bound)) {
            let from = first.map_or_else(String::new, |first| format!(" from {first:.4}"));
            fault("of_before", format!("is {bound}, and the loss of {set} {last_in_words}{from}"));
        }
        let found = after.and_then(|after| after.accuracy.get(set).copied());
        if let Some(bound) = bounds.accuracy.filter(|bound| found.is_none_or(|found| found < *bound)) {
            let found = found.map_or_else(|| "was not measured".to_owned(), |found| format!("came to {found:.4}"));
            fault("accuracy", format!("is {bound}, and the share of {set} that is found {found}"));
        }
        // Of answers the loss is what they are worth, negated.
        if let Some(bound) = bounds.reward.filter(|bound| last.is_none_or(|last| -last < *bound)) {
            let found = last.map_or_else(|| "was not measured".to_owned(), |last| format!("came to {:.4}", -last));
            fault("reward", format!("is {bound}, and the mean reward of {set} {found}"));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(faults) }
}

#[cfg(test)]
mod tests {
    use attune_spec::id::Step;

    use super::*;

    fn measured(loss: f64, accuracy: Option<f64>) -> Measured {
        let set = || "chat".to_owned();
        Measured {
            step: Step(3),
            loss: BTreeMap::from([(set(), loss)]),
            accuracy: accuracy.map(|share| (set(), share)).into_iter().collect(),
        }
    }

    fn faults(bounds: Bounds, before: Option<&Measured>, after: Option<&Measured>) -> Vec<String> {
        let gate = BTreeMap::from([("chat".parse().unwrap(), bounds)]);
        pass(&gate, before, after).err().unwrap_or_default().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_bound_is_kept_by_what_is_at_it_and_broken_by_what_is_beyond() {
        let (before, after) = (measured(4.0, None), measured(2.0, Some(0.75)));
        let all = |loss, of_before, accuracy| {
            let bounds =
                Bounds { loss: Some(loss), of_before: Some(of_before), accuracy: Some(accuracy), reward: None };
            faults(bounds, Some(&before), Some(&after))
        };
        assert!(all(2.0, 0.5, 0.75).is_empty());
        assert_eq!(
            all(1.9, 0.49, 0.76),
            [
                "`outputs.gate.chat.loss` is 1.9, and the loss of chat came to 2.0000",
                "`outputs.gate.chat.of_before` is 0.49, and the loss of chat came to 2.0000 from 4.0000",
                "`outputs.gate.chat.accuracy` is 0.76, and the share of chat that is found came to 0.7500",
            ]
        );
    }

    #[test]
    fn a_reward_is_the_loss_of_answers_negated() {
        let after = measured(-1.25, None);
        let of = |reward| faults(Bounds { reward: Some(reward), ..Bounds::default() }, None, Some(&after));
        assert!(of(1.25).is_empty() && of(-3.0).is_empty());
        assert_eq!(of(1.3), ["`outputs.gate.chat.reward` is 1.3, and the mean reward of chat came to 1.2500"]);
    }

    #[test]
    fn what_was_not_measured_does_not_pass() {
        let bounds = Bounds { loss: Some(9.0), of_before: Some(9.0), accuracy: Some(0.0), reward: Some(0.0) };
        assert_eq!(faults(bounds, None, None).len(), 4);
        let of_losses = Bounds { reward: None, ..bounds };
        assert_eq!(faults(of_losses, Some(&measured(1.0, None)), Some(&measured(1.0, None))).len(), 1);
        assert!(pass(&BTreeMap::new(), None, None).is_ok());
    }
}
