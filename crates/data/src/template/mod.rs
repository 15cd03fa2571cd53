//! Chat templates: a conversation to the text that the model reads, with the spans of that text which it should learn to
//! write.
//!
//! **Spans come from one rendering.** A template that marks the assistant's text itself (`{% generation %}`) is believed.
//! For any other, each assistant's text is put between two marker characters that occur nowhere else, the conversation is
//! rendered once, and the markers are taken out again; where they stood are the spans. The result must then equal the
//! rendering without markers, byte for byte, or the row is refused: a template that cuts the assistant's text up cannot
//! be followed. Prefixes are never rendered on their own.
//!
//! **The end of a turn is trained.** A span goes on through the first special token after the assistant's text; a last
//! turn that has none gets the end-of-text token.

mod environment;
mod generation;
mod spans;

use std::collections::BTreeMap;
use std::ops::Range;

use minijinja::{Environment, Value, context};

use crate::error::Error;
use crate::forms::{ASSISTANT, Conversation, Message};
use crate::origin::{Reason, RowFault};
use crate::tokenizer::Specials;

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    place: String,
    environment: Environment<'static>,
    source: String,
    marks_generation: bool,
    specials: Specials,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// What the model reads.
    pub text: String,
    /// The byte ranges of `text` that the model should learn to write; in order, not overlapping.
    pub spans: Vec<Range<usize>>,
}

/// The templates that a job file can name, with the special tokens that each needs.
const BUILT_IN: [(&str, &str, &[&str]); 1] = [(
    "chatml",
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' \
     }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    &["<|im_start|>", "<|im_end|>"],
)];

impl ChatTemplate {
    /// Compiles a template; `place` is the file it stands in, for messages.
    ///
    /// # Errors
    /// [`Error::Template`] with the line.
    pub fn compile(place: &str, source: &str, specials: &Specials) -> Result<Self, Error> {
        let (rewritten, blocks) = generation::rewrite(source);
        let environment = environment::compile(rewritten)
            .map_err(|e| Error::Template { place: place.to_owned(), message: environment::describe(&e) })?;
        Ok(Self {
            place: place.to_owned(),
            environment,
            source: source.to_owned(),
            marks_generation: blocks > 0,
            specials: specials.clone(),
        })
    }

    /// The template that a job file names.
    ///
    /// # Errors
    /// [`Error::Template`] for an unknown name or a tokeniser without the tokens that the template writes.
    pub fn built_in(name: &str, specials: &Specials) -> Result<Self, Error> {
        let error = |message: String| Error::Template { place: format!("{name:?}"), message };
        let names = BUILT_IN.map(|(name, _, _)| name);
        let Some((_, source, needs)) = BUILT_IN.iter().find(|(known, _, _)| *known == name) else {
            let hint = attune_spec::suggest::hint(name, names);
            return Err(error(format!("there is no such built-in template; expected {}{hint}", names.join(", "))));
        };
        if let Some(token) = needs.iter().find(|token| !specials.special.iter().any(|special| special == *token)) {
            return Err(error(format!("needs the token {token:?}, which the tokenizer does not have")));
        }
        Self::compile(name, source, specials)
    }

    /// The file or name that the template comes from.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// The template's source, for a model folder that is written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text that the model continues with the assistant's next turn.
    ///
    /// # Errors
    /// [`Error::Template`] when the template refuses the conversation.
    pub fn prompt(&self, messages: &[Message]) -> Result<String, Error> {
        let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
        self.render(messages, &contents, true, ("", ""))
            .map_err(|fault| Error::Template { place: self.place.clone(), message: fault.message })
    }

    /// Renders a training conversation with the spans to learn.
    pub(crate) fn render_training(&self, conversation: &Conversation) -> Result<Rendered, RowFault> {
        let messages = &conversation.messages;
        let mut rendered =
            if self.marks_generation { self.native_spans(messages) } else { self.tracked_spans(messages) }?;
        spans::through_end_of_turn(&mut rendered, &self.specials, self.marks_generation)
            .map_err(|words| self.fault(words))?;
        // Turns that the row itself takes out of the loss.
        let mut turns = messages.iter().filter(|message| message.role == ASSISTANT);
        rendered.spans.retain(|span| turns.next().is_none_or(|message| message.trained) && !span.is_empty());
        Ok(rendered)
    }

    /// The text that ends an assistant's turn, if the template writes one: the first special token after the content.
    pub fn end_of_turn(&self) -> Option<String> {
        let messages = vec![Message::new("user", "a"), Message::new("assistant", "b")];
        let rendered = self.render_training(&Conversation { messages }).ok()?;
        let last = rendered.text.get(rendered.spans.last()?.clone())?;
        self.specials
            .special
            .iter()
            .filter(|token| last.ends_with(token.as_str()))
            .max_by_key(|token| token.len())
            .cloned()
    }

    /// Spans as the template's own `{% generation %}` blocks say.
    fn native_spans(&self, messages: &[Message]) -> Result<Rendered, RowFault> {
        let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
        let (start, end) = spans::markers(&self.source, &contents);
        let marked = self.render(messages, &contents, false, (&start.to_string(), &end.to_string()))?;
        let rendered = spans::take_out(&marked, start, end)
            .ok_or_else(|| self.fault("its {% generation %} blocks are not closed in order"))?;
        let turns = messages.iter().filter(|message| message.role == ASSISTANT).count();
        if rendered.spans.len() != turns {
            let spans = rendered.spans.len();
            return Err(
                self.fault(&format!("it marks {spans} spans as generated; the row has {turns} assistant turns"))
            );
        }
        Ok(rendered)
    }

    /// Spans by markers around each assistant's text.
    fn tracked_spans(&self, messages: &[Message]) -> Result<Rendered, RowFault> {
        let plain: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
        let (start, end) = spans::markers(&self.source, &plain);
        // Templates often trim. The markers go inside the white space at both ends, so that trimming finds it.
        let marked: Vec<String> = messages
            .iter()
            .map(|message| match message.role.as_str() {
                ASSISTANT => spans::mark(&message.content, start, end),
                _ => message.content.clone(),
            })
            .collect();
        let marked: Vec<&str> = marked.iter().map(String::as_str).collect();
        let marked = self.render(messages, &marked, false, ("", ""))?;
        let text = self.render(messages, &plain, false, ("", ""))?;
        let turns: Vec<&str> = messages.iter().filter(|m| m.role == ASSISTANT).map(|m| m.content.as_str()).collect();
        let rendered = spans::take_out(&marked, start, end)
            .filter(|rendered| rendered.text == text && rendered.spans.len() == turns.len());
        let Some(mut rendered) = rendered else {
            return Err(self.fault(
                "it does not write the assistant's text as it stands, so that its place cannot be tracked; mark it in the \
                 template by {% generation %}, or name another by `template: chatml`",
            ));
        };
        let trimmed = |left: bool, right: bool| {
            let cut: Vec<&str> = messages
                .iter()
                .map(|message| match message.content.as_str() {
                    text if message.role != ASSISTANT => text,
                    text if left => text.trim_start(),
                    text if right => text.trim_end(),
                    text => text,
                })
                .collect();
            self.render(messages, &cut, false, ("", "")).map(|cut| text.len().saturating_sub(cut.len()))
        };
        let leading: usize = turns.iter().map(|turn| turn.len() - turn.trim_start().len()).sum();
        let trailing: usize = turns.iter().map(|turn| turn.len() - turn.trim_end().len()).sum();
        // White space that the template kept belongs to the assistant's text.
        let keeps_leading = leading > 0 && trimmed(true, false)? == leading;
        let keeps_trailing = trailing > 0 && trimmed(false, true)? == trailing;
        for (span, turn) in rendered.spans.iter_mut().zip(&turns) {
            if keeps_leading {
                span.start -= turn.len() - turn.trim_start().len();
            }
            if keeps_trailing {
                span.end += turn.len() - turn.trim_end().len();
            }
        }
        Ok(rendered)
    }

    fn render(
        &self,
        messages: &[Message],
        contents: &[&str],
        add_generation_prompt: bool,
        markers: (&str, &str),
    ) -> Result<String, RowFault> {
        let messages: Vec<Value> = messages
            .iter()
            .zip(contents)
            .map(|(message, content)| context! { role => message.role.as_str(), content => *content })
            .collect();
        let mut fields = BTreeMap::from([
            ("messages", Value::from(messages)),
            ("add_generation_prompt", add_generation_prompt.into()),
            ("tools", ().into()),
            ("documents", ().into()),
            (generation::START, markers.0.into()),
            (generation::END, markers.1.into()),
        ]);
        fields.extend(self.specials.named.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str()))));
        environment::render(&self.environment, Value::from(fields)).map_err(|e| self.fault(&environment::describe(&e)))
    }

    fn fault(&self, words: &str) -> RowFault {
        RowFault::new(Reason::Template, format!("chat template of {}: {words}", self.place))
    }
}

#[cfg(test)]
mod tests;
