//! Blobs on their way into the store.

use std::collections::BTreeMap;

use attune_spec::id::{Digest, Project};
use bytes::Bytes;
use futures::{Stream, stream};
use object_store::{ObjectStoreExt as _, PutMode};

use super::blobs::{BlobStore, blob_key};
use super::upload::{Incoming, PART_BYTES, Sending, Upload};
use crate::BlobRef;
use crate::error::{Cause, Error, Result};

/// What a put did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// The bytes are stored now.
    Stored,
    /// They were stored already; the body was not read to its end.
    Present,
}

impl BlobStore {
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
        self.put_from(project, blob, 0, body).await
    }

    /// Stores `blob` from a `body` that begins at its byte `start`: the bytes before are those of an earlier put that broke
    /// off ([`BlobStore::kept`]), and the digest is checked over all of them.
    ///
    /// # Errors
    /// As [`BlobStore::put`]; [`Error::Gone`] when the bytes before `start` are not kept.
    pub async fn put_from<S, E>(&self, project: &Project, blob: BlobRef, start: u64, body: S) -> Result<Put>
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
        let failed = |e| Error::from_store(self.place(), format!("storing blob {}", blob.digest), e);
        if blob.size_bytes > PART_BYTES {
            // In a box of its own: the state of a hash is large.
            Box::pin(self.put_parts(project, blob, start, body)).await?;
        } else if start > 0 {
            return Err(self.gone(blob, start));
        } else {
            let payload = Incoming::new(blob, body).collect().await?;
            // The bytes are proved, so writing over what is there (a corrupt or equal object) can only mend it.
            self.inner.objects.put_opts(&key, payload, PutMode::Overwrite.into()).await.map_err(failed)?;
        }
        self.corrupt().remove(&(project.clone(), blob));
        fail::fail_point!("artifacts::blob_stored", |_| Err(self.injected("artifacts::blob_stored")));
        Ok(Put::Stored)
    }

    /// Stores a blob that is too large for one request.
    async fn put_parts<S, E>(&self, project: &Project, blob: BlobRef, start: u64, body: S) -> Result<()>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + Unpin,
        E: Into<Cause>,
    {
        let key = blob_key(project, &blob.digest);
        let failed = |e| Error::from_store(self.place(), format!("storing blob {}", blob.digest), e);
        let upload = match start {
            // Whoever begins anew has lost what came before, or never had it.
            0 => Upload::begin(self.inner.objects.as_ref(), &key, blob).await.map_err(failed)?,
            _ => self.inner.shelf.take(project, blob, start).await.ok_or_else(|| self.gone(blob, start))?,
        };
        let shelf = (self.inner.shelf.clone(), project.clone());
        let sending = Sending::new(Incoming::going_on(blob, body, upload.hashing().clone()), upload, shelf);
        if let Err(error) = sending.send(self.place()).await {
            // The answer to the last request may be lost, and the object be there all the same.
            let is_senders = matches!(error, Error::Mismatch { .. } | Error::BrokenOff { .. });
            if is_senders || !self.has_anew(project, blob).await {
                return Err(error);
            }
            tracing::info!(place = self.place(), %blob, %error, "stored, though the store's answer was lost");
        }
        Ok(())
    }

    /// Whether the blob is there now that it was not there (or was corrupt) before.
    async fn has_anew(&self, project: &Project, blob: BlobRef) -> bool {
        let was_corrupt = self.corrupt().contains(&(project.clone(), blob));
        if was_corrupt {
            // The wrong bytes may have the right length.
            return self.verify(project, blob).await.is_ok();
        }
        let meta = self.inner.objects.head(&blob_key(project, &blob.digest)).await;
        meta.is_ok_and(|meta| meta.size == blob.size_bytes)
    }

    fn gone(&self, blob: BlobRef, start: u64) -> Error {
        Error::Gone { what: format!("blob {}", blob.digest), place: self.place().to_owned(), start }
    }

    /// How many of the first bytes of these blobs are kept from puts that broke off, where there are any.
    pub async fn kept(&self, project: &Project, digests: &[Digest]) -> BTreeMap<Digest, u64> {
        self.inner.shelf.kept(project, digests).await
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
}
