//! "did you mean": the known name nearest to a misspelt one.

/// The candidate nearest to `given` by Damerau–Levenshtein distance, if it is near enough to be a slip of the pen:
/// at most a third of the letters, and at least one edit allowed. Ties go to the first candidate.
pub fn nearest<'a>(given: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (given.chars().count() / 3).max(1);
    let folded = given.to_lowercase().replace('_', "-");
    candidates
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(&folded, &name.to_lowercase().replace('_', "-")), name))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// `; did you mean "rank"?` or nothing, to end a message with.
pub fn hint<'a>(given: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    nearest(given, candidates).map(|name| format!("; did you mean {name:?}?")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_found_and_strangers_are_not() {
        let known = ["rank", "alpha", "dropout", "targets"];
        for (given, expected) in
            [("rnak", Some("rank")), ("Alpha", Some("alpha")), ("target", Some("targets")), ("learning_rate", None)]
        {
            assert_eq!(nearest(given, known), expected, "{given}");
        }
        assert_eq!(hint("drop_out", known), "; did you mean \"dropout\"?");
    }
}
