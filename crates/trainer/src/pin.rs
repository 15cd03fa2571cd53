//! What is read where it lies may change under a job: its content is named, so that a lineage says what was used and no run
//! goes on with something else.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use attune_spec::id::Digest;

use crate::error::Error;

/// Content digests by place, as the plan names it.
pub(crate) type Pins = BTreeMap<String, Digest>;

/// The content of a file; of a folder, its files' names and contents.
///
/// # Errors
/// A file that cannot be read.
pub(crate) fn content(path: &Path) -> Result<Digest, Error> {
    if !path.is_dir() {
        return file(path);
    }
    let entries = std::fs::read_dir(path).map_err(Error::io(path))?;
    let mut files: Vec<PathBuf> =
        entries.map(|entry| entry.map(|entry| entry.path()).map_err(Error::io(path))).collect::<Result<_, _>>()?;
    files.retain(|path| path.is_file());
    files.sort();
    let mut hasher = blake3::Hasher::new();
    for path in files {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        // The length keeps the end of a name apart from what follows it.
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(file(&path)?.as_bytes());
    }
    Ok(Digest::from_bytes(*hasher.finalize().as_bytes()))
}

/// In pieces: weights may be larger than the memory.
fn file(path: &Path) -> Result<Digest, Error> {
    let open = File::open(path).map_err(Error::io(path))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(open).map_err(Error::io(path))?;
    Ok(Digest::from_bytes(*hasher.finalize().as_bytes()))
}

/// Refuses to go on where something is not what it was when the checkpoint was written.
///
/// # Errors
/// [`Error::Input`] naming the first place that has changed.
pub(crate) fn unchanged(then: &Pins, now: &Pins) -> Result<(), Error> {
    for (place, now) in now {
        match then.get(place) {
            Some(then) if then == now => {}
            then => {
                let then = then.map_or_else(|| "unknown".to_owned(), ToString::to_string);
                let message = format!(
                    "has changed since the checkpoint was written: its content was {then} and is {now}; submit the job anew"
                );
                return Err(Error::Input { input: place.clone(), message });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folders_content_is_its_names_and_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let digest = || content(folder.path()).unwrap();
        write("a", "one");
        let first = digest();
        write("b", "");
        let second = digest();
        write("b", "two");
        let third = digest();
        std::fs::rename(folder.path().join("b"), folder.path().join("c")).unwrap();
        let all = [&first, &second, &third, &digest()].map(ToString::to_string);
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), 4, "{all:?}");
        std::fs::remove_file(folder.path().join("c")).unwrap();
        assert_eq!(digest(), first);
        assert_eq!(content(&folder.path().join("a")).unwrap(), Digest::from_bytes(*blake3::hash(b"one").as_bytes()));
    }
}
