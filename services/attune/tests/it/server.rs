//! Commands that need a server, where there is none.

use std::net::TcpListener;

use crate::support::Place;

/// An address at which nobody listens: it was free a moment ago.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[test]
fn a_server_that_does_not_answer_is_named_with_what_to_do() {
    let place = Place::with_demo();
    for command in [
        &["jobs", "list"][..],
        &["artifacts", "list"],
        &["submit", "text.yaml"],
        &["generate", "--base", "demo-base:latest", "--prompt", "Hi"],
    ] {
        let server = nobody();
        let ran = place.run(&[command, &["--server", &server]].concat());
        assert_eq!((ran.status, ran.stdout.as_str()), (1, ""), "{command:?}: {}", ran.all());
        assert!(ran.stderr.contains(&format!("error: no server answers at {server}: ")), "{}", ran.stderr);
        assert!(ran.stderr.contains("hint: ") && ran.stderr.contains("attune up"), "{}", ran.stderr);
    }
}

#[test]
fn an_address_that_cannot_be_one_is_wrong_usage() {
    let ran = Place::new().run(&["jobs", "list", "--server", "localhost"]);
    insta::assert_snapshot!(ran.all(), @r#"
    exit status 2
    --- stdout
    --- stderr
    error: server "localhost" is not a URL such as http://127.0.0.1:7070
    "#);
}

#[test]
fn a_job_with_faults_is_refused_before_any_server_is_asked() {
    let place = Place::with_demo();
    let ran = place.run(&["submit", "text.yaml", "--set", "tune.steps=0", "--server", &nobody()]);
    insta::assert_snapshot!(ran.all(), @r"
    exit status 2
    --- stdout
    --- stderr
    error: text.yaml has 1 fault
      `tune.steps` is 0; expected 1 or more
    ");
}

#[test]
fn a_worker_without_devices_is_wrong_usage() {
    let place = Place::new();
    for arguments in [&["up", "--data-dir", "data"] as &[&str], &["worker", "--work-dir", "work"]] {
        let ran = place.run(&[arguments, &["--devices", "0"]].concat());
        assert_eq!((ran.status, ran.stdout.as_str()), (2, ""), "{}", ran.all());
        assert!(ran.stderr.contains("'--devices <N>': 0 is not in 1.."), "{}", ran.stderr);
    }
}

#[test]
fn an_address_for_others_is_refused_unless_callers_are_asked_who_they_are() {
    let place = Place::new();
    let refused = |arguments: &[&str]| {
        let ran = place.run(arguments);
        assert_eq!((ran.status, ran.stdout.as_str()), (2, ""), "{}", ran.all());
        ran.stderr
    };
    let said = refused(&["up", "--data-dir", "data", "--listen", "0.0.0.0:0"]);
    assert!(said.contains("0.0.0.0:0 can be reached from other machines"), "{said}");
    assert!(said.contains("--auth tokens") && said.contains("--allow-unauthenticated-network"), "{said}");
    let scheduler = ["scheduler", "--database", "attune.db", "--artifacts", "artifacts"];
    let said = refused(&[&scheduler[..], &["--listen", "[::]:0"]].concat());
    assert!(said.contains("--auth tokens"), "{said}");
    // Half of what encryption needs.
    let said = refused(&[&scheduler[..], &["--tls-cert", "cert.pem"]].concat());
    assert!(said.contains("--tls-key"), "{said}");
    let said = refused(&[&scheduler[..], &["--tls-cert", "cert.pem", "--tls-key", "key.pem"]].concat());
    assert!(said.contains("cert.pem"), "{said}");
}
