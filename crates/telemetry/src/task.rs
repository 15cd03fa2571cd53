//! Background tasks: each has a name, a cancel rule and an error rule, and none is lost without a report.
//!
//! A process has one [`TaskGroup`]. Shutdown is asked for through its [`Stop`] signal: a task under
//! [`OnCancel::Wait`] sees the signal itself, finishes what must not be cut and returns; one under [`OnCancel::Abort`] is
//! dropped at its next await. [`TaskGroup::shutdown`] waits for both, at most for the time given.

use std::any::Any;
use std::error::Error as StdError;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use crate::TaskFailure;

/// What a request to stop means for a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnCancel {
    /// The task watches [`Stop`] itself and returns when it has finished what must not be cut.
    Wait,
    /// The task may be dropped at any await.
    Abort,
}

/// What an error or a panic of a task means for the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// It is logged and recorded; the others go on.
    Log,
    /// The process cannot do its work without this task: everybody is asked to stop.
    Shutdown,
}

/// The declaration of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    name: &'static str,
    on_cancel: OnCancel,
    on_error: OnError,
}

impl Task {
    /// A task that is waited for when the group stops, and whose error is logged.
    pub const fn new(name: &'static str) -> Self {
        Self { name, on_cancel: OnCancel::Wait, on_error: OnError::Log }
    }

    /// The same, but dropped at its next await when the group stops.
    #[must_use]
    pub const fn abort_on_cancel(self) -> Self {
        Self { on_cancel: OnCancel::Abort, ..self }
    }

    /// The same, but its error stops the group.
    #[must_use]
    pub const fn shutdown_on_error(self) -> Self {
        Self { on_error: OnError::Shutdown, ..self }
    }
}

/// A request to stop that everybody holding it can see. Cloning is cheap.
#[derive(Debug, Clone, Default)]
pub struct Stop(CancellationToken);

impl Stop {
    /// A signal that nobody has given yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks to stop. Asking twice is the same as once.
    pub fn request(&self) {
        self.0.cancel();
    }

    /// Whether somebody asked.
    pub fn is_requested(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Returns when somebody has asked; cancel-safe.
    pub async fn requested(&self) {
        self.0.cancelled().await;
    }

    /// A signal that is given together with this one, or alone.
    #[must_use]
    pub fn child(&self) -> Self {
        Self(self.0.child_token())
    }
}

/// One started task.
#[derive(Debug)]
pub struct TaskHandle {
    dropped: CancellationToken,
    join: tokio::task::JoinHandle<()>,
}

impl TaskHandle {
    /// Drops the task at its next await, whatever its cancel rule. This is not a failure.
    pub fn abort(&self) {
        self.dropped.cancel();
    }

    /// Whether the task has ended.
    pub fn is_finished(&self) -> bool {
        self.join.is_finished()
    }

    /// Waits until the task has ended, well or not; how it ended is in [`TaskGroup::failures`].
    pub async fn finished(self) {
        // The wrapper catches panics; what remains is a runtime that is going away, which `Unreported` records.
        let _ = self.join.await;
    }
}

/// The tasks of a process. Cloning gives another handle to the same group.
#[derive(Debug, Clone, Default)]
pub struct TaskGroup {
    tracker: TaskTracker,
    stop: Stop,
    out_of_time: CancellationToken,
    failures: Arc<Mutex<Vec<TaskFailure>>>,
}

/// Records a task that the runtime drops before it ends.
struct Unreported {
    task: Option<Task>,
    group: TaskGroup,
}

impl Unreported {
    fn report(mut self, failure: Option<TaskFailure>) {
        if let Some((task, failure)) = self.task.take().zip(failure) {
            self.group.record(task, failure);
        }
    }
}

impl Drop for Unreported {
    fn drop(&mut self) {
        if let Some(task) = self.task {
            self.group.record(task, TaskFailure::Lost { task: task.name });
        }
    }
}

impl TaskGroup {
    /// A group without tasks.
    pub fn new() -> Self {
        Self::default()
    }

    /// The signal that tells the tasks of this group to stop.
    pub fn stop(&self) -> Stop {
        self.stop.clone()
    }

    /// Starts a task on the current runtime. The future's error is reported with all its sources.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn spawn<E>(&self, task: Task, future: impl Future<Output = Result<(), E>> + Send + 'static) -> TaskHandle
    where
        E: Into<Box<dyn StdError + Send + Sync>> + Send + 'static,
    {
        let dropped = CancellationToken::new();
        let unreported = Unreported { task: Some(task), group: self.clone() };
        let span = tracing::debug_span!("task", name = task.name);
        let (stop, out_of_time, aborted) = (self.stop.clone(), self.out_of_time.clone(), dropped.clone());
        let wrapper = async move {
            let stopped = async {
                match task.on_cancel {
                    OnCancel::Abort => stop.requested().await,
                    OnCancel::Wait => std::future::pending().await,
                }
            };
            // Whichever arm wins, the task's future is dropped with this block: that is what abort means. The task's own
            // end is looked at first, so that a result is never thrown away for a signal that came at the same time.
            let failure = tokio::select! {
                biased;
                ended = AssertUnwindSafe(future).catch_unwind() => failure(task.name, ended),
                () = aborted.cancelled() => None,
                () = stopped => None,
                () = out_of_time.cancelled() => Some(TaskFailure::Overran { task: task.name }),
            };
            unreported.report(failure);
        };
        TaskHandle { dropped, join: self.tracker.spawn(wrapper.instrument(span)) }
    }

    /// The failures so far, oldest first.
    pub fn failures(&self) -> Vec<TaskFailure> {
        self.lock().clone()
    }

    /// Number of tasks that have not ended.
    pub fn n_running(&self) -> usize {
        self.tracker.len()
    }

    /// Asks every task to stop and waits until all have ended, at most for `limit`; those that are left are dropped at
    /// their next await. Returns all failures of the group's life, oldest first: empty means that everything ended well.
    pub async fn shutdown(&self, limit: Duration) -> Vec<TaskFailure> {
        self.stop.request();
        self.tracker.close();
        if tokio::time::timeout(limit, self.tracker.wait()).await.is_err() {
            self.out_of_time.cancel();
            // A task that blocks its thread cannot be dropped; a short second bound keeps even that from hanging us.
            let _ = tokio::time::timeout(DROP_LIMIT, self.tracker.wait()).await;
        }
        self.failures()
    }

    fn record(&self, task: Task, failure: TaskFailure) {
        tracing::error!(task = task.name, error = %failure, "task failed");
        self.lock().push(failure);
        if task.on_error == OnError::Shutdown {
            self.stop.request();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<TaskFailure>> {
        // A push cannot leave the vector half written, so a poisoned lock holds good data.
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long dropped tasks may take to reach an await.
const DROP_LIMIT: Duration = Duration::from_secs(1);

fn failure<E>(task: &'static str, ended: Result<Result<(), E>, Box<dyn Any + Send>>) -> Option<TaskFailure>
where
    E: Into<Box<dyn StdError + Send + Sync>>,
{
    match ended {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(TaskFailure::Failed { task, message: chain(&*error.into()) }),
        Err(panic) => Some(TaskFailure::Panicked { task, message: panic_text(&*panic) }),
    }
}

fn chain(error: &(dyn StdError + 'static)) -> String {
    let sources = std::iter::successors(Some(error), |error: &&(dyn StdError + 'static)| (*error).source());
    let mut texts: Vec<_> = sources.map(ToString::to_string).collect();
    // A wrapper such as `io::Error` shows its source as its own text.
    texts.dedup();
    texts.join(": ")
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a value that is not text").to_owned()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn a_waiting_task_finishes_its_work_and_an_aborting_one_is_dropped() {
        let group = TaskGroup::new();
        let finished = Arc::new(AtomicBool::new(false));
        let (stop, done) = (group.stop(), Arc::clone(&finished));
        group.spawn(Task::new("drain"), async move {
            stop.requested().await;
            tokio::time::sleep(Duration::from_secs(2)).await;
            done.store(true, Ordering::SeqCst);
            Ok::<_, Infallible>(())
        });
        group.spawn(Task::new("ticker").abort_on_cancel(), std::future::pending::<Result<(), Infallible>>());
        assert_eq!(group.n_running(), 2);
        assert_eq!(group.shutdown(LIMIT).await, []);
        assert!(finished.load(Ordering::SeqCst));
        assert_eq!(group.n_running(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn errors_and_panics_are_recorded_by_name_and_the_others_go_on() {
        let group = TaskGroup::new();
        let disk = io::Error::other(io::Error::other("disk full"));
        group.spawn(Task::new("writer"), async { Err(disk) }).finished().await;
        group.spawn(Task::new("reader"), async { panic_here() }).finished().await;
        assert!(!group.stop().is_requested());
        let failures = group.shutdown(LIMIT).await;
        assert_eq!(failures.iter().map(TaskFailure::task).collect::<Vec<_>>(), ["writer", "reader"]);
        assert_eq!(failures[0].to_string(), "task \"writer\" failed: disk full");
        assert!(matches!(&failures[1], TaskFailure::Panicked { message, .. } if message == "row 7"));
    }

    fn panic_here() -> Result<(), Infallible> {
        panic!("row {}", 7)
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_the_process_needs_stops_the_others() {
        let group = TaskGroup::new();
        let stop = group.stop();
        group.spawn(Task::new("server").shutdown_on_error(), async { Err("port 7070 is taken") });
        stop.requested().await;
        assert_eq!(group.shutdown(LIMIT).await.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn shutdown_is_bounded_and_names_who_overran() {
        let group = TaskGroup::new();
        group.spawn(Task::new("stuck"), std::future::pending::<Result<(), Infallible>>());
        let before = tokio::time::Instant::now();
        assert_eq!(group.shutdown(LIMIT).await, [TaskFailure::Overran { task: "stuck" }]);
        assert!(before.elapsed() <= LIMIT + DROP_LIMIT);
    }

    #[tokio::test]
    async fn an_aborted_task_is_not_a_failure() {
        let group = TaskGroup::new();
        let handle = group.spawn(Task::new("stuck"), std::future::pending::<Result<(), Infallible>>());
        handle.abort();
        handle.finished().await;
        assert_eq!(group.failures(), []);
    }

    #[test]
    fn a_task_dropped_with_its_runtime_is_lost_aloud() {
        let group = TaskGroup::new();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            group.spawn(Task::new("orphan"), std::future::pending::<Result<(), Infallible>>());
        });
        drop(runtime);
        assert_eq!(group.failures(), [TaskFailure::Lost { task: "orphan" }]);
    }
}
