//! Reading fields of an untrusted JSON object: every fault is kept, with its path, and none stops the reading.

use attune_spec::{Fault, FieldPath};
use serde_json::{Map, Value};

/// One JSON object, the path to it, and the faults found so far.
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    at: FieldPath,
    pub(crate) faults: Vec<Fault>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(object: &'a Map<String, Value>, at: FieldPath) -> Self {
        Self { object, at, faults: Vec::new() }
    }

    pub(crate) fn fault(&mut self, name: &str, message: impl Into<String>) {
        self.faults.push(Fault { path: self.at.field(name), message: message.into() });
    }

    /// The value of a field; none when it is missing or null.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// Whether the field is there, be it null.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.object.contains_key(name)
    }

    fn refuse(&mut self, name: &str, value: &Value, expected: &str) {
        self.fault(name, format!("is {}; expected {expected}", quote(value)));
    }

    /// A whole number in `1 ..= max`, or none.
    pub(crate) fn count(&mut self, name: &str, max: u64) -> Option<u64> {
        let value = self.get(name)?;
        match whole(value) {
            Some(n) if (1..=max).contains(&n) => Some(n),
            _ => {
                self.refuse(name, value, &format!("a whole number in 1 ..= {max}"));
                None
            }
        }
    }

    /// A whole number in `1 ..= max` that has to be there; 1 stands in for it after a fault.
    pub(crate) fn required(&mut self, name: &str, max: u64) -> u64 {
        if self.get(name).is_none() {
            self.fault(name, format!("is missing; expected a whole number in 1 ..= {max}"));
            return 1;
        }
        self.count(name, max).unwrap_or(1)
    }

    /// A finite number in `min ..= max`, or none.
    pub(crate) fn number(&mut self, name: &str, min: f64, max: f64) -> Option<f64> {
        let value = self.get(name)?;
        match value.as_f64() {
            Some(x) if x >= min && x <= max => Some(x),
            _ => {
                self.refuse(name, value, &format!("a number in {min} ..= {max}"));
                None
            }
        }
    }

    pub(crate) fn flag(&mut self, name: &str) -> Option<bool> {
        let value = self.get(name)?;
        let flag = value.as_bool();
        if flag.is_none() {
            self.refuse(name, value, "true or false");
        }
        flag
    }

    pub(crate) fn text(&mut self, name: &str) -> Option<&'a str> {
        let value = self.get(name)?;
        let text = value.as_str();
        if text.is_none() {
            self.refuse(name, value, "a text");
        }
        text
    }

    pub(crate) fn object(&mut self, name: &str) -> Option<&'a Map<String, Value>> {
        let value = self.get(name)?;
        let object = value.as_object();
        if object.is_none() {
            self.refuse(name, value, "an object");
        }
        object
    }

    /// Token ids below `vocab`: one number or a list of them. `missing` when the field is not there at all.
    pub(crate) fn tokens(&mut self, name: &str, vocab: u64, missing: Option<u32>) -> Vec<u32> {
        if !self.has(name) {
            return missing.filter(|&id| u64::from(id) < vocab).into_iter().collect();
        }
        let Some(value) = self.get(name) else { return Vec::new() };
        let list = value.as_array().map_or_else(|| std::slice::from_ref(value), Vec::as_slice);
        let ids: Option<Vec<u32>> =
            list.iter().map(|id| whole(id).filter(|id| *id < vocab).and_then(|id| u32::try_from(id).ok())).collect();
        ids.unwrap_or_else(|| {
            self.refuse(name, value, &format!("a token id below the vocabulary's {vocab}, or a list of them"));
            Vec::new()
        })
    }
}

/// A number without a fractional part, also when it is written `8.0`.
fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        // 2^53: above it an f64 no longer says which whole number was meant.
        value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..=9_007_199_254_740_992.0).contains(x)).map(|x| x as u64)
    })
}

/// A value as it was written, cut to 80 characters.
pub(crate) fn quote(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}
