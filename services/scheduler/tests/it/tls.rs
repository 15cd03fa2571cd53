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

/// Files of certificates, which may be renewed.
struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new((certificate, key): &(String, Secret), client_ca: Option<&Authority>) -> (Self, attune_scheduler::Tls) {
        let files = Self { folder: tempfile::tempdir().unwrap() };
        files.write("cert.pem", certificate);
        files.write("key.pem", key.expose());
        if let Some(authority) = client_ca {
            files.write("ca.pem", &authority.pem);
        }
        let path = |name: &str| files.folder.path().join(name);
        let client_ca = client_ca.map(|_| path("ca.pem"));
        let tls = attune_scheduler::Tls { certificate: path("cert.pem"), key: path("key.pem"), client_ca };
        (files, tls)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.folder.path().join(name), text).unwrap();
    }
}

/// A server with this certificate.
fn server(pair: &(String, Secret), client_ca: Option<&Authority>) -> Server {
    let (files, tls) = Files::new(pair, client_ca);
    let server = server_of(tls);
    // It reads them while it starts.
    server.admin_secret();
    drop(files);
    server
}

fn server_of(tls: attune_scheduler::Tls) -> Server {
    Server::guarded(|config| {
        config.tls = Some(tls);
        config.timings.greeting_limit = Duration::from_millis(400);
        config.timings.certificates = Duration::from_millis(50);
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
    Tls { ca: Some(authority.pem.clone()), ..Tls::default() }
}

#[tokio::test]
async fn a_server_is_believed_if_the_right_authority_vouches_for_its_name_now() {
    let (authority, other) = (Authority::new("one"), Authority::new("two"));
    let right = server(&authority.vouch(&["127.0.0.1"], false), None);
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
    let expired = server(&authority.vouch(&["127.0.0.1"], true), None);
    let late = ask(&expired, "https", secret.clone(), trusting(&authority)).await.unwrap_err();
    assert!(late.contains("certificate expired"), "{late}");
    let misnamed = server(&authority.vouch(&["scheduler.example"], false), None);
    let wrong = ask(&misnamed, "https", secret.clone(), trusting(&authority)).await.unwrap_err();
    assert!(wrong.contains("certificate not valid for name \"127.0.0.1\""), "{wrong}");
}

#[tokio::test]
async fn nobody_speaks_in_the_clear_by_mistake() {
    let authority = Authority::new("one");
    let encrypted = server(&authority.vouch(&["127.0.0.1"], false), None);
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
    let mutual = server(&servers.vouch(&["127.0.0.1"], false), Some(&clients));
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
    let server = server(&authority.vouch(&["127.0.0.1"], false), None);
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
        let (_files, tls) = Files::new(&(certificate, key), None);
        config.tls = Some(tls);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ended = attune_scheduler::serve(config, listener, std::future::pending()).await.unwrap_err().to_string();
        assert!(ended.starts_with("no encrypted connection can be made with this certificate and key: "), "{ended}");
        assert!(!ended.contains("canary"), "{ended}");
    }
}

/// Asks until the answer is as wanted.
async fn until(server: &Server, tls: Tls, fits: impl Fn(&Result<v1::GetCallerResponse, String>) -> bool) {
    let secret = server.admin_secret();
    let deadline = tokio::time::Instant::now() + LIMIT;
    loop {
        let answer = ask(server, "https", Some(secret.clone()), tls.clone()).await;
        if fits(&answer) {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "{answer:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_renewed_certificate_is_for_new_connections_and_a_bad_one_for_none() {
    let (old, new) = (Authority::new("one"), Authority::new("two"));
    let (files, tls) = Files::new(&old.vouch(&["127.0.0.1"], false), None);
    let server = server_of(tls);
    let secret = server.admin_secret();
    let url = server.url().replace("http://", "https://");
    until(&server, trusting(&old), Result::is_ok).await;
    let options = Options { token: Some(secret), tls: trusting(&old), retries: 0, ..Options::default() };
    let standing = Client::connect(&url, options).await.unwrap();
    let calls = async || standing.tokens().get_caller(v1::GetCallerRequest::default()).await;
    calls().await.unwrap();

    // Half a file, a key that belongs to another certificate, and none: the old pair serves on.
    let (certificate, key) = new.vouch(&["127.0.0.1"], false);
    for (name, text) in
        [("cert.pem", &certificate[..certificate.len() / 2]), ("cert.pem", certificate.as_str()), ("key.pem", "no key")]
    {
        files.write(name, text);
        tokio::time::sleep(Duration::from_millis(300)).await;
        until(&server, trusting(&old), Result::is_ok).await;
    }
    std::fs::remove_file(files.folder.path().join("key.pem")).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    until(&server, trusting(&old), Result::is_ok).await;

    files.write("key.pem", key.expose());
    until(&server, trusting(&new), Result::is_ok).await;
    until(&server, trusting(&old), |answer| answer.as_ref().is_err_and(|why| why.contains("UnknownIssuer"))).await;
    // What stood before stands.
    calls().await.unwrap();
}

#[tokio::test]
async fn authorities_of_clients_are_renewed() {
    let (servers, old, new) = (Authority::new("one"), Authority::new("two"), Authority::new("three"));
    let (files, tls) = Files::new(&servers.vouch(&["127.0.0.1"], false), Some(&old));
    let server = server_of(tls);
    let with =
        |authority: &Authority| Tls { identity: Some(authority.vouch(&["worker-1"], false)), ..trusting(&servers) };
    let (of_old, of_new) = (with(&old), with(&new));
    until(&server, of_old.clone(), Result::is_ok).await;
    until(&server, of_new.clone(), Result::is_err).await;
    files.write("ca.pem", "nobody");
    tokio::time::sleep(Duration::from_millis(300)).await;
    until(&server, of_old.clone(), Result::is_ok).await;
    files.write("ca.pem", &new.pem);
    until(&server, of_new, Result::is_ok).await;
    until(&server, of_old, Result::is_err).await;
}
