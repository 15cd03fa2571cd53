//! Nothing that a process started outlives it, wherever it went: not in another group or session, not behind a parent that
//! has ended.
//!
//! This process takes in orphans below it (`PR_SET_CHILD_SUBREAPER`), so that a process that forks twice ends up here and not
//! at the root. What belongs to a cohort is then what descends from its process, what carries its mark among its
//! variables, and what has become a child of this process in a session that is not this one's: whoever this process starts
//! stays in its own.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill as signal, killpg};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, getpid, getsid};
use tokio::time::{Instant, sleep};

/// The variable that a process of a cohort is known by; its value is the cohort's folder.
pub(crate) const MARK: &str = "ATTUNE_COHORT_FOLDER";

/// Looks at what is there before it is killed: who was found stands still, so that what forks comes to an end.
const LOOKS_MAX: usize = 100;
/// Longest wait for what was killed to be gone.
const PATIENCE: Duration = Duration::from_secs(5);
/// Wait between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Takes in orphans from now on.
pub(crate) fn adopt() {
    if let Err(error) = nix::sys::prctl::set_child_subreaper(true) {
        tracing::warn!(%error, "processes that leave their parents cannot be followed");
    }
}

/// What the system says of a process.
#[derive(Debug, Clone, Copy)]
struct Status {
    parent: i32,
    group: i32,
    session: i32,
    is_over: bool,
}

/// `/proc/ID/stat`; the name, which may hold anything, is in parentheses.
fn status(text: &str) -> Option<Status> {
    let mut rest = text.rsplit_once(')')?.1.split_whitespace();
    let is_over = matches!(rest.next()?, "Z" | "X");
    let mut number = || rest.next()?.parse().ok();
    Some(Status { parent: number()?, group: number()?, session: number()?, is_over })
}

/// All processes by number.
fn processes() -> BTreeMap<i32, Status> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    ids.filter_map(|id| Some((id, status(&std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?)?))).collect()
}

/// The folder by which a process is marked, if it is and this process may know.
fn mark(id: i32) -> Option<PathBuf> {
    let variables = std::fs::read(format!("/proc/{id}/environ")).ok()?;
    let own = |variable: &[u8]| {
        let value = variable.strip_prefix(MARK.as_bytes())?.strip_prefix(b"=")?;
        Some(PathBuf::from(std::ffi::OsStr::from_bytes(value)))
    };
    variables.split(|byte| *byte == 0).find_map(own)
}

/// What a cohort has started.
#[derive(Debug)]
pub(crate) struct Family {
    folder: PathBuf,
    /// Its process, which leads a group.
    root: Option<Pid>,
    /// Who was killed and may wait for somebody to ask for its end.
    killed: BTreeSet<i32>,
}

impl Family {
    /// What the process `root` starts for the cohort of a folder; without one, what others have left of all cohorts below it.
    pub(crate) fn new(folder: &Path, root: Option<Pid>) -> Self {
        Self { folder: folder.to_owned(), root, killed: BTreeSet::new() }
    }

    /// Who of all is of it and runs.
    fn of(&self, all: &BTreeMap<i32, Status>) -> BTreeSet<i32> {
        let (own, session) = whose();
        let root = self.root.map(Pid::as_raw);
        let is_known = |(id, of): (&i32, &Status)| {
            root.is_some_and(|root| root == *id || root == of.group)
                || (of.parent == own && of.session != session)
                || mark(*id).is_some_and(|mark| mark.starts_with(&self.folder))
        };
        let mut found: BTreeSet<i32> = all.iter().filter(|of| is_known(*of)).map(|(id, _)| *id).collect();
        loop {
            let is_new = |(id, of): &(&i32, &Status)| !found.contains(id) && found.contains(&of.parent);
            let more: Vec<i32> = all.iter().filter(is_new).map(|(id, _)| *id).collect();
            if more.is_empty() {
                break;
            }
            found.extend(more);
        }
        found.remove(&own);
        found.retain(|id| all.get(id).is_some_and(|of| !of.is_over));
        found
    }

    /// Kills all of it, without waiting for its end.
    pub(crate) fn kill(&mut self) {
        if let Some(group) = self.root {
            // All of it at once, in the middle of what it does; no such group: all of it has ended before.
            let _ = killpg(group, Signal::SIGKILL);
        }
        let mut stopped = BTreeSet::new();
        for _ in 0..LOOKS_MAX {
            let found = self.of(&processes());
            let new: Vec<i32> = found.difference(&stopped).copied().collect();
            if new.is_empty() {
                break;
            }
            for id in new {
                // It may have ended meanwhile.
                let _ = signal(Pid::from_raw(id), Signal::SIGSTOP);
                stopped.insert(id);
            }
        }
        for id in &stopped {
            let _ = signal(Pid::from_raw(*id), Signal::SIGKILL);
        }
        self.killed.extend(stopped);
    }

    /// Kills what is left of it, and waits until nothing is there. Somebody has asked for the end of its process, or nobody
    /// will.
    pub(crate) async fn end(mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.kill();
            let all = processes();
            let unasked = self.reap(&all);
            let left = self.of(&all);
            // Until a look finds nobody: one that ended while all were looked at may have come to this process since.
            if left.is_empty() && !unasked {
                return;
            }
            if Instant::now() >= deadline {
                if left.is_empty() {
                    return;
                }
                let folder = self.folder.display();
                return tracing::error!(%folder, ?left, "processes of an attempt cannot be killed");
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    /// Asks for the ends of those of it that this process has taken in: nobody else will. Whether there was anybody who has ended, taken
    /// in or not yet.
    fn reap(&self, all: &BTreeMap<i32, Status>) -> bool {
        let (own, session) = whose();
        let is_over = |(id, of): &(&i32, &Status)| {
            let is_of_it = self.killed.contains(id) || self.root.is_some_and(|root| root.as_raw() == of.group);
            of.is_over && (is_of_it || of.parent == own && of.session != session)
        };
        let over: Vec<(&i32, &Status)> = all.iter().filter(is_over).collect();
        for (id, _) in over.iter().filter(|(_, of)| of.parent == own) {
            if let Err(error) = waitpid(Pid::from_raw(**id), Some(WaitPidFlag::WNOHANG)) {
                tracing::debug!(%error, id, "an orphan cannot be waited for");
            }
        }
        !over.is_empty()
    }
}

/// This process and its session.
fn whose() -> (i32, i32) {
    (getpid().as_raw(), getsid(None).map_or(0, Pid::as_raw))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_does_not_hide_what_stands_behind_it() {
        let found = status("42 (a ) Z (1) R 7 8 9 0 -1").unwrap();
        assert_eq!((found.parent, found.group, found.session, found.is_over), (7, 8, 9, false));
        assert!(status("42 (x) Z 1 2 3").unwrap().is_over);
        assert!(status("42 (x) R 1").is_none() && status("").is_none());
    }
}
