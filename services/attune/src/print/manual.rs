//! A method's entry in the manual, from its description.

use std::fmt::Write as _;

use attune_merge::words;
use attune_spec::method::{ManualDocument, Merges, MethodDocument, Point};
use serde_json::{Map, Value};

use super::{Column, Table};

/// Width to which prose is wrapped.
const WIDTH: usize = 96;
/// Width of the names before facts.
const NAME_WIDTH: usize = 12;

/// The entry of a method: what it is, its equations, what it costs, its parameters, and how a job file names it.
pub(crate) fn page(method: &MethodDocument) -> String {
    let mut page = format!("{} ({})\n\n", method.name, method.point.as_str());
    page.push_str(&indented(&method.summary, "  ", "  "));
    page.push('\n');
    for (name, text) in facts(method) {
        page.push_str(&indented(&text, &format!("  {name:<NAME_WIDTH$}"), &" ".repeat(NAME_WIDTH + 2)));
    }
    let ManualDocument { update, symbols, cost, limits, departures } = &method.manual;
    for (title, text) in [
        ("What it computes", update),
        ("Symbols", symbols),
        ("Cost", cost),
        ("Limits", limits),
        ("Differs from its paper or others", departures),
    ] {
        if !text.is_empty() {
            let _ = writeln!(page, "\n{title}");
            page.push_str(&plain(text));
        }
    }
    page.push_str("\nParameters\n");
    let parameters = parameters(method);
    if parameters.is_empty() {
        page.push_str("  none\n");
    } else {
        let mut table = Table::new([
            Column::left("  NAME"),
            Column::left("TYPE"),
            Column::left("DEFAULT"),
            Column::left("RANGE"),
            Column::left("MEANING"),
        ]);
        for [name, kind, default, range, meaning] in parameters {
            table.row([format!("  {name}"), kind, default, range, meaning]);
        }
        page.push_str(&table.to_string());
    }
    if !method.rules.is_empty() {
        page.push_str("\nRules\n");
        for rule in &method.rules {
            let when = if rule.when == "true" { String::new() } else { format!("when {}: ", rule.when) };
            let text = format!("{when}{} (otherwise `{}` {})", rule.require, rule.path, rule.message);
            page.push_str(&indented(&text, "  ", "    "));
        }
    }
    match method.point {
        Point::Merge => page.push_str("\nOn the command line\n"),
        _ => page.push_str("\nIn a job file\n"),
    }
    page.push_str(&example(method));
    page
}

fn facts(method: &MethodDocument) -> Vec<(&'static str, String)> {
    let mut facts = vec![("Decides", method.point.question().to_owned())];
    if let Some(category) = method.category {
        facts.push(("Category", category.as_str().to_owned()));
    }
    if !method.aliases.is_empty() {
        facts.push(("Also called", method.aliases.join(", ")));
    }
    if !method.applies.is_empty() {
        let kinds: Vec<String> = method.applies.iter().map(|kind| text(serde_json::to_value(kind))).collect();
        let targets = &method.targets;
        facts.push(("Sites", format!("{}; {targets} where a slot names none", kinds.join(", "))));
    }
    if !method.parameters.is_empty() {
        let cost = &method.parameters;
        let widths = match cost.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "k") {
            true => "where keys are k wide",
            false => "of input width i and output width o",
        };
        let shared =
            if method.shared.is_empty() { String::new() } else { format!(", and {} that all share", method.shared) };
        facts.push(("Trains", format!("{cost} parameters at a site {widths}{shared}")));
    }
    if let Some(why) = &method.moves {
        facts.push(("Starts", format!("away from the base: {why}")));
    }
    if !method.answers.is_empty() {
        let (answers, tokens) = (&method.answers, &method.answer_tokens);
        let text = format!(
            "{answers} answers that the model gives to each prompt, of {tokens} tokens at most, which the rules in `tune.rewards` judge"
        );
        facts.push(("Learns from", text));
    }
    if method.compares_vectors {
        facts.push(("Compares", "vectors of documents (`tune.head: {task: embedding}`)".to_owned()));
    }
    if !method.rows_before.is_empty() {
        let text =
            format!("{} rows before every document, which take positions and room in a batch", method.rows_before);
        facts.push(("Puts", text));
    }
    if !method.becomes.is_empty() {
        let sizes = method.becomes.iter().map(|(size, text)| format!("{size} = {text}"));
        facts.push(("Makes", sizes.collect::<Vec<_>>().join(", ")));
    }
    match method.merges {
        Merges::Factors => facts.push(("Merges", "into the base's weight, as a low-rank change".to_owned())),
        Merges::Weight => facts.push(("Merges", "into a new weight in place of the base's".to_owned())),
        Merges::No => facts.push(("Merges", "not: it has to stay beside the base".to_owned())),
        Merges::NotApplicable => {}
    }
    match method.on_quantized().filter(|_| method.point == Point::Adapter || method.needs_quantization) {
        Some(_) if method.needs_quantization => facts.push(("Base", "in few bits (`tune.quantization`)".to_owned())),
        Some(true) => facts.push(("Base", "of whole numbers, or in few bits (`tune.quantization`)".to_owned())),
        Some(false) => facts.push(("Base", "of whole numbers".to_owned())),
        None => {}
    }
    if let Some(peft_type) = &method.peft_type {
        facts.push(("PEFT", format!("kept in PEFT's layout as {peft_type}")));
    }
    if let Some(paper) = &method.paper {
        facts.push(("Paper", format!("{}. {} ({})", paper.title, paper.authors, paper.year)));
    }
    facts
}

/// Name, type, default, range and meaning of each parameter.
fn parameters(method: &MethodDocument) -> Vec<[String; 5]> {
    let properties = method.schema.get("properties").and_then(Value::as_object);
    let row = |(name, schema): (&String, &Value)| {
        let resolved = resolve(schema, &method.schema);
        let meaning = [schema, resolved].into_iter().find_map(|at| at.get("description")?.as_str());
        let default = method.defaults.get(name).filter(|default| !default.is_null());
        let default = default.map_or_else(|| "none".to_owned(), written);
        [name.clone(), kind(resolved, &method.schema), default, range(resolved), meaning.unwrap_or_default().to_owned()]
    };
    properties.into_iter().flatten().map(row).collect()
}

/// The schema that a `$ref` points at.
fn resolve<'a>(schema: &'a Value, root: &'a Value) -> &'a Value {
    let target = schema.get("$ref").and_then(Value::as_str).and_then(|to| root.pointer(to.trim_start_matches('#')));
    target.unwrap_or(schema)
}

/// The type of a parameter in the words of messages about it.
fn kind(schema: &Value, root: &Value) -> String {
    let schema = resolve(schema, root);
    if let Some(options) = schema.get("enum").and_then(Value::as_array) {
        return options.iter().map(written).collect::<Vec<_>>().join(" | ");
    }
    if let Some(option) = schema.get("const") {
        return written(option);
    }
    let forms = ["anyOf", "oneOf"].into_iter().find_map(|key| schema.get(key)?.as_array());
    if let Some(forms) = forms {
        let mut names: Vec<String> = forms.iter().map(|form| kind(form, root)).filter(|name| name != "null").collect();
        names.dedup();
        return names.join(" | ");
    }
    let inner = |key: &str| schema.get(key).filter(|inner| inner.is_object()).map(|inner| kind(inner, root));
    let name = |name: &Value| match name.as_str().unwrap_or_default() {
        "integer" => "whole number".to_owned(),
        "number" => "number".to_owned(),
        "string" => "text".to_owned(),
        "boolean" => "true | false".to_owned(),
        "array" => inner("items").map_or_else(|| "list".to_owned(), |items| format!("list of {items}")),
        "object" => inner("additionalProperties").map_or_else(|| "mapping".to_owned(), |to| format!("mapping to {to}")),
        other => other.to_owned(),
    };
    match schema.get("type") {
        Some(Value::Array(names)) => {
            names.iter().map(name).filter(|name| name != "null").collect::<Vec<_>>().join(" | ")
        }
        Some(one) => name(one),
        None => "any".to_owned(),
    }
}

/// The range of a number, such as `1 ..= 4096`.
fn range(schema: &Value) -> String {
    let bound = |key: &str| schema.get(key).map(written);
    let from = bound("minimum").or_else(|| bound("exclusiveMinimum").map(|least| format!("> {least}")));
    match (from, bound("maximum"), bound("exclusiveMaximum")) {
        (Some(from), Some(to), _) => format!("{from} ..= {to}"),
        (Some(from), None, Some(to)) => format!("{from} .. {to}"),
        (Some(from), None, None) if from.starts_with('>') => from,
        (Some(from), None, None) => format!("{from} .."),
        (None, Some(to), _) => format!("..= {to}"),
        (None, None, Some(to)) => format!(".. {to}"),
        (None, None, None) => String::new(),
    }
}

/// A value as a job file writes it.
pub(crate) fn written(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => {
            let text = number.to_string();
            text.strip_suffix(".0").map(str::to_owned).unwrap_or(text)
        }
        Value::Array(items) => format!("[{}]", items.iter().map(written).collect::<Vec<_>>().join(", ")),
        Value::Object(fields) => format!("{{{}}}", pairs(fields)),
        Value::Null | Value::Bool(_) => value.to_string(),
    }
}

fn pairs(fields: &Map<String, Value>) -> String {
    fields.iter().map(|(name, value)| format!("{name}: {}", written(value))).collect::<Vec<_>>().join(", ")
}

/// The method with its defaults, where a job file names it.
fn example(method: &MethodDocument) -> String {
    let mut named = Map::from_iter([("method".to_owned(), Value::from(method.name.as_str()))]);
    let defaults = method.defaults.as_object().cloned().unwrap_or_default();
    named.extend(defaults.into_iter().filter(|(_, default)| !default.is_null()));
    let named = pairs(&named);
    match method.point {
        Point::Adapter => format!("  tune:\n    adapter: {{{named}}}\n"),
        Point::Init => format!("  tune:\n    adapter: {{…, init: {{{named}}}}}\n"),
        Point::Budget => format!("  tune:\n    budget: {{{named}}}\n"),
        Point::Mixing => format!("  data:\n    mixing: {{{named}}}\n"),
        Point::Objective => {
            let rewards = if method.answers.is_empty() { "" } else { "    rewards: [{method: exact-match}]\n" };
            format!("  tune:\n    objective: {{{named}}}\n{rewards}")
        }
        Point::Reward => format!("  tune:\n    rewards: [{{{named}}}]\n"),
        Point::Surgery => format!("  tune:\n    surgery: {{{named}}}\n"),
        Point::Quantization => format!("  tune:\n    quantization: {{{named}}}\n"),
        Point::StepRule => format!("  tune:\n    step: {{{named}}}\n"),
        Point::Optimizer => format!("  tune:\n    optimizer: {{{named}}}\n"),
        Point::Schedule => format!("  tune:\n    schedule: {{{named}}}\n"),
        Point::Recipe => format!("  kind: recipe\n  recipe: {{{named}}}\n"),
        Point::Search => format!("  search: {{{named}}}\n"),
        Point::Merge => {
            let words = words::meaning(&method.name)
                .map(|word| format!("  attune merge ./a=0.5 ./b=0.5 --base ./base --combination-type {word}\n"));
            words.collect()
        }
    }
}

/// Markdown as plain text: formulas between fences as they stand, paragraphs wrapped.
fn plain(markdown: &str) -> String {
    let (mut text, mut paragraph, mut is_formula) = (String::new(), String::new(), false);
    for line in markdown.lines().chain([""]) {
        let is_fence = line.starts_with("```");
        if is_formula && !is_fence {
            let _ = writeln!(text, "{}", format!("    {line}").trim_end());
            continue;
        }
        if !is_fence && !line.is_empty() {
            paragraph.push_str(line);
            paragraph.push(' ');
            continue;
        }
        if !paragraph.is_empty() {
            text.push_str(&indented(&paragraph, "  ", "  "));
            paragraph.clear();
        }
        is_formula ^= is_fence;
    }
    text
}

/// Prose, wrapped; the first line after `first`, the others after `rest`.
fn indented(prose: &str, first: &str, rest: &str) -> String {
    let (mut lines, mut line) = (String::new(), first.to_owned());
    let mut empty = true;
    for word in prose.split_whitespace() {
        if !empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines.push_str(line.trim_end());
            lines.push('\n');
            rest.clone_into(&mut line);
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    lines.push_str(line.trim_end());
    lines.push('\n');
    lines
}

fn text(value: serde_json::Result<Value>) -> String {
    value.map(|value| written(&value)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use attune_spec::method::Catalogue;
    use serde_json::json;

    use super::*;

    #[test]
    fn every_method_has_a_page_whose_example_can_be_read() {
        for method in Catalogue::embedded().documents() {
            let page = page(method);
            if method.point == Point::Merge {
                assert!(page.contains("\nOn the command line\n  attune merge "), "{page}");
                continue;
            }
            let (_, example) = page.split_once("In a job file\n").unwrap();
            let read = attune_spec::job::read_yaml(example).unwrap_or_else(|error| panic!("{page}\n{error}"));
            assert!(example.contains(&format!("method: {}", method.name)), "{page}");
            assert!(read.is_object(), "{page}");
            assert!(page.lines().all(|line| line == line.trim_end()), "{page}");
            let named = method.schema.get("properties").and_then(Value::as_object).into_iter().flatten();
            assert!(named.into_iter().all(|(name, _)| page.contains(&format!("  {name} "))), "{page}");
        }
    }

    #[test]
    fn formulas_stand_as_they_are_and_paragraphs_are_wrapped() {
        let text = "Two words\nof one line.\n```text\ny =  W x\n\n  + b\n```\nThen `b`.\n\nAnd more.";
        insta::assert_snapshot!(plain(text), @r"
          Two words of one line.
            y =  W x

              + b
          Then `b`.
          And more.
        ");
    }

    #[test]
    fn types_and_ranges_are_in_plain_words() {
        let root = json!({"$defs": {"Rank": {"type": "integer", "minimum": 1, "maximum": 9}}});
        let of = |schema: Value| (kind(&schema, &root), range(&schema));
        let words = |kind: &str, range: &str| (kind.to_owned(), range.to_owned());
        assert_eq!(of(json!({"type": "number", "exclusiveMinimum": 0})), words("number", "> 0"));
        assert_eq!(of(json!({"type": "number", "minimum": 0.0, "exclusiveMaximum": 1.0})), words("number", "0 .. 1"));
        assert_eq!(of(json!({"$ref": "#/$defs/Rank"})).0, "whole number");
        assert_eq!(of(json!({"enum": ["a", "b"]})).0, "a | b");
        assert_eq!(of(json!({"anyOf": [{"type": "string"}, {"type": "null"}]})).0, "text");
        assert_eq!(of(json!({"type": ["integer", "null"]})).0, "whole number");
        assert_eq!(of(json!({"type": "array", "items": {"type": "string"}})).0, "list of text");
        let mapping = json!({"type": "object", "additionalProperties": {"$ref": "#/$defs/Rank"}});
        assert_eq!(of(mapping).0, "mapping to whole number");
    }
}
