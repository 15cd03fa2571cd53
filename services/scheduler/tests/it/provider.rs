//! An identity provider beside the server: its tokens are believed, by keys that it publishes and changes.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use attune_proto::v1::{self, TokenRole};
use attune_proto::{Client, Secret};
use attune_scheduler::{Auth, Oidc, Tokens};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Code, Status};

use crate::fixtures::{create, inputs, job};
use crate::server::{Server, cut};

const ROLES: &str = "rules:
  - {claim: groups, value: operators, role: admin, all_projects: true}
  - {claim: groups, value: fleet, role: worker, all_projects: true}
  - {claim: groups, value: tuners, role: submitter, project: default}
";

/// A provider that answers on a port of this machine.
struct Provider {
    url: String,
    keys: Arc<Mutex<Vec<(String, Ed25519KeyPair)>>>,
    asked: Arc<Mutex<Vec<String>>>,
    _answering: tokio::task::JoinSet<()>,
}

fn pair() -> Ed25519KeyPair {
    let made = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).unwrap();
    Ed25519KeyPair::from_pkcs8(made.as_ref()).unwrap()
}

fn now() -> u64 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs()
}

impl Provider {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let keys = Arc::new(Mutex::new(vec![("first".to_owned(), pair())]));
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let mut answering = tokio::task::JoinSet::new();
        let shared = (url.clone(), Arc::clone(&keys), Arc::clone(&asked));
        answering.spawn(async move {
            let (url, keys, asked) = shared;
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = vec![0; 4096];
                let length = stream.read(&mut head).await.unwrap_or_default();
                let head = String::from_utf8_lossy(&head[..length]).into_owned();
                let path = head.split_whitespace().nth(1).unwrap_or_default().to_owned();
                let body = match path.as_str() {
                    "/.well-known/openid-configuration" => json!({"issuer": url, "jwks_uri": format!("{url}/keys")}),
                    _ => {
                        let key = |(id, pair): &(String, Ed25519KeyPair)| {
                            let x = BASE64.encode(pair.public_key());
                            json!({"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": id, "x": x})
                        };
                        json!({"keys": keys.lock().unwrap().iter().map(key).collect::<Vec<_>>()})
                    }
                };
                asked.lock().unwrap().push(path);
                let (body, kind) = (body.to_string(), "content-type: application/json");
                let answer = format!("HTTP/1.1 200 OK\r\n{kind}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        Self { url, keys, asked, _answering: answering }
    }

    fn token(&self, subject: &str, group: &str, lasts_s: i64) -> Secret {
        let keys = self.keys.lock().unwrap();
        let (id, pair) = keys.last().unwrap();
        let exp = now().saturating_add_signed(lasts_s);
        let claims = json!({"iss": self.url, "aud": "attune", "sub": subject, "exp": exp, "groups": [group]});
        let part = |value: &Value| BASE64.encode(value.to_string());
        let message = format!("{}.{}", part(&json!({"alg": "EdDSA", "kid": id})), part(&claims));
        Secret::new(format!("{message}.{}", BASE64.encode(pair.sign(message.as_bytes()))))
    }

    fn server(&self) -> Server {
        let oidc = Oidc::new(&self.url, "attune", None, ROLES).unwrap();
        Server::guarded(|config| {
            let Auth::Tokens(tokens) = &config.auth else { panic!("it asks") };
            config.auth = Auth::Tokens(Tokens { oidc: Some(oidc), ..tokens.clone() });
        })
    }
}

async fn whoami(client: &Client) -> Result<v1::GetCallerResponse, Status> {
    client.tokens().get_caller(v1::GetCallerRequest::default()).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn people_and_workers_of_a_provider_are_who_it_says() {
    let provider = Provider::start().await;
    let server = provider.server();
    server.admin_secret();
    let operator = server.client_as(Some(provider.token("o-1", "operators", 600))).await;
    let caller = whoami(&operator).await.unwrap();
    assert_eq!((caller.role(), caller.project.as_str(), caller.token_id.as_str()), (TokenRole::Admin, "", ""));
    assert!(caller.expire_time.is_some());
    inputs(&operator).await;
    let tuner = server.client_as(Some(provider.token("u-1", "tuners", 600))).await;
    let made = create(&tuner, "r1", &job()).await.unwrap();
    let fleet = server.client_as(Some(provider.token("node-1", "fleet", 600))).await;
    let mut worker = crate::worker::Worker::connect(&fleet, "w1").await;
    let offer = worker.offer().await;
    worker.begin(&crate::worker::attempt(&offer)).await;
    worker.succeed(&offer).await;
    crate::fixtures::until(&operator, &made.job_id, v1::JobState::Succeeded).await;
    // The id of a worker is its subject's, as it would be a token's name's.
    let other = server.client_as(Some(provider.token("node-2", "fleet", 600))).await;
    let mut thief = crate::worker::Worker::open(&other, crate::worker::register("w1")).await;
    assert!(matches!(thief.next().await, Some(v1::connect_response::Message::Refused(_))));

    let refused = whoami(&server.client_as(Some(provider.token("u-2", "strangers", 600))).await).await.unwrap_err();
    assert_eq!(refused.message(), "the call carries no valid credential");
    let records = operator.audit().list_audit_records(v1::ListAuditRecordsRequest::default()).await.unwrap();
    let is_tuners = |record: &v1::AuditRecord| record.caller == "oidc/u-1" && record.rpc == "JobService/CreateJob";
    assert!(records.into_inner().records.iter().any(is_tuners));
    // An admin's word gives out tokens of the server's own, too.
    server.token(&operator, None, TokenRole::Viewer, "bert").await;
}

#[tokio::test]
async fn keys_that_change_are_asked_for_and_not_too_often() {
    let provider = Provider::start().await;
    let server = provider.server();
    server.admin_secret();
    let first = provider.token("o-1", "operators", 600);
    whoami(&server.client_as(Some(first.clone())).await).await.unwrap();
    let n_asked = || provider.asked.lock().unwrap().iter().filter(|path| *path == "/keys").count();
    assert_eq!(n_asked(), 1);
    provider.keys.lock().unwrap().push(("second".to_owned(), pair()));
    whoami(&server.client_as(Some(provider.token("o-1", "operators", 600))).await).await.unwrap();
    whoami(&server.client_as(Some(first)).await).await.unwrap();
    assert_eq!(n_asked(), 2);
    // Whoever names keys that nobody has does not make the server ask for ever.
    provider.keys.lock().unwrap().push(("third".to_owned(), pair()));
    let unknown = server.client_as(Some(provider.token("o-1", "operators", 600))).await;
    for _ in 0..5 {
        assert_eq!(whoami(&unknown).await.unwrap_err().code(), Code::Unauthenticated);
    }
    assert_eq!(n_asked(), 2);
}

#[tokio::test]
async fn a_stream_ends_with_the_credential() {
    let provider = Provider::start().await;
    let server = provider.server();
    let admin = server.admin().await;
    inputs(&admin).await;
    let made = create(&admin, "r1", &job()).await.unwrap();
    // Its time is over but for what clocks may differ; an open stream lasts to the time itself.
    let brief = server.client_as(Some(provider.token("u-1", "tuners", 2))).await;
    let request = v1::WatchJobRequest { project: String::new(), job_id: made.job_id, after_sequence: 0 };
    let mut watch = brief.jobs().watch_job(request).await.unwrap().into_inner();
    let begun = tokio::time::Instant::now();
    let cut = cut(&mut watch).await;
    assert_eq!(cut.code(), Code::Unauthenticated, "{cut:?}");
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_provider_that_is_away_keeps_nobody_else_out() {
    let oidc = Oidc::new("http://127.0.0.1:1", "attune", None, ROLES).unwrap();
    let server = Server::guarded(|config| {
        let Auth::Tokens(tokens) = &config.auth else { panic!("it asks") };
        config.auth = Auth::Tokens(Tokens { oidc: Some(oidc), ..tokens.clone() });
    });
    assert!(whoami(&server.admin().await).await.unwrap().authenticated);
    let stranger = server.client_as(Some(Secret::new("eyJhbGciOiJFZERTQSJ9.e30.AAAA"))).await;
    assert_eq!(whoami(&stranger).await.unwrap_err().code(), Code::Unauthenticated);
}
