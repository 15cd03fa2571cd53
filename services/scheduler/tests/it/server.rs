//! A server that a test may stop in good order, or kill.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use attune_proto::client::Options;
use attune_proto::v1::{self, ListMethodsRequest};
use attune_proto::{Client, Secret};
use attune_scheduler::{Auth, Config, Error, Scheduler, Tokens, serve};
use tokio::sync::oneshot;

/// Longest time for anything that a test waits for.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// A running server with everything that it keeps.
pub(crate) struct Server {
    pub(crate) folder: Arc<tempfile::TempDir>,
    address: SocketAddr,
    config: Config,
    /// Whether it follows another one, and leads when that is gone.
    stands_by: bool,
    stop: Option<oneshot::Sender<()>>,
    ended: Option<oneshot::Receiver<Result<(), Error>>>,
    // A runtime of its own, so that killing it leaves nothing of it behind.
    runtime: Option<tokio::runtime::Runtime>,
}

/// A configuration for impatient tests.
pub(crate) fn config(folder: &tempfile::TempDir) -> Config {
    let mut config = Config::in_folder(folder.path());
    // Long: workers of tests say nothing between the calls that a test is about, however long a busy machine takes for these.
    config.timings.lease_ttl = Duration::from_secs(30);
    config.timings.heartbeat_interval = Duration::from_millis(300);
    config.timings.stop_limit = Duration::from_secs(5);
    config.timings.backoff_base = Duration::from_millis(100);
    config.timings.backoff_cap = Duration::from_millis(200);
    config.timings.shutdown_grace = Duration::from_secs(2);
    config
}

impl Server {
    /// A server in a new folder.
    pub(crate) fn start() -> Self {
        Self::start_with(|_| {})
    }

    /// One whose leases end while a test waits.
    pub(crate) fn with_short_leases() -> Self {
        Self::start_with(|config| config.timings.lease_ttl = Duration::from_secs(3))
    }

    /// The same, configured.
    pub(crate) fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let folder = Arc::new(tempfile::tempdir().unwrap());
        let mut config = config(&folder);
        change(&mut config);
        Self::start_of(folder, config, false)
    }

    /// Another one that follows this one, over the same database of PostgreSQL.
    pub(crate) fn follower(&self) -> Self {
        Self::start_of(Arc::clone(&self.folder), self.config.clone(), true)
    }

    fn start_of(folder: Arc<tempfile::TempDir>, config: Config, stands_by: bool) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = Self { folder, address, config, stands_by, stop: None, ended: None, runtime: None };
        server.run(listener);
        server
    }

    /// A server that asks callers who they are, configured.
    pub(crate) fn guarded(change: impl FnOnce(&mut Config)) -> Self {
        Self::start_with(|config| {
            let artifacts = std::path::Path::new(&config.artifacts);
            let admin_file = Some(artifacts.with_file_name("admin.token"));
            config.auth = Auth::Tokens(Tokens { admin_file, ..Tokens::default() });
            change(config);
        })
    }

    /// The secret of the first admin of a server that asks.
    pub(crate) fn admin_secret(&self) -> Secret {
        let file = self.folder.path().join("admin.token");
        for _ in 0..400 {
            if let Ok(text) = std::fs::read_to_string(&file)
                && let Ok(secret) = text.parse()
            {
                return secret;
            }
            std::thread::park_timeout(Duration::from_millis(25));
        }
        panic!("no token is written to {}", file.display());
    }

    /// The first admin of a server that asks.
    pub(crate) async fn admin(&self) -> Client {
        self.client_as(Some(self.admin_secret())).await
    }

    /// A client that shows a secret, or none.
    pub(crate) async fn client_as(&self, token: Option<Secret>) -> Client {
        let options = Options { token, retries: 0, ..Options::default() };
        for _ in 0..200 {
            if let Ok(client) = Client::connect(&self.url(), options.clone()).await {
                return client;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("no server came up at {}", self.url());
    }

    /// A new token: its id and its secret. Without a project it reaches all.
    pub(crate) async fn token(
        &self,
        admin: &Client,
        project: Option<&str>,
        role: v1::TokenRole,
        name: &str,
    ) -> (String, Secret) {
        let request = v1::CreateTokenRequest {
            project: project.unwrap_or_default().to_owned(),
            all_projects: project.is_none(),
            name: name.to_owned(),
            role: role as i32,
            expire_time: None,
        };
        let made = admin.tokens().create_token(request).await.unwrap().into_inner();
        (made.token.unwrap().token_id, made.secret.parse().unwrap())
    }

    fn run(&mut self, listener: std::net::TcpListener) {
        listener.set_nonblocking(true).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let (end, ended) = oneshot::channel();
        let (config, stands_by) = (self.config.clone(), self.stands_by);
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let shutdown = async {
                let _ = stopped.await;
            };
            if !stands_by {
                let _ = end.send(serve(config, listener, shutdown).await);
                return;
            }
            let _ = end.send(match Scheduler::stand_by(config, std::future::pending()).await {
                Ok(Some(scheduler)) => scheduler.serve(listener, shutdown).await,
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            });
        });
        (self.stop, self.ended, self.runtime) = (Some(stop), Some(ended), Some(runtime));
    }

    /// Where it listens.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The address at which it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// A client that waits until the server is there.
    pub(crate) async fn client(&self) -> Client {
        for _ in 0..200 {
            // The port takes connections before anybody answers on it.
            if let Ok(client) = Client::connect(&self.url(), Options::default()).await
                && client.methods().list_methods(ListMethodsRequest::default()).await.is_ok()
            {
                return client;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("no server came up at {}", self.url());
    }

    /// The same, which makes no call a second time.
    pub(crate) async fn client_of_one_try(&self) -> Client {
        self.client().await;
        Client::connect(&self.url(), Options { retries: 0, ..Options::default() }).await.unwrap()
    }

    /// Asks it to end, and says how it did.
    pub(crate) async fn stop(&mut self) -> Result<(), Error> {
        let _ = self.stop.take().unwrap().send(());
        let ended = tokio::time::timeout(LIMIT, self.ended.take().unwrap()).await.expect("the server ends").unwrap();
        self.runtime.take().unwrap().shutdown_background();
        ended
    }

    /// Ends it between two instructions, as far as a process can do that to itself.
    pub(crate) fn kill(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }

    /// Starts it again on the same port over what it left behind.
    pub(crate) async fn restart(&mut self) {
        for _ in 0..200 {
            if let Ok(listener) = std::net::TcpListener::bind(self.address) {
                self.run(listener);
                // A killed server may hold its database for a moment longer.
                let ended = self.ended.as_mut().unwrap();
                if tokio::time::timeout(Duration::from_millis(300), ended).await.is_err() {
                    return;
                }
                self.runtime.take().unwrap().shutdown_background();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the server does not start again");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// What a stream is cut with: reads until it fails.
pub(crate) async fn cut<T>(stream: &mut tonic::Streaming<T>) -> tonic::Status {
    loop {
        match tokio::time::timeout(LIMIT, stream.message()).await.expect("the stream ends") {
            Ok(Some(_)) => {}
            Ok(None) => panic!("a stream that is cut must not look like one that has ended"),
            Err(status) => return status,
        }
    }
}
