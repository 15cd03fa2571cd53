//! A scheduler and an artifact service that do what a test says, and an agent that runs shell scripts.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use attune_proto::convert::{job, time};
use attune_proto::v1::attempt_finished::Outcome;
use attune_proto::v1::attempt_report::Report;
use attune_proto::v1::connect_request::Message as Said;
use attune_proto::v1::connect_response::Message as Say;
use attune_proto::v1::{self, artifact_service_server as artifacts, worker_service_server as workers};
use attune_proto::{Class, v1::AttemptRef};
use attune_spec::job::{read_value, read_yaml, set_path};
use attune_spec::method::Catalogue;
use attune_telemetry::{Stop, Task, TaskGroup};
use attune_worker::{Config, Program};
use futures::{Stream, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// Longest wait for anything that must happen.
const PATIENCE: Duration = Duration::from_secs(20);

const JOB: &str = "
version: 1
name: small
base: file:///nowhere/base
data: {domains: [{name: a, source: file:///nowhere/a.jsonl}]}
tune: {adapter: {method: lora}, steps: 3}
";

/// What the scheduler of a test does and saw.
#[derive(Default)]
pub(crate) struct State {
    /// What agents said, oldest first.
    said: Mutex<Vec<Said>>,
    seen: watch::Sender<usize>,
    /// The present connection.
    line: Mutex<Option<mpsc::Sender<Result<v1::ConnectResponse, Status>>>>,
    pub(crate) connections: watch::Sender<usize>,
    /// Neither heartbeats nor reports are answered.
    pub(crate) mute: AtomicBool,
    /// What the next pushes are refused with.
    pub(crate) refuse: Mutex<VecDeque<Class>>,
    /// The headers of the pushes that were taken.
    pub(crate) pushes: Mutex<Vec<v1::PushHeader>>,
    pub(crate) ttl: Mutex<Duration>,
    /// What is pulled, and how.
    pub(crate) pulled: Mutex<Option<crate::transfer::Pulled>>,
}

#[derive(Clone)]
pub(crate) struct Scheduler(pub(crate) Arc<State>);

impl Scheduler {
    pub(crate) fn say(&self, message: Say) {
        let line = self.0.line.lock().unwrap().clone().unwrap();
        line.try_send(Ok(v1::ConnectResponse { message: Some(message) })).unwrap();
    }

    /// Ends the present connection.
    pub(crate) fn hang_up(&self) {
        drop(self.0.line.lock().unwrap().take());
    }

    pub(crate) fn offer(&self, cohort: u64, changes: &[(&str, &str)]) -> AttemptRef {
        self.offer_lanes(cohort, 1, changes).remove(0)
    }

    /// Offers a cohort of so many attempts of the same job file.
    pub(crate) fn offer_lanes(&self, cohort: u64, n_lanes: u64, changes: &[(&str, &str)]) -> Vec<AttemptRef> {
        let mut value = read_yaml(JOB).unwrap();
        for (path, text) in changes {
            set_path(&mut value, path, text).unwrap();
        }
        let spec = read_value(&value, Catalogue::embedded()).unwrap();
        let attempt = |lane| AttemptRef {
            project: "default".to_owned(),
            job_id: if lane == 0 { format!("j{cohort}") } else { format!("j{cohort}-{lane}") },
            epoch: cohort,
        };
        let attempts: Vec<AttemptRef> = (0..n_lanes).map(attempt).collect();
        let offer = |attempt: &AttemptRef| v1::AttemptOffer {
            attempt: Some(attempt.clone()),
            spec: Some(job::to_message(&spec).unwrap()),
            ..Default::default()
        };
        self.say(Say::LeaseOffer(v1::LeaseOffer {
            cohort_id: cohort,
            attempts: attempts.iter().map(offer).collect(),
            device: v1::DeviceKind::Cpu as i32,
            device_count: 1,
            ..Default::default()
        }));
        attempts
    }

    /// How an attempt of a cohort ended, and whether its process took others with it.
    pub(crate) async fn end_of(&self, attempt: &AttemptRef) -> (Outcome, bool) {
        self.wait("end of the attempt", |said| match said {
            Said::AttemptReport(report) if report.attempt.as_ref() == Some(attempt) => match report.report.as_ref()? {
                Report::Finished(finished) => Some((finished.outcome.clone()?, finished.shared)),
                _ => None,
            },
            _ => None,
        })
        .await
    }

    /// Waits until something that was said fits.
    pub(crate) async fn wait<T>(&self, what: &str, mut fits: impl FnMut(&Said) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = self.0.seen.subscribe();
        loop {
            let count = *seen.borrow_and_update();
            if let Some(found) = self.0.said.lock().unwrap().iter().take(count).find_map(&mut fits) {
                return found;
            }
            let Ok(changed) = timeout_at(deadline, seen.changed()).await else {
                panic!("no {what} in {:#?}", self.0.said.lock().unwrap());
            };
            changed.unwrap();
        }
    }

    pub(crate) async fn report<T>(&self, what: &str, mut fits: impl FnMut(&Report) -> Option<T>) -> T {
        self.wait(what, |said| match said {
            Said::AttemptReport(report) => fits(report.report.as_ref()?),
            _ => None,
        })
        .await
    }

    pub(crate) async fn outcome(&self) -> Outcome {
        self.report("end of the attempt", |report| match report {
            Report::Finished(finished) => finished.outcome.clone(),
            _ => None,
        })
        .await
    }

    pub(crate) async fn failure(&self) -> v1::Failure {
        match self.outcome().await {
            Outcome::Failed(failure) => failure,
            other => panic!("not a failure: {other:?}"),
        }
    }

    /// What agents have said so far, oldest first.
    pub(crate) fn said(&self) -> Vec<Said> {
        self.0.said.lock().unwrap().clone()
    }

    /// Forgets what was said.
    pub(crate) fn forget(&self) {
        let mut said = self.0.said.lock().unwrap();
        said.clear();
        self.0.seen.send_replace(0);
    }

    /// Waits for the connection of this number, the first being 1, and its registration.
    pub(crate) async fn connection(&self, number: usize) -> v1::Register {
        let mut connections = self.0.connections.subscribe();
        let waited = connections.wait_for(|count| *count >= number);
        let arrived = tokio::time::timeout(PATIENCE, waited).await;
        arrived.expect("the agent does not connect").unwrap();
        self.wait("registration", |said| match said {
            Said::Register(register) => Some(register.clone()),
            _ => None,
        })
        .await
    }

    fn hear(&self, said: Said) {
        let answer = match &said {
            Said::Register(_) => {
                let ttl = *self.0.ttl.lock().unwrap();
                Some(Say::Registered(v1::Registered {
                    lease_ttl: Some(time::duration(ttl)),
                    heartbeat_interval: Some(time::duration(ttl / 6)),
                    cohort_ids: Vec::new(),
                }))
            }
            Said::Heartbeat(beat) => {
                let cohort_ids = beat.running.iter().map(|cohort| cohort.cohort_id).collect();
                Some(Say::HeartbeatAck(v1::HeartbeatAck { sequence: beat.sequence, cohort_ids }))
            }
            Said::AttemptReport(report) => {
                Some(Say::ReportAck(v1::ReportAck { attempt: report.attempt.clone(), sequence: report.sequence }))
            }
            _ => None,
        };
        let mute = self.0.mute.load(Ordering::Relaxed) && !matches!(said, Said::Register(_));
        self.0.said.lock().unwrap().push(said);
        self.0.seen.send_modify(|count| *count += 1);
        if let Some(answer) = answer.filter(|_| !mute) {
            self.say(answer);
        }
    }
}

#[tonic::async_trait]
impl workers::WorkerService for Scheduler {
    type ConnectStream = ReceiverStream<Result<v1::ConnectResponse, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<v1::ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let (line, stream) = mpsc::channel(256);
        *self.0.line.lock().unwrap() = Some(line);
        self.0.connections.send_modify(|count| *count += 1);
        let number = *self.0.connections.borrow();
        let (this, mut inbound) = (self.clone(), request.into_inner());
        GROUP.with(|group| {
            group.spawn(Task::new("connection").abort_on_cancel(), async move {
                while let Some(Ok(message)) = inbound.next().await {
                    // What a broken connection still had to say is lost.
                    if *this.0.connections.borrow() != number || this.0.line.lock().unwrap().is_none() {
                        break;
                    }
                    this.hear(message.message.unwrap());
                }
                Ok::<_, std::convert::Infallible>(())
            })
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

thread_local! {
    /// Every test has one thread and one runtime.
    static GROUP: TaskGroup = TaskGroup::new();
}

type Never = Pin<Box<dyn Stream<Item = Result<v1::PullArtifactResponse, Status>> + Send>>;

fn absent<T>() -> Result<Response<T>, Status> {
    Err(Class::Unimplemented.status("this scheduler has no such call"))
}

#[tonic::async_trait]
impl artifacts::ArtifactService for Scheduler {
    type PullArtifactStream = Never;

    async fn query_missing_blobs(
        &self,
        request: Request<v1::QueryMissingBlobsRequest>,
    ) -> Result<Response<v1::QueryMissingBlobsResponse>, Status> {
        Ok(Response::new(v1::QueryMissingBlobsResponse { missing: request.into_inner().digests, ..Default::default() }))
    }

    async fn push_artifact(
        &self,
        request: Request<Streaming<v1::PushArtifactRequest>>,
    ) -> Result<Response<v1::PushArtifactResponse>, Status> {
        use v1::push_artifact_request::Part;
        let mut parts = request.into_inner();
        let mut header = None;
        while let Some(part) = parts.message().await? {
            if let Some(Part::Header(found)) = part.part {
                header = Some(found);
            }
        }
        if let Some(class) = self.0.refuse.lock().unwrap().pop_front() {
            return Err(class.status("refused by the test"));
        }
        self.0.pushes.lock().unwrap().push(header.unwrap());
        Ok(Response::new(v1::PushArtifactResponse { artifact: None, created: true }))
    }

    async fn pull_artifact(&self, request: Request<v1::PullArtifactRequest>) -> Result<Response<Never>, Status> {
        let mut pulled = self.0.pulled.lock().unwrap();
        let Some(pulled) = pulled.as_mut() else { return absent() };
        Ok(Response::new(futures::stream::iter(pulled.answer(request.get_ref())).boxed()))
    }

    async fn get_artifact(
        &self,
        _: Request<v1::GetArtifactRequest>,
    ) -> Result<Response<v1::GetArtifactResponse>, Status> {
        absent()
    }

    async fn list_artifacts(
        &self,
        _: Request<v1::ListArtifactsRequest>,
    ) -> Result<Response<v1::ListArtifactsResponse>, Status> {
        absent()
    }

    async fn tag_artifact(
        &self,
        _: Request<v1::TagArtifactRequest>,
    ) -> Result<Response<v1::TagArtifactResponse>, Status> {
        absent()
    }

    async fn untag_artifact(
        &self,
        _: Request<v1::UntagArtifactRequest>,
    ) -> Result<Response<v1::UntagArtifactResponse>, Status> {
        absent()
    }

    async fn get_lineage(&self, _: Request<v1::GetLineageRequest>) -> Result<Response<v1::GetLineageResponse>, Status> {
        absent()
    }

    async fn delete_artifact(
        &self,
        _: Request<v1::DeleteArtifactRequest>,
    ) -> Result<Response<v1::DeleteArtifactResponse>, Status> {
        absent()
    }
}

/// An agent, its scheduler and its folder.
pub(crate) struct World {
    pub(crate) scheduler: Scheduler,
    pub(crate) stop: Stop,
    folder: tempfile::TempDir,
}

impl World {
    /// The folder of both.
    pub(crate) fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }
}

/// Starts both; the agent runs `script` with the request on the first line of its input.
pub(crate) async fn world(script: &str, change: impl FnOnce(&mut Config, &State)) -> World {
    let folder = tempfile::tempdir().unwrap();
    let state = State { ttl: Mutex::new(Duration::from_secs(30)), ..State::default() };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    // `work` is the folder of the request, `say` writes an event, `made` makes a folder with one file.
    let prelude = r#"
read -r request
work=$(printf '%s' "$request" | sed 's/.*"work":"\([^"]*\)".*/\1/')
say() { printf '%s\n' "$1"; }
made() { mkdir -p "$work/$1"; printf '%s' "$2" > "$work/$1/state.json"; }
running() { say '{"event":"running","step":0,"total_steps":3,"kernel_profile":"test","pinned":{}}'; }
progress() { say "{\"event\":\"progress\",\"step\":$1,\"total_steps\":3,\"tokens\":$1,\"tokens_per_second\":1.0,\"eta_seconds\":1.0}"; }
"#;
    let arguments = vec!["-c".into(), format!("{prelude}\n{script}").into()];
    let program = Program { path: "/bin/bash".into(), arguments, variables: Vec::new() };
    let mut config = Config::new(address, folder.path().join("worker"), program);
    change(&mut config, &state);
    let scheduler = Scheduler(Arc::new(state));
    let stop = Stop::new();
    let services = tonic::transport::Server::builder()
        .add_service(workers::WorkerServiceServer::new(scheduler.clone()))
        .add_service(artifacts::ArtifactServiceServer::new(scheduler.clone()));
    let agent = attune_worker::run(config, stop.clone());
    GROUP.with(|group| {
        group.spawn(Task::new("scheduler").abort_on_cancel(), async move {
            services.serve_with_incoming(TcpListenerStream::new(listener)).await
        });
        group.spawn(Task::new("agent"), agent)
    });
    scheduler.connection(1).await;
    World { scheduler, stop, folder }
}

/// Waits until the agent has ended.
pub(crate) async fn agent_ends() {
    let group = GROUP.with(TaskGroup::clone);
    let deadline = Instant::now() + PATIENCE;
    // The scheduler and its connections are aborted by the shutdown; the agent ends by itself.
    let failures = group.shutdown(deadline - Instant::now()).await;
    assert!(failures.is_empty(), "{failures:?}");
}
