//! BLAKE3 over bytes, files and streams. Hashing of more than a few kilobytes leaves the async runtime.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use attune_spec::id::Digest;
use bytes::Bytes;

use crate::BlobRef;
use crate::error::{Error, Result};

/// Size of the pieces in which files are read, hashed and sent.
pub const CHUNK_BYTES: usize = 1 << 20;

/// Under this size hashing takes well under 100 µs and stays on the runtime; moving it away would cost as much.
const INLINE_BYTES: usize = 128 << 10;

/// Pieces of a file that wait to be hashed, at most.
const PIECES_AHEAD: usize = 2;

/// The digest of `bytes`.
pub fn bytes(bytes: &[u8]) -> Digest {
    Digest::from_bytes(*blake3::hash(bytes).as_bytes())
}

/// Digest and length of a local file, read to its end. Blocks: call it from a blocking thread.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read.
pub fn file(path: &Path) -> Result<BlobRef> {
    let mut source = fs::File::open(path).map_err(|e| Error::io("open", path, e))?;
    reader(&mut source).map_err(|e| Error::io("read", path, e))
}

/// Digest and length of everything that `source` still gives. Once there is more than a piece, another thread hashes while this one reads:
/// copying out of the system's memory takes as long as hashing does.
pub(crate) fn reader(source: &mut impl Read) -> std::io::Result<BlobRef> {
    let mut hashing = Hashing::default();
    let first = piece(source, Vec::new())?;
    hashing.update(&first);
    if first.len() < CHUNK_BYTES {
        return Ok(hashing.finish());
    }
    thread::scope(|scope| {
        let (full, to_hash) = mpsc::sync_channel::<Vec<u8>>(PIECES_AHEAD);
        let (hashed, spare) = mpsc::channel();
        let hasher = thread::Builder::new().name("hash".to_owned()).spawn_scoped(scope, move || {
            for piece in to_hash {
                hashing.update(&piece);
                // Nobody takes it once the source has ended.
                let _ = hashed.send(piece);
            }
            hashing
        })?;
        loop {
            let next = piece(source, spare.try_recv().unwrap_or_default())?;
            let last = next.len() < CHUNK_BYTES;
            full.send(next).expect("the hasher takes pieces until there are no more");
            if last {
                break;
            }
        }
        drop(full);
        Ok(hasher.join().expect("hashing does not panic").finish())
    })
}

/// The next [`CHUNK_BYTES`] of `source`, or what is left of it, in the room of `into`.
fn piece(source: &mut impl Read, mut into: Vec<u8>) -> std::io::Result<Vec<u8>> {
    into.clear();
    source.take(CHUNK_BYTES as u64).read_to_end(&mut into)?;
    Ok(into)
}

/// A digest in the making, with the number of bytes seen.
#[derive(Debug, Clone, Default)]
pub struct Hashing {
    hasher: blake3::Hasher,
    size_bytes: u64,
}

impl Hashing {
    /// Adds `bytes`, on this thread.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.size_bytes += bytes.len() as u64;
    }

    /// Adds `bytes`, on a blocking thread when there are many.
    pub(crate) async fn absorb(mut self, bytes: Bytes) -> Self {
        if bytes.len() <= INLINE_BYTES {
            self.update(&bytes);
            return self;
        }
        let work = tokio::task::spawn_blocking(move || {
            self.update(&bytes);
            self
        });
        work.await.expect("hashing does not panic and is not cancelled")
    }

    /// Bytes seen so far.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The digest and length of what was added.
    pub fn finish(&self) -> BlobRef {
        BlobRef { digest: Digest::from_bytes(*self.hasher.finalize().as_bytes()), size_bytes: self.size_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pieces_and_whole_give_one_digest() {
        let data: Vec<u8> = (0..600_000u32).map(|i| (i * 7) as u8).collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        fs::write(&path, &data).unwrap();
        let expected = BlobRef { digest: bytes(&data), size_bytes: data.len() as u64 };
        assert_eq!(file(&path).unwrap(), expected);
        let mut hashing = Hashing::default();
        for piece in data.chunks(200_000) {
            hashing = hashing.absorb(Bytes::copy_from_slice(piece)).await;
        }
        assert_eq!(hashing.finish(), expected);
    }

    /// What gives as little at a time as it likes, and fails where it is told to.
    struct Drip<'d> {
        left: &'d [u8],
        fails: bool,
    }

    impl Read for Drip<'_> {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            if self.left.is_empty() && self.fails {
                return Err(std::io::Error::other("planted"));
            }
            let n = into.len().min(self.left.len()).min(70_001);
            let (now, left) = self.left.split_at(n);
            into[..n].copy_from_slice(now);
            self.left = left;
            Ok(n)
        }
    }

    #[test]
    fn what_two_threads_read_and_hash_is_whole_and_fails_where_its_source_does() {
        let data: Vec<u8> = (0..5 * CHUNK_BYTES as u32 + 3).map(|i| (i * 11) as u8).collect();
        for length in [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, data.len()] {
            let left = &data[..length];
            let found = reader(&mut Drip { left, fails: false }).unwrap();
            assert_eq!(found, BlobRef { digest: bytes(left), size_bytes: length as u64 });
            assert_eq!(reader(&mut Drip { left, fails: true }).unwrap_err().to_string(), "planted");
        }
    }

    #[test]
    fn the_digest_is_blake3() {
        // The empty input of the reference implementation's test vectors.
        assert_eq!(bytes(b"").hex(), "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262");
    }
}
