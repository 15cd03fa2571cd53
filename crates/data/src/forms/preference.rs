//! Preference: `{"prompt": …, "chosen": …, "rejected": …}`, texts or lists of messages; `prompt` may be left out.
//!
//! Texts are joined as they stand. Of messages the answers are what follows the turns that both sides have in common; only
//! there the assistant's turns are compared.

use serde_json::{Map, Value};

use super::chat::{Conversation, Message, messages};
use super::{Record, filled_text_of, text_of};
use crate::origin::{Reason, RowFault};

pub(super) fn read(fields: &Map<String, Value>) -> Result<Record, RowFault> {
    let is_chat = |column: &str| matches!(fields.get(column), Some(Value::Array(_)));
    let has_prompt = fields.get("prompt").is_some_and(|prompt| !prompt.is_null());
    let pair = if is_chat("chosen") || is_chat("rejected") {
        let prompt = if has_prompt { messages(fields, "prompt")? } else { Vec::new() };
        let side = |column: &str| Ok([prompt.clone(), messages(fields, column)?].concat());
        chats(side("chosen")?, side("rejected")?)?
    } else {
        let prompt = if has_prompt { text_of(fields, "prompt")? } else { "" };
        let side = |column: &str| {
            let completion = filled_text_of(fields, column)?.to_owned();
            Ok::<_, RowFault>(Record::PromptCompletion { prompt: prompt.to_owned(), completion })
        };
        [side("chosen")?, side("rejected")?]
    };
    if pair[0] == pair[1] {
        let message = "`chosen` and `rejected` are the same; expected two answers";
        return Err(RowFault::new(Reason::NoTrainedToken, message));
    }
    Ok(Record::Preference(Box::new(pair)))
}

fn chats(chosen: Vec<Message>, rejected: Vec<Message>) -> Result<[Record; 2], RowFault> {
    let common = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
    let answered = |column: &str, mut messages: Vec<Message>| {
        messages.iter_mut().take(common).for_each(|message| message.trained = false);
        if messages.iter().any(|message| message.trained) {
            return Ok(Record::Chat(Conversation { messages }));
        }
        let message = format!("`{column}` has no turn of the assistant after what both answers have in common");
        Err(RowFault::new(Reason::NoTrainedToken, message))
    };
    Ok([answered("chosen", chosen)?, answered("rejected", rejected)?])
}

#[cfg(test)]
mod tests {
    use super::super::fields;
    use super::*;

    #[test]
    fn texts_are_joined_to_their_prompt() {
        let record = read(&fields(r#"{"prompt": "2+2=", "chosen": "4", "rejected": "5"}"#)).unwrap();
        let side = |completion: &str| Record::PromptCompletion {
            prompt: "2+2=".to_owned(),
            completion: completion.to_owned(),
        };
        assert_eq!(record, Record::Preference(Box::new([side("4"), side("5")])));
        assert!(read(&fields(r#"{"chosen": "4", "rejected": "5"}"#)).is_ok());
    }

    #[test]
    fn of_messages_only_what_differs_is_compared() {
        let json = r#"{"prompt": [{"role": "user", "content": "a"}],
            "chosen": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}],
            "rejected": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "e"}]}"#;
        let Record::Preference(pair) = read(&fields(json)).unwrap() else { panic!("no pair") };
        for record in *pair {
            let Record::Chat(conversation) = record else { panic!("no chat") };
            let trained: Vec<bool> = conversation.messages.iter().map(|message| message.trained).collect();
            assert_eq!(trained, [false, false, false, true]);
        }
    }

    #[test]
    fn what_cannot_be_compared_is_said() {
        let message = |json: &str| read(&fields(json)).unwrap_err().message;
        insta::assert_snapshot!(message(r#"{"prompt": "a", "chosen": "b", "rejected": "b"}"#), @"`chosen` and `rejected` are the same; expected two answers");
        insta::assert_snapshot!(message(r#"{"prompt": "a", "chosen": "b", "rejected": ""}"#), @"`rejected` is empty; expected the text to train on");
        insta::assert_snapshot!(message(r#"{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}"#), @"`chosen` has no turn of the assistant after what both answers have in common");
        insta::assert_snapshot!(message(r#"{"chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}"#), @"`rejected` is a text that is not a JSON list: expected value at line 1 column 1");
    }
}
