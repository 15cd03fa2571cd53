//! Prompt and completion: `{"prompt": …, "completion": …}`, joined as they stand; the completion is trained, and the end
//! of the text with it.

use serde_json::{Map, Value};

use super::{Record, filled_text_of, text_of};
use crate::origin::RowFault;

pub(super) fn read(fields: &Map<String, Value>) -> Result<Record, RowFault> {
    Ok(Record::PromptCompletion {
        prompt: text_of(fields, "prompt")?.to_owned(),
        completion: filled_text_of(fields, "completion")?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::fields;
    use super::*;

    #[test]
    fn an_empty_prompt_is_fine_and_an_empty_completion_is_not() {
        let record = read(&fields(r#"{"prompt": "", "completion": " b"}"#)).unwrap();
        assert_eq!(record, Record::PromptCompletion { prompt: String::new(), completion: " b".to_owned() });
        let message = |json: &str| read(&fields(json)).unwrap_err().message;
        insta::assert_snapshot!(message(r#"{"prompt": "a", "completion": ""}"#), @"`completion` is empty; expected the text to train on");
        insta::assert_snapshot!(message(r#"{"prompt": null, "completion": "b"}"#), @"`prompt` is null; expected a text");
    }
}
