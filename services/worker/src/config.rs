//! What an agent is told when it is started.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use attune_proto::client::Options;

use crate::child::Program;

/// The configuration of an agent.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address of the scheduler, such as `http://127.0.0.1:7070`.
    pub scheduler: String,
    /// Who the worker is to the scheduler, and how it reaches it.
    pub connection: Options,
    /// A file that holds the token, which is read with every connection: it may be replaced while the worker runs.
    pub token_file: Option<PathBuf>,
    /// What people call the worker.
    pub name: String,
    /// Folder of its own: cache of inputs, attempts in work, its id.
    pub work_dir: PathBuf,
    /// Bytes that the cache of inputs may have; without a bound if absent. What attempts use is never removed.
    pub cache_bytes_max: Option<u64>,
    /// Number of CPU devices that it offers; each is one rank of a job.
    pub devices: u32,
    /// Number of NVIDIA devices that it offers, from the first; all that this build can work on without.
    pub cards: Option<u32>,
    /// The address of this machine by which other workers reach it, for jobs that several of them train together; the one by
    /// which it reaches the scheduler without.
    pub gang_address: Option<IpAddr>,
    /// Labels to place by.
    pub labels: BTreeMap<String, String>,
    /// The training process: given a request on its standard input, it runs one attempt.
    pub program: Program,
    /// Time that a training process has to stop at a checkpoint before it is killed.
    pub grace: Duration,
    /// Longest time for which the artifact service may be out of reach before an attempt fails.
    pub store_patience: Duration,
}

impl Config {
    /// The usual configuration of a worker that keeps its things in `work_dir` and starts `program`.
    pub fn new(scheduler: impl Into<String>, work_dir: impl Into<PathBuf>, program: Program) -> Self {
        Self {
            scheduler: scheduler.into(),
            connection: Options::default(),
            token_file: None,
            name: String::new(),
            work_dir: work_dir.into(),
            cache_bytes_max: None,
            devices: 1,
            cards: None,
            gang_address: None,
            labels: BTreeMap::new(),
            program,
            grace: Duration::from_secs(60),
            store_patience: Duration::from_secs(600),
        }
    }
}
