//! Values of a file as types, with the place of each fault and the nearest known name of a field that nobody knows.
//!
//! Types of others, such as Kubernetes' own, pass over fields that they do not know: a slip of the pen would count as said. All that derives
//! `Deserialize` tells its reader which fields it has, so this reader compares, and passes on what is known.

use std::cell::RefCell;
use std::fmt;

use attune_spec::{Fault, FieldPath, suggest};
use serde::de::value::StrDeserializer;
use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, IntoDeserializer as _, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::Value;

/// So many known names are told where none is near.
const TOLD_MAX: usize = 12;

/// Reads `value`, which stands at `path`.
///
/// # Errors
/// Every field that its type does not have, and the first value that is of another form than it should be.
pub(super) fn read<'v, T: Deserialize<'v>>(value: &'v Value, path: FieldPath) -> Result<T, Vec<Fault>> {
    let faults = RefCell::default();
    let read = T::deserialize(Reader { value, path, faults: &faults });
    let mut faults = faults.into_inner();
    match read {
        Ok(read) if faults.is_empty() => return Ok(read),
        Ok(_) => {}
        Err(Wrong { place: Place::At(path), message }) => faults.push(Fault::new(path, message)),
        Err(Wrong { message, .. }) => faults.push(Fault::new("", message)),
    }
    Err(faults)
}

/// Where something is wrong, as far as those know who find it.
#[derive(Debug)]
enum Place {
    /// In the value that they read.
    Here,
    /// In a field of this name that it should have.
    Field(&'static str),
    /// There.
    At(FieldPath),
}

/// What is wrong with a value, and where.
#[derive(Debug)]
struct Wrong {
    place: Place,
    message: String,
}

impl Wrong {
    /// Found by those who read the value at `path`.
    fn at(self, path: &FieldPath) -> Self {
        let place = match self.place {
            Place::Here => path.clone(),
            Place::Field(name) => path.field(name),
            Place::At(place) => place,
        };
        Self { place: Place::At(place), ..self }
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Wrong {}

impl de::Error for Wrong {
    fn custom<M: fmt::Display>(message: M) -> Self {
        Self { place: Place::Here, message: format!("is wrong: {message}") }
    }

    fn invalid_type(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self { place: Place::Here, message: format!("is {found}; expected {expected}") }
    }

    fn missing_field(field: &'static str) -> Self {
        Self { place: Place::Field(field), message: "is missing".to_owned() }
    }
}

/// A value and where it stands.
struct Reader<'v, 'f> {
    value: &'v Value,
    path: FieldPath,
    faults: &'f RefCell<Vec<Fault>>,
}

impl<'v> Reader<'v, '_> {
    /// The fields of a mapping, those of `known` alone if there is such a list.
    fn map<V: Visitor<'v>>(self, known: Option<&[&str]>, visitor: V) -> Result<V::Value, Wrong> {
        let Value::Object(map) = self.value else { return self.single(visitor) };
        let mut rest = Vec::new();
        for (name, value) in map {
            if known.is_none_or(|known| known.contains(&name.as_str())) {
                rest.push((name, value));
            } else {
                self.faults.borrow_mut().push(unknown(name, known.unwrap_or_default(), &self.path));
            }
        }
        let fields = Fields { rest: rest.into_iter(), value: None, path: &self.path, faults: self.faults };
        visitor.visit_map(fields).map_err(|wrong| wrong.at(&self.path))
    }

    /// What is no mapping.
    fn single<V: Visitor<'v>>(self, visitor: V) -> Result<V::Value, Wrong> {
        let Self { value, path, faults } = self;
        let read = match value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
                (Some(number), ..) => visitor.visit_u64(number),
                (None, Some(number), _) => visitor.visit_i64(number),
                (None, None, number) => visitor.visit_f64(number.unwrap_or(f64::NAN)),
            },
            Value::String(text) => visitor.visit_borrowed_str(text),
            Value::Array(list) => visitor.visit_seq(Entries { rest: list.iter().enumerate(), path: &path, faults }),
            Value::Object(_) => return Reader { value, path, faults }.map(None, visitor),
        };
        read.map_err(|wrong| wrong.at(&path))
    }
}

fn unknown(name: &str, known: &[&str], path: &FieldPath) -> Fault {
    let hint = suggest::hint(name, known.iter().copied());
    let told = if hint.is_empty() && known.len() <= TOLD_MAX {
        format!("; known are {}", known.join(", "))
    } else {
        String::new()
    };
    Fault::new(path.field(name), format!("is not a known field{hint}{told}"))
}

impl<'v> Deserializer<'v> for Reader<'v, '_> {
    type Error = Wrong;

    fn deserialize_any<V: Visitor<'v>>(self, visitor: V) -> Result<V::Value, Wrong> {
        self.single(visitor)
    }

    fn deserialize_option<V: Visitor<'v>>(self, visitor: V) -> Result<V::Value, Wrong> {
        if self.value.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'v>>(self, _: &'static str, visitor: V) -> Result<V::Value, Wrong> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'v>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        self.map(Some(fields), visitor)
    }

    fn deserialize_enum<V: Visitor<'v>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        let Value::String(text) = self.value else { return self.single(visitor) };
        let word: StrDeserializer<'_, Wrong> = text.as_str().into_deserializer();
        visitor.visit_enum(word).map_err(|wrong| wrong.at(&self.path))
    }

    forward_to_deserialize_any! {
        <W: Visitor<'v>>
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

/// The fields of a mapping that are still to be read.
struct Fields<'v, 'f, I> {
    rest: I,
    value: Option<Reader<'v, 'f>>,
    path: &'f FieldPath,
    faults: &'f RefCell<Vec<Fault>>,
}

impl<'v, I: Iterator<Item = (&'v String, &'v Value)>> de::MapAccess<'v> for Fields<'v, '_, I> {
    type Error = Wrong;

    fn next_key_seed<K: DeserializeSeed<'v>>(&mut self, seed: K) -> Result<Option<K::Value>, Wrong> {
        let Some((name, value)) = self.rest.next() else { return Ok(None) };
        self.value = Some(Reader { value, path: self.path.field(name), faults: self.faults });
        let name: StrDeserializer<'_, Wrong> = name.as_str().into_deserializer();
        seed.deserialize(name).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'v>>(&mut self, seed: V) -> Result<V::Value, Wrong> {
        match self.value.take() {
            Some(value) => seed.deserialize(value),
            None => Err(de::Error::custom("a value is read before its name")),
        }
    }
}

/// The entries of a list that are still to be read.
struct Entries<'v, 'f> {
    rest: std::iter::Enumerate<std::slice::Iter<'v, Value>>,
    path: &'f FieldPath,
    faults: &'f RefCell<Vec<Fault>>,
}

impl<'v> de::SeqAccess<'v> for Entries<'v, '_> {
    type Error = Wrong;

    fn next_element_seed<T: DeserializeSeed<'v>>(&mut self, seed: T) -> Result<Option<T::Value>, Wrong> {
        let Some((index, value)) = self.rest.next() else { return Ok(None) };
        seed.deserialize(Reader { value, path: self.path.index(index), faults: self.faults }).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    #[derive(Debug, PartialEq, serde::Deserialize)]
    struct Outer {
        name: String,
        #[serde(default)]
        inner: Vec<Inner>,
        #[serde(default)]
        labels: BTreeMap<String, String>,
        count: Option<u32>,
    }

    #[derive(Debug, PartialEq, serde::Deserialize)]
    struct Inner {
        size: i64,
    }

    fn faults(value: &Value) -> Vec<String> {
        read::<Outer>(value, FieldPath::root()).unwrap_err().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_known_is_read() {
        let value = json!({"name": "a", "inner": [{"size": -1}], "labels": {"any name": "x"}, "count": null});
        let read: Outer = read(&value, FieldPath::root()).unwrap();
        let labels = BTreeMap::from([("any name".to_owned(), "x".to_owned())]);
        assert_eq!(read, Outer { name: "a".to_owned(), inner: vec![Inner { size: -1 }], labels, count: None });
    }

    #[test]
    fn every_unknown_field_is_named_with_the_nearest_and_the_first_wrong_value() {
        let value = json!({"nam": "a", "name": "b", "inner": [{"size": 1}, {"size": 2, "zzz": 3}], "count": "four"});
        let expected = [
            "`nam` is not a known field; did you mean \"name\"?",
            "`inner[1].zzz` is not a known field; known are size",
            "`count` is string \"four\"; expected u32",
        ];
        assert_eq!(faults(&value), expected);
        assert_eq!(faults(&json!({"name": "a", "inner": [{"size": 1}, {}]})), ["`inner[1].size` is missing"]);
        assert_eq!(faults(&json!({"name": 7})), ["`name` is integer `7`; expected a string"]);
        assert_eq!(faults(&json!({"name": "a", "inner": {"size": 1}})), ["`inner` is map; expected a sequence"]);
        assert_eq!(faults(&json!([1])).len(), 1);
    }
}
