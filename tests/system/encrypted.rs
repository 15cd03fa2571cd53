//! A scheduler that answers encrypted connections alone: real processes, with certificates made here.

use std::net::TcpListener;
use std::path::Path;
use std::process::Output;
use std::time::SystemTime;

use attune_proto::client::{Options, Tls};
use attune_proto::{Client, v1};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::time::{Duration, Instant};

use crate::support::{PATIENCE, Process, attune};

/// Writes an authority's certificate, and one with its key for each name that it vouches for.
pub(crate) fn vouch(folder: &Path, authority: &str, names: &[(&str, &str)]) {
    vouch_until(folder, authority, names, None);
}

/// The same for certificates that end at a moment.
fn vouch_until(folder: &Path, authority: &str, names: &[(&str, &str)], end: Option<SystemTime>) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, authority);
    let key = KeyPair::generate().unwrap();
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
    write(&format!("{authority}.ca.pem"), params.self_signed(&key).unwrap().pem());
    let issuer = Issuer::new(params, key);
    for (file, name) in names {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![(*name).to_owned()]).unwrap();
        if let Some(end) = end {
            params.not_after = end.into();
        }
        write(&format!("{file}.cert.pem"), params.signed_by(&key, &issuer).unwrap().pem());
        write(&format!("{file}.key.pem"), key.serialize_pem());
    }
}

#[tokio::test]
async fn only_the_encrypted_speak_and_everybody_is_told_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    vouch(folder.path(), "servers", &[("server", "127.0.0.1")]);
    vouch(folder.path(), "clients", &[("client", "anna")]);
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut command = attune();
    command.args(["scheduler", "--auth", "tokens", "--listen", &address.to_string()]);
    command.arg("--database").arg(path("attune.db")).arg("--artifacts").arg(path("artifacts"));
    command.arg("--tls-cert").arg(path("server.cert.pem")).arg("--tls-key").arg(path("server.key.pem"));
    command.arg("--tls-client-ca").arg(path("clients.ca.pem"));
    let _scheduler = Process::start(&mut command, &path("scheduler.log"));

    let whoami = |server: String, options: &[&str]| -> Output {
        let mut command = attune();
        command.args(["tokens", "whoami", "--server", &server]).args(options).current_dir(folder.path());
        command.env("ATTUNE_TOKEN_FILE", path("admin.token")).output().unwrap()
    };
    let (encrypted, clear) = (format!("https://{address}"), format!("http://{address}"));
    let own = ["--ca", "servers.ca.pem", "--cert", "client.cert.pem", "--key", "client.key.pem"];
    let deadline = Instant::now() + PATIENCE;
    let said = loop {
        let output = whoami(encrypted.clone(), &own);
        if output.status.success() {
            break String::from_utf8(output.stdout).unwrap();
        }
        let log = std::fs::read_to_string(path("scheduler.log")).unwrap();
        assert!(Instant::now() < deadline, "{output:?}\n{log}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(said, "admin: admin of all projects\n");

    let certificate = ["--cert", "client.cert.pem", "--key", "client.key.pem"];
    for (server, options, words) in [
        (&clear, &[][..], "is named by https://"),
        (&encrypted, &["--ca", "servers.ca.pem"], "may ask for a certificate"),
        (&encrypted, &["--ca", "clients.ca.pem"], "invalid peer certificate: UnknownIssuer"),
        (&encrypted, &certificate, "invalid peer certificate"),
        (&encrypted, &["--ca", "servers.ca.pem", "--cert", "client.cert.pem"], "--key"),
        (&encrypted, &["--ca", "server.key.pem"], "server.key.pem holds no certificate"),
        (&clear, &own, "expected a URL that begins with https://"),
    ] {
        let output = whoami(server.clone(), options);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{server} {options:?}");
        assert!(said.contains(words), "{server} {options:?}: {said}");
    }
}

/// A worker and a client whose certificates are renewed, by another authority, while they run; and one that ends soon, of which it
/// is told before.
#[tokio::test]
async fn renewed_certificates_are_used_by_who_runs_already_and_ends_are_told_before() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    #[expect(clippy::disallowed_methods, reason = "certificates end on a date")]
    let soon = SystemTime::now() + Duration::from_secs(3 * 24 * 3600 + 1800);
    vouch(folder.path(), "servers", &[("server", "127.0.0.1")]);
    vouch_until(folder.path(), "clients", &[("worker", "w")], Some(soon));
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let scheduler = || {
        let mut command = attune();
        command.args(["scheduler", "--listen", &address.to_string(), "--database"]).arg(path("attune.db"));
        command.arg("--artifacts").arg(path("artifacts"));
        command.arg("--tls-cert").arg(path("server.cert.pem")).arg("--tls-key").arg(path("server.key.pem"));
        command.arg("--tls-client-ca").arg(path("clients.ca.pem"));
        Process::start(&mut command, &path("scheduler.log"))
    };
    let running = scheduler();
    let mut command = attune();
    command.args(["worker", "--server", &format!("https://{address}"), "--name", "w", "--work-dir"]).arg(path("work"));
    command.arg("--ca").arg(path("servers.ca.pem"));
    command.arg("--cert").arg(path("worker.cert.pem")).arg("--key").arg(path("worker.key.pem"));
    let _worker = Process::start(&mut command, &path("worker.log"));
    let log = |name: &str| std::fs::read_to_string(path(name)).unwrap_or_default();
    let said = async |name: &str, words: &str, times: usize| {
        let deadline = Instant::now() + PATIENCE;
        while log(name).matches(words).count() < times {
            assert!(Instant::now() < deadline, "{words} in {name}: {}\n{}", log("scheduler.log"), log("worker.log"));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    said("worker.log", "registered with the scheduler", 1).await;
    said("worker.log", "ends in 3 days", 1).await;

    // The whole of what was before is worth nothing any more.
    vouch(folder.path(), "clients", &[("worker", "w")]);
    said("worker.log", "new connections use renewed certificates", 1).await;
    running.kill();
    let again = scheduler();
    said("worker.log", "registered with the scheduler", 2).await;

    // A server's own end is told as well. It reads its files again while it runs.
    vouch_until(folder.path(), "servers", &[("server", "127.0.0.1")], Some(soon));
    said("scheduler.log", "ends in 3 days", 1).await;
    // So is its authority by the worker, which comes back to a server that only the new one vouches for.
    said("worker.log", "new connections use renewed certificates", 2).await;
    again.kill();
    let _last = scheduler();
    said("worker.log", "registered with the scheduler", 3).await;
    let options = Options {
        tls: Tls {
            ca: Some(log("servers.ca.pem")),
            identity: Some((log("worker.cert.pem"), attune_proto::Secret::new(log("worker.key.pem")))),
            ..Tls::default()
        },
        ..Options::default()
    };
    let client = Client::connect(&format!("https://{address}"), options).await.unwrap();
    let listed = client.fleet().list_workers(v1::ListWorkersRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.workers.len(), 1, "{listed:?}");
}
