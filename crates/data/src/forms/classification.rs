//! A text and its class: `{"text": …, "label": …}`, where one text is compared with another also `text_pair`.

use serde_json::{Map, Value};

use super::{Label, Record, filled_text_of, label, text_of};
use crate::origin::{Reason, RowFault};

pub(super) fn read(fields: &Map<String, Value>) -> Result<Record, RowFault> {
    let pair = match fields.get("text_pair") {
        None | Some(Value::Null) => None,
        Some(_) => Some(text_of(fields, "text_pair")?.to_owned()),
    };
    let missing = || {
        let names: Vec<&str> = fields.keys().map(String::as_str).collect();
        RowFault::new(Reason::MissingField, format!("`label` is missing; the row has {names:?}"))
    };
    let label: Label = label("label", fields.get("label").ok_or_else(missing)?)?;
    Ok(Record::Classified { text: filled_text_of(fields, "text")?.to_owned(), pair, label })
}

#[cfg(test)]
mod tests {
    use super::super::fields;
    use super::*;

    #[test]
    fn a_text_may_have_another_beside_it() {
        let record = read(&fields(r#"{"text": "a", "label": 1}"#)).unwrap();
        assert_eq!(record, Record::Classified { text: "a".to_owned(), pair: None, label: Label::Number(1) });
        let record = read(&fields(r#"{"text": "a", "text_pair": "", "label": "x"}"#)).unwrap();
        let label = Label::Name("x".to_owned());
        assert_eq!(record, Record::Classified { text: "a".to_owned(), pair: Some(String::new()), label });
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let message = |json: &str| read(&fields(json)).unwrap_err().message;
        insta::assert_snapshot!(message(r#"{"text": "a"}"#), @r#"`label` is missing; the row has ["text"]"#);
        insta::assert_snapshot!(message(r#"{"text": "a", "label": 0.5}"#), @"`label` is 0.5; expected the name of a class or its number");
        insta::assert_snapshot!(message(r#"{"text": "a", "label": -1}"#), @"`label` is -1; expected the name of a class or its number");
        insta::assert_snapshot!(message(r#"{"text": "", "label": 1}"#), @"`text` is empty; expected the text to train on");
    }
}
