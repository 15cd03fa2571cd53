//! Encrypted connections: who is believed, and who is not (A10).

use std::time::Duration;

use attune_proto::client::{ConnectError, Options, Tls};
use attune_proto::v1::{self, TokenRole};
use attune_proto::{Client, Secret};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::server::{LIMIT, Server};

/// Somebody who vouches for others.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate for names, and its key.
    fn vouch(&self, names: &[&str], is_expired: bool) -> (String, Secret) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        if is_expired {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), Secret::new(key.serialize_pem()))
    }
}

/// A server with this certificate.
fn server((certificate, key): (String, Secret), client_ca: Option<&Authority>) -> Server {
    let client_ca = client_ca.map(|authority| authority.pem.clone());
    let tls = attune_scheduler::Tls { certificate, key, client_ca };
    Server::guarded(|config| {
        config.tls = Some(tls);
        config.timings.greeting_limit = Duration::from_millis(400);
    })
}

/// What a client with these things is answered.
async fn ask(server: &Server, scheme: &str, token: Option<Secret>, tls: Tls) -> Result<v1::GetCallerResponse, String> {
    let url = server.url().replace("http://", &format!("{scheme}://"));
    // The token is there when the server is.
    server.admin_secret();
    for _ in 0..100 {
        let options = Options { token: token.clone(), tls: tls.clone(), retries: 0, ..Options::default() };
        match Client::connect(&url, options).await {
            Ok(client) => {
                let answer = client.tokens().get_caller(v1::GetCallerRequest::default()).await;
                return answer.map(tonic::Response::into_inner).map_err(|status| format!("{status:?}"));
            }
            Err(ConnectError::Unreachable { reason, .. }) if reason.contains("refused") => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    panic!("no server came up at {url}");
}

fn trusting(authority: &Authority) -> Tls {
    Tls { ca: Some(authority.pem.clone()), identity: None }
}

#[tokio::test]
async fn a_server_is_believed_if_the_right_authority_vouches_for_its_name_now() {
    let (authority, other) = (Authority::new("one"), Authority::new("two"));
    let right = server(authority.vouch(&["127.0.0.1"], false), None);
    let secret = Some(right.admin_secret());
    let caller = ask(&right, "https", secret.clone(), trusting(&authority)).await.unwrap();
    assert_eq!((caller.name.as_str(), caller.role()), ("admin", TokenRole::Admin));
    // An encrypted connection proves nothing about the caller.
    let nobody = ask(&right, "https", None, trusting(&authority)).await.unwrap_err();
    assert!(nobody.contains("no valid credential"), "{nobody}");

    let strange = ask(&right, "https", secret.clone(), trusting(&other)).await.unwrap_err();
    assert!(strange.contains("invalid peer certificate: UnknownIssuer"), "{strange}");
    let system = ask(&right, "https", secret.clone(), Tls::default()).await.unwrap_err();
    assert!(system.contains("invalid peer certificate") || system.contains("native certs"), "{system}");
    let expired = server(authority.vouch(&["127.0.0.1"], true), None);
    let late = ask(&expired, "https", secret.clone(), trusting(&authority)).await.unwrap_err();
    assert!(late.contains("certificate expired"), "{late}");
    let misnamed = server(authority.vouch(&["scheduler.example"], false), None);
    let wrong = ask(&misnamed, "https", secret.clone(), trusting(&authority)).await.unwrap_err();
    assert!(wrong.contains("certificate not valid for name \"127.0.0.1\""), "{wrong}");
}

#[tokio::test]
async fn nobody_speaks_in_the_clear_by_mistake() {
    let authority = Authority::new("one");
    let encrypted = server(authority.vouch(&["127.0.0.1"], false), None);
    let secret = encrypted.admin_secret();
    // In the clear to a port that is not.
    let refused = ask(&encrypted, "http", Some(secret.clone()), Tls::default()).await.unwrap_err();
    assert!(!refused.contains(secret.expose()), "{refused}");
    // Encrypted to a port that is not.
    let clear = Server::guarded(|_| {});
    let refused = ask(&clear, "https", Some(clear.admin_secret()), trusting(&authority)).await.unwrap_err();
    assert!(refused.contains("no server answers at https://"), "{refused}");
    // An authority is named, and the address is one in the clear.
    let refused = ask(&clear, "http", Some(secret), trusting(&authority)).await.unwrap_err();
    assert!(refused.contains("expected a URL that begins with https://"), "{refused}");
}

#[tokio::test]
async fn a_client_needs_a_certificate_where_one_is_asked_for() {
    let (servers, clients) = (Authority::new("one"), Authority::new("two"));
    let mutual = server(servers.vouch(&["127.0.0.1"], false), Some(&clients));
    let secret = Some(mutual.admin_secret());
    let with = |identity| Tls { identity: Some(identity), ..trusting(&servers) };
    let caller = ask(&mutual, "https", secret.clone(), with(clients.vouch(&["worker-1"], false))).await.unwrap();
    assert!(caller.authenticated);
    for tls in [trusting(&servers), with(servers.vouch(&["worker-1"], false)), with(clients.vouch(&["worker-1"], true))]
    {
        let refused = ask(&mutual, "https", secret.clone(), tls).await.unwrap_err();
        assert!(!refused.contains("admin"), "{refused}");
    }
    // A certificate is no credential of the contract.
    let nobody = ask(&mutual, "https", None, with(clients.vouch(&["worker-1"], false))).await.unwrap_err();
    assert!(nobody.contains("no valid credential"), "{nobody}");
}

#[tokio::test]
async fn a_handshake_has_its_time() {
    let authority = Authority::new("one");
    let server = server(authority.vouch(&["127.0.0.1"], false), None);
    server.admin_secret();
    let address = server.url().replace("http://", "");
    // Nothing, garbage, and one byte after the other.
    for said in [&b""[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"] {
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        for byte in said {
            let _ = stream.write_all(&[*byte]).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(LIMIT, stream.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "the server waits for ever for {said:?}");
    }
    let caller = ask(&server, "https", Some(server.admin_secret()), trusting(&authority)).await.unwrap();
    assert!(caller.authenticated);
}

#[tokio::test]
async fn a_key_that_does_not_fit_is_said_at_the_start() {
    let authority = Authority::new("one");
    let (certificate, _) = authority.vouch(&["127.0.0.1"], false);
    let (_, other) = authority.vouch(&["127.0.0.1"], false);
    for (certificate, key) in
        [(certificate.clone(), other), (certificate, Secret::new("s3cret-canary")), (String::new(), Secret::new("x"))]
    {
        let folder = tempfile::tempdir().unwrap();
        let mut config = crate::server::config(&folder);
        config.tls = Some(attune_scheduler::Tls { certificate, key, client_ca: None });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ended = attune_scheduler::serve(config, listener, std::future::pending()).await.unwrap_err().to_string();
        assert!(ended.starts_with("no encrypted connection can be made with this certificate and key: "), "{ended}");
        assert!(!ended.contains("canary"), "{ended}");
    }
}
