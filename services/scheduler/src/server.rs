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
use attune_store::Store;
use attune_telemetry::{Task, TaskGroup};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tonic::transport::Server;
use tonic::transport::server::{Router, TcpIncoming};
use tonic::transport::{self, Certificate, ServerTlsConfig};
use tower::layer::util::{Identity, Stack};

use crate::clock::Clock;
use crate::config::{Auth, Config, Tls};
use crate::context::Context;
use crate::desk::Desk;
use crate::error::Error;
use crate::front::Front;
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

/// How often a scheduler that waits to lead looks whether another one still does.
const LOOK: Duration = Duration::from_millis(250);

/// A scheduler that holds its database and serves nobody yet.
pub struct Leader {
    config: Config,
    store: Store,
}

impl Leader {
    /// Takes the database.
    ///
    /// # Errors
    /// [`Error::Store`] when another scheduler holds it, or when it cannot be opened.
    pub async fn take(config: Config) -> Result<Self, Error> {
        let store = Store::open(&config.database).await?;
        Ok(Self { config, store })
    }

    /// Takes the database as soon as no other scheduler holds it; none if `shutdown` is done first. A server that does not answer is
    /// waited for as well.
    ///
    /// # Errors
    /// [`Error::Store`] when it cannot be opened for another reason.
    pub async fn wait(config: Config, shutdown: impl Future<Output = ()>) -> Result<Option<Self>, Error> {
        let take = async {
            let mut said = None;
            loop {
                match Store::open(&config.database).await {
                    Ok(store) => return Ok(store),
                    Err(error) if error.is_retryable() || matches!(error, attune_store::Error::Locked { .. }) => {
                        let why = error.to_string();
                        if said.as_ref() != Some(&why) {
                            tracing::info!(why, "this scheduler stands by");
                            said = Some(why);
                        }
                        tokio::time::sleep(LOOK).await;
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        tokio::select! {
            taken = take => Ok(Some(Self { store: taken?, config })),
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

/// Takes the database and serves; see [`Leader`].
///
/// # Errors
/// Those of [`Leader::take`] and [`Leader::serve`].
pub async fn serve(config: Config, listener: TcpListener, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    Leader::take(config).await?.serve(listener, shutdown).await
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
    if let Auth::Tokens(tokens) = &config.auth {
        guard::first_admin(&store, tokens.admin_file.as_deref()).await?;
    }
    let blobs = BlobStore::open(&config.artifacts).await?;
    let (front, letters) = Front::new(config.limits.waiting_requests);
    let (prune, to_prune) = mpsc::channel(WAITING_SWEEPS);
    let hub = Hub::default();
    let due = Arc::new(Notify::new());
    let desk = Desk::open(&config, store.clone(), hub.clone(), Clock::start(), prune, Arc::clone(&due)).await?;

    // Two groups: connections end first, then what they speak with.
    let (connections, inner) = (TaskGroup::new(), TaskGroup::new());
    let stop = inner.stop();
    inner.spawn(Task::new("desk").shutdown_on_error(), desk.run(letters, stop.clone()));
    let context = Arc::new(Context::new(&config, data_root, store.clone(), blobs, front, hub, connections.clone()));
    context.guard.open().await?;
    let sweeping = sweep::checkpoints(Arc::clone(&context), to_prune);
    inner.spawn(Task::new("checkpoints").abort_on_cancel(), async move {
        sweeping.await;
        Ok::<_, std::convert::Infallible>(())
    });

    let keeping = Box::pin(sweep::keep_house(Arc::clone(&context), config.timings));
    inner.spawn(Task::new("housekeeping").abort_on_cancel(), async move {
        keeping.await;
        Ok::<_, std::convert::Infallible>(())
    });

    let limiting = Box::pin(limits::keep(Arc::clone(&context)));
    inner.spawn(Task::new("limits").abort_on_cancel(), async move {
        limiting.await;
        Ok::<_, std::convert::Infallible>(())
    });

    let making = Box::pin(stages::follow(Arc::clone(&context), due));
    inner.spawn(Task::new("stages").abort_on_cancel(), async move {
        making.await;
        Ok::<_, std::convert::Infallible>(())
    });

    // Workers that end with the scheduler still have something to say to it.
    let suppliers = TaskGroup::new();
    let supplying = Box::pin(providers::follow(Arc::clone(&context), config.pools.clone(), suppliers.stop()));
    suppliers.spawn(Task::new("workers"), async move {
        supplying.await;
        Ok::<_, std::convert::Infallible>(())
    });

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
    let incoming = incoming::connections(accepted, config.limits.connections, config.timings.greeting_limit);
    let served = route(&config, &context).await?.serve_with_incoming_shutdown(incoming, end);
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
async fn route(config: &Config, context: &Arc<Context>) -> Result<Router<Stack<GuardLayer, Identity>>, Error> {
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
    let mut server = Server::builder();
    if let Some(Tls { certificate, key, client_ca }) = &config.tls {
        let mut tls = ServerTlsConfig::new()
            .identity(transport::Identity::from_pem(certificate, key.expose()))
            .timeout(config.timings.greeting_limit);
        if let Some(ca) = client_ca {
            tls = tls.client_ca_root(Certificate::from_pem(ca));
        }
        let unusable = |error: transport::Error| {
            let deepest = std::iter::successors(Some(&error as &dyn std::error::Error), |at| at.source()).last();
            Error::Tls(deepest.map(ToString::to_string).unwrap_or_default())
        };
        server = server.tls_config(tls).map_err(unusable)?;
    }
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
