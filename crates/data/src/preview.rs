//! Looks at data before it is trained on: rendered rows with their marks, lengths, and the exact order of tokens.

use attune_points::layout::NO_LABEL;
use serde::Serialize;

use crate::classes::{Classes, Labelled};
use crate::dataset::{Dataset, Document, Report};
use crate::error::Error;
use crate::tokenizer::Tokenizer;

/// The text of a document with what is learned between `⟦` and `⟧`; where there are classes, each token that has one stands there, with
/// its class.
///
/// # Errors
/// [`Error::Encode`] for ids outside of the vocabulary.
pub fn marked(document: Document<'_>, tokenizer: &Tokenizer, classes: Option<&Classes>) -> Result<String, Error> {
    if let (Some(classed), Some(classes)) = (document.classed, classes) {
        if classes.of == Labelled::Queries {
            return tokenizer.decode(document.ids, true);
        }
        return with_classes(document.ids, classed.labels, tokenizer, classes);
    }
    let mut text = String::new();
    let mut start = 0;
    while start < document.ids.len() {
        let learned = document.trained[start];
        let length = document.trained[start..].iter().take_while(|trained| **trained == learned).count();
        let part = tokenizer.decode(&document.ids[start..start + length], true)?;
        if learned {
            text.push('⟦');
            text.push_str(&part);
            text.push('⟧');
        } else {
            text.push_str(&part);
        }
        start += length;
    }
    Ok(text)
}

fn with_classes(ids: &[u32], labels: &[u32], tokenizer: &Tokenizer, classes: &Classes) -> Result<String, Error> {
    let mut text = String::new();
    let mut start = 0;
    while start < ids.len() {
        if let Some(name) = classes.names.get(labels[start] as usize) {
            text.push_str(&format!("⟦{}: {name}⟧", tokenizer.decode(&ids[start..=start], true)?));
            start += 1;
        } else {
            let length = labels[start..].iter().take_while(|label| **label == NO_LABEL).count().max(1);
            text.push_str(&tokenizer.decode(&ids[start..start + length], true)?);
            start += length;
        }
    }
    Ok(text)
}

/// What a file looks like in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Statistics {
    /// What reading it found.
    pub report: Report,
    /// Lengths of documents in tokens: the smallest, quarter points, 90th and 99th percentile, the largest.
    pub lengths: Vec<(String, usize)>,
}

/// The numbers of a data set.
pub fn statistics(data: &Dataset) -> Statistics {
    let mut lengths: Vec<usize> = data.lengths().collect();
    lengths.sort_unstable();
    let at = |share: f64| {
        lengths.get(((lengths.len().saturating_sub(1)) as f64 * share).round() as usize).copied().unwrap_or(0)
    };
    let points = [("min", 0.0), ("p25", 0.25), ("p50", 0.5), ("p75", 0.75), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)];
    Statistics {
        report: data.report().clone(),
        lengths: points.iter().map(|(name, share)| ((*name).to_owned(), at(*share))).collect(),
    }
}

/// One document of the order of tokens, as other trainers can read it: `labels_mask[i] = 1` where token `i` is learned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OrderedDocument {
    /// The tokens.
    pub ids: Vec<u32>,
    /// 1 where the token is learned.
    pub labels_mask: Vec<u8>,
    /// Its domain.
    pub domain: String,
}

/// A document in that form.
pub fn ordered(document: Document<'_>, domain: &str) -> OrderedDocument {
    OrderedDocument {
        ids: document.ids.to_vec(),
        labels_mask: document.trained.iter().map(|trained| u8::from(*trained)).collect(),
        domain: domain.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use attune_points::View;

    use super::*;
    use crate::classes::Labelled;
    use crate::dataset::ClassedRows;
    use crate::dataset::tests::texts;
    use crate::tokenizer::byte_level;

    #[test]
    fn marks_and_numbers_are_shown() {
        let data = texts(&["ab".to_owned(), "cdef".to_owned()]);
        let tokenizer = byte_level(&["<|endoftext|>"]);
        assert_eq!(marked(data.documents().next().unwrap(), &tokenizer, None).unwrap(), "⟦ab<|endoftext|>⟧");
        let part = Document { view: View::Main, ids: &[97, 98, 99], trained: &[false, true, false], classed: None };
        assert_eq!(marked(part, &tokenizer, None).unwrap(), "a⟦b⟧c");
        let classes = Classes { names: vec!["no".to_owned(), "yes".to_owned()], of: Labelled::First };
        let classed = Some(ClassedRows { labels: &[1, NO_LABEL, NO_LABEL], types: &[0; 3] });
        let text = marked(Document { classed, ..part }, &tokenizer, Some(&classes)).unwrap();
        assert_eq!(text, "⟦a: yes⟧bc");
        let statistics = statistics(&data);
        assert_eq!(statistics.lengths.first(), Some(&("min".to_owned(), 3)));
        assert_eq!(statistics.lengths.last(), Some(&("max".to_owned(), 5)));
        assert_eq!(ordered(part, "a").labels_mask, [0, 1, 0]);
    }
}
