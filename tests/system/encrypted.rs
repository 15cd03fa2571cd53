//! A scheduler that answers encrypted connections alone: real processes, with certificates made here.

use std::net::TcpListener;
use std::path::Path;
use std::process::Output;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::time::{Duration, Instant};

use crate::support::{PATIENCE, Process, attune};

/// Writes an authority's certificate, and one with its key for each name that it vouches for.
pub(crate) fn vouch(folder: &Path, authority: &str, names: &[(&str, &str)]) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, authority);
    let key = KeyPair::generate().unwrap();
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
    write(&format!("{authority}.ca.pem"), params.self_signed(&key).unwrap().pem());
    let issuer = Issuer::new(params, key);
    for (file, name) in names {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![(*name).to_owned()]).unwrap();
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
