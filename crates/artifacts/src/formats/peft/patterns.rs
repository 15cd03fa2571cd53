//! Ranks and alphas that differ from module to module.

use attune_spec::{Fault, FieldPath};
use regex::{Regex, RegexBuilder};

use super::config::LoraConfig;
use crate::error::{Error, Result};

/// Compiled size that one pattern may reach; the paths of modules need a few kilobytes.
const PATTERN_BYTES_MAX: usize = 1 << 20;

/// Groups and repetitions of one pattern within each other. Compiling goes as deep: hundreds of them are more than a thread's stack holds.
const PATTERN_DEPTH_MAX: u32 = 40;

/// Rank and alpha of each module, by the patterns of a configuration: the first key (sorted, as in the file) that
/// matches the module's path or its end after a dot. As PEFT's `get_pattern_key`.
#[derive(Debug, Clone)]
pub struct Patterns {
    rank: u32,
    alpha: f64,
    use_rslora: bool,
    ranks: Vec<(Key, u32)>,
    alphas: Vec<(Key, f64)>,
}

/// A key of a pattern map. Most are whole paths or their ends, whose comparison needs no expression.
#[derive(Debug, Clone)]
struct Key {
    text: String,
    expression: Regex,
}

impl Key {
    fn matches(&self, module: &str) -> bool {
        self.text == module || self.expression.is_match(module)
    }
}

impl LoraConfig {
    /// The patterns, ready to be asked.
    ///
    /// # Errors
    /// [`Error::Refused`] naming each key that is no regular expression or too large a one.
    pub fn patterns(&self) -> Result<Patterns> {
        let mut faults = Vec::new();
        let mut compile = |field: &str, key: &str| {
            // PEFT's `re.match(rf"(.*\.)?({key})$", path)`; `$` of Python also matches before a last line break, which
            // no module path has.
            let pattern = format!(r"^(?:.*\.)?(?:{key})$");
            let built = RegexBuilder::new(&pattern).size_limit(PATTERN_BYTES_MAX).nest_limit(PATTERN_DEPTH_MAX).build();
            let fault = |reason: &str| Fault {
                path: FieldPath::root().field(field),
                message: format!("has the key {:?}, {reason}", key.chars().take(200).collect::<String>()),
            };
            match built {
                Ok(expression) => Some(Key { text: key.to_owned(), expression }),
                Err(regex::Error::CompiledTooBig(_)) => {
                    faults.push(fault("which is too large a regular expression"));
                    None
                }
                Err(_) => {
                    faults.push(fault("which is no regular expression without look-around and back-references"));
                    None
                }
            }
        };
        let ranks = self.rank_pattern.iter().filter_map(|(key, r)| Some((compile("rank_pattern", key)?, *r))).collect();
        let alphas =
            self.alpha_pattern.iter().filter_map(|(key, a)| Some((compile("alpha_pattern", key)?, *a))).collect();
        if !faults.is_empty() {
            return Err(Error::Refused { what: super::CONFIG_FILE.into(), faults });
        }
        Ok(Patterns { rank: self.r, alpha: self.lora_alpha, use_rslora: self.use_rslora, ranks, alphas })
    }
}

impl Patterns {
    /// The rank at `module`, a path such as `model.layers.0.self_attn.q_proj`.
    pub fn rank(&self, module: &str) -> u32 {
        self.ranks.iter().find(|(key, _)| key.matches(module)).map_or(self.rank, |(_, rank)| *rank)
    }

    /// The alpha at `module`.
    pub fn alpha(&self, module: &str) -> f64 {
        self.alphas.iter().find(|(key, _)| key.matches(module)).map_or(self.alpha, |(_, alpha)| *alpha)
    }

    /// The factor on `B A x` at `module`: alpha / r, or alpha / sqrt(r) with rsLoRA.
    pub fn scaling(&self, module: &str) -> f64 {
        let rank = f64::from(self.rank(module));
        let by = if self.use_rslora { rank.sqrt() } else { rank };
        self.alpha(module) / by
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn the_first_key_that_matches_an_end_of_the_path_decides() {
        let ranks = [("q_proj", 2), (r"layers\.1\.mlp\..*", 3), ("^model.layers.7.self_attn.k_proj", 5), ("proj", 9)];
        let config = LoraConfig {
            rank_pattern: ranks.map(|(key, r)| (key.to_owned(), r)).into(),
            alpha_pattern: BTreeMap::from([("q_proj".to_owned(), 32.0)]),
            ..LoraConfig::default()
        };
        let patterns = config.patterns().unwrap();
        for (module, rank, alpha, scaling) in [
            ("model.layers.0.self_attn.q_proj", 2, 32.0, 16.0),
            ("q_proj", 2, 32.0, 16.0),
            ("model.layers.0.self_attn.xq_proj", 8, 8.0, 1.0),
            ("model.layers.0.q_proj.inner", 8, 8.0, 1.0),
            ("model.layers.1.mlp.up_proj", 3, 8.0, 8.0 / 3.0),
            ("model.layers.11.mlp.up_proj", 8, 8.0, 1.0),
            ("model.layers.7.self_attn.k_proj", 5, 8.0, 1.6),
            ("x.model.layers.7.self_attn.k_proj", 8, 8.0, 1.0),
        ] {
            assert_eq!((patterns.rank(module), patterns.alpha(module)), (rank, alpha), "{module}");
            assert_eq!(patterns.scaling(module), scaling, "{module}");
        }
        let rslora = LoraConfig { use_rslora: true, r: 16, ..LoraConfig::default() }.patterns().unwrap();
        assert_eq!(rslora.scaling("a.b"), 2.0);
    }

    #[test]
    fn repetitions_of_repetitions_are_refused_before_they_fill_the_stack() {
        let of = |depth: usize| LoraConfig {
            rank_pattern: [(format!("e{}", "*".repeat(depth)), 2)].into(),
            ..LoraConfig::default()
        };
        assert!(of(20).patterns().is_ok());
        let error = of(200).patterns().unwrap_err().to_string();
        assert!(error.contains("which is no regular expression"), "{error}");
    }

    #[test]
    fn a_key_that_is_no_expression_or_a_costly_one_is_refused_by_name() {
        let config = LoraConfig {
            rank_pattern: BTreeMap::from([("a(".to_owned(), 1), ("(?=x)".to_owned(), 1)]),
            alpha_pattern: BTreeMap::from([("(a{1000}){1000}".to_owned(), 1.0)]),
            ..LoraConfig::default()
        };
        let text = config.patterns().unwrap_err().to_string();
        assert!(text.contains("`rank_pattern` has the key \"a(\", which is no regular expression"), "{text}");
        assert!(text.contains("\"(?=x)\""), "{text}");
        assert!(text.contains("`alpha_pattern` has the key \"(a{1000}){1000}\", which is too large"), "{text}");
        // Catastrophic for an engine that backtracks.
        let config = LoraConfig { rank_pattern: BTreeMap::from([("(a+)+b".to_owned(), 1)]), ..LoraConfig::default() };
        assert_eq!(config.patterns().unwrap().rank(&"a".repeat(10_000)), 8);
    }
}
