//! Reads a job file: syntax with line and column, structure and methods with field paths, all faults at once.

use serde_json::Value;

use super::JobSpec;
use super::check;
use crate::fault::{Fault, FieldPath};
use crate::method::Catalogue;

/// Why a text is not a job.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ReadError {
    /// It is not YAML.
    #[error("line {line}, column {column}: {message}")]
    Syntax {
        /// The line, from 1.
        line: u64,
        /// The column, from 1.
        column: u64,
        /// What is wrong.
        message: String,
    },
    /// It is YAML that says something wrong.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Faults(Vec<Fault>),
}

/// Reads YAML (of which JSON is a part) into a value. Duplicate keys and unbounded aliases are refused.
///
/// # Errors
/// [`ReadError::Syntax`] with line and column.
pub fn read_yaml(text: &str) -> Result<Value, ReadError> {
    serde_saphyr::from_str(text).map_err(|error| {
        let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
        let whole = error.without_snippet().to_string();
        let message = whole.lines().next().unwrap_or_default();
        // The place stands in fields of its own, and the library's options are no business of who writes a job file.
        let message = message.split_once(" at line ").map_or(message, |(message, _)| message);
        let message = message.split_once(", set DuplicateKeyPolicy").map_or(message, |(message, _)| message);
        ReadError::Syntax { line, column, message: message.to_owned() }
    })
}

/// Reads a job from its value and checks it against `catalogue`: structure, methods and their parameters, relations between
/// fields. What lies outside of the file (artifacts, the base's sites) is not looked at.
///
/// # Errors
/// [`ReadError::Faults`] with every fault and its path.
pub fn read_value(value: &Value, catalogue: &Catalogue) -> Result<JobSpec, ReadError> {
    read(value, catalogue, check::relations)
}

/// The same of a stage of a recipe, which may start from what other stages make.
///
/// # Errors
/// [`ReadError::Faults`] with every fault and its path.
pub fn read_stage(value: &Value, catalogue: &Catalogue) -> Result<JobSpec, ReadError> {
    read(value, catalogue, check::stage_relations)
}

fn read(
    value: &Value,
    catalogue: &Catalogue,
    relations: fn(&JobSpec, &Catalogue) -> Vec<Fault>,
) -> Result<JobSpec, ReadError> {
    let mut faults = check::structure(value);
    faults.extend(check::methods(value, catalogue));
    if faults.is_empty() {
        match serde_path_to_error::deserialize::<_, JobSpec>(value) {
            Ok(spec) => {
                faults = relations(&spec, catalogue);
                if faults.is_empty() {
                    return Ok(spec);
                }
            }
            // The schema has let it pass, so a form that only the types know (a tag, a name) is at fault.
            Err(error) => {
                let path = match error.path().to_string() {
                    path if path == "." => FieldPath::root(),
                    path => FieldPath::parse(path),
                };
                faults.push(Fault::new(path, format!("is wrong: {}", error.into_inner())));
            }
        }
    }
    faults.sort();
    faults.dedup();
    Err(ReadError::Faults(faults))
}

/// Sets the field at a path such as `tune.stack[0].rank` to the YAML value `text`, making mappings on the way.
///
/// # Errors
/// A fault if the path leads through something that is no mapping or list, or past the end of a list.
pub fn set_path(value: &mut Value, path: &str, text: &str) -> Result<(), Fault> {
    let new = read_yaml(text).map_err(|error| Fault::new(path, error.to_string()))?;
    let mut at = value;
    let mut walked = FieldPath::root();
    for part in path.split('.') {
        let (name, indexes) = part.split_once('[').map_or((part, None), |(name, rest)| (name, Some(rest)));
        if name.is_empty() {
            return Err(Fault::new(path, "is not a field path; expected one like tune.stack[0].rank"));
        }
        walked = walked.field(name);
        if at.is_null() {
            *at = Value::Object(serde_json::Map::new());
        }
        let Some(object) = at.as_object_mut() else {
            return Err(Fault::new(walked, "cannot be set: what stands above it is not a mapping"));
        };
        at = object.entry(name).or_insert(Value::Null);
        for index in indexes.into_iter().flat_map(|indexes| indexes.split('[')) {
            let number = index.strip_suffix(']').and_then(|index| index.parse::<usize>().ok());
            let Some(number) = number else {
                return Err(Fault::new(path, "is not a field path; expected one like tune.stack[0].rank"));
            };
            let length = at.as_array().map_or(0, Vec::len);
            walked = walked.index(number);
            let Some(entry) = at.as_array_mut().and_then(|list| list.get_mut(number)) else {
                return Err(Fault::new(walked, format!("cannot be set: the list has {length} entries")));
            };
            at = entry;
        }
    }
    *at = new;
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_syntax_error_has_its_line_and_column() {
        let error = read_yaml("version: 1\nname: [a, b\ntune: {}\n").unwrap_err();
        let ReadError::Syntax { line, .. } = &error else { panic!("{error}") };
        assert!((2..=3).contains(line), "{error}");
        let error = read_yaml("a: 1\na: 2\n").unwrap_err();
        assert_eq!(error.to_string(), "line 2, column 1: duplicate mapping key: a");
    }

    #[test]
    fn paths_set_fields_and_name_what_stands_in_the_way() {
        let mut value = json!({"tune": {"stack": [{"rank": 8}]}});
        set_path(&mut value, "tune.stack[0].rank", "16").unwrap();
        set_path(&mut value, "outputs.tag", "bot:latest").unwrap();
        assert_eq!(value, json!({"tune": {"stack": [{"rank": 16}]}, "outputs": {"tag": "bot:latest"}}));
        let error = set_path(&mut value, "tune.stack[3].rank", "16").unwrap_err();
        assert_eq!(error.to_string(), "`tune.stack[3]` cannot be set: the list has 1 entries");
        assert!(set_path(&mut value, "tune.stack[0].rank.x", "1").is_err());
        assert!(set_path(&mut value, "", "1").is_err());
    }
}
