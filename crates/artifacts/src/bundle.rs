//! A local file or folder on its way to becoming an artifact: listed, recognised, checked, hashed, ready to be sent.

use std::path::{Path, PathBuf};

use attune_spec::id::Project;
use attune_spec::{Fault, FieldPath};
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use std::io::{Read as _, Seek as _, SeekFrom};

use crate::error::{Error, Result};
use crate::folder::{self, Found, Listing};
use crate::hash::{self, CHUNK_BYTES};
use crate::lineage::Causes;
use crate::manifest::{BlobRef, File, Kind, Manifest};
use crate::store::BlobStore;
use crate::unpack::blocking;
use crate::{content, path};

/// Files hashed at once; more would fight for the disk.
const HASHING_AT_ONCE: usize = 4;

/// The files of an artifact as they lie on this machine.
#[derive(Debug, Clone)]
pub struct Bundle {
    root: PathBuf,
    kind: Kind,
    files: Vec<(File, PathBuf)>,
    skipped: Vec<String>,
}

impl Bundle {
    /// Reads a Hugging Face model folder, an adapter folder or a dataset (a file, or a folder of them). With `kind` the
    /// input must be of that kind; without it the kind is recognised by what is there. Outputs of an attempt
    /// (checkpoints, reports, …) name their kind and may hold any files but those that run code when loaded.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is nothing at `input`; [`Error::Refused`] with every fault, each at its file;
    /// [`Error::Io`].
    pub async fn read(input: &Path, kind: Option<Kind>) -> Result<Self> {
        let what = input.display().to_string();
        let at = input.to_owned();
        let (root, listing, kind) = blocking(move || inspect(&at, kind)).await?;
        if !listing.faults.is_empty() {
            return Err(Error::Refused { what, faults: listing.faults });
        }
        let at = root.clone();
        let hashed = stream::iter(listing.files).map(move |found| hash_file(at.clone(), found));
        let files = hashed.buffered(HASHING_AT_ONCE).boxed().try_collect().await?;
        Ok(Self { root, kind, files, skipped: listing.skipped })
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Hidden files and folders, which were left out.
    pub fn skipped(&self) -> &[String] {
        &self.skipped
    }

    /// The manifest of these files with `causes` (none, for what somebody pushes).
    ///
    /// # Errors
    /// [`Error::Refused`] when files or causes break a limit of manifests.
    pub fn manifest(&self, causes: Causes) -> Result<Manifest> {
        Manifest::new(self.kind, self.files.iter().map(|(file, _)| file.clone()).collect(), causes)
    }

    /// The bytes of one of its blobs, in pieces. The file may have changed since it was hashed: whoever receives the
    /// bytes checks them.
    ///
    /// # Errors
    /// [`Error::NotFound`] when no file has this blob.
    pub fn body(&self, blob: BlobRef) -> Result<BoxStream<'static, Result<Bytes>>> {
        self.body_from(blob, 0)
    }

    /// The bytes of one of its blobs from `start` on.
    ///
    /// # Errors
    /// As [`Bundle::body`].
    pub fn body_from(&self, blob: BlobRef, start: u64) -> Result<BoxStream<'static, Result<Bytes>>> {
        let found = self.files.iter().find(|(file, _)| file.blob() == blob);
        let Some((_, real)) = found else {
            return Err(Error::NotFound {
                what: format!("blob {}", blob.digest),
                place: self.root.display().to_string(),
            });
        };
        let (root, real) = (self.root.clone(), real.clone());
        let state = (None, root, real);
        let pieces = stream::try_unfold(state, move |(file, root, real)| async move {
            blocking(move || {
                let mut file = match file {
                    Some(file) => file,
                    None => {
                        let mut file = folder::open(&root, &real)?;
                        file.seek(SeekFrom::Start(start)).map_err(|e| Error::io("read", &root.join(&real), e))?;
                        file
                    }
                };
                let mut piece = Vec::with_capacity(CHUNK_BYTES);
                let read = file.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut piece);
                read.map_err(|e| Error::io("read", &root.join(&real), e))?;
                Ok((!piece.is_empty()).then(|| (Bytes::from(piece), (Some(file), root, real))))
            })
            .await
        });
        Ok(pieces.boxed())
    }

    /// Stores blobs and manifest directly; clients of a server send them to it instead. The caller commits the row.
    ///
    /// # Errors
    /// As [`Bundle::manifest`], [`BlobStore::put`] and [`BlobStore::put_manifest`].
    pub async fn push(&self, store: &BlobStore, project: &Project, causes: Causes) -> Result<Manifest> {
        let manifest = self.manifest(causes)?;
        for blob in store.missing(project, &manifest.blobs()).await? {
            store.put(project, blob, self.body(blob)?).await?;
        }
        store.put_manifest(project, &manifest).await?;
        Ok(manifest)
    }
}

/// Lists, recognises and checks; everything but hashing.
fn inspect(input: &Path, kind: Option<Kind>) -> Result<(PathBuf, Listing, Kind)> {
    let place = || input.parent().unwrap_or_else(|| Path::new("/")).display().to_string();
    let real = input.canonicalize().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::NotFound { what: input.display().to_string(), place: place() },
        _ => Error::io("open", input, e),
    })?;
    let (root, mut listing) = if real.is_dir() { (real.clone(), folder::list(&real)?) } else { single(input, &real) };
    let recognised = content::recognise(&listing.files);
    let kind = match (kind, recognised) {
        (Some(kind), _) | (None, Ok(kind)) => kind,
        (None, Err(fault)) => {
            // What is refused by its content is the better explanation: a lone pickle is not "no model".
            let mut faults = listing.faults;
            faults.extend(content::check(&root, &listing.files, Kind::Report)?);
            if faults.is_empty() {
                faults.push(fault);
            }
            return Err(Error::Refused { what: input.display().to_string(), faults });
        }
    };
    listing.faults.extend(content::check(&root, &listing.files, kind)?);
    if listing.files.is_empty() && listing.faults.is_empty() {
        listing.faults.push(Fault { path: FieldPath::root(), message: "has no files".into() });
    }
    Ok((root, listing, kind))
}

/// A lone file, under the name that it was given by.
fn single(input: &Path, real: &Path) -> (PathBuf, Listing) {
    let root = real.parent().unwrap_or_else(|| Path::new("/")).to_owned();
    let name = input.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut listing = Listing::default();
    match path::check(&name) {
        Ok(()) => {
            let real = PathBuf::from(real.file_name().unwrap_or_default());
            listing.files.push(Found { path: name, real });
        }
        Err(message) => listing.faults.push(Fault::new("", format!("{message}; rename the file"))),
    }
    (root, listing)
}

async fn hash_file(root: PathBuf, found: Found) -> Result<(File, PathBuf)> {
    blocking(move || {
        let mut file = folder::open(&root, &found.real)?;
        let blob = hash::reader(&mut file).map_err(|e| Error::io("read", &root.join(&found.real), e))?;
        Ok((File { path: found.path, size_bytes: blob.size_bytes, digest: blob.digest }, found.real))
    })
    .await
}
