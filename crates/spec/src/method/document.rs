//! A method as it travels: card, schema and defaults, as written in `methods/<name>.json`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::card::{Category, LAYERS, Merges, Point, SiteKind};

/// Where a method was published (the travelling form of [`super::Paper`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PaperDocument {
    /// The title.
    pub title: String,
    /// The first authors.
    pub authors: String,
    /// The year.
    pub year: u16,
}

/// A condition between fields (the travelling form of [`super::Rule`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleDocument {
    /// When the rule applies.
    pub when: String,
    /// What must hold then.
    pub require: String,
    /// What is wrong and what would be right.
    pub message: String,
    /// The field at fault, relative to the method.
    pub path: String,
}

/// What the head of a method's file says of it: Markdown whose only marks are fences around formulas and `` `names` ``.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManualDocument {
    /// Its equations.
    pub update: String,
    /// What the letters in them stand for.
    pub symbols: String,
    /// What it takes beside the base: time, memory, parameters.
    pub cost: String,
    /// Where it cannot be used, or is no use.
    pub limits: String,
    /// What differs from its paper or from other implementations.
    pub departures: String,
}

/// Everything about a method that leaves its file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MethodDocument {
    /// Its name in job files.
    pub name: String,
    /// The point that it answers.
    pub point: Point,
    /// Other spellings.
    pub aliases: Vec<String>,
    /// What it does and when one would choose it.
    pub summary: String,
    /// How it tunes a model; nothing where nothing is tuned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub category: Option<Category>,
    /// Where it was published.
    pub paper: Option<PaperDocument>,
    /// The kinds of sites that it can be put on.
    pub applies: Vec<SiteKind>,
    /// The sites of a slot that names none.
    pub targets: String,
    /// Trainable parameters per site, as an expression.
    pub parameters: String,
    /// Trainable parameters that all its sites share, as an expression; empty for none.
    pub shared: String,
    /// Numbers that it has per site and does not train, as an expression; empty for none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub fixed: String,
    /// Numbers that all its sites share and that do not train, as an expression over their largest widths; empty for none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub fixed_shared: String,
    /// Numbers that its graph at a linear holds at once for a pass of `rows`, as an expression; empty for as many as most hold.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub graph_numbers: String,
    /// Numbers that it holds for a linear before the first step and not later, as an expression; empty for few.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub start_numbers: String,
    /// How many times the largest pass of a step rule holds a micro-batch, as an expression; empty for once.
    pub copies: String,
    /// How many passes over a step's batch a step rule makes, as an expression; empty for one.
    pub passes: String,
    /// Bytes that what it has measured of a linear's inputs takes before the first step, as an expression; linears that read the same
    /// rows count once. Empty for nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub input_statistics: String,
    /// Bytes that what it has measured of a linear's weight takes before the first step, as an expression; empty for nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub weight_statistics: String,
    /// Whether it takes part within the products of a pass, where others run by graphs of their own.
    #[serde(default, skip_serializing_if = "is_false")]
    pub fused: bool,
    /// How many answers to each prompt the model gives by itself, as an expression; empty if it learns what is in the data.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub answers: String,
    /// The most tokens of such an answer, as an expression.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub answer_tokens: String,
    /// Whether it compares vectors of documents, not logits.
    #[serde(default, skip_serializing_if = "is_false")]
    pub compares_vectors: bool,
    /// Rows that it puts before those of every document, as an expression; empty for none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rows_before: String,
    /// What it makes of a model's sizes, by their names, as expressions; those that it does not name stay.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub becomes: BTreeMap<String, String>,
    /// Bytes that a linear's weight takes in a format of few bits, as an expression; empty for points that are no format.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stored_bytes: String,
    /// Whether it is for bases that are held in few bits, and no others.
    #[serde(default, skip_serializing_if = "is_false")]
    pub needs_quantization: bool,
    /// When a job with it has a base of its own, quantised anew, as a condition; empty for never.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub own_base: String,
    /// Why a model with it does not start as the base, if it does not.
    pub moves: Option<String>,
    /// Whether it can be merged.
    pub merges: Merges,
    /// When it cannot although others of its kind can, as a condition; empty for never.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stays_beside: String,
    /// Whether it trains the base's own weights, so that its result is a whole model.
    pub trains_base: bool,
    /// `peft_type` in PEFT's layout.
    pub peft_type: Option<String>,
    /// Conditions between fields.
    pub rules: Vec<RuleDocument>,
    /// Default parameters.
    pub defaults: Value,
    /// JSON Schema of the parameters.
    pub schema: Value,
    /// What its file says of it; empty until the description is written.
    #[serde(default)]
    pub manual: ManualDocument,
}

impl MethodDocument {
    /// Puts a card, a schema and defaults together.
    pub(super) fn new(card: &super::Card, schema: Value, defaults: Value) -> Self {
        let own = |text: &&str| (*text).to_owned();
        Self {
            name: card.name.to_owned(),
            point: card.point,
            aliases: card.aliases.iter().map(own).collect(),
            summary: card.summary.to_owned(),
            category: card.category,
            paper: card.paper.map(|paper| PaperDocument {
                title: paper.title.to_owned(),
                authors: paper.authors.to_owned(),
                year: paper.year,
            }),
            applies: card.applies.to_vec(),
            targets: card.targets.to_owned(),
            parameters: card.parameters.to_owned(),
            shared: card.shared.to_owned(),
            fixed: card.fixed.to_owned(),
            fixed_shared: card.fixed_shared.to_owned(),
            graph_numbers: card.graph_numbers.to_owned(),
            start_numbers: card.start_numbers.to_owned(),
            copies: card.copies.to_owned(),
            passes: card.passes.to_owned(),
            input_statistics: card.input_statistics.to_owned(),
            weight_statistics: card.weight_statistics.to_owned(),
            fused: card.fused,
            answers: card.answers.to_owned(),
            answer_tokens: card.answer_tokens.to_owned(),
            compares_vectors: card.compares_vectors,
            rows_before: card.rows_before.to_owned(),
            becomes: card.becomes.iter().map(|(size, text)| (own(size), own(text))).collect(),
            stored_bytes: card.stored_bytes.to_owned(),
            needs_quantization: card.needs_quantization,
            own_base: card.own_base.to_owned(),
            moves: card.moves.map(str::to_owned),
            merges: card.merges,
            stays_beside: card.stays_beside.to_owned(),
            trains_base: card.trains_base,
            peft_type: card.peft_type.as_ref().map(own),
            rules: card
                .rules
                .iter()
                .map(|rule| RuleDocument {
                    when: rule.when.to_owned(),
                    require: rule.require.to_owned(),
                    message: rule.message.to_owned(),
                    path: rule.path.to_owned(),
                })
                .collect(),
            defaults,
            schema,
            manual: ManualDocument::default(),
        }
    }

    /// Of a surgery that repeats layers and leaves all else as it is, the parameter that lists them. Components can be put on what it
    /// makes: where their folders are PEFT's of LoRA, they can say so.
    pub fn repeats(&self) -> Option<&str> {
        self.becomes.get(LAYERS).filter(|_| self.becomes.len() == 1).map(String::as_str)
    }

    /// Whether folders of its components can say that the base's layers are repeated.
    pub fn says_repeats(&self) -> bool {
        self.peft_type.as_deref() == Some("LORA")
    }

    /// Whether it works where linears of the base are held in few bits; nothing, if the question does not apply to its point. Such
    /// weights are read and multiplied with, by their widened numbers, and never change: who trains them, or makes others of
    /// them, has to have a base of whole numbers.
    pub fn on_quantized(&self) -> Option<bool> {
        match self.point {
            Point::Adapter => Some(!self.trains_base),
            Point::Init | Point::Budget | Point::Quantization => Some(true),
            Point::Surgery => Some(self.repeats().is_some()),
            Point::Objective
            | Point::Reward
            | Point::Mixing
            | Point::StepRule
            | Point::Optimizer
            | Point::Schedule
            | Point::Recipe
            | Point::Search
            | Point::Merge => None,
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_false(value: &bool) -> bool {
    !*value
}
