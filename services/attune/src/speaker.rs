//! A model that answers: a base, adapters on it, its tokenizer and chat template, all from folders.

use std::path::{Path, PathBuf};

use attune_architecture::HeadKind;
use attune_data::{ChatTemplate, Message, Tokenizer};
use attune_models::Model;
use attune_models::generate::generate;
use attune_points::Theta;
use attune_points::generate::{Finish, Sampling};
use attune_spec::job::Precision;

use crate::print::{Failure, note};

/// A model with its tokenizer.
pub(crate) struct Speaker {
    model: Model,
    theta: Theta,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

/// What was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The text.
    pub(crate) text: String,
    /// Number of tokens made.
    pub(crate) tokens: usize,
    /// Whether the model ended by itself, rather than at the limit.
    pub(crate) complete: bool,
}

impl Speaker {
    /// Opens a base and the adapters on it, the first one innermost: in few bits, if the adapters were trained on it so.
    pub(crate) fn open(base: &Path, adapters: &[PathBuf], precision: Precision) -> Result<Self, Failure> {
        let tokenizer = Tokenizer::open(base)?;
        let template = tokenizer.chat_template()?;
        let weights = attune_trainer::few::open_for(base, adapters, precision)?;
        let architecture = weights.architecture();
        if architecture.head.labels().is_some() {
            let message = format!("{} tells classes apart, and gives no text", architecture.class_name());
            return Err(Failure::usage(message).with_hint("ask for classes: attune classify"));
        }
        if architecture.head != HeadKind::Tokens {
            let message = format!("{} gives vectors, and no text", architecture.class_name());
            return Err(Failure::usage(message).with_hint("ask for vectors: attune embed"));
        }
        let folders = adapters.iter().map(PathBuf::as_path);
        let (weights, stack, theta) = attune_trainer::component::frozen(weights, folders)?;
        Ok(Self { model: Model::new(weights, stack), theta, tokenizer, template })
    }

    /// The assistant's answer to a conversation, by the model's chat template; a model without one goes on from the last
    /// message. `each` gets the text piece by piece.
    pub(crate) fn answer(
        &self,
        messages: &[Message],
        sampling: Sampling,
        each: impl FnMut(&str) -> Result<(), Failure>,
    ) -> Result<Answer, Failure> {
        match &self.template {
            Some(template) => self.speak(&template.prompt(messages)?, false, sampling, each),
            None => {
                let prompt = messages.last().map(|message| message.content.as_str()).unwrap_or_default();
                self.speak(prompt, true, sampling, each)
            }
        }
    }

    /// What the model says after `prompt`, as it stands. `begin`: after the beginning-of-text token, where there is one.
    pub(crate) fn speak(
        &self,
        prompt: &str,
        begin: bool,
        mut sampling: Sampling,
        mut each: impl FnMut(&str) -> Result<(), Failure>,
    ) -> Result<Answer, Failure> {
        let prompt = self.tokenizer.encode(prompt, begin)?;
        sampling.stop = self.tokenizer.stops(self.template.as_ref());
        let (mut tokens, mut shown) = (Vec::new(), 0);
        let mut end = Ok(());
        let generated = generate(&self.model, &self.theta, &prompt, &sampling, |token| {
            tokens.push(token);
            end = self.rest(&tokens, &mut shown).and_then(|piece| each(&piece));
            end.is_ok()
        })?;
        end?;
        let text = self.tokenizer.decode(&generated.tokens, false)?;
        // A character that was never finished is shown as the decoder shows it.
        if let Some(rest) = text.get(shown..).filter(|rest| !rest.is_empty()) {
            each(rest)?;
        }
        let (reached, architecture) = (prompt.len() + generated.tokens.len(), self.model.base().architecture());
        let context = architecture.max_position;
        if reached as u64 > context && !architecture.positions.changes_at(reached) {
            note(&format!(
                "prompt and answer have {reached} tokens; the base was made for {context}, so they may make no sense"
            ));
        }
        Ok(Answer { text, tokens: generated.tokens.len(), complete: matches!(generated.finish, Finish::Stop(_)) })
    }

    /// The text of `tokens` beyond the first `shown` bytes, up to the last whole character.
    fn rest(&self, tokens: &[u32], shown: &mut usize) -> Result<String, Failure> {
        let text = self.tokenizer.decode(tokens, false)?;
        let whole = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let piece = whole.get(*shown..).unwrap_or_default().to_owned();
        *shown += piece.len();
        Ok(piece)
    }
}
