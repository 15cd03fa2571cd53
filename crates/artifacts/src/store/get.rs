//! Blobs on their way out of the store.

use std::path::Path as FilePath;
use std::sync::PoisonError;

use attune_spec::id::Project;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::{Error as StoreError, GetOptions, GetResultPayload, ObjectStoreExt as _};
use tokio::io::AsyncWriteExt as _;

use super::blobs::{BlobStore, blob_key};
use super::body::{BlobBody, Verdict, corrupt, pieces};
use super::ranges::{self, Object, RANGE_BYTES};
use crate::BlobRef;
use crate::error::{Error, Result};

/// Tries of a read that can be repeated from its start.
const READS_MAX: usize = 3;
/// Most blobs remembered as corrupt; beyond it a store is past repair by pushing.
const CORRUPT_MAX: usize = 10_000;

impl BlobStore {
    /// Opens `blob` for reading. What is cut on its way goes on from the byte where it was; large blobs come in several
    /// ranges at once.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Corrupt`] here or at the stream's end when what is stored is not the blob.
    pub async fn blob(&self, project: &Project, blob: BlobRef) -> Result<BlobBody> {
        self.blob_from(project, blob, 0).await
    }

    /// Opens `blob` for reading from its byte `start` on. Only a read from its start is checked by its digest.
    ///
    /// # Errors
    /// As [`BlobStore::blob`].
    pub async fn blob_from(&self, project: &Project, blob: BlobRef, start: u64) -> Result<BlobBody> {
        let (key, end) = (blob_key(project, &blob.digest), blob.size_bytes);
        let first = start..end.min(start.saturating_add(RANGE_BYTES));
        // A small object is asked for whole: some stores know no range of an empty one.
        let is_part = first.end < end || (start > 0 && start < end);
        let options = if is_part { ranges::bounded(first.clone()) } else { GetOptions::default() };
        let found = match self.inner.objects.get_opts(&key, options).await {
            Ok(found) => found,
            Err(StoreError::NotFound { .. }) => return Err(self.not_found("blob", &blob.digest)),
            Err(error) => {
                // An object that is too short has no such range, which stores say in many words.
                let meta = if is_part { self.inner.objects.head(&key).await.ok() } else { None };
                return Err(match meta.filter(|meta| meta.size != end) {
                    Some(meta) => self.wrong_length(project, blob, meta.size),
                    None => Error::from_store(self.place(), format!("reading blob {}", blob.digest), error),
                });
            }
        };
        if found.meta.size != end {
            return Err(self.wrong_length(project, blob, found.meta.size));
        }
        let place = self.place().to_owned();
        let raw = match found.payload {
            GetResultPayload::File(file, _) => pieces(file, start, place),
            GetResultPayload::Stream(_) if start >= end && start > 0 => futures::stream::empty().boxed(),
            GetResultPayload::Stream(stream) => {
                let object = Object { objects: self.inner.objects.clone(), key, place };
                ranges::read(object, (first, stream), end, self.inner.ahead.clone())
            }
        };
        Ok(BlobBody::new(raw, blob, start, self.place(), self.verdict(project, blob)))
    }

    fn wrong_length(&self, project: &Project, blob: BlobRef, found: u64) -> Error {
        self.verdict(project, blob)(false);
        corrupt(self.place(), blob, format!("{found} bytes"))
    }

    /// Keeps in mind what a read found.
    fn verdict(&self, project: &Project, blob: BlobRef) -> Verdict {
        let (inner, project) = (self.inner.clone(), project.clone());
        Box::new(move |right: bool| {
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
        })
    }

    /// All bytes of a small blob; a read that comes out wrong is repeated before it fails.
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
}

/// Repeats a read from its start when what came was wrong: a store or a connection may do better the next time.
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
