//! Puts the parts together, serves them on one port, and takes them apart in order.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use attune_artifacts::BlobStore;
use attune_proto::MESSAGE_BYTES_MAX;
use attune_proto::v1::artifact_service_server::ArtifactServiceServer;
use attune_proto::v1::audit_service_server::AuditServiceServer;
use attune_proto::v1::fleet_service_server::FleetServiceServer;
use attune_proto::v1::job_service_server::JobServiceServer;
use attune_proto::v1::method_service_server::MethodServiceServer;
use attune_proto::v1::token_service_server::TokenServiceServer;
use attune_proto::v1::worker_service_server::WorkerServiceServer;
use attune_store::{Database, Store};
use attune_telemetry::{Task, TaskGroup};
use futures::TryStreamExt as _;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tonic::transport::Server;
use tonic::transport::server::{Router, TcpIncoming};
use tower::layer::util::{Identity, Stack};

use crate::certificates::Certificates;
use crate::clock::Clock;
use crate::config::{Auth, Config};
use crate::context::Context;
use crate::desk::Desk;
use crate::error::Error;
use crate::follow;
use crate::frames::Counted;
use crate::front::{Front, Mail};
use crate::guard::{self, GuardLayer};
use crate::hub::Hub;
use crate::incoming;
use crate::services::{
    artifacts::Artifacts, audit::Audit, fleet::FleetDesk, jobs::Jobs, methods::Methods, tokens::Tokens,
    workers::Workers,
};
use crate::{limits, providers, stages, sweep};

/// How often a quiet connection is asked whether it still stands, and how long it may take to say so.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Largest headers of a call, as they are when unpacked.
const HEADER_BYTES_MAX: u32 = 16 << 10;
/// How long tasks may take to end that were told to before.
const LAST_LIMIT: Duration = Duration::from_secs(2);
/// How long workers of this machine may take to end with the scheduler, beyond what they have for their attempts at the most.
const SUPPLIERS_LIMIT: Duration = Duration::from_secs(60 * 60 + 60);
/// Jobs that may wait for their old checkpoints to be deleted.
const WAITING_SWEEPS: usize = 1024;

/// A scheduler that has its database, and serves nobody yet.
pub struct Scheduler {
    config: Config,
    store: Store,
}

impl Scheduler {
    /// Takes the database, to lead.
    ///
    /// # Errors
    /// [`Error::Store`] when another scheduler holds it, or when it cannot be opened.
    pub async fn lead(config: Config) -> Result<Self, Error> {
        let store = Store::open(&config.database).await?;
        Ok(Self { config, store })
    }

    /// Opens the database beside a scheduler that leads, to follow it, and to lead when it is gone; none if `shutdown` is done first. A
    /// server that does not answer is waited for. A file of SQLite cannot be read beside who leads, and neither can a database whose
    /// schema is older than this version's: that is waited for as well.
    ///
    /// # Errors
    /// [`Error::Store`] when it cannot be opened for another reason.
    pub async fn stand_by(config: Config, shutdown: impl Future<Output = ()>) -> Result<Option<Self>, Error> {
        use attune_store::Error as E;
        let open = async {
            let mut said = None;
            loop {
                let opened = match &config.database {
                    Database::Postgres(_) => match Store::follow(&config.database).await {
                        Err(E::Behind { .. }) => Store::open(&config.database).await,
                        followed => followed,
                    },
                    Database::Sqlite(_) => Store::open(&config.database).await,
                };
                match opened {
                    Ok(store) => return Ok(store),
                    Err(error) if error.is_retryable() || matches!(error, E::Locked { .. }) => {
                        let why = error.to_string();
                        if said.as_ref() != Some(&why) {
                            tracing::info!(why, "this scheduler stands by, and answers nobody");
                            said = Some(why);
                        }
                        tokio::time::sleep(follow::LOOK).await;
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        tokio::select! {
            opened = open => Ok(Some(Self { store: opened?, config })),
            () = shutdown => Ok(None),
        }
    }

    /// Serves until `shutdown` is done: then takes no further connections, answers the calls that run, and returns.
    ///
    /// It may be killed at any moment: what was answered is stored, and the next one goes on from there, with the workers
    /// that run on meanwhile.
    ///
    /// # Errors
    /// [`Error`] when it cannot start, when its database fails for good, or when another scheduler has taken that over.
    pub async fn serve(self, listener: TcpListener, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
        let Self { config, store } = self;
        Box::pin(run(config, store, listener, shutdown)).await
    }
}

/// Takes the database, leads and serves; see [`Scheduler`].
///
/// # Errors
/// Those of [`Scheduler::lead`] and [`Scheduler::serve`].
pub async fn serve(config: Config, listener: TcpListener, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    Scheduler::lead(config).await?.serve(listener, shutdown).await
}

/// What a scheduler begins when it leads.
struct Lead {
    config: Config,
    context: Arc<Context>,
    mail: Mail,
    /// The tasks that go on until the last connection has ended.
    inner: TaskGroup,
    /// The task that has workers.
    suppliers: TaskGroup,
    /// Where it is reached.
    url: String,
}

impl Lead {
    async fn begin(self) -> Result<(), Error> {
        let Self { config, context, mail, inner, suppliers, url } = self;
        if let Auth::Tokens(tokens) = &config.auth {
            guard::first_admin(&context.store, tokens.admin_file.as_deref()).await?;
        }
        let (prune, to_prune) = mpsc::channel(WAITING_SWEEPS);
        let due = Arc::new(Notify::new());
        let (store, hub) = (context.store.clone(), context.hub.clone());
        let desk = Desk::open(&config, store, hub, Clock::start(), prune, Arc::clone(&due)).await?;
        inner.spawn(Task::new("desk").shutdown_on_error(), desk.run(mail, inner.stop()));
        keep(&inner, "checkpoints", sweep::checkpoints(Arc::clone(&context), to_prune));
        keep(&inner, "housekeeping", sweep::keep_house(Arc::clone(&context), config.timings));
        keep(&inner, "limits", limits::keep(Arc::clone(&context)));
        keep(&inner, "stages", stages::follow(Arc::clone(&context), due));
        // Workers that end with the scheduler still have something to say to it.
        let supplying = Box::pin(providers::follow(Arc::clone(&context), config.pools, suppliers.stop()));
        suppliers.spawn(Task::new("workers"), async move {
            supplying.await;
            Ok::<_, std::convert::Infallible>(())
        });
        let word = guard::new_token();
        context.store.announce(&url, word.expose()).await?;
        context.replica.lead(word);
        // What the one has stored that led before, after the last look at it.
        for key in context.hub.watched() {
            context.hub.wake(&key);
        }
        context.guard.has_revoked();
        tracing::info!(url, "this scheduler leads");
        Ok(())
    }
}

/// Goes on with something until the group ends.
fn keep(group: &TaskGroup, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
    let work = Box::pin(work);
    group.spawn(Task::new(name).abort_on_cancel(), async move {
        work.await;
        Ok::<_, std::convert::Infallible>(())
    });
}

async fn run(
    config: Config,
    store: Store,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let data_root = match &config.data_root {
        None => None,
        Some(path) => {
            let found = tokio::fs::canonicalize(path).await;
            Some(found.map_err(|source| Error::DataRoot { path: path.clone(), source })?)
        }
    };
    let certificates = match &config.tls {
        Some(files) => Some(Arc::new(Certificates::open(files).await?)),
        None => None,
    };
    let blobs = BlobStore::open(&config.artifacts).await?;
    let (front, mail) = Front::new(config.limits.waiting_requests);
    let hub = Hub::default();
    // Two groups: connections end first, then what they speak with.
    let (connections, inner, suppliers) = (TaskGroup::new(), TaskGroup::new(), TaskGroup::new());
    let stop = inner.stop();
    let context = Arc::new(Context::new(&config, data_root, store.clone(), blobs, front, hub, connections.clone()));
    keep(&inner, "certificates to others", Arc::clone(&context.replica).keep(config.timings.certificates));
    if let Some(certificates) = &certificates {
        keep(&inner, "certificates", Arc::clone(certificates).keep(config.timings.certificates));
    }
    let url = match &config.advertise {
        Some(url) => url.clone(),
        None => {
            let scheme = if config.tls.is_some() { "https" } else { "http" };
            format!("{scheme}://{}", listener.local_addr().map_err(|error| Error::Server(error.into()))?)
        }
    };
    let lead = Lead {
        config: config.clone(),
        context: Arc::clone(&context),
        mail,
        inner: inner.clone(),
        suppliers: suppliers.clone(),
        url,
    };
    if store.leads() {
        Box::pin(lead.begin()).await?;
    } else {
        let context = Arc::clone(&context);
        inner.spawn(Task::new("follow").abort_on_cancel().shutdown_on_error(), async move {
            follow::until_leading(&context).await?;
            Box::pin(lead.begin()).await
        });
    }

    context.guard.open().await?;
    let grace = config.timings.shutdown_grace;
    let end = {
        let (connections, stop, suppliers) = (connections.clone(), stop.clone(), suppliers.clone());
        async move {
            tokio::select! {
                () = shutdown => {
                    tracing::info!("the scheduler is asked to end");
                    suppliers.shutdown(SUPPLIERS_LIMIT).await;
                }
                () = stop.requested() => tracing::error!("the scheduler cannot go on"),
            }
            // Long streams end by themselves now; short calls are answered.
            connections.stop().request();
        }
    };
    let accepted = TcpIncoming::from(listener).with_nodelay(Some(true));
    let most = incoming::most(config.limits.connections);
    let incoming = incoming::connections(accepted, most, config.timings.greeting_limit);
    let routes = route(&context).await?;
    let served = async {
        let Some(certificates) = certificates else {
            return routes.serve_with_incoming_shutdown(incoming.map_ok(Counted::new), end).await;
        };
        let (patience, at_once) = (config.timings.greeting_limit, config.limits.connections);
        let encrypted = Box::pin(certificates.encrypt(incoming, patience, at_once));
        routes.serve_with_incoming_shutdown(encrypted.map_ok(Counted::new), end).await
    };
    let limited = async {
        connections.stop().requested().await;
        tokio::time::sleep(grace).await;
    };
    // A connection that does not end within the grace time is dropped with the server.
    let served = tokio::select! {
        served = served => served.map_err(|error| Error::Server(error.into())),
        () = limited => Ok(()),
    };
    // A stream that was cut is its reader's to notice; the group has logged it.
    connections.shutdown(LAST_LIMIT).await;
    suppliers.shutdown(LAST_LIMIT).await;
    let desk_failures = inner.shutdown(LAST_LIMIT).await;
    drop(context);
    store.close().await;
    served?;
    match desk_failures.into_iter().next() {
        Some(failure) => Err(Error::Task(failure)),
        None => Ok(()),
    }
}

/// All services of the port.
async fn route(context: &Arc<Context>) -> Result<Router<Stack<GuardLayer, Identity>>, Error> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(attune_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let failed = |error: tonic_reflection::server::Error| Error::Server(error.into());
    macro_rules! service {
        ($server:ident, $service:expr) => {
            $server::new($service)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX)
        };
    }
    health.set_serving::<JobServiceServer<Jobs>>().await;
    health.set_serving::<WorkerServiceServer<Workers>>().await;
    health.set_serving::<ArtifactServiceServer<Artifacts>>().await;
    health.set_serving::<MethodServiceServer<Methods>>().await;
    health.set_serving::<FleetServiceServer<FleetDesk>>().await;
    health.set_serving::<TokenServiceServer<Tokens>>().await;
    health.set_serving::<AuditServiceServer<Audit>>().await;
    let server = Server::builder();
    Ok(server
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .layer(GuardLayer(Arc::clone(&context.guard)))
        .add_service(health_service)
        .add_service(reflection().build_v1().map_err(failed)?)
        .add_service(reflection().build_v1alpha().map_err(failed)?)
        .add_service(service!(JobServiceServer, Jobs { context: Arc::clone(context) }))
        .add_service(service!(WorkerServiceServer, Workers { context: Arc::clone(context) }))
        .add_service(service!(ArtifactServiceServer, Artifacts { context: Arc::clone(context) }))
        .add_service(service!(FleetServiceServer, FleetDesk { context: Arc::clone(context) }))
        .add_service(service!(MethodServiceServer, Methods))
        .add_service(service!(TokenServiceServer, Tokens { context: Arc::clone(context) }))
        .add_service(service!(AuditServiceServer, Audit { context: Arc::clone(context) })))
}
