//! What answers are compared by: their words.

use std::collections::BTreeMap;

/// The words of a text, in small letters and without signs.
pub fn words(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect()
}

/// Whether an answer says exactly what is right.
pub fn is_exact(answer: &str, reference: &str) -> bool {
    words(answer) == words(reference)
}

/// The harmonic mean of how many of the answer's words are right and how many of the right ones it has, each as often as it occurs; 1
/// where neither has any.
pub fn overlap(answer: &str, reference: &str) -> f64 {
    let (answer, reference) = (words(answer), words(reference));
    if answer.is_empty() && reference.is_empty() {
        return 1.0;
    }
    let mut left = BTreeMap::new();
    for word in &reference {
        *left.entry(word).or_insert(0usize) += 1;
    }
    let mut common = 0usize;
    for word in &answer {
        if let Some(left) = left.get_mut(word).filter(|left| **left > 0) {
            *left -= 1;
            common += 1;
        }
    }
    2.0 * common as f64 / (answer.len() + reference.len()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_and_capital_letters_make_no_difference() {
        assert!(is_exact("The cat, sat.", "the Cat sat"));
        assert!(!is_exact("the cat sat down", "the cat sat"));
        assert_eq!(words("Größe: 3.5 µm"), ["größe", "3", "5", "µm"]);
    }

    #[test]
    fn the_overlap_is_the_mean_of_precision_and_recall() {
        assert_eq!(overlap("a b c", "c b a"), 1.0);
        assert_eq!(overlap("a", "b"), 0.0);
        assert_eq!((overlap("", ""), overlap("a", ""), overlap("", "a")), (1.0, 0.0, 0.0));
        // Precision 2/3, recall 2/5.
        let (precision, recall) = (2.0 / 3.0, 2.0 / 5.0);
        assert!((overlap("a a b", "a b x y z") - 2.0 * precision * recall / (precision + recall)).abs() < 1e-12);
    }
}
