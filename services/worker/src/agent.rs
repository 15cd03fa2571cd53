//! The stream to the scheduler: who this worker is, what it runs, what it is told.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use attune_artifacts::Cache;
use attune_proto::convert::id::{self, AttemptId};
use attune_proto::convert::time;
use attune_proto::v1::{
    self, attempt_report::Report, connect_request::Message as Say, connect_response::Message as Hear,
};
use attune_proto::{Client, Secret, WORKER_PROTOCOL_VERSION};
use attune_spec::id::{CohortId, WorkerId};
use attune_telemetry::{Stop, Task as Background, TaskGroup};
use attune_trainer::card::Card;
use attune_trainer::kernel;
use futures::future::{BoxFuture, OptionFuture};
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::attempt::{News, Wire};
use crate::clock;
use crate::cohort::{self, Killed, Node, Order};
use crate::meeting::Meeting;
use crate::node::{self, Home};
use crate::offer::{spec_fault, task};
use crate::outbox::Outbox;
use crate::strays::{self, Family};
use crate::{Config, Error};

/// Messages that may wait for the network; a scheduler that is further behind counts as gone.
const OUT_MESSAGES_MAX: usize = 16_384;
/// News of attempts that may wait for the agent.
const NEWS_MAX: usize = 256;
/// Orders that may wait for a cohort: a few for each of its lanes.
const ORDERS_MAX: usize = 64;
/// Longest time for a scheduler to answer a connection and a registration.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// First and longest wait before the next try to connect.
const RECONNECT_WAIT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How often certificates are read anew.
const RENEW_INTERVAL: Duration = Duration::from_secs(10);
/// Time for processes and reports to end once the agent must go.
const LEAVE_TIME: Duration = Duration::from_secs(5);

/// Runs an agent until `stop` is requested: it then takes nothing new, lets its attempts stop at a checkpoint for
/// [`Config::grace`], and ends.
///
/// # Errors
/// [`Error`]: the folder cannot be used, or the scheduler refuses this worker for good. A scheduler that is not there is
/// waited for.
pub async fn run(config: Config, stop: Stop) -> Result<(), Error> {
    strays::adopt();
    let home = Home::open(&config.work_dir)?;
    // What an earlier agent left behind that was killed itself.
    Family::new(&home.attempts, None).end().await;
    let client = Client::lazy(&config.scheduler, config.connection.clone())?;
    let node = Arc::new(Node {
        client,
        cache: Cache::bounded(&home.cache, config.cache_bytes_max).await?,
        worker: home.worker.to_string(),
        program: config.program.clone(),
        attempts: home.attempts.clone(),
        grace: config.grace,
        store_patience: config.store_patience,
        scheduler: config.scheduler.clone(),
        gang_address: config.gang_address,
    });
    let (news, inbox) = mpsc::channel(NEWS_MAX);
    let mut agent = Agent {
        worker: home.worker.clone(),
        process: uuid::Uuid::now_v7().simple().to_string(),
        work_dir: config.work_dir.clone(),
        cards: node::cards(config.cards)?,
        config,
        node,
        group: TaskGroup::new(),
        cohorts: BTreeMap::new(),
        news,
        line: None,
        connecting: None,
        wait: RECONNECT_WAIT.0,
        try_at: Instant::now(),
        lease: None,
        leaving: None,
    };
    let renewing = agent.node.client.clone();
    agent.group.spawn(Background::new("certificates").abort_on_cancel(), async move {
        renew(renewing).await;
        Ok::<_, std::convert::Infallible>(())
    });
    let end = agent.serve(inbox, &stop).await;
    agent.leave().await;
    drop(home);
    end
}

/// Sees to it that new connections are made with the certificates that there are now, and says when one ends soon.
async fn renew(client: Client) {
    let (mut failed, mut told) = (None, None);
    loop {
        let why = match client.renew().await {
            Ok(true) => {
                tracing::info!("new connections use renewed certificates");
                None
            }
            Ok(false) => None,
            Err(error) => Some(error.to_string()),
        };
        if let Some(why) = why.as_ref().filter(|why| failed.as_ref() != Some(*why)) {
            tracing::error!(why, "certificates have changed and cannot be used; new connections use the old ones");
        }
        failed = why;
        let ends = client.tls().ends_soon(clock::unix_ms() as i64 / 1000);
        if let Some(when) = ends.as_ref().filter(|when| told.as_ref() != Some(*when)) {
            tracing::warn!(when, "the certificate of this worker ends soon; put a renewed one in its place");
        }
        told = ends;
        tokio::time::sleep(RENEW_INTERVAL).await;
    }
}

/// A cohort on this node.
#[derive(Debug)]
struct Cohort {
    /// Its attempts that the scheduler has not let go, with what is to be said of them.
    members: Vec<Member>,
    device: i32,
    /// The numbers of its devices among those of their kind.
    numbers: Vec<u32>,
    orders: mpsc::Sender<Order>,
    /// The other workers of its gang, if it has any.
    meeting: Option<Meeting>,
    /// Its process and its task are gone.
    gone: bool,
    /// The scheduler has let it go.
    released: bool,
}

/// An attempt of a cohort.
#[derive(Debug)]
struct Member {
    attempt: AttemptId,
    outbox: Outbox,
}

impl Cohort {
    fn has(&self, attempt: &AttemptId) -> bool {
        self.members.iter().any(|member| member.attempt == *attempt)
    }

    fn member(&mut self, attempt: &AttemptId) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.attempt == *attempt)
    }
}

/// A connection.
#[derive(Debug)]
struct Line {
    out: mpsc::Sender<v1::ConnectRequest>,
    inbound: Streaming<v1::ConnectResponse>,
    opened: Instant,
    /// Set once the scheduler has answered the registration.
    heartbeat: Option<Duration>,
    next_beat: Instant,
    beats: u64,
    /// When each unanswered heartbeat was sent.
    unanswered: VecDeque<(u64, Instant)>,
}

/// What the scheduler granted last.
#[derive(Debug, Clone, Copy)]
struct Lease {
    ttl: Duration,
    /// When the last answered heartbeat, or registration, was sent.
    renewed: Instant,
}

impl Lease {
    /// When this node must have ended its processes: a quarter of the lease before the scheduler may give them away.
    fn fence(&self) -> Instant {
        self.renewed + self.ttl.mul_f64(0.75)
    }
}

struct Agent {
    worker: WorkerId,
    /// Names this process and no other.
    process: String,
    work_dir: PathBuf,
    config: Config,
    /// The NVIDIA devices that it offers.
    cards: Vec<Card>,
    node: Arc<Node>,
    group: TaskGroup,
    cohorts: BTreeMap<CohortId, Cohort>,
    news: mpsc::Sender<(CohortId, News)>,
    line: Option<Line>,
    connecting: Option<BoxFuture<'static, Result<Line, String>>>,
    wait: Duration,
    try_at: Instant,
    lease: Option<Lease>,
    /// When to go at the latest, once asked to.
    leaving: Option<Instant>,
}

impl Agent {
    async fn serve(&mut self, mut inbox: mpsc::Receiver<(CohortId, News)>, stop: &Stop) -> Result<(), Error> {
        loop {
            if let Some(latest) = self.leaving
                && (self.cohorts.is_empty() || Instant::now() >= latest)
            {
                return Ok(());
            }
            if self.line.is_none() && self.connecting.is_none() {
                self.connecting = Some(self.connect());
            }
            let connecting: OptionFuture<_> = self.connecting.as_mut().into();
            let beat_at = self.line.as_ref().filter(|line| line.heartbeat.is_some()).map(|line| line.next_beat);
            let fence_at = self.lease.filter(|_| self.cohorts.values().any(|c| !c.gone)).map(|lease| lease.fence());
            let inbound: OptionFuture<_> = self.line.as_mut().map(|line| line.inbound.next()).into();
            let beat: OptionFuture<_> = beat_at.map(sleep_until).into();
            let fence: OptionFuture<_> = fence_at.map(sleep_until).into();
            let leave: OptionFuture<_> = self.leaving.map(sleep_until).into();
            tokio::select! {
                biased;
                Some(()) = fence => self.fence(),
                Some(()) = leave => {}
                () = stop.requested(), if self.leaving.is_none() => self.ask_to_leave(),
                Some((cohort, news)) = inbox.recv() => self.news(cohort, news),
                Some(()) = beat => self.beat(),
                Some(message) = inbound => match message {
                    Some(Ok(message)) => self.hear(message)?,
                    Some(Err(status)) => self.disconnected(status.message()),
                    None => self.disconnected("the scheduler closed the stream"),
                },
                Some(line) = connecting => {
                    self.connecting = None;
                    match line {
                        Ok(line) => self.line = Some(line),
                        Err(message) => self.disconnected(&message),
                    }
                }
            }
        }
    }

    fn connect(&self) -> BoxFuture<'static, Result<Line, String>> {
        let (client, at, register) = (self.node.client.clone(), self.try_at, self.registration());
        let token_file = self.config.token_file.clone();
        async move {
            sleep_until(at).await;
            if let Some(path) = token_file {
                match tokio::fs::read_to_string(&path).await.map(|text| text.parse::<Secret>()) {
                    Ok(Ok(token)) => client.present(&token),
                    Ok(Err(what)) => tracing::warn!(path = %path.display(), what, "the token is the one read before"),
                    Err(error) => tracing::warn!(path = %path.display(), %error, "the token is the one read before"),
                }
            }
            let (out, queue) = mpsc::channel(OUT_MESSAGES_MAX);
            let opened = Instant::now();
            // The queue is new and empty: there is room.
            let _ = out.try_send(say(Say::Register(register)));
            let mut workers = client.workers();
            let answer = timeout(CONNECT_TIMEOUT, workers.connect(ReceiverStream::new(queue))).await;
            let inbound = answer
                .map_err(|_| "the scheduler does not answer".to_owned())?
                .map_err(|status| status.message().to_owned())?
                .into_inner();
            let line = Line {
                out,
                inbound,
                opened,
                heartbeat: None,
                next_beat: opened,
                beats: 0,
                unanswered: VecDeque::new(),
            };
            Ok(line)
        }
        .boxed()
    }

    fn registration(&self) -> v1::Register {
        v1::Register {
            worker_id: self.worker.to_string(),
            name: self.config.name.clone(),
            protocol_version: WORKER_PROTOCOL_VERSION,
            devices: node::devices(self.config.devices, &self.cards),
            labels: self.config.labels.clone().into_iter().collect(),
            kernel_profile: kernel::profile(),
            code_version: kernel::CODE_VERSION.to_owned(),
            running: self.running(),
            draining: self.leaving.is_some(),
            process: self.process.clone(),
        }
    }

    fn running(&self) -> Vec<v1::RunningCohort> {
        let running = |(id, cohort): (&CohortId, &Cohort)| v1::RunningCohort {
            cohort_id: id.0,
            attempts: cohort.members.iter().map(|member| (&member.attempt).into()).collect(),
            device: cohort.device,
            device_count: cohort.numbers.len() as u32,
        };
        self.cohorts.iter().map(running).collect()
    }

    fn disconnected(&mut self, message: &str) {
        tracing::info!(worker = %self.worker, message, "no connection to the scheduler; trying again");
        self.line = None;
        self.node.client.turn();
        // Workers that lost the same scheduler come back at different times.
        let spread = f64::from(uuid::Uuid::now_v7().as_bytes()[15]) / 255.0;
        self.try_at = Instant::now() + self.wait.mul_f64(0.5 + spread / 2.0);
        self.wait = (self.wait * 2).min(RECONNECT_WAIT.1);
    }

    fn say(&mut self, message: Say) {
        let Some(line) = &self.line else { return };
        if line.out.try_send(say(message)).is_err() {
            self.disconnected("the scheduler does not read");
        }
    }

    fn is_registered(&self) -> bool {
        self.line.as_ref().is_some_and(|line| line.heartbeat.is_some())
    }

    fn beat(&mut self) {
        let running = self.running();
        let disk_free_bytes = node::disk_free_bytes(&self.work_dir);
        let Some(line) = &mut self.line else { return };
        let now = Instant::now();
        line.next_beat = now + line.heartbeat.unwrap_or(CONNECT_TIMEOUT);
        line.beats += 1;
        line.unanswered.push_back((line.beats, now));
        let sequence = line.beats;
        self.say(Say::Heartbeat(v1::Heartbeat { sequence, running, disk_free_bytes }));
        self.announce();
    }

    /// Says where processes listen whose gangs have not met.
    fn announce(&mut self) {
        let meetings = self.cohorts.values().filter(|cohort| !cohort.gone).filter_map(|cohort| cohort.meeting.as_ref());
        for word in meetings.filter_map(Meeting::announcement).collect::<Vec<_>>() {
            self.say(Say::GangPeer(word));
        }
    }

    /// Something new is known of a gang.
    fn meet(&mut self, id: CohortId, learn: impl FnOnce(&mut Meeting) -> Option<v1::GangPeer>) {
        let Some(cohort) = self.cohorts.get_mut(&id).filter(|cohort| !cohort.gone) else { return };
        let Some(meeting) = &mut cohort.meeting else { return };
        let word = learn(meeting);
        if let Some(peers) = meeting.complete() {
            let _ = cohort.orders.try_send(Order::Peers(peers));
        }
        if let Some(word) = word.filter(|_| self.is_registered()) {
            self.say(Say::GangPeer(word));
        }
    }

    /// The lease has ended by this node's own clock: nothing may run here any more.
    fn fence(&mut self) {
        self.lease = None;
        for (id, cohort) in self.cohorts.iter().filter(|(_, cohort)| !cohort.gone) {
            tracing::warn!(cohort = %id, "no word from the scheduler for a lease; ending it");
            // A full queue means that an order to stop waits there; the process is killed when the task is dropped.
            let _ = cohort.orders.try_send(Order::Kill(Killed::Fenced));
        }
    }

    fn ask_to_leave(&mut self) {
        self.leaving = Some(Instant::now() + self.config.grace);
        if self.is_registered() {
            self.say(Say::Drain(v1::Drain { grace: Some(time::duration(self.config.grace)) }));
        }
    }

    /// Ends what still runs and waits for it, so that no process outlives the agent.
    async fn leave(&mut self) {
        for cohort in self.cohorts.values().filter(|cohort| !cohort.gone) {
            let _ = cohort.orders.try_send(Order::Kill(Killed::Leaving));
        }
        self.group.shutdown(LEAVE_TIME).await;
    }

    fn news(&mut self, id: CohortId, news: News) {
        let Some(cohort) = self.cohorts.get_mut(&id) else { return };
        match news {
            News::Listening(peer) => {
                return self.meet(id, |meeting| {
                    meeting.listens(peer);
                    meeting.announcement()
                });
            }
            News::Report(attempt, report) => {
                if let Some(member) = cohort.member(&attempt) {
                    member.outbox.push(report);
                }
            }
            News::Gone => {
                cohort.gone = true;
                if cohort.released {
                    self.cohorts.remove(&id);
                    self.say(Say::CohortGone(v1::CohortGone { cohort_id: id.0 }));
                    return;
                }
            }
        }
        self.send_reports(id);
    }

    fn send_reports(&mut self, id: CohortId) {
        if !self.is_registered() {
            return;
        }
        let Some(cohort) = self.cohorts.get_mut(&id) else { return };
        let unsent = |member: &mut Member| member.outbox.take_unsent(&(&member.attempt).into());
        for report in cohort.members.iter_mut().flat_map(unsent).collect::<Vec<_>>() {
            self.say(Say::AttemptReport(report));
        }
    }

    fn hear(&mut self, message: v1::ConnectResponse) -> Result<(), Error> {
        // A message of a newer scheduler that this agent does not know needs nothing from it.
        let Some(message) = message.message else { return Ok(()) };
        match message {
            Hear::Registered(registered) => self.registered(&registered),
            Hear::Refused(refused) => match refused.reason() {
                v1::RefusalReason::Unavailable | v1::RefusalReason::Unspecified => self.disconnected(&refused.message),
                _ => return Err(Error::Refused { message: refused.message }),
            },
            Hear::HeartbeatAck(ack) => self.acknowledged(ack.sequence),
            Hear::LeaseOffer(offer) => self.offered(&offer),
            Hear::StopAttempt(stop) => {
                let (purpose, grace) = (stop.purpose(), time::span(stop.grace.as_ref()));
                if let Ok(attempt) = id::attempt("attempt", stop.attempt.as_ref()) {
                    self.order(Order::Stop { attempt: attempt.clone(), purpose, grace }, &attempt);
                }
            }
            Hear::DropAttempt(drop) => {
                if let Ok(attempt) = id::attempt("attempt", drop.attempt.as_ref()) {
                    self.order(Order::Drop { attempt: attempt.clone() }, &attempt);
                    for cohort in self.cohorts.values_mut() {
                        cohort.members.retain(|member| member.attempt != attempt);
                    }
                }
            }
            Hear::GangPeer(told) => self.meet(CohortId(told.cohort_id), |meeting| meeting.heard(&told)),
            Hear::KillCohort(kill) => self.killed(CohortId(kill.cohort_id)),
            Hear::ReportAck(ack) => {
                let Ok(attempt) = id::attempt("attempt", ack.attempt.as_ref()) else { return Ok(()) };
                let found = self.cohorts.iter_mut().find_map(|(id, cohort)| Some((*id, cohort.member(&attempt)?)));
                if let Some((id, member)) = found {
                    member.outbox.acknowledged(ack.sequence);
                    self.send_reports(id);
                }
            }
            Hear::DrainWorker(drain) => {
                self.leaving = Some(Instant::now() + time::span(drain.grace.as_ref()).unwrap_or(self.config.grace));
            }
        }
        Ok(())
    }

    fn registered(&mut self, registered: &v1::Registered) {
        let Some(line) = &mut self.line else { return };
        let ttl = time::span(registered.lease_ttl.as_ref()).unwrap_or(CONNECT_TIMEOUT);
        let interval = time::span(registered.heartbeat_interval.as_ref()).unwrap_or(ttl / 4);
        line.heartbeat = Some(interval.max(Duration::from_millis(10)));
        line.next_beat = Instant::now() + interval;
        self.lease = Some(Lease { ttl, renewed: line.opened });
        self.wait = RECONNECT_WAIT.0;
        tracing::info!(worker = %self.worker, "registered with the scheduler");
        for id in self.cohorts.keys().copied().collect::<Vec<_>>() {
            if let Some(cohort) = self.cohorts.get_mut(&id) {
                cohort.members.iter_mut().for_each(|member| member.outbox.reconnected());
            }
            self.send_reports(id);
        }
        if self.leaving.is_some() {
            self.say(Say::Drain(v1::Drain { grace: Some(time::duration(self.config.grace)) }));
        }
    }

    fn acknowledged(&mut self, sequence: u64) {
        let Some(line) = &mut self.line else { return };
        while let Some((number, sent)) = line.unanswered.front().copied().filter(|(number, _)| *number <= sequence) {
            line.unanswered.pop_front();
            if number == sequence
                && let Some(lease) = &mut self.lease
            {
                lease.renewed = lease.renewed.max(sent);
            }
        }
    }

    fn order(&mut self, order: Order, attempt: &AttemptId) {
        if let Some(cohort) = self.cohorts.values().find(|cohort| cohort.has(attempt) && !cohort.gone) {
            // A full queue already holds an order like this one: the scheduler repeats itself.
            let _ = cohort.orders.try_send(order);
        }
    }

    fn killed(&mut self, id: CohortId) {
        match self.cohorts.get_mut(&id) {
            Some(cohort) if !cohort.gone => {
                cohort.released = true;
                let _ = cohort.orders.try_send(Order::Kill(Killed::Released));
            }
            _ => {
                self.cohorts.remove(&id);
                self.say(Say::CohortGone(v1::CohortGone { cohort_id: id.0 }));
            }
        }
    }

    fn offered(&mut self, offer: &v1::LeaseOffer) {
        let id = CohortId(offer.cohort_id);
        if self.cohorts.contains_key(&id) {
            return self.say(Say::LeaseAccepted(v1::LeaseAccepted { cohort_id: id.0 }));
        }
        if let Err((refusal, message)) = self.take(id, offer) {
            let refused = v1::LeaseRefused { cohort_id: id.0, refusal: refusal as i32, message };
            self.say(Say::LeaseRefused(refused));
        }
    }

    fn take(&mut self, id: CohortId, offer: &v1::LeaseOffer) -> Result<(), (v1::LeaseRefusal, String)> {
        let unsupported = |message: &str| (v1::LeaseRefusal::Unsupported, message.to_owned());
        if self.leaving.is_some() {
            return Err((v1::LeaseRefusal::Draining, "the worker is leaving".to_owned()));
        }
        #[cfg(feature = "failpoints")]
        crate::offer::poison(offer);
        node::has_room().map_err(|message| (v1::LeaseRefusal::Busy, message))?;
        let is_card = offer.device == v1::DeviceKind::Cuda as i32;
        let all = if is_card { self.cards.len() as u32 } else { self.config.devices };
        let alike = self.cohorts.values().filter(|cohort| cohort.device == offer.device);
        let taken: Vec<u32> = alike.flat_map(|cohort| &cohort.numbers).copied().collect();
        let numbers = node::free(&taken, all, offer.device_count);
        let numbers = numbers.map_err(|message| (v1::LeaseRefusal::Busy, message))?;
        let card = numbers.first().copied().filter(|_| is_card);
        let (device, device_count) = (offer.device, offer.device_count);
        let size = offer.gang.len() as u32;
        let seat = (size > 1).then_some((offer.rank, size));
        if offer.attempts.is_empty() || (offer.attempts.len() > 1 && (device_count != 1 || size > 1)) {
            return Err(unsupported(&format!("{} attempts on {device_count} devices", offer.attempts.len())));
        }
        let mut members = Vec::with_capacity(offer.attempts.len());
        for attempt in &offer.attempts {
            let attempt = id::attempt("attempt", attempt.attempt.as_ref())
                .map_err(|faults| unsupported(&format!("the offer cannot be read: {faults:?}")))?;
            members.push(Member { attempt, outbox: Outbox::default() });
        }
        let keys: Vec<AttemptId> = members.iter().map(|member| member.attempt.clone()).collect();
        let (orders, inbox) = mpsc::channel(ORDERS_MAX);
        let meeting = seat.map(|(rank, size)| Meeting::new(id, rank, size));
        self.cohorts.insert(id, Cohort { members, device, numbers, orders, meeting, gone: false, released: false });
        self.say(Say::LeaseAccepted(v1::LeaseAccepted { cohort_id: id.0 }));
        let mut tasks = Vec::new();
        for (key, attempt) in keys.into_iter().zip(&offer.attempts) {
            match task(key.clone(), attempt, (device_count, card), seat) {
                Ok(task) => tasks.push(task),
                // The offer is taken and the attempt fails: the job is at fault, not this worker.
                Err(faults) => {
                    let outcome = Some(v1::attempt_finished::Outcome::Failed(spec_fault(&faults)));
                    let finished = v1::AttemptFinished { outcome, shared: false };
                    self.news(id, News::Report(key, Report::Finished(finished)));
                }
            }
        }
        if tasks.is_empty() {
            self.news(id, News::Gone);
            return Ok(());
        }
        let (node, wire) = (Arc::clone(&self.node), Wire { cohort: id, news: self.news.clone() });
        self.group.spawn(Background::new("cohort"), async move {
            cohort::run(node, tasks, inbox, wire).await;
            Ok::<_, std::convert::Infallible>(())
        });
        Ok(())
    }
}

fn say(message: Say) -> v1::ConnectRequest {
    v1::ConnectRequest { message: Some(message) }
}
