//! What a scheduler is told when it starts.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use attune_scheduler_core::{Backoff, Settings};
use attune_store::Database;

/// Where a scheduler keeps things and how patient it is.
#[derive(Debug, Clone)]
pub struct Config {
    /// The database: a file of SQLite, made with its folder when absent, or a server of PostgreSQL. One scheduler at a time.
    pub database: Database,
    /// Where artifacts are: a folder (made when absent), `file:///folder`, `s3://bucket/prefix` or `memory://`.
    pub artifacts: String,
    /// The folder under which job files may name paths of this machine; none may when it is absent.
    pub data_root: Option<PathBuf>,
    /// How long things may take.
    pub timings: Timings,
    /// How much is taken.
    pub limits: Limits,
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
}

impl Default for Timings {
    /// Leases of 10 s with heartbeats every 3 s, 30 s to stop, waits of 2 s to 5 min, 2 s to gather lanes, 10 s to end; a look for what
    /// nobody needs every hour, a day for pushes, and events for ever.
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
