//! The process that trains: started in a process group of its own, spoken to in lines, killed as a group.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use attune_proto::secret;
use futures::future::OptionFuture;
use nix::unistd::Pid;
use serde::Serialize;
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child as Process, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::time::{Instant, sleep_until};

use crate::log::{Lines, Pace, Taken};
use crate::strays::{self, Family};

/// Lines of the log that a failure carries.
const LOG_LINES_MAX: usize = 50;
/// Longest line of the log that is kept.
const LOG_LINE_BYTES_MAX: usize = 2000;
/// Longest message of a process: it holds a few names for each file or fault that it tells of.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Longest time for which a pipe of a process that has ended is read: somebody else may hold it open.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// How the process is started.
#[derive(Debug, Clone)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Variables beside those of the agent.
    pub variables: Vec<(OsString, OsString)>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// By itself.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, Some(signal)) => Self::Signal(signal),
            (None, None) => Self::Code(-1),
        }
    }
}

/// Something that the process did.
#[derive(Debug)]
pub(crate) enum Heard {
    /// A line on its standard output.
    Line(String),
    /// A line on its standard output that is longer than any message.
    TooLong,
    /// A line in its log.
    Log(String),
    /// So many lines of its log are passed on to nobody: there are too many.
    Dropped(u64),
    /// It ended, and nothing of what it wrote is left.
    Exited(Exit),
}

/// How many threads candle has for single operations. Its own wait by spinning, in the way of those that compute; graphs of
/// components go side by side anyhow.
const CANDLE_THREADS: (&str, &str) = ("CANDLE_NUM_THREADS", "1");

/// The most that a process can be preferred by when the kernel looks for one to kill.
const FIRST_TO_GO: &str = "1000";

/// A running process.
#[derive(Debug)]
pub(crate) struct Child {
    process: Process,
    id: Option<Pid>,
    /// All that it starts, itself included, until nothing of that is left.
    family: Option<Family>,
    input: ChildStdin,
    lines: Lines<ChildStdout>,
    errors: Lines<ChildStderr>,
    log: VecDeque<String>,
    pace: Pace,
    /// How it ended, and until when what it wrote is read.
    exit: Option<(Exit, Instant)>,
}

impl Child {
    /// Starts `program` in `folder`.
    pub(crate) fn start(program: &Program, folder: &Path) -> std::io::Result<Self> {
        let (name, one) = CANDLE_THREADS;
        let mut process = Command::new(&program.path);
        // A process that trains speaks to nobody but its agent, and is told no secret.
        for name in secret::VARIABLES {
            process.env_remove(name);
        }
        let mut process = process
            .args(&program.arguments)
            .env(name, std::env::var_os(name).unwrap_or_else(|| one.into()))
            .envs(program.variables.iter().map(|(name, value)| (name, value)))
            .env(strays::MARK, folder)
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        if let Some(id) = process.id() {
            // Where memory runs out this one goes, and its agent lives to say so. A kernel without this chooses by itself.
            drop(std::fs::write(format!("/proc/{id}/oom_score_adj"), FIRST_TO_GO));
        }
        let id = process.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        let missing = || std::io::Error::other("the new process has no pipes");
        Ok(Self {
            family: Some(Family::new(folder, id)),
            id,
            input: process.stdin.take().ok_or_else(missing)?,
            lines: Lines::new(process.stdout.take().ok_or_else(missing)?, MESSAGE_BYTES_MAX),
            errors: Lines::new(process.stderr.take().ok_or_else(missing)?, LOG_LINE_BYTES_MAX),
            log: VecDeque::new(),
            pace: Pace::new(Instant::now()),
            exit: None,
            process,
        })
    }

    /// The process id.
    pub(crate) fn id(&self) -> u32 {
        self.id.map_or(0, |id| id.as_raw().unsigned_abs())
    }

    /// The largest resident memory that the process has had; 0 where nobody counts.
    pub(crate) fn peak_memory_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak.and_then(|kib| kib.trim().parse::<u64>().ok()).map_or(0, |kib| kib << 10)
    }

    /// Writes a message. A process that no longer reads is about to be found dead, so there is no error to report.
    pub(crate) async fn say<T: Serialize + Sync>(&mut self, message: &T) {
        let Ok(mut line) = serde_json::to_vec(message) else { return };
        line.push(b'\n');
        if let Err(error) = self.input.write_all(&line).await {
            tracing::debug!(%error, "the training process does not read");
        }
    }

    /// What the process does next. Can be cancelled.
    pub(crate) async fn hear(&mut self) -> Heard {
        loop {
            let is_over = self.errors.is_over() && self.lines.is_over();
            if let Some((exit, _)) = self.exit.filter(|_| is_over) {
                return match self.pace.take_dropped() {
                    Some(n_dropped) => Heard::Dropped(n_dropped),
                    None => Heard::Exited(exit),
                };
            }
            let silent: OptionFuture<_> = self.exit.map(|(_, until)| sleep_until(until)).into();
            // By chance where both are there: a flood of one does not keep the other from being heard.
            tokio::select! {
                line = self.errors.next(), if !self.errors.is_over() => {
                    let Some(line) = line else { continue };
                    let mut text = line.text;
                    if line.cut > 0 {
                        text.push_str(&format!(" … and {} bytes", line.cut));
                    }
                    if self.log.len() == LOG_LINES_MAX {
                        self.log.pop_front();
                    }
                    self.log.push_back(text.clone());
                    if self.pace.take(Instant::now()) == Taken::Passed {
                        return Heard::Log(text);
                    }
                }
                n_dropped = self.pace.dropped() => return Heard::Dropped(n_dropped),
                line = self.lines.next(), if !self.lines.is_over() => match line {
                    Some(line) if line.cut > 0 => return Heard::TooLong,
                    Some(line) => return Heard::Line(line.text),
                    None => {}
                },
                status = self.process.wait(), if self.exit.is_none() => {
                    self.exit = Some((status.map_or(Exit::Code(-1), Exit::from), Instant::now() + LAST_WORDS));
                    // What it has left behind would hold its pipes open.
                    self.kill();
                }
                Some(()) = silent => {
                    self.errors.close();
                    self.lines.close();
                }
            }
        }
    }

    /// Kills the process and everything that it started.
    pub(crate) fn kill(&mut self) {
        self.family.iter_mut().for_each(Family::kill);
    }

    /// Kills what is left of it, and waits until nothing is.
    pub(crate) async fn clear(&mut self) {
        if let Some(family) = self.family.take() {
            family.end().await;
        }
    }

    /// The last lines of its log.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.iter().cloned().collect()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // After the process was waited for, its number may belong to somebody else.
        if self.process.id().is_some() {
            self.kill();
        }
    }
}

/// How many processes of this process's control group were killed because memory ran out; 0 where nobody counts.
pub(crate) fn memory_kills() -> u64 {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    counted_kills(&groups, Path::new("/sys/fs/cgroup"))
}

/// The same of the groups of `/proc/PID/cgroup`, which lie below `root`: the second version of control groups counts in one file, the
/// first in another below a folder for memory.
fn counted_kills(groups: &str, root: &Path) -> u64 {
    let files = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?.trim_start_matches('/'));
        let of_memory = controllers.split(',').any(|name| name == "memory");
        match (controllers.is_empty(), of_memory) {
            (true, _) => Some(root.join(path).join("memory.events")),
            (_, true) => Some(root.join("memory").join(path).join("memory.oom_control")),
            _ => None,
        }
    });
    let count = |file: PathBuf| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse::<u64>().ok())
    };
    files.filter_map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Program {
        Program { path: "/bin/sh".into(), arguments: vec!["-c".into(), script.into()], variables: Vec::new() }
    }

    async fn all(child: &mut Child) -> (Vec<String>, Exit) {
        let mut lines = Vec::new();
        loop {
            match child.hear().await {
                Heard::Line(line) => lines.push(line),
                Heard::Log(_) | Heard::Dropped(_) | Heard::TooLong => {}
                Heard::Exited(exit) => return (lines, exit),
            }
        }
    }

    #[tokio::test]
    async fn a_process_is_heard_to_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let script = "read line; echo \"got $line\"; for i in $(seq 60); do echo \"log $i\" >&2; done; exit 7";
        let mut child = Child::start(&shell(script), folder.path()).unwrap();
        child.say(&"hello").await;
        assert_eq!(all(&mut child).await, (vec!["got \"hello\"".to_owned()], Exit::Code(7)));
        assert_eq!(child.log().len(), LOG_LINES_MAX);
        assert_eq!(child.log().last().unwrap(), "log 60");
    }

    #[test]
    fn kills_for_want_of_memory_are_counted_by_either_version_of_control_groups() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("a/b/memory.events", "low 0\nmax 7\noom 3\noom_kill 2\n");
        write("memory/c/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n");
        for (groups, expected) in [("0::/a/b", 2), ("8:pids:/c\n4:memory:/c\n0::/", 5), ("0::/nowhere\n3:cpuset:/c", 0)]
        {
            assert_eq!(counted_kills(groups, root.path()), expected, "{groups}");
        }
    }

    #[tokio::test]
    async fn a_signal_is_told_from_an_exit() {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Child::start(&shell("kill -SEGV $$"), folder.path()).unwrap();
        assert_eq!(all(&mut child).await.1, Exit::Signal(11));
    }

    #[tokio::test]
    async fn killing_reaches_what_the_process_started() {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Child::start(&shell("sleep 600 & echo $!; wait"), folder.path()).unwrap();
        let Heard::Line(grandchild) = child.hear().await else { panic!("no line") };
        assert!(child.peak_memory_bytes() > 0);
        child.kill();
        assert_eq!(all(&mut child).await.1, Exit::Signal(9));
        let grandchild = Pid::from_raw(grandchild.parse().unwrap());
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(5);
        while nix::sys::signal::kill(grandchild, None).is_ok() {
            // A killed orphan stays as a zombie where nobody reaps; that is dead enough.
            let stat = std::fs::read_to_string(format!("/proc/{grandchild}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z ") {
                break;
            }
            assert!(tokio::time::Instant::now() < deadline, "the grandchild survives: {stat}");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
}
