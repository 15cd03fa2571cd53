//! Chat: `{"messages": [{"role": …, "content": …}, …]}`; the assistant's turns are trained.
//!
//! A message may carry `"weight": 0` (as in OpenAI's fine-tuning files) to leave an assistant's turn out of the loss.

use serde_json::{Map, Value};

use super::Record;
use crate::origin::{Reason, RowFault};
use crate::readers::kind;

/// One turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What is said.
    pub content: String,
    /// Whether the turn is trained on; only an assistant's turn ever is.
    pub trained: bool,
}

impl Message {
    /// A turn; an assistant's is trained on.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let role = role.into();
        let trained = role == ASSISTANT;
        Self { role, content: content.into(), trained }
    }
}

/// Turns in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conversation {
    /// The turns.
    pub messages: Vec<Message>,
}

/// The role whose turns are trained on.
pub(crate) const ASSISTANT: &str = "assistant";

const ROLES: [&str; 5] = ["system", "developer", "user", ASSISTANT, "tool"];

pub(super) fn read(fields: &Map<String, Value>) -> Result<Record, RowFault> {
    let messages = messages(fields, "messages")?;
    if !messages.iter().any(|message| message.trained) {
        let roles: Vec<&str> = messages.iter().map(|message| message.role.as_str()).collect();
        let message = format!("no turn of the assistant is to be trained on; the roles are {roles:?}");
        return Err(RowFault::new(Reason::NoTrainedToken, message));
    }
    Ok(Record::Chat(Conversation { messages }))
}

/// The turns in a column that must be there.
pub(super) fn messages(fields: &Map<String, Value>, column: &str) -> Result<Vec<Message>, RowFault> {
    let parsed;
    let messages = match fields.get(column) {
        Some(Value::Array(messages)) => messages,
        // A CSV cell holds the list as JSON.
        Some(Value::String(text)) => {
            parsed = serde_json::from_str::<Vec<Value>>(text).map_err(|e| {
                RowFault::new(Reason::WrongType, format!("`{column}` is a text that is not a JSON list: {e}"))
            })?;
            &parsed
        }
        Some(other) => {
            let message = format!("`{column}` is {}; expected a list of {{role, content}}", kind(other));
            return Err(RowFault::new(Reason::WrongType, message));
        }
        None => {
            let names: Vec<&str> = fields.keys().map(String::as_str).collect();
            return Err(RowFault::new(Reason::MissingField, format!("`{column}` is missing; the row has {names:?}")));
        }
    };
    if messages.is_empty() {
        let message = format!("`{column}` is empty; expected at least one turn of the assistant");
        return Err(RowFault::new(Reason::EmptyText, message));
    }
    messages.iter().enumerate().map(|(index, value)| message(column, index, value)).collect()
}

fn message(column: &str, index: usize, value: &Value) -> Result<Message, RowFault> {
    let Value::Object(fields) = value else {
        let message = format!("`{column}[{index}]` is {}; expected an object {{role, content}}", kind(value));
        return Err(RowFault::new(Reason::WrongType, message));
    };
    let text = |field: &str| match fields.get(field) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => {
            let message = format!("`{column}[{index}].{field}` is {}; expected a text", kind(other));
            Err(RowFault::new(Reason::WrongType, message))
        }
        None => {
            let names: Vec<&str> = fields.keys().map(String::as_str).collect();
            let message = format!("`{column}[{index}].{field}` is missing; the message has {names:?}");
            Err(RowFault::new(Reason::MissingField, message))
        }
    };
    let role = text("role")?;
    if !ROLES.contains(&role.as_str()) {
        let hint = match role.as_str() {
            "human" => "; did you mean \"user\"?".to_owned(),
            "gpt" | "model" | "bot" => "; did you mean \"assistant\"?".to_owned(),
            other => attune_spec::suggest::hint(other, ROLES),
        };
        let message = format!("`{column}[{index}].role` is {role:?}; expected one of {}{hint}", ROLES.join(", "));
        return Err(RowFault::new(Reason::UnknownRole, message));
    }
    let content = text("content")?;
    let assistant = role == ASSISTANT;
    if assistant && content.trim().is_empty() {
        let message = format!("`{column}[{index}].content` is empty; expected the assistant's answer");
        return Err(RowFault::new(Reason::EmptyText, message));
    }
    let trained = match fields.get("weight") {
        None | Some(Value::Null) => assistant,
        Some(weight) => match weight.as_f64() {
            Some(1.0) => assistant,
            Some(0.0) => false,
            _ => {
                let message = format!("`{column}[{index}].weight` is {weight}; expected 0 or 1");
                return Err(RowFault::new(Reason::WrongType, message));
            }
        },
    };
    Ok(Message { role: role.clone(), content: content.clone(), trained })
}

#[cfg(test)]
mod tests {
    use super::super::fields;
    use super::*;

    #[test]
    fn turns_are_read_and_a_weight_of_zero_leaves_one_out() {
        let json = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}"#;
        let Record::Chat(conversation) = read(&fields(json)).unwrap() else { panic!("not a chat") };
        let trained: Vec<bool> = conversation.messages.iter().map(|message| message.trained).collect();
        assert_eq!(trained, [false, false, false, true]);
    }

    #[test]
    fn a_csv_cell_holds_the_list_as_json() {
        let cell = r#"[{"role": "assistant", "content": "b"}]"#;
        let row = Map::from_iter([("messages".to_owned(), Value::from(cell))]);
        assert!(matches!(read(&row), Ok(Record::Chat(_))));
        let row = Map::from_iter([("messages".to_owned(), Value::from("hello"))]);
        assert!(read(&row).unwrap_err().message.starts_with("`messages` is a text that is not a JSON list"));
    }

    #[test]
    fn what_does_not_fit_is_said_with_its_path() {
        let message = |json: &str| read(&fields(json)).unwrap_err().message;
        insta::assert_snapshot!(message(r#"{"messages": {}}"#), @"`messages` is an object; expected a list of {role, content}");
        insta::assert_snapshot!(message(r#"{"messages": []}"#), @"`messages` is empty; expected at least one turn of the assistant");
        insta::assert_snapshot!(message(r#"{"messages": ["a"]}"#), @"`messages[0]` is a text; expected an object {role, content}");
        insta::assert_snapshot!(message(r#"{"messages": [{"from": "human"}]}"#), @r#"`messages[0].role` is missing; the message has ["from"]"#);
        insta::assert_snapshot!(message(r#"{"messages": [{"role": "human", "content": ""}]}"#), @r#"`messages[0].role` is "human"; expected one of system, developer, user, assistant, tool; did you mean "user"?"#);
        insta::assert_snapshot!(message(r#"{"messages": [{"role": "assistent", "content": "a"}]}"#), @r#"`messages[0].role` is "assistent"; expected one of system, developer, user, assistant, tool; did you mean "assistant"?"#);
        insta::assert_snapshot!(message(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}"#), @"`messages[1].content` is null; expected a text");
        insta::assert_snapshot!(message(r#"{"messages": [{"role": "assistant", "content": " "}]}"#), @"`messages[0].content` is empty; expected the assistant's answer");
        insta::assert_snapshot!(message(r#"{"messages": [{"role": "user", "content": "a"}]}"#), @r#"no turn of the assistant is to be trained on; the roles are ["user"]"#);
        insta::assert_snapshot!(message(r#"{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}"#), @"`messages[0].weight` is 0.5; expected 0 or 1");
    }
}
