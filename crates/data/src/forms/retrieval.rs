//! A text and what belongs to it: `{"query": …, "positive": …}`, the query also as `anchor`; with `negative`, a text or several, where
//! there are such as look alike and do not belong to it. Files that have a column for each of these call them `negative_1`,
//! `negative_2` and so on.

use serde_json::{Map, Value};

use super::{Record, filled_text_of};
use crate::origin::{Reason, RowFault};
use crate::readers::kind;

/// What the columns of texts that do not belong to the query begin with, before their numbers.
const NEGATIVE: &str = "negative";

/// Whether a row has the columns of this form.
pub(super) fn fits(fields: &Map<String, Value>) -> bool {
    (fields.contains_key("query") || fields.contains_key("anchor")) && fields.contains_key("positive")
}

pub(super) fn read(fields: &Map<String, Value>) -> Result<Record, RowFault> {
    let query = match (fields.contains_key("query"), fields.contains_key("anchor")) {
        (true, true) => {
            let message = "has both `query` and `anchor`; expected one of them";
            return Err(RowFault::new(Reason::WrongType, message));
        }
        (_, true) => filled_text_of(fields, "anchor")?,
        _ => filled_text_of(fields, "query")?,
    };
    let mut passages = vec![filled_text_of(fields, "positive")?.to_owned()];
    match fields.get(NEGATIVE) {
        None | Some(Value::Null) => {}
        Some(Value::Array(texts)) => {
            for (index, text) in texts.iter().enumerate() {
                let text = text.as_str().filter(|text| !text.trim().is_empty()).ok_or_else(|| {
                    let message =
                        format!("`{NEGATIVE}[{index}]` is {}; expected a text that says something", kind(text));
                    RowFault::new(Reason::WrongType, message)
                })?;
                passages.push(text.to_owned());
            }
        }
        Some(_) => passages.push(filled_text_of(fields, NEGATIVE)?.to_owned()),
    }
    for number in 1.. {
        let column = format!("{NEGATIVE}_{number}");
        match fields.get(&column) {
            None => break,
            Some(Value::Null) => {}
            Some(_) => passages.push(filled_text_of(fields, &column)?.to_owned()),
        }
    }
    Ok(Record::Retrieved { query: query.to_owned(), passages })
}

#[cfg(test)]
mod tests {
    use super::super::fields;
    use super::*;

    fn passages(json: &str) -> Vec<String> {
        let Record::Retrieved { query, passages } = read(&fields(json)).unwrap() else { panic!("{json}") };
        assert_eq!(query, "q");
        passages
    }

    #[test]
    fn negatives_are_a_text_a_list_or_columns() {
        assert_eq!(passages(r#"{"query": "q", "positive": "p", "negative": null}"#), ["p"]);
        assert_eq!(passages(r#"{"anchor": "q", "positive": "p", "negative": "n"}"#), ["p", "n"]);
        assert_eq!(passages(r#"{"query": "q", "positive": "p", "negative": ["m", "n"]}"#), ["p", "m", "n"]);
        let columns = r#"{"query": "q", "positive": "p", "negative_1": "m", "negative_2": "n"}"#;
        assert_eq!(passages(columns), ["p", "m", "n"]);
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let message = |json: &str| read(&fields(json)).unwrap_err().message;
        insta::assert_snapshot!(message(r#"{"query": "q", "anchor": "a", "positive": "p"}"#), @"has both `query` and `anchor`; expected one of them");
        insta::assert_snapshot!(message(r#"{"query": "q"}"#), @r#"`positive` is missing; the row has ["query"]"#);
        insta::assert_snapshot!(message(r#"{"query": " ", "positive": "p"}"#), @"`query` is empty; expected the text to train on");
        insta::assert_snapshot!(message(r#"{"query": "q", "positive": "p", "negative": ["n", 3]}"#), @"`negative[1]` is a number; expected a text that says something");
        insta::assert_snapshot!(message(r#"{"query": "q", "positive": "p", "negative": 3}"#), @"`negative` is a number; expected a text");
    }
}
