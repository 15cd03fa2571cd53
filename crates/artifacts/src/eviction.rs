//! Which entries of a cache go when there are too many bytes of them: those that were used longest ago, and that nobody
//! holds.
//!
//! When an entry was used is the time at which its manifest was last touched, so that it outlives the process.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;

use crate::cache::{FILLING, MANIFEST};
use crate::error::{Error, Result};

/// An entry as it lies there.
#[derive(Debug)]
struct Entry {
    used: SystemTime,
    path: PathBuf,
    size_bytes: u64,
}

/// Notes that an entry is used now, by the file system's clock.
pub(crate) fn touch(manifest: &File) {
    // An order of use that is wrong by one is no reason to fail.
    let _ = futimens(manifest, &TimeSpec::UTIME_OMIT, &TimeSpec::UTIME_NOW);
}

/// Removes entries below `root` until those that are left have `bytes_max` at most, or are all held. `grave` gives fresh
/// names in a folder that is emptied if this process ends half-way. How many bytes went.
pub(crate) fn evict(root: &Path, bytes_max: u64, grave: impl Fn() -> PathBuf) -> Result<u64> {
    let mut entries = entries(root)?;
    let mut left: u64 = entries.iter().map(|entry| entry.size_bytes).sum();
    entries.sort_by(|a, b| (a.used, &a.path).cmp(&(b.used, &b.path)));
    let mut gone = 0;
    for entry in entries {
        if left <= bytes_max {
            break;
        }
        if remove(&entry.path, &grave())? {
            tracing::info!(entry = %entry.path.display(), bytes = entry.size_bytes, "evicted from the cache");
            left -= entry.size_bytes;
            gone += entry.size_bytes;
        }
    }
    if left > bytes_max {
        tracing::warn!(root = %root.display(), left, bytes_max, "what is in use leaves the cache larger than its bound");
    }
    Ok(gone)
}

/// Removes an entry that nobody holds; whether it did.
fn remove(entry: &Path, grave: &Path) -> Result<bool> {
    let marker = entry.join(MANIFEST);
    let manifest = match File::open(&marker) {
        Ok(manifest) => manifest,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Error::io("read", &marker, e)),
    };
    // Whoever comes from now on waits for the lock, and finds nothing under the name.
    match manifest.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(false),
        Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => return Ok(false),
        Err(TryLockError::Error(e)) => return Err(Error::io("lock", &marker, e)),
    }
    match fs::rename(entry, grave) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Error::io("remove", entry, e)),
    }
    fs::remove_dir_all(grave).map_err(|e| Error::io("remove", grave, e))?;
    Ok(true)
}

/// Every entry of the cache. What goes while this looks is left out.
fn entries(root: &Path) -> Result<Vec<Entry>> {
    let mut found = Vec::new();
    for project in folders(root)? {
        if project.file_name().is_some_and(|name| name == FILLING) {
            continue;
        }
        for path in folders(&project)? {
            let Ok(meta) = fs::symlink_metadata(path.join(MANIFEST)) else { continue };
            let used = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            let size_bytes = size(&path);
            found.push(Entry { used, path, size_bytes });
        }
    }
    Ok(found)
}

fn folders(at: &Path) -> Result<Vec<PathBuf>> {
    let listed = match fs::read_dir(at) {
        Ok(listed) => listed,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("read", at, e)),
    };
    let folders = listed.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Ok(folders.map(|entry| entry.path()).collect())
}

/// The bytes of all files below a folder.
fn size(at: &Path) -> u64 {
    let Ok(listed) = fs::read_dir(at) else { return 0 };
    let sizes = listed.flatten().map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => size(&entry.path()),
        _ => entry.metadata().map_or(0, |meta| meta.len()),
    });
    sizes.sum()
}
