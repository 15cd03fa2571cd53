//! What a run has met, so that a simulation that meets nothing is noticed.

use std::collections::BTreeMap;

use crate::{Answer, Change, Effects, EventKind, Input};

/// Counts by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) n_steps: u64,
    pub(crate) faults: BTreeMap<&'static str, u64>,
    pub(crate) refusals: BTreeMap<String, u64>,
    pub(crate) arrows: BTreeMap<String, u64>,
}

impl Tally {
    pub(crate) fn fault(&mut self, name: &'static str) {
        *self.faults.entry(name).or_default() += 1;
    }

    pub(crate) fn step(&mut self, input: &Input, effects: &Effects) {
        self.n_steps += 1;
        if let Answer::Refused(refusal) = &effects.answer {
            let name = first_word(refusal);
            let by = if matches!(input, Input::Commit { .. }) { "commit: " } else { "" };
            *self.refusals.entry(format!("{by}{name}")).or_default() += 1;
        }
        for change in &effects.changes {
            if let Change::Cohort(cohort) = change
                && cohort.attempts.len() > 1
            {
                *self.arrows.entry(format!("{} lanes", cohort.attempts.len())).or_default() += 1;
            }
            if let Change::Event(event) = change
                && let EventKind::Moved { from, to, reason } = event.kind
            {
                *self.arrows.entry(format!("{from} -> {to} {}", reason.code())).or_default() += 1;
            }
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.n_steps += other.n_steps;
        for (name, n) in &other.faults {
            *self.faults.entry(name).or_default() += n;
        }
        for (name, n) in &other.refusals {
            *self.refusals.entry(name.clone()).or_default() += n;
        }
        for (name, n) in &other.arrows {
            *self.arrows.entry(name.clone()).or_default() += n;
        }
    }
}

/// The variant's name.
fn first_word(refusal: &crate::Refusal) -> String {
    let text = format!("{refusal:?}");
    text.split([' ', '{', '(']).next().unwrap_or_default().to_owned()
}
