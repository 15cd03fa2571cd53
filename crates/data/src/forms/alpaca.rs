//! Alpaca: `{"instruction": …, "input": …, "output": …}`; `input` may be empty or left out, `output` is trained.

use serde_json::{Map, Value};

use super::{Record, filled_text_of, text_of};
use crate::origin::RowFault;

pub(super) fn read(fields: &Map<String, Value>) -> Result<Record, RowFault> {
    let input = match fields.get("input") {
        None | Some(Value::Null) => "",
        Some(_) => text_of(fields, "input")?,
    };
    Ok(Record::Instruction {
        instruction: filled_text_of(fields, "instruction")?.to_owned(),
        input: input.to_owned(),
        output: filled_text_of(fields, "output")?.to_owned(),
    })
}

/// The prompt of the Alpaca project, for models without a chat template.
pub(crate) fn prompt(instruction: &str, input: &str) -> String {
    let instruction = instruction.trim();
    match input.trim() {
        "" => format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the \
             request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        ),
        input => format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
             response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### \
             Input:\n{input}\n\n### Response:\n"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fields;
    use super::*;

    #[test]
    fn input_may_be_missing_null_or_empty() {
        for input in ["", r#", "input": null"#, r#", "input": """#] {
            let record = read(&fields(&format!(r#"{{"instruction": "a", "output": "b"{input}}}"#))).unwrap();
            let expected =
                Record::Instruction { instruction: "a".to_owned(), input: String::new(), output: "b".to_owned() };
            assert_eq!(record, expected);
        }
        let message = read(&fields(r#"{"instruction": "a", "input": 3, "output": "b"}"#)).unwrap_err().message;
        assert_eq!(message, "`input` is a number; expected a text");
    }

    #[test]
    fn the_prompt_is_that_of_the_alpaca_project() {
        insta::assert_snapshot!(prompt("Translate.", "cat"), @r"
        Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.

        ### Instruction:
        Translate.

        ### Input:
        cat

        ### Response:
        ");
    }
}
