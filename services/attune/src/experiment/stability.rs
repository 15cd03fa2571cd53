//! How much depends on one setting and on chance: a probe of stability, as a position paper on parameter-efficient tuning asks for it of
//! every method (Towards Better Parameter-Efficient Fine-Tuning for Large Language Models, 2023).
//!
//! ```text
//! mean, s = of the last losses of runs that differ in nothing but chance (the axes of `mean_over`)
//! failed  = runs that did not succeed, or ended with no smaller loss than they began with
//! window  = the values next to the best one, in their order, of which no run failed and whose
//!           mean <= best mean + max(s of the best, 2 % of what the best gained)
//! ```

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::matrix::Matrix;
use super::record::Record;

/// Share of what the best value gained that another one may lack.
const LACKING: f64 = 0.02;

/// What came of the runs with one value of the setting.
#[derive(Debug, Clone, Default, PartialEq)]
struct Tried {
    /// First and last losses of those that did not fail.
    losses: Vec<[f64; 2]>,
    failed: usize,
}

impl Tried {
    /// Of the records of one value, by the losses of a set.
    fn of(records: &[&&Record], set: &str) -> Self {
        let mut tried = Self::default();
        for record in records {
            match record.validation.get(set).filter(|_| record.error.is_none()) {
                Some(losses @ [first, last]) if last < first => tried.losses.push(*losses),
                _ => tried.failed += 1,
            }
        }
        tried
    }

    fn mean(&self, of: usize) -> Option<f64> {
        let n = self.losses.len();
        (n > 0).then(|| self.losses.iter().map(|losses| losses[of]).sum::<f64>() / n as f64)
    }

    /// The standard deviation of the last losses; 0 of a single one.
    fn deviation(&self) -> f64 {
        let Some(mean) = self.mean(1) else { return 0.0 };
        let squares: f64 = self.losses.iter().map(|[_, last]| (last - mean).powi(2)).sum();
        (squares / (self.losses.len().max(2) - 1) as f64).sqrt()
    }

    /// The mean, if no run failed.
    fn whole(&self) -> Option<f64> {
        self.mean(1).filter(|_| self.failed == 0)
    }

    fn text(&self) -> String {
        let failed = match self.failed {
            0 => String::new(),
            failed => format!("{failed} of {} failed", failed + self.losses.len()),
        };
        match self.mean(1) {
            None if self.failed == 0 => "–".to_owned(),
            None => failed,
            Some(mean) if failed.is_empty() => format!("{mean:.4} ± {:.4}", self.deviation()),
            Some(mean) => format!("{mean:.4} ± {:.4}, {failed}", self.deviation()),
        }
    }
}

/// The first and the last of the values that are as good as the best one, and it.
fn window(all: &[Tried]) -> Option<(usize, usize, usize)> {
    let whole = all.iter().enumerate().filter_map(|(at, tried)| Some((at, tried.whole()?)));
    let (best, mean) = whole.min_by(|a, b| a.1.total_cmp(&b.1))?;
    let gained = all[best].mean(0)? - mean;
    let limit = mean + all[best].deviation().max(LACKING * gained);
    let is_good = |tried: &&Tried| tried.whole().is_some_and(|mean| mean <= limit);
    let before = all[..best].iter().rev().take_while(is_good).count();
    let after = all[best + 1..].iter().take_while(is_good).count();
    Some((best - before, best + after, best))
}

/// The tables, as Markdown, of a grid whose `report.stability` names an axis; empty if it names none.
pub(crate) fn markdown(matrix: &Matrix, records: &[&Record]) -> String {
    let Some(axis) = &matrix.report.stability else { return String::new() };
    let values = matrix.values(axis);
    let beside: Vec<&str> = matrix.columns().into_iter().filter(|column| column != axis).collect();
    let place = |record: &Record| -> Vec<String> {
        beside.iter().filter_map(|column| record.place.get(*column)).cloned().collect()
    };
    let tables: BTreeSet<(Vec<String>, String)> =
        records.iter().flat_map(|record| record.validation.keys().map(|set| (place(record), set.clone()))).collect();
    let mut page = String::new();
    for (at, set) in &tables {
        let title = [at.as_slice(), std::slice::from_ref(set)].concat().join(", ");
        let _ = writeln!(
            page,
            "\nStability of the last loss of {title}: its mean and standard deviation over {} for each {axis}, and the values that are as \
             good as the best (within its deviation, or {:.0} % of what it gained; no run failed). A run fails that does not end, or ends \
             no better than it began.\n",
            matrix.report.mean_over.join(" and "),
            100.0 * LACKING
        );
        let _ = writeln!(page, "| {} | {} | best | as good |", matrix.rows(), values.join(" | "));
        let _ = writeln!(page, "| --- |{} ---: | --- |", " ---: |".repeat(values.len()));
        for row in matrix.values(matrix.rows()) {
            let is_here = |record: &&&Record| record.place.get(matrix.rows()) == Some(&row) && place(record) == *at;
            let own: Vec<&&Record> = records.iter().filter(is_here).collect();
            if own.is_empty() {
                continue;
            }
            let of_value = |value: &String| {
                let runs: Vec<&&Record> =
                    own.iter().copied().filter(|record| record.place.get(axis) == Some(value)).collect();
                Tried::of(&runs, set)
            };
            let tried: Vec<Tried> = values.iter().map(of_value).collect();
            let cells: Vec<String> = tried.iter().map(Tried::text).collect();
            let (best, good) = match window(&tried) {
                None => ("–".to_owned(), "none".to_owned()),
                Some((first, last, best)) if first == last => (values[best].clone(), values[best].clone()),
                Some((first, last, best)) => (values[best].clone(), format!("{} to {}", values[first], values[last])),
            };
            let _ = writeln!(page, "| `{row}` | {} | {best} | {good} |", cells.join(" | "));
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use attune_spec::job::read_yaml;

    use super::super::record::of;
    use super::*;

    fn matrix(report: &str) -> Matrix {
        let text = format!(
            "{{version: 1, name: stable, job: ./job.yaml, vary: [{{name: method, values: {{lora: {{}}, dora: {{}}}}}}, \
             {{name: lr, field: tune.optimizer.lr, values: [0.001, 0.01, 0.1]}}, \
             {{name: seed, field: tune.seed, values: [0, 1]}}], report: {{mean_over: [seed]{report}}}}}"
        );
        serde_json::from_value(read_yaml(&text).unwrap()).unwrap()
    }

    /// Runs of a method from a loss of 3, two of each rate; none where one did not end.
    fn runs(method: &str, losses: [[Option<f64>; 2]; 3]) -> Vec<Record> {
        let mut records = Vec::new();
        for (lr, of_lr) in ["0.001", "0.01", "0.1"].into_iter().zip(losses) {
            for (seed, loss) in ["0", "1"].into_iter().zip(of_lr) {
                let place = [("method", method), ("lr", lr), ("seed", seed)];
                let mut record = of(&place, 10, &loss.map(|loss| ("chat", loss)).into_iter().collect::<Vec<_>>());
                record.error = loss.is_none().then(|| "job j-1 is failed: a loss is not finite".to_owned());
                records.push(record);
            }
        }
        records
    }

    #[test]
    fn means_deviations_failures_and_what_is_as_good_as_the_best() {
        let lora = runs("lora", [[Some(2.01), Some(2.01)], [Some(1.9), Some(2.1)], [Some(2.5), None]]);
        let dora = runs("dora", [[Some(1.0), Some(1.0)], [Some(1.05), Some(1.05)], [Some(3.5), None]]);
        let all: Vec<&Record> = lora.iter().chain(&dora).collect();
        let page = markdown(&matrix(", stability: lr"), &all);
        let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
        // The deviation of 1.9 and 2.1 is 0.1 √2, and 2.01 is within it; 1.05 is further from 1 than 2 % of the way from 3.
        assert_eq!(
            rows,
            [
                "| `lora` | 2.0100 ± 0.0000 | 2.0000 ± 0.1414 | 2.5000 ± 0.0000, 1 of 2 failed | 0.01 | 0.001 to 0.01 |",
                "| `dora` | 1.0000 ± 0.0000 | 1.0500 ± 0.0000 | 2 of 2 failed | 0.001 | 0.001 |",
            ]
        );
        assert!(page.contains("last loss of chat: its mean and standard deviation over seed for each lr"), "{page}");
        assert_eq!(markdown(&matrix(""), &all), "");
    }

    #[test]
    fn the_values_as_good_as_the_best_lie_next_to_it() {
        let tried = |last: f64| Tried { losses: vec![[3.0, last]], failed: 0 };
        let failed = Tried { losses: vec![[3.0, 1.0]], failed: 1 };
        assert_eq!(window(&[tried(1.01), tried(1.02), tried(1.0), tried(1.5), tried(1.0)]), Some((0, 2, 2)));
        assert_eq!(window(&[tried(1.0), failed.clone(), tried(1.0)]), Some((0, 0, 0)));
        assert_eq!(window(&[failed, Tried::default()]), None);
    }
}
