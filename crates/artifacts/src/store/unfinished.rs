//! What a killed process leaves behind in a folder: uploads that were never finished. They are invisible, but take room.
//!
//! They are removed on proof, not by age: everyone who uses the folder holds its lock shared, and whoever gets it for
//! itself knows that nobody is writing.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::Path;

use crate::error::{Error, Result};

const WRITERS: &str = ".writers";

/// Takes the folder's lock and, if nobody else holds it, removes unfinished uploads first. Nothing where the file system
/// has no locks: then nothing is proved, nothing is removed. Blocks.
pub(super) fn lock_and_sweep(root: &Path) -> Result<Option<File>> {
    let path = root.join(WRITERS);
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true);
    let lock = options.open(&path).map_err(|e| Error::io("open", &path, e))?;
    match lock.try_lock() {
        Ok(()) => {
            let removed = sweep(root);
            if removed > 0 {
                tracing::info!(place = %root.display(), removed, "unfinished uploads removed");
            }
            // Whoever comes between these two lines finds nothing of ours: no upload has begun.
            lock.unlock().map_err(|e| Error::io("unlock", &path, e))?;
        }
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => return Ok(None),
        Err(TryLockError::Error(e)) => return Err(Error::io("lock", &path, e)),
    }
    lock.lock_shared().map_err(|e| Error::io("lock", &path, e))?;
    Ok(Some(lock))
}

/// Removes the unfinished uploads below `folder` and counts them. What cannot be read or removed is left alone.
fn sweep(folder: &Path) -> usize {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let mut removed = 0;
    for entry in entries.flatten() {
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_folder {
            removed += sweep(&entry.path());
        } else if is_unfinished(&entry.file_name().to_string_lossy()) && fs::remove_file(entry.path()).is_ok() {
            removed += 1;
        }
    }
    removed
}

/// The local object store writes beside the final name, with `#` and a number behind it.
fn is_unfinished(name: &str) -> bool {
    name.rsplit_once('#').is_some_and(|(_, number)| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unfinished_uploads_go_when_nobody_else_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("projects/default/blobs/ab");
        fs::create_dir_all(&folder).unwrap();
        let write = |name: &str| fs::write(folder.join(name), "x").unwrap();
        let names = || {
            let mut names: Vec<_> =
                fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        for name in ["abcd", "abcd#1", "abcd#27", "abcd#", "abcd#x", "a#1b"] {
            write(name);
        }
        let held = lock_and_sweep(dir.path()).unwrap().unwrap();
        assert_eq!(names(), ["a#1b", "abcd", "abcd#", "abcd#x"]);
        write("abcd#3");
        let second = lock_and_sweep(dir.path()).unwrap();
        assert!(names().contains(&"abcd#3".to_owned()), "an upload of somebody else was removed");
        drop((held, second));
        lock_and_sweep(dir.path()).unwrap();
        assert_eq!(names(), ["a#1b", "abcd", "abcd#", "abcd#x"]);
    }
}
