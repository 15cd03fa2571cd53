//! What surrounds processes and may turn on them: a calendar that jumps, a disk that fills up, memory that runs out.
//!
//! Not every machine lets a test have these. Where it does not, they are none, and the reason is printed.
#![expect(clippy::disallowed_methods, reason = "what is left to the kernel has no end that can be waited for")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use nix::sys::statvfs::statvfs;

/// Where Debian (`libfaketime`, which `faketime` brings) has the library, below `/usr/lib/ARCHITECTURE`.
const LIBRARY: &str = "faketime/libfaketimeMT.so.1";

/// The calendar of some processes. Their timers run on as ever; what they believe to be the date may jump.
pub(crate) struct Calendar {
    file: PathBuf,
    library: PathBuf,
}

impl Calendar {
    /// One that says what the machine's own says, kept in `folder`.
    pub(crate) fn make(folder: &Path) -> Option<Self> {
        let named = std::env::var_os("ATTUNE_FAKETIME").map(PathBuf::from);
        let folders = std::fs::read_dir("/usr/lib").into_iter().flatten().filter_map(Result::ok);
        let installed = folders.map(|folder| folder.path().join(LIBRARY));
        let Some(library) = named.into_iter().chain(installed).find(|path| path.is_file()) else {
            eprintln!("skipped: no libfaketime here (Debian: faketime), and ATTUNE_FAKETIME names none");
            return None;
        };
        let calendar = Self { file: folder.join("calendar"), library };
        calendar.jump("+0");
        Some(calendar)
    }

    /// What a process needs to follow it; its children follow it too.
    pub(crate) fn variables(&self) -> Vec<(String, String)> {
        let (library, file) = (self.library.display().to_string(), self.file.display().to_string());
        let told = [
            ("LD_PRELOAD", library.as_str()),
            ("FAKETIME_TIMESTAMP_FILE", &file),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ("NO_FAKE_STAT", "1"),
        ];
        told.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
    }

    /// It is so far from the machine's own from now on: `-1d`, `+1h`.
    pub(crate) fn jump(&self, away: &str) {
        // Moved into place: somebody reads it all the time.
        let next = self.file.with_extension("next");
        std::fs::write(&next, format!("{away}\n")).unwrap();
        std::fs::rename(next, &self.file).unwrap();
    }
}

/// What a disk has room for that is not full.
const ROOM: &str = "512m";

/// A disk of its own at a folder, for this thread and the processes that it starts. It goes with the last of them.
pub(crate) struct Disk {
    at: PathBuf,
}

impl Disk {
    /// Disks at these folders; none where this process may not mount any.
    pub(crate) fn mount<const N: usize>(folders: [PathBuf; N]) -> Option<[Self; N]> {
        // What this thread mounts is nobody else's to see.
        let is_alone = unshare(CloneFlags::CLONE_NEWNS).is_ok() && ran("mount", ["--make-rprivate", "/"]);
        let mount = |folder: &PathBuf| {
            std::fs::create_dir_all(folder).unwrap();
            let size = format!("size={ROOM}");
            ran("mount", ["-t", "tmpfs", "-o", &size, "tmpfs"].map(OsStr::new).into_iter().chain([folder.as_os_str()]))
        };
        if !is_alone || !folders.iter().all(mount) {
            eprintln!("skipped: this process may not mount disks of its own (root may)");
            return None;
        }
        Some(folders.map(|at| Self { at }))
    }

    /// Not one further byte fits on it.
    pub(crate) fn fill(&self) {
        // Whoever writes meanwhile may have made it larger than what is asked for.
        let is_full = |_| {
            let now = statvfs(&self.at).unwrap();
            if now.blocks_free() == 0 {
                return true;
            }
            let used = (now.blocks() - now.blocks_free()).max(1) * now.fragment_size();
            self.resize(&used.to_string())
        };
        assert!((0..1000).any(is_full), "{} cannot be filled", self.at.display());
    }

    /// There is room on it again.
    pub(crate) fn clear(&self) {
        assert!(self.resize(ROOM), "{} stays full", self.at.display());
    }

    fn resize(&self, size: &str) -> bool {
        ran("mount", [OsStr::new("-o"), OsStr::new(&format!("remount,size={size}")), self.at.as_os_str()])
    }

    /// The files on it by their paths from its root.
    pub(crate) fn files(&self) -> Vec<String> {
        let (mut files, mut folders) = (Vec::new(), vec![self.at.clone()]);
        while let Some(folder) = folders.pop() {
            // It may go while it is looked at.
            for entry in std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok) {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    files.push(path.strip_prefix(&self.at).unwrap().display().to_string());
                }
            }
        }
        files
    }
}

/// A limit of memory for some processes together.
pub(crate) struct Memory {
    group: PathBuf,
}

impl Memory {
    /// A control group without a limit; none where this process may not make one.
    pub(crate) fn make(name: &str) -> Option<Self> {
        let name = format!("attune-{name}-{}", std::process::id());
        let limits = [("/sys/fs/cgroup/memory", LIMIT_1), ("/sys/fs/cgroup", LIMIT_2)];
        for (root, limit) in limits {
            let group = Path::new(root).join(&name);
            if std::fs::create_dir(&group).is_ok() {
                if group.join(limit).is_file() {
                    return Some(Self { group });
                }
                drop(std::fs::remove_dir(group));
            }
        }
        eprintln!(
            "skipped: this process may not make a control group that limits memory (root may, outside of most containers)"
        );
        None
    }

    /// Takes a process in; what it starts from now on belongs to it as well.
    pub(crate) fn enclose(&self, process: nix::unistd::Pid) {
        std::fs::write(self.group.join("cgroup.procs"), process.to_string()).unwrap();
    }

    /// No more than so many bytes from now on.
    pub(crate) fn limit(&self, size_bytes: u64) {
        let file = [LIMIT_1, LIMIT_2].map(|name| self.group.join(name)).into_iter().find(|file| file.is_file());
        std::fs::write(file.unwrap(), size_bytes.to_string()).unwrap();
    }
}

/// The files that limit memory, of the first and the second version of control groups.
const LIMIT_1: &str = "memory.limit_in_bytes";
const LIMIT_2: &str = "memory.max";

impl Drop for Memory {
    fn drop(&mut self) {
        // Processes that end leave it a moment later.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.group).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

fn ran<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> bool {
    Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
}
