//! The API server: who asks, whether they may, and what a request is, over TLS.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{Method, Response, StatusCode, Uri, header};
use axum::serve::Listener;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::world::{Kind, NAMESPACE, World};
use crate::encrypted::vouch;

/// Who asks, as the kubeconfig says.
const SECRET: &str = "s3cret-of-the-scheduler";

/// An answer.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub(super) code: u16,
    pub(super) body: String,
    pub(super) retry_after: Option<u64>,
}

impl Answer {
    pub(super) fn new(code: u16, body: &Value) -> Self {
        Self { code, body: body.to_string(), retry_after: None }
    }
}

/// A `Status` that says no.
pub(super) fn failure(code: u16, reason: &str, message: &str, details: &Value) -> Answer {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "details": details, "code": code,
    });
    Answer::new(code, &status)
}

/// The part of an address behind the question mark.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Query(BTreeMap<String, String>);

impl Query {
    fn of(uri: &Uri) -> Self {
        let pairs = url::form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
        Self(pairs.map(|(name, value)| (name.into_owned(), value.into_owned())).collect())
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// `a=b,c=d`.
    pub(super) fn terms(&self, name: &str) -> Vec<(String, String)> {
        let terms = self.get(name).into_iter().flat_map(|terms| terms.split(','));
        terms.map(|term| term.split_once('=').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap()).collect()
    }
}

/// What the server was asked: verb, resource, name.
pub(super) type Call = (&'static str, &'static str, String);

/// What is to go wrong with the next call.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    /// The answer is this, and nothing is done.
    Instead(Answer),
    /// The call is done, and the answer is this.
    After(Answer),
    /// The call is done so late that nobody waits for it any more.
    Late,
}

/// A server.
pub(super) struct Api {
    pub(super) world: World,
    /// What goes wrong with the next calls of this verb.
    faults: Mutex<Vec<(&'static str, Fault)>>,
    calls: Mutex<Vec<Call>>,
    /// The rules of the role that whoever asks has.
    pub(super) rules: Mutex<Value>,
}

impl Api {
    pub(super) fn break_next(&self, verb: &'static str, fault: Fault) {
        self.faults.lock().unwrap().push((verb, fault));
    }

    /// What it was asked since it was asked for that.
    pub(super) fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    async fn answer(&self, method: &Method, uri: &Uri, bearer: &str, body: &[u8]) -> Answer {
        if bearer != format!("Bearer {SECRET}") {
            return failure(401, "Unauthorized", "Unauthorized", &json!({}));
        }
        let parts: Vec<&str> = uri.path().trim_matches('/').split('/').collect();
        let (namespace, resource, name) = match parts[..] {
            ["apis", "batch", "v1", "namespaces", namespace, "jobs"] => (namespace, Kind::Job, ""),
            ["apis", "batch", "v1", "namespaces", namespace, "jobs", name] => (namespace, Kind::Job, name),
            ["api", "v1", "namespaces", namespace, "pods"] => (namespace, Kind::Pod, ""),
            ["api", "v1", "namespaces", namespace, "pods", name] => (namespace, Kind::Pod, name),
            ["api", "v1", "namespaces", namespace, "events"] => (namespace, Kind::Event, ""),
            _ => return failure(404, "NotFound", "the server could not find the requested resource", &json!({})),
        };
        let verb = match (method, name) {
            (&Method::POST, "") => "create",
            (&Method::GET, "") => "list",
            (&Method::DELETE, name) if !name.is_empty() => "delete",
            _ => return failure(405, "MethodNotAllowed", "the server does not allow this method", &json!({})),
        };
        self.calls.lock().unwrap().push((verb, resource.resource(), name.to_owned()));
        let fault = {
            let mut faults = self.faults.lock().unwrap();
            faults.iter().position(|(of, _)| *of == verb).map(|at| faults.remove(at).1)
        };
        if let Some(Fault::Instead(answer)) = fault {
            return answer;
        }
        if namespace != NAMESPACE || !self.may(verb, resource) {
            let message = format!(
                "{} is forbidden: User \"attune\" cannot {verb} resource {:?} in API group {:?} in the namespace {namespace:?}",
                resource.resource(),
                resource.resource(),
                resource.group()
            );
            return failure(
                403,
                "Forbidden",
                &message,
                &json!({"group": resource.group(), "kind": resource.resource()}),
            );
        }
        if matches!(fault, Some(Fault::Late)) {
            tokio::time::sleep(Duration::from_secs(3600)).await;
        }
        let read = || serde_json::from_slice::<Value>(body).unwrap();
        let answer = match verb {
            "create" => self.world.create(&read()),
            "list" => self.world.list(resource, &Query::of(uri)),
            _ => self.world.delete(resource, name, &if body.is_empty() { json!({}) } else { read() }),
        };
        if let Some(Fault::After(instead)) = fault { instead } else { answer }
    }

    fn may(&self, verb: &str, resource: Kind) -> bool {
        let rules = self.rules.lock().unwrap();
        let has = |list: &Value, one: &str| list.as_array().is_some_and(|list| list.contains(&json!(one)));
        rules.as_array().unwrap().iter().any(|rule| {
            has(&rule["apiGroups"], resource.group())
                && has(&rule["resources"], resource.resource())
                && has(&rule["verbs"], verb)
        })
    }
}

/// What is wrong with a Job that is to be made, as the server's validation has it.
pub(super) fn invalid(job: &Value) -> Vec<Value> {
    let mut causes = Vec::new();
    let mut cause = |is_wrong: bool, field: &str, message: &str| {
        if is_wrong {
            causes.push(json!({"reason": "FieldValueInvalid", "field": field, "message": message}));
        }
    };
    let spec = &job["spec"]["template"]["spec"];
    let is_name = |name: &Value| {
        let name = name.as_str().unwrap_or_default();
        !name.is_empty()
            && name.len() <= 63
            && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    };
    cause(!is_name(&job["metadata"]["name"]), "metadata.name", "Invalid value");
    cause(job["metadata"]["namespace"] != json!(NAMESPACE), "metadata.namespace", "Invalid value");
    cause(spec["restartPolicy"] != json!("Never"), "spec.template.spec.restartPolicy", "Unsupported value");
    let volumes: Vec<&Value> = spec["volumes"].as_array().into_iter().flatten().map(|volume| &volume["name"]).collect();
    let containers = spec["containers"].as_array().cloned().unwrap_or_default();
    cause(containers.is_empty(), "spec.template.spec.containers", "Required value");
    for (idx, container) in containers.iter().enumerate() {
        let path = |field: &str| format!("spec.template.spec.containers[{idx}].{field}");
        cause(!container["image"].is_string(), &path("image"), "Required value");
        for mount in container["volumeMounts"].as_array().into_iter().flatten() {
            cause(!volumes.contains(&&mount["name"]), &path("volumeMounts"), "Not found");
        }
        let resources = &container["resources"];
        let limits = resources["limits"].as_object().cloned().unwrap_or_default();
        for (name, limit) in limits.iter().filter(|(name, _)| name.contains('/')) {
            let whole = limit.as_str().is_some_and(|limit| limit.parse::<u32>().is_ok());
            cause(!whole, &path(&format!("resources.limits[{name}]")), "must be an integer");
            let asked = &resources["requests"][name];
            cause(!asked.is_null() && asked != limit, &path("resources.requests"), "must be equal to the limit");
        }
    }
    causes
}

/// A listener of encrypted connections alone.
struct Encrypted {
    listener: tokio::net::TcpListener,
    acceptor: TlsAcceptor,
}

impl Listener for Encrypted {
    type Io = TlsStream<tokio::net::TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let Ok((stream, address)) = self.listener.accept().await else { continue };
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A server that answers until it goes.
pub(super) struct Server {
    pub(super) api: Arc<Api>,
    address: SocketAddr,
    folder: tempfile::TempDir,
    /// What it runs on, which takes its connections with it.
    runtime: Option<Runtime>,
}

impl Server {
    /// Starts one with room for so many Pods; whoever shows the kubeconfig's token may do what `role` says.
    pub(super) fn start(nodes: usize, role: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        vouch(folder.path(), "cluster", &[("api", "127.0.0.1")]);
        let role: Value = attune_spec::job::read_yaml(role.split("---\n").next().unwrap()).unwrap();
        let api = Arc::new(Api {
            world: World::new(nodes),
            faults: Mutex::default(),
            calls: Mutex::default(),
            rules: Mutex::new(role["rules"].clone()),
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = Self { api, address, folder, runtime: None };
        server.serve(listener);
        server.believe();
        server
    }

    fn serve(&mut self, listener: TcpListener) {
        let path = |name: &str| self.folder.path().join(name);
        let certificate = CertificateDer::from_pem_file(path("api.cert.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_file(path("api.key.pem")).unwrap();
        let config = rustls::ServerConfig::builder().with_no_client_auth();
        let acceptor = TlsAcceptor::from(Arc::new(config.with_single_cert(vec![certificate], key).unwrap()));
        let router = axum::Router::new().fallback(serve).with_state(Arc::clone(&self.api));
        listener.set_nonblocking(true).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            axum::serve(Encrypted { listener, acceptor }, router).await.unwrap();
        });
        self.runtime = Some(runtime);
    }

    /// It is down: nobody listens, and who was connected is so no more.
    pub(super) fn stop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
        while TcpStream::connect(self.address).is_ok() {
            std::thread::yield_now();
        }
    }

    /// It is back.
    pub(super) fn come_back(&mut self) {
        self.serve(TcpListener::bind(self.address).unwrap());
    }

    /// What says where it is and who asks.
    fn access(&self, token: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "other",
            "clusters": [{"name": "c", "cluster": {
                "server": format!("https://{}", self.address),
                "certificate-authority": self.folder.path().join("cluster.ca.pem"),
            }}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}}],
        })
    }

    /// Lets the file of [`Self::kubeconfig`] show another token.
    pub(super) fn believe_nobody(&self) {
        std::fs::write(self.kubeconfig(), self.access("stale").to_string()).unwrap();
    }

    /// Lets it show the right one again.
    pub(super) fn believe(&self) {
        std::fs::write(self.kubeconfig(), self.access(SECRET).to_string()).unwrap();
    }

    /// The file that says where it is and who asks, in the context `test`.
    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn serve(
    State(api): State<Arc<Api>>,
    method: Method,
    uri: Uri,
    headers: header::HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|bearer| bearer.to_str().ok()).unwrap_or_default();
    let Answer { code, body, retry_after } = api.answer(&method, &uri, bearer, &body).await;
    let mut answer = Response::new(Body::from(body));
    *answer.status_mut() = StatusCode::from_u16(code).unwrap();
    if let Some(after) = retry_after {
        answer.headers_mut().insert(header::RETRY_AFTER, after.into());
    }
    answer
}
