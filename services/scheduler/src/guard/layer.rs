//! The one place that all calls go through.

use std::sync::Arc;
use std::task::{Context, Poll};

use attune_proto::Class;
use attune_telemetry::Task;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response, header};
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::body::Cut;
use super::rules::{self, Rule};
use super::{Caller, Guard, nobody};
use crate::relay;
use crate::replica::Lead;

/// Puts the guard before services.
#[derive(Debug, Clone)]
pub(crate) struct GuardLayer(pub(crate) Arc<Guard>);

impl<S> Layer<S> for GuardLayer {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, guard: Arc::clone(&self.0) }
    }
}

/// Services behind the guard.
#[derive(Debug, Clone)]
pub(crate) struct Guarded<S> {
    inner: S,
    guard: Arc<Guard>,
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // The one that is ready is the one that is called.
        let ready = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, ready);
        let guard = Arc::clone(&self.guard);
        async move {
            let passed_on = guard.replica.passed_on(request.headers_mut());
            let peer = passed_on.as_ref().and_then(|by| by.peer.clone()).unwrap_or_else(|| peer(&request));
            let rule = rules::of_path(request.uri().path());
            if rule.is_some_and(|rule| rule.is_public) {
                return inner.call(request).await;
            }
            if rule.is_some_and(|rule| rule.is_led)
                && let Some(lead) = guard.replica.other()
            {
                return Ok(elsewhere(&guard, rule, lead, request, &peer, passed_on.is_some()).await);
            }
            let (rule, caller) = match admit(&guard, rule, request.headers(), &peer).await {
                Ok(admitted) => admitted,
                Err(refused) => return Ok(refused.into_http()),
            };
            request.extensions_mut().insert(caller.clone());
            let answering = answer(Arc::clone(&guard), rule, caller, inner.call(request));
            if !rule.is_recorded {
                return answering.await;
            }
            // What changes something is written down, also if whoever asked does not wait for the answer.
            let (send, wait) = oneshot::channel();
            guard.tasks.spawn(Task::new("make a change that was asked for"), async move {
                // Whoever asked may have gone.
                let _ = send.send(answering.await);
                Ok::<_, std::convert::Infallible>(())
            });
            wait.await.unwrap_or_else(|_| Ok(crate::status::shuts_down().into_http()))
        }
        .boxed()
    }
}

/// The answer of the scheduler that leads. It looks at the credential itself; where it cannot be asked, nobody learns so without one.
async fn elsewhere(
    guard: &Guard,
    rule: Option<&'static Rule>,
    lead: Result<Arc<Lead>, Status>,
    request: Request<Body>,
    peer: &str,
    is_passed_on: bool,
) -> Response<Body> {
    let headers = request.headers().clone();
    let answer = match lead {
        Ok(_) if is_passed_on => {
            let message = "the call was passed on to a scheduler that does not lead; try again in a moment, and see that \
                           --advertise of each scheduler leads to itself alone";
            Err(Class::Unavailable.status(message))
        }
        Ok(lead) => relay::pass_on(&guard.replica, lead, request, peer).await,
        Err(nobody) => Err(nobody),
    };
    match answer {
        Ok(answer) => answer,
        Err(away) => match admit(guard, rule, &headers, peer).await {
            Ok(_) => away.into_http(),
            Err(refused) => refused.into_http(),
        },
    }
}

/// The answer to a call that may be made, written down if it changed something or was refused.
async fn answer<E>(
    guard: Arc<Guard>,
    rule: &'static Rule,
    caller: Caller,
    answering: impl Future<Output = Result<Response<Body>, E>>,
) -> Result<Response<Body>, E> {
    let answer = match rule.lasts {
        true if guard.is_open() => answering.await?,
        true => tokio::select! {
            answer = answering => answer?,
            // What was begun is not finished, as if the caller had gone.
            () = Arc::clone(&guard).gone(caller.clone()) => nobody().into_http(),
        },
        false => match timeout(guard.call_limit, answering).await {
            Ok(answer) => answer?,
            Err(_) => Class::DeadlineExceeded.status("the call took too long").into_http(),
        },
    };
    let code = code(answer.headers());
    let about = caller.about();
    let is_refused = code == Code::PermissionDenied || about.is_foreign;
    // A change is stored with its record. What was answered otherwise is written down beside it.
    let is_told = about.is_recorded && code == Code::Ok;
    if (rule.is_recorded && !is_told) || is_refused {
        guard.record(&caller, short(rule), code).await;
    }
    Ok(if rule.lasts && !guard.is_open() { cut(answer, guard, caller) } else { answer })
}

/// The row and the caller of a call that may be made.
async fn admit(
    guard: &Guard,
    rule: Option<&'static Rule>,
    headers: &HeaderMap,
    peer: &str,
) -> Result<(&'static Rule, Caller), Status> {
    let caller = guard.identify(bearer(headers), peer, rule.map_or("", short)).await?;
    guard.count(&caller)?;
    let rule = rule.ok_or_else(|| Class::Unimplemented.status("this server answers no such call"))?;
    caller.calls(short(rule));
    if caller.may(rule) {
        return Ok((rule, caller));
    }
    guard.record(&caller, short(rule), Code::PermissionDenied).await;
    let role = caller.role().map(|role| role.to_string()).unwrap_or_default();
    Err(Class::PermissionDenied.status(format!("{} is not allowed to a credential of role {role}", short(rule))))
}

/// The call without its package.
fn short(rule: &Rule) -> &'static str {
    rule.rpc.strip_prefix("attune.v1.").unwrap_or(rule.rpc)
}

/// The one credential of a call.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(one), None) = (given.next(), given.next()) else { return None };
    let (scheme, credential) = one.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(credential)
}

/// The address that a call comes from.
fn peer(request: &Request<Body>) -> String {
    let extensions = request.extensions();
    let info = extensions.get::<TcpConnectInfo>();
    let info = info.or_else(|| extensions.get::<TlsConnectInfo<TcpConnectInfo>>().map(TlsConnectInfo::get_ref));
    info.and_then(TcpConnectInfo::remote_addr).map(|address| address.ip().to_string()).unwrap_or_default()
}

/// The code that an answer begins with; one that goes on ends with another, if it does not end well.
fn code(headers: &HeaderMap) -> Code {
    headers.get(Status::GRPC_STATUS).map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
}

/// The answer until the caller's credential is not valid any more.
fn cut(answer: Response<Body>, guard: Arc<Guard>, caller: Caller) -> Response<Body> {
    let end = guard.gone(caller).map(|()| nobody()).boxed();
    answer.map(|body| Body::new(Cut::new(body, end)))
}

#[cfg(test)]
mod tests {
    use tonic::codegen::http::HeaderValue;

    use super::*;

    #[test]
    fn a_credential_is_one_of_its_scheme() {
        let bearer_of = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, HeaderValue::from_bytes(value.as_bytes()).unwrap());
            }
            bearer(&headers).map(str::to_owned)
        };
        assert_eq!(bearer_of(&["Bearer abc"]).as_deref(), Some("abc"));
        assert_eq!(bearer_of(&["bearer abc"]).as_deref(), Some("abc"));
        for none in [&[][..], &["abc"], &["Basic abc"], &["Bearer"], &["Bearer a", "Bearer a"], &["Bearer sn\u{f6}"]] {
            assert_eq!(bearer_of(none), None, "{none:?}");
        }
    }
}
