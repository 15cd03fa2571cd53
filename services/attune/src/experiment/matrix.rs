//! Which jobs a grid is of: a job file, axes along which some of its fields differ, and for one that is too large to run a search.

use std::path::{Path, PathBuf};

use attune_search::{SEARCHES, Search, Space};
use attune_spec::axis::{self, Axis, Choice};
use attune_spec::id::Step;
use attune_spec::job::read_yaml;
use attune_spec::method::{BuildCx, MethodRef};
use attune_spec::{Fault, FieldPath};
use serde::Deserialize;
use serde_json::Value;

use crate::job_file::Assignment;
use crate::print::Failure;

/// The most jobs of a grid.
const JOBS_MAX: usize = 10_000;
/// What the place of a job that is run once more has beside its axes.
const THEN: &str = "then";

/// The file of a grid.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Matrix {
    /// The version of the format; only 1 exists.
    version: u32,
    /// What people call the grid.
    pub(crate) name: String,
    /// The job file, relative to this one.
    job: PathBuf,
    /// What differs.
    vary: Vec<Axis>,
    /// Which jobs are run, by what came of those before; all of them if it is left out.
    #[serde(default)]
    search: Option<MethodRef>,
    /// Fields of the jobs that are run once more when the search has ended: those that no other one beats.
    #[serde(default)]
    then: serde_json::Map<String, Value>,
    /// How results are shown.
    #[serde(default)]
    pub(crate) report: Shown,
    /// Text above the table.
    #[serde(default)]
    pub(crate) remarks: String,
}

/// How results are shown.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Shown {
    /// The axis whose values are the rows of the table and the points of the plot; the first if it is left out.
    pub(crate) rows: Option<String>,
    /// Axes over which means are taken, such as seeds.
    pub(crate) mean_over: Vec<String>,
    /// Validation sets that are not of the task: they show what runs keep of what the base knew.
    pub(crate) general: Vec<String>,
    /// The axis of a setting, such as a learning rate, of which is told how much depends on it, and on chance (`mean_over`).
    pub(crate) stability: Option<String>,
}

/// One job of the grid: its place on each axis, and what it changes in the job file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Cell {
    /// The value on each axis, in the order of the axes.
    pub(crate) place: Vec<(String, String)>,
    /// The fields that it sets.
    pub(crate) set: Vec<Assignment>,
}

impl Cell {
    /// The place as a text, such as `method=lora, seed=0`.
    pub(crate) fn title(&self) -> String {
        let pairs = self.place.iter().map(|(axis, value)| format!("{axis}={value}"));
        pairs.collect::<Vec<_>>().join(", ")
    }
}

impl Matrix {
    /// Reads a grid's file.
    pub(crate) fn read(file: &str) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(file).map_err(|error| Failure::file(Path::new(file), &error))?;
        let value = read_yaml(&text).map_err(|error| Failure::usage(format!("{file}: {error}")))?;
        let matrix: Self = serde_json::from_value(value).map_err(|error| Failure::usage(format!("{file}: {error}")))?;
        let faults = matrix.faults();
        if faults.is_empty() { Ok(matrix) } else { Err(Failure::invalid(file, faults)) }
    }

    /// Where the job file is that a grid's file names.
    pub(crate) fn job_file(&self, file: &str) -> String {
        let folder = Path::new(file).parent().unwrap_or_else(|| Path::new(""));
        folder.join(&self.job).display().to_string()
    }

    /// The axis of the rows.
    pub(crate) fn rows(&self) -> &str {
        let first = self.vary.first().map_or("", |axis| axis.name.as_str());
        self.report.rows.as_deref().unwrap_or(first)
    }

    /// The values of an axis, in the order of the file.
    pub(crate) fn values(&self, axis: &str) -> Vec<String> {
        let axis = self.vary.iter().find(|known| known.name == axis);
        axis.map_or_else(Vec::new, |axis| axis.choices().into_iter().map(|choice| choice.name).collect())
    }

    /// The axes by which neither rows are made nor means taken.
    pub(crate) fn columns(&self) -> Vec<&str> {
        let names = self.vary.iter().map(|axis| axis.name.as_str());
        names.filter(|name| *name != self.rows() && !self.report.mean_over.iter().any(|mean| mean == name)).collect()
    }

    fn faults(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        if self.version != 1 {
            faults.push(Fault::new("version", format!("is {}; this build reads version 1", self.version)));
        }
        let vary = FieldPath::from("vary");
        faults.extend(axis::faults(&self.vary, &vary));
        if let Some(index) = self.vary.iter().position(|axis| axis.name == THEN) {
            let message = format!("is {THEN:?}, which jobs that are run once more are known by; call it otherwise");
            faults.push(Fault::new(vary.index(index).field("name"), message));
        }
        let known = |name: &&String| !self.vary.iter().any(|axis| axis.name == **name);
        for name in self.report.rows.iter().chain(&self.report.mean_over).filter(known) {
            let names: Vec<&str> = self.vary.iter().map(|axis| axis.name.as_str()).collect();
            faults.push(Fault::new("report", format!("names the axis {name:?}; the axes are {}", names.join(", "))));
        }
        if let Some(axis) = &self.report.stability {
            let names = self.columns();
            if !names.contains(&axis.as_str()) || self.report.mean_over.is_empty() {
                let known = if names.is_empty() { "there is none".to_owned() } else { names.join(", ") };
                let message = format!(
                    "is {axis}; expected an axis that is neither that of the rows ({}) nor in `mean_over` ({known}), and another one, such as \
                     a seed, in `mean_over`",
                    self.rows()
                );
                faults.push(Fault::new("report.stability", message));
            }
        }
        match &self.search {
            Some(_) => {
                faults.extend(self.search().err().unwrap_or_default());
                if !self.report.general.is_empty() {
                    let message = "names sets by which whole grids are compared, which a search is not; leave it out";
                    faults.push(Fault::new("report.general", message));
                }
                if !self.report.mean_over.is_empty() {
                    let message = "takes means over an axis, of which a search sees single jobs; leave it out";
                    faults.push(Fault::new("report.mean_over", message));
                }
            }
            None => {
                let jobs = axis::size(&self.vary);
                if jobs > JOBS_MAX {
                    let message = format!("makes {jobs} jobs; expected at most {JOBS_MAX}, or a `search` among them");
                    faults.push(Fault::new(vary, message));
                }
                if !self.then.is_empty() {
                    faults.push(Fault::new("then", "is given, but there is no `search` whose best jobs it is of"));
                }
            }
        }
        faults
    }

    /// The search among its jobs; none if all are run.
    pub(crate) fn search(&self) -> Result<Option<Box<dyn Search>>, Vec<Fault>> {
        let cx = BuildCx { steps: Step(1), domains: &[], words: None };
        self.search.as_ref().map(|search| SEARCHES.build(search, &"search".into(), &cx)).transpose()
    }

    /// Its axes, as a search sees them.
    pub(crate) fn space(&self) -> Space {
        let axis = |axis: &Axis| attune_search::Axis { values: axis.len(), ordered: axis.is_ordered() };
        Space::new(self.vary.iter().map(axis).collect())
    }

    /// The job with these values, by their index on each axis.
    pub(crate) fn cell(&self, place: &[usize]) -> Cell {
        let mut cell = Cell { place: Vec::new(), set: Vec::new() };
        for (axis, &index) in self.vary.iter().zip(place) {
            if let Some(Choice { name, set, .. }) = axis.choices().into_iter().nth(index) {
                cell.place.push((axis.name.clone(), name));
                cell.set.extend(set.iter().map(|(field, value)| Assignment::new(field, value)));
            }
        }
        cell
    }

    /// The same job, run once more when a search has ended; none if that is not asked for.
    pub(crate) fn then(&self, cell: &Cell) -> Option<Cell> {
        let mut cell = cell.clone();
        cell.place.push((THEN.to_owned(), "yes".to_owned()));
        cell.set.extend(self.then.iter().map(|(field, value)| Assignment::new(field, value)));
        (!self.then.is_empty()).then_some(cell)
    }

    /// All jobs, those of the first value of the first axis first.
    pub(crate) fn cells(&self) -> Vec<Cell> {
        axis::product(&self.vary).iter().map(|place| self.cell(place)).collect()
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::{Architecture, Site, SiteId, targets};
    use attune_spec::axis::Values;
    use attune_spec::job::Targets;
    use attune_spec::method::SiteKind;

    use super::*;

    fn matrix(text: &str) -> Matrix {
        serde_json::from_value(read_yaml(text).unwrap()).unwrap()
    }

    const GRID: &str = "
version: 1
name: small
job: ./job.yaml
vary:
  - name: method
    values:
      lora: {tune.adapter: {method: lora, rank: 4}, tune.steps: 3}
      full: {tune.adapter: {method: full}}
  - {name: seed, field: tune.seed, values: [0, 1, 2]}
report: {mean_over: [seed]}
";

    #[test]
    fn jobs_are_the_product_of_the_axes() {
        let grid = matrix(GRID);
        assert_eq!(grid.faults(), []);
        let cells = grid.cells();
        assert_eq!(cells.len(), 6);
        assert_eq!(cells[1].title(), "method=lora, seed=1");
        let lora = serde_json::json!({"method": "lora", "rank": 4});
        assert_eq!(cells[1].set[0], Assignment::new("tune.adapter", &lora));
        assert_eq!((cells[1].set.len(), cells[5].set.len()), (3, 2));
        assert_eq!((grid.rows(), grid.columns()), ("method", vec![]));
        assert_eq!(grid.values("seed"), ["0", "1", "2"]);
        assert_eq!(grid.job_file("a/grid.yaml"), "a/./job.yaml");
    }

    #[test]
    fn each_fault_has_its_place() {
        let wrong = "
version: 2
name: small
job: ./job.yaml
vary:
  - {name: a, field: tune.seed, values: [1]}
  - {name: a, field: tune.steps, values: [2]}
report: {rows: d, stability: b}
";
        let faults: Vec<String> = matrix(wrong).faults().iter().map(ToString::to_string).collect();
        let expected = [
            "`version` is 2; this build reads version 1",
            "`vary[1].name` is \"a\", as `vary[0]` is called; give each its own",
            "`report` names the axis \"d\"; the axes are a, a",
            "`report.stability` is b; expected an axis that is neither that of the rows (d) nor in `mean_over` (a, a), and another one, \
             such as a seed, in `mean_over`",
        ];
        assert_eq!(faults, expected);
    }

    /// The comparison of parts of a model names exactly those parts.
    #[test]
    fn parts_of_a_model_are_what_they_are_called() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/comparisons/subsets.yaml");
        let grid = Matrix::read(file).unwrap();
        let config = br#"{"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6,
                          "num_attention_heads": 2, "vocab_size": 30}"#;
        let model = Architecture::from_json(config).unwrap();
        let linears: Vec<Site> = model
            .sites()
            .into_iter()
            .filter(|site| site.layer.is_some() && site.id.as_str().ends_with("_proj"))
            .collect();
        assert_eq!(linears.len(), 6 * 7);
        let Values::Named(parts) = &grid.vary[0].values else { panic!("parts have names") };
        for (name, fields) in parts {
            let targets = fields["tune.adapter"].get("targets").cloned().unwrap_or_else(|| "all-linear".into());
            let targets: Targets = serde_json::from_value(targets).unwrap();
            let named = targets::resolve(&targets, None, &model, |site| site.offers() == SiteKind::Linear).unwrap();
            let layer = |site: &Site| site.layer.unwrap_or_default();
            let is_of = |site: &&Site| match name.as_str() {
                "everything" => true,
                "attentions" => site.id.as_str().contains("self_attn"),
                "mlps" => site.id.as_str().contains("mlp"),
                "first-half" => layer(site) < 3,
                "last-half" => layer(site) >= 3,
                "drawn-half" => [0, 3, 4].contains(&layer(site)),
                other => panic!("{other} is no part that is known"),
            };
            let expected: Vec<&SiteId> = linears.iter().filter(is_of).map(|site| &site.id).collect();
            assert_eq!(named.iter().map(|site| &site.id).collect::<Vec<_>>(), expected, "{name}");
        }
    }
}
