//! One attempt on this node: what its process says becomes reports, what it makes is stored, and its end is told once.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use attune_proto::convert::id::AttemptId;
use attune_proto::convert::time::{duration, timestamp};
use attune_proto::v1;
use attune_spec::id::{CohortId, Digest, Step};
use attune_spec::job::Plan;
use attune_trainer::protocol::{Command, Event, Peer};
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::clock;
use crate::cohort::Node;
use crate::failure;
use crate::upload::{Item, Stored, UploadError, Uploader};

/// Shortest time between two reports of progress and metrics.
const REPORT_INTERVAL: Duration = Duration::from_millis(300);
/// Most metric points that wait for a report.
const METRICS_MAX: usize = 4096;
/// Most notes that an attempt's process passes on; its log is counted by itself.
const NOTES_MAX: usize = 500;

/// An accepted offer.
#[derive(Debug, Clone)]
pub(crate) struct Task {
    pub(crate) attempt: AttemptId,
    /// The job's name.
    pub(crate) name: String,
    pub(crate) plan: Plan,
    pub(crate) checkpoint: Option<Digest>,
    pub(crate) checkpoint_step: Step,
    pub(crate) ranks: u32,
    /// The number of the NVIDIA device that it works on; the processor without.
    pub(crate) card: Option<u32>,
    /// Longest time without a finished step.
    pub(crate) stall: Duration,
    /// This worker's rank in the gang, and how many workers that has, if it has several. The first leads: it alone tells how
    /// the attempt goes and stores what it makes; the others tell what goes wrong.
    pub(crate) seat: Option<(u32, u32)>,
}

impl Task {
    fn leads(&self) -> bool {
        self.seat.is_none_or(|(rank, _)| rank == 0)
    }

    /// Something about the attempt, with the rank that says it.
    fn words(&self, message: String) -> String {
        match self.seat {
            Some((rank, size)) => format!("rank {rank} of {size}: {message}"),
            None => message,
        }
    }
}

/// What a cohort tells the agent.
#[derive(Debug)]
pub(crate) enum News {
    /// Something for the scheduler about an attempt.
    Report(AttemptId, v1::attempt_report::Report),
    /// Its process waits for the others of its gang.
    Listening(Peer),
    /// Nothing of it is left.
    Gone,
}

pub(crate) type Report = v1::attempt_report::Report;
pub(crate) type Outcome = v1::attempt_finished::Outcome;

/// Where news go.
#[derive(Debug, Clone)]
pub(crate) struct Wire {
    pub(crate) cohort: CohortId,
    pub(crate) news: mpsc::Sender<(CohortId, News)>,
}

impl Wire {
    pub(crate) async fn send(&self, news: News) {
        // An agent that no longer listens is ending, and kills this cohort next.
        let _ = self.news.send((self.cohort, news)).await;
    }
}

/// Ends this process as `kill -9` would: what a test plants at a fail point.
#[cfg(feature = "failpoints")]
pub(crate) fn kill_this_process() {
    let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
}

/// How the process says that the attempt ended.
#[derive(Debug)]
pub(crate) enum Terminal {
    Stopped,
    Finished,
    Failed(v1::Failure),
}

/// An upload that goes on.
pub(crate) type Upload = BoxFuture<'static, Result<Stored, UploadError>>;

/// An attempt: one lane of the process that its cohort runs.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) task: Task,
    /// Where it works.
    pub(crate) folder: PathBuf,
    /// Its number in the process, once that has it.
    pub(crate) number: Option<u32>,
    pub(crate) terminal: Option<Terminal>,
    /// Why this side ended it.
    pub(crate) ended: Option<v1::Failure>,
    /// Its end is told, or nobody wants to know.
    is_over: bool,
    wire: Wire,
    uploader: Uploader,
    /// Folders that wait for their turn.
    queue: VecDeque<Item>,
    is_uploading: bool,
    stop: Option<(v1::StopPurpose, Instant)>,
    last_step: Instant,
    /// Its process waits for the others of its gang, which may take as long as it takes them to come.
    is_meeting: bool,
    progress: Option<v1::JobProgress>,
    metrics: Vec<v1::MetricPoint>,
    dropped: u64,
    flush: Option<Instant>,
    notes: usize,
    step: u64,
    checkpoint: Option<v1::CheckpointCommitted>,
    outputs: Vec<v1::JobOutput>,
}

impl Lane {
    pub(crate) fn new(node: &Arc<Node>, task: Task, folder: PathBuf, wire: Wire) -> Self {
        Self {
            uploader: Uploader::new(node, &task),
            step: task.checkpoint_step.0,
            task,
            folder,
            number: None,
            terminal: None,
            ended: None,
            is_over: false,
            wire,
            queue: VecDeque::new(),
            is_uploading: false,
            stop: None,
            last_step: Instant::now(),
            is_meeting: false,
            progress: None,
            metrics: Vec::new(),
            dropped: 0,
            flush: None,
            notes: 0,
            checkpoint: None,
            outputs: Vec::new(),
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.is_over
    }

    /// Whether its process has still something to do for it.
    pub(crate) fn is_running(&self) -> bool {
        !self.is_over && self.terminal.is_none()
    }

    /// Whether everything that it announced is stored.
    pub(crate) fn is_stored(&self) -> bool {
        self.queue.is_empty() && !self.is_uploading
    }

    /// Nobody wants to hear of it any more.
    pub(crate) fn forget(&mut self) {
        self.is_over = true;
        self.queue.clear();
    }

    pub(crate) async fn report(&self, report: Report) {
        let is_told = match &report {
            Report::Note(_) => true,
            Report::Finished(finished) => matches!(finished.outcome, Some(Outcome::Failed(_))),
            _ => false,
        };
        if !self.is_over && (is_told || self.task.leads()) {
            self.wire.send(News::Report(self.task.attempt.clone(), report)).await;
        }
    }

    /// Tells how it ended: its last report. `is_shared` where its process died and others ran in it.
    pub(crate) async fn finish(&mut self, outcome: Outcome, is_shared: bool) {
        if self.is_over {
            return;
        }
        self.flush().await;
        let outcome = match outcome {
            Outcome::Failed(failed) => {
                let message = self.task.words(failed.message);
                Outcome::Failed(v1::Failure { message, ..failed })
            }
            outcome => outcome,
        };
        if self.number.is_none() || self.terminal.is_some() {
            // Nobody writes there any more; what is left otherwise goes with the cohort's folder.
            remove(&self.folder).await;
        }
        fail::fail_point!("worker::before_finished", |_| kill_this_process());
        self.report(Report::Finished(v1::AttemptFinished { outcome: Some(outcome), shared: is_shared })).await;
        self.forget();
    }

    /// The attempt's own process, or its part of one, begins.
    pub(crate) async fn started(&mut self, number: u32, process_id: u32) {
        self.number = Some(number);
        self.last_step = Instant::now();
        self.report(Report::Started(v1::AttemptStarted { process_id })).await;
    }

    pub(crate) fn ask_to_stop(&mut self, purpose: v1::StopPurpose, until: Instant) {
        // A second request can only shorten the time, and a cancel replaces a pause.
        self.stop = Some(self.stop.map_or((purpose, until), |(_, before)| (purpose, before.min(until))));
    }

    /// When [`Lane::flush`] is due.
    pub(crate) fn flush_at(&self) -> Option<Instant> {
        self.flush.filter(|_| !self.is_over)
    }

    /// When it must have stopped.
    pub(crate) fn grace_at(&self) -> Option<Instant> {
        self.stop.map(|(_, until)| until).filter(|_| !self.is_over && self.ended.is_none())
    }

    /// When it must have finished a step.
    pub(crate) fn stall_at(&self) -> Option<Instant> {
        (self.is_running() && self.ended.is_none() && !self.is_meeting).then(|| self.last_step + self.task.stall)
    }

    /// Its process has been told of the others.
    pub(crate) fn met(&mut self) {
        self.is_meeting = false;
        self.last_step = Instant::now();
    }

    /// Whether its process has ended because another one of the gang is gone.
    pub(crate) fn lost_a_rank(&self) -> bool {
        let is_lost = |failed: &v1::Failure| failed.cause() == v1::FailureCause::RankLost;
        !self.is_over && matches!(&self.terminal, Some(Terminal::Failed(failed)) if is_lost(failed))
    }

    /// The next folder to store, if it is time for one.
    pub(crate) fn next_upload(&mut self, peak_memory_bytes: impl FnOnce() -> u64) -> Option<Upload> {
        if self.is_uploading || self.is_over || self.ended.is_some() {
            return None;
        }
        // A result is told with how the run went, which is known when it has finished.
        let is_finished = matches!(self.terminal, Some(Terminal::Finished));
        let item = self.queue.pop_front_if(|item| is_finished || matches!(item, Item::Checkpoint { .. }))?;
        self.uploader.memory(peak_memory_bytes());
        self.is_uploading = true;
        Some(self.uploader.store(item))
    }

    /// Takes what became of an upload; a command for the process.
    pub(crate) async fn stored(&mut self, stored: Result<Stored, UploadError>) -> Result<Option<Command>, v1::Failure> {
        self.is_uploading = false;
        match stored {
            Ok(Stored::Checkpoint { step, digest }) => {
                let committed = v1::CheckpointCommitted { digest: digest.to_string(), step: step.0 };
                self.checkpoint = Some(committed.clone());
                self.flush().await;
                self.report(Report::Checkpoint(committed)).await;
                Ok(Some(Command::CheckpointStored { step }))
            }
            Ok(Stored::Output { role, digest }) => {
                self.outputs.push(v1::JobOutput { role, digest: digest.to_string() });
                Ok(None)
            }
            Err(error) => Err(failure::of(error.cause, error.message)),
        }
    }

    /// Takes an event; commands for the process.
    pub(crate) async fn event(&mut self, event: Event) -> Vec<Command> {
        let mut commands = Vec::new();
        match event {
            Event::Listening { peer } => {
                self.is_meeting = true;
                self.wire.send(News::Listening(peer)).await;
            }
            Event::Starting { .. } => self.last_step = Instant::now(),
            Event::Note { topic, message } => self.note(v1::Severity::Warning, topic, message).await,
            Event::Running { step, total_steps, kernel_profile, pinned } => {
                self.last_step = Instant::now();
                self.uploader.running(kernel_profile, pinned);
                let (step, total_steps) = (step.0, total_steps.0);
                self.report(Report::Running(v1::AttemptRunning { step, total_steps })).await;
            }
            Event::Progress { step, total_steps, tokens, tokens_per_second, eta_seconds } => {
                self.last_step = Instant::now();
                self.step = step.0;
                // A defect of this process that a job sets off by its name, once all have heard that it runs.
                #[cfg(feature = "failpoints")]
                if self.step >= 20
                    && let Some(Some(name)) = fail::eval("worker::poisoned", |name| name)
                    && self.task.name == name
                {
                    kill_this_process();
                }
                self.uploader.progress(step, tokens, tokens_per_second);
                self.progress = Some(v1::JobProgress {
                    step: step.0,
                    total_steps: total_steps.0,
                    tokens: tokens.0,
                    eta: Duration::try_from_secs_f64(eta_seconds).ok().map(duration),
                    tokens_per_second,
                    update_time: Some(timestamp(clock::unix_ms())),
                });
                self.flush_soon();
            }
            Event::Metrics { step, tokens, metrics } => {
                // Measuring is progress too: a long evaluation finishes no step.
                self.last_step = Instant::now();
                let time = Some(timestamp(clock::unix_ms()));
                self.metrics.extend(metrics.into_iter().map(|metric| v1::MetricPoint {
                    name: metric.name,
                    step: step.0,
                    tokens: tokens.0,
                    value: metric.value,
                    time,
                    ..Default::default()
                }));
                if self.metrics.len() > METRICS_MAX {
                    let surplus = self.metrics.len() - METRICS_MAX;
                    self.metrics.drain(..surplus);
                    self.dropped += surplus as u64;
                }
                self.flush_soon();
            }
            Event::Checkpoint { step, folder } => {
                self.last_step = Instant::now();
                commands = self.checkpoint(step, folder);
            }
            Event::Output { role, kind, folder, peak_memory_bytes } => {
                // The process may have ended before it is its turn.
                self.uploader.memory(peak_memory_bytes);
                self.queue.push_back(Item::Output { role, kind, folder });
            }
            Event::Stopped { .. } => self.terminal = Some(Terminal::Stopped),
            Event::Finished { summary } => {
                self.uploader.finished(&summary);
                self.terminal = Some(Terminal::Finished);
            }
            Event::Failed { class, message, faults } => {
                let mut failed = failure::of(failure::cause(class, !faults.is_empty()), message);
                let fault = |fault: attune_spec::Fault| v1::FieldFault {
                    path: fault.path.as_str().to_owned(),
                    message: fault.message,
                };
                failed.faults = faults.into_iter().map(fault).collect();
                self.terminal = Some(Terminal::Failed(failed));
            }
        }
        commands
    }

    /// A checkpoint is there to be stored. It replaces one that nobody has begun to store.
    fn checkpoint(&mut self, step: Step, folder: PathBuf) -> Vec<Command> {
        let mut replaced = Vec::new();
        self.queue.retain(|item| match item {
            Item::Checkpoint { step, .. } => {
                replaced.push(Command::CheckpointStored { step: *step });
                false
            }
            Item::Output { .. } => true,
        });
        // Nobody goes on from the last checkpoint of a cancelled job.
        if self.stop.is_none_or(|(purpose, _)| purpose != v1::StopPurpose::Cancel) {
            self.queue.push_back(Item::Checkpoint { step, folder });
        }
        replaced
    }

    /// Passes on what its process has to say.
    async fn note(&mut self, severity: v1::Severity, topic: String, message: String) {
        self.notes += 1;
        if self.notes <= NOTES_MAX {
            self.tell(severity, topic, message).await;
        }
    }

    /// Passes on a line of the log, of which there are no more than there may be.
    pub(crate) async fn log(&mut self, severity: v1::Severity, line: String) {
        self.tell(severity, "log".to_owned(), line).await;
    }

    async fn tell(&mut self, severity: v1::Severity, topic: String, message: String) {
        self.flush().await;
        let message = self.task.words(message);
        let note = v1::JobNote { severity: severity as i32, topic, message, step: self.step, fields: None };
        self.report(Report::Note(note)).await;
    }

    fn flush_soon(&mut self) {
        self.flush.get_or_insert_with(|| Instant::now() + REPORT_INTERVAL);
    }

    /// Passes on the progress and metrics that have gathered.
    pub(crate) async fn flush(&mut self) {
        self.flush = None;
        if let Some(progress) = self.progress.take() {
            self.report(Report::Progress(progress)).await;
        }
        if !self.metrics.is_empty() {
            let metrics = v1::AttemptMetrics {
                points: std::mem::take(&mut self.metrics),
                dropped: std::mem::take(&mut self.dropped),
            };
            self.report(Report::Metrics(metrics)).await;
        }
    }

    /// The end that the process has told of; nothing where it has not.
    pub(crate) fn told(&self, log: Vec<String>) -> Option<Outcome> {
        Some(match self.terminal.as_ref()? {
            Terminal::Finished => {
                let mut outputs = self.outputs.clone();
                // The result comes first, whatever was stored first.
                outputs.sort_by_key(|output| match output.role.as_str() {
                    "adapter" | "model" => 0,
                    "merged" => 2,
                    "report" => 3,
                    _ => 1,
                });
                Outcome::Succeeded(v1::AttemptSucceeded { outputs })
            }
            Terminal::Stopped => {
                // Nobody asked and it stopped all the same: its checkpoint is as good as one that was asked for.
                let purpose = self.stop.map_or(v1::StopPurpose::Preempt, |(purpose, _)| purpose) as i32;
                Outcome::Stopped(v1::AttemptStopped { purpose, checkpoint: self.checkpoint.clone() })
            }
            Terminal::Failed(failed) => Outcome::Failed(v1::Failure { last_log_lines: log, ..failed.clone() }),
        })
    }
}

/// Removes a folder of this node's.
pub(crate) async fn remove(folder: &std::path::Path) {
    if let Err(error) = tokio::fs::remove_dir_all(folder).await
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(folder = %folder.display(), %error, "the attempt's folder cannot be removed");
    }
}
