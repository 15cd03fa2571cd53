//! The bytes of a blob on their way out, checked as they go.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::stream::{self, BoxStream, Stream, StreamExt as _};

use crate::BlobRef;
use crate::error::{Error, Result};
use crate::hash::{CHUNK_BYTES, Hashing};

/// A stream of a blob's bytes. The last piece is given out only after digest and length were found right, so whoever
/// has received as many bytes as the blob is long has received the right ones; an error ends the stream. A stream that
/// begins within the blob promises the length alone.
pub struct BlobBody {
    stream: BoxStream<'static, Result<Bytes>>,
}

impl std::fmt::Debug for BlobBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlobBody")
    }
}

impl Stream for BlobBody {
    type Item = Result<Bytes>;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.stream.poll_next_unpin(cx)
    }
}

/// Told once whether a blob that was read to its end is what its name says.
pub(super) type Verdict = Box<dyn FnOnce(bool) + Send>;

impl BlobBody {
    /// The bytes of `blob` from `start` on, which come as `raw`. Read from its start, the digest is checked as they come;
    /// a read that goes on from elsewhere is checked by its length, and whoever has the bytes before checks the whole.
    pub(super) fn new(
        raw: BoxStream<'static, Result<Bytes>>,
        blob: BlobRef,
        start: u64,
        place: &str,
        verdict: Verdict,
    ) -> Self {
        let place = place.to_owned();
        let hashing = (start == 0).then(Hashing::default);
        let state = Some((raw, hashing, start, verdict));
        let stream = stream::try_unfold(state, move |state| {
            let place = place.clone();
            async move {
                let Some((mut raw, mut hashing, before, verdict)) = state else { return Ok(None) };
                // Empty pieces must not be taken for the end.
                let piece = loop {
                    match raw.next().await {
                        Some(Ok(piece)) if piece.is_empty() => {}
                        Some(Err(error)) => {
                            if matches!(error, Error::Corrupt { .. }) {
                                verdict(false);
                            }
                            return Err(error);
                        }
                        other => break other.transpose()?,
                    }
                };
                let seen = before + piece.as_ref().map_or(0, |piece| piece.len() as u64);
                if let (Some(piece), Some(sofar)) = (&piece, hashing.take_if(|_| seen <= blob.size_bytes)) {
                    hashing = Some(sofar.absorb(piece.clone()).await);
                }
                match piece {
                    Some(piece) if seen < blob.size_bytes => Ok(Some((piece, Some((raw, hashing, seen, verdict))))),
                    piece => {
                        let more = raw.next().await.transpose()?.map_or(0, |piece| piece.len());
                        if seen != blob.size_bytes || more > 0 {
                            verdict(false);
                            let found = if more > 0 { "more bytes".into() } else { format!("{seen} bytes") };
                            return Err(corrupt(&place, blob, found));
                        }
                        if let Some(found) = hashing.map(|hashing| hashing.finish()) {
                            if found != blob {
                                verdict(false);
                                return Err(corrupt(&place, blob, found.to_string()));
                            }
                            verdict(true);
                        }
                        Ok(piece.map(|piece| (piece, None)))
                    }
                }
            }
        });
        Self { stream: stream.boxed() }
    }

    /// All bytes at once; for small blobs.
    ///
    /// # Errors
    /// As the stream's.
    pub async fn collect(mut self) -> Result<Bytes> {
        let mut all = Vec::new();
        while let Some(piece) = self.next().await.transpose()? {
            all.extend_from_slice(&piece);
        }
        Ok(all.into())
    }
}

pub(super) fn corrupt(place: &str, blob: BlobRef, found: String) -> Error {
    Error::Corrupt { what: format!("blob {}", blob.digest), place: place.to_owned(), expected: blob.to_string(), found }
}

/// A local file from `start` on, in large pieces. The store's own stream reads 8 KiB per hop to a blocking thread.
pub(super) fn pieces(file: fs::File, start: u64, place: String) -> BoxStream<'static, Result<Bytes>> {
    let seek = (start > 0).then_some(start);
    stream::try_unfold((file, seek), move |(mut file, seek)| {
        let place = place.clone();
        async move {
            let read = tokio::task::spawn_blocking(move || {
                if let Some(start) = seek {
                    file.seek(SeekFrom::Start(start))?;
                }
                let mut piece = Vec::with_capacity(CHUNK_BYTES);
                let read = file.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut piece);
                read.map(|_| (piece, file))
            });
            match read.await.expect("reading does not panic and is not cancelled") {
                Ok((piece, _)) if piece.is_empty() => Ok(None),
                Ok((piece, file)) => Ok(Some((Bytes::from(piece), (file, None)))),
                Err(source) => Err(Error::Unavailable { place, doing: "reading a blob".into(), source: source.into() }),
            }
        }
    })
    .boxed()
}
