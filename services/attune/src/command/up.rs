//! `attune up`, `attune scheduler`, `attune worker`: the services.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use attune_scheduler::{Database, Tls};
use attune_telemetry::{Logging, Stop, TaskGroup};

use crate::print::Failure;
use crate::remote::{self, Server, block_on};
use crate::stack::{self, SchedulerArguments, Stack, Workers};

/// Runs a scheduler and workers on this machine until it is interrupted.
#[derive(Debug, clap::Args)]
#[command(after_help = "Jobs go on where they were when it is started again with the same folder.
Example:
  attune up --data-dir ./attune-data & attune submit job.yaml --watch")]
pub(crate) struct Up {
    #[command(flatten)]
    scheduler: SchedulerArguments,
    /// Folder of the database, artifacts and workers; made when it is not there.
    #[arg(long, value_name = "FOLDER", env = "ATTUNE_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// Number of workers.
    #[arg(long, value_name = "N", default_value_t = 1)]
    workers: u32,
    /// CPU devices that each worker offers; a job's ranks each take one.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    devices: u32,
    /// NVIDIA devices that the first worker offers; all that this build can work on if it is left out.
    #[arg(long, value_name = "N")]
    cards: Option<u32>,
    /// Largest size of each worker's cache of inputs, in GiB; no bound if it is left out. What jobs use is never removed.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=CACHE_GIB_MAX))]
    max_cache_gib: Option<u64>,
}

/// The largest bound of a cache: 2^33 GiB are 2^63 bytes.
const CACHE_GIB_MAX: u64 = 1 << 33;

/// Runs a scheduler alone until it is interrupted; workers connect to it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  attune scheduler --database ./attune.db --artifacts s3://bucket/attune
  attune scheduler --database postgres://attune@db/attune?sslmode=verify-full --artifacts s3://bucket/attune")]
pub(crate) struct Scheduler {
    #[command(flatten)]
    arguments: SchedulerArguments,
    /// The database: a file of SQLite, made when it is not there, or the URL of a database of PostgreSQL. A password is better given
    /// by PGPASSWORD or PGPASSFILE, which other users of the machine cannot see.
    #[arg(long, value_name = "FILE|URL", env = "ATTUNE_DATABASE", hide_env_values = true)]
    database: Database,
    /// Where artifacts are kept: a folder or s3://bucket/prefix.
    #[arg(long, value_name = "FOLDER|URL")]
    artifacts: String,
    /// Follows while another scheduler leads on the same database of PostgreSQL: answers what it reads, passes the rest on to that
    /// one (as a client, with --ca, --cert and --key), and takes over when that one is gone. On a file of SQLite it only waits.
    #[arg(long)]
    standby: bool,
    /// The URL at which other schedulers reach this one; by default that of --listen.
    #[arg(long, value_name = "URL", env = "ATTUNE_ADVERTISE")]
    advertise: Option<String>,
    /// The server's certificate with its chain (PEM): connections are encrypted then, and no other is answered.
    #[arg(long, value_name = "FILE", env = "ATTUNE_TLS_CERT", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, value_name = "FILE", env = "ATTUNE_TLS_KEY", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Certificates of the authorities that must vouch for every client (PEM); clients need none without.
    #[arg(long, value_name = "FILE", env = "ATTUNE_TLS_CLIENT_CA", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
}

impl Scheduler {
    /// How connections are encrypted.
    fn tls(&self) -> Result<Option<Tls>, Failure> {
        let (Some(certificate), Some(key)) = (&self.tls_cert, &self.tls_key) else { return Ok(None) };
        // What is wrong with a file now is said by its name.
        remote::certificates(certificate)?;
        remote::key(key)?;
        self.tls_client_ca.as_deref().map(remote::certificates).transpose()?;
        Ok(Some(Tls { certificate: certificate.clone(), key: key.clone(), client_ca: self.tls_client_ca.clone() }))
    }
}

/// Runs a worker until it is interrupted; its attempts then stop at a checkpoint.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  attune worker --server http://scheduler:7070 --work-dir /var/lib/attune-worker --devices 2")]
pub(crate) struct Worker {
    /// Folder of its own: cached inputs, attempts in work, its id.
    #[arg(long, value_name = "FOLDER")]
    work_dir: PathBuf,
    /// What people call it; the host's name if it is left out.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// CPU devices that it offers; a job's ranks each take one.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    devices: u32,
    /// NVIDIA devices that it offers; all that this build can work on if it is left out.
    #[arg(long, value_name = "N")]
    cards: Option<u32>,
    /// The address of this machine by which other workers reach it, where jobs run on several at once; the one by which it reaches
    /// the scheduler if it is left out.
    #[arg(long, value_name = "ADDRESS")]
    gang_address: Option<IpAddr>,
    /// Largest size of the cache of inputs, in GiB; no bound if it is left out. What jobs use is never removed.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=CACHE_GIB_MAX))]
    max_cache_gib: Option<u64>,
    /// A label to place by; may be given several times.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Seconds that attempts have to stop at a checkpoint when the worker is interrupted.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    grace: u64,
    /// Removes the work folder when the worker ends.
    #[arg(long)]
    discard_work_dir: bool,
    /// Ends when standard input does, as if it were interrupted: a worker that is not to outlive who started it.
    #[arg(long)]
    until_stdin_closes: bool,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE, such as zone=a")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// What comes first in a process that serves: its log, and that nobody of its user looks into its memory and environment, where secrets
/// are.
fn begin() -> Result<(), Failure> {
    Logging::default().install().map_err(|error| Failure::usage(error.to_string()))?;
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        tracing::warn!(%error, "other processes of this user may look into this one");
    }
    Ok(())
}

pub(super) fn up(arguments: &Up) -> Result<(), Failure> {
    begin()?;
    let folder = match &arguments.data_dir {
        Some(folder) => folder.clone(),
        None => home()?.join(".attune"),
    };
    block_on(async {
        let workers = Workers {
            count: arguments.workers,
            devices: arguments.devices,
            cards: arguments.cards,
            cache_bytes_max: arguments.max_cache_gib.map(|gib| gib << 30),
        };
        let stack = Stack::start(&arguments.scheduler, &folder, workers).await?;
        tracing::info!(target: "attune", url = stack.url, data_dir = %folder.display(), workers = arguments.workers, "listening");
        stack.run_until(stack::asked_to_end()).await
    })
}

fn home() -> Result<PathBuf, Failure> {
    std::env::var_os("HOME")
        .filter(|home| !home.is_empty())
        .map(PathBuf::from)
        .ok_or_else(|| Failure::usage("there is no home folder; name one with --data-dir FOLDER"))
}

pub(super) fn scheduler(arguments: &Scheduler, server: &Server) -> Result<(), Failure> {
    begin()?;
    block_on(async {
        let tls = arguments.tls()?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://{}", reachable(arguments.arguments.listen));
        let (database, artifacts) = (arguments.database.clone(), arguments.artifacts.clone());
        let mut config = arguments.arguments.config(database, artifacts.clone(), &url)?;
        config.tls = tls;
        config.advertise = arguments.advertise.clone();
        config.peers = server.tls()?;
        let scheduler = if arguments.standby {
            attune_scheduler::Scheduler::stand_by(config, stack::asked_to_end()).await.map(|some| some.map(Box::new))
        } else {
            attune_scheduler::Scheduler::lead(config).await.map(|one| Some(Box::new(one)))
        };
        let Some(scheduler) = scheduler.map_err(|error| Failure::caused(&error))? else { return Ok(()) };
        let listener = arguments.arguments.bind(scheme == "https").await?;
        if let Ok(address) = listener.local_addr() {
            tracing::info!(target: "attune", url = format!("{scheme}://{address}"), artifacts, "listening");
        }
        let served = scheduler.serve(listener, stack::asked_to_end()).await;
        served.map_err(|error| Failure::caused(&error))
    })
}

/// The address at which this machine reaches what listens at `address`.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        IpAddr::V4(_) | IpAddr::V6(_) => {}
    }
    address
}

/// Asks to stop when whoever started this process has gone, or has closed the pipe between them.
fn stop_with_parent(stop: Stop) {
    // A thread that nobody waits for: one that reads cannot be told to end.
    std::thread::spawn(move || {
        let read = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        tracing::info!(target: "attune", error = read.err().map(|error| error.to_string()), "standard input is closed; this worker ends");
        stop.request();
    });
}

pub(super) fn worker(arguments: &Worker, server: &Server) -> Result<(), Failure> {
    begin()?;
    let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    let name = arguments.name.clone().unwrap_or_else(host);
    let work_dir = &arguments.work_dir;
    let mut config = stack::worker(&server.server, work_dir, &name, arguments.devices)?;
    config.connection = server.options()?;
    config.token_file = server.token_file().map(Path::to_owned);
    config.cards = arguments.cards;
    config.gang_address = arguments.gang_address;
    config.cache_bytes_max = arguments.max_cache_gib.map(|gib| gib << 30);
    config.labels = arguments.labels.iter().cloned().collect::<BTreeMap<_, _>>();
    config.grace = Duration::from_secs(arguments.grace);
    block_on(async {
        let group = TaskGroup::new();
        let stop = stack::stop_when_asked(&group);
        if arguments.until_stdin_closes {
            stop_with_parent(stop.clone());
        }
        let ended = attune_worker::run(config, stop).await;
        group.shutdown(Duration::from_secs(1)).await;
        let is_others = matches!(ended, Err(attune_worker::Error::Busy { .. }));
        if arguments.discard_work_dir && !is_others {
            std::fs::remove_dir_all(work_dir).map_err(|error| Failure::file(work_dir, &error))?;
        }
        ended.map_err(|error| Failure::failed(error.to_string()))
    })
}
