//! `resources:`, `limits:` and `outputs:` — where to run, when to give up, what to keep.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{Name, Tag};

/// What a job computes on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// Whatever is free first.
    #[default]
    Any,
    /// Processor cores.
    Cpu,
    /// An NVIDIA device.
    Cuda,
}

/// Where to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub struct Resources {
    /// Workers that train the job together, each its share of every batch: the result is that of one.
    #[schemars(range(min = 1, max = 64))]
    pub workers: u32,
    /// Devices on each worker; each is one rank of data-parallel training.
    #[schemars(range(min = 1, max = 64))]
    pub devices_per_worker: u32,
    /// The kind of device.
    pub device: Device,
    /// Whether the job may run in one process with others of its project that train adapters on the same base, in the same
    /// precision with the same products, on the same kind of device: they hold the base in memory once. What it learns is bit for bit what it
    /// learns alone. The job then waits a moment in the queue for others.
    pub share_base: bool,
    /// Labels that each of its workers has to have, with these values.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(with = "BTreeMap<String, String>")]
    pub labels: BTreeMap<String, String>,
}

impl Default for Resources {
    fn default() -> Self {
        Self { workers: 1, devices_per_worker: 1, device: Device::Any, share_base: false, labels: BTreeMap::new() }
    }
}

/// When to give up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub struct Limits {
    /// Attempts before the job fails; a preempted or paused attempt does not count.
    #[schemars(range(min = 1, max = 1000))]
    pub max_attempts: u32,
    /// Seconds without a finished step after which an attempt counts as hung and is killed.
    #[schemars(range(min = 1, max = 604_800))]
    pub stall_seconds: u64,
    /// Seconds that the job may run, all attempts together; it is then cancelled, and its last checkpoint stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub run_seconds: Option<u64>,
    /// The time by which it has to be done, in RFC 3339 (`2026-12-31T18:00:00Z`); what has not ended by then is cancelled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<String>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_attempts: 3, stall_seconds: 600, run_seconds: None, deadline: None }
    }
}

impl Limits {
    /// The deadline in milliseconds since 1970, if there is one.
    ///
    /// # Errors
    /// What is wrong with its text.
    pub fn deadline_ms(&self) -> Result<Option<i64>, String> {
        let Some(text) = &self.deadline else { return Ok(None) };
        match text.parse::<jiff::Timestamp>() {
            Ok(time) => Ok(Some(time.as_millisecond())),
            Err(_) => Err(format!("is {text:?}; expected a time with its offset, as 2026-12-31T18:00:00Z")),
        }
    }
}

/// The weights that an adapter is merged into which was trained on a base in few bits. The merged model has whole numbers: rounded to
/// few bits again it would lose much of what was learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MergedInto {
    /// Those of the base's folder.
    Base,
    /// Those that the adapter was trained beside: what was held in few bits, widened. The merged model computes what the job did.
    Dequantized,
}

/// What a validation set has to come to after the last step. All that is given counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub struct Bounds {
    /// The loss at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1e6))]
    pub loss: Option<f64>,
    /// The loss at most, as a multiple of that before the first step: below 1 for what is to be learned, a little above it for what is not
    /// to be forgotten.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1e6))]
    pub of_before: Option<f64>,
    /// The share of what is found at least, where the model gives classes or vectors.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub accuracy: Option<f64>,
    /// The mean reward of the likeliest answers at least, where the model learns from what its answers are worth: these have no loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -1e6, max = 1e6))]
    pub reward: Option<f64>,
}

/// What to keep.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub struct Outputs {
    /// A tag that moves to the result.
    #[schemars(with = "Option<String>")]
    pub tag: Option<Tag>,
    /// Whether a plain model folder with the adapter merged in is made as well.
    pub merged: bool,
    /// Into which weights, where `tune.quantization` holds those of the base in few bits; has to be said there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub merged_into: Option<MergedInto>,
    /// A tag that moves to the merged model.
    #[schemars(with = "Option<String>")]
    pub merged_tag: Option<Tag>,
    /// Whether what the components measured of the base before they started is kept, for other jobs' `tune.statistics`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub statistics: bool,
    /// What validation sets have to come to, by their names. The job fails where one does not: nothing is kept, no tag moves, and jobs that
    /// come after it do not run.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(with = "BTreeMap<String, Bounds>")]
    pub gate: BTreeMap<Name, Bounds>,
}
