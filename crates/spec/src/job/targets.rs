//! Which sites a slot adapts, as people write it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Sites by name. Each entry is `all-linear` (every linear but heads and routers), `all` (every site), `head` (the linears of the
/// head, whatever they are called), a module name or the end of a path on whole components (`q_proj`, `self_attn.q_proj`), a full path, or a pattern with `*` that must match the
/// full path (`model.layers.1*.mlp.*`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Targets {
    /// One entry.
    One(String),
    /// Several entries; a site that any of them names is meant.
    Many(Vec<String>),
}

impl Targets {
    /// The entries in the order written.
    pub fn entries(&self) -> &[String] {
        match self {
            Self::One(entry) => std::slice::from_ref(entry),
            Self::Many(entries) => entries,
        }
    }
}

impl From<&str> for Targets {
    fn from(entry: &str) -> Self {
        Self::One(entry.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_a_text_or_a_list_in_files() {
        let many = Targets::Many(vec!["q_proj".to_owned(), "v_proj".to_owned()]);
        for (json, targets) in [("\"all-linear\"", Targets::from("all-linear")), ("[\"q_proj\",\"v_proj\"]", many)] {
            assert_eq!(serde_json::from_str::<Targets>(json).unwrap(), targets);
            assert_eq!(serde_json::to_string(&targets).unwrap(), json);
        }
        assert!(serde_json::from_str::<Targets>("{\"a\": 1}").is_err());
    }
}
