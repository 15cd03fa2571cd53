//! A stack of slots by a name of its own: what recipes of one stage do alike.

use serde_json::{Map, Value, json};

use super::read;
use crate::fault::{Fault, FieldPath};
use crate::id::Name;
use crate::job::{JobSpec, Outputs, SlotSpec};
use crate::stages::StageSpec;

/// The name of the only stage.
const STAGE: &str = "tune";

/// A slot that a preset makes.
pub(crate) struct Made {
    /// Its method.
    pub(crate) method: &'static str,
    /// Its fields.
    pub(crate) fields: Vec<Field>,
}

/// A field of such a slot.
pub(crate) struct Field {
    /// Its name in the slot.
    name: &'static str,
    value: Value,
    /// The parameter of the recipe that it is; none if the recipe fixes it.
    from: Option<&'static str>,
}

/// A field that a parameter of the recipe says.
pub(crate) fn given(name: &'static str, from: &'static str, value: impl Into<Value>) -> Field {
    Field { name, value: value.into(), from: Some(from) }
}

/// A field that is the same whatever the recipe's parameters are.
pub(crate) fn fixed(name: &'static str, value: impl Into<Value>) -> Field {
    Field { name, value: value.into(), from: None }
}

impl Made {
    fn slot(&self) -> Value {
        let mut slot = Map::from_iter([("method".to_owned(), json!(self.method))]);
        slot.extend(self.fields.iter().map(|field| (field.name.to_owned(), field.value.clone())));
        Value::Object(slot)
    }
}

/// The one stage of a preset: the file's job with these slots before its own.
///
/// # Errors
/// Everything that is wrong with it, with paths of the job file.
pub(crate) fn expand(job: &JobSpec, made: &[Made]) -> Result<Vec<StageSpec>, Vec<Fault>> {
    let name = Name::new(STAGE).expect("a literal name");
    let mut value = json!(JobSpec {
        name: Name::new(format!("{}.{name}", job.name)).unwrap_or_else(|_| job.name.clone()),
        kind: Default::default(),
        recipe: None,
        // What the whole is called is for the whole to say.
        outputs: Outputs { tag: None, merged_tag: None, ..job.outputs.clone() },
        ..job.clone()
    });
    let own: Vec<&SlotSpec> = job.tune.stack.iter().chain(&job.tune.adapter).collect();
    let stack = made.iter().map(Made::slot).chain(own.into_iter().map(|slot| json!(slot)));
    value["tune"]["stack"] = stack.collect();
    value["tune"]["adapter"] = Value::Null;
    match read(&value) {
        Ok(of) => Ok(vec![StageSpec { name, job: of, after: Vec::new() }]),
        Err(faults) => {
            let placed = |Fault { path, message }| Fault::new(place(made, &path), message);
            Err(faults.into_iter().map(placed).collect())
        }
    }
}

/// Where in the job file that stands which is at `path` in the stage.
pub(crate) fn place(made: &[Made], path: &FieldPath) -> FieldPath {
    let slot = path.as_str().strip_prefix("tune.stack[").and_then(|rest| rest.split_once(']'));
    let Some((index, rest)) = slot.and_then(|(index, rest)| Some((index.parse::<usize>().ok()?, rest))) else {
        return path.clone();
    };
    let rest = rest.trim_start_matches('.');
    let Some(own) = made.get(index) else {
        return FieldPath::from("tune").field("stack").index(index - made.len()).join(&FieldPath::parse(rest));
    };
    let recipe = FieldPath::from("recipe");
    let is_at = |name: &str| rest == name || rest.strip_prefix(name).is_some_and(|more| more.starts_with(['.', '[']));
    let found = own.fields.iter().find(|field| is_at(field.name));
    match found.and_then(|field| Some((field.name, field.from?))) {
        Some((name, from)) => recipe.field(from).join(&FieldPath::parse(rest[name.len()..].trim_start_matches('.'))),
        // What the recipe itself made of its parameters.
        None => recipe,
    }
}

/// What a job file that names a preset comes to, or its faults in words.
#[cfg(test)]
pub(crate) fn expanded(text: &str) -> Result<Vec<StageSpec>, Vec<String>> {
    use crate::job::{ReadError, read_value, read_yaml};

    let told = |faults: Vec<Fault>| faults.iter().map(ToString::to_string).collect::<Vec<_>>();
    match read_value(&read_yaml(text).unwrap(), crate::method::Catalogue::embedded()) {
        Ok(job) => crate::stages::known(&job, &[]).map_err(told),
        Err(ReadError::Faults(faults)) => Err(told(faults)),
        Err(other) => panic!("{other}"),
    }
}
