//! What runs of few directions keep of their base that a run of all weights gets rid of: one base, one set of data, several runs.
//!
//! The one invariant: every number of a run stands beside the base's and the reference's, of the same items, drawn at once.
//!
//! Reading order: [`groups`], [`toxicity`], [`balance`] and [`spectrum`] (what is looked at), [`verdict`] (what it
//! comes to), [`report`].
//!
//! # Paper
//! Low-rank finetuning for LLMs: A fairness perspective. Das, Romanelli, Tran, Reza, Kailkhura, Fioretto, 2024.

pub mod balance;
pub mod groups;
pub mod report;
pub mod spectrum;
pub mod toxicity;
pub mod verdict;

use std::path::{Path, PathBuf};

use attune_data::{Dataset, Encoder, Tokenizer};
use attune_spec::job::TooLong;

use self::balance::{Balance, Moved};
use self::groups::{Decision, Gaps};
use self::report::{Of, Report, Told};
use self::toxicity::{Scorer, Toxicity};
use self::verdict::{Against, Metric, judge};
use super::bootstrap::Bootstrap;
use super::measure::{Draws, Folder, Scored, Trained, Words, mean, texts};
use crate::error::Error;

/// What is looked at.
pub struct Audit<'a> {
    /// The folder of the base that all runs start from.
    pub base: &'a Path,
    /// The runs, by name, those of fewest directions first.
    pub runs: &'a [(String, Folder)],
    /// What they are held against.
    pub reference: Option<(Against, String, Folder)>,
    /// Texts like those that the runs learned, held out.
    pub target: PathBuf,
    /// Texts that the base knew and the runs were not shown.
    pub known: Option<PathBuf>,
    /// The most texts of either.
    pub rows: Option<u64>,
    /// The longest text, in tokens.
    pub max_length: u32,
    /// Decisions about people of groups.
    pub decisions: Option<Decisions>,
    /// What the models say by themselves.
    pub generations: Option<Generations<'a>>,
    /// Ranks of which is told how much of the reference's change they hold; none to leave its decompositions out.
    pub ranks: &'a [usize],
    /// The least share of the reference's reduction that a run has to recover.
    pub least: f64,
    /// How intervals are made.
    pub bootstrap: Bootstrap,
}

/// A question about somebody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What the model reads.
    pub prompt: String,
    /// The option that is right.
    pub label: String,
    /// Whom it is about.
    pub group: String,
}

/// Questions that a model answers with one of a few options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decisions {
    /// The questions.
    pub questions: Vec<Question>,
    /// What may be answered.
    pub options: Vec<String>,
    /// The option that is a yes.
    pub positive: String,
}

/// What models are made to say, and who judges it.
pub struct Generations<'a> {
    /// What is said to them.
    pub prompts: Vec<String>,
    /// How many texts each is to make of a prompt.
    pub each: u32,
    /// The most tokens of a text.
    pub max_tokens: u32,
    /// The judge.
    pub scorer: &'a dyn Scorer,
}

/// What was seen of one model.
struct Seen {
    target: Vec<Scored>,
    of_target: Of,
    of_known: Option<Of>,
    decisions: Vec<Decision>,
    /// Scores of the texts to each prompt.
    said: Vec<Vec<f64>>,
}

impl Seen {
    /// What was learned since the base against what was kept, by how likely tokens are.
    fn balance(&self, base: &Self) -> Option<Balance> {
        let moved = |base: Of, own: Of| Moved { base: (-base.loss).exp(), tuned: (-own.loss).exp() };
        Balance::of(moved(base.of_target, self.of_target), moved(base.of_known?, self.of_known?))
    }
}

impl Audit<'_> {
    /// Looks at the base, the reference and every run, one after the other; `each` hears whose turn it is.
    ///
    /// # Errors
    /// [`Error`] naming the folder, file or line at fault.
    pub fn run(&self, mut each: impl FnMut(&str)) -> Result<Report, Error> {
        let tokenizer = Tokenizer::open(self.base)?;
        let encoder = Encoder::new(tokenizer, None, self.max_length, TooLong::Truncate)?;
        let words = Words { tokenizer: encoder.tokenizer(), template: encoder.template() };
        let target = texts(&self.target, &encoder, self.rows)?;
        let known = self.known.as_deref().map(|file| texts(file, &encoder, self.rows)).transpose()?;
        let sets = (&target, known.as_ref());
        each("base");
        let base = Trained::open(self.base, None)?;
        let of_base = self.look(&base, &base, sets, &words)?;
        let mut changes = Vec::new();
        let mut reference = None;
        if let Some((against, name, folder)) = &self.reference {
            each(name);
            let trained = Trained::open(self.base, Some(folder))?;
            if !self.ranks.is_empty() {
                for (site, change_oi) in trained.changes(&base)? {
                    changes.push(spectrum::Spectrum::of(&change_oi)?.told(&site, self.ranks));
                }
            }
            reference = Some((*against, name, self.look(&trained, &base, sets, &words)?));
        }
        let mut runs = Vec::with_capacity(self.runs.len());
        for (name, folder) in self.runs {
            each(name);
            let trained = Trained::open(self.base, Some(folder))?;
            let seen = self.look(&trained, &base, sets, &words)?;
            let held = reference.as_ref().map(|(against, _, seen)| (*against, seen));
            runs.push(self.told(name, &seen, Some((&of_base, held))));
        }
        let told_reference = reference.as_ref().map(|(against, name, seen)| (*against, self.told(name, seen, None)));
        Ok(Report {
            least: self.least,
            level: self.bootstrap.level,
            resamples: self.bootstrap.resamples,
            base: self.told("base", &of_base, None),
            reference: told_reference,
            runs,
            ranks: self.ranks.to_vec(),
            changes,
        })
    }

    fn look(
        &self,
        trained: &Trained,
        base: &Trained,
        (target, known): (&Dataset, Option<&Dataset>),
        words: &Words<'_>,
    ) -> Result<Seen, Error> {
        let scored = |data: &Dataset| -> Result<(Vec<Scored>, Of), Error> {
            let (own, other) = (trained.texts(data), base.texts(data));
            let losses = trained.losses(&own)?;
            let divergence = mean(&trained.divergences(&own, base, &other)?, None).unwrap_or(0.0);
            let of = Of { loss: mean(&losses, None).unwrap_or(0.0), divergence };
            Ok((losses, of))
        };
        let (target, of_target) = scored(target)?;
        let of_known = known.map(scored).transpose()?.map(|(_, of)| of);
        let decisions = match &self.decisions {
            None => Vec::new(),
            Some(Decisions { questions, options, positive }) => {
                let prompts: Vec<&str> = questions.iter().map(|question| question.prompt.as_str()).collect();
                let said = trained.choices(words, &prompts, options)?;
                let decision = |(question, option): (&Question, usize)| Decision {
                    group: question.group.clone(),
                    truth: question.label == *positive,
                    said: options[option] == *positive,
                };
                questions.iter().zip(said).map(decision).collect()
            }
        };
        let said = match &self.generations {
            None => Vec::new(),
            Some(Generations { prompts, each, max_tokens, scorer }) => {
                let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
                let seed = self.bootstrap.seed;
                let draws = Draws { each: *each, max_tokens: *max_tokens, temperature: 1.0, seed };
                let said = trained.said(words, &prompts, draws)?;
                said.iter().map(|texts| texts.iter().map(|text| scorer.score(text)).collect()).collect()
            }
        };
        Ok(Seen { target, of_target, of_known, decisions, said })
    }

    /// What is told of a model, beside the base and what it is held against if it is a run.
    fn told(&self, name: &str, seen: &Seen, beside: Option<(&Seen, Option<(Against, &Seen)>)>) -> Told {
        let mut told = Told {
            name: name.to_owned(),
            target: seen.of_target,
            known: seen.of_known,
            gaps: (!seen.decisions.is_empty()).then(|| Gaps::of(&seen.decisions)),
            toxicity: Toxicity::of(seen.said.iter().map(Vec::as_slice)),
            balance: None,
            verdicts: Vec::new(),
        };
        let Some((base, held)) = beside else { return told };
        told.balance = seen.balance(base);
        let mut verdict = |name: &'static str, items: usize, of: &dyn Fn(&Seen, &[usize]) -> Option<f64>| {
            let metric = |seen: &'_ Seen, items: &[usize]| of(seen, items);
            let (of_base, of_run) = (|items: &[usize]| metric(base, items), |items: &[usize]| metric(seen, items));
            let of_held = held.map(|(against, held)| (against, move |items: &[usize]| metric(held, items)));
            let of_held = of_held.as_ref().map(|(against, of)| (*against, of as Metric<'_>));
            let judged = judge(&self.bootstrap, items, (&of_base, of_held, &of_run), self.least);
            told.verdicts.extend(judged.map(|verdict| (name, verdict)));
        };
        verdict("target loss", seen.target.len(), &|seen, items| mean(&seen.target, Some(items)));
        let gap = |of: fn(&Gaps) -> Option<f64>| {
            move |seen: &Seen, items: &[usize]| of(&Gaps::of(items.iter().map(|&item| &seen.decisions[item])))
        };
        let decisions = seen.decisions.len();
        verdict("accuracy gap", decisions, &gap(|gaps| gaps.accuracy));
        verdict("demographic parity", decisions, &gap(|gaps| gaps.demographic_parity));
        verdict("equalised odds", decisions, &gap(|gaps| gaps.equalised_odds));
        let toxicity = |of: fn(&Toxicity) -> f64| {
            move |seen: &Seen, items: &[usize]| {
                Toxicity::of(items.iter().map(|&item| seen.said[item].as_slice())).map(|found| of(&found))
            }
        };
        verdict("expected maximum toxicity", seen.said.len(), &toxicity(|found| found.expected_maximum));
        verdict("toxic fraction", seen.said.len(), &toxicity(|found| found.fraction));
        told
    }
}
