//! References within the parameters of a recipe: fields that are called as those of a job file that hold one.

use serde_json::{Map, Value};

use super::reference::Reference;
use crate::fault::FieldPath;

/// The fields that hold a reference, at any depth.
const FIELDS: [&str; 3] = ["base", "source", "from"];

/// Adds every reference with its path. A text that is none is a fault of the stage that it becomes part of.
pub(super) fn each(params: &Map<String, Value>, path: &FieldPath, found: &mut Vec<(FieldPath, Reference)>) {
    for (name, value) in params {
        let path = path.field(name);
        match value {
            Value::String(text) if FIELDS.contains(&name.as_str()) => {
                found.extend(text.parse().ok().map(|reference| (path, reference)));
            }
            other => below(other, &path, found),
        }
    }
}

fn below(value: &Value, path: &FieldPath, found: &mut Vec<(FieldPath, Reference)>) {
    match value {
        Value::Object(fields) => each(fields, path, found),
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                below(item, &path.index(index), found);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Replaces every reference by what `replace` makes of it.
pub(super) fn replace<E>(
    params: &mut Map<String, Value>,
    replace: &mut impl FnMut(&Reference) -> Result<Reference, E>,
) -> Result<(), E> {
    for (name, value) in params {
        match value {
            Value::String(text) if FIELDS.contains(&name.as_str()) => {
                if let Ok(reference) = text.parse::<Reference>() {
                    *text = replace(&reference)?.to_string();
                }
            }
            other => replace_below(other, replace)?,
        }
    }
    Ok(())
}

fn replace_below<E>(value: &mut Value, with: &mut impl FnMut(&Reference) -> Result<Reference, E>) -> Result<(), E> {
    match value {
        Value::Object(fields) => replace(fields, with),
        Value::Array(items) => items.iter_mut().try_for_each(|item| replace_below(item, with)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Ok(()),
    }
}
