//! Words and the class of each: `{"tokens": [word, …], "tags": [class, …]}`, with `ner_tags` for `tags` where files of named entities
//! have that.

use serde_json::{Map, Value};

use super::{Record, label};
use crate::origin::{Reason, RowFault};
use crate::readers::kind;

/// The columns that may hold the classes.
const TAGS: [&str; 2] = ["tags", "ner_tags"];

/// Whether a row has these columns.
pub(super) fn fits(fields: &Map<String, Value>) -> bool {
    fields.contains_key("tokens") && TAGS.iter().any(|tags| fields.contains_key(*tags))
}

pub(super) fn read(fields: &Map<String, Value>) -> Result<Record, RowFault> {
    let list = |column: &str| match fields.get(column) {
        Some(Value::Array(values)) => Ok(values.as_slice()),
        Some(other) => Err(RowFault::new(Reason::WrongType, format!("`{column}` is {}; expected a list", kind(other)))),
        None => {
            let names: Vec<&str> = fields.keys().map(String::as_str).collect();
            Err(RowFault::new(Reason::MissingField, format!("`{column}` is missing; the row has {names:?}")))
        }
    };
    let column = TAGS.into_iter().find(|tags| fields.contains_key(*tags)).unwrap_or(TAGS[0]);
    let (words, tags) = (list("tokens")?, list(column)?);
    if words.len() != tags.len() {
        let message = format!("`tokens` has {} words and `{column}` {} classes", words.len(), tags.len());
        return Err(RowFault::new(Reason::WrongType, message));
    }
    if words.is_empty() {
        return Err(RowFault::new(Reason::EmptyText, "`tokens` is empty; expected words to train on"));
    }
    let word = |(index, word): (usize, &Value)| match word {
        Value::String(word) => Ok(word.clone()),
        other => {
            let message = format!("`tokens[{index}]` is {}; expected a text", kind(other));
            Err(RowFault::new(Reason::WrongType, message))
        }
    };
    let tag = |(index, tag)| label(&format!("{column}[{index}]"), tag);
    Ok(Record::Tagged {
        words: words.iter().enumerate().map(word).collect::<Result<_, _>>()?,
        tags: tags.iter().enumerate().map(tag).collect::<Result<_, _>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Label, fields};
    use super::*;

    #[test]
    fn each_word_has_a_class() {
        for column in TAGS {
            let row = fields(&format!(r#"{{"tokens": ["EU", "rejects"], "{column}": ["B-ORG", 0]}}"#));
            assert!(fits(&row));
            let words = ["EU", "rejects"].map(str::to_owned).to_vec();
            let tags = vec![Label::Name("B-ORG".to_owned()), Label::Number(0)];
            assert_eq!(read(&row).unwrap(), Record::Tagged { words, tags });
        }
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let message = |json: &str| read(&fields(json)).unwrap_err().message;
        insta::assert_snapshot!(message(r#"{"tokens": ["a"]}"#), @r#"`tags` is missing; the row has ["tokens"]"#);
        insta::assert_snapshot!(message(r#"{"tokens": "a", "tags": [1]}"#), @"`tokens` is a text; expected a list");
        insta::assert_snapshot!(message(r#"{"tokens": ["a", "b"], "tags": [1]}"#), @"`tokens` has 2 words and `tags` 1 classes");
        insta::assert_snapshot!(message(r#"{"tokens": ["a", 2], "tags": [1, 1]}"#), @"`tokens[1]` is a number; expected a text");
        insta::assert_snapshot!(message(r#"{"tokens": ["a", "b"], "tags": [1, null]}"#), @"`tags[1]` is null; expected the name of a class or its number");
        insta::assert_snapshot!(message(r#"{"tokens": [], "tags": []}"#), @"`tokens` is empty; expected words to train on");
    }
}
