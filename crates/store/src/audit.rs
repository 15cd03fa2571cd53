//! The audit log: who asked for what, and what was answered.

use attune_spec::id::Project;

use crate::time::UtcMs;

/// One call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// When it was answered.
    pub time: UtcMs,
    /// The token, or the subject of an identity provider; empty if nobody was known.
    pub caller: String,
    /// The caller's name.
    pub name: String,
    /// The address that the call came from.
    pub peer: String,
    /// The project that it was about, as far as it was understood.
    pub project: Option<Project>,
    /// What was called, `JobService/CreateJob`.
    pub rpc: String,
    /// The id that it was about; may be empty.
    pub target: String,
    /// The code that was answered, `OK` or that of a refusal.
    pub outcome: String,
}

/// A stored record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// Its number; grows, with gaps.
    pub seq: u64,
    /// What it says.
    pub record: Record,
}
