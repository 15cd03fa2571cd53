//! A scheduler that asks who calls, a worker and people with tokens: real processes, and secrets that are found nowhere.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Output;

use tokio::time::{Duration, Instant};

use crate::support::{PATIENCE, Process, SMALL, attune, world};

/// A scheduler with tokens.
struct Guarded {
    folder: tempfile::TempDir,
    url: String,
    scheduler: Process,
}

impl Guarded {
    /// A scheduler alone.
    async fn start() -> Self {
        Self::start_as(|command, folder| {
            command.arg("scheduler").arg("--database").arg(folder.join("attune.db"));
            command.arg("--artifacts").arg(folder.join("artifacts"));
        })
        .await
    }

    async fn start_as(program: impl FnOnce(&mut std::process::Command, &Path)) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), program).await
    }

    async fn start_in(folder: tempfile::TempDir, program: impl FnOnce(&mut std::process::Command, &Path)) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let path = |name: &str| folder.path().join(name);
        let mut command = attune();
        program(&mut command, folder.path());
        command.args(["--auth", "tokens", "--listen", &address.to_string()]);
        let scheduler = Process::start(command.env("ATTUNE_LOG", "debug"), &path("scheduler.log"));
        let guarded = Self { url: format!("http://{address}"), scheduler, folder };
        let deadline = Instant::now() + PATIENCE;
        while !guarded.path("admin.token").try_exists().unwrap() || !guarded.run("admin", &["tokens", "whoami"]).0 {
            assert!(Instant::now() < deadline, "{}", guarded.log("scheduler.log"));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        guarded
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Runs a command as somebody whose token lies in a file: whether it succeeded, and all that it said.
    fn run(&self, who: &str, arguments: &[&str]) -> (bool, Output) {
        let mut command = attune();
        command.args(arguments).env("ATTUNE_SERVER", &self.url).current_dir(self.folder.path());
        command.env("ATTUNE_TOKEN_FILE", self.path(&format!("{who}.token")));
        let output = command.output().unwrap();
        (output.status.success(), output)
    }

    /// Gives somebody a token, in a file.
    fn token(&self, who: &str, role: &[&str]) {
        let arguments = [&["tokens", "create", "--name", who, "--role"], role].concat();
        let (is_well, output) = self.run("admin", &arguments);
        assert!(is_well, "{output:?}");
        std::fs::write(self.path(&format!("{who}.token")), output.stdout).unwrap();
    }

    fn secret(&self, who: &str) -> String {
        std::fs::read_to_string(self.path(&format!("{who}.token"))).unwrap().trim().to_owned()
    }
}

/// Whether some file below a folder holds a text, but for those that are there to hold it.
fn holders(folder: &Path, text: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            holders(&path, text, found);
        } else if path.extension().is_none_or(|ending| ending != "token") {
            // A file may go while it is looked for.
            let bytes = std::fs::read(&path).unwrap_or_default();
            if bytes.windows(text.len()).any(|some| some == text.as_bytes()) {
                found.push(path);
            }
        }
    }
}

#[tokio::test]
async fn a_job_runs_among_strangers_and_no_secret_is_found_anywhere() {
    let guarded = Guarded::start().await;
    world(&guarded.path("world"));
    guarded.token("gpu", &["worker", "--all-projects"]);
    guarded.token("anna", &["submitter", "--project", "demos", "--expires-days", "1"]);
    guarded.token("bert", &["viewer", "--project", "demos"]);
    guarded.token("carl", &["submitter", "--project", "other"]);

    let mut worker = attune();
    worker.args(["worker", "--server", &guarded.url, "--name", "one"]).arg("--work-dir").arg(guarded.path("worker"));
    worker.env("ATTUNE_TOKEN", guarded.secret("gpu")).env("ATTUNE_LOG", "debug");
    let worker = Process::start(&mut worker, &guarded.path("worker.log"));

    // The project is that of the token.
    let set: Vec<&str> = SMALL.into_iter().chain(["tune.steps=60"]).flat_map(|set| ["--set", set]).collect();
    let (is_well, output) = guarded.run("anna", &[&["submit", "world/text.yaml"], &set[..]].concat());
    assert!(is_well, "{output:?}\n{}", guarded.log("scheduler.log"));
    let id = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    // A process that trains is not told what proves who its worker is (A37).
    let deadline = Instant::now() + PATIENCE;
    let environment = loop {
        let told = worker.children().first().and_then(|child| std::fs::read(format!("/proc/{child}/environ")).ok());
        match told.filter(|told| !told.is_empty()) {
            // Between its birth and its own program it still has its parent's.
            Some(told) if told.windows(6).any(|some| some == b"CANDLE") => break told,
            _ => assert!(Instant::now() < deadline, "no child: {}", guarded.log("worker.log")),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let environment = String::from_utf8_lossy(&environment).into_owned();
    assert!(!environment.contains("attune_") && !environment.contains("ATTUNE_TOKEN"), "{environment}");
    let (is_well, output) = guarded.run("anna", &["jobs", "watch", &id]);
    assert!(is_well, "{output:?}\n{}\n{}", guarded.log("scheduler.log"), guarded.log("worker.log"));

    let refusals = [
        ("bert", &["jobs", "cancel", &id][..], "is not allowed to a credential of role viewer"),
        ("anna", &["jobs", "list", "--project", "other"], "project \"other\" does not exist, or this credential"),
        ("carl", &["jobs", "get", &id], "does not exist in project \"other\""),
        ("anna", &["tokens", "list"], "is not allowed to a credential of role submitter"),
        ("gpu", &["jobs", "list"], "is not allowed to a credential of role worker"),
        ("anna", &["audit"], "is not allowed"),
    ];
    for (who, arguments, words) in refusals {
        let (is_well, output) = guarded.run(who, arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!is_well && output.status.code() == Some(1) && said.contains(words), "{who} {arguments:?}: {said}");
    }
    assert!(guarded.run("bert", &["jobs", "get", &id]).0);
    let stranger = attune().args(["jobs", "list"]).env("ATTUNE_SERVER", &guarded.url).output().unwrap();
    let said = String::from_utf8_lossy(&stranger.stderr).into_owned();
    assert!(said.contains("no valid credential") && said.contains("--token-file"), "{said}");

    let (_, list) = guarded.run("admin", &["tokens", "list", "--json"]);
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    let of = |name: &str| list.as_array().unwrap().iter().find(|token| token["name"] == name).unwrap().clone();
    assert_eq!((&of("anna")["project"], &of("anna")["role"]), (&"demos".into(), &"submitter".into()));
    let bert = of("bert")["id"].as_str().unwrap().to_owned();
    assert!(guarded.run("admin", &["tokens", "revoke", &bert]).0);
    assert!(!guarded.run("bert", &["jobs", "list"]).0);
    let (_, audit) = guarded.run("admin", &["audit"]);
    let audit = String::from_utf8(audit.stdout).unwrap();
    for words in ["TokenService/RevokeToken", "JobService/CreateJob", "WorkerService/Connect", "PERMISSION_DENIED"] {
        assert!(audit.contains(words), "{words}: {audit}");
    }

    drop(worker);
    // A35: what proves somebody is in no log, row, event, artifact or answer.
    for who in ["admin", "gpu", "anna", "bert", "carl"] {
        let secret = guarded.secret(who);
        let tail = secret.rsplit('_').next().unwrap();
        assert_eq!(tail.len(), 52, "{who}");
        let mut found = Vec::new();
        holders(guarded.folder.path(), tail, &mut found);
        assert!(found.is_empty(), "the secret of {who} is in {found:?}");
        assert!(!audit.contains(tail) && !list.to_string().contains(tail) && !said.contains(tail));
    }
}

#[tokio::test]
async fn a_token_that_is_none_is_not_repeated() {
    for (name, value) in [("ATTUNE_TOKEN", "s3cret canary\u{7}"), ("ATTUNE_TOKEN", " ")] {
        let output = attune().args(["jobs", "list"]).env(name, value).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("the token is no token") && !said.contains("canary"), "{said}");
    }
    let output = attune().args(["--token", "s3cret canary", "jobs", "list"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && !said.contains("canary"), "{said}");
    let help = attune().args(["jobs", "list", "--help"]).env("ATTUNE_TOKEN", "s3cret-canary").output().unwrap();
    assert!(!String::from_utf8_lossy(&help.stdout).contains("canary"));
}

/// A worker goes on with the token that has been put into its file, as the same worker.
#[tokio::test]
async fn a_token_is_replaced_while_its_worker_runs() {
    let guarded = Guarded::start().await;
    world(&guarded.path("world"));
    guarded.token("gpu", &["worker", "--all-projects"]);
    let first = guarded.secret("gpu");
    let mut worker = attune();
    worker.args(["worker", "--server", &guarded.url]).arg("--work-dir").arg(guarded.path("worker"));
    worker.env("ATTUNE_TOKEN_FILE", guarded.path("gpu.token"));
    let _worker = Process::start(&mut worker, &guarded.path("worker.log"));
    let connections = || {
        let (_, audit) = guarded.run("admin", &["audit", "--json"]);
        let audit: serde_json::Value = serde_json::from_slice(&audit.stdout).unwrap();
        let all = audit.as_array().unwrap().iter().filter(|record| record["rpc"] == "WorkerService/Connect");
        all.map(|record| (record["target"].clone(), record["caller"].clone())).collect::<Vec<_>>()
    };
    let wait = async |count: usize| {
        let deadline = Instant::now() + PATIENCE;
        while connections().len() < count {
            assert!(Instant::now() < deadline, "{}", guarded.log("worker.log"));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    wait(1).await;
    guarded.token("gpu", &["worker", "--all-projects"]);
    let id = first.split('_').nth(1).unwrap();
    assert!(guarded.run("admin", &["tokens", "revoke", id]).0);
    wait(2).await;
    let found = connections();
    assert!(found[0].0 == found[1].0 && found[0].1 != found[1].1 && found[1].1 == id, "{found:?}");
    let set: Vec<&str> = SMALL.into_iter().chain(["tune.steps=2"]).flat_map(|set| ["--set", set]).collect();
    let (is_well, output) = guarded.run("admin", &[&["submit", "world/text.yaml", "--watch"], &set[..]].concat());
    assert!(is_well, "{output:?}\n{}", guarded.log("worker.log"));
}

/// `attune up` gives its own workers what they need, and asks everybody else.
#[tokio::test]
async fn one_machine_may_ask_who_calls_too() {
    let up = Guarded::start_as(|command, folder| {
        command.args(["up", "--data-dir"]).arg(folder);
    })
    .await;
    world(&up.path("world"));
    let set: Vec<&str> = SMALL.into_iter().chain(["tune.steps=2"]).flat_map(|set| ["--set", set]).collect();
    let (is_well, output) = up.run("admin", &[&["submit", "world/text.yaml", "--watch"], &set[..]].concat());
    assert!(is_well, "{output:?}\n{}", up.log("scheduler.log"));
    let stranger = attune().args(["jobs", "list"]).env("ATTUNE_SERVER", &up.url).output().unwrap();
    assert_eq!(stranger.status.code(), Some(1));
    // The admin's token is lost: another one is put into its place.
    let made = attune().args(["tokens", "generate"]).output().unwrap();
    let made = String::from_utf8(made.stdout).unwrap();
    assert!(made.starts_with("attune_") && made.trim().len() == 76, "{made}");
}

/// A scheduler that is killed between a change and its record has neither, and one that is killed after both has both.
#[tokio::test]
async fn what_is_killed_has_a_change_with_its_record_or_neither() {
    let start = async |folder, points: &str| {
        Guarded::start_in(folder, |command, folder| {
            command.arg("scheduler").arg("--database").arg(folder.join("attune.db"));
            command.arg("--artifacts").arg(folder.join("artifacts")).env("FAILPOINTS", points);
        })
        .await
    };
    let mut folder = tempfile::tempdir().unwrap();
    for (points, expected) in
        [("store::before_record=return(kill)", 0), ("scheduler::after_transaction=return(kill)", 1)]
    {
        let mut guarded = start(folder, points).await;
        let (is_well, output) = guarded.run("admin", &["projects", "set", "research", "--weight", "7"]);
        assert!(!is_well && guarded.scheduler.has_ended(), "{output:?}");
        folder = guarded.folder;
        let guarded = start(folder, "").await;
        let said = |arguments: &[&str]| {
            let (is_well, output) = guarded.run("admin", &[&["--json"], arguments].concat());
            assert!(is_well, "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        let (audit, projects) = (said(&["audit"]), said(&["projects", "list"]));
        assert_eq!(audit.matches("SetProjectPolicy").count(), expected, "{points}: {audit}");
        assert_eq!(projects.matches("research").count(), expected, "{points}: {projects}");
        folder = guarded.folder;
    }
}
