//! Where an artifact comes from. [`Causes`] are part of its name; the [`CommitRecord`] tells how the run went and stands
//! beside it, so that a run that was killed and resumed ends with the same artifact as one that ran undisturbed.

use std::collections::BTreeMap;

use attune_spec::Fault;
use attune_spec::id::{Digest, Epoch, JobId, Tokens, WorkerId};
use serde::{Deserialize, Serialize};

/// Most inputs of one artifact.
pub const INPUTS_MAX: usize = 4096;

/// What an artifact was made from and by: everything that its bytes depend on, nothing that differs between two runs of
/// the same plan. A file or folder that somebody pushed has no causes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Causes {
    /// Version of the code that made it, such as `attune 0.1.0 (1a2b3c4)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code_version: Option<String>,
    /// Input artifacts by role, such as `base`, `data.packages`, `adapter.0`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inputs: BTreeMap<String, Digest>,
    /// The instruction set and library versions that its floats came from, chosen at the first attempt and kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_profile: Option<String>,
    /// Number of logical shards that gradients were summed over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logical_shards: Option<u32>,
    /// Digest of the resolved plan's canonical JSON ([`crate::canonical::digest`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Digest>,
}

impl Causes {
    /// Every fault of untrusted causes, with paths below `causes`.
    pub fn check(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        if self.inputs.len() > INPUTS_MAX {
            faults.push(Fault::new(
                "inputs",
                format!("has {} entries; at most {INPUTS_MAX} are allowed", self.inputs.len()),
            ));
        }
        for role in self.inputs.keys().filter(|role| !is_role(role)).take(16) {
            let shown: String = role.chars().take(40).collect();
            faults.push(Fault::new(
                "inputs",
                format!("has the role {shown:?}; expected 1 to 128 of a-z, 0-9, '.', '_' and '-'"),
            ));
        }
        for (field, text) in [("code_version", &self.code_version), ("kernel_profile", &self.kernel_profile)] {
            let Some(text) = text else { continue };
            if text.is_empty() || text.len() > 256 || !text.bytes().all(|b| b == b' ' || b.is_ascii_graphic()) {
                let shown: String = text.chars().take(40).collect();
                faults.push(Fault::new(field, format!("is {shown:?}; expected 1 to 256 printable ASCII characters")));
            }
        }
        if self.logical_shards == Some(0) {
            faults.push(Fault::new("logical_shards", "is 0; expected at least 1"));
        }
        faults
    }
}

fn is_role(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-'))
}

/// How the run that made an artifact went: a row beside the artifact, not part of its name. An artifact that was pushed
/// has none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CommitRecord {
    /// The job.
    pub job: JobId,
    /// The attempt, by its fencing token; compared in the transaction that makes the artifact visible.
    pub epoch: Epoch,
    /// The worker that the attempt ran on.
    pub worker: WorkerId,
    /// When the attempt started, milliseconds since 1970 in UTC by the worker's clock. Shown, never decided on.
    pub started_ms: i64,
    /// When the artifact was handed in, milliseconds since 1970 in UTC by the worker's clock.
    pub finished_ms: i64,
    /// Tokens that were trained on, over all attempts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Tokens>,
    /// Training speed of this attempt, without loading and evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Largest resident memory of the attempt's process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory_bytes: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_faults_of_causes_come_at_once() {
        let causes = Causes {
            code_version: Some("attune\u{1b}[31m".into()),
            inputs: BTreeMap::from([("../base".into(), Digest::from_bytes([1; 32]))]),
            kernel_profile: Some(String::new()),
            logical_shards: Some(0),
            plan: None,
        };
        let paths: Vec<_> = causes.check().iter().map(|fault| fault.path.to_string()).collect();
        assert_eq!(paths, ["inputs", "code_version", "kernel_profile", "logical_shards"]);
        assert!(Causes::default().check().is_empty());
    }
}
