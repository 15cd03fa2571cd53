//! `google.protobuf.Struct` and JSON values.
//!
//! A `Struct` knows only doubles: a whole number within 2^53 comes back as an integer, anything else as a float. An
//! integer that a double cannot hold is refused rather than rounded.

use attune_spec::{Fault, FieldPath};
use prost_types::{ListValue, Struct, Value as Message, value::Kind};
use serde_json::{Map, Number, Value};

/// Deepest nesting: each level costs three nested messages and decoders stop at a hundred.
const DEPTH_MAX: usize = 30;
/// Largest integer up to which every integer is a double.
const INTEGER_MAX: u64 = 1 << 53;

/// A JSON object as a `Struct`.
///
/// # Errors
/// The fault at the value that a `Struct` cannot hold.
pub fn to_struct(object: &Map<String, Value>, path: &FieldPath) -> Result<Struct, Fault> {
    object_to_struct(object, path, 0)
}

fn object_to_struct(object: &Map<String, Value>, path: &FieldPath, depth: usize) -> Result<Struct, Fault> {
    let fields = object
        .iter()
        .map(|(key, value)| Ok((key.clone(), to_message(value, &path.field(key), depth + 1)?)))
        .collect::<Result<_, Fault>>()?;
    Ok(Struct { fields })
}

fn to_message(value: &Value, path: &FieldPath, depth: usize) -> Result<Message, Fault> {
    if depth > DEPTH_MAX {
        return Err(Fault::new(path.clone(), format!("is nested deeper than {DEPTH_MAX} levels")));
    }
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(flag) => Kind::BoolValue(*flag),
        Value::Number(number) => Kind::NumberValue(to_double(number, path)?),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(list) => {
            let values = list.iter().enumerate().map(|(i, item)| to_message(item, &path.index(i), depth + 1));
            Kind::ListValue(ListValue { values: values.collect::<Result<_, Fault>>()? })
        }
        Value::Object(object) => Kind::StructValue(object_to_struct(object, path, depth)?),
    };
    Ok(Message { kind: Some(kind) })
}

fn to_double(number: &Number, path: &FieldPath) -> Result<f64, Fault> {
    let magnitude = number.as_u64().or_else(|| number.as_i64().map(i64::unsigned_abs));
    match (magnitude, number.as_f64()) {
        (Some(magnitude), _) if magnitude > INTEGER_MAX => {
            Err(Fault::new(path.clone(), format!("is {number}; integers beyond 2^53 cannot be sent exactly")))
        }
        (_, Some(double)) => Ok(double),
        (_, None) => Err(Fault::new(path.clone(), format!("is {number}; expected a number that a double can hold"))),
    }
}

/// A `Struct` as a JSON object.
///
/// # Errors
/// The fault at a value without a kind, or at a number that is not finite.
pub fn from_struct(message: &Struct, path: &FieldPath) -> Result<Map<String, Value>, Fault> {
    message.fields.iter().map(|(key, value)| Ok((key.clone(), from_message(value, &path.field(key))?))).collect()
}

fn from_message(message: &Message, path: &FieldPath) -> Result<Value, Fault> {
    Ok(match &message.kind {
        None => return Err(Fault::new(path.clone(), "has no value")),
        Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(flag)) => Value::Bool(*flag),
        Some(Kind::NumberValue(double)) => from_double(*double, path)?,
        Some(Kind::StringValue(text)) => Value::String(text.clone()),
        Some(Kind::ListValue(list)) => {
            let values = list.values.iter().enumerate().map(|(i, item)| from_message(item, &path.index(i)));
            Value::Array(values.collect::<Result<_, Fault>>()?)
        }
        Some(Kind::StructValue(object)) => Value::Object(from_struct(object, path)?),
    })
}

fn from_double(double: f64, path: &FieldPath) -> Result<Value, Fault> {
    // Negative zero stays a float: as an integer it would lose its sign.
    let is_integer =
        double.fract() == 0.0 && double.abs() <= INTEGER_MAX as f64 && !(double == 0.0 && double.is_sign_negative());
    if is_integer {
        return Ok(Value::from(double as i64));
    }
    Number::from_f64(double)
        .map(Value::Number)
        .ok_or_else(|| Fault::new(path.clone(), format!("is {double}; expected a finite number")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        let Value::Object(map) = value else { panic!("not an object") };
        map
    }

    fn round(value: Value) -> Result<Value, Fault> {
        let root = FieldPath::root();
        from_struct(&to_struct(&object(value), &root)?, &root).map(Value::Object)
    }

    #[test]
    fn parameters_round_trip() {
        let value =
            json!({"rank": 16, "lr": 2e-4, "targets": ["q_proj", {"layers": [0, 1]}], "bias": null, "rslora": true});
        assert_eq!(round(value.clone()).unwrap(), value);
        assert_eq!(round(json!({"weight": 1.0})).unwrap(), json!({"weight": 1}), "whole floats become integers");
    }

    #[test]
    fn what_a_double_cannot_hold_is_refused_with_its_path() {
        let fault = round(json!({"a": [{"seed": (1u64 << 53) + 1}]})).unwrap_err();
        assert_eq!(fault.path.as_str(), "a[0].seed");
        let fault = round(json!({"a": i64::MIN})).unwrap_err();
        assert!(fault.message.contains("2^53"), "{fault}");
    }

    #[test]
    fn nesting_and_broken_numbers_are_refused() {
        let deep = (0..40).fold(json!(1), |inner, _| json!({"a": inner}));
        assert!(round(deep).unwrap_err().message.contains("deeper than 30"));
        for bad in [f64::NAN, f64::INFINITY] {
            let fields = [("x".to_owned(), Message { kind: Some(Kind::NumberValue(bad)) })].into();
            assert_eq!(from_struct(&Struct { fields }, &FieldPath::root()).unwrap_err().path.as_str(), "x");
        }
        let fields = [("x".to_owned(), Message { kind: None })].into();
        assert!(from_struct(&Struct { fields }, &FieldPath::root()).is_err());
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (-(1i64 << 53)..=(1i64 << 53)).prop_map(Value::from),
            (-1e9f64..1e9).prop_filter("fractional", |x| x.fract() != 0.0).prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::Array),
                proptest::collection::btree_map("[a-z]{1,4}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_json_object_round_trips(value in proptest::collection::btree_map("[a-z]{1,4}", json_value(), 0..4)) {
            let value = Value::Object(value.into_iter().collect());
            prop_assert_eq!(round(value.clone()).unwrap(), value);
        }
    }
}
