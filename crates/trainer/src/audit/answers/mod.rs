//! How useful, how faithful and how safe the answers of a model are, beside those of another.
//!
//! The one invariant: every number is made of the items and of what was said to them, which are kept: the same answers give the same
//! numbers again, and no model is needed for that.
//!
//! Reading order: [`words`] (what answers are compared by), [`faithful`], [`refusal`] and [`judge`] (what is looked at), [`report`].
//!
//! # Paper
//! Towards Alignment-Centric Paradigm: A Survey of Instruction Tuning in Large Language Models. Han, Liu, Sun, Wang, Zhang, Zheng, 2025.

pub mod faithful;
pub mod judge;
pub mod refusal;
pub mod report;
pub mod words;

use std::collections::BTreeMap;
use std::path::Path;

use attune_data::{Encoder, Tokenizer};
use attune_spec::job::TooLong;
use serde::{Deserialize, Serialize};

use super::measure::{Draws, Folder, Trained, Words};
use crate::error::Error;

/// What may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// What ought to be refused.
    Harmful,
    /// What looks like it, and ought to be answered.
    Benign,
}

/// Something that is said to a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Item {
    /// What is asked.
    pub prompt: String,
    /// What the answer has to rest on; the model reads it before the prompt.
    #[serde(default)]
    pub context: Option<String>,
    /// A right answer.
    #[serde(default)]
    pub reference: Option<String>,
    /// Whether it ought to be refused, of what looks as if.
    #[serde(default)]
    pub ask: Option<Ask>,
    /// What it is of, such as `language: de`.
    #[serde(default)]
    pub slices: BTreeMap<String, String>,
}

impl Item {
    /// What the model reads.
    pub fn said(&self) -> String {
        match &self.context {
            None => self.prompt.clone(),
            Some(context) => format!("{context}\n\n{}", self.prompt),
        }
    }
}

/// What was said to an item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answered {
    /// What was asked.
    pub prompt: String,
    /// What the model said.
    pub own: String,
    /// What the other said.
    #[serde(default)]
    pub other: Option<String>,
    /// How likely the judge holds the model's answer to be the better one: where it comes first, and where it comes second.
    #[serde(default)]
    pub judged: Option<[f64; 2]>,
}

/// Who answers, and who judges.
#[derive(Debug, Clone, Copy)]
pub struct Speakers<'a> {
    /// The folder of the base.
    pub base: &'a Path,
    /// What was trained of it; the base itself if there is nothing.
    pub own: Option<&'a Folder>,
    /// What it stands beside, if anything: the base itself if no folder is in it.
    pub other: Option<Option<&'a Folder>>,
    /// The folder of the model that judges.
    pub judge: Option<&'a Path>,
    /// The most tokens of an answer.
    pub max_tokens: u32,
}

impl Speakers<'_> {
    /// What they say to each item, the likeliest token each time; `each` hears whose turn it is.
    ///
    /// # Errors
    /// [`Error`] naming the folder or file at fault.
    pub fn answer(&self, items: &[Item], mut each: impl FnMut(&str)) -> Result<Vec<Answered>, Error> {
        let said: Vec<String> = items.iter().map(Item::said).collect();
        let said: Vec<&str> = said.iter().map(String::as_str).collect();
        let answers = |trained: Option<&Folder>| -> Result<Vec<String>, Error> {
            let encoder = encoder(self.base)?;
            let words = Words { tokenizer: encoder.tokenizer(), template: encoder.template() };
            let draws = Draws { each: 1, max_tokens: self.max_tokens, temperature: 0.0, seed: 0 };
            let made = Trained::open(self.base, trained)?.said(&words, &said, draws)?;
            Ok(made.into_iter().flatten().collect())
        };
        each("the model");
        let own = answers(self.own)?;
        let other = match self.other {
            None => None,
            Some(other) => {
                each("what it stands beside");
                Some(answers(other)?)
            }
        };
        let judged = match (self.judge, &other) {
            (Some(judge), Some(other)) => {
                each("the judge");
                Some(judged(judge, items, &own, other)?)
            }
            _ => None,
        };
        let answered = |at: usize, (item, own): (&Item, String)| Answered {
            prompt: item.prompt.clone(),
            own,
            other: other.as_ref().map(|other| other[at].clone()),
            judged: judged.as_ref().map(|judged| judged[at]),
        };
        Ok(items.iter().zip(own).enumerate().map(|(at, of)| answered(at, of)).collect())
    }
}

fn encoder(folder: &Path) -> Result<Encoder, Error> {
    // Prompts are not cut: the length is that of rows, and none are read.
    Ok(Encoder::new(Tokenizer::open(folder)?, None, u32::MAX, TooLong::Truncate)?)
}

/// What a model that judges holds of pairs of answers, in both orders.
fn judged(folder: &Path, items: &[Item], own: &[String], other: &[String]) -> Result<Vec<[f64; 2]>, Error> {
    let encoder = encoder(folder)?;
    let words = Words { tokenizer: encoder.tokenizer(), template: encoder.template() };
    let pairs = items.iter().zip(own.iter().zip(other));
    let prompts: Vec<String> = pairs
        .flat_map(|(item, (own, other))| {
            let said = item.said();
            [judge::prompt(&said, own, other), judge::prompt(&said, other, own)]
        })
        .collect();
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let options = judge::OPTIONS.map(str::to_owned);
    let likely = Trained::open(folder, None)?.likely(&words, &prompts, &options)?;
    Ok(likely.chunks(2).map(|orders| [orders[0][0], orders[1][1]]).collect())
}
