//! Workers from engines that own machines: this machine itself, Slurm, Kubernetes.
//!
//! What to ask for and what to give back is decided in `attune_scheduler_core::supply`; here it is done, and engines are asked what
//! they have. Attune manages no machines: an engine starts `attune worker` where and when it can, and ends it.

mod config;
mod engine;
mod fields;
mod follow;
#[cfg(feature = "kubernetes")]
mod kubernetes;
mod launch;
mod processes;
mod slurm;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use attune_scheduler_core::supply::{Pool, RequestId, Standing};

use crate::clock;

pub use config::{Defaults, read};
pub(crate) use follow::follow;

/// Why an engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("{engine} cannot {doing}: {why}")]
pub struct ProviderError {
    /// Who was asked, such as `Slurm`.
    pub engine: &'static str,
    /// What for, such as `start a worker`.
    pub doing: &'static str,
    /// The answer, or why there was none.
    pub why: String,
}

/// As whom a scheduler asks an engine that knows accounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// The namespace that it belongs to; that of the workers if absent.
    pub namespace: Option<String>,
    /// Its name there.
    pub name: String,
}

/// An engine that starts workers of one pool. Each worker must carry the label
/// [`REQUEST_LABEL`](attune_scheduler_core::supply::REQUEST_LABEL) with the request that it was started for.
///
/// Nobody but the scheduler that leads calls it, one call of a pool at a time.
#[tonic::async_trait]
pub trait WorkerProvider: fmt::Debug + Send + Sync {
    /// What the engine has of this pool: every request that was asked for and has not ended, by this scheduler or by one
    /// before it.
    ///
    /// # Errors
    /// When the engine does not say: what it has is then what it had.
    async fn list(&self) -> Result<BTreeMap<RequestId, Standing>, ProviderError>;

    /// Asks for one worker; [`list`](Self::list) has it from then on.
    ///
    /// # Errors
    /// When the engine refuses.
    async fn ask(&self, request: &RequestId) -> Result<(), ProviderError>;

    /// Tells a worker to end that has been drained and runs nothing.
    ///
    /// # Errors
    /// When the engine does not pass it on.
    async fn give_back(&self, request: &RequestId) -> Result<(), ProviderError>;

    /// Ends a request at once, whether it waits, runs or hangs. One that has ended is none to complain about.
    ///
    /// # Errors
    /// When the engine does not do it.
    async fn withdraw(&self, request: &RequestId) -> Result<(), ProviderError>;

    /// What the engine would be asked for this request, as text in the engine's own language.
    fn rendered(&self, request: &RequestId) -> String;

    /// What the engine must allow `account` so that a scheduler of that account can ask it, in the engine's own language; nothing where
    /// it has none for that.
    fn rights(&self, _account: &Account) -> Option<String> {
        None
    }

    /// The scheduler ends in good order and answers until this returns. Whatever does not outlive it ends now.
    async fn close(&self) {}
}

/// A pool with its engine.
#[derive(Debug, Clone)]
pub struct WorkerPool {
    /// How many workers of which kind.
    pub pool: Pool,
    /// How often the engine is asked what it has.
    pub look: Duration,
    /// The engine.
    pub provider: Arc<dyn WorkerProvider>,
}

impl WorkerPool {
    /// What the engine would be asked for one worker, of a request that nobody has made.
    pub fn rendered(&self) -> String {
        self.provider.rendered(&clock::shown_request_id())
    }
}
