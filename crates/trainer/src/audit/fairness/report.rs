//! What was found, for people and for programs.

use std::fmt::Write as _;

use serde::Serialize;

use super::balance::Balance;
use super::groups::Gaps;
use super::spectrum::Change;
use super::toxicity::Toxicity;
use super::verdict::{Against, Label, Verdict};

/// What a model makes of a set of texts, means over tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Of {
    /// Negative log-likelihood.
    pub loss: f64,
    /// `KL(model ‖ base)` of the next token.
    pub divergence: f64,
}

/// What was found of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Told {
    /// Its name.
    pub name: String,
    /// Texts like those that were learned.
    pub target: Of,
    /// Texts that the base knew.
    pub known: Option<Of>,
    /// Differences between groups.
    pub gaps: Option<Gaps>,
    /// What it says by itself.
    pub toxicity: Option<Toxicity>,
    /// Of a run, what was learned against what was kept: of the geometric means of its tokens' probabilities, on the target's and on known texts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance: Option<Balance>,
    /// Of a run, each metric beside the base and the reference.
    pub verdicts: Vec<(&'static str, Verdict)>,
}

impl Told {
    /// How much better it knows what was learned than what was known: the loss on the former less that on the latter.
    pub fn shift(&self) -> Option<f64> {
        self.known.map(|known| self.target.loss - known.loss)
    }
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The least share of the reference's reduction that a run has to recover.
    pub least: f64,
    /// The share of draws within an interval.
    pub level: f64,
    /// How many draws there were.
    pub resamples: u32,
    /// The base.
    pub base: Told,
    /// What runs are held against, and what that is.
    pub reference: Option<(Against, Told)>,
    /// The runs.
    pub runs: Vec<Told>,
    /// The ranks of [`Change::energy`].
    pub ranks: Vec<usize>,
    /// How the reference's weights differ from the base's, linear by linear.
    pub changes: Vec<Change>,
}

impl Report {
    /// Whether any run is flagged.
    pub fn is_flagged(&self) -> bool {
        self.runs.iter().flat_map(|run| &run.verdicts).any(|(_, verdict)| verdict.label == Label::Flagged)
    }

    /// As Markdown.
    pub fn markdown(&self) -> String {
        let mut page = String::new();
        let against = match &self.reference {
            None => "There is no run to hold them against, so that nothing is said to be mitigated.".to_owned(),
            Some((Against::Full, told)) => format!("Runs are held against `{}`, a run of all weights.", told.name),
            Some((Against::LargestRank, told)) => format!(
                "Runs are held against `{}`, the one with the most directions, in the place of a run of all weights: it may fall short \
                 itself, so that nothing is said to be mitigated.",
                told.name
            ),
        };
        let _ = writeln!(
            page,
            "{against} A run is flagged that surely recovers less than {:.0} % of what the reference takes off; intervals hold {:.0} % of \
             {} draws of the items.\n",
            100.0 * self.least,
            100.0 * self.level,
            self.resamples
        );
        self.models(&mut page);
        self.balances(&mut page);
        self.verdicts(&mut page);
        self.spectra(&mut page);
        page
    }

    fn models(&self, page: &mut String) {
        row(
            page,
            &[
                "model",
                "target loss",
                "shift",
                "KL on target",
                "KL on known",
                "accuracy gap",
                "parity",
                "odds",
                "max toxicity",
                "toxic",
            ],
        );
        row(page, &["---", "---:", "---:", "---:", "---:", "---:", "---:", "---:", "---:", "---:"]);
        let reference = self.reference.as_ref().map(|(_, told)| told);
        for told in [&self.base].into_iter().chain(reference).chain(&self.runs) {
            let gap = |of: fn(&Gaps) -> Option<f64>| told.gaps.as_ref().and_then(of);
            let cells = [
                Some(told.target.loss),
                told.shift(),
                Some(told.target.divergence),
                told.known.map(|known| known.divergence),
                gap(|gaps| gaps.accuracy),
                gap(|gaps| gaps.demographic_parity),
                gap(|gaps| gaps.equalised_odds),
                told.toxicity.map(|found| found.expected_maximum),
                told.toxicity.map(|found| found.fraction),
            ];
            let cells: Vec<String> = std::iter::once(format!("`{}`", told.name)).chain(cells.map(number)).collect();
            row(page, &cells);
        }
    }

    fn balances(&self, page: &mut String) {
        let found: Vec<(&Told, Balance)> = self.runs.iter().filter_map(|told| Some((told, told.balance?))).collect();
        if found.is_empty() {
            return;
        }
        page.push('\n');
        row(page, &["run", "adaptation", "retention", "harmonic mean"]);
        row(page, &["---", "---:", "---:", "---:"]);
        for (told, Balance { adaptation, retention, harmonic }) in found {
            let numbers = [adaptation, retention, harmonic].map(|number| format!("{number:.2}"));
            row(page, &std::iter::once(format!("`{}`", told.name)).chain(numbers).collect::<Vec<_>>());
        }
    }

    fn verdicts(&self, page: &mut String) {
        page.push('\n');
        row(page, &["run", "metric", "base", "reference", "run", "recovered", "shortfall", "verdict"]);
        row(page, &["---", "---", "---:", "---:", "---:", "---:", "---:", "---"]);
        for run in &self.runs {
            for (metric, verdict) in &run.verdicts {
                let shortfall = verdict.shortfall.map_or_else(
                    || "–".to_owned(),
                    |found| format!("{:.4} ({:.4} to {:.4})", found.value, found.low, found.high),
                );
                let recovered =
                    verdict.recovered.map_or_else(|| "–".to_owned(), |share| format!("{:.0} %", 100.0 * share));
                let cells = [
                    format!("`{}`", run.name),
                    (*metric).to_owned(),
                    number(Some(verdict.base)),
                    number(verdict.reference),
                    number(Some(verdict.run)),
                    recovered,
                    shortfall,
                    words(verdict.label).to_owned(),
                ];
                row(page, &cells);
            }
        }
    }

    fn spectra(&self, page: &mut String) {
        if self.changes.is_empty() {
            return;
        }
        page.push_str("\nHow much of the reference's change of each linear its largest directions hold.\n\n");
        let ranks = self.ranks.iter().map(|rank| format!("rank {rank}"));
        let head: Vec<String> = ["site", "norm", "stable rank"].map(str::to_owned).into_iter().chain(ranks).collect();
        row(page, &head);
        row(page, &std::iter::once("---").chain(vec!["---:"; head.len() - 1]).collect::<Vec<_>>());
        for Change { site, norm, stable_rank, energy } in &self.changes {
            let shares = energy.iter().map(|share| format!("{:.0} %", 100.0 * share));
            let own = [format!("`{site}`"), format!("{norm:.3}"), format!("{stable_rank:.2}")];
            row(page, &own.into_iter().chain(shares).collect::<Vec<_>>());
        }
    }
}

fn row<S: AsRef<str>>(page: &mut String, cells: &[S]) {
    let cells: Vec<&str> = cells.iter().map(AsRef::as_ref).collect();
    let _ = writeln!(page, "| {} |", cells.join(" | "));
}

fn number(number: Option<f64>) -> String {
    number.map_or_else(|| "–".to_owned(), |number| format!("{number:.4}"))
}

const fn words(label: Label) -> &'static str {
    match label {
        Label::Flagged => "**flagged**",
        Label::Mitigated => "mitigated",
        Label::AsLargestRank => "as the largest rank",
        Label::Unclear => "unclear",
        Label::NothingToRecover => "nothing to recover",
        Label::NoReference => "no reference",
    }
}
