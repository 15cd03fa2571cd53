//! Reading an object in ranges: several on their way at once, in order, each of which goes on from the byte where it was
//! when it is cut.
//!
//! A reader always has one range on its way. Further ones it asks for only while there is room for them among those of all
//! readers, so that memory is bounded by the readers' number times one range, and a fixed number of ranges beside.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::error::{Error, Result};

/// Size of a range: small enough to be held whole, large enough that its request does not count.
pub(super) const RANGE_BYTES: u64 = 4 << 20;
/// Ranges of one reader on their way at once; one connection alone rarely fills a line to an object store.
const RANGES_IN_FLIGHT: usize = 4;
/// Ranges beyond the first of each reader, of all readers of a store.
pub(super) const RANGES_AHEAD: usize = 64;
/// Tries in a row that bring not one byte more.
const STALLS_MAX: u32 = 4;
/// Tries of one range in all.
const TRIES_MAX: u32 = 50;
/// Wait before the next try after one that brought nothing; doubles with each.
const STALL_WAIT: Duration = Duration::from_millis(50);

/// An object of which ranges are read.
#[derive(Debug, Clone)]
pub(super) struct Object {
    pub(super) objects: Arc<dyn ObjectStore>,
    pub(super) key: Path,
    pub(super) place: String,
}

/// What came of a range before it was all.
struct Cut {
    error: Option<object_store::Error>,
}

impl Object {
    /// The pieces of `range`, of which `first` may be under way already.
    async fn range(&self, range: Range<u64>, first: Option<Body>) -> Result<Vec<Bytes>> {
        let (mut at, mut pieces, mut body) = (range.start, Vec::new(), first);
        let (mut stalls, mut wait) = (0, STALL_WAIT);
        for _ in 0..TRIES_MAX {
            let before = at;
            let cut = self.go_on(&mut at, range.end, body.take(), &mut pieces).await;
            if at >= range.end {
                return Ok(pieces);
            }
            stalls = if at > before { 0 } else { stalls + 1 };
            let error = cut.error.map(|error| Error::from_store(&self.place, "reading a blob", error));
            match error {
                Some(error) if !error.retry() || stalls >= STALLS_MAX => return Err(error),
                // The store says that it sent everything and has not, again and again.
                None if stalls >= STALLS_MAX => return Err(self.short(&range, at)),
                error => {
                    let error = error.map(|error| error.to_string());
                    tracing::warn!(place = self.place, key = %self.key, at, ?error, "a read was cut; going on from there");
                }
            }
            if stalls > 0 {
                tokio::time::sleep(wait).await;
                wait *= 2;
            }
        }
        Err(self.short(&range, at))
    }

    async fn go_on(&self, at: &mut u64, end: u64, body: Option<Body>, pieces: &mut Vec<Bytes>) -> Cut {
        let mut body = match body {
            Some(body) => body,
            None => match self.objects.get_opts(&self.key, bounded(*at..end)).await {
                Ok(found) => found.into_stream(),
                Err(error) => return Cut { error: Some(error) },
            },
        };
        while *at < end {
            match body.next().await {
                None => break,
                Some(Err(error)) => return Cut { error: Some(error) },
                Some(Ok(mut piece)) => {
                    // More than was asked for is nothing that the digest would forgive.
                    piece.truncate(usize::try_from(end - *at).unwrap_or(usize::MAX));
                    *at += piece.len() as u64;
                    pieces.push(piece);
                }
            }
        }
        Cut { error: None }
    }

    fn short(&self, range: &Range<u64>, at: u64) -> Error {
        Error::Corrupt {
            what: format!("object {}", self.key),
            place: self.place.clone(),
            expected: format!("bytes {} to {}", range.start, range.end),
            found: format!("none from {at} on"),
        }
    }
}

type Body = BoxStream<'static, object_store::Result<Bytes>>;

/// A read of these bytes.
pub(super) fn bounded(range: Range<u64>) -> GetOptions {
    GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() }
}

/// A range on its way: a set of one task, which ends with it.
struct Asked {
    task: JoinSet<Result<Vec<Bytes>>>,
    _room: Option<OwnedSemaphorePermit>,
}

struct Reading {
    object: Object,
    room: Arc<Semaphore>,
    /// What has not been asked for yet.
    left: Range<u64>,
    first: Option<(Range<u64>, Body)>,
    asked: VecDeque<Asked>,
    ready: VecDeque<Bytes>,
}

impl Reading {
    /// Asks for as much as may be on its way.
    fn ask(&mut self) {
        while self.asked.len() < RANGES_IN_FLIGHT {
            let room = if self.asked.is_empty() {
                None
            } else {
                let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else { return };
                Some(room)
            };
            let (range, body) = match self.first.take() {
                Some((range, body)) => (range, Some(body)),
                None if self.left.is_empty() => return,
                None => {
                    let range = self.left.start..self.left.end.min(self.left.start + RANGE_BYTES);
                    self.left.start = range.end;
                    (range, None)
                }
            };
            let object = self.object.clone();
            let mut task = JoinSet::new();
            task.spawn(async move { object.range(range, body).await });
            self.asked.push_back(Asked { task, _room: room });
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Ok(Some(piece));
            }
            self.ask();
            let Some(front) = self.asked.front_mut() else { return Ok(None) };
            let joined = front.task.join_next().await.unwrap_or_else(|| Ok(Ok(Vec::new())));
            let pieces = joined.unwrap_or_else(|lost| {
                let (place, doing) = (self.object.place.clone(), "reading a blob".to_owned());
                Err(Error::Unavailable { place, doing, source: lost.into() })
            })?;
            self.asked.pop_front();
            self.ready.extend(pieces);
        }
    }
}

/// The bytes of `object` from the start of `first`, whose body has begun, up to `end`.
pub(super) fn read(
    object: Object,
    first: (Range<u64>, Body),
    end: u64,
    room: Arc<Semaphore>,
) -> BoxStream<'static, Result<Bytes>> {
    let left = first.0.end..end;
    let (asked, ready) = (VecDeque::new(), VecDeque::new());
    let reading = Reading { object, room, left, first: Some(first), asked, ready };
    stream::try_unfold(reading, |mut reading| async move { Ok(reading.next().await?.map(|piece| (piece, reading))) })
        .boxed()
}
