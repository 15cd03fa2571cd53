//! Whether an answer rests on what the model was given to read.

use std::collections::BTreeSet;

use super::words::words;

/// The share of the answer's pairs of neighbouring words that the context has as well; of an answer of one word, whether the context has
/// it. Nothing of an answer without words. An answer in other words than the context's counts as one that does not rest on it.
pub fn supported(answer: &str, context: &str) -> Option<f64> {
    let (answer, context) = (words(answer), words(context));
    let span = answer.len().min(2);
    if span == 0 {
        return None;
    }
    let known: BTreeSet<&[String]> = context.windows(span).collect();
    let spans = answer.windows(span);
    let (all, supported) = (spans.len(), spans.filter(|span| known.contains(span)).count());
    Some(supported as f64 / all as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_rests_on_the_pairs_of_words_that_it_has_from_the_context() {
        let context = "The mill was built in 1842 by two brothers.";
        assert_eq!(supported("built in 1842", context), Some(1.0));
        assert_eq!(supported("Built in 1942.", context), Some(0.5));
        assert_eq!(supported("1842", context), Some(1.0));
        assert_eq!(supported("brothers two", context), Some(0.0));
        assert_eq!(supported("…", context), None);
        assert_eq!(supported("mill", ""), Some(0.0));
    }
}
