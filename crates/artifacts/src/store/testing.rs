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
    /// The body ends before this byte of the object although the announced length is right.
    Cut(usize),
    /// The connection breaks before this byte of the object.
    Break(usize),
    /// The lowest bit of this byte of the object is flipped.
    Flip(usize),
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
    lost_answers: Arc<AtomicUsize>,
    unfinished: Arc<AtomicUsize>,
    reads: Mutex<Vec<Range<u64>>>,
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
            lost_answers: Arc::default(),
            unfinished: Arc::default(),
            reads: Mutex::default(),
        }
    }

    /// Carry out the next so many creations and completions, and answer none of them.
    pub(crate) fn lose_answers(&self, answers: usize) {
        self.lost_answers.store(answers, Ordering::SeqCst);
    }

    /// Uploads in parts that were neither completed nor aborted.
    pub(crate) fn unfinished(&self) -> usize {
        self.unfinished.load(Ordering::SeqCst)
    }

    /// The ranges that were read, in the order asked.
    pub(crate) fn reads(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut *self.reads.lock().unwrap())
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

fn take_one(from: &AtomicUsize) -> bool {
    from.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
}

fn broken() -> Error {
    Error::Generic { store: "faulty", source: Box::new(io::Error::from(io::ErrorKind::ConnectionReset)) }
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
        let put = self.inner.put_opts(location, payload, opts).await?;
        if take_one(&self.lost_answers) { Err(broken()) } else { Ok(put) }
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.puts.fetch_add(1, Ordering::SeqCst);
        let inner = self.inner.put_multipart_opts(location, opts).await?;
        self.unfinished.fetch_add(1, Ordering::SeqCst);
        let (full, lost_answers, unfinished) = (self.full.clone(), self.lost_answers.clone(), self.unfinished.clone());
        Ok(Box::new(FaultyUpload { inner, full, lost_answers, unfinished }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let head = options.head;
        let mut found = self.inner.get_opts(location, options).await?;
        if head {
            return Ok(found);
        }
        self.reads.lock().unwrap().push(found.range.clone());
        if !take_one(&self.damaged_reads) {
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
        let (start, len) = (found.range.start as usize, bytes.len());
        let within = |at: usize| at.saturating_sub(start).min(len);
        let mut ending = Vec::new();
        match damage {
            Some(Damage::Cut(at)) => bytes.truncate(within(at)),
            Some(Damage::Break(at)) => {
                bytes.truncate(within(at));
                ending.push(Err(broken()));
            }
            Some(Damage::Flip(at)) if found.range.contains(&(at as u64)) => bytes[within(at)] ^= 1,
            Some(Damage::Flip(_)) | None => {}
        }
        let pieces: Vec<_> = bytes
            .chunks(100_000.min(bytes.len().div_ceil(3).max(1)))
            .map(|piece| Ok(Bytes::copy_from_slice(piece)))
            .chain(ending)
            .collect();
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
    lost_answers: Arc<AtomicUsize>,
    unfinished: Arc<AtomicUsize>,
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
        let done = self.inner.complete().await?;
        self.unfinished.fetch_sub(1, Ordering::SeqCst);
        if take_one(&self.lost_answers) { Err(broken()) } else { Ok(done) }
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await?;
        // One that was completed is not there any more.
        let _ = self.unfinished.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        Ok(())
    }
}
