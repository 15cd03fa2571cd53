//! What differs between jobs that are made of one: axes, and the jobs that are their product.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::fault::{Fault, FieldPath};

/// What differs from job to job: either values of one field, or named sets of fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(deny_unknown_fields)]
pub struct Axis {
    /// Its name.
    pub name: String,
    /// The field that takes each of a list of values, such as `tune.optimizer.lr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// Whether a search takes values that are neighbours in the list for alike; lists of numbers are if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ordered: Option<bool>,
    /// A list of values of the field, or names with the fields that each sets.
    pub values: Values,
}

/// The values of an axis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Values {
    /// Those of one field.
    Listed(Vec<Value>),
    /// Names, each with fields and their values.
    Named(Map<String, Value>),
}

/// One value of an axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// What it is called: the value itself as text, or its name.
    pub name: String,
    /// The fields that it sets, and to what.
    pub set: Vec<(String, Value)>,
    /// Where it stands below its axis.
    pub path: FieldPath,
}

impl Axis {
    /// How many values it has.
    pub fn len(&self) -> usize {
        match &self.values {
            Values::Listed(values) => values.len(),
            Values::Named(values) => values.len(),
        }
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What is wrong with it, below `path`.
    pub fn faults(&self, path: &FieldPath) -> Vec<Fault> {
        let fault = |field: &str, message: &str| vec![Fault::new(path.field(field), message)];
        match (&self.values, &self.field) {
            _ if self.is_empty() => fault("values", "is empty; expected one or more"),
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

    /// Whether values that are neighbours are alike.
    pub fn is_ordered(&self) -> bool {
        let of_numbers = matches!(&self.values, Values::Listed(values) if values.iter().all(Value::is_number));
        self.ordered.unwrap_or(of_numbers)
    }

    /// Its values, in the order of the file.
    pub fn choices(&self) -> Vec<Choice> {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let values = FieldPath::from("values");
        match &self.values {
            Values::Listed(listed) => {
                let field = self.field.clone().unwrap_or_default();
                let choice = |(index, value): (usize, &Value)| Choice {
                    name: text(value),
                    set: vec![(field.clone(), value.clone())],
                    path: values.index(index),
                };
                listed.iter().enumerate().map(choice).collect()
            }
            Values::Named(named) => {
                let set = |fields: &Value| {
                    let fields = fields.as_object().into_iter().flatten();
                    fields.map(|(field, value)| (field.clone(), value.clone())).collect()
                };
                let choice = |(name, fields): (&String, &Value)| Choice {
                    name: name.clone(),
                    set: set(fields),
                    path: values.field(name),
                };
                named.iter().map(choice).collect()
            }
        }
    }
}

/// How many jobs there are of some axes; `usize::MAX` if more than can be counted.
pub fn size(axes: &[Axis]) -> usize {
    axes.iter().map(Axis::len).fold(1, usize::saturating_mul)
}

/// The indexes of each job's values on the axes: those of the first value of the first axis first.
pub fn product(axes: &[Axis]) -> Vec<Vec<usize>> {
    axes.iter().fold(vec![Vec::with_capacity(axes.len())], |places, axis| {
        let extended = places
            .iter()
            .flat_map(|place: &Vec<usize>| (0..axis.len()).map(|index| place.iter().copied().chain([index]).collect()));
        extended.collect()
    })
}

/// What is wrong with a list of axes, at `path`, beside its size.
pub fn faults(axes: &[Axis], path: &FieldPath) -> Vec<Fault> {
    if axes.is_empty() {
        return vec![Fault::new(path.clone(), "is empty; expected at least one axis")];
    }
    let mut faults = Vec::new();
    for (index, axis) in axes.iter().enumerate() {
        let at = path.index(index);
        if let Some(other) = axes[..index].iter().rposition(|other| other.name == axis.name) {
            let message = format!("is {:?}, as `{}` is called; give each its own", axis.name, path.index(other));
            faults.push(Fault::new(at.field("name"), message));
        }
        faults.extend(axis.faults(&at));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axes(text: &str) -> Vec<Axis> {
        serde_json::from_value(crate::job::read_yaml(text).unwrap()).unwrap()
    }

    #[test]
    fn jobs_are_the_product_of_the_axes() {
        let axes = axes(
            "[{name: method, values: {lora: {tune.rank: 4, tune.steps: 3}, full: {}}}, \
              {name: seed, field: tune.seed, values: [0, 1, '2']}]",
        );
        assert_eq!((faults(&axes, &"vary".into()), size(&axes)), (vec![], 6));
        assert_eq!(product(&axes), [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]);
        let choices = axes[0].choices();
        assert_eq!((choices[0].name.as_str(), choices[0].set.len(), choices[1].set.len()), ("lora", 2, 0));
        assert_eq!(choices[0].path.to_string(), "values.lora");
        let seed = &axes[1].choices()[2];
        assert_eq!((seed.name.as_str(), seed.path.to_string().as_str()), ("2", "values[2]"));
        assert!(!axes[1].is_ordered(), "a text is among them");
        assert_eq!(product(&[]), [[0usize; 0]]);
    }

    #[test]
    fn what_cannot_be_counted_is_the_most() {
        let axis = axes("[{name: a, field: tune.seed, values: [0, 1]}]").remove(0);
        assert_eq!(size(&vec![axis; 200]), usize::MAX);
    }

    #[test]
    fn each_fault_has_its_place() {
        let wrong = axes(
            "[{name: a, values: [1]}, {name: a, field: tune.seed, values: {x: {tune.steps: 1}}}, \
              {name: b, values: {x: 3}}, {name: c, field: tune.seed, values: []}]",
        );
        let told: Vec<String> = faults(&wrong, &"vary".into()).iter().map(ToString::to_string).collect();
        let expected = [
            "`vary[0].field` is missing: a list of values needs the field that takes them",
            "`vary[1].name` is \"a\", as `vary[0]` is called; give each its own",
            "`vary[1].field` is given, but the values are named and say their fields themselves",
            "`vary[2].values.x` is no mapping of fields to values, such as `x: {tune.seed: 1}`",
            "`vary[3].values` is empty; expected one or more",
        ];
        assert_eq!(told, expected);
        assert_eq!(faults(&[], &"vary".into())[0].to_string(), "`vary` is empty; expected at least one axis");
    }
}
