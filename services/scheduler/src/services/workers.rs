//! The workers' stream: a registration, then whatever happens, until one side goes.

use std::collections::BTreeMap;
use std::sync::Arc;

use attune_proto::convert::Faults;
use attune_proto::convert::id::{attempt, field};
use attune_proto::v1::worker_service_server::WorkerService;
use attune_proto::v1::{self, connect_request::Message as Said};
use attune_proto::{Class, WORKER_PROTOCOL_VERSION, WORKER_PROTOCOL_VERSION_BEFORE};
use attune_scheduler_core::{
    self as core, Answer, Cause, Declined, Device, Devices, Holding, Input, JobKey, RefusalKind, Session,
};
use attune_spec::Fault;
use attune_spec::id::{CohortId, Name, WorkerId};
use attune_telemetry::{Stop, Task};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use super::Answers;
use super::reports::Reports;
use crate::context::Context;
use crate::guard::{Caller, received};
use crate::ledger::Extra;
use crate::links::{Link, refused};
use crate::{log, status};

/// Of what a worker says about an offer that it refuses, so much is kept.
const REFUSAL_CHARS_MAX: usize = 500;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct Workers {
    pub(crate) context: Arc<Context>,
}

#[tonic::async_trait]
impl WorkerService for Workers {
    type ConnectStream = Answers<v1::ConnectResponse>;

    async fn connect(
        &self,
        request: Request<Streaming<v1::ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let (caller, incoming) = received(request)?;
        let (outgoing, answers) = mpsc::channel(self.context.waiting_messages);
        let session = self.context.next_session();
        let link = Link { session, outgoing, stop: Stop::new() };
        let connection = Connection { context: Arc::clone(&self.context), caller, link, incoming, is_outdated: false };
        self.context.tasks.spawn(Task::new("serve a worker"), async move {
            connection.run().await;
            Ok::<_, std::convert::Infallible>(())
        });
        Ok(Response::new(Answers::new(answers)))
    }
}

/// One connection of a worker.
struct Connection {
    context: Arc<Context>,
    caller: Caller,
    link: Link,
    incoming: Streaming<v1::ConnectRequest>,
    /// Whether the worker speaks the version before.
    is_outdated: bool,
}

/// Why a connection ends on our side.
enum End {
    /// The worker has gone.
    Gone,
    /// It is told so, with the reason for it.
    Refused(v1::RefusalReason, String),
    /// The stream ends with an error; the worker connects again.
    Failed(Status),
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::Failed(status)
    }
}

impl Connection {
    async fn run(mut self) {
        let (stop, link) = (self.context.stop(), self.link.clone());
        let mut registered = None;
        // Dropping the talk loses at most a message that was not answered, which the worker sends again.
        let end = tokio::select! {
            end = self.talk(&mut registered) => end,
            () = link.stop.requested() => End::Gone,
            // Nobody reads: the worker has gone, or its credential is not valid any more.
            () = link.outgoing.closed() => End::Gone,
            () = stop.requested() => {
                End::Refused(v1::RefusalReason::Unavailable, "the scheduler shuts down; connect again later".to_owned())
            }
        };
        match end {
            End::Gone => {}
            End::Refused(reason, message) => {
                link.send(refused(reason, &message));
            }
            End::Failed(status) => {
                let _ = link.outgoing.try_send(Err(status));
            }
        }
        if let Some(worker) = registered {
            tracing::info!(%worker, session = link.session.0, "worker disconnected");
            let gone = Input::Disconnect { worker, session: link.session };
            // A desk that has ended needs no word of it.
            let _ = self.context.front.step(gone).await;
        }
    }

    async fn talk(&mut self, registered: &mut Option<WorkerId>) -> End {
        match self.converse(registered).await {
            Ok(()) => End::Gone,
            Err(end) => end,
        }
    }

    async fn converse(&mut self, registered: &mut Option<WorkerId>) -> Result<(), End> {
        let worker = self.register().await?;
        *registered = Some(worker.clone());
        let mut reports = Reports::new(Arc::clone(&self.context), worker.clone(), self.link.outgoing.clone());
        // Reports take as long as the database does. What else is said is heard meanwhile: no sign of life waits behind them.
        let (reported, mut waiting) = mpsc::channel(self.context.waiting_messages);
        let kept = async {
            while let Some(report) = waiting.recv().await {
                reports.take(report).await?;
            }
            Ok(())
        };
        tokio::try_join!(self.listen(&worker, reported), kept).map(drop)
    }

    /// Hears what comes, and passes reports on.
    async fn listen(&mut self, worker: &WorkerId, reported: mpsc::Sender<v1::AttemptReport>) -> Result<(), End> {
        while let Ok(Some(message)) = self.incoming.message().await {
            // A message of a newer worker says nothing to us.
            let Some(said) = message.message else { continue };
            match said {
                Said::Heartbeat(heartbeat) if self.is_outdated && heartbeat.running.is_empty() => {
                    return Err(unspoken(WORKER_PROTOCOL_VERSION_BEFORE));
                }
                Said::Register(_) => {
                    return Err(invalid("register: came twice on one connection".to_owned()));
                }
                // Whoever keeps them has failed, which is said below.
                Said::AttemptReport(report) => drop(reported.send(report).await),
                other => self.hear(worker, other).await?,
            }
        }
        Ok(())
    }

    async fn register(&mut self) -> Result<WorkerId, End> {
        let first = tokio::time::timeout(self.context.greeting_limit, self.incoming.message()).await;
        let Ok(Ok(Some(first))) = first else { return Err(End::Gone) };
        let Some(Said::Register(register)) = first.message else {
            return Err(invalid("register: is missing; expected it in the first message".to_owned()));
        };
        self.is_outdated = match register.protocol_version {
            WORKER_PROTOCOL_VERSION => false,
            // The version before finishes what it has; whoever has nothing is of no use here.
            WORKER_PROTOCOL_VERSION_BEFORE if !register.running.is_empty() => true,
            version => return Err(unspoken(version)),
        };
        let session = self.link.session;
        let (worker, input) = read(&register, session, self.is_outdated)
            .map_err(|faults| invalid(faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")))?;
        self.claim(&worker).await?;
        match self.context.front.register(input, self.link.clone()).await {
            Ok(Answer::Done | Answer::Repeated) => {
                if self.is_outdated {
                    let version = register.protocol_version;
                    tracing::warn!(%worker, version, "a worker of the version before finishes what it runs and gets nothing new");
                }
                Ok(worker)
            }
            Ok(Answer::Refused(refusal)) => Err(End::Refused(v1::RefusalReason::Superseded, refusal.to_string())),
            Err(status) if Class::of(&status) == Class::QuotaExceeded => {
                Err(End::Refused(v1::RefusalReason::Unavailable, status.message().to_owned()))
            }
            Err(status) => Err(End::Failed(status)),
        }
    }

    /// Makes sure that nobody else's credential speaks for the worker.
    async fn claim(&self, worker: &WorkerId) -> Result<(), End> {
        self.caller.concerns(worker);
        let claimed = self.context.guard.claim(&self.caller, worker).await;
        let (outcome, end) = match claimed {
            Ok(()) => (tonic::Code::Ok, Ok(())),
            Err(error @ attune_store::Error::Conflict(_)) => {
                (tonic::Code::PermissionDenied, Err(End::Refused(v1::RefusalReason::Invalid, error.to_string())))
            }
            Err(error) => return Err(End::Failed(status::store(error))),
        };
        if !self.caller.about().is_recorded {
            self.context.guard.record(&self.caller, "WorkerService/Connect", outcome).await;
        }
        end
    }

    /// Everything but reports.
    async fn hear(&self, worker: &WorkerId, said: Said) -> Result<(), End> {
        let session = self.link.session;
        let worker = worker.clone();
        let input = match said {
            Said::Heartbeat(heartbeat) => {
                let holding = heartbeat.running.iter().map(|cohort| CohortId(cohort.cohort_id)).collect();
                let beat = Input::Heartbeat { worker, session, beat: heartbeat.sequence, holding };
                return settled(self.context.front.beat(beat).await?);
            }
            Said::LeaseAccepted(lease) => Input::OfferAccepted { worker, cohort: CohortId(lease.cohort_id) },
            Said::LeaseRefused(lease) => return self.refused(worker, &lease).await,
            Said::GangPeer(peer) => return self.context.front.relay(worker, peer).await.map_err(End::from),
            Said::Drain(_) => Input::Drain { worker },
            Said::CohortGone(gone) => Input::CohortGone { worker, session, cohort: CohortId(gone.cohort_id) },
            Said::Register(_) | Said::AttemptReport(_) => return Ok(()),
        };
        settled(self.context.front.step(input).await?)
    }

    /// The worker does not want an offer.
    async fn refused(&self, worker: WorkerId, lease: &v1::LeaseRefused) -> Result<(), End> {
        let why = match lease.refusal() {
            v1::LeaseRefusal::Unspecified | v1::LeaseRefusal::Busy => Declined::Full,
            v1::LeaseRefusal::Draining => Declined::Leaving,
            v1::LeaseRefusal::Unsupported => Declined::Unable,
        };
        let said: String = lease.message.chars().take(REFUSAL_CHARS_MAX).collect();
        tracing::info!(%worker, cohort = lease.cohort_id, why = %said.escape_debug(), "lease refused");
        let mut failure = log::failure_of(Cause::OfferRefused);
        failure.message = match said.as_str() {
            "" => format!("worker {worker} refused the attempt"),
            said => format!("worker {worker} refused the attempt: {said}"),
        };
        let extra = Extra { failure: Some(failure), ..Extra::default() };
        let input = Input::OfferRefused { worker, cohort: CohortId(lease.cohort_id), why };
        settled(self.context.front.step_with(input, extra).await?)
    }
}

/// What an answer means for the connection.
fn settled(answer: Answer) -> Result<(), End> {
    let Answer::Refused(refusal) = answer else { return Ok(()) };
    // The scheduler has given the worker up, or started anew: both sides meet again at a registration.
    if refusal.kind() == RefusalKind::Unregistered {
        return Err(End::Failed(Class::Unavailable.status(format!("{refusal}; connect again"))));
    }
    tracing::debug!(%refusal, "a worker's message changed nothing");
    Ok(())
}

/// The end of a connection of a worker whose version is not spoken here, or not any more.
fn unspoken(version: u32) -> End {
    let message = format!(
        "the worker speaks version {version} of the protocol; this scheduler speaks {WORKER_PROTOCOL_VERSION}, and lets workers of \
         {WORKER_PROTOCOL_VERSION_BEFORE} finish what they run: start the worker of the scheduler's own version"
    );
    End::Refused(v1::RefusalReason::ProtocolVersion, message)
}

fn invalid(message: String) -> End {
    End::Refused(v1::RefusalReason::Invalid, message)
}

/// A registration as the core takes it.
fn read(register: &v1::Register, session: Session, outdated: bool) -> Result<(WorkerId, Input), Vec<Fault>> {
    let mut faults = Faults::new();
    let worker = faults.field(field::<WorkerId>("register.worker_id", &register.worker_id));
    if register.kernel_profile.is_empty() {
        faults.push(Fault::new("register.kernel_profile", "is missing"));
    }
    if register.devices.is_empty() {
        faults.push(Fault::new("register.devices", "is empty; expected at least one"));
    }
    let (mut devices, mut memory) = (Devices::default(), BTreeMap::new());
    for (index, device) in register.devices.iter().enumerate() {
        let kind = match device.kind() {
            v1::DeviceKind::Cpu => {
                devices.n_cpu += 1;
                Device::Cpu
            }
            v1::DeviceKind::Cuda => {
                devices.n_cuda += 1;
                Device::Cuda
            }
            v1::DeviceKind::Unspecified => {
                let path = format!("register.devices[{index}].kind");
                faults.push(Fault::new(path.as_str(), "is not known here; expected cpu or cuda"));
                continue;
            }
        };
        // A job may get any of them: the smallest counts. A worker that does not know says 0.
        if device.memory_bytes > 0 {
            let least = memory.entry(kind).or_insert(device.memory_bytes);
            *least = device.memory_bytes.min(*least);
        }
    }
    let mut holding = Vec::with_capacity(register.running.len());
    for (index, running) in register.running.iter().enumerate() {
        holding.extend(faults.take(read_holding(running, &format!("register.running[{index}]"))));
    }
    let process = match register.process.as_str() {
        "" => None,
        text => faults.field(field::<Name>("register.process", text)),
    };
    let registration = worker.map(|worker| {
        let (labels, draining) = (register.labels.clone(), register.draining);
        let input = Input::Register {
            worker: worker.clone(),
            session,
            devices,
            memory,
            labels,
            process,
            outdated,
            draining,
            holding,
        };
        (worker, input)
    });
    faults.finish(registration)
}

fn read_holding(running: &v1::RunningCohort, path: &str) -> Result<Holding, Vec<Fault>> {
    let mut faults = Faults::new();
    let mut attempts = Vec::with_capacity(running.attempts.len());
    for (index, told) in running.attempts.iter().enumerate() {
        let id = faults.take(attempt(&format!("{path}.attempts[{index}]"), Some(told)));
        attempts.extend(id.map(|id| core::Attempt { key: JobKey::new(id.project, id.job), epoch: id.epoch }));
    }
    let device = match running.device() {
        v1::DeviceKind::Cuda => core::Device::Cuda,
        v1::DeviceKind::Cpu | v1::DeviceKind::Unspecified => core::Device::Cpu,
    };
    let cohort = CohortId(running.cohort_id);
    faults.finish(Some(Holding { cohort, attempts, device, n_devices: running.device_count }))
}

impl From<super::reports::Broken> for End {
    fn from(broken: super::reports::Broken) -> Self {
        match broken {
            super::reports::Broken::Gone => Self::Gone,
            super::reports::Broken::Failed(status) => Self::Failed(status),
        }
    }
}
