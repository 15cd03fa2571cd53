//! From results of runs to rules.

use std::collections::BTreeMap;

use attune_spec::method::Catalogue;

use super::{Goal, Rule, Rules, Task};
use crate::experiment::curve;
use crate::experiment::record::Record;

/// The axes of the grid whose results rules are made of.
const METHOD: &str = "method";
const TASK: &str = "task";
const EXAMPLES: &str = "examples";
/// The share of the most gain that a method has to keep to be chosen for something else.
const KEPT: f64 = 0.8;
/// Runs of each method on each data.
const RUNS: usize = 3;
/// The version of the table's format.
const VERSION: u32 = 1;

/// What came of a method on some data, means over its runs.
struct Summary<'r> {
    method: &'r str,
    gain: f64,
    steps: f64,
    seconds: f64,
    memory_bytes: f64,
    parameters: f64,
    runs: Vec<String>,
}

/// Whether a grid has the axes that rules are made of.
pub(crate) fn has_axes(records: &[&Record]) -> bool {
    let has = |record: &&&Record| [METHOD, TASK, EXAMPLES].iter().all(|axis| record.place.contains_key(*axis));
    records.first().is_some_and(|first| has(&first))
}

/// The rules that follow from the results of a grid.
///
/// Fails with what the results lack: a place on an axis, curves, the run of all weights or three runs of each method.
pub(crate) fn rules(experiment: &str, records: &[&Record]) -> Result<Rules, String> {
    let mut cells: BTreeMap<(Task, u64), BTreeMap<&str, Vec<&Record>>> = BTreeMap::new();
    for record in records.iter().copied().filter(|record| record.error.is_none()) {
        let at =
            |axis: &str| record.place.get(axis).ok_or_else(|| format!("job {} has no place on {axis:?}", record.job));
        let task = serde_json::from_value(at(TASK)?.as_str().into())
            .map_err(|error| format!("job {}: {error}", record.job))?;
        let examples = at(EXAMPLES)?.parse().map_err(|error| format!("job {}: {error}", record.job))?;
        cells.entry((task, examples)).or_default().entry(at(METHOD)?).or_default().push(record);
    }
    let mut rules = Vec::new();
    for ((task, examples), methods) in &cells {
        let data = format!("{} {examples}", word(task));
        // Without one a comparison would be of cheap methods among themselves.
        let is_whole = |method: &&str| Catalogue::embedded().get(method).is_some_and(|method| method.trains_base);
        if !methods.keys().any(is_whole) {
            return Err(format!("{data} has no run of all weights, beside which the others would say little"));
        }
        let summaries: Vec<Summary<'_>> =
            methods.iter().map(|(method, records)| summary(method, records)).collect::<Result<_, _>>()?;
        let most = summaries.iter().map(|summary| summary.gain).fold(f64::NEG_INFINITY, f64::max);
        for goal in [Goal::Quality, Goal::Time, Goal::Memory, Goal::Storage] {
            let cost = |summary: &Summary<'_>| match goal {
                Goal::Quality => -summary.gain,
                Goal::Time => summary.seconds,
                Goal::Memory => summary.memory_bytes,
                Goal::Storage => summary.parameters,
            };
            let good = summaries.iter().filter(|summary| summary.gain >= KEPT * most);
            // Of equals the first by name.
            let best = good.min_by(|a, b| cost(a).total_cmp(&cost(b)));
            let best = best.ok_or_else(|| format!("{data} has no run that became better"))?;
            rules.push(Rule {
                id: format!("{}-{examples}-{}", word(task), word(&goal)),
                task: *task,
                examples: *examples,
                goal,
                method: best.method.to_owned(),
                gain: best.gain,
                most,
                steps: best.steps,
                seconds: best.seconds,
                memory_bytes: best.memory_bytes,
                parameters: best.parameters,
                runs: best.runs.clone(),
            });
        }
    }
    Ok(Rules { version: VERSION, experiment: experiment.to_owned(), kept: KEPT, rules })
}

fn word<T: serde::Serialize>(of: &T) -> String {
    serde_json::to_value(of).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn summary<'r>(method: &'r str, records: &[&Record]) -> Result<Summary<'r>, String> {
    if records.len() < RUNS {
        return Err(format!("{method} has {} runs of the same data; expected {RUNS} or more", records.len()));
    }
    // A sum has the same bits only in the same order, whichever the records came in.
    let mut records = records.to_vec();
    records.sort_by(|a, b| a.job.cmp(&b.job));
    let mut all = Vec::with_capacity(records.len());
    for record in &records {
        let curves: Vec<_> = record.curves.values().filter_map(|curve| curve::reached(curve)).collect();
        let [reached] = curves[..] else {
            return Err(format!("job {} has {} curves; expected that of one validation set", record.job, curves.len()));
        };
        all.push((record, reached));
    }
    let mean = |of: &dyn Fn(&Record, &curve::Reached) -> f64| {
        all.iter().map(|(record, reached)| of(record, reached)).sum::<f64>() / all.len() as f64
    };
    let runs = records.iter().map(|record| record.job.clone()).collect();
    Ok(Summary {
        method,
        gain: mean(&|_, reached| reached.gain()),
        steps: mean(&|_, reached| reached.steps as f64),
        seconds: mean(&|record, reached| curve::seconds(record, reached.steps)),
        memory_bytes: mean(&|record, _| record.peak_memory_bytes as f64),
        parameters: mean(&|record, _| record.trained_parameters as f64),
        runs,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::RULES_FILE;
    use super::*;
    use crate::experiment::record;

    /// A run whose loss goes from 4 to `best` at this step, and stays.
    fn run(method: &str, seed: u64, (best, at): (f64, u64), memory: u64) -> Record {
        let place = [(METHOD, method), (TASK, "generation"), (EXAMPLES, "100")];
        let mut record = record::of(&place, 1000, &[]);
        record.job = format!("{method}-{seed}");
        record.peak_memory_bytes = memory;
        record.trained_parameters = memory / 2;
        let curve = (0..=10).map(|step| (step, if step < at { 4.0 } else { best })).collect();
        record.curves.insert("held-out".to_owned(), curve);
        record
    }

    fn grid() -> Vec<Record> {
        let of = |(method, curve, memory)| (0..3).map(move |seed| run(method, seed, curve, memory));
        [("full", (2.0, 8), 900), ("lora", (2.1, 4), 500), ("ia3", (2.3, 6), 200), ("prompt-tuning", (3.5, 1), 100)]
            .into_iter()
            .flat_map(of)
            .collect()
    }

    fn made(records: &[Record]) -> Result<Rules, String> {
        let records: Vec<&Record> = records.iter().collect();
        assert!(has_axes(&records));
        rules("by-size", &records)
    }

    #[test]
    fn each_goal_has_the_method_that_serves_it_among_those_that_are_good_enough() {
        let grid = grid();
        let rules = made(&grid).unwrap();
        let chosen: Vec<(&str, &str)> =
            rules.rules.iter().map(|rule| (rule.id.as_str(), rule.method.as_str())).collect();
        assert_eq!(
            chosen,
            [
                ("generation-100-quality", "full"),
                ("generation-100-time", "lora"),
                ("generation-100-memory", "ia3"),
                ("generation-100-storage", "ia3"),
            ]
        );
        let quick = &rules.rules[1];
        assert_eq!((quick.steps, quick.runs.len()), (4.0, 3));
        // Who gains too little is chosen for nothing, as cheap as it may be.
        assert!((quick.gain - 1.9).abs() < 1e-9 && (quick.most - 2.0).abs() < 1e-9);
    }

    #[test]
    fn a_grid_without_all_weights_or_with_few_runs_makes_no_rules() {
        let without: Vec<Record> = grid().into_iter().filter(|record| record.place[METHOD] != "full").collect();
        assert!(made(&without).unwrap_err().contains("no run of all weights"));
        let mut few = grid();
        few.retain(|record| record.job != "lora-2");
        assert!(made(&few).unwrap_err().contains("lora has 2 runs"));
        let mut flat = grid();
        flat[0].curves.clear();
        assert!(made(&flat).unwrap_err().contains("has 0 curves"));
    }

    /// The rules of this build are those of the committed results. With `ATTUNE_UPDATE=1` in the environment they are written anew.
    #[test]
    fn the_rules_follow_from_the_results_that_they_name() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/comparisons/by-size");
        let records = record::read(&folder.join("results.jsonl")).unwrap();
        let made = made(&records).unwrap();
        let file = folder.join(RULES_FILE);
        if std::env::var_os("ATTUNE_UPDATE").is_some() {
            std::fs::write(&file, made.text()).unwrap();
        }
        let written = std::fs::read_to_string(&file).unwrap();
        assert!(written == made.text(), "rules.json is out of date; run with ATTUNE_UPDATE=1");
        let jobs: Vec<&str> = records.iter().map(|record| record.job.as_str()).collect();
        assert!(made.rules.iter().flat_map(|rule| &rule.runs).all(|run| jobs.contains(&run.as_str())));
    }
}
