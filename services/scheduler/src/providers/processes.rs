//! Workers that are processes of this machine, children of the scheduler.
//!
//! Each has one of `max` folders, and with it the inputs that an earlier one has fetched. They do not outlive the scheduler: their standard
//! input is a pipe that closes when it goes, however it goes, and they then stop at a checkpoint and end.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use attune_proto::secret;
use attune_scheduler_core::supply::{Pool, RequestId, Standing};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::sync::Mutex;

use super::launch::{Launch, shown};
use super::{ProviderError, WorkerProvider};

/// Time beyond their grace for workers to end with the scheduler.
const END_TIME: Duration = Duration::from_secs(10);
/// What of the scheduler's environment, beside its secrets, is not a worker's: what the worker's command line says.
const NOT_THEIRS: [&str; 3] = ["ATTUNE_SERVER", "ATTUNE_PROJECT", "ATTUNE_CA"];

/// One worker.
#[derive(Debug)]
struct Running {
    child: Child,
    /// The number of its folder.
    number: u32,
}

impl Running {
    fn terminate(&self) -> std::io::Result<()> {
        match self.child.id().and_then(|id| i32::try_from(id).ok()) {
            Some(id) => Ok(kill(Pid::from_raw(id), Signal::SIGTERM)?),
            None => Ok(()),
        }
    }
}

/// The workers of a pool.
#[derive(Debug)]
pub(super) struct Processes {
    pool: Pool,
    launch: Launch,
    work_dir: PathBuf,
    running: Mutex<BTreeMap<RequestId, Running>>,
}

impl Processes {
    pub(super) fn new(pool: Pool, launch: Launch, work_dir: PathBuf) -> Self {
        Self { pool, launch, work_dir, running: Mutex::default() }
    }

    /// The arguments of a worker in folder `number`.
    fn arguments(&self, request: &RequestId, number: u32) -> Vec<OsString> {
        let mut arguments = self.launch.arguments(&self.pool, request, &self.work_dir.join(number.to_string()));
        arguments.push("--until-stdin-closes".into());
        arguments
    }
}

fn failed(doing: &'static str) -> impl FnOnce(std::io::Error) -> ProviderError {
    move |error| ProviderError { engine: "this machine", doing, why: error.to_string() }
}

#[tonic::async_trait]
impl WorkerProvider for Processes {
    async fn list(&self) -> Result<BTreeMap<RequestId, Standing>, ProviderError> {
        let mut running = self.running.lock().await;
        running.retain(|request, worker| match worker.child.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) => {
                tracing::info!(pool = %self.pool.name, %request, %status, "a worker has ended");
                false
            }
            Err(error) => {
                tracing::warn!(pool = %self.pool.name, %request, %error, "nobody knows whether a worker has ended");
                true
            }
        });
        Ok(running.keys().map(|request| (request.clone(), Standing::Running)).collect())
    }

    async fn ask(&self, request: &RequestId) -> Result<(), ProviderError> {
        let mut running = self.running.lock().await;
        let taken: Vec<u32> = running.values().map(|worker| worker.number).collect();
        let number = (1..).find(|number| !taken.contains(number)).unwrap_or_default();
        let mut command = Command::new(&self.launch.program);
        for name in secret::VARIABLES.into_iter().chain(NOT_THEIRS) {
            command.env_remove(name);
        }
        command.args(self.arguments(request, number));
        // A group of its own: an interrupt from a terminal is the scheduler's, who ends its workers in order.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0).kill_on_drop(false);
        let child = command.spawn().map_err(failed("start a worker"))?;
        running.insert(request.clone(), Running { child, number });
        Ok(())
    }

    async fn give_back(&self, request: &RequestId) -> Result<(), ProviderError> {
        match self.running.lock().await.get(request) {
            Some(worker) => worker.terminate().map_err(failed("tell a worker to end")),
            None => Ok(()),
        }
    }

    async fn withdraw(&self, request: &RequestId) -> Result<(), ProviderError> {
        match self.running.lock().await.get_mut(request) {
            Some(worker) => worker.child.start_kill().map_err(failed("end a worker")),
            None => Ok(()),
        }
    }

    fn rendered(&self, request: &RequestId) -> String {
        let arguments = self.arguments(request, 1);
        shown([self.launch.program.as_os_str()].into_iter().chain(arguments.iter().map(OsString::as_os_str)))
    }

    async fn close(&self) {
        let mut running = std::mem::take(&mut *self.running.lock().await);
        for worker in running.values_mut() {
            drop(worker.child.stdin.take());
            // One that has ended needs no signal.
            let _ = worker.terminate();
        }
        let ended = async {
            for worker in running.values_mut() {
                let _ = worker.child.wait().await;
            }
        };
        if tokio::time::timeout(self.launch.grace + END_TIME, ended).await.is_err() {
            tracing::warn!(pool = %self.pool.name, "workers did not end in time");
            running.values_mut().for_each(|worker| drop(worker.child.start_kill()));
        }
    }
}
