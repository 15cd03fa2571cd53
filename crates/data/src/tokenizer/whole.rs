//! Texts as encoders read them: with the tokens that stand around them, a second text after the first, or word by word.

use tokenizers::utils::truncation::{TruncationParams, truncate_encodings};
use tokenizers::{Encoding, InputSequence, PostProcessor as _};

use super::{Tokenizer, guarded};
use crate::error::Error;

/// A document with what surrounds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Whole {
    pub(crate) ids: Vec<u32>,
    /// Which of two texts a token belongs to.
    pub(crate) types: Vec<u32>,
    /// Which word a token belongs to; none for those that stand around them.
    pub(crate) words: Vec<Option<u32>>,
    pub(crate) truncated: bool,
}

impl Tokenizer {
    /// A text, or two, with the tokens that the tokeniser puts around them, cut to `limit` tokens if it is given: the longer text
    /// loses its end first, and what stands around them stays.
    ///
    /// # Errors
    /// [`Error::Encode`].
    pub(crate) fn whole(&self, text: &str, pair: Option<&str>, limit: Option<usize>) -> Result<Whole, Error> {
        self.surrounded(text.into(), pair.map(Into::into), limit)
            .map_err(|message| Error::Encode { text: text.chars().take(40).collect(), message })
    }

    /// The same of words, each tokenised by itself.
    ///
    /// # Errors
    /// [`Error::Encode`].
    pub(crate) fn worded(&self, words: &[String], limit: Option<usize>) -> Result<Whole, Error> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let text = words.join(" ").chars().take(40).collect();
        self.surrounded(words.into(), None, limit).map_err(|message| Error::Encode { text, message })
    }

    fn surrounded(
        &self,
        text: InputSequence<'_>,
        pair: Option<InputSequence<'_>>,
        limit: Option<usize>,
    ) -> Result<Whole, String> {
        let words = |error: tokenizers::Error| error.to_string();
        guarded(|| {
            let alone = |text: InputSequence<'_>| self.inner.encode(text, false).map_err(words);
            let (mut first, mut second) = (alone(text)?, pair.map(alone).transpose()?);
            let around = self.inner.get_post_processor().map_or(0, |around| around.added_tokens(second.is_some()));
            let length = first.len() + second.as_ref().map_or(0, Encoding::len) + around;
            let truncated = limit.is_some_and(|limit| length > limit);
            if let Some(limit) = limit.filter(|_| truncated) {
                let to = TruncationParams { max_length: limit.saturating_sub(around), ..TruncationParams::default() };
                (first, second) = truncate_encodings(first, second, &to).map_err(words)?;
            }
            let all = self.inner.post_process(first, second, true).map_err(words)?;
            let (ids, types) = (all.get_ids().to_vec(), all.get_type_ids().to_vec());
            Ok(Whole { ids, types, words: all.get_word_ids().to_vec(), truncated })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words of one letter, `[CLS]` and `[SEP]` around texts as BERT has them.
    fn bert() -> Tokenizer {
        let vocabulary: serde_json::Map<_, _> = ["[CLS]", "[SEP]", "[UNK]"]
            .into_iter()
            .map(str::to_owned)
            .chain(('a'..='f').map(String::from))
            .chain(('a'..='f').map(|letter| format!("##{letter}")))
            .zip(0..)
            .map(|(token, id): (String, u32)| (token, id.into()))
            .collect();
        let special = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
            "added_tokens": [special(0, "[CLS]"), special(1, "[SEP]"), special(2, "[UNK]")],
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 1], "cls": ["[CLS]", 0]},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": vocabulary},
        });
        Tokenizer::from_json(json.to_string().as_bytes(), &serde_json::json!({})).unwrap()
    }

    #[test]
    fn texts_stand_between_their_tokens_and_the_second_is_of_another_type() {
        let whole = bert().whole("ab c", Some("d"), None).unwrap();
        assert_eq!(whole.ids, [0, 3, 10, 5, 1, 6, 1]);
        assert_eq!(whole.types, [0, 0, 0, 0, 0, 1, 1]);
        assert!(!whole.truncated);
        let one = bert().whole("", None, None).unwrap();
        assert_eq!((one.ids, one.types), (vec![0, 1], vec![0, 0]));
    }

    #[test]
    fn what_is_too_long_loses_its_end_and_keeps_what_stands_around_it() {
        let cut = bert().whole("a b c d e f", Some("a"), Some(7)).unwrap();
        assert_eq!((cut.ids, cut.truncated), (vec![0, 3, 4, 5, 1, 3, 1], true));
        let cut = bert().whole("a b c d", None, Some(4)).unwrap();
        assert_eq!((cut.ids, cut.truncated), (vec![0, 3, 4, 1], true));
        assert_eq!(bert().whole("a b", None, Some(1)).unwrap().ids, [0, 1]);
    }

    #[test]
    fn tokens_know_their_words() {
        let words = ["ab", "?", "f"].map(str::to_owned);
        let whole = bert().worded(&words, None).unwrap();
        assert_eq!(whole.ids, [0, 3, 10, 2, 8, 1]);
        assert_eq!(whole.words, [None, Some(0), Some(0), Some(1), Some(2), None]);
    }
}
