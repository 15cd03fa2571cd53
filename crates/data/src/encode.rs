//! A row to tokens, with a mark on each token that is to be learned.
//!
//! Chat rows go through the template, instruction rows too where there is one. A prompt and its completion are tokenised as
//! one text, so that the tokens are those that the model will see; a token that reaches over the border belongs to the
//! prompt. Where no template writes an end, the end-of-text token is appended and learned: a model that is never taught to
//! stop does not stop.

use attune_points::layout::NO_LABEL;
use attune_spec::job::TooLong;

use crate::classes::{self, Classes, Labelled};
use crate::error::Error;
use crate::forms::{self, Conversation, Message, Record};
use crate::origin::{Reason, RowFault};
use crate::template::ChatTemplate;
use crate::tokenizer::{Tokenizer, Whole};

/// The built-in template that a job may name in place of its text.
const BUILT_IN_NAME_MAX: usize = 32;

/// Turns rows into tokens.
#[derive(Debug)]
pub struct Encoder {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    max_length: usize,
    too_long: TooLong,
    classes: Option<Classes>,
}

/// A row as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Which of them are to be learned, or have a class or a mark.
    pub trained: Vec<bool>,
    /// What has classes.
    pub classed: Option<Classed>,
    /// Whether the end was cut off.
    pub truncated: bool,
}

/// What a document has beside its tokens where there are classes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classed {
    /// The class of each row, [`attune_points::layout::NO_LABEL`] for those that have none.
    pub labels: Vec<u32>,
    /// Which of two texts each token belongs to.
    pub types: Vec<u32>,
}

impl Encoder {
    /// An encoder for documents of at most `max_length` tokens. `template` is a job's own: a built-in name such as `chatml`,
    /// or the text of a template; the model's is used when it is `None`.
    ///
    /// # Errors
    /// [`Error::Template`] if the template does not compile or the tokeniser lacks the tokens that it writes.
    pub fn new(
        tokenizer: Tokenizer,
        template: Option<&str>,
        max_length: u32,
        too_long: TooLong,
    ) -> Result<Self, Error> {
        let template = match template {
            None => tokenizer.chat_template()?,
            Some(name) if name.len() <= BUILT_IN_NAME_MAX && !name.contains('{') => {
                Some(ChatTemplate::built_in(name, tokenizer.specials())?)
            }
            Some(text) => Some(ChatTemplate::compile("data.template", text, tokenizer.specials())?),
        };
        Ok(Self { tokenizer, template, max_length: max_length as usize, too_long, classes: None })
    }

    /// The same for rows with the classes of a head, or for one that gives vectors.
    #[must_use]
    pub fn with_classes(self, classes: Option<Classes>) -> Self {
        Self { classes, ..self }
    }

    pub(crate) const fn max_length(&self) -> usize {
        self.max_length
    }

    /// The classes that rows have, if any.
    pub fn classes(&self) -> Option<&Classes> {
        self.classes.as_ref()
    }

    /// The tokeniser.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The chat template in use.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Tokens and marks of a row's documents: one, the two of a pair, or a query and its passages.
    pub(crate) fn encode(&self, record: &Record) -> Result<Vec<Encoded>, RowFault> {
        let encoded = match record {
            Record::Chat(conversation) => self.chat(conversation)?,
            Record::Instruction { instruction, input, output } => self.instruction(instruction, input, output)?,
            Record::PromptCompletion { prompt, completion } => self.continued(prompt, completion)?,
            Record::Text(text) => self.continued("", text)?,
            Record::Preference(pair) => {
                let sides = pair.iter().map(|side| self.encode(side)).collect::<Result<Vec<_>, _>>()?;
                return Ok(sides.into_iter().flatten().collect());
            }
            Record::Classified { text, pair, label } => {
                let classes = self.known()?;
                let number = classes.number(label)?;
                let whole = self.whole(|limit| self.tokenizer.whole(text, pair.as_deref(), limit))?;
                let labels = classes.on_document(number, whole.ids.len());
                return Ok(vec![classed(whole, labels)?]);
            }
            Record::Tagged { words, tags } => {
                let classes = self.known()?;
                let numbers = tags.iter().map(|tag| classes.number(tag)).collect::<Result<Vec<u32>, _>>()?;
                let whole = self.whole(|limit| self.tokenizer.worded(words, limit))?;
                let labels = classes::on_words(&numbers, &whole.words);
                return Ok(vec![classed(whole, labels)?]);
            }
            Record::Retrieved { query, passages } => return self.retrieved(query, passages),
        };
        Ok(vec![self.fitted(encoded)?])
    }

    /// A query, with its mark, and its passages, which have none.
    fn retrieved(&self, query: &str, passages: &[String]) -> Result<Vec<Encoded>, RowFault> {
        if self.classes.as_ref().is_none_or(|classes| classes.of != Labelled::Queries) {
            let message = "has a query, and nothing says that the model gives vectors: expected `tune.head`";
            return Err(RowFault::new(Reason::WrongType, message));
        }
        let document = |text: &str, is_query: bool| {
            let whole = self.whole(|limit| self.tokenizer.whole(text, None, limit))?;
            let Some(rest) = whole.ids.len().checked_sub(1) else {
                return Err(RowFault::new(Reason::EmptyText, format!("has a text without tokens: {text:?}")));
            };
            let mark = if is_query { classes::QUERY } else { NO_LABEL };
            let labels = std::iter::once(mark).chain(std::iter::repeat_n(NO_LABEL, rest)).collect();
            Ok(with_labels(whole, labels))
        };
        let query = std::iter::once(document(query, true));
        query.chain(passages.iter().map(|passage| document(passage, false))).collect()
    }

    /// The classes, which rows with a class need.
    fn known(&self) -> Result<&Classes, RowFault> {
        let message = "has a class, and nothing says which there are: expected `tune.head`";
        self.classes.as_ref().ok_or_else(|| RowFault::new(Reason::UnknownLabel, message))
    }

    /// A document with what surrounds it, of no more than the longest length.
    fn whole(&self, of: impl FnOnce(Option<usize>) -> Result<Whole, Error>) -> Result<Whole, RowFault> {
        let limit = (self.too_long == TooLong::Truncate).then_some(self.max_length);
        let whole = of(limit).map_err(|error| RowFault::new(Reason::Tokenizer, error.to_string()))?;
        if whole.ids.len() > self.max_length {
            return Err(too_long(whole.ids.len(), self.max_length));
        }
        Ok(whole)
    }

    /// A document of no more than the longest length that has something to learn.
    fn fitted(&self, mut encoded: Encoded) -> Result<Encoded, RowFault> {
        if encoded.ids.len() > self.max_length {
            let (length, limit) = (encoded.ids.len(), self.max_length);
            match self.too_long {
                TooLong::Refuse => return Err(too_long(length, limit)),
                TooLong::Truncate => {
                    encoded.ids.truncate(limit);
                    encoded.trained.truncate(limit);
                    encoded.truncated = true;
                }
            }
        }
        // The first token has nothing before it that could predict it.
        if !encoded.trained.iter().skip(1).any(|trained| *trained) {
            let why = if encoded.truncated { " in the first `data.max_length` of them" } else { "" };
            return Err(RowFault::new(Reason::NoTrainedToken, format!("no token of the row would be learned{why}")));
        }
        Ok(encoded)
    }

    fn chat(&self, conversation: &Conversation) -> Result<Encoded, RowFault> {
        let Some(template) = &self.template else {
            let message = "is a conversation, and the model has no chat template; give one by `data.template` (`chatml`, or its text)";
            return Err(RowFault::new(Reason::Template, message));
        };
        let rendered = template.render_training(conversation)?;
        let pieces = self.pieces(&rendered.text, false)?;
        let mut spans = rendered.spans.iter().peekable();
        let trained = pieces.iter().map(|piece| {
            while spans.next_if(|span| span.end <= piece.bytes.start).is_some() {}
            spans.peek().is_some_and(|span| span.start <= piece.bytes.start)
        });
        let trained = trained.collect();
        Ok(Encoded { ids: pieces.iter().map(|piece| piece.id).collect(), trained, classed: None, truncated: false })
    }

    fn instruction(&self, instruction: &str, input: &str, output: &str) -> Result<Encoded, RowFault> {
        if self.template.is_none() {
            return self.continued(&forms::alpaca_prompt(instruction, input), output);
        }
        let question = match input.trim() {
            "" => instruction.to_owned(),
            input => format!("{instruction}\n\n{input}"),
        };
        self.chat(&Conversation { messages: vec![Message::new("user", question), Message::new("assistant", output)] })
    }

    /// A prompt and what follows it, ended by the end-of-text token.
    fn continued(&self, prompt: &str, text: &str) -> Result<Encoded, RowFault> {
        let pieces = self.pieces(&format!("{prompt}{text}"), true)?;
        let mut ids: Vec<u32> = pieces.iter().map(|piece| piece.id).collect();
        let mut trained: Vec<bool> =
            pieces.iter().map(|piece| !piece.added && piece.bytes.start >= prompt.len()).collect();
        if let Some(eos) = self.tokenizer.eos().filter(|eos| ids.last() != Some(eos)) {
            ids.push(eos);
            trained.push(true);
        }
        Ok(Encoded { ids, trained, classed: None, truncated: false })
    }

    fn pieces(&self, text: &str, begin: bool) -> Result<Vec<crate::tokenizer::Piece>, RowFault> {
        self.tokenizer.pieces(text, begin).map_err(|error| RowFault::new(Reason::Tokenizer, error.to_string()))
    }
}

/// A document with the labels of its rows, of which one has to have some.
fn classed(whole: Whole, labels: Vec<u32>) -> Result<Encoded, RowFault> {
    if labels.iter().all(|label| *label == NO_LABEL) {
        let why = if whole.truncated { " in the first `data.max_length` of its tokens" } else { "" };
        let message = format!("no token of the row has a class{why}");
        return Err(RowFault::new(Reason::NoTrainedToken, message));
    }
    Ok(with_labels(whole, labels))
}

/// A document with the labels of its rows.
fn with_labels(Whole { ids, types, truncated, .. }: Whole, labels: Vec<u32>) -> Encoded {
    let trained = labels.iter().map(|label| *label != NO_LABEL).collect();
    Encoded { ids, trained, classed: Some(Classed { labels, types }), truncated }
}

fn too_long(length: usize, limit: usize) -> RowFault {
    let message = format!("has {length} tokens; `data.max_length` is {limit} (`too_long: truncate` cuts it)");
    RowFault::new(Reason::TooLong, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::byte_level;

    const SPECIALS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

    fn encoder(template: Option<&str>, max_length: u32, too_long: TooLong) -> Encoder {
        Encoder::new(byte_level(&SPECIALS), template, max_length, too_long).unwrap()
    }

    /// The text of the learned tokens.
    fn learned(encoder: &Encoder, record: &Record) -> String {
        let encoded = encoder.encode(record).unwrap().remove(0);
        let ids: Vec<u32> =
            encoded.ids.iter().zip(&encoded.trained).filter(|(_, trained)| **trained).map(|(id, _)| *id).collect();
        encoder.tokenizer().decode(&ids, true).unwrap()
    }

    fn chat() -> Record {
        let turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "So long")];
        Record::Chat(Conversation { messages: turns.map(|(role, text)| Message::new(role, text)).to_vec() })
    }

    #[test]
    fn only_the_assistants_turns_and_their_ends_are_learned() {
        let encoder = encoder(Some("chatml"), 512, TooLong::Truncate);
        assert_eq!(learned(&encoder, &chat()), "Hello!<|im_end|>So long<|im_end|>");
        let row =
            Record::Instruction { instruction: "Add".to_owned(), input: "1 2".to_owned(), output: "3".to_owned() };
        assert_eq!(learned(&encoder, &row), "3<|im_end|>");
    }

    #[test]
    fn a_completion_and_a_text_end_with_the_end_of_text() {
        let encoder = encoder(None, 512, TooLong::Truncate);
        let row = Record::PromptCompletion { prompt: "2+2=".to_owned(), completion: "4".to_owned() };
        assert_eq!(learned(&encoder, &row), "4<|endoftext|>");
        assert_eq!(learned(&encoder, &Record::Text("abc".to_owned())), "abc<|endoftext|>");
        let row = Record::Instruction { instruction: "Add".to_owned(), input: String::new(), output: "3".to_owned() };
        assert_eq!(learned(&encoder, &row), "3<|endoftext|>");
    }

    #[test]
    fn a_chat_without_a_template_says_what_to_do() {
        let fault = encoder(None, 512, TooLong::Truncate).encode(&chat()).unwrap_err();
        assert!(fault.message.contains("give one by `data.template`"), "{}", fault.message);
    }

    #[test]
    fn long_rows_are_cut_or_refused_as_asked() {
        let text = Record::Text("abcdefgh".to_owned());
        let cut = encoder(None, 4, TooLong::Truncate).encode(&text).unwrap().remove(0);
        assert_eq!((cut.ids.len(), cut.truncated), (4, true));
        let fault = encoder(None, 4, TooLong::Refuse).encode(&text).unwrap_err();
        assert_eq!(fault.message, "has 9 tokens; `data.max_length` is 4 (`too_long: truncate` cuts it)");
        let row = Record::PromptCompletion { prompt: "a long prompt".to_owned(), completion: "4".to_owned() };
        let fault = encoder(None, 8, TooLong::Truncate).encode(&row).unwrap_err();
        assert_eq!(fault.message, "no token of the row would be learned in the first `data.max_length` of them");
    }

    #[test]
    fn a_template_is_named_or_written_out() {
        let written = "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}";
        assert_eq!(
            learned(&encoder(Some(written), 512, TooLong::Refuse), &chat()),
            "Hello!<|endoftext|>So long<|endoftext|>"
        );
        let error = Encoder::new(byte_level(&SPECIALS), Some("chatlm"), 512, TooLong::Refuse).unwrap_err();
        assert!(error.to_string().contains("chatlm"), "{error}");
    }
}
