//! The command line of a worker that an engine starts.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use attune_scheduler_core::supply::{Pool, REQUEST_LABEL, RequestId};

/// A command line as a shell would read it, for people: no shell sees it.
pub(super) fn shown<'a>(words: impl IntoIterator<Item = &'a OsStr>) -> String {
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./:=@,%+".contains(letter);
    let quoted = |word: &OsStr| {
        let word = word.to_string_lossy();
        let is_plain = !word.is_empty() && word.chars().all(is_plain);
        if is_plain { word.into_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
    };
    words.into_iter().map(quoted).collect::<Vec<_>>().join(" ") + "\n"
}

/// How workers of a pool are started. Secrets are named by their files and never written out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Launch {
    /// Attune's program, where the worker runs.
    pub(super) program: PathBuf,
    /// The address of the scheduler, as the worker reaches it.
    pub(super) server: String,
    /// The file of the worker's token.
    pub(super) token_file: Option<PathBuf>,
    /// Certificates of the authorities that vouch for the server.
    pub(super) ca: Option<PathBuf>,
    /// The worker's certificate and its key.
    pub(super) identity: Option<(PathBuf, PathBuf)>,
    /// How long attempts have to stop at a checkpoint.
    pub(super) grace: Duration,
}

impl Launch {
    /// The arguments of a worker of `pool` that keeps its things in `work_dir`.
    pub(super) fn arguments(&self, pool: &Pool, request: &RequestId, work_dir: &Path) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["worker".into()];
        let mut add = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        add("--server", self.server.clone().into());
        add("--name", format!("{}-{request}", pool.name).into());
        add("--work-dir", work_dir.into());
        add("--devices", pool.devices.n_cpu.to_string().into());
        add("--cards", pool.devices.n_cuda.to_string().into());
        add("--grace", self.grace.as_secs().to_string().into());
        add("--label", format!("{REQUEST_LABEL}={request}").into());
        for (name, value) in &pool.labels {
            add("--label", format!("{name}={value}").into());
        }
        let (cert, key) = self.identity.clone().unzip();
        for (name, file) in [("--token-file", &self.token_file), ("--ca", &self.ca), ("--cert", &cert), ("--key", &key)]
        {
            if let Some(file) = file {
                add(name, file.into());
            }
        }
        arguments
    }
}
