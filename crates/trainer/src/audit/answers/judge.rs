//! Which of two answers is the better one, by a model that reads both.
//!
//! A judge prefers what it reads first, or last. So it is asked twice, with the answers in both orders, and what it holds of the model's
//! answer is the mean:
//!
//! ```text
//! preference(own, other) = ½ · (P(A | own, other) + P(B | other, own))         = 1 − preference(other, own)
//! ```
//! Of two that are the same it is one half. Near one half is a tie.

use serde::Serialize;

/// What the judge answers with: the first, the second.
pub const OPTIONS: [&str; 2] = ["A", "B"];

/// How far from one half a preference has to be that is none for both.
const TIE: f64 = 0.02;

/// What the judge reads.
pub fn prompt(question: &str, first: &str, second: &str) -> String {
    format!(
        "Here is a question, and two answers to it.\n\nQuestion: {question}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\nWhich answer is \
         better? Say A or B.\n"
    )
}

/// Whose answer is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The model's.
    Win,
    /// Neither.
    Tie,
    /// The other's.
    Loss,
}

/// Of how likely the judge holds the model's answer to be the better one where it comes first and where it comes second.
pub fn verdict([first, second]: [f64; 2]) -> Verdict {
    let preference = f64::midpoint(first, second);
    match preference - 0.5 {
        above if above > TIE => Verdict::Win,
        below if below < -TIE => Verdict::Loss,
        _ => Verdict::Tie,
    }
}

/// What a verdict counts: a tie is half a win.
pub fn worth(verdict: Verdict) -> f64 {
    match verdict {
        Verdict::Win => 1.0,
        Verdict::Tie => 0.5,
        Verdict::Loss => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A judge that holds the first to be better whatever it says makes ties, and who asks for the other's makes the opposite.
    #[test]
    fn the_order_of_answers_makes_no_difference() {
        assert_eq!(verdict([0.9, 0.1]), Verdict::Tie);
        assert_eq!(verdict([0.5, 0.5]), Verdict::Tie);
        assert_eq!(verdict([0.9, 0.3]), Verdict::Win);
        assert_eq!(verdict([0.6, 0.1]), Verdict::Loss);
        for judged in [[0.9, 0.1], [0.9, 0.3], [0.2, 0.7], [0.4, 0.4]] {
            // What the judge holds of the other's answer, where that comes first and second.
            let swapped = [1.0 - judged[1], 1.0 - judged[0]];
            assert!((worth(verdict(judged)) + worth(verdict(swapped)) - 1.0).abs() < 1e-12, "{judged:?}");
        }
        assert!(prompt("q", "x", "y").find("A: x") < prompt("q", "x", "y").find("B: y"));
    }
}
