//! The store of blobs: put, get, ask, list, delete, all by digest and all checked.

use std::collections::BTreeSet;
use std::path::Path as FilePath;
use std::sync::{Arc, Mutex, PoisonError};

use attune_spec::id::{Digest, Project};
use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use futures::{Stream, TryStreamExt as _};
use object_store::path::Path;
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt as _, PutMode};
use tokio::io::AsyncWriteExt as _;

use super::body::BlobBody;
use super::upload::{Incoming, PART_BYTES};
use super::{location, probe};
use crate::BlobRef;
use crate::error::{Cause, Error, Result};

/// Requests on their way at once when many objects are asked about.
const QUERIES_IN_FLIGHT: usize = 16;
/// Tries of a read that can be repeated from its start.
const READS_MAX: usize = 3;
/// Most blobs remembered as corrupt; beyond it a store is past repair by pushing.
const CORRUPT_MAX: usize = 10_000;

/// What a put did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// The bytes are stored now.
    Stored,
    /// They were stored already; the body was not read to its end.
    Present,
}

/// A store of blobs and manifests. Cheap to clone; clones share one connection.
#[derive(Debug, Clone)]
pub struct BlobStore {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) objects: Arc<dyn ObjectStore>,
    pub(super) place: String,
    /// Blobs whose stored bytes were found wrong by this process: they count as missing, so that the next push of the
    /// right bytes replaces them.
    corrupt: Mutex<BTreeSet<(Project, BlobRef)>>,
    /// Tells whoever opens the folder later that its unfinished uploads may still be wanted.
    _writers: Option<std::fs::File>,
}

impl BlobStore {
    /// Opens a store and proves that it can be one: a folder (made if absent), `file:///folder`, `s3://bucket/prefix`
    /// (credentials, region and endpoint from the `AWS_*` variables) or `memory://` for tests.
    ///
    /// What a killed process left unfinished in a folder is removed by the next one that has the folder for itself. In
    /// S3 a bucket's lifecycle rule does that (`AbortIncompleteMultipartUpload`).
    ///
    /// # Errors
    /// [`Error::Unusable`] when the location is none of these or fails its proof; otherwise what the store answered.
    pub async fn open(location: &str) -> Result<Self> {
        let opened = location::open(location).await?;
        probe::run(opened.objects.as_ref(), &opened.place).await?;
        tracing::info!(place = opened.place, "artifact store opened");
        Ok(Self::holding(opened.objects, opened.place, opened.writers))
    }

    /// A store over any object store, unproved.
    #[cfg(test)]
    pub(crate) fn over(objects: Arc<dyn ObjectStore>, place: impl Into<String>) -> Self {
        Self::holding(objects, place.into(), None)
    }

    fn holding(objects: Arc<dyn ObjectStore>, place: String, writers: Option<std::fs::File>) -> Self {
        Self { inner: Arc::new(Inner { objects, place, corrupt: Mutex::default(), _writers: writers }) }
    }

    /// Where it is, for messages; holds no credentials.
    pub fn place(&self) -> &str {
        &self.inner.place
    }

    /// Stores `blob` from `body`, which may come in pieces of any size. What is there already is not sent again. The
    /// bytes are hashed on their way and appear under their name only when digest and length are right; concurrent puts
    /// of one blob do no harm to each other.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when the bytes are not the announced ones, [`Error::BrokenOff`] when `body` fails,
    /// [`Error::Full`], [`Error::Unavailable`], [`Error::Denied`] from the store. Nothing is visible after an error.
    pub async fn put<S, E>(&self, project: &Project, blob: BlobRef, body: S) -> Result<Put>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + Unpin,
        E: Into<Cause>,
    {
        if self.has(project, blob).await? {
            return Ok(Put::Present);
        }
        fail::fail_point!("artifacts::disk_full", |_| {
            Err(Error::Full { place: self.place().into(), source: "fail point".into() })
        });
        let key = blob_key(project, &blob.digest);
        let objects = self.inner.objects.as_ref();
        let incoming = Incoming::new(blob, body);
        if blob.size_bytes > PART_BYTES {
            incoming.send(objects, &key, self.place()).await?;
        } else {
            let payload = incoming.collect().await?;
            // The bytes are proved, so writing over what is there (a corrupt or equal object) can only mend it.
            let put = objects.put_opts(&key, payload, PutMode::Overwrite.into()).await;
            put.map_err(|e| Error::from_store(self.place(), format!("storing blob {}", blob.digest), e))?;
        }
        self.corrupt().remove(&(project.clone(), blob));
        fail::fail_point!("artifacts::blob_stored", |_| Err(self.injected("artifacts::blob_stored")));
        Ok(Put::Stored)
    }

    /// Stores bytes that are in memory and names them.
    ///
    /// # Errors
    /// As [`BlobStore::put`].
    pub async fn put_bytes(&self, project: &Project, bytes: Bytes) -> Result<BlobRef> {
        let blob = crate::hash::Hashing::default().absorb(bytes.clone()).await.finish();
        self.put(project, blob, stream::iter([Ok::<_, Error>(bytes)])).await?;
        Ok(blob)
    }

    /// Opens `blob` for reading.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Corrupt`] here or at the stream's end when what is stored is not the blob.
    pub async fn blob(&self, project: &Project, blob: BlobRef) -> Result<BlobBody> {
        let key = blob_key(project, &blob.digest);
        let found = self.inner.objects.get(&key).await.map_err(|e| match e {
            StoreError::NotFound { .. } => self.not_found("blob", &blob.digest),
            other => Error::from_store(self.place(), format!("reading blob {}", blob.digest), other),
        })?;
        let (inner, project) = (self.inner.clone(), project.clone());
        let verdict = Box::new(move |right: bool| {
            let mut corrupt = inner.corrupt.lock().unwrap_or_else(PoisonError::into_inner);
            if right {
                // An earlier read may have been spoiled on its way.
                corrupt.remove(&(project, blob));
                return;
            }
            tracing::error!(place = inner.place, %project, blob = %blob, "stored blob is corrupt");
            if corrupt.len() < CORRUPT_MAX {
                corrupt.insert((project, blob));
            }
        });
        BlobBody::new(found, blob, self.place(), verdict)
    }

    /// All bytes of a small blob; a read that breaks off or comes out wrong is repeated before it fails.
    ///
    /// # Errors
    /// As [`BlobStore::blob`] and its stream.
    pub async fn bytes(&self, project: &Project, blob: BlobRef) -> Result<Bytes> {
        repeat(|| async { self.blob(project, blob).await?.collect().await }).await
    }

    /// Writes `blob` to the local file `path`, which appears (or is replaced) only when its bytes were found right.
    ///
    /// # Errors
    /// As [`BlobStore::blob`] and its stream; [`Error::Io`] and [`Error::Full`] from the local disk.
    pub async fn read_to_file(&self, project: &Project, blob: BlobRef, path: &FilePath) -> Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let partial = path.with_file_name(format!("{name}.{}.partial", uuid::Uuid::now_v7().simple()));
        let read = repeat(|| self.read_to_partial(project, blob, &partial)).await;
        let moved = match read {
            Ok(()) => tokio::fs::rename(&partial, path).await.map_err(|e| Error::io("write", path, e)),
            Err(error) => Err(error),
        };
        if moved.is_err() {
            // It may not have been made at all; the first error is the one to report.
            let _ = tokio::fs::remove_file(&partial).await;
        }
        moved
    }

    async fn read_to_partial(&self, project: &Project, blob: BlobRef, partial: &FilePath) -> Result<()> {
        let failed = |e| Error::io("write", partial, e);
        let mut body = self.blob(project, blob).await?;
        let mut file = tokio::fs::File::create(partial).await.map_err(failed)?;
        while let Some(piece) = body.next().await.transpose()? {
            file.write_all(&piece).await.map_err(failed)?;
        }
        file.flush().await.map_err(failed)?;
        file.sync_all().await.map_err(failed)
    }

    /// Reads `blob` whole and says whether it is what its name says.
    ///
    /// # Errors
    /// As [`BlobStore::blob`] and its stream.
    pub async fn verify(&self, project: &Project, blob: BlobRef) -> Result<()> {
        self.blob(project, blob).await?.try_for_each(|_| std::future::ready(Ok(()))).await
    }

    /// Whether `blob` is stored with its length, and not known to be corrupt.
    ///
    /// # Errors
    /// What the store answered, other than that it has no such object.
    pub async fn has(&self, project: &Project, blob: BlobRef) -> Result<bool> {
        match self.inner.objects.head(&blob_key(project, &blob.digest)).await {
            Ok(meta) => Ok(meta.size == blob.size_bytes && !self.corrupt().contains(&(project.clone(), blob))),
            Err(StoreError::NotFound { .. }) => Ok(false),
            Err(e) => Err(Error::from_store(self.place(), format!("looking for blob {}", blob.digest), e)),
        }
    }

    /// Those of `blobs` that would have to be sent, in the order given, each once.
    ///
    /// # Errors
    /// As [`BlobStore::has`].
    pub async fn missing(&self, project: &Project, blobs: &[BlobRef]) -> Result<Vec<BlobRef>> {
        let mut seen = BTreeSet::new();
        let asked = blobs.iter().copied().filter(|blob| seen.insert(*blob)).collect::<Vec<_>>();
        let answers = stream::iter(asked)
            .map(|blob| async move { Ok::<_, Error>((blob, self.has(project, blob).await?)) })
            .buffered(QUERIES_IN_FLIGHT);
        answers.try_filter_map(async |(blob, has)| Ok((!has).then_some(blob))).try_collect().await
    }

    /// Those of `digests` that would have to be sent, in the order given, each once. Lengths are not known here: they are
    /// compared when the manifest is stored.
    ///
    /// # Errors
    /// As [`BlobStore::has`].
    pub async fn missing_digests(&self, project: &Project, digests: &[Digest]) -> Result<Vec<Digest>> {
        let mut seen = BTreeSet::new();
        let asked = digests.iter().copied().filter(|digest| seen.insert(*digest)).collect::<Vec<_>>();
        let answers = stream::iter(asked)
            .map(|digest| async move { Ok::<_, Error>((digest, self.has_digest(project, digest).await?)) })
            .buffered(QUERIES_IN_FLIGHT);
        answers.try_filter_map(async |(digest, has)| Ok((!has).then_some(digest))).try_collect().await
    }

    async fn has_digest(&self, project: &Project, digest: Digest) -> Result<bool> {
        match self.inner.objects.head(&blob_key(project, &digest)).await {
            Ok(_) => Ok(!self.corrupt().iter().any(|(of, blob)| of == project && blob.digest == digest)),
            Err(StoreError::NotFound { .. }) => Ok(false),
            Err(e) => Err(Error::from_store(self.place(), format!("looking for blob {digest}"), e)),
        }
    }

    /// Every blob of a project, as stored; for sweeps that delete what nothing refers to.
    ///
    /// # Errors
    /// What the store answered.
    pub async fn blobs(&self, project: &Project) -> Result<Vec<BlobRef>> {
        self.list(project, "blobs", i64::MAX).await
    }

    /// The blobs of a project that were there at `time_ms` already, in UTC milliseconds by the store's own clock.
    ///
    /// # Errors
    /// What the store answered.
    pub async fn blobs_since(&self, project: &Project, time_ms: i64) -> Result<Vec<BlobRef>> {
        self.list(project, "blobs", time_ms).await
    }

    pub(super) async fn list(&self, project: &Project, kind: &str, until_ms: i64) -> Result<Vec<BlobRef>> {
        let prefix = Path::from(format!("projects/{project}/{kind}"));
        let objects = self.inner.objects.list(Some(&prefix));
        let found: Vec<_> = objects
            .try_filter_map(async |meta| {
                // Anything else under this prefix was not put there by this room and is left alone.
                let digest = meta.location.filename().and_then(|hex| format!("blake3:{hex}").parse().ok());
                let digest = digest.filter(|_| meta.last_modified.timestamp_millis() <= until_ms);
                Ok(digest.map(|digest| BlobRef { digest, size_bytes: meta.size }))
            })
            .try_collect()
            .await
            .map_err(|e| Error::from_store(self.place(), format!("listing {prefix}"), e))?;
        Ok(found)
    }

    /// Deletes a blob; one that is not there counts as deleted. The caller has proved that no visible or pending
    /// artifact of the project refers to it, and keeps new commits of it out meanwhile: age alone is no proof.
    ///
    /// # Errors
    /// What the store answered.
    pub async fn delete_blob(&self, project: &Project, digest: &Digest) -> Result<()> {
        self.delete(&blob_key(project, digest)).await?;
        self.corrupt().retain(|(of, blob)| of != project || blob.digest != *digest);
        Ok(())
    }

    pub(super) async fn delete(&self, key: &Path) -> Result<()> {
        match self.inner.objects.delete(key).await {
            Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(e) => Err(Error::from_store(self.place(), format!("deleting {key}"), e)),
        }
    }

    pub(super) fn not_found(&self, what: &str, digest: &Digest) -> Error {
        Error::NotFound { what: format!("{what} {digest}"), place: self.place().to_owned() }
    }

    /// What a fail point returns.
    #[cfg(feature = "failpoints")]
    pub(super) fn injected(&self, point: &str) -> Error {
        let doing = format!("fail point {point}");
        Error::Unavailable { place: self.place().into(), doing, source: "injected".into() }
    }

    fn corrupt(&self) -> std::sync::MutexGuard<'_, BTreeSet<(Project, BlobRef)>> {
        self.inner.corrupt.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn blob_key(project: &Project, digest: &Digest) -> Path {
    let hex = digest.hex();
    Path::from(format!("projects/{project}/blobs/{}/{hex}", &hex[..2]))
}

/// Repeats a read from its start when what came was cut or wrong: a store or a connection may do better the next time.
pub(super) async fn repeat<T, F: Future<Output = Result<T>>>(mut read: impl FnMut() -> F) -> Result<T> {
    let mut tries = 1;
    loop {
        match read().await {
            Err(error @ (Error::Corrupt { .. } | Error::Unavailable { .. })) if tries < READS_MAX => {
                tracing::warn!(%error, tries, "read repeated");
                tries += 1;
            }
            result => return result,
        }
    }
}
