//! Rows for heads that tell classes apart or give vectors: which number a label has, and on which rows of a document it stands.
//!
//! A label stands on the row whose logits it is compared with, not on the one before, as next tokens do. Vectors have no labels: a
//! mark on a document's first row says that it is a query, which is what losses are counted by.

use attune_points::layout::{NO_LABEL, Source};
use attune_points::{Layout, Row};
use attune_spec::suggest;

use crate::encode::Encoder;
use crate::error::Error;
use crate::forms::Label;
use crate::origin::{Reason, RowFault};

/// The rows of a document that have labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Labelled {
    /// The first, where encoders have their `[CLS]`: its label is the document's.
    First,
    /// The last, the only one that has seen a whole document under causal attention.
    Last,
    /// The first token of each word.
    Words,
    /// The first of a query: nothing has a class, documents have vectors.
    Queries,
}

/// The classes of a head, or that it gives vectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classes {
    /// Their names, in the order of their numbers; none of a head that gives vectors.
    pub names: Vec<String>,
    /// What has a class or a mark.
    pub of: Labelled,
}

/// A text whose classes or vector are asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// The text, one document.
    pub layout: Layout,
    /// What has a class: the text, or its words.
    pub of: Vec<String>,
    /// The rows whose logits say the classes, as many.
    pub rows: Vec<u32>,
    /// Whether its end was cut off.
    pub truncated: bool,
}

impl Encoder {
    /// A text, with another beside it or alone, as a question for its class or its vector; where words have classes, what stands
    /// between white space is a word. Of a text that is too long the end is cut off.
    ///
    /// # Errors
    /// [`Error::Encode`]; [`Error::File`] for an encoder without classes and for a second text where words have them.
    pub fn ask(&self, text: &str, pair: Option<&str>) -> Result<Asked, Error> {
        let refused = |message: &str| Error::File { file: "the text".to_owned(), message: message.to_owned() };
        let classes = self.classes().ok_or_else(|| refused("has no class here: the model's head is over tokens"))?;
        let limit = Some(self.max_length());
        let (whole, of, rows) = match classes.of {
            Labelled::Words => {
                if pair.is_some() {
                    return Err(refused("has another beside it, and classes of words are asked of one"));
                }
                let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
                let whole = self.tokenizer().worded(&words, limit)?;
                let numbers: Vec<u32> = (0..words.len() as u32).collect();
                let firsts = on_words(&numbers, &whole.words);
                let firsts = (0u32..).zip(firsts).filter(|(_, word)| *word != NO_LABEL);
                let (rows, of) = firsts.map(|(row, word)| (row, words[word as usize].clone())).unzip();
                (whole, of, rows)
            }
            Labelled::First | Labelled::Last | Labelled::Queries => {
                let whole = self.tokenizer().whole(text, pair, limit)?;
                let last = (whole.ids.len() as u32).saturating_sub(1);
                let row = if classes.of == Labelled::Last { last } else { 0 };
                (whole, vec![text.to_owned()], vec![row])
            }
        };
        if whole.ids.is_empty() {
            return Err(refused("has no tokens"));
        }
        let mut layout = Layout::new();
        layout.push(Source::default(), whole.ids.iter().map(|id| (Row::Token(*id), NO_LABEL)));
        layout.typed(&whole.types);
        Ok(Asked { layout, of, rows, truncated: whole.truncated })
    }
}

/// The most names that a message lists.
const LISTED: usize = 8;

impl Classes {
    /// The number of a label: of one that is a name, its place, and of one that is a number below the number of names, itself.
    pub(crate) fn number(&self, label: &Label) -> Result<u32, RowFault> {
        let known = |number: u64| u32::try_from(number).ok().filter(|number| (*number as usize) < self.names.len());
        let found = match label {
            Label::Name(name) => {
                let place = self.names.iter().position(|known| known == name).map(|place| place as u32);
                // Files of text alone, such as CSV, have numbers as texts.
                place.or_else(|| known(name.parse().ok()?))
            }
            Label::Number(number) => known(*number),
        };
        found.ok_or_else(|| {
            let hint = match label {
                Label::Name(name) => suggest::hint(name, self.names.iter().map(String::as_str)),
                Label::Number(_) => String::new(),
            };
            let shown: Vec<&str> = self.names.iter().take(LISTED).map(String::as_str).collect();
            let more = if self.names.len() > LISTED { ", …" } else { "" };
            let message = format!("label {label} is none of `tune.head.labels` ({}{more}){hint}", shown.join(", "));
            RowFault::new(Reason::UnknownLabel, message)
        })
    }

    /// The labels of the rows of a document of `length` tokens that is of class `number`.
    pub(crate) fn on_document(&self, number: u32, length: usize) -> Vec<u32> {
        let mut labels = vec![NO_LABEL; length];
        let row = match self.of {
            Labelled::Last => labels.last_mut(),
            Labelled::First | Labelled::Words | Labelled::Queries => labels.first_mut(),
        };
        if let Some(row) = row {
            *row = number;
        }
        labels
    }
}

/// The mark of a query.
pub(crate) const QUERY: u32 = 0;

/// The labels of the rows of a document, of whose tokens `words` are the words: the first token of each has the label of the word.
pub(crate) fn on_words(numbers: &[u32], words: &[Option<u32>]) -> Vec<u32> {
    let mut before = None;
    let of = |word: &Option<u32>| {
        let is_first = *word != before;
        before = *word;
        let label = word.filter(|_| is_first).and_then(|word| numbers.get(word as usize).copied());
        label.unwrap_or(NO_LABEL)
    };
    words.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_a_name_or_a_number() {
        let classes = Classes { names: ["no", "yes", "0"].map(str::to_owned).to_vec(), of: Labelled::First };
        let name = |name: &str| classes.number(&Label::Name(name.to_owned())).map_err(|fault| fault.message);
        assert_eq!((name("yes"), name("1"), name("0")), (Ok(1), Ok(1), Ok(2)));
        assert_eq!(classes.number(&Label::Number(2)), Ok(2));
        insta::assert_snapshot!(name("yse").unwrap_err(), @r#"label "yse" is none of `tune.head.labels` (no, yes, 0); did you mean "yes"?"#);
        insta::assert_snapshot!(classes.number(&Label::Number(3)).unwrap_err().message, @"label 3 is none of `tune.head.labels` (no, yes, 0)");
    }

    #[test]
    fn a_text_or_its_words_are_asked_for_their_classes() {
        let encoder = |of| {
            let classes = Classes { names: vec!["no".to_owned(), "yes".to_owned()], of };
            let tokenizer = crate::tokenizer::byte_level(&["<|endoftext|>"]);
            Encoder::new(tokenizer, None, 6, attune_spec::job::TooLong::Refuse).unwrap().with_classes(Some(classes))
        };
        let asked = encoder(Labelled::Last).ask("abcdefgh", None).unwrap();
        assert_eq!(
            (asked.layout.n_rows(), asked.rows, asked.of, asked.truncated),
            (6, vec![5], vec!["abcdefgh".to_owned()], true)
        );
        let asked = encoder(Labelled::Words).ask(" ab  c de", None).unwrap();
        assert_eq!((asked.rows, asked.of), (vec![0, 2, 3], ["ab", "c", "de"].map(str::to_owned).to_vec()));
        assert!(encoder(Labelled::Words).ask("a", Some("b")).unwrap_err().to_string().contains("asked of one"));
        assert!(encoder(Labelled::First).ask("", None).unwrap_err().to_string().contains("has no tokens"));
        assert!(encoder(Labelled::First).with_classes(None).ask("a", None).is_err());
    }

    #[test]
    fn a_document_has_one_labelled_row_and_a_word_has_its_first_token() {
        let mut classes = Classes { names: Vec::new(), of: Labelled::First };
        assert_eq!(classes.on_document(4, 3), [4, NO_LABEL, NO_LABEL]);
        classes.of = Labelled::Last;
        assert_eq!(classes.on_document(4, 3), [NO_LABEL, NO_LABEL, 4]);
        let words = [None, Some(0), Some(0), Some(1), Some(2), None];
        assert_eq!(on_words(&[7, 8, 9], &words), [NO_LABEL, 7, NO_LABEL, 8, 9, NO_LABEL]);
    }
}
