//! Forms of training rows: which columns a row has and what they mean.
//!
//! The form is one decision per file, taken from the first row's columns or from `form:` in the job file, and then holds
//! for every row.

mod alpaca;
mod chat;
mod classification;
mod preference;
mod prompt_completion;
mod retrieval;
mod text;
mod token_classification;

use std::fmt;

use attune_spec::job::Form;
use serde_json::{Map, Value};

pub(crate) use alpaca::prompt as alpaca_prompt;
pub(crate) use chat::ASSISTANT;
pub use chat::{Conversation, Message};

use crate::classes::Labelled;
use crate::origin::{Reason, RowFault};
use crate::readers::kind;

/// What a row says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Record {
    /// A conversation, for the chat template.
    Chat(Conversation),
    /// An instruction with its answer: a two-turn conversation where there is a chat template, else Alpaca's own prompt.
    Instruction {
        /// What to do.
        instruction: String,
        /// On what; may be empty.
        input: String,
        /// The answer.
        output: String,
    },
    /// A prompt and its continuation, joined as they stand.
    PromptCompletion {
        /// Not trained.
        prompt: String,
        /// Trained.
        completion: String,
    },
    /// Plain text.
    Text(String),
    /// Two answers to one prompt: the better one and the other, each with the prompt before it.
    Preference(Box<[Self; 2]>),
    /// A text, or two that are looked at together, and their class.
    Classified {
        /// The text.
        text: String,
        /// The second one.
        pair: Option<String>,
        /// Their class.
        label: Label,
    },
    /// Words, and the class of each.
    Tagged {
        /// The words.
        words: Vec<String>,
        /// As many classes.
        tags: Vec<Label>,
    },
    /// A text, and others that belong to it or look like it.
    Retrieved {
        /// The text.
        query: String,
        /// What belongs to it, then what does not.
        passages: Vec<String>,
    },
}

/// A class as a row has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Label {
    /// By its name.
    Name(String),
    /// By its number.
    Number(u64),
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "{name:?}"),
            Self::Number(number) => write!(f, "{number}"),
        }
    }
}

/// The class in a field, which messages call `path`.
fn label(path: &str, value: &Value) -> Result<Label, RowFault> {
    let number = value.as_u64().map(Label::Number);
    // Whole numbers of columns that have fractions.
    let whole = || {
        value.as_f64().filter(|number| number.fract() == 0.0 && (0.0..1e9).contains(number)).map(|number| number as u64)
    };
    match value {
        Value::String(name) => Ok(Label::Name(name.clone())),
        Value::Bool(flag) => Ok(Label::Number(u64::from(*flag))),
        value => number.or_else(|| whole().map(Label::Number)).ok_or_else(|| {
            let found = if value.is_number() { value.to_string() } else { kind(value).to_owned() };
            let message = format!("`{path}` is {found}; expected the name of a class or its number");
            RowFault::new(Reason::WrongType, message)
        }),
    }
}

/// All forms of texts to be learned, in the order in which they are listed to people.
const ALL: [Form; 5] = [Form::Chat, Form::PromptCompletion, Form::Alpaca, Form::Text, Form::Preference];

/// The columns without which a row is not of a form.
const fn columns(form: Form) -> &'static [&'static str] {
    match form {
        Form::Chat => &["messages"],
        Form::PromptCompletion => &["prompt", "completion"],
        Form::Alpaca => &["instruction", "output"],
        Form::Text => &["text"],
        Form::Preference => &["chosen", "rejected"],
        Form::Classification => &["text", "label"],
        Form::TokenClassification => &["tokens"],
        Form::Retrieval => &["positive"],
    }
}

/// The form of rows for a head that has classes or gives vectors, whose columns have to be there. Fails with words to follow "the
/// columns".
pub(crate) fn of_head(of: Labelled, fields: &Map<String, Value>) -> Result<Form, String> {
    let (form, expected, fits) = match of {
        Labelled::Queries => {
            let expected = "`query` (or `anchor`) + `positive`, with `negative` where there are such";
            (Form::Retrieval, expected, retrieval::fits(fields))
        }
        Labelled::Words => (Form::TokenClassification, "`tokens` + `tags`", token_classification::fits(fields)),
        Labelled::First | Labelled::Last => {
            let fits = columns(Form::Classification).iter().all(|column| fields.contains_key(*column));
            (Form::Classification, "`text` + `label`, with `text_pair` where two texts belong together", fits)
        }
    };
    let names: Vec<&str> = fields.keys().map(String::as_str).collect();
    let what = if of == Labelled::Queries { "what belongs together" } else { "classes" };
    if fits { Ok(form) } else { Err(format!("{names:?} are not those of {what}; expected {expected}")) }
}

/// The one form whose columns are all there. Fails with words to follow "the columns", when none fits or several do.
pub(crate) fn recognise(fields: &Map<String, Value>) -> Result<Form, String> {
    let fits = |form: &Form| columns(*form).iter().all(|column| fields.contains_key(*column));
    let found: Vec<Form> = ALL.into_iter().filter(fits).collect();
    match found.as_slice() {
        [form] => Ok(*form),
        [] => {
            let names: Vec<&str> = fields.keys().map(String::as_str).collect();
            let known =
                "`messages`, `prompt` + `completion`, `instruction` + `output`, `text`, or `chosen` + `rejected`";
            Err(format!("{names:?} are no known form; expected {known}"))
        }
        many => {
            let names: Vec<&str> = many.iter().map(|form| form.name()).collect();
            Err(format!("fit the forms {}; say which by `form:`", names.join(" and ")))
        }
    }
}

/// Reads a row in a form.
pub(crate) fn read(form: Form, fields: &Map<String, Value>) -> Result<Record, RowFault> {
    match form {
        Form::Chat => chat::read(fields),
        Form::PromptCompletion => prompt_completion::read(fields),
        Form::Alpaca => alpaca::read(fields),
        Form::Text => text::read(fields),
        Form::Preference => preference::read(fields),
        Form::Classification => classification::read(fields),
        Form::TokenClassification => token_classification::read(fields),
        Form::Retrieval => retrieval::read(fields),
    }
}

/// The text in a column that must be there.
fn text_of<'a>(fields: &'a Map<String, Value>, column: &str) -> Result<&'a str, RowFault> {
    match fields.get(column) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => {
            let message = format!("`{column}` is {}; expected a text", kind(other));
            Err(RowFault::new(Reason::WrongType, message))
        }
        None => {
            let names: Vec<&str> = fields.keys().map(String::as_str).collect();
            let message = format!("`{column}` is missing; the row has {names:?}");
            Err(RowFault::new(Reason::MissingField, message))
        }
    }
}

/// The same, and it must say something.
fn filled_text_of<'a>(fields: &'a Map<String, Value>, column: &str) -> Result<&'a str, RowFault> {
    let text = text_of(fields, column)?;
    if text.trim().is_empty() {
        return Err(RowFault::new(Reason::EmptyText, format!("`{column}` is empty; expected the text to train on")));
    }
    Ok(text)
}

#[cfg(test)]
pub(crate) fn fields(json: &str) -> Map<String, Value> {
    serde_json::from_str(json).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_is_recognised_by_its_columns_or_refused_with_what_is_expected() {
        for (row, form) in [
            (r#"{"messages": [], "domain": "x"}"#, Form::Chat),
            (r#"{"completion": "", "prompt": ""}"#, Form::PromptCompletion),
            (r#"{"instruction": "", "input": "", "output": ""}"#, Form::Alpaca),
            (r#"{"text": "", "label": ""}"#, Form::Text),
            (r#"{"prompt": "", "chosen": "", "rejected": ""}"#, Form::Preference),
        ] {
            assert_eq!(recognise(&fields(row)), Ok(form));
            assert_eq!(serde_json::to_value(form).unwrap(), form.name());
        }
        insta::assert_snapshot!(recognise(&fields(r#"{"messages": [], "text": ""}"#)).unwrap_err(), @"fit the forms chat and text; say which by `form:`");
        insta::assert_snapshot!(recognise(&fields(r#"{"conversations": []}"#)).unwrap_err(), @r#"["conversations"] are no known form; expected `messages`, `prompt` + `completion`, `instruction` + `output`, `text`, or `chosen` + `rejected`"#);
    }
}
