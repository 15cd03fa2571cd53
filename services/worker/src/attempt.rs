//! One attempt on this node: fetch its inputs, run its process, store what it makes, and say how it ended.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use attune_artifacts::{self as artifacts, Cache};
use attune_proto::convert::id::AttemptId;
use attune_proto::convert::time::{duration, timestamp};
use attune_proto::{Client, v1};
use attune_spec::id::{CohortId, Digest, Step};
use attune_spec::job::Plan;
use attune_spec::job::plan::Input;
use attune_trainer::protocol::{Command, Event, Request, VERSION};
use futures::future::{BoxFuture, OptionFuture};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::child::{Child, Exit, Heard, Program, memory_kills};
use crate::clock;
use crate::failure;
use crate::transfer::Remote;
use crate::upload::{Item, Stored, UploadError, Uploader, roles};

/// Shortest time between two reports of progress and metrics.
const REPORT_INTERVAL: Duration = Duration::from_millis(300);
/// Most metric points that wait for a report.
const METRICS_MAX: usize = 4096;
/// Most lines of the log that an attempt passes on as notes.
const NOTES_MAX: usize = 500;
/// Wait between tries to fetch an input.
const FETCH_WAIT: Duration = Duration::from_secs(1);

/// What all attempts of a node share.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) client: Client,
    pub(crate) cache: Cache,
    pub(crate) worker: String,
    pub(crate) program: Program,
    pub(crate) attempts: PathBuf,
    pub(crate) grace: Duration,
    pub(crate) store_patience: Duration,
}

/// An accepted offer.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) cohort: CohortId,
    pub(crate) attempt: AttemptId,
    /// The job's name.
    pub(crate) name: String,
    pub(crate) plan: Plan,
    pub(crate) checkpoint: Option<Digest>,
    pub(crate) checkpoint_step: Step,
    pub(crate) ranks: u32,
    /// Longest time without a finished step.
    pub(crate) stall: Duration,
}

/// What the agent tells an attempt.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Order {
    /// Stop at a checkpoint, within so much time.
    Stop { purpose: v1::StopPurpose, grace: Option<Duration> },
    /// End now.
    Kill(Killed),
}

/// Why the agent ended an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Killed {
    /// The scheduler has let it go.
    Released,
    /// The lease ended by this node's own clock.
    Fenced,
    /// The agent itself ends.
    Leaving,
}

/// What an attempt tells the agent.
#[derive(Debug)]
pub(crate) enum News {
    /// Something for the scheduler.
    Report(v1::attempt_report::Report),
    /// Nothing of it is left.
    Gone,
}

type Report = v1::attempt_report::Report;
type Outcome = v1::attempt_finished::Outcome;

/// Where news go.
#[derive(Debug, Clone)]
pub(crate) struct Wire {
    pub(crate) cohort: CohortId,
    pub(crate) news: mpsc::Sender<(CohortId, News)>,
}

impl Wire {
    async fn send(&self, news: News) {
        // An agent that no longer listens is ending, and kills this attempt next.
        let _ = self.news.send((self.cohort, news)).await;
    }

    async fn report(&self, report: Report) {
        self.send(News::Report(report)).await;
    }
}

/// Runs an attempt to its end and reports it, unless nobody wants to know any more.
pub(crate) async fn run(node: Arc<Node>, task: Task, mut orders: mpsc::Receiver<Order>, wire: Wire) {
    let folder = node.attempts.join(format!("{}-{}", task.cohort, task.attempt.epoch));
    let outcome = match attempt(&node, &task, &folder, &mut orders, &wire).await {
        Ok(outcome) => Some(outcome),
        Err(End::Failed(failure)) => Some(Outcome::Failed(failure)),
        Err(End::Stopped(purpose)) => {
            Some(Outcome::Stopped(v1::AttemptStopped { purpose: purpose as i32, checkpoint: None }))
        }
        Err(End::Killed(Killed::Released)) => None,
        Err(End::Killed(killed)) => Some(Outcome::Failed(failure::of_killed(killed))),
    };
    if let Err(error) = tokio::fs::remove_dir_all(&folder).await
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(folder = %folder.display(), %error, "the attempt's folder cannot be removed");
    }
    if let Some(outcome) = outcome {
        fail::fail_point!("worker::before_finished", |_| kill_this_process());
        wire.report(Report::Finished(v1::AttemptFinished { outcome: Some(outcome) })).await;
    }
    wire.send(News::Gone).await;
}

/// Ends this process as `kill -9` would: what a test plants at a fail point.
#[cfg(feature = "failpoints")]
pub(crate) fn kill_this_process() {
    let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
}

/// Why an attempt ended before its process ran, or without asking it.
enum End {
    Failed(v1::Failure),
    Stopped(v1::StopPurpose),
    Killed(Killed),
}

/// Fetches an artifact while listening for orders.
async fn fetch(node: &Node, task: &Task, digest: &Digest, orders: &mut mpsc::Receiver<Order>) -> Result<PathBuf, End> {
    let source = Remote::new(node.client.clone());
    let give_up = Instant::now() + node.store_patience;
    loop {
        let fetched = node.cache.fetch(&task.attempt.project, digest, &source);
        let error = tokio::select! {
            fetched = fetched => match fetched {
                Ok(cached) => return Ok(cached.dir().to_owned()),
                Err(error) => error,
            },
            order = orders.recv() => match order {
                Some(Order::Stop { purpose, .. }) => return Err(End::Stopped(purpose)),
                Some(Order::Kill(killed)) => return Err(End::Killed(killed)),
                None => return Err(End::Killed(Killed::Leaving)),
            },
        };
        if error.retry() && Instant::now() < give_up {
            tracing::warn!(%digest, %error, "an input cannot be fetched; trying again");
            tokio::time::sleep(FETCH_WAIT).await;
            continue;
        }
        let cause = match &error {
            artifacts::Error::Corrupt { .. } | artifacts::Error::Mismatch { .. } => v1::FailureCause::Corrupt,
            artifacts::Error::Full { .. } => v1::FailureCause::DiskFull,
            artifacts::Error::NotFound { .. } | artifacts::Error::Refused { .. } => v1::FailureCause::DataFault,
            _ => v1::FailureCause::StoreUnavailable,
        };
        return Err(End::Failed(failure::of(cause, format!("input {digest}: {}", failure::chain(&error)))));
    }
}

async fn attempt(
    node: &Arc<Node>,
    task: &Task,
    folder: &Path,
    orders: &mut mpsc::Receiver<Order>,
    wire: &Wire,
) -> Result<Outcome, End> {
    let io = |error: std::io::Error| {
        let cause = match error.kind() {
            std::io::ErrorKind::StorageFull => v1::FailureCause::DiskFull,
            _ => v1::FailureCause::Internal,
        };
        End::Failed(failure::of(cause, format!("cannot prepare {}: {error}", folder.display())))
    };
    let mut inputs = BTreeMap::new();
    for (_, input) in roles(&task.plan) {
        if let Input::Artifact(digest) = input
            && !inputs.contains_key(digest)
        {
            inputs.insert(*digest, fetch(node, task, digest, orders).await?);
        }
    }
    let resume = match &task.checkpoint {
        Some(digest) => Some(fetch(node, task, digest, orders).await?),
        None => None,
    };
    let work = folder.join("work");
    tokio::fs::create_dir_all(&work).await.map_err(io)?;
    let request = Request {
        version: VERSION,
        name: task.name.clone(),
        plan: task.plan.clone(),
        inputs,
        work,
        ranks: task.ranks,
        resume,
    };
    let mut child = Child::start(&node.program, folder).map_err(|error| {
        let what = node.program.path.display();
        End::Failed(failure::of(v1::FailureCause::Internal, format!("cannot start {what}: {error}")))
    })?;
    wire.report(Report::Started(v1::AttemptStarted { process_id: child.id() })).await;
    child.say(&request).await;
    Run::new(node, task, child, wire).drive(orders).await
}

/// How the process says it ended.
enum Terminal {
    Stopped,
    Finished,
    Failed(v1::Failure),
}

/// An attempt whose process runs.
struct Run<'a> {
    node: &'a Node,
    task: &'a Task,
    child: Child,
    wire: &'a Wire,
    uploader: Uploader,
    /// Folders that wait for their turn.
    queue: VecDeque<Item>,
    /// The folder that is being stored.
    uploading: Option<BoxFuture<'static, Result<Stored, UploadError>>>,
    stop: Option<(v1::StopPurpose, Instant)>,
    /// Why this side ended the process.
    ended: Option<v1::Failure>,
    terminal: Option<Terminal>,
    last_step: Instant,
    memory_kills: u64,
    progress: Option<v1::JobProgress>,
    metrics: Vec<v1::MetricPoint>,
    dropped: u64,
    flush: Option<Instant>,
    notes: usize,
    step: u64,
    checkpoint: Option<v1::CheckpointCommitted>,
    outputs: Vec<v1::JobOutput>,
}

impl<'a> Run<'a> {
    fn new(node: &'a Arc<Node>, task: &'a Task, child: Child, wire: &'a Wire) -> Self {
        Self {
            node,
            task,
            child,
            wire,
            uploader: Uploader::new(node, task),
            queue: VecDeque::new(),
            uploading: None,
            stop: None,
            ended: None,
            terminal: None,
            last_step: Instant::now(),
            memory_kills: memory_kills(),
            progress: None,
            metrics: Vec::new(),
            dropped: 0,
            flush: None,
            notes: 0,
            step: task.checkpoint_step.0,
            checkpoint: None,
            outputs: Vec::new(),
        }
    }

    async fn drive(mut self, orders: &mut mpsc::Receiver<Order>) -> Result<Outcome, End> {
        let exit = loop {
            self.start_upload();
            let stall = self.last_step + self.task.stall;
            let flush: OptionFuture<_> = self.flush.map(sleep_until).into();
            let grace: OptionFuture<_> = self.stop.map(|(_, until)| sleep_until(until)).into();
            let upload: OptionFuture<_> = self.uploading.as_mut().into();
            tokio::select! {
                heard = self.child.hear() => match heard {
                    Heard::Line(line) => self.line(&line).await,
                    Heard::Log(line) => {
                        tracing::debug!(attempt = %self.task.attempt, "{line}");
                        self.note(v1::Severity::Info, "log".to_owned(), line).await;
                    }
                    Heard::Exited(exit) => break exit,
                },
                order = orders.recv() => match order {
                    Some(Order::Stop { purpose, grace }) => self.ask_to_stop(purpose, grace).await,
                    Some(Order::Kill(killed)) => return Err(End::Killed(killed)),
                    None => return Err(End::Killed(Killed::Leaving)),
                },
                Some(stored) = upload => {
                    self.uploading = None;
                    self.stored(stored).await;
                }
                Some(()) = flush => self.flush().await,
                Some(()) = grace, if self.ended.is_none() => {
                    let message = "it did not stop at a checkpoint within its grace time";
                    self.end(failure::of(v1::FailureCause::Hung, message));
                }
                () = sleep_until(stall), if self.ended.is_none() && self.terminal.is_none() => {
                    let message = format!("no step was finished for {} seconds", self.task.stall.as_secs());
                    self.end(failure::of(v1::FailureCause::Hung, message));
                }
            }
        };
        self.rest(orders).await?;
        self.flush().await;
        Ok(self.outcome(exit))
    }

    /// Kills the process; its end is heard later.
    fn end(&mut self, why: v1::Failure) {
        self.ended = Some(why);
        self.child.kill();
    }

    async fn ask_to_stop(&mut self, purpose: v1::StopPurpose, grace: Option<Duration>) {
        let until = Instant::now() + grace.unwrap_or(self.node.grace);
        // A second request can only shorten the time, and a cancel replaces a pause.
        self.stop = Some(self.stop.map_or((purpose, until), |(_, before)| (purpose, before.min(until))));
        self.child.say(&Command::CheckpointAndStop).await;
    }

    /// Stores what the process left behind when it ended: a checkpoint that it announced is whole.
    async fn rest(&mut self, orders: &mut mpsc::Receiver<Order>) -> Result<(), End> {
        while self.ended.is_none() && (self.uploading.is_some() || !self.queue.is_empty()) {
            self.start_upload();
            let upload: OptionFuture<_> = self.uploading.as_mut().into();
            tokio::select! {
                Some(stored) = upload => {
                    self.uploading = None;
                    self.stored(stored).await;
                }
                order = orders.recv() => match order {
                    Some(Order::Stop { purpose, .. }) => {
                        self.stop.get_or_insert_with(|| (purpose, Instant::now()));
                    }
                    Some(Order::Kill(killed)) => return Err(End::Killed(killed)),
                    None => return Err(End::Killed(Killed::Leaving)),
                },
            }
        }
        Ok(())
    }

    fn start_upload(&mut self) {
        if self.uploading.is_none()
            && let Some(item) = self.queue.pop_front()
        {
            self.uploader.memory(self.child.peak_memory_bytes());
            self.uploading = Some(self.uploader.store(item));
        }
    }

    async fn stored(&mut self, stored: Result<Stored, UploadError>) {
        match stored {
            Ok(Stored::Checkpoint { step, digest }) => {
                let committed = v1::CheckpointCommitted { digest: digest.to_string(), step: step.0 };
                self.checkpoint = Some(committed.clone());
                self.flush().await;
                self.wire.report(Report::Checkpoint(committed)).await;
                self.child.say(&Command::CheckpointStored { step }).await;
            }
            Ok(Stored::Output { role, digest }) => {
                self.outputs.push(v1::JobOutput { role, digest: digest.to_string() });
            }
            Err(error) => self.end(failure::of(error.cause, error.message)),
        }
    }

    async fn line(&mut self, line: &str) {
        let event: Event = match serde_json::from_str(line) {
            Ok(event) => event,
            Err(error) => {
                let shown: String = line.chars().take(200).collect();
                let message = format!("the training process said {shown:?}, which is no message: {error}");
                return self.end(failure::of(v1::FailureCause::Internal, message));
            }
        };
        match event {
            Event::Starting { .. } => self.last_step = Instant::now(),
            Event::Note { topic, message } => self.note(v1::Severity::Warning, topic, message).await,
            Event::Running { step, total_steps, kernel_profile, pinned } => {
                self.last_step = Instant::now();
                self.uploader.running(kernel_profile, pinned);
                let (step, total_steps) = (step.0, total_steps.0);
                self.wire.report(Report::Running(v1::AttemptRunning { step, total_steps })).await;
            }
            Event::Progress { step, total_steps, tokens, tokens_per_second, eta_seconds } => {
                self.last_step = Instant::now();
                self.step = step.0;
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
                // A newer checkpoint replaces one that nobody has begun to store.
                let mut replaced = Vec::new();
                self.queue.retain(|item| match item {
                    Item::Checkpoint { step, .. } => {
                        replaced.push(*step);
                        false
                    }
                    Item::Output { .. } => true,
                });
                for step in replaced {
                    self.child.say(&Command::CheckpointStored { step }).await;
                }
                // Nobody goes on from the last checkpoint of a cancelled job.
                if self.stop.is_none_or(|(purpose, _)| purpose != v1::StopPurpose::Cancel) {
                    self.queue.push_back(Item::Checkpoint { step, folder });
                }
            }
            Event::Output { role, kind, folder } => self.queue.push_back(Item::Output { role, kind, folder }),
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
    }

    async fn note(&mut self, severity: v1::Severity, topic: String, message: String) {
        self.notes += 1;
        if self.notes > NOTES_MAX {
            return;
        }
        self.flush().await;
        let note = v1::JobNote { severity: severity as i32, topic, message, step: self.step, fields: None };
        self.wire.report(Report::Note(note)).await;
    }

    fn flush_soon(&mut self) {
        self.flush.get_or_insert_with(|| Instant::now() + REPORT_INTERVAL);
    }

    async fn flush(&mut self) {
        self.flush = None;
        if let Some(progress) = self.progress.take() {
            self.wire.report(Report::Progress(progress)).await;
        }
        if !self.metrics.is_empty() {
            let metrics = v1::AttemptMetrics {
                points: std::mem::take(&mut self.metrics),
                dropped: std::mem::take(&mut self.dropped),
            };
            self.wire.report(Report::Metrics(metrics)).await;
        }
    }

    fn outcome(mut self, exit: Exit) -> Outcome {
        if let Some(failure) = self.ended {
            return Outcome::Failed(v1::Failure { last_log_lines: self.child.log(), ..failure });
        }
        let purpose = self.stop.map(|(purpose, _)| purpose);
        match self.terminal {
            Some(Terminal::Finished) if exit == Exit::Code(0) => {
                // The result comes first, whatever was stored first.
                self.outputs.sort_by_key(|output| match output.role.as_str() {
                    "merged" => 1,
                    "report" => 2,
                    _ => 0,
                });
                Outcome::Succeeded(v1::AttemptSucceeded { outputs: self.outputs })
            }
            Some(Terminal::Stopped) if exit == Exit::Code(0) => {
                // Nobody asked and it stopped all the same: its checkpoint is as good as one that was asked for.
                let purpose = purpose.unwrap_or(v1::StopPurpose::Preempt) as i32;
                Outcome::Stopped(v1::AttemptStopped { purpose, checkpoint: self.checkpoint })
            }
            Some(Terminal::Failed(failed)) => {
                Outcome::Failed(v1::Failure { last_log_lines: self.child.log(), ..failed })
            }
            _ => {
                let mut failed = failure::of_silent_end(exit, self.memory_kills);
                failed.last_log_lines = self.child.log();
                Outcome::Failed(failed)
            }
        }
    }
}
