//! `data:` — what to learn from.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::provenance::{self, Provenance, ProvenanceClass};
use super::reference::Reference;
use crate::fault::{Fault, FieldPath};
use crate::id::Name;
use crate::method::MethodRef;

/// How a row is to be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// `messages: [{role, content}, …]`, rendered by the model's chat template; assistant turns are learned.
    Chat,
    /// `prompt` and `completion`; the completion is learned.
    PromptCompletion,
    /// `instruction`, optional `input`, `output`; the output is learned.
    Alpaca,
    /// `text`; every token is learned.
    Text,
    /// `chosen` and `rejected`, two answers to one optional `prompt`: texts, or messages.
    Preference,
    /// `text`, with `text_pair` where two texts belong together, and their class as `label`: for `tune.head`.
    Classification,
    /// `tokens`, which are words, and as many classes as `tags` or `ner_tags`: for `tune.head`.
    TokenClassification,
    /// `query` or `anchor`, a text, and what belongs to it as `positive`; where there are texts that do not although they look like it,
    /// those as `negative`: for a `tune.head` that gives vectors.
    Retrieval,
}

impl Form {
    /// Its name in a job file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::PromptCompletion => "prompt_completion",
            Self::Alpaca => "alpaca",
            Self::Text => "text",
            Self::Preference => "preference",
            Self::Classification => "classification",
            Self::TokenClassification => "token_classification",
            Self::Retrieval => "retrieval",
        }
    }
}

/// What happens to a row that cannot be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRow {
    /// The job fails and names file and line.
    #[default]
    Fail,
    /// The row is left out, counted and reported.
    Skip,
}

/// What happens to a document of more than `max_length` tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TooLong {
    /// Its end is cut off; counted and reported.
    #[default]
    Truncate,
    /// It is a bad row: see `on_bad_row`.
    Refuse,
}

/// A named part of the training mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(deny_unknown_fields)]
pub struct DomainSpec {
    /// Its name in metrics and reports.
    #[schemars(with = "String")]
    pub name: Name,
    /// A JSONL, CSV or Parquet file: a path, a URL, an artifact digest or a tag.
    #[schemars(with = "String")]
    pub source: Reference,
    /// Its share in the mixture, relative to the other domains.
    #[serde(default = "one")]
    #[schemars(range(min = 0))]
    pub weight: f64,
    /// How rows are to be understood; recognised from the columns when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub form: Option<Form>,
    /// Only the first rows are learned from; all of them when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub rows: Option<u64>,
    /// Where the rows come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provenance: Option<Provenance>,
}

/// A validation set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(deny_unknown_fields)]
pub struct ValidationSpec {
    /// Its name in metrics and reports.
    #[schemars(with = "String")]
    pub name: Name,
    /// A JSONL, CSV or Parquet file.
    #[schemars(with = "String")]
    pub source: Reference,
    /// How rows are to be understood; recognised from the columns when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub form: Option<Form>,
    /// Only the first rows count; all of them when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub rows: Option<u64>,
}

/// What to learn from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(deny_unknown_fields)]
pub struct DataSpec {
    /// The parts of the mixture.
    #[schemars(length(min = 1, max = 1000))]
    pub domains: Vec<DomainSpec>,
    /// The most that documents of a class may be of all that are drawn, whatever the mixture says.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub caps: BTreeMap<ProvenanceClass, f64>,
    /// Which domain the next document comes from.
    #[serde(default = "static_mixing")]
    pub mixing: MethodRef,
    /// Sets on which the loss is measured before, during and after training.
    #[serde(default)]
    pub validation: Vec<ValidationSpec>,
    /// The longest document, in tokens.
    #[serde(default = "max_length")]
    #[schemars(range(min = 2, max = 1_048_576))]
    pub max_length: u32,
    /// What happens to longer documents.
    #[serde(default)]
    pub too_long: TooLong,
    /// What happens to rows that cannot be used.
    #[serde(default)]
    pub on_bad_row: OnBadRow,
    /// A chat template in place of the model's own: `chatml`, or the text of a Jinja template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
}

const fn one() -> f64 {
    1.0
}

const fn max_length() -> u32 {
    1024
}

fn static_mixing() -> MethodRef {
    MethodRef::named("static")
}

/// Names are unique, something is drawn, and classes of rows are as they can be.
pub(super) fn check(spec: &DataSpec, faults: &mut Vec<Fault>) {
    let data = FieldPath::from("data");
    let mut check = |list: &str, names: Vec<String>| {
        let mut seen = BTreeSet::new();
        for (index, name) in names.into_iter().enumerate() {
            if !seen.insert(name.clone()) {
                let path = data.field(list).index(index).field("name");
                faults.push(Fault::new(path, format!("is {name:?} for the second time; give each its own")));
            }
        }
    };
    check("domains", spec.domains.iter().map(|domain| domain.name.to_string()).collect());
    check("validation", spec.validation.iter().map(|set| set.name.to_string()).collect());
    if spec.domains.iter().all(|domain| domain.weight == 0.0) {
        faults.push(Fault::new("data.domains", "all have weight 0; expected one above"));
    }
    provenance::check(spec, faults);
}
