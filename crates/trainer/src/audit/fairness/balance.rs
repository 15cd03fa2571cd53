//! What was learned against what was kept: one number of a gain on the one and a loss on the other.
//!
//! # Paper
//! KORE: Enhancing Knowledge Injection for Large Multimodal Models via Knowledge-Oriented Augmentations and Constraints. Jiang et al.,
//! 2025: the harmonic score of adaptation and retention.

use serde::Serialize;

/// A score before and after, more of which is better.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moved {
    /// Of the base.
    pub base: f64,
    /// Of what was made of it.
    pub tuned: f64,
}

impl Moved {
    /// By how many per cent of the base's it grew; nothing where that had none.
    fn gain(self) -> Option<f64> {
        (self.base > 0.0).then(|| 100.0 * (self.tuned - self.base) / self.base)
    }
}

/// Adaptation and retention, and both in one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Balance {
    /// `100 G / (G + 100)` of the gain G on what was learned, in per cent: 0 where nothing was, towards 100 where very much was.
    pub adaptation: f64,
    /// `G + 100` of the gain on what was known: 100 where all of it stayed.
    pub retention: f64,
    /// Their harmonic mean; 0 where one of them is 0 or less.
    pub harmonic: f64,
}

impl Balance {
    /// Of scores on what was learned, and on what was known. Nothing where the base has no score, or what was learned has none left.
    pub fn of(learned: Moved, known: Moved) -> Option<Self> {
        let (learned, known) = (learned.gain()?, known.gain()?);
        let (adaptation, retention) = (100.0 * learned / (learned + 100.0), known + 100.0);
        let harmonic = if adaptation > 0.0 && retention > 0.0 {
            2.0 * adaptation * retention / (adaptation + retention)
        } else {
            0.0
        };
        adaptation.is_finite().then_some(Self { adaptation, retention, harmonic })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(base: f64, tuned: f64) -> Moved {
        Moved { base, tuned }
    }

    /// The paper's own numbers: 35.96 from 7.12, and 40.00 from 46.74.
    #[test]
    fn it_is_the_papers_score_of_the_papers_numbers() {
        let found = Balance::of(moved(7.12, 35.96), moved(46.74, 40.0)).unwrap();
        assert!((found.harmonic - 82.81).abs() < 0.02, "{found:?}");
        assert!((found.adaptation - 80.2).abs() < 0.01 && (found.retention - 85.58).abs() < 0.01, "{found:?}");
    }

    #[test]
    fn nothing_learned_or_nothing_kept_is_no_balance_and_the_base_is_its_own() {
        let same = Balance::of(moved(5.0, 5.0), moved(3.0, 3.0)).unwrap();
        assert_eq!((same.adaptation, same.retention, same.harmonic), (0.0, 100.0, 0.0));
        assert_eq!(Balance::of(moved(5.0, 9.0), moved(3.0, 0.0)).unwrap().harmonic, 0.0);
        assert_eq!(Balance::of(moved(5.0, 4.0), moved(3.0, 3.0)).unwrap().harmonic, 0.0);
        assert_eq!(Balance::of(moved(0.0, 4.0), moved(3.0, 3.0)), None);
        assert_eq!(Balance::of(moved(5.0, 0.0), moved(3.0, 3.0)), None);
        // More of either is better.
        let of = |learned, known| Balance::of(moved(5.0, learned), moved(3.0, known)).unwrap().harmonic;
        assert!(of(9.0, 2.0) < of(10.0, 2.0) && of(9.0, 2.0) < of(9.0, 2.5));
    }
}
