//! A name for something outside of the job file: a path, a URL, an artifact.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::{Digest, IdError, Name, Tag};

/// What a field such as `base` or `source` points at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Reference {
    /// An artifact by digest.
    Digest(Digest),
    /// An artifact by tag.
    Tag(Tag),
    /// A file or folder: `file:///data/x.jsonl`, `/data/x.jsonl`, `./x.jsonl`; the text after `file://`.
    Path(String),
    /// An object in a store, such as `s3://bucket/key`.
    Url(String),
    /// What another stage of the same recipe made: `${stages.warmup.adapter}`.
    Stage {
        /// The stage.
        stage: Name,
        /// What it is to the stage: `adapter`, `model`, `merged`.
        role: Name,
    },
}

impl Reference {
    /// Schemes of URLs that can be read.
    pub const SCHEMES: [&str; 1] = ["s3"];
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digest(digest) => digest.fmt(f),
            Self::Tag(tag) => tag.fmt(f),
            Self::Path(path) if path.starts_with('/') => write!(f, "file://{path}"),
            Self::Path(text) | Self::Url(text) => f.write_str(text),
            Self::Stage { stage, role } => write!(f, "${{stages.{stage}.{role}}}"),
        }
    }
}

impl FromStr for Reference {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        const FORM: &str = "a path that starts with / or ./, file:///…, s3://bucket/key, blake3:…, or a tag NAME:LABEL";
        let error = || IdError { what: "reference", value: text.chars().take(80).collect(), expected: FORM };
        if text.is_empty() || text.chars().any(char::is_control) {
            return Err(error());
        }
        if let Some(inner) = text.strip_prefix("${") {
            // A stage's name may have dots in it; a role has none.
            let named = inner.strip_suffix('}').and_then(|inner| inner.strip_prefix("stages.")?.rsplit_once('.'));
            let (stage, role) = named.ok_or_else(|| IdError { expected: "${stages.STAGE.adapter}", ..error() })?;
            return Ok(Self::Stage { stage: stage.parse()?, role: role.parse()? });
        }
        if text.starts_with("blake3:") {
            return Ok(Self::Digest(text.parse()?));
        }
        if let Some(path) = text.strip_prefix("file://") {
            return if path.starts_with('/') { Ok(Self::Path(path.to_owned())) } else { Err(error()) };
        }
        if let Some((scheme, rest)) = text.split_once("://") {
            let place = rest.split('/').next().unwrap_or_default();
            // A job's specification is stored and shown; what is wrong with it is told without what may be a secret.
            if place.contains('@') || rest.contains('?') {
                let expected =
                    "a URL without a user, a password or a query: credentials are the worker's, in its environment";
                return Err(IdError { value: format!("{scheme}://…"), expected, ..error() });
            }
            return if Self::SCHEMES.contains(&scheme) && !rest.is_empty() {
                Ok(Self::Url(text.to_owned()))
            } else {
                Err(error())
            };
        }
        if text.starts_with('/') || text.starts_with("./") || text.starts_with("../") {
            return Ok(Self::Path(text.to_owned()));
        }
        text.parse().map(Self::Tag).map_err(|_| error())
    }
}

impl TryFrom<String> for Reference {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> Self {
        reference.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_of_the_text_decides_what_it_names() {
        for (text, expected) in [
            ("file:///models/base", Reference::Path("/models/base".to_owned())),
            ("./data.jsonl", Reference::Path("./data.jsonl".to_owned())),
            ("s3://bucket/key", Reference::Url("s3://bucket/key".to_owned())),
            ("facts:latest", Reference::Tag("facts:latest".parse().unwrap())),
            (
                "${stages.warm.up.adapter}",
                Reference::Stage { stage: "warm.up".parse().unwrap(), role: "adapter".parse().unwrap() },
            ),
        ] {
            assert_eq!(text.parse::<Reference>().unwrap(), expected);
            assert_eq!(expected.to_string().parse::<Reference>().unwrap(), expected);
        }
        for text in [
            "",
            "file://relative",
            "ftp://x/y",
            "hf://owner/name",
            "s3://",
            "Data File",
            "a\nb",
            "blake3:12",
            "${stages.a}",
            "${a.b.c}",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn a_secret_in_a_url_is_refused_and_not_repeated() {
        for text in ["s3://key:canary@bucket/rows", "s3://canary@bucket", "s3://bucket/rows?X-Amz-Signature=canary"] {
            let refused = text.parse::<Reference>().unwrap_err().to_string();
            assert!(
                refused.contains("without a user, a password or a query") && !refused.contains("canary"),
                "{refused}"
            );
        }
        assert!("s3://bucket/a@b".parse::<Reference>().is_ok());
    }

    #[test]
    fn an_absolute_path_is_written_as_a_url() {
        assert_eq!("/a/b".parse::<Reference>().unwrap().to_string(), "file:///a/b");
    }
}
