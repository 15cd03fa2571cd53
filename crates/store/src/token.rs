//! API tokens and the ids that workers go by: who may ask for what, where, until when. No secret is stored, only its hash.

use attune_spec::id::{Digest, Name, Project};

use crate::time::UtcMs;
use crate::words::words;

words!(
    /// What a credential is for. The first three are a ladder; a worker's is beside it.
    Role {
        /// Looks.
        Viewer = "viewer",
        /// Submits and steers jobs, pushes artifacts.
        Submitter = "submitter",
        /// Deletes, gives tokens out, reads the audit log.
        Admin = "admin",
        /// Runs attempts.
        Worker = "worker",
    }
);

/// A token as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// The part of it that may be shown.
    pub id: String,
    /// The hash of its secret.
    pub hash: Digest,
    /// Whose it is. Several may have one name, as while one takes another's place.
    pub name: Name,
    /// The only project that it reaches; all if absent.
    pub project: Option<Project>,
    /// What it is for.
    pub role: Role,
    /// Who gave it out.
    pub creator: String,
    /// When.
    pub created: UtcMs,
    /// From when on it is not valid; never if absent.
    pub expires: Option<UtcMs>,
    /// Since when it is not valid any more.
    pub revoked: Option<UtcMs>,
    /// When it was last used, to the minute.
    pub used: Option<UtcMs>,
}

impl Token {
    /// Whether it may be used at a time.
    pub fn is_valid(&self, now: UtcMs) -> bool {
        self.revoked.is_none() && self.expires.is_none_or(|expires| now < expires)
    }
}
