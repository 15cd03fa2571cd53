//! Artifacts as the control plane knows them: a row makes one visible; its bytes are elsewhere.

use attune_spec::id::{Digest, Epoch, JobId, Project, Tag};
use serde_json::Value;

use crate::job::Order;
use crate::time::UtcMs;

/// A file of an artifact.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct File {
    /// Its path within the artifact.
    pub path: String,
    /// The digest of its bytes.
    pub blob: Digest,
    /// Its size.
    pub size_bytes: u64,
}

/// What an artifact was made from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cause {
    /// What it was used as.
    pub role: String,
    /// The artifact that was used.
    pub digest: Digest,
}

/// The attempt that made an artifact: compared with the job's current epoch before the artifact becomes visible.
#[derive(Debug, Clone, PartialEq)]
pub struct Maker {
    /// The job.
    pub job: JobId,
    /// The attempt's fencing token.
    pub epoch: Epoch,
    /// Facts of the run that are not in the digest: worker, speeds, sizes.
    pub record: Value,
}

/// An artifact whose bytes are all stored and verified, to be made visible.
#[derive(Debug, Clone)]
pub struct NewArtifact {
    /// Its project.
    pub project: Project,
    /// The digest of its manifest.
    pub digest: Digest,
    /// `model`, `adapter`, `dataset`, `checkpoint`, …
    pub kind: String,
    /// Bytes of all files together.
    pub size_bytes: u64,
    /// Its files.
    pub files: Vec<File>,
    /// Its inputs.
    pub causes: Vec<Cause>,
    /// The attempt that made it; absent when a person pushed it.
    pub maker: Option<Maker>,
    /// Tags to move to it.
    pub tags: Vec<Tag>,
    /// When.
    pub now: UtcMs,
}

/// A visible artifact.
#[derive(Debug, Clone, PartialEq)]
pub struct Artifact {
    /// Its project.
    pub project: Project,
    /// The digest of its manifest.
    pub digest: Digest,
    /// Its kind.
    pub kind: String,
    /// Bytes of all files together.
    pub size_bytes: u64,
    /// When it first became visible.
    pub created: UtcMs,
    /// Number of its files.
    pub n_files: u64,
    /// Tags that point at it, sorted.
    pub tags: Vec<Tag>,
    /// The attempts that made it, oldest first; none when a person pushed it.
    pub commits: Vec<Commit>,
}

/// That an attempt made an artifact.
#[derive(Debug, Clone, PartialEq)]
pub struct Commit {
    /// Who.
    pub maker: Maker,
    /// When.
    pub time: UtcMs,
}

/// Which artifacts to list. Empty fields do not filter.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Any of these kinds.
    pub kinds: Vec<String>,
    /// None of these kinds.
    pub without_kinds: Vec<String>,
    /// Made by this job.
    pub job: Option<JobId>,
    /// With a tag of this name (any label).
    pub tag_name: Option<String>,
    /// The order of the list.
    pub order: Order,
}

/// Which way to follow lineage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// What it was made from.
    Causes,
    /// What was made from it.
    Effects,
}

/// One edge of the lineage graph.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Edge {
    /// Steps from the artifact that was asked about; its own edges are at 1.
    pub depth: u32,
    /// The artifact that was made.
    pub artifact: Digest,
    /// What the cause was used as.
    pub role: String,
    /// The artifact that was used; it may have been deleted since.
    pub cause: Digest,
}

/// Edges that were found from an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lineage {
    /// The edges, nearest first.
    pub edges: Vec<Edge>,
    /// Whether there are more beyond the depth or the size that was asked for.
    pub is_cut: bool,
}

/// What a deletion left behind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Deleted {
    /// Blobs that no artifact of the project refers to any more, sorted.
    pub orphans: Vec<Digest>,
    /// Tags that pointed at it and are gone.
    pub tags: Vec<Tag>,
}

/// Old checkpoints that are gone.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pruned {
    /// Their digests.
    pub artifacts: Vec<Digest>,
    /// Blobs that no artifact of the project refers to any more.
    pub orphans: Vec<Digest>,
}
