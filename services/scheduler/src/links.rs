//! The connections of workers, as the desk sees them: where messages go, and how a connection is told to end.

use std::collections::BTreeMap;

use attune_proto::v1::{self, connect_response::Message};
use attune_scheduler_core::Session;
use attune_spec::id::WorkerId;
use attune_telemetry::Stop;
use tokio::sync::mpsc;
use tonic::Status;

/// What is sent to a worker.
pub(crate) type Outgoing = mpsc::Sender<Result<v1::ConnectResponse, Status>>;

/// One connection of a worker.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    /// Its number.
    pub(crate) session: Session,
    /// Where messages for the worker go.
    pub(crate) outgoing: Outgoing,
    /// Tells the task that reads the connection to end.
    pub(crate) stop: Stop,
}

impl Link {
    /// Sends a message without waiting; whether it went.
    pub(crate) fn send(&self, message: Message) -> bool {
        self.outgoing.try_send(Ok(v1::ConnectResponse { message: Some(message) })).is_ok()
    }

    /// Ends the connection, with a last word if it still takes one.
    fn end(&self, last: Message) {
        self.send(last);
        self.stop.request();
    }
}

/// The newest connection of every worker.
#[derive(Debug, Default)]
pub(crate) struct Links {
    by_worker: BTreeMap<WorkerId, Link>,
}

impl Links {
    /// How many workers are connected.
    pub(crate) fn len(&self) -> usize {
        self.by_worker.len()
    }

    /// Whether the worker is connected.
    pub(crate) fn contains(&self, worker: &WorkerId) -> bool {
        self.by_worker.contains_key(worker)
    }

    /// Takes a worker's new connection in; an older one ends.
    pub(crate) fn insert(&mut self, worker: WorkerId, link: Link) {
        if let Some(old) = self.by_worker.insert(worker, link) {
            old.end(refused(v1::RefusalReason::Superseded, "a newer connection of this worker has taken over"));
        }
    }

    /// Forgets a connection that is gone.
    pub(crate) fn remove(&mut self, worker: &WorkerId, session: Session) {
        if self.by_worker.get(worker).is_some_and(|link| link.session == session) {
            self.by_worker.remove(worker);
        }
    }

    /// Sends a message; only on the connection `session` where one is given. Messages may be lost: a worker that is not
    /// connected learns what it missed when it registers. One that does not take its messages is disconnected.
    pub(crate) fn send(&mut self, worker: &WorkerId, session: Option<Session>, message: Message) {
        let Some(link) = self.by_worker.get(worker) else { return };
        if session.is_some_and(|session| session != link.session) {
            return;
        }
        if !link.send(message) {
            tracing::warn!(%worker, "worker does not take its messages and is disconnected");
            link.stop.request();
            self.by_worker.remove(worker);
        }
    }

    /// Ends every connection, so that the workers register anew.
    pub(crate) fn end_all(&mut self, why: &str) {
        for link in std::mem::take(&mut self.by_worker).into_values() {
            link.end(refused(v1::RefusalReason::Unavailable, why));
        }
    }
}

/// The last message of a connection.
pub(crate) fn refused(reason: v1::RefusalReason, message: &str) -> Message {
    Message::Refused(v1::Refused { reason: reason as i32, message: message.to_owned() })
}
