//! Identifiers and counters: small types that cannot be mixed up.
//!
//! Names that people choose (projects, tags, workers) pass one allow-list, so that they are safe in file paths, object
//! keys, URLs and log lines without escaping.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value:?} is not valid: expected {expected}")]
pub struct IdError {
    /// What was to be read, such as `tag name`.
    pub what: &'static str,
    /// The text as given, cut to 80 characters.
    pub value: String,
    /// The form that would have been accepted.
    pub expected: &'static str,
}

impl IdError {
    fn new(what: &'static str, value: &str, expected: &'static str) -> Self {
        Self { what, value: value.chars().take(80).collect(), expected }
    }
}

const NAME_FORM: &str = "1 to 63 of a-z, 0-9, '.', '_' and '-', starting and ending with a letter or digit";

/// Lower-case letters, digits, `.`, `_`, `-`; no leading or trailing punctuation, no `..`; at most 63 bytes.
fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=63).contains(&bytes.len())
        && bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
        && bytes.iter().all(|b| alphanumeric(b) || matches!(b, b'.' | b'_' | b'-'))
        && !text.contains("..")
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// Checks `text` against the allow-list for names.
            ///
            /// # Errors
            /// [`IdError`] with the accepted form.
            pub fn new(text: impl Into<String>) -> Result<Self, IdError> {
                let text = text.into();
                if is_name(&text) { Ok(Self(text)) } else { Err(IdError::new($what, &text, NAME_FORM)) }
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $type {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $type {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0
            }
        }
    };
}

name!(
    /// The tenant; part of every key, resource name and row.
    Project, "project"
);
name!(
    /// A job, unique within its project; the server makes it sortable by creation time.
    JobId, "job id"
);
name!(
    /// A node agent.
    WorkerId, "worker id"
);
name!(
    /// A named part of a data mixture, or a slot of an adapter stack.
    Name, "name"
);

impl Default for Project {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

const TAG_FORM: &str = "NAME or NAME:LABEL, each 1 to 63 of a-z, 0-9, '.', '_' and '-'";

/// A movable name for an artifact, `support-bot:latest`; the label is `latest` when it is left out.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tag {
    name: Name,
    label: Name,
}

impl Tag {
    /// The part before the colon.
    pub fn name(&self) -> &str {
        self.name.as_str()
    }

    /// The part after the colon.
    pub fn label(&self) -> &str {
        self.label.as_str()
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, self.label)
    }
}

impl FromStr for Tag {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let (name, label) = text.split_once(':').unwrap_or((text, "latest"));
        match (Name::new(name), Name::new(label)) {
            (Ok(name), Ok(label)) => Ok(Self { name, label }),
            _ => Err(IdError::new("tag", text, TAG_FORM)),
        }
    }
}

impl TryFrom<String> for Tag {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<Tag> for String {
    fn from(tag: Tag) -> Self {
        tag.to_string()
    }
}

/// The BLAKE3 digest of some bytes, written `blake3:` and 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

const DIGEST_PREFIX: &str = "blake3:";
const DIGEST_FORM: &str = "'blake3:' and 64 hexadecimal digits in lower case";

impl Digest {
    /// Wraps the 32 bytes of a BLAKE3 hash.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the hash.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hexadecimal digits, without the prefix.
    pub fn hex(&self) -> String {
        use fmt::Write as _;
        self.0.iter().fold(String::with_capacity(64), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    /// The first twelve digits, for tables that people read.
    pub fn short(&self) -> String {
        let mut hex = self.hex();
        hex.truncate(12);
        hex
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{DIGEST_PREFIX}{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{DIGEST_PREFIX}{}", self.short())
    }
}

impl FromStr for Digest {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let error = || IdError::new("digest", text, DIGEST_FORM);
        let hex = text.strip_prefix(DIGEST_PREFIX).ok_or_else(error)?.as_bytes();
        if hex.len() != 64 {
            return Err(error());
        }
        let value = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = value(pair[0]).zip(value(pair[1])).map(|(high, low)| high << 4 | low).ok_or_else(error)?;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Digest {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

macro_rules! counter {
    ($(#[$doc:meta])* $type:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
            schemars::JsonSchema,
        )]
        #[serde(transparent)]
        pub struct $type(pub $inner);

        impl $type {
            /// The next value.
            ///
            /// # Panics
            /// When the counter is at its largest value, which no run reaches.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.checked_add(1).expect("a counter does not reach its largest value"))
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter!(
    /// The fencing token of an attempt: grows by one whenever a job is granted, and never goes back. 0 is "never granted".
    Epoch(u64)
);
counter!(
    /// Position of an event in its project's log; the first event is 1.
    Seq(u64)
);
counter!(
    /// Number of optimiser steps done; a fresh run is at 0.
    Step(u64)
);
counter!(
    /// A number of tokens.
    Tokens(u64)
);
counter!(
    /// A cohort: the attempts that one gang of processes runs over one base. Unique in a control plane.
    CohortId(u64)
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_pass_the_allow_list_only() {
        for good in ["a", "default", "support-bot", "v1.2_x", "0"] {
            assert_eq!(Project::new(good).unwrap().as_str(), good);
        }
        let long = "a".repeat(64);
        for bad in ["", "A", "a/b", "..", "a..b", "-a", "a-", "a b", "ä", "a\n", "%2e", &long] {
            assert!(Project::new(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_tag_without_label_is_latest() {
        let tag: Tag = "support-bot".parse().unwrap();
        assert_eq!(tag.to_string(), "support-bot:latest");
        assert_eq!("support-bot:v2".parse::<Tag>().unwrap().label(), "v2");
        assert!("a:b:c".parse::<Tag>().is_err());
    }

    #[test]
    fn a_digest_round_trips_and_refuses_other_forms() {
        let digest = Digest::from_bytes(std::array::from_fn(|i| i as u8 * 7));
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        for bad in ["blake3:", "sha256:00", &digest.hex(), &digest.to_string().to_uppercase()] {
            assert!(bad.parse::<Digest>().is_err(), "{bad} was accepted");
        }
        assert!(digest.to_string().replace('0', "é").parse::<Digest>().is_err());
    }
}
