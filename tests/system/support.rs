//! A scheduler and a worker as processes of their own, and the command line to speak to them.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use attune_proto::client::Options;
use attune_proto::{Client, v1};
use serde_json::Value;
use tokio::time::Instant;

/// Longest wait for anything that must happen; far beyond what it takes on a slow machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// How long a lease lasts here: short for whoever waits for its end, long for a scheduler that has little of a processor.
const LEASE_MS: &str = "6000";

/// The built program.
pub(crate) fn attune() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_attune"));
    command.env_remove("ATTUNE_SERVER").env("NO_COLOR", "1");
    command
}

/// A process that is killed when its value goes.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
}

impl Process {
    pub(crate) fn start(command: &mut Command, log: &Path) -> Self {
        let log = File::options().create(true).append(true).open(log).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        Self { child }
    }

    /// `kill -9`, and waits for its end.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Its id.
    pub(crate) fn id(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.child.id() as i32)
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// The process ids of its children.
    pub(crate) fn children(&self) -> Vec<i32> {
        let parent = self.child.id();
        let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        ids.filter(|id| {
            let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            // After the name in parentheses: state, parent.
            let mut rest = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
            let (state, of) = (rest.next(), rest.next());
            state.is_some_and(|state| state != "Z") && of == Some(parent.to_string().as_str())
        })
        .collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A scheduler and a worker in a folder.
pub(crate) struct Cluster {
    pub(crate) folder: tempfile::TempDir,
    /// A URL of PostgreSQL; a file of SQLite in the folder if there is none.
    database: Option<String>,
    /// Further arguments of the scheduler.
    arguments: Vec<String>,
    /// Variables of all its processes.
    variables: Vec<(String, String)>,
    port: u16,
    /// Where the scheduler listens that stands by.
    other_port: u16,
    client: Client,
    pub(crate) scheduler: Option<Process>,
    standby: Option<Process>,
    pub(crate) worker: Option<Process>,
}

impl Cluster {
    /// Starts both.
    pub(crate) async fn start() -> Self {
        Self::start_of(None).await
    }

    /// Starts both on a database of PostgreSQL, where another scheduler may stand by.
    pub(crate) async fn start_on(database: &str) -> Self {
        Self::start_of(Some(database.to_owned())).await
    }

    /// Starts a scheduler alone, which asks an engine for the workers that `pool` describes.
    pub(crate) async fn start_with_pool(pool: impl FnOnce(&Self) -> Value) -> Self {
        let mut cluster = Self::new(None);
        let file = cluster.path("pool.yaml");
        std::fs::write(&file, pool(&cluster).to_string()).unwrap();
        cluster.arguments = vec!["--provider".to_owned(), file.display().to_string()];
        cluster.start_scheduler(&[]).await;
        cluster
    }

    async fn start_of(database: Option<String>) -> Self {
        Self::start_prepared(database, |_| Vec::new()).await
    }

    /// Starts both once its folder is as `prepare` makes it, and with the variables that it gives.
    pub(crate) async fn start_prepared(
        database: Option<String>,
        prepare: impl FnOnce(&Self) -> Vec<(String, String)>,
    ) -> Self {
        let mut cluster = Self::new(database);
        cluster.variables = prepare(&cluster);
        cluster.start_scheduler(&[]).await;
        cluster.start_worker(&[]);
        cluster
    }

    fn new(database: Option<String>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [port, other_port] = listeners.each_ref().map(|listener| listener.local_addr().unwrap().port());
        drop(listeners);
        let client = Client::lazy(&urls(port, other_port, database.is_some()), Options::default()).unwrap();
        let (scheduler, standby, worker) = (None, None, None);
        let (arguments, variables) = (Vec::new(), Vec::new());
        Self { folder, database, arguments, variables, port, other_port, client, scheduler, standby, worker }
    }

    /// Starts a scheduler that waits to lead.
    pub(crate) fn start_standby(&mut self) {
        let mut command = attune();
        self.scheduler_arguments(&mut command, self.other_port);
        self.standby = Some(Process::start(command.arg("--standby"), &self.path("scheduler.log")));
    }

    /// Kills the scheduler that leads, if it was not before: the one that stood by is the cluster's from now on.
    pub(crate) fn fail_over(&mut self) {
        self.kill_scheduler();
        self.scheduler = self.standby.take();
        std::mem::swap(&mut self.port, &mut self.other_port);
    }

    /// Whether the cluster's scheduler is the one that took the lead last: one that follows answers reads as well.
    pub(crate) fn is_leading(&self) -> bool {
        let log = std::fs::read_to_string(self.path("scheduler.log")).unwrap_or_default();
        let last = log.lines().rev().find(|line| line.contains("this scheduler leads"));
        last.is_some_and(|line| line.contains(&format!(":{}\"", self.port)))
    }

    /// Waits until it does.
    pub(crate) async fn until_leading(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_leading() {
            assert!(Instant::now() < deadline, "it does not lead\n{}", self.logs());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Kills the scheduler that leads.
    pub(crate) fn kill_scheduler(&mut self) {
        self.scheduler.take().into_iter().for_each(Process::kill);
    }

    /// The address of the one alone that stands by.
    pub(crate) fn other_url(&self) -> String {
        urls(self.other_port, self.port, false)
    }

    /// The scheduler's address, and that of the one that may stand by.
    pub(crate) fn url(&self) -> String {
        urls(self.port, self.other_port, self.database.is_some())
    }

    /// Where its scheduler listens.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// A path in the cluster's folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts the scheduler with further variables and waits until it answers.
    pub(crate) async fn start_scheduler(&mut self, variables: &[(&str, &str)]) {
        self.start_scheduler_as(attune(), variables).await;
    }

    /// Starts the scheduler with its artifacts on a disk of `size_kib` of its own; `false` where this machine lets nobody
    /// mount one.
    pub(crate) async fn start_scheduler_on_a_small_disk(&mut self, size_kib: u32) -> bool {
        let artifacts = self.path("artifacts");
        std::fs::create_dir_all(&artifacts).unwrap();
        let mount = format!("mount -t tmpfs -o size={size_kib}k tmpfs {}", artifacts.display());
        let own = |script: String| {
            let mut command = Command::new("unshare");
            command.args(["--map-root-user", "--mount", "sh", "-c", &script]);
            command
        };
        if !own(mount.clone()).output().is_ok_and(|output| output.status.success()) {
            return false;
        }
        let mut command = own(format!("{mount} && exec \"$@\""));
        command.arg("sh").arg(env!("CARGO_BIN_EXE_attune")).env("NO_COLOR", "1");
        self.start_scheduler_as(command, &[]).await;
        true
    }

    async fn start_scheduler_as(&mut self, mut command: Command, variables: &[(&str, &str)]) {
        self.scheduler_arguments(&mut command, self.port);
        command.envs(variables.iter().copied());
        self.scheduler = Some(Process::start(&mut command, &self.path("scheduler.log")));
        let deadline = Instant::now() + PATIENCE;
        while Client::connect(&self.url(), Options::default()).await.is_err() {
            assert!(Instant::now() < deadline, "no scheduler: {}", self.logs());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The program in a mount namespace of its own, where `/etc/hosts` is `file`; none where this machine lets nobody have
    /// one.
    pub(crate) fn attune_with_hosts(file: &Path) -> Option<Command> {
        let own = |script: &str| {
            let mut command = Command::new("unshare");
            command.args(["--map-root-user", "--mount", "sh", "-c", script, "sh"]).arg(file);
            command
        };
        let mount = "mount --bind \"$1\" /etc/hosts";
        if !own(mount).output().is_ok_and(|output| output.status.success()) {
            return None;
        }
        let mut command = own(&format!("{mount} && shift && exec \"$@\""));
        command.arg(env!("CARGO_BIN_EXE_attune")).env_remove("ATTUNE_SERVER").env("NO_COLOR", "1");
        Some(command)
    }

    fn scheduler_arguments(&self, command: &mut Command, port: u16) {
        let database = self.database.clone().unwrap_or_else(|| self.path("database/attune.db").display().to_string());
        command
            .args(["scheduler", "--listen", &format!("127.0.0.1:{port}"), "--database", &database, "--artifacts"])
            .arg(self.path("artifacts"))
            .args(["--lease-ttl-ms", LEASE_MS, "--backoff-ms", "50"])
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .args(&self.arguments);
    }

    /// Starts the worker with further variables.
    pub(crate) fn start_worker(&mut self, variables: &[(&str, &str)]) {
        let mut command = attune();
        command
            .args(["worker", "--server", &self.url(), "--name", "one"])
            .arg("--work-dir")
            .arg(self.path("worker"))
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .envs(variables.iter().copied());
        self.worker = Some(Process::start(&mut command, &self.path("worker.log")));
    }

    /// Starts another worker beside it.
    pub(crate) fn another_worker(&self, name: &str) -> Process {
        self.another_worker_with(name, &[])
    }

    /// The same with variables.
    pub(crate) fn another_worker_with(&self, name: &str, variables: &[(&str, &str)]) -> Process {
        let mut command = attune();
        command.args(["worker", "--server", &self.url(), "--name", name, "--work-dir"]).arg(self.path(name));
        Process::start(command.envs(variables.iter().copied()), &self.path("worker.log"))
    }

    /// A client of the scheduler.
    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// Runs a command against this cluster.
    pub(crate) fn run<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Output {
        attune().args(arguments).env("ATTUNE_SERVER", self.url()).current_dir(self.folder.path()).output().unwrap()
    }

    /// The one JSON document that a command answers with.
    pub(crate) fn json<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Value {
        let output = attune()
            .arg("--json")
            .args(arguments)
            .env("ATTUNE_SERVER", self.url())
            .current_dir(self.folder.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}\n{}", self.logs());
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Submits a job file and gives the job's id.
    pub(crate) fn submit(&self, file: &Path, set: &[&str]) -> String {
        let set = set.iter().flat_map(|set| ["--set", set]);
        let file = file.to_str().unwrap();
        let job = self.json(["submit", file].into_iter().chain(set));
        job["id"].as_str().unwrap().to_owned()
    }

    /// The job as it is now; `None` while the scheduler is away.
    pub(crate) async fn job(&self, id: &str) -> Option<v1::Job> {
        let asked = v1::GetJobRequest { project: String::new(), job_id: id.to_owned() };
        match self.client.jobs().get_job(asked).await {
            Ok(answer) => answer.into_inner().job,
            Err(_) => {
                self.client.turn();
                None
            }
        }
    }

    /// Waits until the job is as `fits` wants it.
    pub(crate) async fn wait(&self, id: &str, what: &str, mut fits: impl FnMut(&v1::Job) -> bool) -> v1::Job {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let job = self.job(id).await;
            match &job {
                Some(job) if fits(job) => return job.clone(),
                _ => assert!(Instant::now() < deadline, "no {what}: {job:#?}\n{}", self.logs()),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until the job has ended, and expects this state.
    pub(crate) async fn ends(&self, id: &str, state: v1::JobState) -> v1::Job {
        let is_final = |state| attune_proto::words::state_words(state).is_some_and(|words| words.is_final);
        let job = self.wait(id, "end", |job| is_final(job.state())).await;
        assert_eq!(job.state(), state, "{job:#?}\n{}", self.logs());
        job
    }

    /// The logs of both.
    pub(crate) fn logs(&self) -> String {
        let read = |name: &str| std::fs::read_to_string(self.path(name)).unwrap_or_default();
        let tail = |text: String| {
            let lines: Vec<_> = text.lines().rev().take(40).collect();
            lines.into_iter().rev().collect::<Vec<_>>().join("\n")
        };
        format!("scheduler:\n{}\nworker:\n{}", tail(read("scheduler.log")), tail(read("worker.log")))
    }
}

/// Whether a process runs.
pub(crate) fn is_alive(process: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // After the name in parentheses: the state. One that nobody has asked for its end is over all the same.
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| state != "Z")
}

/// The addresses of a scheduler, and of one that may stand by.
fn urls(port: u16, other_port: u16, is_several: bool) -> String {
    let of = |port: u16| format!("http://127.0.0.1:{port}");
    if is_several { format!("{},{}", of(port), of(other_port)) } else { of(port) }
}

/// The digests of a job's results by role.
pub(crate) fn outputs(job: &v1::Job) -> BTreeMap<String, String> {
    job.outputs.iter().map(|output| (output.role.clone(), output.digest.clone())).collect()
}

/// Writes the demonstration's world, base and jobs into `folder`.
pub(crate) fn world(folder: &Path) {
    let output = attune().args(["demo", "--files"]).arg(folder).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Settings that make the demonstration's jobs small.
pub(crate) const SMALL: [&str; 4] =
    ["tune.batch_tokens=256", "data.max_length=64", "tune.logical_shards=2", "data.validation[0].rows=4"];
