//! One thing that is wrong with what a user wrote, and where.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A place in a job file or request, such as `tune.stack[0].rank`. The empty path is the whole document.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FieldPath(String);

impl FieldPath {
    /// The whole document.
    pub const fn root() -> Self {
        Self(String::new())
    }

    /// A path from its written form.
    pub fn parse(text: impl Into<String>) -> Self {
        let text = text.into();
        Self(if text.contains(is_hidden) { shown(&text) } else { text })
    }

    /// The field `name` inside this one.
    #[must_use]
    pub fn field(&self, name: &str) -> Self {
        if self.0.is_empty() { Self(shown(name)) } else { Self(format!("{}.{}", self.0, shown(name))) }
    }

    /// The entry `index` of this list.
    #[must_use]
    pub fn index(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }

    /// The path `inner` continued from this one.
    #[must_use]
    pub fn join(&self, inner: &Self) -> Self {
        match (self.0.is_empty(), inner.0.is_empty() || inner.0.starts_with('[')) {
            (true, _) => inner.clone(),
            (false, true) => Self(format!("{}{}", self.0, inner.0)),
            (false, false) => Self(format!("{}.{}", self.0, inner.0)),
        }
    }

    /// The written form.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether a character would steer a terminal or turn text around; others may have chosen the names of fields.
fn is_hidden(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A name with `?` for what is not shown.
fn shown(name: &str) -> String {
    name.replace(is_hidden, "?")
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "(document)" } else { &self.0 })
    }
}

impl From<&str> for FieldPath {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// One fault: where it is and what would be right. Checks collect faults; they do not stop at the first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, thiserror::Error)]
#[error("`{path}` {message}")]
pub struct Fault {
    /// The field at fault.
    pub path: FieldPath,
    /// What is wrong with the value, with the value quoted, and what would be right: `is 0; expected 1 ..= 4096`.
    /// Lower case, no full stop; reads on from the quoted path.
    pub message: String,
}

impl Fault {
    /// A fault at `path`.
    pub fn new(path: impl Into<FieldPath>, message: impl Into<String>) -> Self {
        Self { path: path.into(), message: message.into() }
    }

    /// The same fault seen from a document in which this one stands at `outer`.
    #[must_use]
    pub fn under(mut self, outer: &FieldPath) -> Self {
        self.path = outer.join(&self.path);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_written_as_in_the_job_file() {
        let path = FieldPath::root().field("tune").field("stack").index(0).field("rank");
        assert_eq!(path.as_str(), "tune.stack[0].rank");
        assert_eq!(FieldPath::from("a").join(&FieldPath::from("[1].b")).as_str(), "a[1].b");
        assert_eq!(FieldPath::root().to_string(), "(document)");
        let steering = "a\0b\u{1b}[31m\u{202e}";
        assert_eq!(FieldPath::from("labels").field(steering).as_str(), "labels.a?b?[31m?");
        assert_eq!(FieldPath::parse(steering).as_str(), "a?b?[31m?");
    }

    #[test]
    fn a_fault_reads_as_a_sentence() {
        let fault = Fault::new("rank", "is 0; expected 1 ..= 4096").under(&"tune.adapter".into());
        assert_eq!(fault.to_string(), "`tune.adapter.rank` is 0; expected 1 ..= 4096");
    }
}
