//! What a scheduler is told when it starts.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use attune_proto::Secret;
use attune_scheduler_core::{Backoff, Settings};
use attune_store::Database;

use crate::guard::Oidc;
use crate::providers::WorkerPool;

/// Where a scheduler keeps things and how patient it is.
#[derive(Debug, Clone)]
pub struct Config {
    /// The database: a file of SQLite, made with its folder when absent, or a server of PostgreSQL. Of several schedulers on
    /// one server one leads.
    pub database: Database,
    /// Where artifacts are: a folder (made when absent), `file:///folder`, `s3://bucket/prefix` or `memory://`.
    pub artifacts: String,
    /// The folder under which job files may name paths of this machine; none may when it is absent.
    pub data_root: Option<PathBuf>,
    /// How long things may take.
    pub timings: Timings,
    /// How much is taken.
    pub limits: Limits,
    /// Whether callers are asked who they are.
    pub auth: Auth,
    /// How connections are encrypted; they are in the clear if absent.
    pub tls: Option<Tls>,
    /// The URL at which other schedulers reach this one; that of the address at which it listens if absent.
    pub advertise: Option<String>,
    /// What connections to the scheduler that leads are made with, while this one follows.
    pub peers: attune_proto::client::Tls,
    /// Workers that engines are asked for; their names differ.
    pub pools: Vec<WorkerPool>,
}

/// How connections are encrypted: files of PEM, which may be renewed while the scheduler runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// The server's certificate with its chain.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Certificates of the authorities that must vouch for every client; clients show none if absent.
    pub client_ca: Option<PathBuf>,
}

/// Whether callers are asked who they are.
#[derive(Debug, Clone, Default)]
pub enum Auth {
    /// Nobody is: whoever reaches the port may do everything.
    #[default]
    Open,
    /// Every call but those about health carries a token.
    Tokens(Tokens),
}

/// How the first tokens come about.
#[derive(Debug, Clone, Default)]
pub struct Tokens {
    /// The file of the first admin's token. One that lies there is taken in; if there is none, and no token that could give out
    /// others, one is made and written there for its owner's eyes alone.
    pub admin_file: Option<PathBuf>,
    /// The token of workers of this process; it is stored nowhere.
    pub local_worker: Option<Secret>,
    /// An identity provider whose tokens are believed as well.
    pub oidc: Option<Oidc>,
}

impl Tokens {
    /// The same with a new token for workers of this process.
    #[must_use]
    pub fn with_local_worker(self) -> (Self, Secret) {
        let secret = crate::guard::mint().whole;
        (Self { local_worker: Some(secret.clone()), ..self }, secret)
    }
}

/// How often somebody may call, where callers are asked who they are. What is beyond is answered with a time to come again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallLimits {
    /// Calls of one credential a second, in the long run.
    pub calls_per_second: u32,
    /// Calls of one credential at once.
    pub calls_at_once: u32,
    /// Failed proofs from one address a second, in the long run.
    pub failures_per_second: u32,
    /// Failed proofs from one address at once.
    pub failures_at_once: u32,
}

impl Default for CallLimits {
    /// 200 calls a second and 1000 at once; 2 failures a second and 20 at once.
    fn default() -> Self {
        Self { calls_per_second: 200, calls_at_once: 1000, failures_per_second: 2, failures_at_once: 20 }
    }
}

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timings {
    /// How long a lease lasts without a heartbeat.
    pub lease_ttl: Duration,
    /// How often workers are asked to send one; a third of the lease where this is longer.
    pub heartbeat_interval: Duration,
    /// How long a worker lets an attempt write its checkpoint before it kills it; two thirds of `stop_limit` where this is
    /// longer.
    pub stop_grace: Duration,
    /// After how long a job that was asked to stop counts as stopped.
    pub stop_limit: Duration,
    /// The longest wait after the first failed attempt; doubles with each further one.
    pub backoff_base: Duration,
    /// The longest wait after any failed attempt.
    pub backoff_cap: Duration,
    /// How long a queued job that may share a process waits for others to share it with.
    pub lane_wait: Duration,
    /// How long running calls may go on when the scheduler is asked to end.
    pub shutdown_grace: Duration,
    /// How often the scheduler looks for what nobody needs any more.
    pub housekeeping: Duration,
    /// How long a blob that nothing refers to stays where a push may have left it half way, and may go on.
    pub orphan_grace: Duration,
    /// How long the events of a job are kept after its end, but for the last ones; for ever if absent.
    pub events_kept: Option<Duration>,
    /// How long records of the audit log are kept; for ever if absent.
    pub audit_kept: Option<Duration>,
    /// How long a new connection may take to say what it wants: its first bytes, its handshake, the registration of a worker.
    pub greeting_limit: Duration,
    /// How often the files of certificates are looked at.
    pub certificates: Duration,
    /// How long a call may take that is one question and one answer, and how long the next part of a push may take to come.
    pub call_limit: Duration,
}

impl Default for Timings {
    /// Leases of 10 s with heartbeats every 3 s, 30 s to stop, waits of 2 s to 5 min, 2 s to gather lanes, 10 s to end; a look for what
    /// nobody needs every hour, a day for pushes, events and the audit log for ever; 10 s to say what one wants, as long between looks at certificates, and 2 min for a
    /// call.
    fn default() -> Self {
        let backoff = Backoff::default();
        Self {
            lease_ttl: Duration::from_secs(10),
            heartbeat_interval: Duration::from_secs(3),
            stop_grace: Duration::from_secs(30),
            stop_limit: Duration::from_secs(45),
            backoff_base: backoff.base,
            backoff_cap: backoff.cap,
            lane_wait: Settings::default().lane_wait,
            shutdown_grace: Duration::from_secs(10),
            housekeeping: Duration::from_secs(60 * 60),
            orphan_grace: Duration::from_secs(24 * 60 * 60),
            events_kept: None,
            audit_kept: None,
            greeting_limit: Duration::from_secs(10),
            certificates: Duration::from_secs(10),
            call_limit: Duration::from_secs(120),
        }
    }
}

/// How much is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Workers that may be connected at once.
    pub workers: usize,
    /// Requests that may wait for the scheduler's core at once; more of them wait in their connections.
    pub waiting_requests: usize,
    /// Messages that may wait for one worker; one that does not take them is disconnected.
    pub waiting_messages: usize,
    /// After how many distinct lost workers, without progress between them, a job is given up.
    pub lost_workers: u32,
    /// The most jobs that share a process.
    pub lanes: NonZeroU32,
    /// Whether jobs of a lower priority are preempted for those of a higher one.
    pub preempts: bool,
    /// Finished jobs that are kept in memory, so that late messages about them are understood.
    pub finished_jobs: usize,
    /// Bytes of one artifact.
    pub artifact_bytes: u64,
    /// Connections that may stand at once, half of them from one address.
    pub connections: usize,
    /// How often one caller may call.
    pub calls: CallLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            workers: 10_000,
            waiting_requests: 1024,
            waiting_messages: 1024,
            lost_workers: Settings::default().quarantine_after,
            lanes: Settings::default().max_lanes,
            preempts: Settings::default().preempts,
            finished_jobs: 1000,
            artifact_bytes: 1 << 40,
            connections: 20_000,
            calls: CallLimits::default(),
        }
    }
}

impl Config {
    /// A scheduler that keeps everything in one folder.
    pub fn in_folder(folder: &Path) -> Self {
        Self {
            database: folder.join("attune.db").into(),
            artifacts: folder.join("artifacts").display().to_string(),
            data_root: None,
            timings: Timings::default(),
            limits: Limits::default(),
            auth: Auth::Open,
            tls: None,
            advertise: None,
            peers: attune_proto::client::Tls::default(),
            pools: Vec::new(),
        }
    }

    /// What the core goes by.
    pub(crate) fn settings(&self) -> Settings {
        Settings {
            ttl: self.timings.lease_ttl,
            stop_limit: self.timings.stop_limit,
            backoff: Backoff { base: self.timings.backoff_base, cap: self.timings.backoff_cap, ..Backoff::default() },
            quarantine_after: self.limits.lost_workers,
            max_lanes: self.limits.lanes,
            lane_wait: self.timings.lane_wait,
            preempts: self.limits.preempts,
        }
    }
}

impl Default for Config {
    /// Everything in the folder `.attune` of the working directory.
    fn default() -> Self {
        Self::in_folder(Path::new(".attune"))
    }
}
