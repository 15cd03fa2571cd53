//! References within the parameters of a recipe: fields that are called as those of a job file that hold one.

use serde_json::{Map, Value};

use super::reference::Reference;
use crate::fault::FieldPath;

/// The fields that hold a reference, at any depth.
const FIELDS: [&str; 3] = ["base", "source", "from"];

/// Whether a field, or the last one of a path in one name such as `tune.adapter.from`, is called like that.
fn is_reference(name: &str) -> bool {
    name.rsplit('.').next().is_some_and(|last| FIELDS.contains(&last))
}

/// The list of values that a mapping has for such a field, as an axis has: `{field: base, values: [..]}`.
fn listed(params: &Map<String, Value>) -> Option<&Vec<Value>> {
    let is_of = params.get("field").and_then(Value::as_str).is_some_and(is_reference);
    params.get("values").filter(|_| is_of).and_then(Value::as_array)
}

/// Adds every reference with its path. A text that is none is a fault of the stage that it becomes part of.
pub(super) fn each(params: &Map<String, Value>, path: &FieldPath, found: &mut Vec<(FieldPath, Reference)>) {
    for (index, value) in listed(params).into_iter().flatten().enumerate() {
        let path = path.field("values").index(index);
        found.extend(value.as_str().and_then(|text| text.parse().ok()).map(|reference| (path, reference)));
    }
    for (name, value) in params {
        let path = path.field(name);
        match value {
            Value::String(text) if is_reference(name) => {
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
    let is_listed = listed(params).is_some();
    for (name, value) in params {
        match value {
            Value::String(text) if is_reference(name) => put(text, replace)?,
            Value::Array(values) if is_listed && name == "values" => {
                for value in values {
                    match value {
                        Value::String(text) => put(text, replace)?,
                        other => replace_below(other, replace)?,
                    }
                }
            }
            other => replace_below(other, replace)?,
        }
    }
    Ok(())
}

/// Puts what `replace` makes of a reference in its place; a text that is none stays.
fn put<E>(text: &mut String, replace: &mut impl FnMut(&Reference) -> Result<Reference, E>) -> Result<(), E> {
    if let Ok(reference) = text.parse::<Reference>() {
        *text = replace(&reference)?.to_string();
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
