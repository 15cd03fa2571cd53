//! The bytes of a blob on their way in: hashed as they come, published only when digest and length are right.

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt as _, PutPayload};
use tokio::task::JoinSet;

use crate::BlobRef;
use crate::error::{Cause, Error, Result};
use crate::hash::Hashing;

/// Blobs up to this size go in one request. S3's smallest part is 5 MiB.
pub(super) const PART_BYTES: u64 = 8 << 20;
/// S3 takes at most 10,000 parts; larger blobs get larger parts.
const PARTS_MAX: u64 = 9_000;
/// Parts on their way at once. With the one being filled this bounds the memory of an upload to five parts.
const PARTS_IN_FLIGHT: usize = 4;

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
        Self { blob, body, hashing: Hashing::default() }
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        let piece = self.body.next().await.transpose();
        let piece = piece.map_err(|e| Error::BrokenOff { what: name(self.blob), source: e.into() })?;
        let Some(piece) = piece else { return Ok(None) };
        let seen = self.hashing.size_bytes().saturating_add(piece.len() as u64);
        if seen > self.blob.size_bytes {
            return Err(self.mismatch("more bytes".into()));
        }
        self.hashing = std::mem::take(&mut self.hashing).absorb(piece.clone()).await;
        Ok(Some(piece))
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
            pieces.push(piece);
        }
        self.check()?;
        Ok(pieces.into_iter().collect())
    }

    /// Sends parts to a place of their own; what is complete and right appears under `key` in one step.
    pub(super) async fn send(mut self, objects: &dyn ObjectStore, key: &Path, place: &str) -> Result<()> {
        let doing = format!("storing blob {}", self.blob.digest);
        let failed = |e| Error::from_store(place, doing.as_str(), e);
        let mut upload = objects.put_multipart(key).await.map_err(failed)?;
        let sent = match self.send_parts(upload.as_mut(), place).await {
            Ok(()) => upload.complete().await.map(drop).map_err(failed),
            Err(error) => Err(error),
        };
        if sent.is_err() {
            // The error above is the one to report; what an abort leaves behind is reaped by the store's own rule.
            let _ = upload.abort().await;
        }
        sent
    }

    async fn send_parts(&mut self, upload: &mut dyn MultipartUpload, place: &str) -> Result<()> {
        let doing = format!("storing blob {}", self.blob.digest);
        let done = |joined: Result<object_store::Result<()>, tokio::task::JoinError>| match joined {
            Ok(result) => result.map_err(|e| Error::from_store(place, doing.as_str(), e)),
            Err(lost) => Err(Error::Unavailable { place: place.into(), doing: doing.clone(), source: lost.into() }),
        };
        let part_bytes = part_bytes(self.blob.size_bytes);
        let mut sending = JoinSet::new();
        let (mut part, mut filled) = (Vec::new(), 0);
        while let Some(mut piece) = self.next().await? {
            // Parts of one size, since some stores demand it of all but the last.
            while filled + piece.len() >= part_bytes {
                part.push(piece.split_to(part_bytes - filled));
                while sending.len() >= PARTS_IN_FLIGHT {
                    sending.join_next().await.map_or(Ok(()), &done)?;
                }
                sending.spawn(upload.put_part(std::mem::take(&mut part).into_iter().collect()));
                filled = 0;
            }
            if !piece.is_empty() {
                filled += piece.len();
                part.push(piece);
            }
        }
        self.check()?;
        if filled > 0 {
            sending.spawn(upload.put_part(part.into_iter().collect()));
        }
        while let Some(joined) = sending.join_next().await {
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
