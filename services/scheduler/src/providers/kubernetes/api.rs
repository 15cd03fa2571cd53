//! Calls of the API server, and what it means when it does not do what it is asked.

use std::fmt::Debug;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::NamespaceResourceScope;
use kube::api::{DeleteParams, ListParams, ObjectList, PostParams};
use kube::client::ConfigExt as _;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use kube::core::{Request, Status};
use kube::{Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tonic::codegen::http;
use tower::ServiceBuilder;

/// Longest time for the API server to answer.
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// Objects in one answer.
const PAGE: u32 = 500;
/// Answers that make a list; what has more is no list of ours.
const PAGES_MAX: usize = 1000;
/// What of an answer is passed on, in characters.
const SAID_MAX: usize = 600;
/// Longest time for which the server's wish to be left alone is heeded.
const LEFT_ALONE_MAX: Duration = Duration::from_secs(300);
/// That time where it does not say.
const LEFT_ALONE: Duration = Duration::from_secs(5);

/// Why a call was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// Nobody says where the server is, or who asks.
    #[error("there is no way to the API server: {0}")]
    NoWay(String),
    /// It cannot be reached, or the connection broke.
    #[error("the API server does not answer: {0}")]
    Away(String),
    /// It takes too long.
    #[error("the API server does not answer within {} s", CALL_LIMIT.as_secs())]
    Slow,
    /// It does not believe who asks.
    #[error("the API server does not know who asks (401): {0}")]
    Unauthorized(String),
    /// Whoever asks may not, or a quota is used up.
    #[error("the API server does not allow it (403): {0}")]
    Forbidden(String),
    /// There is no such object.
    #[error("there is no such thing (404): {0}")]
    NotFound(String),
    /// There is an object of this name.
    #[error("there is one already (409): {0}")]
    AlreadyExists(String),
    /// It does not fit what the server has.
    #[error("it does not fit what the API server has (409): {0}")]
    Conflict(String),
    /// The rest of a list can no longer be had.
    #[error("the list has changed too often meanwhile (410): {0}")]
    Gone(String),
    /// The object is not as it should be.
    #[error("the API server finds it invalid (422): {0}")]
    Invalid(String),
    /// It has too much to do, and asks to be left alone.
    #[error("the API server has too much to do (429) and asks to be left alone for {} s: {said}", wait.as_secs())]
    Busy {
        /// For how long.
        wait: Duration,
        /// Its words.
        said: String,
    },
    /// It answers something else.
    #[error("the API server answers {code}: {said}")]
    Other {
        /// The HTTP status.
        code: u16,
        /// Its words.
        said: String,
    },
    /// Its answer is not what it should be.
    #[error("the API server's answer cannot be read: {0}")]
    Unreadable(String),
}

impl Refusal {
    /// Whether the call may have been done all the same.
    pub(super) const fn is_unsure(&self) -> bool {
        match self {
            Self::Away(_) | Self::Slow | Self::Unreadable(_) => true,
            Self::Other { code, .. } => *code >= 500,
            Self::NoWay(_)
            | Self::Unauthorized(_)
            | Self::Forbidden(_)
            | Self::NotFound(_)
            | Self::AlreadyExists(_)
            | Self::Conflict(_)
            | Self::Gone(_)
            | Self::Invalid(_)
            | Self::Busy { .. } => false,
        }
    }

    /// From an answer that says no.
    fn read(code: u16, retry_after: Option<u64>, body: &[u8]) -> Self {
        let status = serde_json::from_slice::<Status>(body).ok().filter(|status| !status.message.is_empty());
        let cut = |text: &str| text.trim().chars().take(SAID_MAX).collect::<String>();
        let said = status.as_ref().map_or_else(|| cut(&String::from_utf8_lossy(body)), |status| cut(&status.message));
        let status = status.unwrap_or_default();
        match code {
            401 => Self::Unauthorized(said),
            403 => Self::Forbidden(said),
            404 => Self::NotFound(said),
            409 if status.is_already_exists() => Self::AlreadyExists(said),
            409 => Self::Conflict(said),
            410 => Self::Gone(said),
            422 => Self::Invalid(with_causes(said, &status)),
            429 => {
                let told =
                    status.details.map(|details| u64::from(details.retry_after_seconds)).filter(|told| *told > 0);
                let wait = retry_after.or(told).map_or(LEFT_ALONE, Duration::from_secs).min(LEFT_ALONE_MAX);
                Self::Busy { wait, said }
            }
            code => Self::Other { code, said },
        }
    }
}

fn no_way(error: &dyn std::error::Error) -> Refusal {
    Refusal::NoWay(chain(error))
}

/// What is said, and what it leaves out of the fields at fault.
fn with_causes(said: String, status: &Status) -> String {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let left_out = causes.filter(|cause| !said.contains(&cause.field) || !said.contains(&cause.message));
    let told: Vec<String> = left_out.map(|cause| format!("; {}: {}", cause.field, cause.message)).collect();
    (said + &told.concat()).chars().take(SAID_MAX).collect()
}

/// A message with what led to it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut texts: Vec<String> =
        std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect();
    // Wrappers repeat what they wrap.
    let mut at = 1;
    while at < texts.len() {
        if texts[at - 1].contains(&texts[at]) { drop(texts.remove(at)) } else { at += 1 }
    }
    texts.join(": ")
}

#[derive(Default)]
struct Connection {
    client: Option<Client>,
    /// Until when the server wants to be left alone.
    alone_until: Option<Instant>,
}

/// The API server, as it is reached from here, and one namespace of it.
pub(super) struct Api {
    kubeconfig: Option<PathBuf>,
    context: Option<String>,
    namespace: String,
    connection: Mutex<Connection>,
}

impl Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kubeconfig, context, namespace, .. } = self;
        let mut shown = f.debug_struct("Api");
        shown
            .field("kubeconfig", kubeconfig)
            .field("context", context)
            .field("namespace", namespace)
            .finish_non_exhaustive()
    }
}

impl Api {
    pub(super) fn new(kubeconfig: Option<PathBuf>, context: Option<String>, namespace: String) -> Self {
        Self { kubeconfig, context, namespace, connection: Mutex::default() }
    }

    fn of<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(&self) -> Request {
        Request::new(K::url_path(&(), Some(&self.namespace)))
    }

    /// All objects with these labels, and these fields if there are any.
    pub(super) async fn list<K>(&self, labels: Option<&str>, fields: Option<&str>) -> Result<Vec<K>, Refusal>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
    {
        let first = ListParams {
            label_selector: labels.map(str::to_owned),
            field_selector: fields.map(str::to_owned),
            limit: Some(PAGE),
            ..ListParams::default()
        };
        let (mut found, mut page, mut is_again) = (Vec::new(), first.clone(), false);
        for _ in 0..PAGES_MAX {
            let asked = self.of::<K>().list(&page).map_err(|error| Refusal::Unreadable(error.to_string()))?;
            let answer: ObjectList<K> = match self.call(asked).await {
                // What a first part was of is forgotten: everything once more.
                Err(Refusal::Gone(_)) if page.continue_token.is_some() && !is_again => {
                    (found, page, is_again) = (Vec::new(), first.clone(), true);
                    continue;
                }
                answer => answer?,
            };
            found.extend(answer.items);
            page.continue_token = answer.metadata.continue_.filter(|token| !token.is_empty());
            if page.continue_token.is_none() {
                return Ok(found);
            }
        }
        Err(Refusal::Unreadable(format!("a list that does not end after {PAGES_MAX} parts")))
    }

    /// Makes an object.
    pub(super) async fn create<K>(&self, object: &K) -> Result<(), Refusal>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Serialize,
    {
        let text = serde_json::to_vec(object).map_err(|error| Refusal::Unreadable(error.to_string()))?;
        let params = PostParams { field_manager: Some("attune".to_owned()), ..PostParams::default() };
        let asked = self.of::<K>().create(&params, text).map_err(|error| Refusal::Unreadable(error.to_string()))?;
        self.call::<serde::de::IgnoredAny>(asked).await.map(drop)
    }

    /// Deletes an object; one that is gone is none to complain about.
    pub(super) async fn delete<K>(&self, name: &str, how: &DeleteParams) -> Result<(), Refusal>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        let asked = self.of::<K>().delete(name, how).map_err(|error| Refusal::Unreadable(error.to_string()))?;
        match self.call::<serde::de::IgnoredAny>(asked).await {
            Ok(_) | Err(Refusal::NotFound(_)) => Ok(()),
            Err(refusal) => Err(refusal),
        }
    }

    async fn call<T: DeserializeOwned>(&self, asked: http::Request<Vec<u8>>) -> Result<T, Refusal> {
        let called = tokio::time::timeout(CALL_LIMIT, self.send(asked)).await.unwrap_or(Err(Refusal::Slow));
        let mut connection = self.connection.lock().await;
        match &called {
            // What says who asks may have been replaced: it is read again.
            Err(Refusal::Unauthorized(_)) => connection.client = None,
            Err(Refusal::Busy { wait, .. }) if connection.alone_until.is_none() => {
                connection.alone_until = Some(Instant::now() + *wait);
            }
            _ => {}
        }
        let body = called?;
        serde_json::from_slice(&body).map_err(|error| Refusal::Unreadable(error.to_string()))
    }

    /// The body of an answer that says yes.
    async fn send(&self, asked: http::Request<Vec<u8>>) -> Result<Vec<u8>, Refusal> {
        let client = self.client().await?;
        let away = |error: kube::Error| Refusal::Away(chain(&error));
        let answer = client.send(asked.map(Into::into)).await.map_err(away)?;
        let (code, headers) = (answer.status(), answer.headers());
        let retry_after = headers.get(http::header::RETRY_AFTER).and_then(|after| after.to_str().ok()?.parse().ok());
        let body = answer.into_body().collect_bytes().await.map_err(away)?;
        if code.is_success() { Ok(body.into()) } else { Err(Refusal::read(code.as_u16(), retry_after, &body)) }
    }

    /// The client, made anew where there is none or what says who asks has run out.
    async fn client(&self) -> Result<Client, Refusal> {
        let mut connection = self.connection.lock().await;
        if let Some(until) = connection.alone_until {
            let wait = until.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                let wait = Duration::from_secs(wait.as_secs() + 1);
                return Err(Refusal::Busy { wait, said: "that time is not over".to_owned() });
            }
            connection.alone_until = None;
        }
        let is_valid = |client: &&Client| client.valid_until().is_none_or(|until| jiff::Timestamp::now() < until);
        if let Some(client) = connection.client.as_ref().filter(is_valid) {
            return Ok(client.clone());
        }
        let config = self.config().await?;
        // A program that signs in may be part of this, and is waited for.
        let connected = tokio::task::spawn_blocking(move || connect(&config)).await;
        let client = connected.map_err(|error| no_way(&error))?.map_err(|error| no_way(&error))?;
        connection.client = Some(client.clone());
        Ok(client)
    }

    /// Where the server is and who asks: what the file says; without one, what Kubernetes tells a Pod; elsewhere `KUBECONFIG` or the
    /// user's own file.
    async fn config(&self) -> Result<Config, Refusal> {
        let options = KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
        let is_pod = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
        let config = match &self.kubeconfig {
            Some(file) => {
                let read = Kubeconfig::read_from(file).map_err(|error| no_way(&error))?;
                Config::from_custom_kubeconfig(read, &options).await.map_err(|error| no_way(&error))?
            }
            None if self.context.is_none() && is_pod => Config::incluster().map_err(|error| no_way(&error))?,
            None => Config::from_kubeconfig(&options).await.map_err(|error| no_way(&error))?,
        };
        match &config.proxy_url {
            Some(proxy) => {
                Err(Refusal::NoWay(format!("it is behind the proxy {proxy}, and this build speaks to none")))
            }
            None => Ok(config),
        }
    }
}

/// A client without the library's own retries, which would outlast a turn, and without its log, which would repeat what is said once.
fn connect(config: &Config) -> Result<Client, kube::Error> {
    let executor = hyper_util::rt::TokioExecutor::new();
    let http = hyper_util::client::legacy::Client::builder(executor).build(config.rustls_https_connector()?);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(tower::BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace.clone()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(code: u16, retry_after: Option<u64>, body: &serde_json::Value) -> Refusal {
        Refusal::read(code, retry_after, body.to_string().as_bytes())
    }

    #[test]
    fn an_answer_that_says_no_is_read_by_its_code_and_keeps_its_words() {
        let status = |reason: &str| json!({"kind": "Status", "status": "Failure", "message": "m", "reason": reason});
        let said = "m".to_owned();
        assert_eq!(read(403, None, &status("Forbidden")), Refusal::Forbidden(said.clone()));
        assert_eq!(read(409, None, &status("AlreadyExists")), Refusal::AlreadyExists(said.clone()));
        assert_eq!(read(409, None, &status("Conflict")), Refusal::Conflict(said.clone()));
        assert_eq!(read(500, None, &status("InternalError")), Refusal::Other { code: 500, said });
        let causes =
            json!([{"field": "spec.a", "message": "Required value"}, {"field": "spec.b", "message": "too long"}]);
        let invalid = json!({"message": "spec.a: Required value", "details": {"causes": causes}});
        assert_eq!(read(422, None, &invalid), Refusal::Invalid("spec.a: Required value; spec.b: too long".to_owned()));
        // A proxy before the server knows no such objects.
        let page = Refusal::read(502, None, b"<html>Bad Gateway</html>\n");
        assert_eq!(page.to_string(), "the API server answers 502: <html>Bad Gateway</html>");
        assert!(page.is_unsure() && !read(422, None, &status("Invalid")).is_unsure());
    }

    #[test]
    fn whoever_is_busy_is_left_alone_for_as_long_as_it_says() {
        let details = json!({"message": "m", "details": {"retryAfterSeconds": 7}});
        let wait = |refusal: Refusal| match refusal {
            Refusal::Busy { wait, .. } => wait.as_secs(),
            other => panic!("{other}"),
        };
        assert_eq!(wait(read(429, Some(2), &details)), 2);
        assert_eq!(wait(read(429, None, &details)), 7);
        assert_eq!(wait(Refusal::read(429, None, b"Too many requests, please try again later.")), 5);
        assert_eq!(wait(read(429, Some(86400), &details)), 300);
    }
}
