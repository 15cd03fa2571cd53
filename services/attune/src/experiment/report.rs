//! The table of a grid: what came of each value of one axis, by the others.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::curve::{self, Reached};
use super::kept;
use super::matrix::Matrix;
use super::plot::{Cost, Panel};
use super::record::Record;
use super::stability;
use crate::words;

/// Numbers of runs that differ in nothing but what means are taken over.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Runs(Vec<f64>);

impl FromIterator<f64> for Runs {
    fn from_iter<I: IntoIterator<Item = f64>>(numbers: I) -> Self {
        Self(numbers.into_iter().collect())
    }
}

impl Runs {
    /// Their mean; nothing of no runs.
    pub(crate) fn mean(&self) -> Option<f64> {
        (!self.0.is_empty()).then(|| self.0.iter().sum::<f64>() / self.0.len() as f64)
    }

    /// The largest less the smallest, of several.
    fn range(&self) -> Option<f64> {
        let (min, max) = self.0.iter().fold((f64::MAX, f64::MIN), |(min, max), x| (min.min(*x), max.max(*x)));
        (self.0.len() > 1).then_some(max - min)
    }

    fn text(&self, digits: usize) -> String {
        match (self.mean(), self.range()) {
            (None, _) => "–".to_owned(),
            (Some(mean), None) => format!("{mean:.digits$}"),
            (Some(mean), Some(range)) => format!("{mean:.digits$} ({range:.digits$})"),
        }
    }
}

/// A row: a value of the axis of the rows.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Row {
    pub(crate) value: String,
    /// Last losses, in the order of the columns.
    pub(crate) losses: Vec<Runs>,
    pub(crate) parameters: Runs,
    speed: Runs,
    memory: Runs,
    /// What the runs of each column cost, by [`Cost::ALL`].
    costs: Vec<[Runs; 3]>,
    /// How soon they were nearly their best, in the order of the columns.
    reached: Vec<Soon>,
}

/// Best losses of runs, and how soon they were nearly there.
#[derive(Debug, Clone, Default, PartialEq)]
struct Soon {
    best: Runs,
    steps: Runs,
    seconds: Runs,
}

/// The results of a grid as a table.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Compared {
    /// What each loss is of.
    pub(crate) columns: Vec<String>,
    /// The rows, those with the smallest first loss first.
    pub(crate) rows: Vec<Row>,
    /// Jobs that did not succeed: where they are, and why.
    failed: Vec<(String, String)>,
}

impl Compared {
    /// Compares the records of a grid's present jobs, the latest of each.
    pub(crate) fn of(matrix: &Matrix, records: &[&Record]) -> Self {
        let done: Vec<&&Record> = records.iter().filter(|record| record.error.is_none()).collect();
        let axes = matrix.columns();
        let place = |record: &Record| {
            let values = axes.iter().filter_map(|axis| record.place.get(*axis));
            values.cloned().collect::<Vec<_>>()
        };
        let keys: BTreeSet<(Vec<String>, String)> =
            done.iter().flat_map(|record| record.validation.keys().map(|set| (place(record), set.clone()))).collect();
        let title = |(place, set): &(Vec<String>, String)| {
            let alone = keys.iter().filter(|(other, _)| other == place).count() == 1;
            if alone && !place.is_empty() {
                place.join(", ")
            } else {
                [place.as_slice(), std::slice::from_ref(set)].concat().join(", ")
            }
        };
        let columns = keys.iter().map(title).collect();
        let mut rows: Vec<Row> = Vec::new();
        for value in matrix.values(matrix.rows()) {
            let own: Vec<&&&Record> =
                done.iter().filter(|record| record.place.get(matrix.rows()) == Some(&value)).collect();
            let runs = |of: &dyn Fn(&Record) -> f64| Runs(own.iter().map(|record| of(record)).collect());
            let loss = |(at, set): &(Vec<String>, String)| {
                let here = own.iter().filter(|record| place(record) == *at);
                Runs(here.filter_map(|record| record.validation.get(set).map(|[_, after]| *after)).collect())
            };
            if own.is_empty() {
                continue;
            }
            let soon = |(at, set): &(Vec<String>, String)| {
                let here = own.iter().filter(|record| place(record) == *at);
                let all: Vec<_> =
                    here.filter_map(|record| Some((record, curve::reached(record.curves.get(set)?)?))).collect();
                let runs = |of: &dyn Fn(&Record, &Reached) -> f64| {
                    Runs(all.iter().map(|(record, reached)| of(record, reached)).collect())
                };
                Soon {
                    best: runs(&|_, reached| reached.best),
                    steps: runs(&|_, reached| reached.steps as f64),
                    seconds: runs(&|record, reached| curve::seconds(record, reached.steps)),
                }
            };
            let costs = |(at, set): &(Vec<String>, String)| {
                let here = || own.iter().filter(|record| place(record) == *at && record.validation.contains_key(set));
                // What was not measured is 0.
                let of = |cost: &dyn Fn(&Record) -> f64| {
                    Runs(here().map(|record| cost(record)).filter(|cost| *cost > 0.0).collect())
                };
                Cost::ALL.map(|kind| match kind {
                    Cost::Parameters => of(&|record| record.trained_parameters.max(1) as f64),
                    Cost::Seconds => of(&|record| curve::seconds(record, record.steps)),
                    Cost::Mebibytes => of(&|record| record.peak_memory_bytes as f64 / f64::from(1 << 20)),
                })
            };
            rows.push(Row {
                costs: keys.iter().map(costs).collect(),
                reached: keys.iter().map(soon).collect(),
                losses: keys.iter().map(loss).collect(),
                parameters: runs(&|record| record.trained_parameters as f64),
                speed: runs(&|record| record.tokens_per_second),
                memory: Runs(
                    own.iter().map(|record| record.peak_memory_bytes as f64).filter(|peak| *peak > 0.0).collect(),
                ),
                value,
            });
        }
        let first = |row: &Row| row.losses.first().and_then(Runs::mean).unwrap_or(f64::INFINITY);
        rows.sort_by(|a, b| first(a).total_cmp(&first(b)));
        let failed = records.iter().filter_map(|record| {
            let pairs: Vec<String> = record.place.iter().map(|(axis, value)| format!("{axis}={value}")).collect();
            Some((pairs.join(", "), record.error.clone()?))
        });
        Self { columns, rows, failed: failed.collect() }
    }

    /// As points, a panel for each column and each kind of cost.
    pub(crate) fn panels(&self) -> Vec<Panel> {
        let panel = |(index, title): (usize, &String), kind: usize| {
            let point = |row: &Row| {
                Some((row.costs.get(index)?[kind].mean()?, row.losses.get(index)?.mean()?, row.value.clone()))
            };
            Panel { title: title.clone(), cost: Cost::ALL[kind], points: self.rows.iter().filter_map(point).collect() }
        };
        let columns = self.columns.iter().enumerate();
        columns.flat_map(|column| (0..Cost::ALL.len()).map(move |kind| panel(column, kind))).collect()
    }

    /// As Markdown, with what was run above it.
    pub(crate) fn markdown(&self, matrix: &Matrix, records: &[&Record]) -> String {
        let mut page = format!("# {}\n\n", matrix.name);
        if !matrix.remarks.is_empty() {
            let _ = writeln!(page, "{}\n", matrix.remarks.trim());
        }
        let several = |of: &dyn Fn(&Record) -> &str| {
            let all: BTreeSet<&str> = records.iter().map(|record| of(record)).filter(|text| !text.is_empty()).collect();
            all.into_iter().collect::<Vec<_>>().join(", ")
        };
        let _ = writeln!(
            page,
            "{} jobs, made by `attune experiment run` with version {} on {}. Losses are the last of each validation set{}.\n",
            records.len(),
            several(&|record| &record.code_version),
            several(&|record| &record.kernel_profile),
            if matrix.report.mean_over.is_empty() {
                String::new()
            } else {
                format!(
                    ", the mean over {} and in brackets the largest less the smallest",
                    matrix.report.mean_over.join(" and ")
                )
            },
        );
        let line = |page: &mut String, cells: &[String]| {
            let _ = writeln!(page, "| {} |", cells.join(" | "));
        };
        let losses = self.columns.iter().map(|column| format!("loss of {column}"));
        let headings: Vec<String> = std::iter::once(matrix.rows().to_owned())
            .chain(["parameters".to_owned()])
            .chain(losses)
            .chain(["tokens/s".to_owned(), "memory".to_owned()])
            .collect();
        line(&mut page, &headings);
        line(
            &mut page,
            &std::iter::once("---").chain(vec!["---:"; headings.len() - 1]).map(str::to_owned).collect::<Vec<_>>(),
        );
        for row in &self.rows {
            let whole = |runs: &Runs| runs.mean().map_or_else(String::new, |mean| format!("{mean:.0}"));
            let cells: Vec<String> = [format!("`{}`", row.value), whole(&row.parameters)]
                .into_iter()
                .chain(row.losses.iter().map(|runs| runs.text(4)))
                .chain([
                    whole(&row.speed),
                    row.memory.mean().map_or_else(String::new, |mean| words::bytes(mean as u64)),
                ])
                .collect();
            line(&mut page, &cells);
        }
        self.soon(matrix, &mut page);
        page.push_str(&kept::markdown(matrix, records));
        page.push_str(&stability::markdown(matrix, records));
        if !self.failed.is_empty() {
            page.push_str("\nNot done:\n\n");
            for (place, error) in &self.failed {
                let _ = writeln!(page, "- {place}: {}", error.replace('\n', " "));
            }
        }
        page
    }

    /// The table of how soon runs were nearly their best, where losses were logged on the way.
    fn soon(&self, matrix: &Matrix, page: &mut String) {
        if self.rows.iter().flat_map(|row| &row.reached).all(|soon| soon.best.mean().is_none()) {
            return;
        }
        let _ = writeln!(
            page,
            "\nThe best loss, and after how many steps and seconds of training {:.0} % of the way there was done, by the logged curves \
             (`curves.csv`).\n",
            100.0 * curve::NEARLY
        );
        let line = |page: &mut String, cells: &[String]| {
            let _ = writeln!(page, "| {} |", cells.join(" | "));
        };
        let head: Vec<String> = std::iter::once(matrix.rows().to_owned()).chain(self.columns.iter().cloned()).collect();
        line(page, &head);
        line(page, &std::iter::once("---").chain(vec!["---:"; head.len() - 1]).map(str::to_owned).collect::<Vec<_>>());
        for row in &self.rows {
            let cell = |Soon { best, steps, seconds }: &Soon| match (best.mean(), steps.mean(), seconds.mean()) {
                (Some(best), Some(steps), Some(seconds)) => format!("{best:.4}, {steps:.0} steps, {seconds:.1} s"),
                _ => "–".to_owned(),
            };
            let cells: Vec<String> =
                std::iter::once(format!("`{}`", row.value)).chain(row.reached.iter().map(cell)).collect();
            line(page, &cells);
        }
    }

    /// Records that a grid still asks for: the latest of each job.
    pub(crate) fn latest<'r>(records: &'r [Record], specs: &BTreeSet<attune_spec::id::Digest>) -> Vec<&'r Record> {
        let mut latest: BTreeMap<attune_spec::id::Digest, &Record> = BTreeMap::new();
        for record in records.iter().filter(|record| specs.contains(&record.spec)) {
            latest.insert(record.spec, record);
        }
        latest.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use attune_spec::job::read_yaml;

    use super::super::record::of;
    use super::*;

    fn matrix() -> Matrix {
        let text = "
version: 1
name: small
job: ./job.yaml
remarks: Two methods.
vary:
  - {name: method, values: {lora: {}, full: {}, gone: {}}}
  - {name: data, values: {a: {}, b: {}}}
  - {name: seed, field: tune.seed, values: [0, 1]}
report: {mean_over: [seed]}
";
        serde_json::from_value(read_yaml(text).unwrap()).unwrap()
    }

    #[test]
    fn means_are_taken_over_seeds_and_the_best_comes_first() {
        let mut records = Vec::new();
        for (seed, step) in [("0", 0.0), ("1", 0.2)] {
            for (method, parameters, a, b) in [("lora", 10, 2.0, 1.0), ("full", 900, 1.5, 1.25)] {
                for (data, loss) in [("a", a), ("b", b)] {
                    records.push(of(
                        &[("method", method), ("data", data), ("seed", seed)],
                        parameters,
                        &[(data, loss + step)],
                    ));
                }
            }
        }
        let mut failed = of(&[("method", "gone"), ("data", "a"), ("seed", "0")], 0, &[]);
        failed.error = Some("job j-1 is failed: no\nroom".to_owned());
        records.push(failed);
        let all: Vec<&Record> = records.iter().collect();
        let compared = Compared::of(&matrix(), &all);
        assert_eq!(compared.columns, ["a", "b"]);
        let rows: Vec<&str> = compared.rows.iter().map(|row| row.value.as_str()).collect();
        assert_eq!(rows, ["full", "lora"]);
        insta::assert_snapshot!(compared.markdown(&matrix(), &all), @r"
        # small

        Two methods.

        9 jobs, made by `attune experiment run` with version 0 on cpu. Losses are the last of each validation set, the mean over seed and in brackets the largest less the smallest.

        | method | parameters | loss of a | loss of b | tokens/s | memory |
        | --- | ---: | ---: | ---: | ---: | ---: |
        | `full` | 900 | 1.6000 (0.2000) | 1.3500 (0.2000) | 500 | 64.0 MiB |
        | `lora` | 10 | 2.1000 (0.2000) | 1.1000 (0.2000) | 500 | 64.0 MiB |

        Not done:

        - data=a, method=gone, seed=0: job j-1 is failed: no room
        ");
    }

    #[test]
    fn how_soon_runs_were_nearly_their_best_is_told_where_losses_were_logged() {
        let mut records = Vec::new();
        for (method, at) in [("lora", 4), ("full", 8)] {
            for seed in ["0", "1"] {
                let mut record = of(&[("method", method), ("data", "a"), ("seed", seed)], 10, &[("a", 2.0)]);
                let curve = (0..=10).map(|step| (step, if step < at { 3.0 } else { 2.0 })).collect();
                record.curves.insert("a".to_owned(), curve);
                records.push(record);
            }
        }
        let all: Vec<&Record> = records.iter().collect();
        let page = Compared::of(&matrix(), &all).markdown(&matrix(), &all);
        // A thousand tokens at 500 a second in ten steps.
        assert!(page.contains("| `lora` | 2.0000, 4 steps, 0.8 s |"), "{page}");
        assert!(page.contains("| `full` | 2.0000, 8 steps, 1.6 s |"), "{page}");
    }

    #[test]
    fn losses_are_drawn_against_parameters_time_and_memory() {
        let records = [("lora", 10, 2.0), ("full", 900, 1.5)]
            .map(|(method, parameters, loss)| of(&[("method", method), ("data", "a")], parameters, &[("a", loss)]));
        let all: Vec<&Record> = records.iter().collect();
        let panels = Compared::of(&matrix(), &all).panels();
        assert_eq!(panels.iter().map(|panel| panel.cost).collect::<Vec<_>>(), Cost::ALL);
        let of_full: Vec<(f64, f64)> = panels.iter().map(|panel| (panel.points[0].0, panel.points[0].1)).collect();
        // A thousand tokens at 500 a second, in 64 MiB.
        assert_eq!(of_full, [(900.0, 1.5), (2.0, 1.5), (64.0, 1.5)]);
    }

    #[test]
    fn only_the_latest_record_of_a_job_that_the_grid_still_has_counts() {
        let mut records = vec![of(&[], 1, &[]), of(&[], 2, &[]), of(&[], 3, &[])];
        records[1].spec = attune_spec::id::Digest::from_bytes([1; 32]);
        let specs = BTreeSet::from([records[0].spec]);
        let latest = Compared::latest(&records, &specs);
        assert_eq!(latest.iter().map(|record| record.trained_parameters).collect::<Vec<_>>(), [3]);
    }
}
