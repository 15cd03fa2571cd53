//! Rank and scaling of a pair of factors, as PEFT's LoRA configures them: for all sites, and for single ones.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::RangeInclusive;

use attune_artifacts::formats::peft::LoraConfig;
use attune_points::adapter::{Peft, PeftTensors};
use attune_spec::Fault;
use serde_json::{Map, Value, json};

use crate::parts::keys::Keys;

/// Which rank a site has, and what the product of its factors is multiplied with.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scaling {
    pub(crate) rank: u32,
    pub(crate) alpha: f64,
    /// By the root of the rank.
    pub(crate) rslora: bool,
    /// Ranks at single sites, by whole path.
    pub(crate) ranks: BTreeMap<String, u32>,
    /// Alphas at single sites, by whole path.
    pub(crate) alphas: BTreeMap<String, f64>,
}

impl Scaling {
    /// What is wrong with the values of single sites; a schema sees to the others.
    pub(crate) fn faults(&self) -> Vec<Fault> {
        let ranks = Self::faults_of("rank_pattern", &self.ranks, 1..=4096);
        ranks.into_iter().chain(Self::faults_of("alpha_pattern", &self.alphas, 0.0..=1e6)).collect()
    }

    /// The values of single sites that are out of range.
    pub(crate) fn faults_of<T: PartialOrd + Display>(
        field: &str,
        values: &BTreeMap<String, T>,
        range: RangeInclusive<T>,
    ) -> Vec<Fault> {
        let (start, end) = (range.start(), range.end());
        let out = values.iter().filter(|(_, value)| !range.contains(*value));
        out.map(|(site, value)| Fault::new(field, format!("has {value} for {site:?}; expected {start} to {end}")))
            .collect()
    }

    /// The rank of a site.
    pub(crate) fn rank_at(&self, site: &str) -> u32 {
        self.ranks.get(site).copied().unwrap_or(self.rank)
    }

    /// The factor on the product at most sites.
    pub(crate) fn factor(&self) -> f64 {
        self.of(self.rank, self.alpha)
    }

    fn of(&self, rank: u32, alpha: f64) -> f64 {
        let rank = f64::from(rank);
        alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// What `make` makes of the factor on the product of each site that has one of its own.
    pub(crate) fn own<T>(&self, make: impl Fn(f64) -> T) -> BTreeMap<String, T> {
        let factor = |site: &str| self.of(self.rank_at(site), self.alphas.get(site).copied().unwrap_or(self.alpha));
        self.ranks.keys().chain(self.alphas.keys()).map(|site| (site.clone(), make(factor(site)))).collect()
    }

    /// PEFT's configuration of it.
    pub(crate) fn lora_config(&self) -> LoraConfig {
        LoraConfig {
            r: self.rank,
            lora_alpha: self.alpha,
            use_rslora: self.rslora,
            rank_pattern: self.ranks.clone(),
            alpha_pattern: self.alphas.clone(),
            ..LoraConfig::default()
        }
    }
}

/// An adapter in PEFT's layout by its configuration and the spelling of its tensors.
pub(crate) fn peft(config: &LoraConfig, tensors: Vec<(&'static str, &'static str)>) -> Peft {
    let config = serde_json::to_value(config).ok().and_then(|value| value.as_object().cloned()).unwrap_or_default();
    Peft { config, tensors: PeftTensors::Each(tensors) }
}

/// PEFT's configuration and the parameters that say the same of rank and scaling at these modules. What it asks for beyond
/// plain LoRA, but for the key `honoured`, is refused.
pub(crate) fn from_peft(
    config: &Map<String, Value>,
    modules: &[String],
    honoured: Option<&str>,
) -> Result<(LoraConfig, Map<String, Value>), Vec<Fault>> {
    let text = Value::Object(config.clone()).to_string();
    let config = LoraConfig::parse(text.as_bytes()).map_err(|error| vec![Fault::new("", error.to_string())])?;
    let mut beyond = config.beyond_plain();
    beyond.retain(|fault| honoured.is_none_or(|key| fault.path.to_string() != key));
    if !beyond.is_empty() {
        return Err(beyond);
    }
    let mut params = resolved(&config, modules)?;
    params.insert("rslora".to_owned(), json!(config.use_rslora));
    Ok((config, params))
}

/// The same of another method's configuration, which spells them `spelt`: the numerator, and those of single modules. What is
/// not there is as in `defaults`, rank and numerator.
pub(crate) fn from_keys(
    keys: &mut Keys<'_>,
    defaults: (u32, f64),
    spelt: [&str; 2],
    modules: &[String],
) -> Map<String, Value> {
    let config = LoraConfig {
        r: keys.get("r", defaults.0),
        lora_alpha: keys.get(spelt[0], defaults.1),
        rank_pattern: keys.get("rank_pattern", BTreeMap::new()),
        alpha_pattern: keys.get(spelt[1], BTreeMap::new()),
        ..LoraConfig::default()
    };
    resolved(&config, modules).unwrap_or_else(|faults| {
        faults.into_iter().for_each(|fault| keys.fault("rank_pattern", fault.message));
        Map::new()
    })
}

/// The parameters that say what a configuration does of rank and alpha at these modules.
fn resolved(config: &LoraConfig, modules: &[String]) -> Result<Map<String, Value>, Vec<Fault>> {
    let patterns = config.patterns().map_err(|error| vec![Fault::new("", error.to_string())])?;
    let mut params =
        Map::from_iter([("rank".to_owned(), json!(config.r)), ("alpha".to_owned(), json!(config.lora_alpha))]);
    let ranks = modules.iter().map(|module| (module, patterns.rank(module))).filter(|(_, rank)| *rank != config.r);
    let ranks: BTreeMap<&String, u32> = ranks.collect();
    let alphas = modules.iter().map(|module| (module, patterns.alpha(module)));
    let alphas: BTreeMap<&String, f64> = alphas.filter(|(_, alpha)| *alpha != config.lora_alpha).collect();
    if !ranks.is_empty() {
        params.insert("rank_pattern".to_owned(), json!(ranks));
    }
    if !alphas.is_empty() {
        params.insert("alpha_pattern".to_owned(), json!(alphas));
    }
    Ok(params)
}
