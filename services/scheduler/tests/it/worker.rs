//! A worker without children: it says what a test tells it to say.

use std::collections::{BTreeMap, VecDeque};

use attune_artifacts::{Causes, Kind};
use attune_proto::v1::connect_request::Message as Said;
use attune_proto::v1::connect_response::Message;
use attune_proto::{Client, v1};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::fixtures::{bundle, push};
use crate::server::LIMIT;

/// One connection of a worker.
pub(crate) struct Worker {
    pub(crate) id: String,
    client: Client,
    outgoing: mpsc::Sender<v1::ConnectRequest>,
    incoming: Streaming<v1::ConnectResponse>,
    heard: VecDeque<Message>,
    beat: u64,
    /// The number of the last report of each attempt.
    reports: BTreeMap<(String, u64), u64>,
}

/// A registration with one processor.
pub(crate) fn register(id: &str) -> v1::Register {
    let device = v1::Device { kind: v1::DeviceKind::Cpu as i32, cores: 1, ..v1::Device::default() };
    v1::Register {
        worker_id: id.to_owned(),
        protocol_version: attune_proto::WORKER_PROTOCOL_VERSION,
        devices: vec![device],
        kernel_profile: "test".to_owned(),
        ..v1::Register::default()
    }
}

/// That a cohort runs.
pub(crate) fn running(offer: &v1::LeaseOffer) -> v1::RunningCohort {
    v1::RunningCohort {
        cohort_id: offer.cohort_id,
        attempts: offer.attempts.iter().map(|attempt| attempt.attempt.clone().unwrap()).collect(),
        device: offer.device,
        device_count: offer.device_count,
    }
}

impl Worker {
    /// Connects and says what it is told; the answer is not waited for.
    pub(crate) async fn open(client: &Client, register: v1::Register) -> Self {
        let (outgoing, stream) = mpsc::channel(16);
        let id = register.worker_id.clone();
        outgoing.send(v1::ConnectRequest { message: Some(Said::Register(register)) }).await.unwrap();
        let incoming = client.workers().connect(ReceiverStream::new(stream)).await.unwrap().into_inner();
        let (heard, reports) = (VecDeque::new(), BTreeMap::new());
        Self { id, client: client.clone(), outgoing, incoming, heard, beat: 0, reports }
    }

    /// A worker with one processor that runs nothing.
    pub(crate) async fn connect(client: &Client, id: &str) -> Self {
        Self::connect_with(client, register(id)).await.0
    }

    /// A worker that registers like this.
    pub(crate) async fn connect_with(client: &Client, register: v1::Register) -> (Self, v1::Registered) {
        let mut worker = Self::open(client, register).await;
        let registered = worker
            .expect(|message| match message {
                Message::Registered(registered) => Some(registered.clone()),
                _ => None,
            })
            .await;
        (worker, registered)
    }

    /// Goes on with the numbers of an earlier connection of the same worker.
    pub(crate) fn go_on(mut self, earlier: &Self) -> Self {
        self.reports = earlier.reports.clone();
        self
    }

    pub(crate) async fn say(&self, said: Said) {
        self.outgoing.send(v1::ConnectRequest { message: Some(said) }).await.unwrap();
    }

    /// The next message, or the end.
    pub(crate) async fn next(&mut self) -> Option<Message> {
        if let Some(heard) = self.heard.pop_front() {
            return Some(heard);
        }
        let next = tokio::time::timeout(LIMIT, self.incoming.message()).await.expect("a message or the end");
        next.ok().flatten().and_then(|answer| answer.message)
    }

    /// Waits for a message; others are kept.
    pub(crate) async fn expect<T>(&mut self, wanted: impl Fn(&Message) -> Option<T>) -> T {
        if let Some(at) = self.heard.iter().position(|message| wanted(message).is_some()) {
            return wanted(&self.heard.remove(at).unwrap()).unwrap();
        }
        loop {
            let next = tokio::time::timeout(LIMIT, self.incoming.message()).await;
            let next = next.unwrap_or_else(|_| panic!("what is waited for does not come; heard {:?}", self.heard));
            let message = next.unwrap().expect("the stream goes on").message.unwrap();
            match wanted(&message) {
                Some(found) => return found,
                None => self.heard.push_back(message),
            }
        }
    }

    pub(crate) async fn offer(&mut self) -> v1::LeaseOffer {
        let offer = |message: &Message| match message {
            Message::LeaseOffer(offer) => Some(offer.clone()),
            _ => None,
        };
        self.expect(offer).await
    }

    /// Waits until a cohort is to be let go, and lets it go.
    pub(crate) async fn release(&mut self, cohort: u64) {
        let kill = |message: &Message| match message {
            Message::KillCohort(kill) if kill.cohort_id == cohort => Some(()),
            _ => None,
        };
        self.expect(kill).await;
        self.say(Said::CohortGone(v1::CohortGone { cohort_id: cohort })).await;
    }

    /// Sends a heartbeat and waits for its answer.
    pub(crate) async fn beat(&mut self, running: &[v1::RunningCohort]) -> v1::HeartbeatAck {
        self.beat += 1;
        let beat = self.beat;
        self.say(Said::Heartbeat(v1::Heartbeat { sequence: beat, running: running.to_vec(), disk_free_bytes: 0 }))
            .await;
        self.expect(|message| match message {
            Message::HeartbeatAck(ack) if ack.sequence == beat => Some(ack.clone()),
            _ => None,
        })
        .await
    }

    /// Sends a report and waits until it is recorded.
    pub(crate) async fn report(&mut self, attempt: &v1::AttemptRef, report: v1::attempt_report::Report) {
        let number = self.next_number(attempt);
        self.report_as(attempt, number, report).await;
    }

    /// The number of the next report.
    pub(crate) fn next_number(&mut self, attempt: &v1::AttemptRef) -> u64 {
        let number = self.reports.entry((attempt.job_id.clone(), attempt.epoch)).or_default();
        *number += 1;
        *number
    }

    /// The same, with a number of one's choice.
    pub(crate) async fn report_as(
        &mut self,
        attempt: &v1::AttemptRef,
        number: u64,
        report: v1::attempt_report::Report,
    ) {
        let report = v1::AttemptReport { attempt: Some(attempt.clone()), sequence: number, report: Some(report) };
        self.say(Said::AttemptReport(report)).await;
        let of = attempt.clone();
        self.expect(move |message| match message {
            Message::ReportAck(ack) if ack.attempt.as_ref() == Some(&of) && ack.sequence == number => Some(()),
            _ => None,
        })
        .await;
    }

    pub(crate) async fn begin(&mut self, attempt: &v1::AttemptRef) {
        self.report(attempt, v1::attempt_report::Report::Started(v1::AttemptStarted { process_id: 1 })).await;
        let running = v1::AttemptRunning { step: 0, total_steps: 10 };
        self.report(attempt, v1::attempt_report::Report::Running(running)).await;
    }

    pub(crate) async fn finish(&mut self, attempt: &v1::AttemptRef, outcome: v1::attempt_finished::Outcome) {
        let finished = v1::AttemptFinished { outcome: Some(outcome), shared: false };
        self.report(attempt, v1::attempt_report::Report::Finished(finished)).await;
    }

    pub(crate) async fn fail(&mut self, attempt: &v1::AttemptRef, cause: v1::FailureCause, message: &str) {
        let failure = v1::Failure { cause: cause as i32, message: message.to_owned(), ..v1::Failure::default() };
        self.finish(attempt, v1::attempt_finished::Outcome::Failed(failure)).await;
    }

    fn commit(&self, attempt: &v1::AttemptRef, commit: v1::attempt_commit::Commit) -> v1::AttemptCommit {
        v1::AttemptCommit {
            job_id: attempt.job_id.clone(),
            epoch: attempt.epoch,
            worker_id: self.id.clone(),
            commit: Some(commit),
            facts: Some(v1::RunFacts { step: 10, tokens: 320, tokens_per_second: 8.0, ..v1::RunFacts::default() }),
        }
    }

    /// Commits a checkpoint and gives its digest.
    pub(crate) async fn checkpoint(&self, attempt: &v1::AttemptRef, step: u64) -> Result<String, tonic::Status> {
        let bytes = format!("state of {} after {step}", attempt.job_id);
        let made = bundle(Kind::Checkpoint, &[("state.bin", bytes.as_bytes())], Causes::default());
        let commit = self.commit(attempt, v1::attempt_commit::Commit::CheckpointStep(step));
        push(&self.client, &made, Some(commit), &[]).await?;
        Ok(made.0.digest().to_string())
    }

    /// Commits a result and gives its digest.
    pub(crate) async fn output(
        &self,
        attempt: &v1::AttemptRef,
        role: &str,
        causes: Causes,
    ) -> Result<String, tonic::Status> {
        let bytes = format!("{role} of {}", attempt.job_id);
        let made = bundle(Kind::Adapter, &[("adapter.bin", bytes.as_bytes())], causes);
        let commit = self.commit(attempt, v1::attempt_commit::Commit::OutputRole(role.to_owned()));
        push(&self.client, &made, Some(commit), &[]).await?;
        Ok(made.0.digest().to_string())
    }

    /// Commits a result, says that the attempt has succeeded, lets its cohort go.
    pub(crate) async fn succeed(&mut self, offer: &v1::LeaseOffer) -> String {
        let attempt = offer.attempts[0].attempt.clone().unwrap();
        let digest = self.output(&attempt, "adapter", Causes::default()).await.unwrap();
        let outputs = vec![v1::JobOutput { role: "adapter".to_owned(), digest: digest.clone() }];
        let succeeded = v1::attempt_finished::Outcome::Succeeded(v1::AttemptSucceeded { outputs });
        self.finish(&attempt, succeeded).await;
        self.release(offer.cohort_id).await;
        digest
    }
}

/// The attempt of an offer.
pub(crate) fn attempt(offer: &v1::LeaseOffer) -> v1::AttemptRef {
    assert_eq!(offer.attempts.len(), 1);
    offer.attempts[0].attempt.clone().unwrap()
}

impl Worker {
    /// Whether a message like this has come before the one that was waited for last.
    pub(crate) fn has_heard(&self, wanted: impl Fn(&Message) -> bool) -> bool {
        self.heard.iter().any(wanted)
    }

    /// Whether a message like this has come within a moment.
    pub(crate) async fn has(&mut self, wanted: impl Fn(&Message) -> bool) -> bool {
        if self.has_heard(&wanted) {
            return true;
        }
        let moment = std::time::Duration::from_millis(200);
        match tokio::time::timeout(moment, self.incoming.message()).await {
            Ok(next) => {
                let message = next.unwrap().expect("the stream goes on").message.unwrap();
                let found = wanted(&message);
                self.heard.push_back(message);
                found
            }
            Err(_) => false,
        }
    }
}
