//! Lists of methods: one static list per point, everything else derived from it.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::card::{Card, Point};
use super::document::MethodDocument;
use super::{catalogue, schema};
use crate::fault::{Fault, FieldPath};
use crate::id::{Name, Step};

/// A method named in a job file, with its parameters: `{method: lora, rank: 16}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MethodRef {
    /// The method's name or an alias of it.
    pub method: String,
    /// Its parameters as they were written.
    #[serde(flatten)]
    pub params: Map<String, Value>,
}

impl MethodRef {
    /// A method with its default parameters.
    pub fn named(method: &str) -> Self {
        Self { method: method.to_owned(), params: Map::new() }
    }
}

// A hand-written schema: `flatten` over a map would otherwise lose the requirement on `method`.
impl schemars::JsonSchema for MethodRef {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "MethodRef".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "object",
            "properties": { "method": { "type": "string", "description": "A method's name." } },
            "required": ["method"],
            "additionalProperties": true,
        })
    }
}

/// What a method may know when it is built, beside its parameters.
#[derive(Debug, Clone, Copy)]
pub struct BuildCx<'a> {
    /// The number of optimiser steps of the run.
    pub steps: Step,
    /// The domains of the mixture and the weights that the job file gives them.
    pub domains: &'a [(Name, f64)],
    /// What texts are made of, where the base's tokeniser is at hand.
    pub words: Option<&'a dyn Words>,
}

/// Makes tokens of a text, as those that a model reads.
pub trait Words: std::fmt::Debug + Sync {
    /// The tokens, with those that every text begins with.
    ///
    /// # Errors
    /// Why the text has none.
    fn tokens(&self, text: &str) -> Result<Vec<u32>, String>;
}

/// A method: a card, typed parameters, and how to make the object that answers its point.
pub trait Method: 'static {
    /// What the method says about itself.
    const CARD: Card;
    /// Its parameters. `Default` holds the paper's values; unknown fields are refused; ranges stand in the schema.
    type Config: Default + Serialize + DeserializeOwned + schemars::JsonSchema;
    /// The trait object of its point.
    type Object: ?Sized + 'static;

    /// Makes the object from checked parameters.
    ///
    /// # Errors
    /// Faults with paths relative to the method, where only building shows them.
    fn build(config: Self::Config, cx: &BuildCx<'_>) -> Result<Box<Self::Object>, Vec<Fault>>;
}

type Build<O> = fn(Map<String, Value>, &BuildCx<'_>) -> Result<Box<O>, Vec<Fault>>;

/// One line of a list: a method with its types erased.
pub struct Entry<O: ?Sized + 'static> {
    card: Card,
    schema: fn() -> Value,
    defaults: fn() -> Value,
    build: Build<O>,
}

/// The line of a list for method `M`.
pub const fn entry<M: Method>() -> Entry<M::Object> {
    Entry { card: M::CARD, schema: schema_of::<M::Config>, defaults: defaults_of::<M>, build: build_of::<M> }
}

fn schema_of<C: schemars::JsonSchema>() -> Value {
    let mut schema = schemars::schema_for!(C).to_value();
    if let Some(object) = schema.as_object_mut() {
        object.remove("$schema");
    }
    schema
}

fn defaults_of<M: Method>() -> Value {
    serde_json::to_value(M::Config::default()).unwrap_or(Value::Null)
}

fn build_of<M: Method>(params: Map<String, Value>, cx: &BuildCx<'_>) -> Result<Box<M::Object>, Vec<Fault>> {
    let config = serde_path_to_error::deserialize(Value::Object(params))
        .map_err(|error| vec![Fault::new(error.path().to_string().trim_matches('.'), error.inner().to_string())])?;
    M::build(config, cx)
}

/// All methods of one point. The list is the only place, beside a method's own file, that knows of it.
pub struct Registry<O: ?Sized + 'static> {
    point: Point,
    entries: &'static [Entry<O>],
}

impl<O: ?Sized + 'static> Registry<O> {
    /// The list of a point.
    pub const fn new(point: Point, entries: &'static [Entry<O>]) -> Self {
        Self { point, entries }
    }

    /// The cards, in the order of the list.
    pub fn cards(&self) -> impl Iterator<Item = &'static Card> {
        let entries: &'static [Entry<O>] = self.entries;
        entries.iter().map(|entry| &entry.card)
    }

    /// Card, schema and defaults of every method.
    pub fn documents(&self) -> impl Iterator<Item = MethodDocument> {
        self.entries.iter().map(|entry| MethodDocument::new(&entry.card, (entry.schema)(), (entry.defaults)()))
    }

    /// The card of the method called `name`, by name or alias.
    pub fn card(&self, name: &str) -> Option<&'static Card> {
        self.cards().find(|card| card.name == name || card.aliases.contains(&name))
    }

    /// Checks the parameters of `named` and builds its object; `path` is where it stands in the job file.
    ///
    /// # Errors
    /// All faults, with full paths.
    pub fn build(&self, named: &MethodRef, path: &FieldPath, cx: &BuildCx<'_>) -> Result<Box<O>, Vec<Fault>> {
        let found = self
            .entries
            .iter()
            .find(|entry| entry.card.name == named.method || entry.card.aliases.contains(&named.method.as_str()));
        let Some(entry) = found else {
            let names: Vec<&str> = self.cards().map(|card| card.name).collect();
            return Err(vec![catalogue::unknown_method(self.point, &named.method, &names, path)]);
        };
        let params = Value::Object(named.params.clone());
        let mut faults = schema::check(&(entry.schema)(), &params, path);
        if faults.is_empty() {
            let document = MethodDocument::new(&entry.card, Value::Null, (entry.defaults)());
            faults = catalogue::broken_rules(&document, &named.params, path);
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        (entry.build)(named.params.clone(), cx)
            .map_err(|faults| faults.into_iter().map(|fault| fault.under(path)).collect())
    }
}
