//! The file that describes a pool of workers and the engine that starts them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use attune_scheduler_core::Devices;
use attune_scheduler_core::supply::{Pool, REQUEST_LABEL};
use attune_spec::id::Name;
use attune_spec::{Fault, FieldPath};
use serde::Deserialize;
use serde_json::Value;

use super::fields;
#[cfg(feature = "kubernetes")]
use super::kubernetes::Kubernetes;
use super::launch::Launch;
use super::processes::Processes;
use super::slurm::{Settings, Slurm};
use super::{WorkerPool, WorkerProvider};

/// What is meant where the file does not say.
#[derive(Debug, Clone)]
pub struct Defaults {
    /// Attune's program.
    pub program: PathBuf,
    /// The scheduler's address for workers of this machine, where it is known.
    pub server: Option<String>,
    /// Whether workers need a token.
    pub needs_token: bool,
}

#[derive(Debug, Deserialize)]
struct Written {
    name: String,
    #[serde(default)]
    min: u32,
    max: u32,
    idle: Option<String>,
    start: Option<String>,
    look: Option<String>,
    #[serde(default)]
    worker: WrittenWorker,
    program: Option<PathBuf>,
    server: Option<String>,
    token_file: Option<PathBuf>,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    processes: Option<WrittenProcesses>,
    slurm: Option<WrittenSlurm>,
    kubernetes: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(default)]
struct WrittenWorker {
    devices: u32,
    cards: u32,
    labels: BTreeMap<String, String>,
    grace: Option<String>,
}

impl Default for WrittenWorker {
    fn default() -> Self {
        Self { devices: 1, cards: 0, labels: BTreeMap::new(), grace: None }
    }
}

#[derive(Debug, Deserialize)]
struct WrittenProcesses {
    work_dir: PathBuf,
}

#[derive(Debug, Deserialize)]
struct WrittenSlurm {
    bin: Option<PathBuf>,
    partition: Option<String>,
    account: Option<String>,
    time: Option<String>,
    cpus: Option<u32>,
    memory: String,
    gres: Option<String>,
    #[serde(default)]
    options: Vec<String>,
    work_dir: PathBuf,
    output: Option<String>,
    #[serde(default)]
    prologue: String,
}

/// Options of `sbatch` that say what a request is, or that a job is one worker: Attune's own.
const OWN_OPTIONS: [&str; 17] = [
    "--parsable",
    "--export",
    "--export-file",
    "--job-name",
    "-J",
    "--comment",
    "--nodes",
    "-N",
    "--ntasks",
    "-n",
    "--array",
    "-a",
    "--wrap",
    "--wait",
    "-W",
    "--signal",
    "--chdir",
];

/// Faults as they are found.
pub(super) struct Reader {
    pub(super) faults: Vec<Fault>,
}

impl Reader {
    pub(super) fn fault(&mut self, path: &str, what: impl Into<String>) {
        self.faults.push(Fault::new(path, what));
    }

    /// A time such as `300s`, or what is meant without.
    pub(super) fn time(
        &mut self,
        path: &str,
        text: Option<&String>,
        default: Duration,
        (least, most): (u64, u64),
    ) -> Duration {
        let Some(text) = text else { return default };
        let read = text.parse::<jiff::SignedDuration>().ok().and_then(|time| Duration::try_from(time).ok());
        match read.filter(|time| (Duration::from_secs(least)..=Duration::from_secs(most)).contains(time)) {
            Some(time) => time,
            None => {
                self.fault(path, format!("is {text:?}; expected a time such as `300s` or `5m`, {least} s to {most} s"));
                default
            }
        }
    }

    pub(super) fn absolute(&mut self, path: &str, file: Option<&PathBuf>) {
        if let Some(file) = file.filter(|file| !file.is_absolute()) {
            self.fault(path, format!("is {:?}; expected a path from the root, for workers start elsewhere", file));
        }
    }
}

pub(super) const DAY: u64 = 24 * 60 * 60;

/// Reads the description of a pool.
///
/// # Errors
/// All its faults, with their field paths.
pub fn read(text: &str, defaults: &Defaults) -> Result<WorkerPool, Vec<Fault>> {
    let value =
        attune_spec::job::read_yaml(text).map_err(|error| vec![Fault::new("", format!("cannot be read: {error}"))])?;
    if !value.is_object() {
        return Err(vec![Fault::new("", "is no mapping of fields; expected one that starts like `name: gpus`")]);
    }
    let written: Written = fields::read(&value, FieldPath::root())?;
    let mut reader = Reader { faults: Vec::new() };
    let pool = reader.pool(&written);
    let launch = reader.launch(&written, defaults);
    let look = Duration::from_secs(if written.is_elsewhere() { 10 } else { 1 });
    let look = reader.time("look", written.look.as_ref(), look, (1, 60 * 60));
    let engine = reader.engine(&written, defaults);
    let (Some(pool), Some(engine), true) = (pool, engine, reader.faults.is_empty()) else {
        return Err(reader.faults);
    };
    let provider: Arc<dyn WorkerProvider> = match engine {
        Engine::Processes { work_dir } => Arc::new(Processes::new(pool.clone(), launch, work_dir)),
        Engine::Slurm(settings) => Arc::new(Slurm::new(pool.clone(), launch, *settings)),
        #[cfg(feature = "kubernetes")]
        Engine::Kubernetes(settings) => Arc::new(Kubernetes::new(pool.clone(), launch, *settings)),
    };
    Ok(WorkerPool { pool, look, provider })
}

/// Who starts the workers.
enum Engine {
    Processes {
        work_dir: PathBuf,
    },
    Slurm(Box<Settings>),
    #[cfg(feature = "kubernetes")]
    Kubernetes(Box<super::kubernetes::Settings>),
}

impl Written {
    /// Whether workers run on other machines than the scheduler.
    const fn is_elsewhere(&self) -> bool {
        self.slurm.is_some() || self.kubernetes.is_some()
    }
}

impl Reader {
    fn pool(&mut self, written: &Written) -> Option<Pool> {
        let Written { name, min, max, worker, .. } = written;
        let WrittenWorker { devices, cards, labels, .. } = worker;
        let named = name.parse::<Name>().map_err(|error| self.fault("name", format!("is not one: {error}")));
        if !(1..=10_000).contains(max) {
            self.fault("max", format!("is {max}; expected 1 ..= 10000"));
        }
        if min > max {
            self.fault("min", format!("is {min}; expected no more than `max`, {max}"));
        }
        if *devices == 0 {
            self.fault("worker.devices", "is 0; expected 1 or more");
        }
        if labels.contains_key(REQUEST_LABEL) {
            self.fault("worker.labels", format!("has {REQUEST_LABEL}, by which Attune finds its requests again"));
        }
        if labels.keys().any(|name| name.is_empty() || name.contains('=')) {
            self.fault("worker.labels", "has a name that is empty or has a `=` in it");
        }
        let idle = self.time("idle", written.idle.as_ref(), Duration::from_secs(300), (1, 30 * DAY));
        let start = self.time("start", written.start.as_ref(), Duration::from_secs(600), (1, DAY));
        let (devices, labels) = (Devices { n_cpu: *devices, n_cuda: *cards }, labels.clone());
        Some(Pool { name: named.ok()?, devices, labels, min: *min, max: *max, idle, start })
    }

    fn launch(&mut self, written: &Written, defaults: &Defaults) -> Launch {
        let Written { program, server, token_file, ca, cert, key, .. } = written;
        let own = defaults.server.as_ref().filter(|_| !written.is_elsewhere());
        let server = server.as_ref().or(own).cloned();
        match &server {
            Some(server) if server.contains("://") => {}
            Some(server) => {
                self.fault("server", format!("is {server:?}; expected a URL such as https://scheduler.internal:7070"));
            }
            None => self.fault("server", "is missing; expected the scheduler's URL, as workers reach it"),
        }
        let is_mounted = written.kubernetes.is_some();
        if defaults.needs_token && token_file.is_none() && !is_mounted {
            let message = "is missing; expected the file of a worker's token, for callers are asked who they are";
            self.fault("token_file", message);
        }
        let files = [("program", program), ("token_file", token_file), ("ca", ca), ("cert", cert), ("key", key)];
        for (path, file) in files {
            self.absolute(path, file.as_ref());
            if is_mounted && file.is_some() && path != "program" {
                self.fault(
                    path,
                    "is a file of a machine; expected `kubernetes.token`, `.ca` or `.identity`, which Pods are given",
                );
            }
        }
        if cert.is_some() != key.is_some() {
            self.fault(if cert.is_some() { "key" } else { "cert" }, "is missing; one comes with the other");
        }
        Launch {
            program: program.clone().unwrap_or_else(|| defaults.program.clone()),
            server: server.unwrap_or_default(),
            token_file: token_file.clone(),
            ca: ca.clone(),
            identity: cert.clone().zip(key.clone()),
            grace: self.time("worker.grace", written.worker.grace.as_ref(), Duration::from_secs(60), (0, 60 * 60)),
        }
    }

    fn engine(&mut self, written: &Written, defaults: &Defaults) -> Option<Engine> {
        match (&written.processes, &written.slurm, &written.kubernetes) {
            (Some(WrittenProcesses { work_dir }), None, None) => {
                self.absolute("processes.work_dir", Some(work_dir));
                Some(Engine::Processes { work_dir: work_dir.clone() })
            }
            (None, Some(slurm), None) => Some(Engine::Slurm(Box::new(self.slurm(slurm, written.worker.devices)))),
            (None, None, Some(value)) => self.kubernetes(value, written, defaults),
            _ => {
                self.fault("", "names none or several of `processes`, `slurm` and `kubernetes`; expected one");
                None
            }
        }
    }

    #[cfg(feature = "kubernetes")]
    fn kubernetes(&mut self, value: &Value, written: &Written, defaults: &Defaults) -> Option<Engine> {
        let defaults = super::kubernetes::Meant {
            cpu: written.worker.devices,
            program: written.program.clone(),
            needs_token: defaults.needs_token,
        };
        let settings = super::kubernetes::Settings::read(self, value, defaults)?;
        Some(Engine::Kubernetes(Box::new(settings)))
    }

    #[cfg(not(feature = "kubernetes"))]
    fn kubernetes(&mut self, _: &Value, _: &Written, _: &Defaults) -> Option<Engine> {
        let what =
            "needs a build that speaks to Kubernetes: `cargo install --path services/attune --features kubernetes`";
        self.fault("kubernetes", what);
        None
    }

    fn slurm(&mut self, written: &WrittenSlurm, devices: u32) -> Settings {
        let WrittenSlurm { bin, partition, account, time, memory, gres, options, work_dir, output, prologue, .. } =
            written;
        self.absolute("slurm.bin", bin.as_ref());
        self.absolute("slurm.work_dir", Some(work_dir));
        let texts = [("partition", partition), ("account", account), ("gres", gres), ("output", output)];
        for (name, text) in texts.into_iter().chain([("memory", &Some(memory.clone()))]) {
            if text.as_ref().is_some_and(|text| text.is_empty() || text.contains(char::is_control)) {
                self.fault(&format!("slurm.{name}"), "is empty or has characters that cannot be seen");
            }
        }
        let time = time.as_ref().map(|_| self.time("slurm.time", time.as_ref(), Duration::ZERO, (60, 365 * DAY)));
        for (idx, option) in options.iter().enumerate() {
            let path = format!("slurm.options[{idx}]");
            let named = option.split('=').next().unwrap_or_default();
            if !option.starts_with('-') || option.contains(char::is_control) {
                self.fault(&path, format!("is {option:?}; expected an option with its value, `--constraint=a100`"));
            } else if OWN_OPTIONS.contains(&named) {
                self.fault(&path, format!("is {option:?}, which Attune sets itself"));
            }
        }
        let cpus = written.cpus.unwrap_or(devices);
        if cpus == 0 {
            self.fault("slurm.cpus", "is 0; expected 1 or more");
        }
        Settings {
            bin: bin.clone(),
            partition: partition.clone(),
            account: account.clone(),
            minutes: time.map(|time| time.as_secs().div_ceil(60)),
            cpus,
            memory: memory.clone(),
            gres: gres.clone(),
            options: options.clone(),
            work_dir: work_dir.clone(),
            output: output.clone().unwrap_or_else(|| "/dev/null".to_owned()),
            prologue: prologue.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults() -> Defaults {
        Defaults { program: "/opt/attune".into(), server: Some("http://127.0.0.1:7070".to_owned()), needs_token: false }
    }

    fn faults(text: &str, defaults: &Defaults) -> Vec<String> {
        read(text, defaults).unwrap_err().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_pool_is_read_with_what_is_meant_without_saying() {
        let local = read("{name: here, max: 2, processes: {work_dir: /var/lib/attune}}", &defaults()).unwrap();
        assert_eq!((local.pool.min, local.pool.max), (0, 2));
        assert_eq!((local.pool.idle, local.look), (Duration::from_secs(300), Duration::from_secs(1)));
        let text = "
name: gpu
min: 1
max: 8
idle: 10m
start: 1h
worker: {devices: 4, cards: 1, labels: {zone: a}, grace: 90s}
server: https://scheduler.internal:7070
token_file: /etc/attune/worker.token
slurm: {partition: gpu, time: 8h, memory: 64G, gres: 'gpu:1', options: [--constraint=a100], work_dir: /scratch}
";
        let slurm = read(text, &Defaults { needs_token: true, ..defaults() }).unwrap();
        assert_eq!(slurm.pool.devices, Devices { n_cpu: 4, n_cuda: 1 });
        assert_eq!((slurm.pool.start, slurm.look), (Duration::from_secs(3600), Duration::from_secs(10)));
        let shown = format!("{:?}", slurm.provider);
        assert!(shown.contains("minutes: Some(480)") && shown.contains("cpus: 4"), "{shown}");
    }

    #[test]
    fn all_faults_are_named_at_once() {
        let text = "
name: Not A Name
min: 3
max: 2
idle: soon
worker: {devices: 0, labels: {attune.request: mine}}
server: scheduler
token_file: worker.token
cert: /etc/cert.pem
slurm: {memory: '', work_dir: scratch, time: 5s, cpus: 0, options: [a100, --export=ALL]}
";
        let found = faults(text, &defaults());
        let paths = [
            "name",
            "min",
            "worker.devices",
            "worker.labels",
            "idle",
            "server",
            "token_file",
            "key",
            "slurm.work_dir",
            "slurm.memory",
            "slurm.time",
            "slurm.options[0]",
            "slurm.options[1]",
            "slurm.cpus",
        ];
        for path in paths {
            assert!(found.iter().any(|fault| fault.starts_with(&format!("`{path}` "))), "{path} in {found:#?}");
        }
        assert_eq!(found.len(), paths.len(), "{found:#?}");
        assert!(faults("{name: a, max: 1, work: 3}", &defaults())[0].contains("work"));
        let no_token = Defaults { needs_token: true, ..defaults() };
        let found = faults("{name: a, max: 1, slurm: {memory: 1G, work_dir: /tmp}}", &no_token);
        assert!(found.iter().any(|fault| fault.starts_with("`server` is missing")), "{found:?}");
        assert!(found.iter().any(|fault| fault.starts_with("`token_file` is missing")), "{found:?}");
        let both =
            "{name: a, max: 1, processes: {work_dir: /tmp}, slurm: {memory: 1G, work_dir: /tmp}, server: 'http://a'}";
        for text in ["{name: a, max: 1}", both] {
            assert_eq!(faults(text, &defaults()).len(), 1, "{text}");
        }
    }
}
