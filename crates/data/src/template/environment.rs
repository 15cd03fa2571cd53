//! The Jinja environment that Hugging Face's chat templates expect, and nothing more: no files, no clock, no endless loop.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::Value as Json;

/// Work that one rendering may do: an instruction costs 1, 64 bytes of produced text cost 1. Enough for the longest row
/// that a reader yields (16 MiB) several times over, and used up by an endless loop within a second or two.
const FUEL: u64 = 4_000_000;

const NAME: &str = "chat_template";

/// Compiles a template as `transformers` does: block tags take their line's white space with them, loop controls, Python
/// methods on values, `raise_exception`, and `tojson` in Python's style.
pub(super) fn compile(source: String) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    // Chat templates write plain text; a name that ended in `.html` would otherwise turn escaping on.
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, format!("the template says: {message}")))
    });
    environment.add_filter("tojson", tojson);
    environment.set_formatter(|output, state, value| match value.kind() {
        ValueKind::Bool => Ok(output.write_str(if value.is_true() { "True" } else { "False" })?),
        ValueKind::None => Ok(output.write_str("None")?),
        _ => minijinja::escape_formatter(output, state, value),
    });
    environment.add_template_owned(NAME, source)?;
    Ok(environment)
}

/// Renders the compiled template.
pub(super) fn render(environment: &Environment<'_>, context: Value) -> Result<String, Error> {
    environment.get_template(NAME)?.render(context)
}

/// An error with the template's line, and with the way out where there is a known one.
pub(super) fn describe(error: &Error) -> String {
    let mut words = match error.kind() {
        ErrorKind::OutOfFuel => "does not come to an end (a loop without limit?)".to_owned(),
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        words = format!("{words}: {inner}");
        source = inner.source();
    }
    if words.contains("strftime_now") {
        words.push_str("; the current time would make training unrepeatable: write a fixed date into the template");
    }
    match error.line() {
        Some(line) => format!("line {line}: {words}"),
        None => words,
    }
}

/// `json.dumps(value, ensure_ascii=False, …)`: what `transformers` puts in place of Jinja's own `tojson`, which would
/// escape HTML.
#[expect(clippy::needless_pass_by_value, reason = "the template engine hands keyword arguments over by value")]
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let json = serde_json::to_value(value)
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, "cannot be written as JSON").with_source(e))?;
    let indent: Option<usize> = options.get("indent")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut text = String::new();
    dump(&json, indent, sort_keys == Some(true), 0, &mut text);
    Ok(text)
}

fn dump(json: &Json, indent: Option<usize>, sort_keys: bool, depth: usize, text: &mut String) {
    let line = |text: &mut String, depth: usize| {
        if let Some(width) = indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', width * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match json {
        Json::Array(items) if !items.is_empty() => {
            text.push('[');
            for (index, item) in items.iter().enumerate() {
                text.push_str(if index > 0 { separator } else { "" });
                line(text, depth + 1);
                dump(item, indent, sort_keys, depth + 1, text);
            }
            line(text, depth);
            text.push(']');
        }
        Json::Object(fields) if !fields.is_empty() => {
            let mut fields: Vec<(&String, &Json)> = fields.iter().collect();
            if sort_keys {
                fields.sort_by_key(|(name, _)| *name);
            }
            text.push('{');
            for (index, (name, value)) in fields.into_iter().enumerate() {
                text.push_str(if index > 0 { separator } else { "" });
                line(text, depth + 1);
                text.push_str(&Json::from(name.as_str()).to_string());
                text.push_str(": ");
                dump(value, indent, sort_keys, depth + 1, text);
            }
            line(text, depth);
            text.push('}');
        }
        other => text.push_str(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use minijinja::context;

    use super::*;

    fn run(source: &str) -> Result<String, String> {
        let environment = compile(source.to_owned()).map_err(|e| describe(&e))?;
        render(&environment, context! { a => vec![1, 2], n => (), t => true, d => context! { k => "<é>" } })
            .map_err(|e| describe(&e))
    }

    #[test]
    fn values_print_as_python_prints_them() {
        assert_eq!(
            run("{{ t }} {{ n }} {{ 1 == 2 }} {{ d | tojson }} {{ a | tojson(indent=2) }}").unwrap(),
            "True None False {\"k\": \"<é>\"} [\n  1,\n  2\n]"
        );
        assert_eq!(run("{{ 'a,b'.split(',')[-1] }}{{ ' x '.strip() }}").unwrap(), "bx");
    }

    #[test]
    fn block_tags_take_their_line_with_them_and_loops_can_break() {
        assert_eq!(run("a\n  {% for x in a %}\n{{ x }}\n  {% break %}\n  {% endfor %}\nb\n").unwrap(), "a\n1\nb");
    }

    #[test]
    fn errors_name_the_line() {
        insta::assert_snapshot!(run("a\n{% if %}").unwrap_err(), @"line 2: unexpected end of block");
        insta::assert_snapshot!(run("a\n\n{{ raise_exception('roles must alternate') }}").unwrap_err(), @"line 3: the template says: roles must alternate");
        insta::assert_snapshot!(run("{{ strftime_now('%Y') }}").unwrap_err(), @"line 1: strftime_now is unknown; the current time would make training unrepeatable: write a fixed date into the template");
    }

    #[test]
    fn work_and_memory_are_bounded() {
        let endless = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}";
        insta::assert_snapshot!(run(endless).unwrap_err(), @"line 1: does not come to an end (a loop without limit?)");
        assert!(run("{{ 'x' * 1000000000000 }}").is_err());
        assert!(run("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").is_err());
        assert!(run("{% include '/etc/passwd' %}").is_err());
    }
}
