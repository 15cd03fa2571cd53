//! One cohort on this node: fetch what its attempts need, run them as lanes of one process, and see each of them to its
//! end. What happens to one lane is its own; a process that dies is the end of all that still ran in it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use attune_artifacts::{self as artifacts, Cache, Cached};
use attune_proto::convert::id::AttemptId;
use attune_proto::{Client, v1};
use attune_spec::id::Digest;
use attune_spec::job::plan::Input;
use attune_trainer::protocol::{self, Command, Event, Peer, Request, Seat, Tagged, VERSION};
use futures::future::{FutureExt as _, OptionFuture};
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::attempt::{Lane, News, Outcome, Task, Wire, remove};
use crate::child::{Child, Exit, Heard, Program, memory_kills};
use crate::failure;
use crate::meeting::address_towards;
use crate::transfer::Remote;
use crate::upload::{Stored, UploadError, roles};

/// Wait between tries to fetch an input.
const FETCH_WAIT: Duration = Duration::from_secs(1);
/// How long the worker of a process that lost another one waits for that one's worker to say why.
const BLAME_WAIT: Duration = Duration::from_secs(5);

/// What all cohorts of a node share.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) client: Client,
    pub(crate) cache: Cache,
    pub(crate) worker: String,
    pub(crate) program: Program,
    pub(crate) attempts: PathBuf,
    pub(crate) grace: Duration,
    pub(crate) store_patience: Duration,
    /// The addresses of the schedulers.
    pub(crate) scheduler: String,
    pub(crate) gang_address: Option<IpAddr>,
}

/// What the agent tells a cohort.
#[derive(Debug, Clone)]
pub(crate) enum Order {
    /// An attempt is to stop at a checkpoint, within so much time.
    Stop { attempt: AttemptId, purpose: v1::StopPurpose, grace: Option<Duration> },
    /// An attempt is over for the scheduler.
    Drop { attempt: AttemptId },
    /// Where the processes of the gang listen, by rank.
    Peers(Vec<Peer>),
    /// End now.
    Kill(Killed),
}

/// Why the agent ended a cohort.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Killed {
    /// The scheduler has let it go.
    Released,
    /// The lease ended by this node's own clock.
    Fenced,
    /// The agent itself ends.
    Leaving,
}

/// Runs a cohort to its end and reports each attempt, unless nobody wants to know any more.
pub(crate) async fn run(node: Arc<Node>, tasks: Vec<Task>, mut orders: mpsc::Receiver<Order>, wire: Wire) {
    let folder = node.attempts.join(wire.cohort.to_string());
    let lane = |(place, task)| Lane::new(&node, task, folder.join(format!("{place}")), wire.clone());
    let lanes = tasks.into_iter().enumerate().map(lane).collect();
    let mut cohort = Cohort {
        node: Arc::clone(&node),
        folder: folder.clone(),
        lanes,
        child: None,
        uploads: FuturesUnordered::new(),
        inputs: Vec::new(),
        ended: None,
        memory_kills: memory_kills(),
    };
    if let Err(killed) = cohort.go(&mut orders).await {
        cohort.clear().await;
        cohort.child = None;
        cohort.uploads.clear();
        for lane in &mut cohort.lanes {
            if killed == Killed::Released {
                lane.forget();
            }
            lane.finish(Outcome::Failed(failure::of_killed(killed)), false).await;
        }
    }
    drop(cohort);
    remove(&folder).await;
    // What it used may go now, if there is more than the cache may have.
    if let Err(error) = node.cache.trim().await {
        tracing::warn!(%error, "the cache of inputs was not trimmed");
    }
    wire.send(News::Gone).await;
}

/// The place of a task's process among those of its gang.
async fn seat(node: &Node, task: &Task) -> std::io::Result<Option<Seat>> {
    let Some((rank, size)) = task.seat else { return Ok(None) };
    let host = match node.gang_address {
        Some(address) => address,
        None => address_towards(&node.scheduler).await?,
    };
    Ok(Some(Seat { rank, size, host }))
}

/// An upload that goes on, with the place of its lane.
type Uploads = FuturesUnordered<futures::future::BoxFuture<'static, (usize, Result<Stored, UploadError>)>>;

struct Cohort {
    node: Arc<Node>,
    folder: PathBuf,
    lanes: Vec<Lane>,
    child: Option<Child>,
    uploads: Uploads,
    /// What its attempts read, which the cache keeps for as long.
    inputs: Vec<Cached>,
    /// Why this side ended the process.
    ended: Option<v1::Failure>,
    memory_kills: u64,
}

impl Cohort {
    async fn go(&mut self, orders: &mut mpsc::Receiver<Order>) -> Result<(), Killed> {
        let mut requests = Vec::new();
        for place in 0..self.lanes.len() {
            if let Some(request) = self.request(place, orders).await? {
                requests.push((place, request));
            }
        }
        // The inputs of a later one take their time, in which an earlier one may have ended.
        requests.retain(|(place, _)| !self.lanes[*place].is_over());
        if requests.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.start(requests).await {
            let message = format!("cannot start {}: {error}", self.node.program.path.display());
            for lane in &mut self.lanes {
                let failed = failure::of(v1::FailureCause::Internal, message.clone());
                lane.finish(Outcome::Failed(failed), false).await;
            }
            return Ok(());
        }
        let exit = self.drive(orders).await?;
        self.clear().await;
        self.rest(orders).await?;
        self.linger(orders).await?;
        self.settle(exit).await;
        Ok(())
    }

    /// Sees to it that nothing of the process is left, before anybody hears of its end.
    async fn clear(&mut self) {
        if let Some(child) = &mut self.child {
            child.clear().await;
        }
    }

    /// What the process is to do for a lane; nothing when the lane has ended.
    async fn request(&mut self, place: usize, orders: &mut mpsc::Receiver<Order>) -> Result<Option<Request>, Killed> {
        let task = self.lanes[place].task.clone();
        let mut inputs = BTreeMap::new();
        for (_, input) in roles(&task.plan) {
            if let Input::Artifact(digest) = input
                && !inputs.contains_key(digest)
            {
                let Some(folder) = self.fetch(place, digest, orders).await? else { return Ok(None) };
                inputs.insert(*digest, folder);
            }
        }
        let mut resume = None;
        if let Some(digest) = &task.checkpoint {
            resume = self.fetch(place, digest, orders).await?;
            if resume.is_none() {
                return Ok(None);
            }
        }
        let lane = &mut self.lanes[place];
        if lane.is_over() {
            return Ok(None);
        }
        let work = lane.folder.join("work");
        if let Err(error) = tokio::fs::create_dir_all(&work).await {
            let cause = match error.kind() {
                std::io::ErrorKind::StorageFull => v1::FailureCause::DiskFull,
                _ => v1::FailureCause::Internal,
            };
            let failed = failure::of(cause, format!("cannot prepare {}: {error}", work.display()));
            lane.finish(Outcome::Failed(failed), false).await;
            return Ok(None);
        }
        let seat = match seat(&self.node, &task).await {
            Ok(seat) => seat,
            Err(error) => {
                let message = format!(
                    "no address of this node is known by which others of the gang reach it: {error}; give one with --gang-address"
                );
                self.lanes[place]
                    .finish(Outcome::Failed(failure::of(v1::FailureCause::Internal, message)), false)
                    .await;
                return Ok(None);
            }
        };
        let Task { name, plan, ranks, card, .. } = task;
        Ok(Some(Request { version: VERSION, name, plan, inputs, work, ranks, card, resume, seat }))
    }

    /// Waits a little where a process ended because another one is gone: that one's worker knows why, and what it says ends
    /// this cohort.
    async fn linger(&mut self, orders: &mut mpsc::Receiver<Order>) -> Result<(), Killed> {
        let until = Instant::now() + BLAME_WAIT;
        while self.ended.is_none() && self.lanes.iter().any(Lane::lost_a_rank) {
            tokio::select! {
                order = orders.recv() => self.order(order).await?,
                () = sleep_until(until) => break,
            }
        }
        Ok(())
    }

    /// Fetches an artifact while listening for orders; nothing when the lane has ended.
    async fn fetch(
        &mut self,
        place: usize,
        digest: &Digest,
        orders: &mut mpsc::Receiver<Order>,
    ) -> Result<Option<PathBuf>, Killed> {
        let node = Arc::clone(&self.node);
        let project = self.lanes[place].task.attempt.project.clone();
        let source = Remote::new(node.client.clone()).patient(node.store_patience);
        let give_up = Instant::now() + node.store_patience;
        loop {
            let fetched = node.cache.fetch(&project, digest, &source);
            tokio::pin!(fetched);
            let error = loop {
                tokio::select! {
                    fetched = &mut fetched => match fetched {
                        Ok(cached) => {
                            let folder = cached.dir().to_owned();
                            self.inputs.push(cached);
                            return Ok(Some(folder));
                        }
                        Err(error) => break error,
                    },
                    order = orders.recv() => {
                        self.order(order).await?;
                        if self.lanes[place].is_over() {
                            return Ok(None);
                        }
                    }
                }
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
            let failed = failure::of(cause, format!("input {digest}: {}", failure::chain(&error)));
            self.lanes[place].finish(Outcome::Failed(failed), false).await;
            return Ok(None);
        }
    }

    async fn start(&mut self, requests: Vec<(usize, Request)>) -> std::io::Result<()> {
        let mut child = Child::start(&self.node.program, &self.folder)?;
        for (number, (place, _)) in (0..).zip(&requests) {
            self.lanes[*place].started(number, child.id()).await;
        }
        let mut lanes: Vec<Request> = requests.into_iter().map(|(_, request)| request).collect();
        match lanes.pop() {
            Some(only) if lanes.is_empty() => child.say(&only).await,
            last => {
                lanes.extend(last);
                child.say(&protocol::Cohort { version: VERSION, lanes }).await;
            }
        }
        self.child = Some(child);
        Ok(())
    }

    /// Whether the process has, or had, more lanes than one.
    fn is_shared(&self) -> bool {
        self.lanes.iter().filter(|lane| lane.number.is_some()).count() > 1
    }

    /// Lives with the process to its end.
    async fn drive(&mut self, orders: &mut mpsc::Receiver<Order>) -> Result<Exit, Killed> {
        loop {
            self.start_uploads();
            if self.is_shared() {
                self.settle_told().await;
            }
            let Some(child) = &mut self.child else { return Ok(Exit::Code(-1)) };
            let is_ended = self.ended.is_some();
            let due = self.lanes.iter().flat_map(|lane| {
                let limits = [lane.grace_at(), lane.stall_at()].into_iter().flatten().filter(|_| !is_ended);
                limits.chain(lane.flush_at())
            });
            let due: OptionFuture<_> = due.min().map(sleep_until).into();
            let upload = if self.uploads.is_empty() { None } else { Some(self.uploads.next()) };
            let upload: OptionFuture<_> = upload.into();
            tokio::select! {
                heard = child.hear() => match heard {
                    Heard::Line(line) => self.line(&line).await,
                    Heard::TooLong => {
                        let message = "the training process said something that is longer than any message";
                        self.end(failure::of(v1::FailureCause::Internal, message));
                    }
                    Heard::Log(line) => {
                        tracing::debug!(folder = %self.folder.display(), "{line}");
                        // The log and the messages are two pipes: what was written before the last message may be read after it.
                        let is_alone = !self.is_shared();
                        let hears = |lane: &&mut Lane| lane.is_running() || is_alone && !lane.is_over();
                        for lane in self.lanes.iter_mut().filter(hears) {
                            lane.log(v1::Severity::Info, line.clone()).await;
                        }
                    }
                    Heard::Dropped(n_lines) => {
                        tracing::warn!(folder = %self.folder.display(), n_lines, "lines of a log were dropped");
                        let message = format!("dropped {n_lines} lines: the training process writes more than is passed on");
                        for lane in self.lanes.iter_mut().filter(|lane| !lane.is_over()) {
                            lane.log(v1::Severity::Warning, message.clone()).await;
                        }
                    }
                    Heard::Exited(exit) => return Ok(exit),
                },
                order = orders.recv() => self.order(order).await?,
                Some(Some((place, stored))) = upload => self.stored(place, stored).await,
                Some(()) = due => self.due().await,
            }
        }
    }

    /// Stores what the process left behind when it ended: a checkpoint that it announced is whole.
    async fn rest(&mut self, orders: &mut mpsc::Receiver<Order>) -> Result<(), Killed> {
        while self.ended.is_none() {
            self.start_uploads();
            if self.uploads.is_empty() {
                break;
            }
            tokio::select! {
                Some((place, stored)) = self.uploads.next() => self.stored(place, stored).await,
                order = orders.recv() => self.order(order).await?,
            }
        }
        Ok(())
    }

    async fn order(&mut self, order: Option<Order>) -> Result<(), Killed> {
        match order {
            None => return Err(Killed::Leaving),
            Some(Order::Kill(killed)) => return Err(killed),
            Some(Order::Stop { attempt, purpose, grace }) => {
                let until = Instant::now() + grace.unwrap_or(self.node.grace);
                let Some(place) = self.place(&attempt) else { return Ok(()) };
                if self.child.is_some() {
                    self.lanes[place].ask_to_stop(purpose, until);
                    self.say(place, Command::CheckpointAndStop).await;
                } else {
                    let stopped = v1::AttemptStopped { purpose: purpose as i32, checkpoint: None };
                    self.lanes[place].finish(Outcome::Stopped(stopped), false).await;
                }
            }
            Some(Order::Peers(peers)) => {
                // A gang runs one attempt.
                if let Some(lane) = self.lanes.first_mut() {
                    lane.met();
                    self.say(0, Command::Peers { peers }).await;
                }
            }
            Some(Order::Drop { attempt }) => {
                if let Some(place) = self.place(&attempt) {
                    self.lanes[place].forget();
                    self.leave(place).await;
                }
            }
        }
        Ok(())
    }

    fn place(&self, attempt: &AttemptId) -> Option<usize> {
        self.lanes.iter().position(|lane| lane.task.attempt == *attempt && !lane.is_over())
    }

    async fn say(&mut self, place: usize, command: Command) {
        if let (Some(child), Some(lane)) = (&mut self.child, self.lanes[place].number) {
            child.say(&Tagged { lane, message: command }).await;
        }
    }

    /// Makes the process do nothing more for a lane that has ended: the others go on.
    async fn leave(&mut self, place: usize) {
        match &mut self.child {
            Some(child) if self.lanes.iter().all(Lane::is_over) => child.kill(),
            _ => self.say(place, Command::Leave).await,
        }
    }

    /// Kills the process; its end is heard later.
    fn end(&mut self, why: v1::Failure) {
        self.ended.get_or_insert(why);
        if let Some(child) = &mut self.child {
            child.kill();
        }
    }

    /// Ends one lane, and with it a process that has no other.
    async fn fail(&mut self, place: usize, why: v1::Failure) {
        if self.is_shared() {
            let last_log_lines = self.child.as_ref().map(Child::log).unwrap_or_default();
            self.lanes[place].finish(Outcome::Failed(v1::Failure { last_log_lines, ..why }), false).await;
            self.leave(place).await;
        } else {
            self.lanes[place].ended.get_or_insert_with(|| why.clone());
            self.end(why);
        }
    }

    fn start_uploads(&mut self) {
        for (place, lane) in self.lanes.iter_mut().enumerate() {
            let peak = || self.child.as_ref().map_or(0, Child::peak_memory_bytes);
            if let Some(upload) = lane.next_upload(peak) {
                self.uploads.push(upload.map(move |stored| (place, stored)).boxed());
            }
        }
    }

    async fn stored(&mut self, place: usize, stored: Result<Stored, UploadError>) {
        if self.lanes[place].is_over() {
            return;
        }
        match self.lanes[place].stored(stored).await {
            Ok(Some(command)) => self.say(place, command).await,
            Ok(None) => {}
            Err(why) => self.fail(place, why).await,
        }
    }

    async fn line(&mut self, line: &str) {
        let told: Tagged<Event> = match serde_json::from_str(line) {
            Ok(told) => told,
            Err(error) => {
                let shown: String = line.chars().take(200).collect();
                let message = format!("the training process said {shown:?}, which is no message: {error}");
                return self.end(failure::of(v1::FailureCause::Internal, message));
            }
        };
        let place = self.lanes.iter().position(|lane| lane.number == Some(told.lane));
        let Some(place) = place.filter(|place| !self.lanes[*place].is_over()) else { return };
        for command in self.lanes[place].event(told.message).await {
            self.say(place, command).await;
        }
    }

    /// Looks at what is due.
    async fn due(&mut self) {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        for place in 0..self.lanes.len() {
            if is_due(self.lanes[place].flush_at()) {
                self.lanes[place].flush().await;
            }
            if self.ended.is_none() && is_due(self.lanes[place].grace_at()) {
                let message = "it did not stop at a checkpoint within its grace time";
                self.fail(place, failure::of(v1::FailureCause::Hung, message)).await;
            }
            if self.ended.is_none() && is_due(self.lanes[place].stall_at()) {
                let message = format!("no step was finished for {} seconds", self.lanes[place].task.stall.as_secs());
                // A lane that hangs holds up the others: which of them it was cannot be told.
                self.end(failure::of(v1::FailureCause::Hung, message));
            }
        }
    }

    /// Ends the lanes that have told their end and whose results are stored.
    async fn settle_told(&mut self) {
        let log = || self.child.as_ref().map(Child::log).unwrap_or_default();
        let is_told = |lane: &&mut Lane| lane.terminal.is_some() && !lane.is_over() && lane.is_stored();
        for lane in self.lanes.iter_mut().filter(is_told) {
            if let Some(outcome) = lane.told(log()) {
                lane.finish(outcome, false).await;
            }
        }
    }

    /// Ends every lane after the process has ended.
    async fn settle(&mut self, exit: Exit) {
        let log = self.child.as_ref().map(Child::log).unwrap_or_default();
        let is_shared = self.is_shared();
        if is_shared && self.ended.is_none() {
            self.settle_told().await;
        }
        let n_dead = self.lanes.iter().filter(|lane| !lane.is_over()).count();
        for lane in &mut self.lanes {
            let is_well = exit == Exit::Code(0);
            let told = lane.told(log.clone()).filter(|told| is_well || matches!(told, Outcome::Failed(_)));
            let (outcome, is_lost) = match (&self.ended, told) {
                (None, Some(told)) => (told, false),
                (why, _) => {
                    let silent = || failure::of_silent_end(exit, self.memory_kills);
                    let mut failed = why.clone().unwrap_or_else(silent);
                    failed.last_log_lines.clone_from(&log);
                    (Outcome::Failed(failed), is_shared && n_dead > 1)
                }
            };
            let outcome = match outcome {
                Outcome::Failed(mut failed) if is_lost => {
                    failed.message.push_str(&format!("; {n_dead} jobs shared it, so each runs alone next"));
                    Outcome::Failed(failed)
                }
                outcome => outcome,
            };
            lane.finish(outcome, is_lost).await;
        }
    }
}
