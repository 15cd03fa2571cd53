//! Whether texts are still like those that a model learned.
//!
//! Of each text the model says two losses, means over its tokens: of what it is given (the tokens that are not learned: questions, contexts)
//! and of what is learned (answers). Texts that are seen now are held against a slice of those that were learned:
//!
//! ```text
//! ratio    = perplexity(seen) / perplexity(slice)                  perplexity = exp(Σ losses / Σ tokens)
//! distance = max over x of |share of seen texts with a mean loss ≤ x − share of those of the slice|
//! ```
//! The first sees that texts have become harder, the second also that they have become other ones that are as hard on the whole (Kolmogorov
//! and Smirnov's). Texts have drifted if they surely have: the whole interval of the ratio is above what is allowed.
//!
//! # Paper
//! The Ultimate Guide to Fine-Tuning LLMs from Basics to Breakthroughs. Parthasarathy, Zafar, Khan, Shahid, 2024 (its seventh stage).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use attune_data::{Encoder, Tokenizer};
use attune_spec::job::TooLong;
use serde::Serialize;

use super::bootstrap::{Bootstrap, Interval};
use super::measure::{Folder, Scored, Trained, inputs, mean, texts};
use crate::error::Error;

/// What is held against what.
#[derive(Debug, Clone)]
pub struct Drift<'a> {
    /// The folder of the base.
    pub base: &'a Path,
    /// What was trained of it; the base itself if there is nothing.
    pub trained: Option<&'a Folder>,
    /// Texts that were learned, or like those.
    pub slice: PathBuf,
    /// Texts of now.
    pub seen: PathBuf,
    /// The most texts of either.
    pub rows: Option<u64>,
    /// The longest text, in tokens.
    pub max_length: u32,
    /// The largest ratio of perplexities that is no drift.
    pub most: f64,
    /// How intervals are made.
    pub bootstrap: Bootstrap,
}

/// What can be said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Label {
    /// Surely harder for the model than is allowed.
    Drifted,
    /// Surely not.
    Within,
    /// The texts are too few to tell.
    Unclear,
}

/// One kind of tokens, of the slice and of what is seen now.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Compared {
    /// Texts of the slice and of now that have such tokens.
    pub texts: [usize; 2],
    /// These tokens.
    pub tokens: [u64; 2],
    /// The perplexity of each.
    pub perplexity: [f64; 2],
    /// That of now by that of the slice.
    pub ratio: Option<Interval>,
    /// Between the distributions of losses, from 0 to 1.
    pub distance: f64,
    /// What it comes to.
    pub label: Label,
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The largest ratio that is no drift.
    pub most: f64,
    /// The share of draws within an interval.
    pub level: f64,
    /// What the model is given; nothing where all tokens are learned.
    pub inputs: Option<Compared>,
    /// What is learned.
    pub answers: Option<Compared>,
}

impl Drift<'_> {
    /// Looks at both.
    ///
    /// # Errors
    /// [`Error`] naming the folder, file or line at fault.
    pub fn run(&self) -> Result<Report, Error> {
        let tokenizer = Tokenizer::open(self.base)?;
        let encoder = Encoder::new(tokenizer, None, self.max_length, TooLong::Truncate)?;
        let slice = texts(&self.slice, &encoder, self.rows)?;
        let seen = texts(&self.seen, &encoder, self.rows)?;
        let trained = Trained::open(self.base, self.trained)?;
        let (slice, seen) = (trained.texts(&slice), trained.texts(&seen));
        let of_inputs = [trained.losses(&inputs(&slice))?, trained.losses(&inputs(&seen))?];
        let of_answers = [trained.losses(&slice)?, trained.losses(&seen)?];
        Ok(Report {
            most: self.most,
            level: self.bootstrap.level,
            inputs: self.compared(of_inputs),
            answers: self.compared(of_answers),
        })
    }

    /// Nothing where one of both has no such tokens.
    fn compared(&self, losses: [Vec<Scored>; 2]) -> Option<Compared> {
        let [slice, seen] = losses.map(|mut of| {
            of.retain(|scored| scored.tokens > 0.0);
            of
        });
        let perplexity = [mean(&slice, None)?.exp(), mean(&seen, None)?.exp()];
        let ratio = self.bootstrap.between([slice.len(), seen.len()], |[of_slice, of_seen]| {
            Some((mean(&seen, Some(of_seen))? - mean(&slice, Some(of_slice))?).exp())
        });
        let label = match ratio {
            Some(ratio) if ratio.low > self.most => Label::Drifted,
            Some(ratio) if ratio.high <= self.most => Label::Within,
            _ => Label::Unclear,
        };
        let tokens = |of: &[Scored]| of.iter().map(|scored| scored.tokens as u64).sum();
        Some(Compared {
            texts: [slice.len(), seen.len()],
            tokens: [tokens(&slice), tokens(&seen)],
            perplexity,
            ratio,
            distance: distance(&sorted(&slice), &sorted(&seen)),
            label,
        })
    }
}

/// Mean losses of texts, the least first.
fn sorted(of: &[Scored]) -> Vec<f64> {
    let mut means: Vec<f64> = of.iter().map(|scored| scored.sum / scored.tokens).collect();
    means.sort_by(f64::total_cmp);
    means
}

/// The largest difference between the distribution functions of two sets of sorted numbers.
fn distance(one: &[f64], other: &[f64]) -> f64 {
    let share = |of: &[f64], most: f64| of.partition_point(|number| *number <= most) as f64 / of.len().max(1) as f64;
    one.iter().chain(other).map(|&at| (share(one, at) - share(other, at)).abs()).fold(0.0, f64::max)
}

impl Report {
    /// Whether anything has surely drifted.
    pub fn is_drifted(&self) -> bool {
        [&self.inputs, &self.answers].into_iter().flatten().any(|compared| compared.label == Label::Drifted)
    }

    /// As Markdown.
    pub fn markdown(&self) -> String {
        let mut page = String::from(
            "| | texts | tokens | perplexity then | now | ratio | distance | |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n",
        );
        for (name, compared) in [("inputs", &self.inputs), ("answers", &self.answers)] {
            let Some(Compared { texts, tokens, perplexity, ratio, distance, label }) = compared else { continue };
            let ratio = ratio.map_or_else(
                || "–".to_owned(),
                |found| format!("{:.3} ({:.3} to {:.3})", found.value, found.low, found.high),
            );
            let label = match label {
                Label::Drifted => "**drifted**",
                Label::Within => "within",
                Label::Unclear => "unclear",
            };
            let _ = writeln!(
                page,
                "| {name} | {}, {} | {}, {} | {:.2} | {:.2} | {ratio} | {distance:.2} | {label} |",
                texts[0], texts[1], tokens[0], tokens[1], perplexity[0], perplexity[1]
            );
        }
        let _ = writeln!(
            page,
            "\nDrifted is what is surely above a ratio of {}; intervals hold {:.0} % of the draws of texts.",
            self.most,
            100.0 * self.level
        );
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drift(most: f64) -> Drift<'static> {
        Drift {
            base: Path::new(""),
            trained: None,
            slice: PathBuf::new(),
            seen: PathBuf::new(),
            rows: None,
            max_length: 1,
            most,
            bootstrap: Bootstrap { resamples: 300, level: 0.95, seed: 1 },
        }
    }

    fn scored(means: impl IntoIterator<Item = f64>) -> Vec<Scored> {
        means.into_iter().map(|mean| Scored { sum: mean * 10.0, tokens: 10.0 }).collect()
    }

    fn spread(around: f64, count: usize) -> Vec<Scored> {
        scored((0..count).map(|index| around + (index as f64 / count as f64 - 0.5)))
    }

    #[test]
    fn the_distance_is_that_of_the_distribution_functions() {
        assert_eq!(distance(&[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0]), 0.0);
        assert_eq!(distance(&[1.0, 2.0], &[3.0, 4.0]), 1.0);
        // At 2 two thirds of the one are below and none of the other.
        assert!((distance(&[1.0, 2.0, 5.0], &[3.0, 4.0, 6.0]) - 2.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn what_is_surely_harder_has_drifted_and_few_texts_say_nothing() {
        let label = |seen: Vec<Scored>, most: f64| drift(most).compared([spread(2.0, 200), seen]).unwrap().label;
        assert_eq!(label(spread(2.0, 200), 1.2), Label::Within);
        assert_eq!(label(spread(2.5, 200), 1.2), Label::Drifted);
        assert_eq!(label(spread(2.5, 200), 2.0), Label::Within);
        assert_eq!(label(spread(2.0 + 1.2f64.ln(), 6), 1.2), Label::Unclear);
        let found = drift(1.2).compared([spread(2.0, 200), spread(2.5, 200)]).unwrap();
        let ratio = found.ratio.unwrap();
        assert!((ratio.value - 0.5f64.exp()).abs() < 1e-9 && ratio.low < ratio.value && ratio.value < ratio.high);
        assert_eq!((found.texts, found.tokens), ([200, 200], [2000, 2000]));
        // Half of the one are below all of the other: the texts are spread over 1 and stand half of that apart.
        assert!((found.distance - 0.5).abs() < 0.01, "{}", found.distance);
    }

    #[test]
    fn texts_as_hard_as_before_but_other_ones_are_far_from_them() {
        let seen = scored((0..200).map(|index| if index % 2 == 0 { 1.0 } else { 3.0 }));
        let found = drift(1.2).compared([spread(2.0, 200), seen]).unwrap();
        assert!(found.label != Label::Drifted && found.distance > 0.45, "{found:?}");
        assert_eq!(drift(1.2).compared([Vec::new(), spread(2.0, 10)]), None);
    }
}
