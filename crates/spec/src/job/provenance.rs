//! Where rows come from, and how many of each class a job may learn from.
//!
//! # Paper
//! Towards Alignment-Centric Paradigm: A Survey of Instruction Tuning in Large Language Models. Han, Liu, Sun, Wang, Zhang, Zheng, 2025.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A class of rows, by where they come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProvenanceClass {
    /// People wrote them.
    Expert,
    /// Another model wrote them.
    Distilled,
    /// An earlier state of the model wrote them.
    SelfImproved,
}

/// Where the rows of a domain come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(deny_unknown_fields)]
pub struct Provenance {
    /// Their class.
    pub class: ProvenanceClass,
    /// The model that wrote them, of distilled ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// The round in which they were written, from 1 on, of self-improved ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub round: Option<u32>,
    /// What was kept of them, of self-improved ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
}

impl Provenance {
    /// What is missing for its class, or does not go with it: fields, and why each is wrong.
    pub(crate) fn faults(&self) -> Vec<(&'static str, String)> {
        let name = self.class.name();
        let fields = [
            ("teacher", self.teacher.is_some(), self.class == ProvenanceClass::Distilled, true),
            ("round", self.round.is_some(), self.class == ProvenanceClass::SelfImproved, true),
            ("filter", self.filter.is_some(), self.class == ProvenanceClass::SelfImproved, false),
        ];
        let fault = |(field, is_given, belongs, is_due): (&'static str, bool, bool, bool)| match (is_given, belongs) {
            (true, false) => Some((field, format!("is given, and rows of the class {name} have none"))),
            (false, true) if is_due => Some((field, format!("is missing: rows of the class {name} have it"))),
            _ => None,
        };
        fields.into_iter().filter_map(fault).collect()
    }
}

impl ProvenanceClass {
    /// Its name in a job file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Expert => "expert",
            Self::Distilled => "distilled",
            Self::SelfImproved => "self_improved",
        }
    }
}
