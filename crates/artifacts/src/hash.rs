//! BLAKE3 over bytes, files and streams. Hashing of more than a few kilobytes leaves the async runtime.

use std::fs;
use std::io::Read;
use std::path::Path;

use attune_spec::id::Digest;
use bytes::Bytes;

use crate::BlobRef;
use crate::error::{Error, Result};

/// Size of the pieces in which files are read, hashed and sent.
pub const CHUNK_BYTES: usize = 1 << 20;

/// Under this size hashing takes well under 100 µs and stays on the runtime; moving it away would cost as much.
const INLINE_BYTES: usize = 128 << 10;

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

/// Digest and length of everything that `source` still gives.
pub(crate) fn reader(source: &mut impl Read) -> std::io::Result<BlobRef> {
    let mut hashing = Hashing::default();
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match source.read(&mut buffer)? {
            0 => return Ok(hashing.finish()),
            n => hashing.update(&buffer[..n]),
        }
    }
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

    #[test]
    fn the_digest_is_blake3() {
        // The empty input of the reference implementation's test vectors.
        assert_eq!(bytes(b"").hex(), "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262");
    }
}
