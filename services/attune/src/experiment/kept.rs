//! What runs learned and what they kept of their base: a specialisation–stabilisation report, as surveys of tuning ask for it
//! (Keeping Yourself is Important in Downstream Tuning Multimodal Large Language Model, 2025).
//!
//! ```text
//! p    = exp(-loss), the likelihood of a token in the geometric mean, of a validation set
//! T, G = mean p of the sets of the task, and of those that are general
//! ΔT, ΔG = what they are more than before training        H = 2 T G / (T + G)
//! ```

use std::fmt::Write as _;

use super::matrix::Matrix;
use super::record::Record;
use super::report::Runs;

/// A likelihood before and after training.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Likelihood {
    before: f64,
    after: f64,
}

/// Of one run: of the task's sets and of the general ones.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Kept {
    task: Likelihood,
    general: Likelihood,
}

impl Kept {
    /// Nothing of a run that did not succeed or lacks sets of one kind.
    fn of(record: &Record, general: &[String]) -> Option<Self> {
        if record.error.is_some() {
            return None;
        }
        let mean = |is_general: bool| {
            let of_kind = |set: &&String| general.contains(set) == is_general;
            let sets: Vec<[f64; 2]> =
                record.validation.keys().filter(of_kind).map(|set| record.validation[set]).collect();
            let n = sets.len() as f64;
            let of = |at: usize| sets.iter().map(|losses| (-losses[at]).exp()).sum::<f64>() / n;
            (n > 0.0).then(|| Likelihood { before: of(0), after: of(1) })
        };
        Some(Self { task: mean(false)?, general: mean(true)? })
    }
}

/// The harmonic mean of two likelihoods.
fn harmonic(task: f64, general: f64) -> f64 {
    2.0 * task * general / (task + general).max(f64::MIN_POSITIVE)
}

/// The table, as Markdown, of a grid whose `report.general` names sets; empty if it names none. Means are taken over all runs of a row.
///
/// Runs are compared where they had as much to learn from: of different numbers of tokens, the page says so in place of a table.
pub(crate) fn markdown(matrix: &Matrix, records: &[&Record]) -> String {
    let general = &matrix.report.general;
    if general.is_empty() {
        return String::new();
    }
    let done: Vec<(&Record, Kept)> =
        records.iter().filter_map(|record| Some((*record, Kept::of(record, general)?))).collect();
    let Some((first, _)) = done.first() else {
        return format!("\nNo run has sets of the task and general ones ({}).\n", general.join(", "));
    };
    if let Some((other, _)) = done.iter().find(|(record, _)| record.tokens != first.tokens) {
        return format!(
            "\nWhat was learned and kept is not compared: job {} saw {} tokens and job {} saw {}.\n",
            first.job, first.tokens, other.job, other.tokens
        );
    }
    let mut page = format!(
        "\nWhat was learned and what was kept: T is the likelihood of a token (the exponential of the mean loss with the opposite sign) in \
         sets of the task, G in general ones ({}), ΔT and ΔG what training added to them, H their harmonic mean.\n\n\
         | {} | ΔT | ΔG | T | G | H |\n| --- | ---: | ---: | ---: | ---: | ---: |\n",
        general.join(", "),
        matrix.rows()
    );
    let mean = |runs: &[&Kept], of: &dyn Fn(&Kept) -> f64| {
        Runs::from_iter(runs.iter().map(|kept| of(kept))).mean().unwrap_or_default()
    };
    let mut line = |name: &str, runs: &[&Kept], of: fn(&Likelihood) -> f64| {
        let (task, kept) = (mean(runs, &|kept| of(&kept.task)), mean(runs, &|kept| of(&kept.general)));
        let gained = task - mean(runs, &|kept| kept.task.before);
        let lost = kept - mean(runs, &|kept| kept.general.before);
        let h = harmonic(task, kept);
        let _ = writeln!(page, "| {name} | {gained:+.4} | {lost:+.4} | {task:.4} | {kept:.4} | {h:.4} |");
    };
    line("the base", &done.iter().map(|(_, kept)| kept).collect::<Vec<_>>(), |likelihood| likelihood.before);
    let mut rows: Vec<(String, Vec<&Kept>)> = Vec::new();
    for value in matrix.values(matrix.rows()) {
        let own = done.iter().filter(|(record, _)| record.place.get(matrix.rows()) == Some(&value));
        rows.push((format!("`{value}`"), own.map(|(_, kept)| kept).collect()));
    }
    rows.retain(|(_, runs)| !runs.is_empty());
    let h = |runs: &[&Kept]| harmonic(mean(runs, &|kept| kept.task.after), mean(runs, &|kept| kept.general.after));
    rows.sort_by(|(_, a), (_, b)| h(b).total_cmp(&h(a)));
    for (name, runs) in &rows {
        line(name, runs, |likelihood| likelihood.after);
    }
    page
}

#[cfg(test)]
mod tests {
    use attune_spec::job::read_yaml;

    use super::super::record::of;
    use super::*;

    fn matrix(general: &str) -> Matrix {
        let text = format!(
            "{{version: 1, name: kept, job: ./job.yaml, vary: [{{name: method, values: {{lora: {{}}, full: {{}}}}}}], report: {{general: [{general}]}}}}"
        );
        serde_json::from_value(read_yaml(&text).unwrap()).unwrap()
    }

    /// A run whose losses are the logarithms of these likelihoods, before and after.
    fn run(method: &str, task: [f64; 2], general: [f64; 2]) -> Record {
        let mut record = of(&[("method", method)], 10, &[]);
        record.validation.insert("task".to_owned(), task.map(|p| -p.ln()));
        record.validation.insert("old".to_owned(), general.map(|p| -p.ln()));
        record
    }

    #[test]
    fn gains_losses_and_their_harmonic_mean_are_those_of_likelihoods() {
        let records = [run("lora", [0.2, 0.4], [0.5, 0.45]), run("full", [0.2, 0.6], [0.5, 0.1])];
        let all: Vec<&Record> = records.iter().collect();
        let page = markdown(&matrix("old"), &all);
        let rows: Vec<&str> = page.lines().skip_while(|line| !line.starts_with("| ---")).skip(1).collect();
        // 2 · 0.2 · 0.5 / 0.7, 2 · 0.4 · 0.45 / 0.85, 2 · 0.6 · 0.1 / 0.7.
        assert_eq!(
            rows,
            [
                "| the base | +0.0000 | +0.0000 | 0.2000 | 0.5000 | 0.2857 |",
                "| `lora` | +0.2000 | -0.0500 | 0.4000 | 0.4500 | 0.4235 |",
                "| `full` | +0.4000 | -0.4000 | 0.6000 | 0.1000 | 0.1714 |",
            ]
        );
    }

    #[test]
    fn a_base_against_itself_has_lost_and_gained_nothing() {
        let record = run("lora", [0.3, 0.3], [0.5, 0.5]);
        let page = markdown(&matrix("old"), &[&record]);
        assert!(page.contains("| `lora` | +0.0000 | +0.0000 | 0.3000 | 0.5000 | 0.3750 |"), "{page}");
    }

    #[test]
    fn runs_that_saw_more_than_others_and_grids_without_general_sets_are_not_compared() {
        let mut records = [run("lora", [0.2, 0.4], [0.5, 0.4]), run("full", [0.2, 0.4], [0.5, 0.4])];
        records[1].tokens += 1;
        let all: Vec<&Record> = records.iter().collect();
        let page = markdown(&matrix("old"), &all);
        assert!(page.contains("is not compared") && page.contains("tokens"), "{page}");
        assert_eq!(markdown(&matrix(""), &all), "");
        assert!(markdown(&matrix("older"), &all).contains("No run has sets of the task and general ones (older)"));
    }
}
