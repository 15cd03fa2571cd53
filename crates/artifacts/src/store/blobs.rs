//! The store of blobs: opened, asked, listed, deleted from; all by digest.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use attune_spec::id::{Digest, Project};
use futures::TryStreamExt as _;
use futures::stream::{self, StreamExt as _};
use object_store::path::Path;
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt as _};
use tokio::sync::Semaphore;

use super::bucket::Bucket;
use super::location::Opened;
use super::shelf::Shelf;
use super::{location, probe, ranges};
use crate::BlobRef;
use crate::error::{Error, Result};

/// Requests on their way at once when many objects are asked about.
const QUERIES_IN_FLIGHT: usize = 16;

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
    pub(super) corrupt: Mutex<BTreeSet<(Project, BlobRef)>>,
    /// Uploads whose senders broke off, for when they come again.
    pub(super) shelf: Arc<Shelf>,
    /// Room for ranges that readers ask for ahead.
    pub(super) ahead: Arc<Semaphore>,
    /// What the object store's own interface does not offer of a bucket.
    bucket: Option<Bucket>,
    /// Tells whoever opens the folder later that its unfinished uploads may still be wanted.
    _writers: Option<std::fs::File>,
}

impl BlobStore {
    /// Opens a store and proves that it can be one: a folder (made if absent), `file:///folder`, `s3://bucket/prefix`
    /// (credentials, region and endpoint from the `AWS_*` variables) or `memory://` for tests.
    ///
    /// What a killed process left unfinished in a folder is removed by the next one that has the folder for itself; in a
    /// bucket by [`BlobStore::abort_unfinished`].
    ///
    /// # Errors
    /// [`Error::Unusable`] when the location is none of these or fails its proof; otherwise what the store answered.
    pub async fn open(location: &str) -> Result<Self> {
        let opened = location::open(location).await?;
        probe::run(opened.objects.as_ref(), &opened.place).await?;
        tracing::info!(place = opened.place, "artifact store opened");
        Ok(Self::holding(opened))
    }

    /// A store over any object store, unproved.
    #[cfg(test)]
    pub(crate) fn over(objects: Arc<dyn ObjectStore>, place: impl Into<String>) -> Self {
        Self::holding(Opened { objects, place: place.into(), writers: None, bucket: None })
    }

    fn holding(opened: Opened) -> Self {
        let Opened { objects, place, writers, bucket } = opened;
        let ahead = Arc::new(Semaphore::new(ranges::RANGES_AHEAD));
        let (corrupt, shelf) = (Mutex::default(), Arc::default());
        Self { inner: Arc::new(Inner { objects, place, corrupt, shelf, ahead, bucket, _writers: writers }) }
    }

    /// Where it is, for messages; holds no credentials.
    pub fn place(&self) -> &str {
        &self.inner.place
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

    /// Ends uploads that nobody ended: those whose senders have not come again for long, and in a bucket all that began at
    /// `time_ms` or before, in UTC milliseconds by the bucket's own clock, by whatever process. An upload that still goes on
    /// then fails and can be repeated, so `time_ms` lies further back than any takes. How many there were in the bucket.
    ///
    /// # Errors
    /// What the store answered.
    pub async fn abort_unfinished(&self, time_ms: i64) -> Result<usize> {
        self.inner.shelf.expire();
        match &self.inner.bucket {
            Some(bucket) => bucket.abort_unfinished(self.place(), time_ms).await,
            None => Ok(0),
        }
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

    pub(super) fn corrupt(&self) -> std::sync::MutexGuard<'_, BTreeSet<(Project, BlobRef)>> {
        self.inner.corrupt.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn blob_key(project: &Project, digest: &Digest) -> Path {
    let hex = digest.hex();
    Path::from(format!("projects/{project}/blobs/{}/{hex}", &hex[..2]))
}
