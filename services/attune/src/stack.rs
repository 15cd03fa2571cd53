//! A scheduler and workers in one process: what `up` and `demo` start.

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use attune_proto::Secret;
use attune_scheduler::providers::{self, Defaults, WorkerPool};
use attune_scheduler::{Auth, CallLimits, Database, Oidc, Timings, Tokens};
use attune_telemetry::{Stop, Task, TaskGroup};
use attune_worker::Program;
use tokio::net::TcpListener;

use crate::print::Failure;
use crate::remote::read;

/// Time for workers to let their attempts stop at a checkpoint when the process is asked to end.
const WORKER_GRACE: Duration = Duration::from_secs(30);
/// Time beyond that for workers and scheduler to end.
const END_TIME: Duration = Duration::from_secs(15);
/// The same for a scheduler that has workers of its own to end, by which they are limited themselves.
const POOLS_END_TIME: Duration = Duration::from_secs(2 * 60 * 60);

/// What a scheduler is told on the command line; times only matter to tests of failures.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SchedulerArguments {
    /// Where it listens.
    #[arg(long, value_name = "ADDRESS", default_value = crate::remote::DEFAULT_ADDRESS)]
    pub(crate) listen: SocketAddr,
    /// Whether callers are asked who they are. `tokens`: every call carries an API token, the first of which is written to
    /// --admin-token-file. `none`: whoever reaches the address may do everything.
    #[arg(long, value_name = "HOW", value_enum, default_value_t = AuthMode::None)]
    pub(crate) auth: AuthMode,
    /// File of the first admin's token: read if it is there; made if not, and if there is no valid token of an admin. By default
    /// `admin.token` beside the database, if that is a file.
    #[arg(long, value_name = "FILE", env = "ATTUNE_ADMIN_TOKEN_FILE")]
    pub(crate) admin_token_file: Option<PathBuf>,
    /// Issuer of JSON web tokens that are believed beside API tokens, as its tokens name it.
    #[arg(long, value_name = "URL", env = "ATTUNE_OIDC_ISSUER", requires_all = ["oidc_audience", "oidc_roles"])]
    pub(crate) oidc_issuer: Option<String>,
    /// Whom its tokens must be for.
    #[arg(long, value_name = "TEXT", env = "ATTUNE_OIDC_AUDIENCE", requires = "oidc_issuer")]
    pub(crate) oidc_audience: Option<String>,
    /// Its keys: a file or the URL of a set of JSON web keys. By default where it says itself, below ISSUER/.well-known.
    #[arg(long, value_name = "FILE|URL", env = "ATTUNE_OIDC_KEYS", requires = "oidc_issuer")]
    pub(crate) oidc_keys: Option<String>,
    /// File of rules that say which claims make which role.
    #[arg(long, value_name = "FILE", env = "ATTUNE_OIDC_ROLES", requires = "oidc_issuer")]
    pub(crate) oidc_roles: Option<PathBuf>,
    /// Allows an address that other machines can reach, although nobody is asked who they are.
    #[arg(long)]
    pub(crate) allow_unauthenticated_network: bool,
    /// Folder under which job files may name paths of the server's machine; none may without it.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) data_root: Option<PathBuf>,
    /// File that describes workers which an engine (Slurm, Kubernetes, this machine) is asked for while jobs wait, and which are given
    /// back; may be given several times.
    #[arg(long, value_name = "FILE")]
    provider: Vec<PathBuf>,
    /// Days that the events of a job are kept after its end, but for the last ones; for ever if left out.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep_events_days: Option<u32>,
    /// Leaves running jobs alone when more urgent ones wait for their devices.
    #[arg(long)]
    no_preemption: bool,
    /// Days that the audit log is kept; for ever if left out.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep_audit_days: Option<u32>,
    /// Calls that one credential may make a second in the long run, and five times as many at once; needs --auth tokens.
    #[arg(long, value_name = "N", default_value_t = CallLimits::default().calls_per_second)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    calls_per_second: u32,
    /// Largest artifact that is taken, in GiB.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    max_artifact_gib: u64,
    /// Milliseconds that a lease lasts without a heartbeat.
    #[arg(long, value_name = "MS", hide = true)]
    lease_ttl_ms: Option<u64>,
    /// Milliseconds of the longest wait after a first failed attempt.
    #[arg(long, value_name = "MS", hide = true)]
    backoff_ms: Option<u64>,
}

/// Whether callers are asked who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum AuthMode {
    /// Nobody is.
    None,
    /// By API tokens.
    Tokens,
}

impl SchedulerArguments {
    /// Those of a scheduler for this process alone, on a free port.
    pub(crate) fn private() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            auth: AuthMode::None,
            admin_token_file: None,
            oidc_issuer: None,
            oidc_audience: None,
            oidc_keys: None,
            oidc_roles: None,
            allow_unauthenticated_network: false,
            data_root: None,
            provider: Vec::new(),
            keep_events_days: None,
            no_preemption: false,
            keep_audit_days: None,
            calls_per_second: CallLimits::default().calls_per_second,
            max_artifact_gib: 1024,
            lease_ttl_ms: None,
            backoff_ms: None,
        }
    }

    /// The configuration of a scheduler with this database and these artifacts, which workers of this machine reach at `url`.
    pub(crate) fn config(
        &self,
        database: Database,
        artifacts: String,
        url: &str,
    ) -> Result<attune_scheduler::Config, Failure> {
        let day = Duration::from_secs(24 * 60 * 60);
        let events_kept = self.keep_events_days.map(|days| day * days);
        let audit_kept = self.keep_audit_days.map(|days| day * days);
        let mut timings = Timings { events_kept, audit_kept, ..Timings::default() };
        if let Some(ttl) = self.lease_ttl_ms.map(Duration::from_millis) {
            timings.lease_ttl = ttl;
            timings.heartbeat_interval = ttl / 4;
        }
        if let Some(wait) = self.backoff_ms.map(Duration::from_millis) {
            timings.backoff_base = wait;
            timings.backoff_cap = wait * 2;
        }
        let calls = CallLimits {
            calls_per_second: self.calls_per_second,
            calls_at_once: self.calls_per_second.saturating_mul(5),
            ..CallLimits::default()
        };
        let artifact_bytes = self.max_artifact_gib << 30;
        let preempts = !self.no_preemption;
        let limits =
            attune_scheduler::Limits { calls, artifact_bytes, preempts, ..attune_scheduler::Limits::default() };
        let auth = match self.auth {
            AuthMode::None if self.oidc_issuer.is_some() => {
                let message = "an issuer of tokens is named, and nobody is asked for one";
                return Err(Failure::usage(message).with_hint("add --auth tokens"));
            }
            AuthMode::None => Auth::Open,
            AuthMode::Tokens => {
                let beside = match &database {
                    Database::Sqlite(file) => Some(file.with_file_name("admin.token")),
                    Database::Postgres(_) => None,
                };
                let admin_file = self.admin_token_file.clone().or(beside);
                Auth::Tokens(Tokens { admin_file, local_worker: None, oidc: self.oidc()? })
            }
        };
        let data_root = self.data_root.clone();
        let pools = self.pools(url)?;
        Ok(attune_scheduler::Config {
            database,
            artifacts,
            data_root,
            timings,
            limits,
            auth,
            tls: None,
            advertise: None,
            peers: attune_proto::client::Tls::default(),
            pools,
        })
    }

    /// Workers that engines are asked for.
    fn pools(&self, url: &str) -> Result<Vec<WorkerPool>, Failure> {
        let defaults = Defaults {
            program: program()?.path,
            server: Some(url.to_owned()),
            needs_token: self.auth == AuthMode::Tokens,
        };
        let mut pools: Vec<WorkerPool> = Vec::new();
        for file in &self.provider {
            let pool = providers::read(&read(file)?, &defaults)
                .map_err(|faults| Failure::invalid(&file.display().to_string(), faults))?;
            let name = &pool.pool.name;
            if pools.iter().any(|other| other.pool.name == *name) {
                return Err(Failure::usage(format!("{}: another pool is named {name} already", file.display())));
            }
            pools.push(pool);
        }
        Ok(pools)
    }

    /// The identity provider, if there is one.
    fn oidc(&self) -> Result<Option<Oidc>, Failure> {
        let (Some(issuer), Some(audience), Some(roles)) = (&self.oidc_issuer, &self.oidc_audience, &self.oidc_roles)
        else {
            return Ok(None);
        };
        let oidc = Oidc::new(issuer, audience, self.oidc_keys.as_deref(), &read(roles)?);
        oidc.map(Some).map_err(|why| Failure::usage(format!("the identity provider cannot be believed: {why}")))
    }

    /// Takes the address. Refuses one that others can reach unless that was asked for in so many words.
    pub(crate) async fn bind(&self, is_encrypted: bool) -> Result<TcpListener, Failure> {
        let is_open = self.auth == AuthMode::None && !self.allow_unauthenticated_network;
        if !self.listen.ip().is_loopback() && is_open {
            let message = format!(
                "{} can be reached from other machines, and this server does not ask who calls: anybody could run jobs on it",
                self.listen
            );
            let hint = "ask callers for tokens with --auth tokens, or add --allow-unauthenticated-network inside a network that you trust";
            return Err(Failure::usage(message).with_hint(hint));
        }
        if !self.listen.ip().is_loopback() && !is_encrypted && self.auth == AuthMode::Tokens {
            tracing::warn!(target: "attune", address = %self.listen, "tokens go through the network in the clear; `attune scheduler` encrypts connections with --tls-cert and --tls-key");
        }
        TcpListener::bind(self.listen)
            .await
            .map_err(|error| Failure::failed(format!("cannot listen on {}: {error}", self.listen)))
    }
}

/// This executable as the training process.
pub(crate) fn program() -> Result<Program, Failure> {
    let path = std::env::current_exe()
        .map_err(|error| Failure::failed(format!("this program cannot find its own file: {error}")))?;
    Ok(Program { path, arguments: vec!["attempt".into()], variables: Vec::new() })
}

/// A worker of this machine that keeps its things in `work_dir`.
pub(crate) fn worker(
    scheduler: &str,
    work_dir: &Path,
    name: &str,
    devices: u32,
) -> Result<attune_worker::Config, Failure> {
    let mut config = attune_worker::Config::new(scheduler, work_dir, program()?);
    name.clone_into(&mut config.name);
    config.devices = devices;
    config.grace = WORKER_GRACE;
    Ok(config)
}

/// The workers beside a scheduler.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Workers {
    /// How many there are.
    pub(crate) count: u32,
    /// CPU devices of each.
    pub(crate) devices: u32,
    /// NVIDIA devices that the first offers; all that there are if absent.
    pub(crate) cards: Option<u32>,
    /// Bytes that the cache of each may have; no bound if absent.
    pub(crate) cache_bytes_max: Option<u64>,
}

/// A running scheduler with its workers.
pub(crate) struct Stack {
    /// Where the scheduler answers.
    pub(crate) url: String,
    scheduler: TaskGroup,
    workers: TaskGroup,
    /// How long the scheduler may take to end.
    end_time: Duration,
}

impl Stack {
    /// Starts a scheduler in `folder` and workers beside it.
    pub(crate) async fn start(
        arguments: &SchedulerArguments,
        folder: &Path,
        workers: Workers,
    ) -> Result<Self, Failure> {
        std::fs::create_dir_all(folder).map_err(|error| Failure::file(folder, &error))?;
        let listener = arguments.bind(false).await?;
        let address = listener.local_addr().map_err(|error| Failure::failed(error.to_string()))?;
        let url = format!("http://{address}");
        let mut config =
            arguments.config(folder.join("attune.db").into(), folder.join("artifacts").display().to_string(), &url)?;
        let mut own: Option<Secret> = None;
        if let Auth::Tokens(tokens) = config.auth {
            let (tokens, secret) = tokens.with_local_worker();
            (config.auth, own) = (Auth::Tokens(tokens), Some(secret));
        }
        let end_time = if config.pools.is_empty() { END_TIME } else { POOLS_END_TIME };
        let stack = Self { url, scheduler: TaskGroup::new(), workers: TaskGroup::new(), end_time };
        let stop = stack.scheduler.stop();
        let serving =
            async move { attune_scheduler::serve(config, listener, async move { stop.requested().await }).await };
        stack.scheduler.spawn(Task::new("scheduler").shutdown_on_error(), serving);
        for number in 1..=workers.count {
            let name = format!("worker-{number}");
            let work_dir = folder.join("workers").join(number.to_string());
            let mut config = worker(&stack.url, &work_dir, &name, workers.devices)?;
            config.connection.token.clone_from(&own);
            // Workers of one machine would offer the same devices.
            config.cards = if number == 1 { workers.cards } else { Some(0) };
            config.cache_bytes_max = workers.cache_bytes_max;
            let stop = stack.workers.stop();
            stack.workers.spawn(Task::new("worker").shutdown_on_error(), attune_worker::run(config, stop));
        }
        Ok(stack)
    }

    /// Waits until `asked` is done or a part has failed for good, then ends: workers first, so that what they still have to
    /// say is heard.
    pub(crate) async fn run_until(self, asked: impl Future<Output = ()>) -> Result<(), Failure> {
        let (scheduler, workers) = (self.scheduler.stop(), self.workers.stop());
        tokio::select! {
            () = asked => {}
            () = scheduler.requested() => {}
            () = workers.requested() => {}
        }
        self.end().await
    }

    /// Ends workers, then the scheduler.
    pub(crate) async fn end(self) -> Result<(), Failure> {
        let mut failures = self.workers.shutdown(WORKER_GRACE + END_TIME).await;
        failures.extend(self.scheduler.shutdown(self.end_time).await);
        match failures.first() {
            None => Ok(()),
            Some(failure) => Err(Failure::failed(failure.to_string())),
        }
    }
}

/// Done when the process is asked to end.
pub(crate) async fn asked_to_end() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return std::future::pending().await };
    tokio::select! {
        _ = terminate.recv() => {}
        result = tokio::signal::ctrl_c() => {
            if result.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// A signal that is given when the process is asked to end.
pub(crate) fn stop_when_asked(group: &TaskGroup) -> Stop {
    let stop = Stop::new();
    let given = stop.clone();
    group.spawn(Task::new("signals").abort_on_cancel(), async move {
        asked_to_end().await;
        given.request();
        Ok::<_, std::convert::Infallible>(())
    });
    stop
}
