//! Plain text: `{"text": …}`; every token is trained, and the end of the text with it.

use serde_json::{Map, Value};

use super::{Record, filled_text_of};
use crate::origin::RowFault;

pub(super) fn read(fields: &Map<String, Value>) -> Result<Record, RowFault> {
    Ok(Record::Text(filled_text_of(fields, "text")?.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::super::fields;
    use super::*;

    #[test]
    fn text_is_taken_as_it_stands() {
        assert_eq!(read(&fields(r#"{"text": " a\n"}"#)).unwrap(), Record::Text(" a\n".to_owned()));
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let message = |json: &str| read(&fields(json)).unwrap_err().message;
        insta::assert_snapshot!(message(r#"{"text": " \n"}"#), @"`text` is empty; expected the text to train on");
        insta::assert_snapshot!(message(r#"{"text": ["a"]}"#), @"`text` is a list; expected a text");
        insta::assert_snapshot!(message(r#"{"Text": "a"}"#), @r#"`text` is missing; the row has ["Text"]"#);
    }
}
