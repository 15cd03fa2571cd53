//! The words of PEFT's `add_weighted_adapter`: a merge and a space in one.

use attune_spec::Fault;
use attune_spec::method::MethodRef;
use serde::Serialize;

use crate::pairs::Space;

/// Each combination type with the method that it means and whether that combines changes, rather than factors.
const WORDS: &[(&str, &str, bool)] = &[
    ("linear", "task-arithmetic", false),
    ("cat", "task-arithmetic", false),
    ("svd", "task-arithmetic", true),
    ("ties", "ties", false),
    ("ties_svd", "ties", true),
    ("dare_linear", "dare-linear", false),
    ("dare_linear_svd", "dare-linear", true),
    ("dare_ties", "dare-ties", false),
    ("dare_ties_svd", "dare-ties", true),
    ("magnitude_prune", "magnitude-prune", false),
    ("magnitude_prune_svd", "magnitude-prune", true),
];

/// Whose sign counts where entries differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MajoritySign {
    /// That of their sum.
    Total,
    /// That of most of them.
    Frequency,
}

/// All combination types.
pub fn all() -> impl Iterator<Item = &'static str> {
    WORDS.iter().map(|(word, ..)| *word)
}

/// The combination types that mean a merge, by its name.
pub fn meaning(method: &str) -> impl Iterator<Item = &'static str> {
    WORDS.iter().filter(move |(_, named, _)| *named == method).map(|(word, ..)| *word)
}

/// The merge and the space that a combination type means, with what else `add_weighted_adapter` is told: `density`,
/// `majority_sign_method`, `svd_rank` and `svd_clamp`.
///
/// # Errors
/// A word that is none, or something beside it that does not concern it, by their names.
pub fn of(
    combination_type: &str,
    density: Option<f64>,
    majority_sign: Option<MajoritySign>,
    svd_rank: Option<usize>,
    svd_clamp: Option<f64>,
) -> Result<(MethodRef, Space), Fault> {
    let Some((word, method, changes)) = WORDS.iter().find(|(word, ..)| *word == combination_type) else {
        let known: Vec<&str> = all().collect();
        let message = format!("is {combination_type:?}; expected one of {}", known.join(", "));
        return Err(Fault::new("combination_type", message));
    };
    let mut named = MethodRef::named(method);
    let mut put = |name: &str, value: Option<serde_json::Value>, concerns: bool| match value {
        Some(_) if !concerns => Err(Fault::new(name, format!("says nothing to {word}: leave it out"))),
        Some(value) => {
            named.params.insert(name.to_owned(), value);
            Ok(())
        }
        None => Ok(()),
    };
    put("density", density.map(Into::into), *method != "task-arithmetic")?;
    let sign = majority_sign.and_then(|sign| serde_json::to_value(sign).ok());
    put("majority_sign", sign, ["ties", "dare-ties"].contains(method))?;
    let space = match (*changes, *word) {
        (true, _) => Space::Changes { rank: svd_rank, clamp: svd_clamp },
        (false, "cat") => Space::Concatenated,
        (false, _) => Space::Factors,
    };
    let told = [("svd_rank", svd_rank.is_some()), ("svd_clamp", svd_clamp.is_some())];
    match told.into_iter().find(|(_, told)| *told && !changes) {
        Some((name, _)) => {
            Err(Fault::new(name, format!("says nothing to {word}, which decomposes nothing: leave it out")))
        }
        None => Ok((named, space)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_means_a_merge_of_the_list() {
        for word in all() {
            let (method, space) = of(word, None, None, None, None).unwrap();
            assert!(crate::MERGES.card(&method.method).is_some(), "{word}");
            assert_eq!(matches!(space, Space::Changes { .. }), word.ends_with("svd"), "{word}");
        }
        assert_eq!(of("cat", None, None, None, None).unwrap().1, Space::Concatenated);
    }

    #[test]
    fn what_does_not_concern_a_word_is_refused_by_its_name() {
        let fault = |found: Result<(MethodRef, Space), Fault>| found.unwrap_err().to_string();
        assert!(fault(of("tie", None, None, None, None)).contains("expected one of linear, cat, svd, ties, "));
        assert!(fault(of("linear", Some(0.5), None, None, None)).starts_with("`density` says nothing to linear"));
        let sign = Some(MajoritySign::Frequency);
        assert!(fault(of("dare_linear", None, sign, None, None)).starts_with("`majority_sign` says nothing"));
        assert!(fault(of("ties", None, sign, Some(4), None)).starts_with("`svd_rank` says nothing to ties"));
    }
}
