//! A text that proves who somebody is, and is never shown.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Variables of the environment that hold secrets of Attune's, or say where they lie: no process that has no need of them is
/// given any.
pub const VARIABLES: [&str; 11] = [
    "ATTUNE_ADMIN_TOKEN_FILE",
    "ATTUNE_CERT",
    "ATTUNE_DATABASE",
    "ATTUNE_KEY",
    "ATTUNE_TLS_CERT",
    "ATTUNE_TLS_CLIENT_CA",
    "ATTUNE_TLS_KEY",
    "ATTUNE_TOKEN",
    "ATTUNE_TOKEN_FILE",
    "PGPASSFILE",
    "PGPASSWORD",
];

/// A secret. Its text leaves by [`expose`](Self::expose) alone: neither debugging nor an error shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

impl Secret {
    /// The secret with this text.
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// The text.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl FromStr for Secret {
    type Err = &'static str;

    /// A credential as it is sent with calls: printable ASCII without spaces. Line breaks around it, as in a file, are left out.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic()) {
            Ok(Self::new(text))
        } else {
            Err("is no token: expected printable ASCII characters without spaces")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_shown() {
        let secret: Secret = " canary-s3cret\n".parse().unwrap();
        assert_eq!(secret.expose(), "canary-s3cret");
        assert!(!format!("{secret:?} {:#?}", Some(&secret)).contains("canary"));
        for bad in ["", " \n", "two words", "sn\u{f6}", "a\u{0}b"] {
            assert!(!bad.parse::<Secret>().unwrap_err().contains(bad) || bad.trim().is_empty());
        }
    }
}
