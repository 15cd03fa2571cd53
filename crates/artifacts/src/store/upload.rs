//! The bytes of a blob on their way in: hashed as they come, published only when digest and length are right. What has
//! arrived of a large one is kept for a while when its sender breaks off.

use std::sync::Arc;

use attune_spec::id::Project;
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt as _, PutPayload};
use tokio::task::JoinSet;

use super::shelf::Shelf;
use crate::BlobRef;
use crate::error::{Cause, Error, Result};
use crate::hash::Hashing;

/// Blobs up to this size go in one request. S3's smallest part is 5 MiB.
pub(super) const PART_BYTES: u64 = 8 << 20;
/// S3 takes at most 10,000 parts; larger blobs get larger parts.
const PARTS_MAX: u64 = 9_000;
/// Parts on their way at once. With the one being filled this bounds the memory of an upload to five parts.
const PARTS_IN_FLIGHT: usize = 4;

/// Parts that are being stored.
pub(super) type Parts = JoinSet<object_store::Result<()>>;

/// An upload in parts: what was handed to the store so far, up to the end of a part.
#[derive(Debug)]
pub(super) struct Upload {
    parts: Box<dyn MultipartUpload>,
    part_bytes: usize,
    /// Of the bytes of all parts so far.
    hashing: Hashing,
}

impl Upload {
    /// Begins at the first byte.
    pub(super) async fn begin(objects: &dyn ObjectStore, key: &Path, blob: BlobRef) -> object_store::Result<Self> {
        let parts = objects.put_multipart(key).await?;
        Ok(Self { parts, part_bytes: part_bytes(blob.size_bytes), hashing: Hashing::default() })
    }

    /// The hash of what it has.
    pub(super) fn hashing(&self) -> &Hashing {
        &self.hashing
    }

    /// How many bytes it has.
    pub(super) fn at(&self) -> u64 {
        self.hashing.size_bytes()
    }

    /// Ends it. What an abort that fails leaves behind is found by a later sweep of the bucket.
    pub(super) async fn abort(mut self) {
        if let Err(error) = self.parts.abort().await {
            tracing::debug!(%error, "an upload was not aborted");
        }
    }
}

/// Takes pieces from the sender and stops as soon as there are more bytes than announced.
pub(super) struct Incoming<S> {
    blob: BlobRef,
    body: S,
    hashing: Hashing,
}

impl<S, E> Incoming<S>
where
    S: Stream<Item = Result<Bytes, E>> + Send + Unpin,
    E: Into<Cause>,
{
    pub(super) fn new(blob: BlobRef, body: S) -> Self {
        Self::going_on(blob, body, Hashing::default())
    }

    /// The rest of a blob of which `hashing` has seen the start.
    pub(super) fn going_on(blob: BlobRef, body: S, hashing: Hashing) -> Self {
        Self { blob, body, hashing }
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        let piece = self.body.next().await.transpose();
        let piece = piece.map_err(|e| Error::BrokenOff { what: name(self.blob), source: e.into() })?;
        let Some(piece) = piece else { return Ok(None) };
        let seen = self.hashing.size_bytes().saturating_add(piece.len() as u64);
        if seen > self.blob.size_bytes { Err(self.mismatch("more bytes".into())) } else { Ok(Some(piece)) }
    }

    async fn hash(&mut self, piece: &Bytes) {
        self.hashing = std::mem::take(&mut self.hashing).absorb(piece.clone()).await;
    }

    /// Whether what came is what was announced.
    fn check(&self) -> Result<()> {
        let found = self.hashing.finish();
        if found == self.blob { Ok(()) } else { Err(self.mismatch(found.to_string())) }
    }

    fn mismatch(&self, found: String) -> Error {
        Error::Mismatch { what: name(self.blob), expected: self.blob.to_string(), found }
    }

    /// Everything in memory, checked. For blobs of at most [`PART_BYTES`].
    pub(super) async fn collect(mut self) -> Result<PutPayload> {
        let mut pieces = Vec::new();
        while let Some(piece) = self.next().await? {
            self.hash(&piece).await;
            pieces.push(piece);
        }
        self.check()?;
        Ok(pieces.into_iter().collect())
    }
}

/// An upload under way. Dropped before its end, as when the caller has gone, it is kept for when the sender comes again.
pub(super) struct Sending<S> {
    incoming: Incoming<S>,
    upload: Option<Upload>,
    parts: Parts,
    shelf: (Arc<Shelf>, Project),
}

impl<S> Drop for Sending<S> {
    fn drop(&mut self) {
        if let Some(upload) = self.upload.take() {
            let (shelf, project) = &self.shelf;
            shelf.keep(project, self.incoming.blob, upload, std::mem::take(&mut self.parts));
        }
    }
}

impl<S, E> Sending<S>
where
    S: Stream<Item = Result<Bytes, E>> + Send + Unpin,
    E: Into<Cause>,
{
    pub(super) fn new(incoming: Incoming<S>, upload: Upload, shelf: (Arc<Shelf>, Project)) -> Self {
        Self { incoming, upload: Some(upload), parts: Parts::new(), shelf }
    }

    /// Sends parts to a place of their own; what is complete and right appears under its name in one step.
    pub(super) async fn send(mut self, place: &str) -> Result<()> {
        let sent = self.parts(place).await;
        if matches!(sent, Err(Error::BrokenOff { .. })) {
            return sent;
        }
        let Some(mut upload) = self.upload.take() else { return sent };
        let doing = || format!("storing blob {}", self.incoming.blob.digest);
        let sent = match sent {
            Ok(()) => upload.parts.complete().await.map(drop).map_err(|e| Error::from_store(place, doing(), e)),
            Err(error) => Err(error),
        };
        let done = match sent {
            Ok(()) => Ok(()),
            // Somebody has ended it meanwhile, as a sweep does with those that are old.
            Err(Error::NotFound { what, place }) => Err(Error::Gone { what, place, start: upload.at() }),
            Err(error) => Err(error),
        };
        if done.is_err() {
            self.parts.abort_all();
            upload.abort().await;
        }
        done
    }

    async fn parts(&mut self, place: &str) -> Result<()> {
        let Self { incoming, upload: Some(upload), parts, .. } = self else { return Ok(()) };
        let doing = format!("storing blob {}", incoming.blob.digest);
        let done = |joined: Result<object_store::Result<()>, tokio::task::JoinError>| match joined {
            Ok(result) => result.map_err(|e| Error::from_store(place, doing.as_str(), e)),
            Err(lost) => Err(Error::Unavailable { place: place.into(), doing: doing.clone(), source: lost.into() }),
        };
        let (mut part, mut filled) = (Vec::new(), 0);
        while let Some(mut piece) = incoming.next().await? {
            // Parts of one size, since some stores demand it of all but the last.
            while filled + piece.len() >= upload.part_bytes {
                let end = piece.split_to(upload.part_bytes - filled);
                incoming.hash(&end).await;
                part.push(end);
                while parts.len() >= PARTS_IN_FLIGHT {
                    parts.join_next().await.map_or(Ok(()), &done)?;
                }
                parts.spawn(upload.parts.put_part(std::mem::take(&mut part).into_iter().collect::<PutPayload>()));
                upload.hashing = incoming.hashing.clone();
                filled = 0;
            }
            if !piece.is_empty() {
                incoming.hash(&piece).await;
                filled += piece.len();
                part.push(piece);
            }
        }
        incoming.check()?;
        if filled > 0 {
            parts.spawn(upload.parts.put_part(part.into_iter().collect()));
            upload.hashing = incoming.hashing.clone();
        }
        while let Some(joined) = parts.join_next().await {
            done(joined)?;
        }
        Ok(())
    }
}

fn name(blob: BlobRef) -> String {
    format!("blob {}", blob.digest)
}

/// The part size for a blob: as many as allowed, at least [`PART_BYTES`], in whole MiB.
fn part_bytes(size_bytes: u64) -> usize {
    let needed = size_bytes.div_ceil(PARTS_MAX).max(PART_BYTES).next_multiple_of(1 << 20);
    usize::try_from(needed).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_grow_so_that_the_largest_file_fits() {
        assert_eq!(part_bytes(PART_BYTES + 1), 8 << 20);
        let largest = crate::manifest::FILE_BYTES_MAX;
        assert!(largest.div_ceil(part_bytes(largest) as u64) <= 10_000);
    }
}
