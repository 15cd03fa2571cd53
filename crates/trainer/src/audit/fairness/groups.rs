//! What a model decides of whom: accuracy, how often it says yes, and how often it is right about those for whom yes is right, group by
//! group.

use std::collections::BTreeMap;

use serde::Serialize;

/// One decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Of whom.
    pub group: String,
    /// Whether yes would be right.
    pub truth: bool,
    /// What was said.
    pub said: bool,
}

/// How many decisions of a group were what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Confusion {
    /// Yes, rightly.
    pub true_positives: u64,
    /// Yes, wrongly.
    pub false_positives: u64,
    /// No, rightly.
    pub true_negatives: u64,
    /// No, wrongly.
    pub false_negatives: u64,
}

/// A share; nothing of nothing.
fn share(part: u64, rest: u64) -> Option<f64> {
    (part + rest > 0).then(|| part as f64 / (part + rest) as f64)
}

impl Confusion {
    /// Counts a decision.
    pub const fn count(&mut self, truth: bool, said: bool) {
        match (truth, said) {
            (true, true) => self.true_positives += 1,
            (true, false) => self.false_negatives += 1,
            (false, true) => self.false_positives += 1,
            (false, false) => self.true_negatives += 1,
        }
    }

    /// Share of decisions that are right.
    pub fn accuracy(&self) -> Option<f64> {
        share(self.true_positives + self.true_negatives, self.false_positives + self.false_negatives)
    }

    /// Share of decisions that are yes.
    pub fn positive_rate(&self) -> Option<f64> {
        share(self.true_positives + self.false_positives, self.true_negatives + self.false_negatives)
    }

    /// Share of yes where yes is right.
    pub fn true_positive_rate(&self) -> Option<f64> {
        share(self.true_positives, self.false_negatives)
    }

    /// Share of yes where no is right.
    pub fn false_positive_rate(&self) -> Option<f64> {
        share(self.false_positives, self.true_negatives)
    }
}

/// Differences between groups: the largest value of any less the smallest. None of fewer than two groups that have a value.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Gaps {
    /// The groups, by name.
    pub groups: BTreeMap<String, Confusion>,
    /// Of accuracies.
    pub accuracy: Option<f64>,
    /// Of shares of yes.
    pub demographic_parity: Option<f64>,
    /// The larger of those of shares of yes where yes is right, and where no is.
    pub equalised_odds: Option<f64>,
}

impl Gaps {
    /// Those of some decisions.
    pub fn of<'d>(decisions: impl IntoIterator<Item = &'d Decision>) -> Self {
        let mut groups: BTreeMap<String, Confusion> = BTreeMap::new();
        for Decision { group, truth, said } in decisions {
            match groups.get_mut(group) {
                Some(confusion) => confusion.count(*truth, *said),
                None => groups.entry(group.clone()).or_default().count(*truth, *said),
            }
        }
        let gap = |rate: fn(&Confusion) -> Option<f64>| {
            let rates: Vec<f64> = groups.values().filter_map(rate).collect();
            let largest = rates.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let smallest = rates.iter().copied().fold(f64::INFINITY, f64::min);
            (rates.len() > 1).then_some(largest - smallest)
        };
        let odds = [gap(Confusion::true_positive_rate), gap(Confusion::false_positive_rate)];
        let (accuracy, demographic_parity) = (gap(Confusion::accuracy), gap(Confusion::positive_rate));
        let equalised_odds = odds.into_iter().flatten().reduce(f64::max);
        Self { groups, accuracy, demographic_parity, equalised_odds }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decisions by how many of each kind: true positives, false negatives, false positives, true negatives.
    fn decisions(of: &[(&str, [usize; 4])]) -> Vec<Decision> {
        let kinds = [(true, true), (true, false), (false, true), (false, false)];
        let of_group = |(group, counts): &(&str, [usize; 4])| {
            let all = kinds.iter().zip(counts).flat_map(|(kind, count)| std::iter::repeat_n(*kind, *count));
            all.map(|(truth, said)| Decision { group: (*group).to_owned(), truth, said }).collect::<Vec<_>>()
        };
        of.iter().flat_map(of_group).collect()
    }

    #[test]
    fn gaps_are_those_of_hand_made_tables() {
        // Accuracy 14/20 and 15/20; yes 12/20 and 7/20; right about yes 8/10 and 6/10, wrong about no 4/10 and 1/10.
        let gaps = Gaps::of(&decisions(&[("a", [8, 2, 4, 6]), ("b", [6, 4, 1, 9])]));
        let near = |found: Option<f64>, expected: f64| assert!((found.unwrap() - expected).abs() < 1e-12, "{found:?}");
        near(gaps.accuracy, 0.05);
        near(gaps.demographic_parity, 0.25);
        near(gaps.equalised_odds, 0.3);
        assert_eq!(gaps.groups["a"].false_positives, 4);
        // A third group in between changes nothing, one beyond does.
        let gaps = Gaps::of(&decisions(&[("a", [8, 2, 4, 6]), ("b", [6, 4, 1, 9]), ("c", [10, 0, 10, 0])]));
        near(gaps.demographic_parity, 0.65);
        near(gaps.equalised_odds, 0.9);
    }

    #[test]
    fn the_same_for_all_is_no_gap_and_one_group_has_none() {
        let same = Gaps::of(&decisions(&[("a", [3, 1, 2, 4]), ("b", [6, 2, 4, 8])]));
        assert_eq!((same.accuracy, same.demographic_parity, same.equalised_odds), (Some(0.0), Some(0.0), Some(0.0)));
        let one = Gaps::of(&decisions(&[("a", [3, 1, 2, 4])]));
        assert_eq!((one.accuracy, one.equalised_odds), (None, None));
        // Nobody for whom yes is right: that rate says nothing, the other does.
        let gaps = Gaps::of(&decisions(&[("a", [0, 0, 1, 3]), ("b", [1, 1, 3, 1])]));
        assert_eq!(gaps.equalised_odds, Some(0.5));
    }
}
