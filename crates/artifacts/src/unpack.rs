//! Writing an artifact into a folder, file by file, checked as it comes, and shown under its final name only when it is
//! complete.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use attune_spec::Fault;
use attune_spec::id::{Digest, Project};
use bytes::Bytes;
use futures::StreamExt as _;

use crate::cache::{Cache, Reserved};
use crate::error::{Error, Result};
use crate::hash::Hashing;
use crate::manifest::{File, Manifest};
use crate::store::BlobStore;

/// Where artifacts come from: the store itself, or a client of the artifact service.
#[async_trait]
pub trait Source: Send + Sync {
    /// Gives `into` the manifest of `digest` ([`Unpack::begin`]), then the bytes of its files in the manifest's order
    /// ([`Unpack::write`]).
    ///
    /// # Errors
    /// Whatever the source or `into` reports.
    async fn pull(&self, project: &Project, digest: &Digest, into: &mut Unpack) -> Result<()>;
}

#[async_trait]
impl Source for BlobStore {
    async fn pull(&self, project: &Project, digest: &Digest, into: &mut Unpack) -> Result<()> {
        let manifest = Arc::new(self.manifest(project, digest).await?);
        into.begin(manifest.clone()).await?;
        for file in manifest.files() {
            let mut body = self.blob(project, file.blob()).await?;
            while let Some(piece) = body.next().await.transpose()? {
                into.write(&file.path, piece).await?;
            }
        }
        Ok(())
    }
}

/// An artifact being written. Until [`Unpack::finish`] everything lies in a folder of its own beside the destination,
/// and goes with it when this value is dropped.
#[derive(Debug)]
pub struct Unpack {
    expected: Digest,
    manifest: Option<Arc<Manifest>>,
    /// The folder that becomes the destination.
    staging: Staging,
    /// Where in it the files go.
    files: PathBuf,
    dest: PathBuf,
    /// Index of the file that is open or comes next.
    next: usize,
    open: Option<Open>,
    read_only: bool,
    /// Where it needs room, and the room once its size is known.
    room: Option<Cache>,
    reserved: Option<Reserved>,
}

#[derive(Debug)]
struct Open {
    path: PathBuf,
    file: fs::File,
    hashing: Hashing,
}

/// A folder that is removed unless it was moved away.
#[derive(Debug)]
struct Staging(PathBuf);

impl Drop for Staging {
    fn drop(&mut self) {
        // Gone after a rename; otherwise best effort, and a sweep finds what is left.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Unpack {
    /// Starts writing the artifact `digest` to the folder `dest`, which must not be there yet or be empty.
    ///
    /// # Errors
    /// [`Error::Refused`] when `dest` has something in it; [`Error::Io`], [`Error::Full`].
    pub async fn to(dest: &Path, digest: Digest) -> Result<Self> {
        let dest = dest.to_owned();
        blocking(move || {
            check_destination(&dest)?;
            let parent = match dest.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            fs::create_dir_all(parent).map_err(|e| Error::io("create the folder", parent, e))?;
            let name = dest.file_name().unwrap_or_default().to_string_lossy();
            let staging = parent.join(format!(".{name}.{}.partial", uuid::Uuid::now_v7().simple()));
            Self::staged(staging, "", dest, digest, false)
        })
        .await
    }

    /// Starts writing in the new folder `staging`, files below `files` in it. Blocks.
    pub(crate) fn staged(
        staging: PathBuf,
        files: &str,
        dest: PathBuf,
        digest: Digest,
        read_only: bool,
    ) -> Result<Self> {
        let at = if files.is_empty() { staging.clone() } else { staging.join(files) };
        fs::create_dir(&staging).map_err(|e| Error::io("create the folder", &staging, e))?;
        let staging = Staging(staging);
        fs::create_dir_all(&at).map_err(|e| Error::io("create the folder", &at, e))?;
        Ok(Self {
            expected: digest,
            manifest: None,
            staging,
            files: at,
            dest,
            next: 0,
            open: None,
            read_only,
            room: None,
            reserved: None,
        })
    }

    /// The same, in a cache that makes room for it when its size is known.
    pub(crate) fn into_room(self, cache: Cache) -> Self {
        Self { room: Some(cache), ..self }
    }

    /// The name of the artifact that is being written.
    pub fn digest(&self) -> Digest {
        self.expected
    }

    /// Where the next byte belongs, a file and the place in it, once the manifest came; nothing when all came.
    pub fn place(&self) -> Option<(String, u64)> {
        let at = self.open.as_ref().map_or(0, |open| open.hashing.size_bytes());
        // Empty files are made when something behind them comes, or at the end.
        let file = self.manifest.as_ref()?.files().get(self.next..)?.iter().find(|file| file.size_bytes > 0)?;
        Some((file.path.clone(), at))
    }

    /// Whether the manifest came.
    pub fn has_begun(&self) -> bool {
        self.manifest.is_some()
    }

    /// Takes the manifest, which comes first, and makes the folders.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when it is another artifact's.
    pub async fn begin(&mut self, manifest: Arc<Manifest>) -> Result<()> {
        if manifest.digest() != self.expected || self.manifest.is_some() {
            return Err(Error::Mismatch {
                what: "the manifest".into(),
                expected: self.expected.to_string(),
                found: manifest.digest().to_string(),
            });
        }
        if let Some(cache) = &self.room {
            let size_bytes = manifest.size_bytes().saturating_add(manifest.bytes().len() as u64);
            self.reserved = Some(cache.make_room(size_bytes).await?.0);
        }
        self.manifest = Some(manifest.clone());
        let files = self.files.clone();
        blocking(move || {
            for parent in manifest.files().iter().filter_map(|file| Path::new(&file.path).parent()) {
                let folder = files.join(parent);
                fs::create_dir_all(&folder).map_err(|e| Error::io("create the folder", &folder, e))?;
            }
            Ok(())
        })
        .await
    }

    /// Takes the next bytes of the file `path`. Files come one after the other in the manifest's order; empty ones need
    /// not be mentioned.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when a file is out of turn, unknown, too long, or not what the manifest says;
    /// [`Error::Io`], [`Error::Full`].
    pub async fn write(&mut self, path: &str, bytes: Bytes) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let file = loop {
            let file = self.expected_file().cloned().ok_or_else(|| self.out_of_turn(path, "no more bytes"))?;
            if file.path == path {
                break file;
            }
            if self.open.is_some() || file.size_bytes > 0 {
                return Err(self.out_of_turn(path, &format!("bytes of {:?}", file.path)));
            }
            self.close(&file).await?;
        };
        let open = match self.open.take() {
            Some(open) => open,
            None => self.create(&file).await?,
        };
        if open.hashing.size_bytes().saturating_add(bytes.len() as u64) > file.size_bytes {
            return Err(mismatch(&file, "more bytes".into()));
        }
        let open = blocking(move || {
            let mut open = open;
            open.file.write_all(&bytes).map_err(|e| Error::io("write", &open.path, e))?;
            open.hashing.update(&bytes);
            Ok(open)
        })
        .await?;
        let complete = open.hashing.size_bytes() == file.size_bytes;
        self.open = Some(open);
        if complete { self.close(&file).await } else { Ok(()) }
    }

    /// Checks that every file is there and shows the whole under the destination's name, which is returned.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when something is missing; [`Error::Refused`] when somebody else filled the destination
    /// meanwhile; [`Error::Io`], [`Error::Full`].
    pub async fn finish(mut self) -> Result<PathBuf> {
        self.complete().await?;
        let Self { staging, dest, .. } = self;
        blocking(move || {
            check_destination(&dest)?;
            sync_folder(&staging.0)?;
            // An empty folder is replaced by the rename in one step; a full one makes it fail.
            fs::rename(&staging.0, &dest).map_err(|e| Error::io("move the artifact to", &dest, e))?;
            Ok(dest)
        })
        .await
    }

    /// Checks that every file is there; the staging folder is complete then.
    pub(crate) async fn complete(&mut self) -> Result<()> {
        if self.manifest.is_none() {
            let (expected, found) = (self.expected.to_string(), "nothing".to_owned());
            return Err(Error::Mismatch { what: "the manifest".into(), expected, found });
        }
        while let Some(file) = self.expected_file().cloned() {
            if file.size_bytes > 0 {
                let got = self.open.as_ref().map_or(0, |open| open.hashing.size_bytes());
                return Err(mismatch(&file, format!("{got} bytes")));
            }
            self.close(&file).await?;
        }
        Ok(())
    }

    /// The manifest, once it came.
    pub(crate) fn manifest(&self) -> Option<&Arc<Manifest>> {
        self.manifest.as_ref()
    }

    pub(crate) fn staging(&self) -> &Path {
        &self.staging.0
    }

    fn expected_file(&self) -> Option<&File> {
        self.manifest.as_ref()?.files().get(self.next)
    }

    fn out_of_turn(&self, path: &str, expected: &str) -> Error {
        let shown: String = path.chars().take(80).collect();
        Error::Mismatch {
            what: format!("artifact {}", self.expected),
            expected: expected.to_owned(),
            found: format!("bytes of {shown:?}"),
        }
    }

    async fn create(&self, file: &File) -> Result<Open> {
        // The path is one of a checked manifest and its folders were made by us in a folder of our own.
        let path = self.files.join(&file.path);
        blocking(move || {
            let file = fs::File::create_new(&path).map_err(|e| Error::io("create", &path, e))?;
            Ok(Open { path, file, hashing: Hashing::default() })
        })
        .await
    }

    /// Checks and seals the open file (or an empty one that nobody sent) and goes on to the next.
    async fn close(&mut self, file: &File) -> Result<()> {
        let open = match self.open.take() {
            Some(open) => open,
            None => self.create(file).await?,
        };
        let found = open.hashing.finish();
        if found != file.blob() {
            return Err(mismatch(file, found.to_string()));
        }
        let read_only = self.read_only;
        blocking(move || {
            open.file.sync_all().map_err(|e| Error::io("write", &open.path, e))?;
            if read_only {
                set_read_only(&open.file).map_err(|e| Error::io("protect", &open.path, e))?;
            }
            Ok(())
        })
        .await?;
        self.next += 1;
        Ok(())
    }
}

fn mismatch(file: &File, found: String) -> Error {
    Error::Mismatch { what: format!("file {:?}", file.path), expected: file.blob().to_string(), found }
}

fn set_read_only(file: &fs::File) -> io::Result<()> {
    let mut permissions = file.metadata()?.permissions();
    permissions.set_readonly(true);
    file.set_permissions(permissions)
}

fn check_destination(dest: &Path) -> Result<()> {
    let message = match fs::read_dir(dest).map(|mut entries| entries.next().is_none()) {
        Ok(true) => return Ok(()),
        Ok(false) => "is a folder with something in it; name a new folder",
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => "is a file; name a new folder",
        Err(e) => return Err(Error::io("open", dest, e)),
    };
    let what = "the destination".into();
    Err(Error::Refused { what, faults: vec![Fault::new(dest.display().to_string().as_str(), message)] })
}

/// Makes the entries of a folder durable.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    #[cfg(unix)]
    fs::File::open(path).and_then(|folder| folder.sync_all()).map_err(|e| Error::io("write", path, e))?;
    Ok(())
}

/// Runs file work off the runtime.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.expect("file work does not panic and is not cancelled")
}
