//! The bytes of a blob on their way out, checked as they go.

use std::fs;
use std::io::Read as _;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::stream::{self, BoxStream, Stream, StreamExt as _};
use object_store::{GetResult, GetResultPayload};

use crate::BlobRef;
use crate::error::{Error, Result};
use crate::hash::{CHUNK_BYTES, Hashing};

/// A stream of a blob's bytes. The last piece is given out only after digest and length were found right, so whoever
/// has received as many bytes as the blob is long has received the right ones; an error ends the stream.
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
    /// Checks the announced length at once and the bytes as they come.
    pub(super) fn new(found: GetResult, blob: BlobRef, place: &str, verdict: Verdict) -> Result<Self> {
        if found.meta.size != blob.size_bytes {
            verdict(false);
            return Err(corrupt(place, blob, format!("{} bytes", found.meta.size)));
        }
        let raw = match found.payload {
            GetResultPayload::File(file, _) => pieces(file, place.to_owned()),
            GetResultPayload::Stream(stream) => {
                let place = place.to_owned();
                stream.map(move |piece| piece.map_err(|e| Error::from_store(&place, "reading a blob", e))).boxed()
            }
        };
        let place = place.to_owned();
        let state = Some((raw, Hashing::default(), verdict));
        let stream = stream::try_unfold(state, move |state| {
            let place = place.clone();
            async move {
                let Some((mut raw, hashing, verdict)) = state else { return Ok(None) };
                // Empty pieces must not be taken for the end.
                let piece = loop {
                    match raw.next().await.transpose()? {
                        Some(piece) if piece.is_empty() => {}
                        other => break other,
                    }
                };
                let seen = hashing.size_bytes() + piece.as_ref().map_or(0, |piece| piece.len() as u64);
                let hashing = match &piece {
                    Some(piece) if seen <= blob.size_bytes => hashing.absorb(piece.clone()).await,
                    _ => hashing,
                };
                match piece {
                    Some(piece) if seen < blob.size_bytes => Ok(Some((piece, Some((raw, hashing, verdict))))),
                    piece => {
                        let more = raw.next().await.transpose()?.map_or(0, |piece| piece.len());
                        if seen != blob.size_bytes || more > 0 {
                            verdict(false);
                            let found = if more > 0 { "more bytes".into() } else { format!("{seen} bytes") };
                            return Err(corrupt(&place, blob, found));
                        }
                        let found = hashing.finish();
                        if found != blob {
                            verdict(false);
                            return Err(corrupt(&place, blob, found.to_string()));
                        }
                        verdict(true);
                        Ok(piece.map(|piece| (piece, None)))
                    }
                }
            }
        });
        Ok(Self { stream: stream.boxed() })
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

fn corrupt(place: &str, blob: BlobRef, found: String) -> Error {
    Error::Corrupt { what: format!("blob {}", blob.digest), place: place.to_owned(), expected: blob.to_string(), found }
}

/// A local file in large pieces. The store's own stream reads 8 KiB per hop to a blocking thread.
fn pieces(file: fs::File, place: String) -> BoxStream<'static, Result<Bytes>> {
    stream::try_unfold(file, move |mut file| {
        let place = place.clone();
        async move {
            let read = tokio::task::spawn_blocking(move || {
                let mut piece = Vec::with_capacity(CHUNK_BYTES);
                let read = file.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut piece);
                read.map(|_| (piece, file))
            });
            match read.await.expect("reading does not panic and is not cancelled") {
                Ok((piece, _)) if piece.is_empty() => Ok(None),
                Ok((piece, file)) => Ok(Some((Bytes::from(piece), file))),
                Err(source) => Err(Error::Unavailable { place, doing: "reading a blob".into(), source: source.into() }),
            }
        }
    })
    .boxed()
}
