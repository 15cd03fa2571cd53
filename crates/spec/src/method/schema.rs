//! Checks a value against a JSON Schema and says what is wrong in the words of the job file.

use jsonschema::error::{TypeKind, ValidationErrorKind};
use jsonschema::paths::LocationSegment;
use jsonschema::{ValidationError, Validator};
use serde_json::Value;

use crate::fault::{Fault, FieldPath};
use crate::suggest;

/// All faults of `value` under `schema`; `path` is where the value stands in the document.
///
/// # Panics
/// If `schema` is not a JSON Schema: schemas are generated, so that is a bug.
pub fn check(schema: &Value, value: &Value, path: &FieldPath) -> Vec<Fault> {
    let validator = jsonschema::validator_for(schema).expect("generated schemas are valid");
    check_with(&validator, schema, value, path)
}

/// [`check`] with a compiled schema.
pub fn check_with(validator: &Validator, schema: &Value, value: &Value, path: &FieldPath) -> Vec<Fault> {
    if let Some(faults) = beyond_no_fields(schema, value, path) {
        return faults;
    }
    let mut faults: Vec<Fault> =
        validator.iter_errors(value).flat_map(|error| faults_of(&error, schema, path)).collect();
    faults.sort();
    faults.dedup();
    faults
}

/// Faults of a mapping that must be empty. The library reports them without the name of the field.
fn beyond_no_fields(schema: &Value, value: &Value, path: &FieldPath) -> Option<Vec<Fault>> {
    let closed = schema.get("additionalProperties") == Some(&Value::Bool(false));
    let none = schema.get("properties").and_then(Value::as_object).is_none_or(serde_json::Map::is_empty);
    let fields = value.as_object().filter(|_| closed && none)?;
    let fault = |name: &String| Fault::new(path.field(name), "is not a known field; there are none here");
    Some(fields.keys().map(fault).collect())
}

/// The path of an instance location, such as `tune.stack[0].rank`.
fn located(error: &ValidationError<'_>, outer: &FieldPath) -> FieldPath {
    error.instance_path().iter().fold(outer.clone(), |path, segment| match segment {
        LocationSegment::Property(name) => path.field(&name),
        LocationSegment::Index(index) => path.index(index),
    })
}

/// The value as a message quotes it, cut to a readable length.
fn quoted(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() > 60 { text.chars().take(57).chain("...".chars()).collect() } else { text }
}

fn faults_of(error: &ValidationError<'_>, schema: &Value, outer: &FieldPath) -> Vec<Fault> {
    let path = located(error, outer);
    let value = quoted(error.instance());
    let one = |message: String| vec![Fault::new(path.clone(), message)];
    if let Some(options) = choices(error) {
        let hint = error.instance().as_str().map(|given| suggest::hint(given, options.iter().map(String::as_str)));
        let of = if options.len() == 1 { "" } else { "one of " };
        return one(format!("is {value}; expected {of}{}{}", options.join(", "), hint.unwrap_or_default()));
    }
    match error.kind() {
        ValidationErrorKind::AdditionalProperties { unexpected } => {
            let known = properties_at(schema, error.schema_path().as_str());
            unexpected
                .iter()
                .map(|name| {
                    let hint = suggest::hint(name, known.iter().map(String::as_str));
                    Fault::new(path.field(name), format!("is not a known field{hint}{}", listed(&known, &hint)))
                })
                .collect()
        }
        ValidationErrorKind::Required { property } => {
            let name = property.as_str().unwrap_or_default();
            vec![Fault::new(path.field(name), "is missing")]
        }
        ValidationErrorKind::Type { kind } => one(format!("is {value}; expected {}", type_names(kind))),
        ValidationErrorKind::Minimum { limit } => one(format!("is {value}; expected {limit} or more")),
        ValidationErrorKind::Maximum { limit } => one(format!("is {value}; expected {limit} or less")),
        ValidationErrorKind::ExclusiveMinimum { limit } => one(format!("is {value}; expected more than {limit}")),
        ValidationErrorKind::ExclusiveMaximum { limit } => one(format!("is {value}; expected less than {limit}")),
        ValidationErrorKind::MinItems { limit } => one(format!("has too few entries; expected {limit} or more")),
        ValidationErrorKind::MaxItems { limit } => one(format!("has too many entries; expected {limit} or fewer")),
        ValidationErrorKind::MinLength { limit } => one(format!("is {value}; expected {limit} or more characters")),
        ValidationErrorKind::MaxLength { limit } => one(format!("is {value}; expected {limit} or fewer characters")),
        ValidationErrorKind::Pattern { pattern } => one(format!("is {value}; expected text of the form {pattern}")),
        ValidationErrorKind::AnyOf { context } | ValidationErrorKind::OneOfNotValid { context } => {
            nearest_alternative(context, schema, outer)
                .unwrap_or_else(|| one(format!("is {value}; no allowed form fits")))
        }
        _ => one(format!("is {value}; {error}")),
    }
}

/// The allowed values, if the value had to be one of a list. An enumeration whose values have a text of their own is written
/// as several forms of one constant each.
fn choices(error: &ValidationError<'_>) -> Option<Vec<String>> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match error.kind() {
        ValidationErrorKind::Constant { expected_value } => Some(vec![text(expected_value)]),
        ValidationErrorKind::Enum { options } => Some(options.as_array()?.iter().map(text).collect()),
        ValidationErrorKind::AnyOf { context } | ValidationErrorKind::OneOfNotValid { context } => {
            let of = |errors: &Vec<ValidationError<'static>>| match errors.as_slice() {
                [error] => choices(error),
                _ => None,
            };
            context.iter().map(of).collect::<Option<Vec<_>>>().map(|lists| lists.concat())
        }
        _ => None,
    }
}

/// Of several allowed forms, the one that the value comes nearest to: whose faults lie deepest, then the fewest. If all
/// forms fail on the type of the value itself, they are told together.
fn nearest_alternative(
    context: &[Vec<ValidationError<'static>>],
    schema: &Value,
    outer: &FieldPath,
) -> Option<Vec<Fault>> {
    let is_type_fault = |error: &ValidationError<'_>| matches!(error.kind(), ValidationErrorKind::Type { .. });
    let depth = |errors: &[ValidationError<'_>]| {
        errors.iter().map(|error| error.instance_path().iter().count()).max().unwrap_or(0)
    };
    let mistyped = |errors: &&Vec<ValidationError<'static>>| errors.iter().any(is_type_fault) && errors.len() == 1;
    let shallow = context.iter().map(|errors| depth(errors)).min()?;
    let here: Vec<_> = context.iter().filter(mistyped).filter(|errors| depth(errors) == shallow).collect();
    if here.len() == context.len() {
        let error = here.first()?.first()?;
        let kinds: Vec<String> = here
            .iter()
            .filter_map(|errors| match errors.first()?.kind() {
                ValidationErrorKind::Type { kind } => Some(type_names(kind)),
                _ => None,
            })
            .collect();
        let message = format!("is {}; expected {}", quoted(error.instance()), kinds.join(" or "));
        return Some(vec![Fault::new(located(error, outer), message)]);
    }
    let best = context
        .iter()
        .filter(|errors| !(mistyped(errors) && depth(errors) == shallow))
        .min_by_key(|errors| (std::cmp::Reverse(depth(errors)), errors.len()))?;
    Some(best.iter().flat_map(|error| faults_of(error, schema, outer)).collect())
}

fn type_names(kind: &TypeKind) -> String {
    let name = |kind: jsonschema::JsonType| match kind.to_string().as_str() {
        "object" => "a mapping",
        "array" => "a list",
        "string" => "a text",
        "integer" => "a whole number",
        "number" => "a number",
        "boolean" => "true or false",
        _ => "nothing",
    };
    match kind {
        TypeKind::Single(kind) => name(*kind).to_owned(),
        TypeKind::Multiple(kinds) => kinds.iter().map(name).collect::<Vec<_>>().join(" or "),
    }
}

/// The names of the properties beside the `additionalProperties` at `schema_path`.
fn properties_at(schema: &Value, schema_path: &str) -> Vec<String> {
    let mut at = schema;
    for segment in schema_path.split('/').skip(1) {
        if segment == "additionalProperties" {
            break;
        }
        let unescaped = segment.replace("~1", "/").replace("~0", "~");
        let next = if unescaped == "$ref" {
            at.get("$ref").and_then(Value::as_str).and_then(|to| schema.pointer(to.trim_start_matches('#')))
        } else {
            at.get(&unescaped).or_else(|| at.get(unescaped.parse::<usize>().ok()?))
        };
        match next {
            Some(next) => at = next,
            None => return Vec::new(),
        }
    }
    while let Some(target) =
        at.get("$ref").and_then(Value::as_str).and_then(|to| schema.pointer(to.trim_start_matches('#')))
    {
        at = target;
    }
    at.get("properties").and_then(Value::as_object).map(|map| map.keys().cloned().collect()).unwrap_or_default()
}

/// The known names, where no single one is near and the list is short enough to read.
fn listed(known: &[String], hint: &str) -> String {
    if hint.is_empty() && !known.is_empty() && known.len() <= 24 {
        format!("; known are {}", known.join(", "))
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[derive(schemars::JsonSchema)]
    #[schemars(deny_unknown_fields)]
    #[expect(dead_code, reason = "only its schema is used")]
    struct Config {
        #[schemars(range(min = 1, max = 4096))]
        rank: u32,
        alpha: Option<f64>,
        targets: OneOrMany,
        kind: Option<Kind>,
    }

    #[derive(schemars::JsonSchema)]
    #[schemars(untagged)]
    #[expect(dead_code, reason = "only its schema is used")]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }

    #[derive(schemars::JsonSchema)]
    #[schemars(rename_all = "snake_case")]
    #[expect(dead_code, reason = "only its schema is used")]
    enum Kind {
        Plain,
        Fancy,
    }

    #[test]
    fn messages_say_where_what_and_what_would_do() {
        let schema = schemars::schema_for!(Config).to_value();
        let cases = [
            (json!({"targets": "a"}), vec!["`x.rank` is missing"]),
            (json!({"rank": 0, "targets": "a"}), vec!["`x.rank` is 0; expected 1 or more"]),
            (json!({"rank": -4, "targets": "a"}), vec!["`x.rank` is -4; expected 1 or more"]),
            (json!({"rank": "8", "targets": "a"}), vec!["`x.rank` is \"8\"; expected a whole number"]),
            (json!({"rank": 8, "targets": 7}), vec!["`x.targets` is 7; expected a text or a list"]),
            (json!({"rank": 8, "targets": ["a", 3]}), vec!["`x.targets[1]` is 3; expected a text"]),
            (
                json!({"rank": 8, "targets": "a", "kind": "fancyy"}),
                vec!["`x.kind` is \"fancyy\"; expected one of plain, fancy; did you mean \"fancy\"?"],
            ),
            (
                json!({"rnak": 8, "targets": "a"}),
                vec!["`x.rank` is missing", "`x.rnak` is not a known field; did you mean \"rank\"?"],
            ),
        ];
        for (value, expected) in cases {
            let faults: Vec<String> = check(&schema, &value, &"x".into()).iter().map(ToString::to_string).collect();
            assert_eq!(faults, expected, "{value}");
        }
    }
}
