//! Who calls, and what they may do: asked once for every call, before anything else of it is looked at.
//!
//! ```text
//! a call -> layer: credential -> Caller; table of calls: may this role do that? -> service: Caller::project -> rows
//! ```
//!
//! The one invariant: a service gets the project of a request from its [`Caller`] and from nowhere else, and a call that the
//! table ([`rules`]) does not have is nobody's. What belongs to others is answered like what is not there.

mod body;
mod caller;
mod first;
mod held;
mod keys;
mod layer;
mod oidc;
mod pace;
mod roles;
mod rules;
mod signature;
mod token;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use attune_proto::{Class, Secret};
use attune_store::audit::Record;
use attune_store::token::Role;
use attune_store::{Store, UtcMs};
use attune_telemetry::{Task, TaskGroup};
use tokio::sync::{oneshot, watch};
use tonic::Status;

use crate::clock::Clock;
use crate::config::{Auth, Config};
use crate::replica::Replica;

pub(crate) use body::Cut;
pub(crate) use caller::{Caller, received};
pub(crate) use first::first_admin;
pub(crate) use layer::GuardLayer;
pub use oidc::Oidc;
pub(crate) use pace::Pace;
pub use token::new_token;
pub(crate) use token::{Minted, is_same_secret, mint};

/// How exactly the last use of a token is known.
const USE_IS_KNOWN_TO: Duration = Duration::from_secs(60);
/// The longest time without a look at whether a credential is still valid.
const LOOK: Duration = Duration::from_secs(60 * 60);
/// Refused credentials that are written down a minute, and at once: nobody fills the log with what is not true.
const REFUSALS: (f64, f64) = (0.5, 30.0);

/// What is asked of callers, and what is remembered of them.
#[derive(Debug)]
pub(crate) struct Guard {
    store: Store,
    replica: Arc<Replica>,
    auth: Auth,
    tasks: TaskGroup,
    /// The hash of the secret that workers of this process have.
    local: Option<blake3::Hash>,
    /// Whoever else vouches for callers.
    provider: Option<oidc::Provider>,
    /// Counts tokens that were revoked.
    ended: watch::Sender<u64>,
    /// How often each credential calls.
    calls: Pace,
    /// How often each address fails to prove who it is.
    failures: Pace,
    refusals: Pace,
    /// How long a call may take that does not last.
    call_limit: Duration,
    /// When the use of each token was last noted.
    noted: Mutex<BTreeMap<String, UtcMs>>,
}

impl Guard {
    pub(crate) fn new(store: Store, replica: Arc<Replica>, config: &Config, tasks: TaskGroup) -> Self {
        let limits = config.limits.calls;
        let (local, provider) = match &config.auth {
            Auth::Open => (None, None),
            Auth::Tokens(tokens) => {
                let local = tokens.local_worker.as_ref().map(token::whole_hash);
                (local, tokens.oidc.clone().map(oidc::Provider::new))
            }
        };
        Self {
            store,
            replica,
            auth: config.auth.clone(),
            tasks,
            local,
            provider,
            ended: watch::Sender::new(0),
            calls: Pace::new(f64::from(limits.calls_per_second), f64::from(limits.calls_at_once)),
            failures: Pace::new(f64::from(limits.failures_per_second), f64::from(limits.failures_at_once)),
            refusals: Pace::new(REFUSALS.0, REFUSALS.1),
            call_limit: config.timings.call_limit,
            noted: Mutex::default(),
        }
    }

    /// Gets what must be there before anybody can prove who they are.
    pub(crate) async fn open(&self) -> Result<(), crate::error::Error> {
        match &self.provider {
            Some(provider) => provider.open().await.map_err(|why| {
                crate::error::Error::Auth(format!("the keys of the identity provider cannot be read: {why}"))
            }),
            None => Ok(()),
        }
    }

    /// Whether callers are asked who they are.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.auth, Auth::Open)
    }

    /// Who shows this credential.
    async fn identify(&self, credential: Option<&str>, peer: &str, rpc: &str) -> Result<Caller, Status> {
        if self.is_open() {
            return Ok(Caller::anybody(peer));
        }
        let now = Clock::utc();
        let shown = credential.unwrap_or_default();
        let hash = token::whole_hash(&Secret::new(shown));
        // Comparisons of this type take the same time wherever the difference is.
        if self.local.is_some_and(|local| local == hash) {
            return Ok(Caller::local(peer));
        }
        if let Some(provider) = self.provider.as_ref().filter(|_| shown.contains('.')) {
            return match provider.believe(shown, peer).await {
                Some(caller) => Ok(caller),
                None => Err(self.failures.take(peer).map_or_else(too_many, |()| nobody())),
            };
        }
        // What is no token is looked for all the same: that takes as long as one that is not known.
        let (id, secret) = token::parts(shown).unwrap_or((token::NOBODY, shown));
        let found = self.store.token(id).await.map_err(|error| away(&error))?;
        let given = token::hash(secret);
        let is_right = found.as_ref().is_some_and(|found| token::same(found.hash, given));
        match found {
            Some(found) if is_right && found.is_valid(now) => {
                self.note_use(&found, now);
                Ok(Caller::of(found, peer))
            }
            known => {
                // Whoever proves who it is is not held up by others at its address.
                self.failures.take(peer).map_err(too_many)?;
                if let Some(known) = known {
                    self.refuse_known(&known, peer, rpc);
                }
                Err(nobody())
            }
        }
    }

    /// One call more of a caller, who may have made too many.
    fn count(&self, caller: &Caller) -> Result<(), Status> {
        match caller.id() {
            Some(id) => self.calls.take(id).map_err(too_many),
            None => Ok(()),
        }
    }

    /// Notes now and then that a token is used. A note that is lost is made with the next use.
    fn note_use(&self, token: &attune_store::token::Token, now: UtcMs) {
        let is_fresh = |time: UtcMs| now.0.saturating_sub(time.0) < USE_IS_KNOWN_TO.as_millis() as i64;
        if token.used.is_some_and(is_fresh) {
            return;
        }
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        noted.retain(|_, time| is_fresh(*time));
        if noted.insert(token.id.clone(), now).is_some() {
            return;
        }
        let (store, id) = (self.store.clone(), token.id.clone());
        self.tasks.spawn(Task::new("note the use of a token").abort_on_cancel(), async move {
            if let Err(error) = store.token_used(&id, now).await {
                tracing::warn!(%error, token = id, "the use of a token was not noted");
            }
            Ok::<_, std::convert::Infallible>(())
        });
    }

    /// Says that some token is not valid any more.
    pub(crate) fn has_revoked(&self) {
        self.ended.send_modify(|count| *count += 1);
    }

    /// Done when a caller's credential is not valid any more.
    pub(crate) async fn gone(self: Arc<Self>, caller: Caller) {
        let mut ended = self.ended.subscribe();
        loop {
            ended.mark_unchanged();
            let now = Clock::utc();
            let left = caller.expires().map(|expires| expires.0.saturating_sub(now.0));
            if left.is_some_and(|left| left <= 0) {
                return;
            }
            // A database that cannot be read now says nothing about the token.
            if let Some(id) = caller.token()
                && let Ok(found) = self.store.token(id).await
                && found.is_none_or(|found| !found.is_valid(now))
            {
                return;
            }
            let left = left.and_then(|left| u64::try_from(left).ok()).map_or(LOOK, Duration::from_millis);
            tokio::select! {
                changed = ended.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(left.min(LOOK)) => {}
            }
        }
    }

    /// Writes down a call that changed nothing; what a change is stored with is its own record.
    pub(crate) async fn record(&self, caller: &Caller, rpc: &str, outcome: tonic::Code) {
        if let Some(record) = caller.record_of(rpc, outcome) {
            self.write(record).await;
        }
    }

    /// Writes down that a token was shown with another secret, or after its end. It is not waited for: the answer takes no longer
    /// than that to a token that nobody knows.
    fn refuse_known(&self, known: &attune_store::token::Token, peer: &str, rpc: &str) {
        if self.refusals.take("").is_err() {
            return;
        }
        drop(self.begin_to_write(Record {
            time: Clock::utc(),
            caller: known.id.clone(),
            name: known.name.to_string(),
            peer: peer.to_owned(),
            project: known.project.clone(),
            rpc: rpc.to_owned(),
            target: String::new(),
            outcome: code_name(tonic::Code::Unauthenticated),
        }));
    }

    /// Stores a record, also if whoever waits for it goes.
    async fn write(&self, record: Record) {
        let _ = self.begin_to_write(record).await;
    }

    /// Begins to store a record; the answer ends when it is stored.
    fn begin_to_write(&self, record: Record) -> oneshot::Receiver<()> {
        let store = self.store.clone();
        let (done, wait) = oneshot::channel::<()>();
        self.tasks.spawn(Task::new("write a call down"), async move {
            if let Err(error) = store.append_audit(&record).await {
                tracing::error!(%error, ?record, "a record of the audit log was not stored");
            }
            drop(done);
            Ok::<_, std::convert::Infallible>(())
        });
        wait
    }

    /// Makes a worker id the caller's, or says that it is another's. One that becomes the caller's is written down with that.
    pub(crate) async fn claim(
        &self,
        caller: &Caller,
        worker: &attune_spec::id::WorkerId,
    ) -> Result<(), attune_store::Error> {
        match caller.owner() {
            Some(owner) => {
                let record = caller.record();
                if self.store.claim_worker(worker, owner, Clock::utc(), record.as_deref()).await? {
                    caller.is_recorded();
                }
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// The answer to whoever shows no credential, and to whoever shows one that is not valid, whatever is wrong with it.
fn nobody() -> Status {
    Class::Unauthenticated.status("the call carries no valid credential")
}

/// The answer while credentials cannot be looked at: what is wrong with the database is no stranger's business.
fn away(error: &attune_store::Error) -> Status {
    tracing::error!(%error, "credentials cannot be looked at");
    Class::Unavailable.status("the server cannot look at credentials now; try again later")
}

fn too_many(wait: Duration) -> Status {
    Class::QuotaExceeded.status_after(format!("too many calls; come again in {} ms", wait.as_millis().max(1)), wait)
}

/// The roles of the contract and of the store.
pub(crate) fn role_to_message(role: Role) -> attune_proto::v1::TokenRole {
    use attune_proto::v1::TokenRole;
    match role {
        Role::Viewer => TokenRole::Viewer,
        Role::Submitter => TokenRole::Submitter,
        Role::Admin => TokenRole::Admin,
        Role::Worker => TokenRole::Worker,
    }
}

/// A code as gRPC writes it.
fn code_name(code: tonic::Code) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    // The one that is an abbreviation.
    name.replace("O_K", "OK")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_written_as_grpc_writes_them() {
        let names: Vec<_> = [0, 5, 7, 16].map(|code| code_name(tonic::Code::from_i32(code))).into();
        assert_eq!(names, ["OK", "NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED"]);
    }
}
