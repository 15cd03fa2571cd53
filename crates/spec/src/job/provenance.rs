//! Where rows come from, and how many of each class a job may learn from.
//!
//! # Paper
//! Towards Alignment-Centric Paradigm: A Survey of Instruction Tuning in Large Language Models. Han, Liu, Sun, Wang, Zhang, Zheng, 2025.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::data::{DataSpec, DomainSpec};
use crate::fault::{Fault, FieldPath};

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
    fn faults(&self) -> Vec<(&'static str, String)> {
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

/// A cap is of rows that the job has, and all of them together leave room for every document.
pub(super) fn check(data: &DataSpec, faults: &mut Vec<Fault>) {
    let path = FieldPath::from("data").field("caps");
    let class = |domain: &DomainSpec| domain.provenance.as_ref().map(|provenance| provenance.class);
    for (index, domain) in data.domains.iter().enumerate() {
        let path = FieldPath::from("data").field("domains").index(index).field("provenance");
        let found = domain.provenance.iter().flat_map(Provenance::faults);
        faults.extend(found.map(|(field, message)| Fault::new(path.field(field), message)));
    }
    for (of, share) in &data.caps {
        if !(*share > 0.0 && *share <= 1.0) {
            let message = format!("is {share}; expected a share of the documents above 0, and 1 at most");
            faults.push(Fault::new(path.field(of.name()), message));
        }
        if !data.domains.iter().any(|domain| class(domain) == Some(*of)) {
            let message =
                format!("bounds rows of which the job has none: no domain has `provenance.class: {}`", of.name());
            faults.push(Fault::new(path.field(of.name()), message));
        }
    }
    let drawn = data.domains.iter().filter(|domain| domain.weight > 0.0);
    let classes: BTreeSet<Option<ProvenanceClass>> = drawn.map(class).collect();
    let room = |class: &Option<ProvenanceClass>| class.and_then(|class| data.caps.get(&class)).copied().unwrap_or(1.0);
    let all: f64 = classes.iter().map(room).sum();
    if !data.caps.is_empty() && !classes.is_empty() && all < 1.0 - 1e-9 {
        let message =
            format!("leave room for {all} of the documents; expected 1 or more, or a domain that none is about");
        faults.push(Fault::new(path, message));
    }
}
