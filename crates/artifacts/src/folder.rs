//! The regular files of a folder that may be hostile: an attempt's work directory is written by a process that is not
//! trusted, and what it names must not lead to files outside.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use attune_spec::Fault;

use crate::error::{Error, Result};
use crate::manifest::FILES_MAX;
use crate::path;

/// One regular file.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    /// Its path in the artifact.
    pub(crate) path: String,
    /// Where it really lies, relative to the root: another place when it was named by a symbolic link.
    pub(crate) real: PathBuf,
}

/// What a folder holds.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    pub(crate) files: Vec<Found>,
    /// Hidden files and folders, which are left out.
    pub(crate) skipped: Vec<String>,
    pub(crate) faults: Vec<Fault>,
}

/// Lists `root`, which is canonical, sorted by path.
pub(crate) fn list(root: &Path) -> Result<Listing> {
    let mut listing = Listing::default();
    walk(root, Path::new(""), &mut listing)?;
    listing.files.sort_by(|a, b| a.path.cmp(&b.path));
    listing.skipped.sort();
    listing.faults.sort();
    Ok(listing)
}

fn walk(root: &Path, below: &Path, listing: &mut Listing) -> Result<()> {
    let folder = root.join(below);
    let failed = |e| Error::io("read the folder", &folder, e);
    for entry in fs::read_dir(&folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let at = below.join(entry.file_name());
        let shown = shown(&at);
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            listing.skipped.push(shown);
            continue;
        }
        if listing.files.len() + listing.faults.len() > FILES_MAX {
            listing.faults = vec![Fault::new("", format!("has more than {FILES_MAX} files"))];
            return Ok(());
        }
        let kind = entry.file_type().map_err(failed)?;
        let checked =
            at.to_str().ok_or_else(|| "is not UTF-8".to_owned()).and_then(|text| path::check(text).map(|()| text));
        match checked {
            Err(message) => listing.faults.push(Fault::new(shown.as_str(), message)),
            Ok(_) if kind.is_dir() => walk(root, &at, listing)?,
            Ok(text) if kind.is_file() => listing.files.push(Found { path: text.into(), real: at.clone() }),
            Ok(text) if kind.is_symlink() => match resolve(root, &at) {
                Ok(real) => listing.files.push(Found { path: text.into(), real }),
                Err(message) => listing.faults.push(Fault::new(shown.as_str(), message)),
            },
            Ok(_) => listing.faults.push(Fault::new(shown.as_str(), "is neither a file nor a folder")),
        }
    }
    Ok(())
}

/// The regular file inside `root` that a symbolic link leads to.
fn resolve(root: &Path, at: &Path) -> Result<PathBuf, String> {
    let real =
        root.join(at).canonicalize().map_err(|e| format!("is a symbolic link that leads nowhere ({})", e.kind()))?;
    let inside = real.strip_prefix(root).map_err(|_| {
        "is a symbolic link to a place outside of the folder; copy the folder with its links followed (cp -rL) and use the copy"
    })?;
    match fs::symlink_metadata(&real) {
        Ok(found) if found.is_file() => Ok(inside.to_owned()),
        _ => Err("is a symbolic link to something other than a file".into()),
    }
}

/// Opens the regular file `real` below `root` without following any symbolic link on the way, so that one swapped in
/// after the listing is refused and not read.
pub(crate) fn open(root: &Path, real: &Path) -> Result<fs::File> {
    let path = root.join(real);
    let file = open_below(root, real).map_err(|e| Error::io("open", &path, e))?;
    let kind = file.metadata().map_err(|e| Error::io("open", &path, e))?.file_type();
    if !kind.is_file() {
        return Err(Error::io("open", &path, io::Error::other("it is not a regular file")));
    }
    Ok(file)
}

#[cfg(unix)]
fn open_below(root: &Path, real: &Path) -> io::Result<fs::File> {
    use nix::fcntl::{OFlag, openat};
    use nix::sys::stat::Mode;
    // O_NONBLOCK: opening a pipe that was swapped in must not wait for its other end.
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let mut at = fs::File::open(root)?;
    for component in real.components() {
        at = fs::File::from(openat(&at, component.as_os_str(), flags, Mode::empty())?);
    }
    Ok(at)
}

#[cfg(not(unix))]
fn open_below(root: &Path, real: &Path) -> io::Result<fs::File> {
    fs::File::open(root.join(real))
}

/// A path that is safe to print and to use as the place of a fault.
fn shown(path: &Path) -> String {
    let text = path.to_string_lossy().replace('\\', "/");
    text.chars().map(|c| if c.is_control() { '?' } else { c }).take(path::PATH_BYTES_MAX).collect()
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        (dir, root)
    }

    #[test]
    fn links_are_followed_inside_the_root_only() {
        let (_dir, root) = folder();
        fs::create_dir(root.join("blobs")).unwrap();
        fs::write(root.join("blobs/data"), "x").unwrap();
        symlink("blobs/data", root.join("inside")).unwrap();
        symlink("/etc/passwd", root.join("outside")).unwrap();
        symlink("gone", root.join("dangling")).unwrap();
        symlink("blobs", root.join("folder")).unwrap();
        fs::write(root.join(".hidden"), "x").unwrap();
        fs::write(root.join("bad name\n"), "x").unwrap();
        let listing = list(&root).unwrap();
        let files: Vec<_> = listing.files.iter().map(|f| (f.path.as_str(), f.real.to_str().unwrap())).collect();
        assert_eq!(files, [("blobs/data", "blobs/data"), ("inside", "blobs/data")]);
        assert_eq!(listing.skipped, [".hidden"]);
        let faults: Vec<_> = listing.faults.iter().map(ToString::to_string).collect();
        assert_eq!(faults.len(), 4, "{faults:?}");
        assert!(faults[0].starts_with("`bad name?` is \"bad name\\n\""), "{}", faults[0]);
        assert!(faults[1].contains("`dangling` is a symbolic link that leads nowhere"));
        assert!(faults[2].contains("`folder` is a symbolic link to something other than a file"));
        assert!(faults[3].contains("`outside` is a symbolic link to a place outside"));
    }

    #[test]
    fn a_link_or_pipe_swapped_in_after_the_listing_is_refused() {
        let (_dir, root) = folder();
        fs::create_dir(root.join("a")).unwrap();
        fs::write(root.join("a/data"), "x").unwrap();
        open(&root, Path::new("a/data")).unwrap();
        fs::remove_file(root.join("a/data")).unwrap();
        symlink("/etc/passwd", root.join("a/data")).unwrap();
        assert!(matches!(open(&root, Path::new("a/data")), Err(Error::Io { .. })));
        fs::rename(root.join("a"), root.join("b")).unwrap();
        symlink("/etc", root.join("a")).unwrap();
        assert!(matches!(open(&root, Path::new("a/passwd")), Err(Error::Io { .. })));
        nix::unistd::mkfifo(&root.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(open(&root, Path::new("pipe")).unwrap_err().to_string().contains("pipe"));
    }
}
