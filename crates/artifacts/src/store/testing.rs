//! An object store that fails on request, for the tests of this room.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

/// What is done to the bytes of the next reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Damage {
    /// The body ends after so many bytes although the announced length is right.
    CutAt(usize),
    /// The lowest bit of this byte is flipped.
    FlipAt(usize),
}

/// Wraps a store and injects faults.
#[derive(Debug)]
pub(crate) struct Faulty<S> {
    inner: S,
    ignore_conditions: AtomicBool,
    full: Arc<AtomicBool>,
    damage: Mutex<Option<Damage>>,
    damaged_reads: AtomicUsize,
    puts: AtomicUsize,
}

impl<S> Faulty<S> {
    pub(crate) fn new(inner: S) -> Self {
        Self {
            inner,
            ignore_conditions: AtomicBool::default(),
            full: Arc::default(),
            damage: Mutex::default(),
            damaged_reads: AtomicUsize::default(),
            puts: AtomicUsize::default(),
        }
    }

    /// Accept every conditional put, as some servers do.
    pub(crate) fn ignore_conditions(&self, on: bool) {
        self.ignore_conditions.store(on, Ordering::SeqCst);
    }

    /// Answer every write with ENOSPC.
    pub(crate) fn full(&self, on: bool) {
        self.full.store(on, Ordering::SeqCst);
    }

    /// Damage the next `reads` reads.
    pub(crate) fn damage(&self, damage: Damage, reads: usize) {
        *self.damage.lock().unwrap() = Some(damage);
        self.damaged_reads.store(reads, Ordering::SeqCst);
    }

    /// Puts that went through to the store below.
    pub(crate) fn puts(&self) -> usize {
        self.puts.load(Ordering::SeqCst)
    }

    fn check_space(&self) -> Result<()> {
        if self.full.load(Ordering::SeqCst) { Err(no_space()) } else { Ok(()) }
    }
}

fn no_space() -> Error {
    Error::Generic { store: "faulty", source: Box::new(io::Error::from_raw_os_error(28)) }
}

impl<S: std::fmt::Display> std::fmt::Display for Faulty<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Faulty({})", self.inner)
    }
}

#[async_trait]
impl<S: ObjectStore> ObjectStore for Faulty<S> {
    async fn put_opts(&self, location: &Path, payload: PutPayload, mut opts: PutOptions) -> Result<PutResult> {
        self.check_space()?;
        if self.ignore_conditions.load(Ordering::SeqCst) {
            opts.mode = PutMode::Overwrite;
        }
        self.puts.fetch_add(1, Ordering::SeqCst);
        self.inner.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.puts.fetch_add(1, Ordering::SeqCst);
        let inner = self.inner.put_multipart_opts(location, opts).await?;
        Ok(Box::new(FaultyUpload { inner, full: self.full.clone() }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let head = options.head;
        let mut found = self.inner.get_opts(location, options).await?;
        let take = |n: usize| n.checked_sub(1);
        if head || self.damaged_reads.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_err() {
            return Ok(found);
        }
        let damage = *self.damage.lock().unwrap();
        let meta = found.meta.clone();
        let payload = std::mem::replace(&mut found.payload, GetResultPayload::Stream(stream::empty().boxed()));
        let whole = GetResult {
            payload,
            meta,
            range: found.range.clone(),
            attributes: Default::default(),
            extensions: Default::default(),
        };
        let mut bytes = whole.bytes().await?.to_vec();
        match damage {
            Some(Damage::CutAt(at)) => bytes.truncate(at),
            Some(Damage::FlipAt(at)) => bytes[at] ^= 1,
            None => {}
        }
        let pieces: Vec<_> = bytes.chunks(1000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        found.payload = GetResultPayload::Stream(stream::iter(pieces).boxed());
        Ok(found)
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.inner.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct FaultyUpload {
    inner: Box<dyn MultipartUpload>,
    full: Arc<AtomicBool>,
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        if self.full.load(Ordering::SeqCst) {
            return Box::pin(std::future::ready(Err(no_space())));
        }
        self.inner.put_part(data)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.inner.complete().await
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}
