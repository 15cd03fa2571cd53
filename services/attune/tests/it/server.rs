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

#[test]
fn a_pool_of_workers_is_refused_with_all_its_faults_before_anything_is_served() {
    let place = Place::new();
    let scheduler =
        ["scheduler", "--listen", "127.0.0.1:0", "--database", "a.db", "--artifacts", "artifacts", "--auth", "tokens"];
    place.write(
        "pool.yaml",
        "{name: gpu, min: 3, max: 2, slurm: {memory: 4G, work_dir: scratch, options: [--array=1-9]}}",
    );
    let ran = place.run(&[&scheduler[..], &["--provider", "pool.yaml"]].concat());
    insta::assert_snapshot!(ran.all(), @r#"
    exit status 2
    --- stdout
    --- stderr
    error: pool.yaml has 5 faults
      `min` is 3; expected no more than `max`, 2
      `server` is missing; expected the scheduler's URL, as workers reach it
      `token_file` is missing; expected the file of a worker's token, for callers are asked who they are
      `slurm.work_dir` is "scratch"; expected a path from the root, for workers start elsewhere
      `slurm.options[0]` is "--array=1-9", which Attune sets itself
    "#);
    place.write("pool.yaml", "{name: gpu, max: 2, token_file: /t, processes: {work_dir: /w}}");
    let ran = place.run(&[&scheduler[..], &["--provider", "pool.yaml", "--provider", "pool.yaml"]].concat());
    assert_eq!(ran.status, 2, "{}", ran.all());
    assert!(ran.stderr.contains("error: pool.yaml: another pool is named gpu already"), "{}", ran.stderr);
    assert!(!place.path().join("a.db").try_exists().unwrap());
}
