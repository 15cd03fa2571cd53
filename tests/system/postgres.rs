//! A PostgreSQL server that a test may kill.

use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use tokio::time::Instant;

use crate::support::{PATIENCE, Process};

/// The user as whom it runs where tests run as root, which it refuses to be: nobody.
const NOBODY: u32 = 65_534;

/// A server with data of its own, that listens on a socket in its folder.
pub(crate) struct Postgres {
    folder: tempfile::TempDir,
    programs: PathBuf,
    server: Option<Process>,
}

impl Postgres {
    /// Starts one; none, with the reason, where its programs are not installed.
    pub(crate) async fn start() -> Option<Self> {
        let Some(programs) = programs() else {
            eprintln!("skipped: no PostgreSQL here (Debian: postgresql), and ATTUNE_POSTGRES_BIN names none");
            return None;
        };
        // Short: paths of sockets have at most 107 bytes.
        let folder = tempfile::Builder::new().prefix("pg").tempdir().unwrap();
        if is_root() {
            std::os::unix::fs::chown(folder.path(), Some(NOBODY), None).unwrap();
        }
        let mut postgres = Self { folder, programs, server: None };
        let made = postgres
            .program("initdb")
            .args(["-U", "attune", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C.UTF-8", "-D"])
            .arg(postgres.folder.path().join("data"))
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        postgres.start_again().await;
        Some(postgres)
    }

    /// The URL of its database.
    pub(crate) fn url(&self) -> String {
        format!("postgres://attune@localhost/postgres?host={}", self.folder.path().display())
    }

    /// `kill -9` of the server and its processes, as a power cut would end them; what was committed is on disk.
    pub(crate) async fn kill(&mut self) {
        let server = self.server.take().unwrap();
        let own = server.children();
        server.kill();
        // Whoever lives on for a moment keeps the memory that they share, and with it the next server out.
        let deadline = Instant::now() + PATIENCE;
        while own.iter().any(|id| is_alive(*id)) {
            assert!(Instant::now() < deadline, "its processes live on");
            for id in &own {
                // It may have ended meanwhile.
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*id), nix::sys::signal::Signal::SIGKILL);
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    /// Starts the server on the data that it left, and waits until it answers.
    pub(crate) async fn start_again(&mut self) {
        let path = |name: &str| self.folder.path().join(name);
        let mut command = self.program("postgres");
        command.arg("-D").arg(path("data")).arg("-k").arg(self.folder.path()).args(["-c", "listen_addresses="]);
        self.server = Some(Process::start(&mut command, &path("server.log")));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let asked = self.program("pg_isready").arg("-h").arg(self.folder.path()).output().unwrap();
            if asked.status.success() {
                return;
            }
            let log = || std::fs::read_to_string(path("server.log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "it does not answer: {}", log());
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.programs.join(name));
        command.current_dir(self.folder.path()).env("HOME", self.folder.path());
        if is_root() {
            command.uid(NOBODY);
        }
        command
    }
}

/// Whether a process is there and has not ended.
fn is_alive(id: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().unwrap_or_default().split_whitespace().next().map(str::to_owned);
    state.is_some_and(|state| state != "Z" && state != "X")
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// The folder of its programs: named, in PATH, or where Debian has them, the newest first.
fn programs() -> Option<PathBuf> {
    let named = std::env::var_os("ATTUNE_POSTGRES_BIN").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut of_debian: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|versions| versions.filter_map(|version| Some(version.ok()?.path().join("bin"))).collect())
        .unwrap_or_default();
    of_debian.sort();
    let all = named.into_iter().chain(std::env::split_paths(&path)).chain(of_debian.into_iter().rev());
    let has = |folder: &Path| ["initdb", "postgres", "pg_isready"].iter().all(|name| folder.join(name).is_file());
    all.into_iter().find(|folder| has(folder))
}
