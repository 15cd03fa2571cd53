//! The agent's folder: its id, its lock, what is left of an earlier life, and what the machine has.

use std::fs;
use std::path::{Path, PathBuf};

use attune_proto::v1;
use attune_spec::id::WorkerId;
use attune_trainer::card::{self, Card};

use crate::Error;

/// The folder of one agent, held for as long as this value lives.
#[derive(Debug)]
pub(crate) struct Home {
    /// Who works here; the same over restarts, so that the scheduler knows at once what a restarted agent has lost.
    pub(crate) worker: WorkerId,
    /// Where attempts work; empty at the start.
    pub(crate) attempts: PathBuf,
    /// Where inputs are kept.
    pub(crate) cache: PathBuf,
    _lock: fs::File,
}

impl Home {
    /// Takes the folder `root`, made if absent, and removes what an earlier agent's attempts left.
    pub(crate) fn open(root: &Path) -> Result<Self, Error> {
        fs::create_dir_all(root).map_err(Error::io("create", root))?;
        let root = root.canonicalize().map_err(Error::io("open", root))?;
        let lock_path = root.join("lock");
        let lock = fs::File::create(&lock_path).map_err(Error::io("create", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(Error::Busy { path: root }),
            Err(fs::TryLockError::Error(error)) => return Err(Error::io("lock", &lock_path)(error)),
        }
        let attempts = root.join("attempts");
        match fs::remove_dir_all(&attempts) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &attempts)(error));
            }
            _ => fs::create_dir_all(&attempts).map_err(Error::io("create", &attempts))?,
        }
        Ok(Self { worker: worker_id(&root.join("worker-id"))?, attempts, cache: root.join("cache"), _lock: lock })
    }
}

/// The id in `path`, made and written if there is none.
fn worker_id(path: &Path) -> Result<WorkerId, Error> {
    match fs::read_to_string(path) {
        Ok(text) => {
            if let Ok(id) = text.trim().parse() {
                return Ok(id);
            }
            tracing::warn!(path = %path.display(), "the worker id cannot be read; taking a new one");
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("read", path)(error)),
    }
    let text = format!("w-{}", uuid::Uuid::now_v7().simple());
    let id: WorkerId = text.parse().map_err(std::io::Error::other).map_err(Error::io("make an id for", path))?;
    // Written beside and moved, so that a broken write leaves no half an id.
    let partial = path.with_extension("partial");
    fs::write(&partial, format!("{id}\n")).map_err(Error::io("write", &partial))?;
    fs::rename(&partial, path).map_err(Error::io("write", path))?;
    Ok(id)
}

/// The NVIDIA devices that are offered: all, or the first `wanted`.
pub(crate) fn cards(wanted: Option<u32>) -> Result<Vec<Card>, Error> {
    let mut found = card::cards();
    match wanted {
        Some(wanted) if wanted as usize > found.len() => Err(Error::Cards { wanted, found: found.len() }),
        wanted => {
            found.truncate(wanted.map_or(usize::MAX, |wanted| wanted as usize));
            Ok(found)
        }
    }
}

/// The machine as `count` CPU devices of equal shares, and its NVIDIA devices.
pub(crate) fn devices(count: u32, cards: &[Card]) -> Vec<v1::Device> {
    let cores = std::thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX));
    let memory = memory_bytes();
    let name = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = name.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let name = name.trim_start_matches([' ', '\t', ':']).to_owned();
    let device = |index| v1::Device {
        index,
        kind: v1::DeviceKind::Cpu as i32,
        name: name.clone(),
        memory_bytes: memory / u64::from(count.max(1)),
        cores: (cores / count.max(1)).max(1),
    };
    let card = |(index, card): (u32, &Card)| v1::Device {
        index,
        kind: v1::DeviceKind::Cuda as i32,
        name: card.name.clone(),
        memory_bytes: card.memory_bytes,
        cores: 1,
    };
    (0..count).map(device).chain((0..).zip(cards).map(card)).collect()
}

/// The first `count` numbers of the `all` devices of a kind that are not taken; or why there are not enough.
pub(crate) fn free(taken: &[u32], all: u32, count: u32) -> Result<Vec<u32>, String> {
    let busy = taken.len() as u32;
    if busy.saturating_add(count) > all {
        return Err(format!("{busy} of {all} devices are in use"));
    }
    Ok((0..all).filter(|number| !taken.contains(number)).take(count as usize).collect())
}

/// Files that a new attempt needs beside those that are open: its pipes, what is fetched and what is stored.
const FILES: usize = 32;

/// Whether the system still lets this process open files and start others; or what it lacks.
pub(crate) fn has_room() -> Result<(), String> {
    let files: std::io::Result<Vec<_>> = (0..FILES).map(|_| fs::File::open("/dev/null")).collect();
    files.map_err(|error| format!("the worker cannot open {FILES} more files: {error}"))?;
    // Threads and processes count as one.
    let thread = std::thread::Builder::new().spawn(|| {});
    let thread = thread.map_err(|error| format!("the worker cannot start another process: {error}"))?;
    thread.join().map_err(|_| "the worker cannot start another process".to_owned())
}

/// Memory that processes of this machine may use.
fn memory_bytes() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
    total.and_then(|kib| kib.trim().parse::<u64>().ok()).map_or(0, |kib| kib << 10)
}

/// Free bytes on the disk of `path`; 0 if nobody can say.
pub(crate) fn disk_free_bytes(path: &Path) -> u64 {
    // The casts are for systems whose counts are narrower.
    #[allow(clippy::unnecessary_cast, reason = "the types differ by platform")]
    nix::sys::statvfs::statvfs(path)
        .map_or(0, |found| (found.blocks_available() as u64).saturating_mul(found.fragment_size() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_keeps_its_id_and_has_one_owner() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::open(root.path()).unwrap();
        let worker = home.worker.clone();
        fs::create_dir_all(home.attempts.join("1-1/work")).unwrap();
        assert!(matches!(Home::open(root.path()), Err(Error::Busy { .. })));
        drop(home);
        let home = Home::open(root.path()).unwrap();
        assert_eq!(home.worker, worker);
        assert_eq!(fs::read_dir(&home.attempts).unwrap().count(), 0, "leftovers of an earlier life");
    }

    #[test]
    fn an_id_that_cannot_be_read_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("worker-id"), "no id at all\n").unwrap();
        let home = Home::open(root.path()).unwrap();
        assert!(home.worker.as_str().starts_with("w-"));
    }

    #[test]
    fn the_machine_is_shared_evenly() {
        let card = Card { name: "a card".to_owned(), memory_bytes: 7 };
        let two = devices(2, &[card.clone(), card]);
        assert_eq!(two.len(), 4);
        assert_eq!((two[3].kind, two[3].index, two[3].memory_bytes), (v1::DeviceKind::Cuda as i32, 1, 7));
        assert!(two[0].memory_bytes > 0 && two[0].memory_bytes == two[1].memory_bytes);
        assert!(disk_free_bytes(Path::new("/")) > 0);
    }

    #[test]
    fn devices_are_given_to_one_each() {
        assert_eq!(free(&[1, 0, 3], 6, 2), Ok(vec![2, 4]));
        assert_eq!(free(&[1, 0, 3], 4, 1), Ok(vec![2]));
        assert_eq!(free(&[1, 0, 3], 4, 2), Err("3 of 4 devices are in use".to_owned()));
        assert_eq!(free(&[], 2, 2), Ok(vec![0, 1]));
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn devices_that_are_not_there_are_not_offered() {
        let error = cards(Some(3)).unwrap_err().to_string();
        assert!(error.starts_with("3 NVIDIA devices were to be offered; this program finds 0"), "{error}");
        assert!(cards(None).unwrap().is_empty());
    }
}
