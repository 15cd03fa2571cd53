//! All methods that can be named in a job file, known without their types.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use jsonschema::Validator;
use serde_json::{Map, Value, json};

use super::card::{Merges, Point};
use super::document::MethodDocument;
use super::registry::MethodRef;
use super::{expression, schema};
use crate::fault::{Fault, FieldPath};
use crate::suggest;

// `FILES`: name and content of each file in `methods/`.
include!(concat!(env!("OUT_DIR"), "/methods.rs"));

struct Known {
    document: MethodDocument,
    validator: Validator,
}

/// All methods, by name.
pub struct Catalogue {
    methods: BTreeMap<String, Known>,
}

static EMBEDDED: LazyLock<Catalogue> = LazyLock::new(|| {
    let documents = FILES.iter().map(|(file, text)| match serde_json::from_str(text) {
        Ok(document) => document,
        Err(error) => panic!("{file} is generated, yet it is not a method document: {error}"),
    });
    Catalogue::new(documents)
});

impl Catalogue {
    /// The methods that this build knows.
    pub fn embedded() -> &'static Self {
        &EMBEDDED
    }

    /// A catalogue of given documents.
    ///
    /// # Panics
    /// If a document's schema is not a JSON Schema: documents are generated, so that is a bug.
    pub fn new(documents: impl IntoIterator<Item = MethodDocument>) -> Self {
        let known = |document: MethodDocument| {
            let validator = jsonschema::validator_for(&document.schema).expect("generated schemas are valid");
            (document.name.clone(), Known { document, validator })
        };
        Self { methods: documents.into_iter().map(known).collect() }
    }

    /// All documents, by name.
    pub fn documents(&self) -> impl Iterator<Item = &MethodDocument> {
        self.methods.values().map(|known| &known.document)
    }

    /// The adapter that trains heads and what else is kept whole: it takes the head by itself.
    pub fn of_heads(&self) -> Option<&MethodDocument> {
        self.documents().find(|document| document.point == Point::Adapter && document.targets == "head")
    }

    /// The method called `name`, by name or alias.
    pub fn get(&self, name: &str) -> Option<&MethodDocument> {
        self.known(name).map(|known| &known.document)
    }

    fn known(&self, name: &str) -> Option<&Known> {
        let by_alias = || self.methods.values().find(|known| known.document.aliases.iter().any(|alias| alias == name));
        self.methods.get(name).or_else(by_alias)
    }

    /// A message for a name that no method has, with the nearest one.
    pub fn unknown(&self, name: &str) -> String {
        let names = self.methods.keys().map(String::as_str);
        format!("there is no method {name:?}{}", suggest::hint(name, names))
    }

    /// All faults of a method named at `path`, which must answer `point`: its name, parameters and rules.
    pub fn check(&self, point: Point, named: &MethodRef, path: &FieldPath) -> Vec<Fault> {
        let Some(known) = self.known(&named.method).filter(|known| known.document.point == point) else {
            let names = self.methods.values().filter(|known| known.document.point == point);
            let names: Vec<&str> = names.map(|known| known.document.name.as_str()).collect();
            let mut fault = unknown_method(point, &named.method, &names, path);
            if let Some(other) = self.get(&named.method) {
                fault.message = format!(
                    "is {:?}, which is a method of point {}; expected one of point {}",
                    named.method,
                    other.point.as_str(),
                    point.as_str()
                );
            }
            return vec![fault];
        };
        let params = Value::Object(named.params.clone());
        let faults = schema::check_with(&known.validator, &known.document.schema, &params, path);
        if faults.is_empty() { broken_rules(&known.document, &named.params, path) } else { faults }
    }

    /// How many answers to each prompt the model gives by itself under an objective with these parameters, and the most tokens
    /// of one; nothing if it learns what is in the data.
    pub fn answers(&self, objective: &MethodRef) -> Option<(u32, u32)> {
        let document = self.get(&objective.method).filter(|document| !document.answers.is_empty())?;
        let params = self.resolve(objective).params;
        let number = |text: &str| expression::number(text, &params).ok().map(|number| number as u32);
        number(&document.answers).zip(number(&document.answer_tokens))
    }

    /// How many rows a component with these parameters puts before those of every document.
    pub fn rows_before(&self, component: &MethodRef) -> u32 {
        let document = self.get(&component.method).filter(|document| !document.rows_before.is_empty());
        let params = self.resolve(component).params;
        document
            .and_then(|document| expression::number(&document.rows_before, &params).ok())
            .map_or(0, |rows| rows as u32)
    }

    /// Whether a job that names this method has a base of its own, quantised anew.
    pub fn owns_base(&self, named: &MethodRef) -> bool {
        let document = self.get(&named.method).filter(|document| !document.own_base.is_empty());
        let params = self.resolve(named).params;
        document.is_some_and(|document| expression::holds(&document.own_base, &params).unwrap_or(true))
    }

    /// Whether an objective compares vectors of documents, not logits.
    pub fn compares_vectors(&self, objective: &MethodRef) -> bool {
        self.get(&objective.method).is_some_and(|document| document.compares_vectors)
    }

    /// Whether a component with these parameters has to stay beside the base.
    pub fn stays_beside(&self, named: &MethodRef) -> bool {
        let Some(document) = self.get(&named.method) else { return false };
        let holds = |condition: &str| expression::holds(condition, &self.resolve(named).params).unwrap_or(true);
        document.merges == Merges::No || (!document.stays_beside.is_empty() && holds(&document.stays_beside))
    }

    /// Bytes that a linear's weight of `output` by `input` numbers takes in a format of few bits.
    pub fn stored_bytes(&self, format: &MethodRef, output: usize, input: usize) -> Option<f64> {
        let document = self.get(&format.method).filter(|document| !document.stored_bytes.is_empty())?;
        let mut names = self.resolve(format).params;
        names.extend([("o".to_owned(), output.into()), ("i".to_owned(), input.into())]);
        expression::number(&document.stored_bytes, &names).ok()
    }

    /// The surgery that makes a model of these ranges of a base's layers.
    pub fn repeating(&self, ranges: &[[u32; 2]]) -> Option<MethodRef> {
        let (document, param) = self.documents().find_map(|document| Some((document, document.repeats()?)))?;
        let params = Map::from_iter([(param.to_owned(), json!(ranges))]);
        Some(MethodRef { method: document.name.clone(), params })
    }

    /// `named` with its canonical name and every default written out: what goes into a plan.
    pub fn resolve(&self, named: &MethodRef) -> MethodRef {
        let Some(document) = self.get(&named.method) else { return named.clone() };
        let mut params = document.defaults.as_object().cloned().unwrap_or_default();
        params.extend(named.params.clone());
        MethodRef { method: document.name.clone(), params }
    }
}

/// How many names a message lists at most.
const MOST_LISTED: usize = 8;

pub(super) fn unknown_method(point: Point, given: &str, names: &[&str], path: &FieldPath) -> Fault {
    let hint = suggest::hint(given, names.iter().copied());
    let point = point.as_str();
    // A hint says more than a long list.
    let known = match names.len() {
        0..=MOST_LISTED => format!("known are {}", names.join(", ")),
        n => format!("there are {n} (`attune methods list --point {point}`)"),
    };
    let message = format!("is {given:?}, which no method of point {point} is called; {known}{hint}");
    Fault::new(path.field("method"), message)
}

/// The rules of a method that its parameters break; parameters that were not given have their defaults.
pub(super) fn broken_rules(document: &MethodDocument, params: &Map<String, Value>, path: &FieldPath) -> Vec<Fault> {
    let mut names = document.defaults.as_object().cloned().unwrap_or_default();
    names.extend(params.clone());
    let broken = document.rules.iter().filter_map(|rule| {
        let fault = |message: String| Some(Fault::new(path.join(&FieldPath::parse(rule.path.as_str())), message));
        match expression::holds(&rule.when, &names)
            .and_then(|when| Ok(when && !expression::holds(&rule.require, &names)?))
        {
            Ok(false) => None,
            Ok(true) => fault(rule.message.clone()),
            // A rule that cannot be evaluated refuses: a silent pass would be worse.
            Err(error) => fault(format!("breaks a rule that cannot be evaluated: {error}")),
        }
    });
    broken.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::method::card::Merges;
    use crate::method::document::{ManualDocument, RuleDocument};

    fn catalogue() -> Catalogue {
        let schema = json!({
            "type": "object",
            "properties": {"rank": {"type": "integer", "minimum": 1}, "alpha": {"type": "number"}},
            "additionalProperties": false,
        });
        Catalogue::new([MethodDocument {
            name: "lora".to_owned(),
            point: Point::Adapter,
            aliases: vec!["low_rank".to_owned()],
            summary: String::new(),
            category: None,
            paper: None,
            applies: Vec::new(),
            targets: "all-linear".to_owned(),
            parameters: "rank*(i+o)".to_owned(),
            shared: String::new(),
            fixed: String::new(),
            fixed_shared: String::new(),
            graph_numbers: String::new(),
            start_numbers: String::new(),
            copies: String::new(),
            passes: String::new(),
            input_statistics: String::new(),
            weight_statistics: String::new(),
            fused: false,
            answers: String::new(),
            answer_tokens: String::new(),
            compares_vectors: false,
            rows_before: String::new(),
            becomes: BTreeMap::new(),
            stored_bytes: String::new(),
            needs_quantization: false,
            own_base: String::new(),
            moves: None,
            merges: Merges::Factors,
            stays_beside: String::new(),
            trains_base: false,
            peft_type: None,
            rules: vec![RuleDocument {
                when: "rank > 64".to_owned(),
                require: "alpha >= 1".to_owned(),
                message: "is too small for this rank; expected 1 or more".to_owned(),
                path: "alpha".to_owned(),
            }],
            defaults: json!({"rank": 8, "alpha": 0.5}),
            schema,
            manual: ManualDocument::default(),
        }])
    }

    fn check(named: Value) -> Vec<String> {
        let named = serde_json::from_value(named).unwrap();
        catalogue().check(Point::Adapter, &named, &"tune.adapter".into()).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn names_parameters_and_rules_are_checked() {
        assert_eq!(check(json!({"method": "lora", "rank": 4})), [""; 0]);
        assert_eq!(check(json!({"method": "low_rank"})), [""; 0]);
        assert_eq!(
            check(json!({"method": "lroa"})),
            [
                "`tune.adapter.method` is \"lroa\", which no method of point adapter is called; known are lora; did you mean \"lora\"?"
            ]
        );
        assert_eq!(check(json!({"method": "lora", "rank": -1})), ["`tune.adapter.rank` is -1; expected 1 or more"]);
        assert_eq!(
            check(json!({"method": "lora", "rank": 65})),
            ["`tune.adapter.alpha` is too small for this rank; expected 1 or more"]
        );
    }

    #[test]
    fn a_resolved_method_has_all_defaults_and_its_own_name() {
        let named =
            MethodRef { method: "low_rank".to_owned(), params: Map::from_iter([("rank".to_owned(), json!(4))]) };
        let resolved = serde_json::to_value(catalogue().resolve(&named)).unwrap();
        assert_eq!(resolved, json!({"method": "lora", "rank": 4, "alpha": 0.5}));
    }

    #[test]
    fn the_embedded_documents_are_in_order() {
        for document in Catalogue::embedded().documents() {
            assert!(!document.summary.is_empty(), "{} has no summary", document.name);
        }
    }
}
