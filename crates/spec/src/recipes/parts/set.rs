//! Fields of a job file that a stage has different.

use serde_json::{Map, Value};

/// Whether a mapping is a choice, of a method or of an adapter to start from, and not fields that are each set by themselves.
fn is_choice(fields: &Map<String, Value>) -> bool {
    fields.contains_key("method") || fields.contains_key("from")
}

/// Puts what is set over what is there: fields one by one, at any depth; a choice takes the place of the other whole, and so does
/// everything that is no mapping.
pub(crate) fn put(there: &mut Value, set: &Value) {
    match (there, set) {
        (Value::Object(there), Value::Object(set)) if !is_choice(set) => {
            for (name, value) in set {
                put(there.entry(name).or_insert(Value::Null), value);
            }
        }
        (there, set) => *there = set.clone(),
    }
}

/// Whether a path leads to what is set.
pub(crate) fn says(set: &Map<String, Value>, path: &str) -> bool {
    let mut at: Option<&Value> = None;
    for part in path.split(['.', '[']).map(|part| part.trim_end_matches(']')) {
        let fields = at.map_or(Some(set), Value::as_object);
        at = match (at, fields) {
            (_, Some(fields)) => match fields.get(part) {
                None if at.is_some() && is_choice(fields) => return true,
                found => found,
            },
            (Some(Value::Array(items)), None) => part.parse().ok().and_then(|index: usize| items.get(index)),
            _ => return true,
        };
        if at.is_none() {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_are_set_one_by_one_and_choices_whole() {
        let mut there = json!({"a": {"x": 1, "y": [1]}, "of": {"method": "one", "rank": 2}, "z": 3});
        put(&mut there, &json!({"a": {"y": [2], "w": {"v": 4}}, "of": {"method": "two"}, "z": null}));
        assert_eq!(there, json!({"a": {"x": 1, "y": [2], "w": {"v": 4}}, "of": {"method": "two"}, "z": null}));
    }

    #[test]
    fn a_path_leads_to_what_is_set_or_into_a_choice() {
        let set = json!({"tune": {"stack": [{"method": "one"}], "steps": 1}});
        let said = |path: &str| says(set.as_object().unwrap(), path);
        for path in ["tune", "tune.steps", "tune.stack[0].method", "tune.stack[0].rank"] {
            assert!(said(path), "{path}");
        }
        for path in ["data", "tune.seed", "tune.stack[1].rank"] {
            assert!(!said(path), "{path}");
        }
    }
}
