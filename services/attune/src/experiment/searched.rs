//! The table of a search: what came of each job in the order in which it was asked for, and which no other one beats.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use attune_search::Place;
use attune_search::front::{front, hypervolume, reference};

use super::matrix::{Cell, Matrix};
use super::plot::{Cost, Panel};
use super::record::Record;

/// A job of a search.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// Where it is.
    pub(crate) place: Place,
    /// What it is.
    pub(crate) cell: Cell,
    /// What came of it.
    pub(crate) record: Record,
    /// What came of it when it was run once more, if it was.
    pub(crate) then: Option<Record>,
}

/// What a search makes small: the mean of the last losses of all validation sets, and the logarithm of the parameters that train.
/// None of a job that failed, that has no validation set or that went astray.
pub(crate) fn outcome(record: &Record) -> Option<[f64; 2]> {
    let loss = loss(record)?;
    (record.error.is_none() && loss.is_finite()).then(|| [loss, (record.trained_parameters.max(1) as f64).ln()])
}

fn loss(record: &Record) -> Option<f64> {
    let last = record.validation.values().map(|[_, last]| last);
    (!record.validation.is_empty()).then(|| last.sum::<f64>() / record.validation.len() as f64)
}

/// The jobs that no other one beats, by loss.
pub(crate) fn best(seen: &[Seen]) -> Vec<&Seen> {
    let with: Vec<(&Seen, [f64; 2])> = seen.iter().filter_map(|seen| Some((seen, outcome(&seen.record)?))).collect();
    let outcomes: Vec<[f64; 2]> = with.iter().map(|(_, outcome)| *outcome).collect();
    front(&outcomes).into_iter().map(|index| with[index].0).collect()
}

/// The jobs as points; those that no other one beats by their number.
pub(crate) fn panels(matrix: &Matrix, seen: &[Seen]) -> Vec<Panel> {
    let best: Vec<&Place> = best(seen).into_iter().map(|seen| &seen.place).collect();
    let points = seen.iter().enumerate().filter_map(|(index, seen)| {
        let [loss, _] = outcome(&seen.record)?;
        let name = if best.contains(&&seen.place) { format!("{}", index + 1) } else { String::new() };
        Some((seen.record.trained_parameters.max(1) as f64, loss, name))
    });
    vec![Panel { title: matrix.name.clone(), cost: Cost::Parameters, points: points.collect() }]
}

/// As Markdown.
pub(crate) fn markdown(matrix: &Matrix, seen: &[Seen]) -> String {
    let mut page = format!("# {}\n\n", matrix.name);
    if !matrix.remarks.is_empty() {
        let _ = writeln!(page, "{}\n", matrix.remarks.trim());
    }
    let done: Vec<[f64; 2]> = seen.iter().filter_map(|seen| outcome(&seen.record)).collect();
    let places = matrix.space().places();
    let _ = writeln!(
        page,
        "{} of {places} jobs, made by `attune experiment run` with a search, {} of which have results. Losses are the means of the \
         last of all validation sets. What no other job beats in both loss and parameters is above, by loss.\n",
        seen.len(),
        done.len()
    );
    let number = |of: &Seen| seen.iter().position(|seen| seen.place == of.place).unwrap_or_default() + 1;
    let axes: Vec<String> =
        seen.first().map_or_else(Vec::new, |first| first.cell.place.iter().map(|(axis, _)| axis.clone()).collect());
    let values = |of: &Seen| of.cell.place.iter().map(|(_, value)| value.clone()).collect::<Vec<_>>();
    let line = |page: &mut String, cells: Vec<String>| {
        let _ = writeln!(page, "| {} |", cells.join(" | "));
    };
    let head = |page: &mut String, more: &[&str]| {
        let own = ["job", "loss", "parameters"].into_iter().chain(more.iter().copied()).map(str::to_owned);
        let cells: Vec<String> = own.chain(axes.iter().cloned()).collect();
        let rule = vec!["---:".to_owned(); cells.len()];
        line(page, cells);
        line(page, rule);
    };
    let best = best(seen);
    let is_run_again = best.iter().any(|seen| seen.then.is_some());
    head(&mut page, if is_run_again { &["run once more"] } else { &[] });
    for of in &best {
        let again = of.then.as_ref().and_then(loss).map_or_else(|| "–".to_owned(), |loss| format!("{loss:.4}"));
        let own = [number(of).to_string(), text(&of.record), of.record.trained_parameters.to_string()];
        line(&mut page, own.into_iter().chain(is_run_again.then_some(again)).chain(values(of)).collect());
    }
    page.push_str(
        "\nIn the order of the search; the area is that which its jobs so far beat, of what all of them beat:\n\n",
    );
    head(&mut page, &["area"]);
    let reference = reference(&done);
    let all = hypervolume(&done, reference);
    let mut so_far = Vec::new();
    for (index, of) in seen.iter().enumerate() {
        so_far.extend(outcome(&of.record));
        let share = if all > 0.0 { hypervolume(&so_far, reference) / all } else { 0.0 };
        let own = [
            (index + 1).to_string(),
            text(&of.record),
            of.record.trained_parameters.to_string(),
            format!("{share:.3}"),
        ];
        line(&mut page, own.into_iter().chain(values(of)).collect());
    }
    let failed: BTreeMap<usize, &String> =
        seen.iter().enumerate().filter_map(|(index, seen)| Some((index + 1, seen.record.error.as_ref()?))).collect();
    if !failed.is_empty() {
        page.push_str("\nNot done:\n\n");
        for (number, error) in failed {
            let _ = writeln!(page, "- {number}: {}", error.replace('\n', " "));
        }
    }
    page
}

fn text(record: &Record) -> String {
    outcome(record).map_or_else(|| "–".to_owned(), |[loss, _]| format!("{loss:.4}"))
}

#[cfg(test)]
mod tests {
    use attune_spec::job::read_yaml;

    use super::super::record::of;
    use super::*;

    fn matrix() -> Matrix {
        let text = "
version: 1
name: space
job: ./job.yaml
vary:
  - {name: rank, field: tune.adapter.rank, values: [1, 2, 4]}
  - {name: rate, field: tune.optimizer.lr, values: [0.1, 0.2]}
search: {method: random-search, evaluations: 4}
then: {tune.steps: 100}
";
        serde_json::from_value(read_yaml(text).unwrap()).unwrap()
    }

    fn seen(place: [usize; 2], parameters: u64, loss: f64) -> Seen {
        let place = place.to_vec();
        Seen { cell: matrix().cell(&place), record: of(&[], parameters, &[("a", loss)]), then: None, place }
    }

    #[test]
    fn what_no_other_beats_is_above_and_the_area_grows() {
        let mut all = vec![
            seen([0, 0], 10, 3.0),
            seen([2, 1], 40, 1.0),
            seen([1, 0], 40, 2.0),
            seen([0, 1], 10, 2.5),
            seen([1, 1], 20, 9.0),
        ];
        all[4].record.error = Some("job j-1 is failed: no\nroom".to_owned());
        all[1].then = Some(of(&[], 40, &[("a", 0.5)]));
        insta::assert_snapshot!(markdown(&matrix(), &all), @r"
        # space

        5 of 6 jobs, made by `attune experiment run` with a search, 4 of which have results. Losses are the means of the last of all validation sets. What no other job beats in both loss and parameters is above, by loss.

        | job | loss | parameters | run once more | rank | rate |
        | ---: | ---: | ---: | ---: | ---: | ---: |
        | 2 | 1.0000 | 40 | 0.5000 | 4 | 0.2 |
        | 4 | 2.5000 | 10 | – | 1 | 0.2 |

        In the order of the search; the area is that which its jobs so far beat, of what all of them beat:

        | job | loss | parameters | area | rank | rate |
        | ---: | ---: | ---: | ---: | ---: | ---: |
        | 1 | 3.0000 | 10 | 0.239 | 1 | 0.1 |
        | 2 | 1.0000 | 40 | 0.457 | 4 | 0.2 |
        | 3 | 2.0000 | 40 | 0.457 | 2 | 0.1 |
        | 4 | 2.5000 | 10 | 1.000 | 1 | 0.2 |
        | 5 | – | 20 | 1.000 | 2 | 0.2 |

        Not done:

        - 5: job j-1 is failed: no room
        ");
        let [panel] = panels(&matrix(), &all).try_into().unwrap();
        let names: Vec<&str> = panel.points.iter().map(|(_, _, name)| name.as_str()).collect();
        assert_eq!(names, ["", "2", "", "4"]);
    }

    #[test]
    fn a_place_is_a_job_and_one_that_is_run_once_more_has_what_then_says() {
        let matrix = matrix();
        assert_eq!(matrix.space().places(), 6);
        let cell = matrix.cell(&[2, 0]);
        assert_eq!(cell.title(), "rank=4, rate=0.1");
        let then = matrix.then(&cell).unwrap();
        assert_eq!((then.title().as_str(), then.set.len()), ("rank=4, rate=0.1, then=yes", 3));
    }
}
