//! Which jobs a grid is of: a job file, axes along which some of its fields differ, and for one that is too large to run a search.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use attune_search::{SEARCHES, Search, Space};
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
}

/// What differs from job to job: either values of one field, or named sets of fields.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Axis {
    /// Its name.
    pub(crate) name: String,
    /// The field that takes each of a list of values.
    #[serde(default)]
    field: Option<String>,
    /// Whether a search takes values that are neighbours in the list for alike; lists of numbers are if it is left out.
    #[serde(default)]
    ordered: Option<bool>,
    /// A list of values of the field, or names with the fields that each sets.
    values: Values,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
enum Values {
    Listed(Vec<Value>),
    Named(serde_json::Map<String, Value>),
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
        axis.map_or_else(Vec::new, |axis| axis.choices().into_iter().map(|(name, _)| name).collect())
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
        if self.vary.is_empty() {
            faults.push(Fault::new(vary.clone(), "is empty; expected at least one axis"));
        }
        let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
        if let Some(index) = self.vary.iter().position(|axis| axis.name == THEN) {
            let message = format!("is {THEN:?}, which jobs that are run once more are known by; call it otherwise");
            faults.push(Fault::new(vary.index(index).field("name"), message));
        }
        for (index, axis) in self.vary.iter().enumerate() {
            let path = vary.index(index);
            if let Some(other) = seen.insert(&axis.name, index) {
                let message = format!("is {:?}, as `vary[{other}]` is called; give each its own", axis.name);
                faults.push(Fault::new(path.field("name"), message));
            }
            faults.extend(axis.faults(&path));
        }
        let known = |name: &&String| !self.vary.iter().any(|axis| axis.name == **name);
        for name in self.report.rows.iter().chain(&self.report.mean_over).filter(known) {
            let names: Vec<&str> = self.vary.iter().map(|axis| axis.name.as_str()).collect();
            faults.push(Fault::new("report", format!("names the axis {name:?}; the axes are {}", names.join(", "))));
        }
        match &self.search {
            Some(_) => {
                faults.extend(self.search().err().unwrap_or_default());
                if !self.report.mean_over.is_empty() {
                    let message = "takes means over an axis, of which a search sees single jobs; leave it out";
                    faults.push(Fault::new("report.mean_over", message));
                }
            }
            None => {
                let jobs = self.vary.iter().map(|axis| axis.choices().len()).fold(1usize, usize::saturating_mul);
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
        let axis = |axis: &Axis| attune_search::Axis { values: axis.choices().len(), ordered: axis.is_ordered() };
        Space::new(self.vary.iter().map(axis).collect())
    }

    /// The job with these values, by their index on each axis.
    pub(crate) fn cell(&self, place: &[usize]) -> Cell {
        let mut cell = Cell { place: Vec::new(), set: Vec::new() };
        for (axis, &index) in self.vary.iter().zip(place) {
            if let Some((value, set)) = axis.choices().into_iter().nth(index) {
                cell.place.push((axis.name.clone(), value));
                cell.set.extend(set);
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
        let mut cells = vec![Cell { place: Vec::new(), set: Vec::new() }];
        for axis in &self.vary {
            let choices = axis.choices();
            let extended = cells.iter().flat_map(|cell| {
                choices.iter().map(|(value, set)| {
                    let mut cell = cell.clone();
                    cell.place.push((axis.name.clone(), value.clone()));
                    cell.set.extend(set.iter().cloned());
                    cell
                })
            });
            cells = extended.collect();
        }
        cells
    }
}

impl Axis {
    fn faults(&self, path: &FieldPath) -> Vec<Fault> {
        let fault = |field: &str, message: &str| vec![Fault::new(path.field(field), message)];
        match (&self.values, &self.field) {
            (Values::Listed(values), _) if values.is_empty() => fault("values", "is empty; expected one or more"),
            (Values::Named(values), _) if values.is_empty() => fault("values", "is empty; expected one or more"),
            (Values::Listed(_), None) => fault("field", "is missing: a list of values needs the field that takes them"),
            (Values::Named(_), Some(_)) => {
                fault("field", "is given, but the values are named and say their fields themselves")
            }
            (Values::Named(values), None) => {
                let wrong = values.iter().filter(|(_, set)| !set.is_object());
                let message =
                    |name: &str| format!("is no mapping of fields to values, such as `{name}: {{tune.seed: 1}}`");
                wrong.map(|(name, _)| Fault::new(path.field("values").field(name), message(name))).collect()
            }
            (Values::Listed(_), Some(_)) => Vec::new(),
        }
    }

    fn is_ordered(&self) -> bool {
        let of_numbers = matches!(&self.values, Values::Listed(values) if values.iter().all(Value::is_number));
        self.ordered.unwrap_or(of_numbers)
    }

    /// Its values by name, with the fields that each sets.
    fn choices(&self) -> Vec<(String, Vec<Assignment>)> {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        match &self.values {
            Values::Listed(values) => {
                let field = self.field.as_deref().unwrap_or_default();
                values.iter().map(|value| (text(value), vec![Assignment::new(field, value)])).collect()
            }
            Values::Named(values) => {
                let set = |fields: &Value| {
                    let fields = fields.as_object().into_iter().flatten();
                    fields.map(|(field, value)| Assignment::new(field, value)).collect()
                };
                values.iter().map(|(name, fields)| (name.clone(), set(fields))).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::{Architecture, Site, SiteId, targets};
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
  - {name: a, values: [1]}
  - {name: a, field: tune.seed, values: {x: {tune.steps: 1}}}
  - {name: b, values: {x: 3}}
  - {name: c, field: tune.seed, values: []}
report: {rows: d}
";
        let faults: Vec<String> = matrix(wrong).faults().iter().map(ToString::to_string).collect();
        let expected = [
            "`version` is 2; this build reads version 1",
            "`vary[0].field` is missing: a list of values needs the field that takes them",
            "`vary[1].name` is \"a\", as `vary[0]` is called; give each its own",
            "`vary[1].field` is given, but the values are named and say their fields themselves",
            "`vary[2].values.x` is no mapping of fields to values, such as `x: {tune.seed: 1}`",
            "`vary[3].values` is empty; expected one or more",
            "`report` names the axis \"d\"; the axes are a, a, b, c",
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
