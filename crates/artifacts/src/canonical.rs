//! One way to write a JSON value, so that equal values have equal bytes and thereby equal digests: compact, object keys
//! sorted by their bytes, strings escaped only where JSON demands it, UTF-8.

use attune_spec::id::Digest;
use serde_json::Value;

use crate::hash;

/// The canonical text of `value`.
pub fn to_string(value: &Value) -> String {
    let mut text = String::new();
    write(value, &mut text);
    text
}

/// The digest of the canonical text of `value`; the name of a resolved plan in a lineage.
pub fn digest(value: &Value) -> Digest {
    hash::bytes(to_string(value).as_bytes())
}

fn write(value: &Value, text: &mut String) {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_unstable_by(|a, b| a.0.as_bytes().cmp(b.0.as_bytes()));
            text.push('{');
            for (i, (key, value)) in entries.into_iter().enumerate() {
                if i > 0 {
                    text.push(',');
                }
                write(&Value::String(key.clone()), text);
                text.push(':');
                write(value, text);
            }
            text.push('}');
        }
        Value::Array(items) => {
            text.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    text.push(',');
                }
                write(item, text);
            }
            text.push(']');
        }
        // serde_json writes scalars in one way: shortest float that reads back, minimal escapes.
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => text.push_str(&value.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn order_of_keys_and_white_space_do_not_matter() {
        let a: Value = serde_json::from_str(r#"{ "b": [1, 2.5, null], "a": {"y": "é\n", "x": true} }"#).unwrap();
        let b: Value = serde_json::from_str(r#"{"a":{"x":true,"y":"\u00e9\n"},"b":[1,2.5,null]}"#).unwrap();
        assert_eq!(to_string(&a), r#"{"a":{"x":true,"y":"é\n"},"b":[1,2.5,null]}"#);
        assert_eq!(digest(&a), digest(&b));
        assert_ne!(digest(&a), digest(&json!({"a": 1})));
    }
}
