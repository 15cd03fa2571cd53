//! What every service has at hand.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use attune_artifacts::BlobStore;
use attune_scheduler_core::{Backoff, Session};
use attune_store::Store;
use attune_telemetry::{Stop, TaskGroup};
use tokio::sync::RwLock;

use crate::config::Config;
use crate::front::Front;
use crate::guard::Guard;
use crate::hub::Hub;
use crate::replica::Replica;

/// Shared by all services of a server.
#[derive(Debug)]
pub(crate) struct Context {
    /// The control plane's state, for reading.
    pub(crate) store: Store,
    /// The bytes of artifacts.
    pub(crate) blobs: BlobStore,
    /// The desk.
    pub(crate) front: Front,
    /// Wakes watchers.
    pub(crate) hub: Hub,
    /// The tasks of connections.
    pub(crate) tasks: TaskGroup,
    /// Whether this scheduler leads.
    pub(crate) replica: Arc<Replica>,
    /// Who may do what.
    pub(crate) guard: Arc<Guard>,
    /// The folder under which paths may be named, in full.
    pub(crate) data_root: Option<PathBuf>,
    /// The waits after failures.
    pub(crate) backoff: Backoff,
    /// Held for reading from the last look at an artifact's blobs until its row is stored, and for writing while blobs
    /// that nothing refers to are deleted: so that no artifact becomes visible without its bytes.
    pub(crate) sweep: Arc<RwLock<()>>,
    /// How many messages may wait for one worker.
    pub(crate) waiting_messages: usize,
    /// The most bytes of one artifact.
    pub(crate) artifact_bytes_max: u64,
    /// How long the first message of a connection may take to come.
    pub(crate) greeting_limit: Duration,
    /// How long the next part of a push may take to come.
    pub(crate) call_limit: Duration,
    sessions: AtomicU64,
}

impl Context {
    pub(crate) fn new(
        config: &Config,
        data_root: Option<PathBuf>,
        store: Store,
        blobs: BlobStore,
        front: Front,
        hub: Hub,
        tasks: TaskGroup,
    ) -> Self {
        let replica = Arc::new(Replica::new(config.peers.clone()));
        let guard = Guard::new(store.clone(), Arc::clone(&replica), config, tasks.clone());
        Self {
            store,
            blobs,
            front,
            hub,
            tasks,
            replica,
            guard: Arc::new(guard),
            data_root,
            backoff: config.settings().backoff,
            sweep: Arc::default(),
            artifact_bytes_max: config.limits.artifact_bytes,
            greeting_limit: config.timings.greeting_limit,
            call_limit: config.timings.call_limit,
            waiting_messages: config.limits.waiting_messages.max(1),
            sessions: AtomicU64::new(0),
        }
    }

    /// The number of a new connection.
    pub(crate) fn next_session(&self) -> Session {
        Session(self.sessions.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Says when the server is asked to end.
    pub(crate) fn stop(&self) -> Stop {
        self.tasks.stop()
    }
}
