//! A model folder's tokeniser: text to token ids with the place of each token in the text, and back.

mod byte_level;
mod config;
mod whole;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use attune_spec::method::Words;
use serde::de::IgnoredAny;
use serde_json::Value;
use tokenizers::processors::PostProcessorWrapper;

pub use byte_level::{byte_level, byte_level_files};
pub use config::Specials;
pub(crate) use whole::Whole;

use crate::error::Error;
use crate::template::ChatTemplate;

/// A tokeniser with its special tokens and, where the model has one, its chat template.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    specials: Specials,
    template: Option<config::TemplateSource>,
    vocabulary: u32,
}

/// One token and the bytes of the text that it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) id: u32,
    pub(crate) bytes: Range<usize>,
    /// Whether the tokeniser put it there (a beginning-of-text token), rather than the text.
    pub(crate) added: bool,
}

impl Tokenizer {
    /// Loads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja` from a model
    /// folder; all but the first may be missing.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] naming the file.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("tokenizer.json");
        let error = |message: String| Error::Tokenizer { path: path.clone(), message };
        let bytes = std::fs::read(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => error(
                "there is no such file; a SentencePiece model needs converting first (transformers' `save_pretrained` of a \
                 fast tokenizer)"
                    .to_owned(),
            ),
            _ => error(format!("cannot be read: {e}")),
        })?;
        let inner = parse(&bytes).map_err(error)?;
        Self::assemble(inner, config::read(folder)?)
    }

    /// A tokeniser from the bytes of `tokenizer.json` and the value of `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn from_json(tokenizer: &[u8], config: &Value) -> Result<Self, Error> {
        let path = PathBuf::from("tokenizer.json");
        let inner = parse(tokenizer).map_err(|message| Error::Tokenizer { path, message })?;
        let mut parts = config::Parts::default();
        parts.take_config(Path::new("tokenizer_config.json"), config)?;
        Self::assemble(inner, parts)
    }

    fn assemble(inner: tokenizers::Tokenizer, parts: config::Parts) -> Result<Self, Error> {
        let mut special: Vec<(u32, String)> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special && !token.content.trim().is_empty())
            .map(|(id, token)| (id, token.content))
            .collect();
        special.sort_unstable();
        let mut special: Vec<String> = special.into_iter().map(|(_, content)| content).collect();
        for (_, token) in &parts.named {
            if !special.contains(token) && inner.token_to_id(token).is_some() {
                special.push(token.clone());
            }
        }
        let ids = inner.get_vocab(true).into_values();
        let vocabulary = ids.max().map_or(0, |id| id.saturating_add(1));
        let specials = Specials { special, named: parts.named };
        Ok(Self { inner, specials, template: parts.template, vocabulary })
    }

    /// The model's own chat template, compiled; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Template`] if it does not compile.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, Error> {
        let Some(source) = &self.template else { return Ok(None) };
        ChatTemplate::compile(&source.place, &source.text, &self.specials).map(Some)
    }

    /// The special tokens.
    pub fn specials(&self) -> &Specials {
        &self.specials
    }

    /// One more than the largest token id: the least size of an embedding table that serves all of them.
    pub fn vocabulary(&self) -> u32 {
        self.vocabulary
    }

    /// The id of a token by its text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The end-of-text token, if the model names one.
    pub fn eos(&self) -> Option<u32> {
        self.specials.eos().and_then(|token| self.id(token))
    }

    /// The ids of a text. `begin`: with the beginning-of-text token, if the tokeniser puts one; rendered chats have
    /// theirs in the text and go without.
    ///
    /// # Errors
    /// [`Error::Encode`].
    pub fn encode(&self, text: &str, begin: bool) -> Result<Vec<u32>, Error> {
        self.pieces(text, begin).map(|pieces| pieces.into_iter().map(|piece| piece.id).collect())
    }

    pub(crate) fn pieces(&self, text: &str, begin: bool) -> Result<Vec<Piece>, Error> {
        let encoding = guarded(|| self.inner.encode(text, begin).map_err(|e| e.to_string()))
            .map_err(|message| Error::Encode { text: text.chars().take(40).collect(), message })?;
        let parts = encoding.get_ids().iter().zip(encoding.get_offsets()).zip(encoding.get_special_tokens_mask());
        Ok(parts
            .map(|((&id, &(start, end)), &mask)| Piece { id, bytes: start..end, added: mask != 0 && start == end })
            .collect())
    }

    /// The text of some tokens; bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Encode`] for an id outside the vocabulary.
    pub fn decode(&self, ids: &[u32], with_specials: bool) -> Result<String, Error> {
        guarded(|| self.inner.decode(ids, !with_specials).map_err(|e| e.to_string()))
            .map_err(|message| Error::Encode { text: format!("{:?}", &ids[..ids.len().min(8)]), message })
    }

    /// The tokens that end an assistant's turn when they are generated: the end-of-text token and the template's end of
    /// turn.
    pub fn stops(&self, template: Option<&ChatTemplate>) -> Vec<u32> {
        let turn = template.and_then(ChatTemplate::end_of_turn).and_then(|token| self.id(&token));
        let mut stops: Vec<u32> = turn.into_iter().chain(self.eos()).collect();
        stops.dedup();
        stops
    }
}

/// Runs the library, which panics on some files, such as one whose template names a token that it does not have. To whoever
/// brought the file that is an error like any other.
fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    // Nothing that was half changed is used again: the library is asked by shared references, or gives nothing back.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<String>().map(String::as_str);
        let words = words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason is given");
        Err(format!("contradicts itself, so that it cannot be used: {words}"))
    })
}

fn parse(bytes: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    // The library panics where the text of some of its parts is no JSON.
    let text = std::str::from_utf8(bytes).map_err(|e| format!("is not valid JSON: {e}"))?;
    serde_json::from_str::<IgnoredAny>(text).map_err(|e| format!("is not valid JSON: {e}"))?;
    let read =
        || tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| format!("is not a tokenizer of this version: {e}"));
    let mut inner = guarded(read)?;
    // Rows are cut and packed here, by the job's own limits.
    inner.with_truncation(None).map_err(|e| e.to_string())?;
    inner.with_padding(None);
    // Trimmed offsets leave white space without a token that stands for it; a span's first and last bytes must have one.
    let processor = inner.get_post_processor().map(serde_json::to_value);
    if let Some(processor) = processor {
        let mut processor = processor.map_err(|e| e.to_string())?;
        if keep_white_space(&mut processor) {
            let processor: PostProcessorWrapper = serde_json::from_value(processor).map_err(|e| e.to_string())?;
            inner.with_post_processor(Some(processor));
        }
    }
    Ok(inner)
}

/// Sets every `trim_offsets` to false; says whether there was one to set.
fn keep_white_space(value: &mut Value) -> bool {
    match value {
        Value::Object(fields) => fields.iter_mut().fold(false, |changed, (name, value)| match value {
            Value::Bool(trim) if name == "trim_offsets" => std::mem::replace(trim, false) || changed,
            value => keep_white_space(value) || changed,
        }),
        Value::Array(items) => {
            let mut changed = false;
            for item in items {
                changed |= keep_white_space(item);
            }
            changed
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

impl Words for Tokenizer {
    fn tokens(&self, text: &str) -> Result<Vec<u32>, String> {
        self.encode(text, true).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_has_a_token_that_stands_for_it() {
        let tokenizer = byte_level(&["<|end|>"]);
        let text = "a  é<|end|> \n";
        let pieces = tokenizer.pieces(text, false).unwrap();
        let mut covered = vec![false; text.len()];
        for piece in &pieces {
            covered[piece.bytes.clone()].fill(true);
        }
        assert!(covered.iter().all(|byte| *byte), "{pieces:?}");
        assert_eq!(pieces.iter().filter(|piece| Some(piece.id) == tokenizer.id("<|end|>")).count(), 1);
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "a  é \n");
    }

    #[test]
    fn trimming_is_switched_off_at_any_depth() {
        let mut processor = serde_json::json!({"type": "Sequence", "processors": [{"trim_offsets": true}, {"a": 1}]});
        assert!(keep_white_space(&mut processor));
        assert_eq!(processor["processors"][0]["trim_offsets"], false);
        assert!(!keep_white_space(&mut processor));
    }

    #[test]
    fn a_folder_without_or_with_a_broken_tokenizer_is_refused_by_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = Tokenizer::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json: there is no such file"), "{error}");
        std::fs::write(folder.path().join("tokenizer.json"), "{\"model\": 3}").unwrap();
        let error = Tokenizer::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json: is not a tokenizer of this version"), "{error}");
        let sound = byte_level::json(&["</s>"]);
        std::fs::write(folder.path().join("tokenizer.json"), sound.to_string()).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), "{\"eos_token\": 1}").unwrap();
        let error = Tokenizer::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json: `eos_token` is a number; expected a text"), "{error}");
        std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"eos_token": {"content": "</s>"}}"#).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        assert_eq!((tokenizer.eos(), tokenizer.vocabulary()), (Some(256), 257));
    }
}
