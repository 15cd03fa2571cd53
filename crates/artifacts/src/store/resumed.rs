//! Reads and uploads that are cut and go on where they were (F32, F33, F35), and what is left of those that do not.

use std::sync::Arc;

use attune_spec::id::Project;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use object_store::memory::InMemory;

use super::ranges::RANGE_BYTES;
use super::testing::{Damage, Faulty};
use super::upload::PART_BYTES;
use super::{BlobStore, Put};
use crate::error::{Error, Result};
use crate::manifest::{BlobRef, File, Kind, Manifest};
use crate::{Causes, hash};

const MIB: usize = 1 << 20;

struct On {
    store: BlobStore,
    faults: Arc<Faulty<InMemory>>,
    project: Project,
    bytes: Bytes,
    blob: BlobRef,
}

impl On {
    fn new(len: usize) -> Self {
        let faults = Arc::new(Faulty::new(InMemory::new()));
        let store = BlobStore::over(faults.clone(), "s3://bucket/artifacts");
        let bytes: Bytes = (0..len).map(|i| (i % 251) as u8).collect::<Vec<_>>().into();
        let blob = BlobRef { digest: hash::bytes(&bytes), size_bytes: len as u64 };
        Self { store, faults, project: Project::default(), bytes, blob }
    }

    async fn stored(len: usize) -> Self {
        let on = Self::new(len);
        on.store.put_bytes(&on.project, on.bytes.clone()).await.unwrap();
        on.faults.reads();
        on
    }

    async fn read(&self, start: usize) -> Result<Vec<u8>> {
        let mut body = self.store.blob_from(&self.project, self.blob, start as u64).await?;
        let mut all = Vec::new();
        while let Some(piece) = body.next().await.transpose()? {
            all.extend_from_slice(&piece);
        }
        Ok(all)
    }

    /// The bytes from `start` up to `end`, then the sender breaks off.
    async fn send(&self, start: usize, end: usize) -> Result<Put> {
        let pieces: Vec<_> =
            self.bytes[start..end].chunks(300_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let ending = (end < self.bytes.len()).then(|| Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset)));
        let body = stream::iter(pieces.into_iter().chain(ending)).boxed();
        self.store.put_from(&self.project, self.blob, start as u64, body).await
    }

    async fn kept(&self) -> u64 {
        let kept = self.store.kept(&self.project, &[self.blob.digest]).await;
        kept.get(&self.blob.digest).copied().unwrap_or_default()
    }
}

#[tokio::test(start_paused = true)]
async fn a_cut_read_goes_on_from_the_byte_where_it_was() {
    for len in [3000, 11 * MIB + 5] {
        let on = On::stored(len).await;
        let at = len / 3;
        for damage in [Damage::Cut(at), Damage::Break(at)] {
            on.faults.damage(damage, 1);
            assert!(on.read(0).await.unwrap() == on.bytes, "{damage:?}");
            let reads = on.faults.reads();
            let end = (RANGE_BYTES as usize).min(len).min(reads[0].end as usize);
            if at < end {
                assert!(reads.contains(&(at as u64..end as u64)), "{damage:?}: {reads:?}");
            }
            assert!(on.store.has(&on.project, on.blob).await.unwrap());
        }
        // Cut again and again, it comes forward each time.
        on.faults.damage(Damage::Break(0), 3);
        assert!(on.read(0).await.unwrap() == on.bytes);
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_stays_short_is_an_error_and_ends() {
    let on = On::stored(3000).await;
    for damage in [Damage::Cut(1000), Damage::Break(1000)] {
        on.faults.damage(damage, usize::MAX);
        let error = on.read(0).await.unwrap_err();
        match damage {
            // The store says that this is all: something is wrong with what it keeps.
            Damage::Cut(_) => assert!(matches!(error, Error::Corrupt { .. }), "{error}"),
            _ => assert!(matches!(error, Error::Unavailable { .. }), "{error}"),
        }
        assert!(on.faults.reads().len() < 10, "it tries for ever");
        on.faults.damage(damage, 0);
        on.store.verify(&on.project, on.blob).await.unwrap();
    }
}

#[tokio::test]
async fn a_large_blob_is_read_in_ranges_and_from_anywhere() {
    let len = 19 * MIB + 7;
    let on = On::stored(len).await;
    for start in [0, 1, RANGE_BYTES as usize, len - 1, len] {
        assert!(on.read(start).await.unwrap() == on.bytes[start..], "from {start}");
    }
    on.faults.reads();
    on.read(0).await.unwrap();
    let mut reads = on.faults.reads();
    reads.sort_by_key(|range| range.start);
    assert_eq!(reads.len(), 5);
    assert!(reads.windows(2).all(|pair| pair[0].end == pair[1].start), "{reads:?}");
    // Several are asked for before the first has been taken, and no more than that.
    let mut body = on.store.blob(&on.project, on.blob).await.unwrap();
    body.next().await.unwrap().unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    let ahead = on.faults.reads().len();
    assert!((3..=5).contains(&ahead), "{ahead}");
    // A flipped bit in a later range is found.
    on.faults.damage(Damage::Flip(13 * MIB), usize::MAX);
    assert!(matches!(on.read(0).await, Err(Error::Corrupt { .. })));
}

#[tokio::test]
async fn many_readers_do_not_wait_for_those_that_stand_still() {
    let on = On::stored(24 * MIB).await;
    let mut standing = Vec::new();
    for _ in 0..30 {
        let mut body = on.store.blob(&on.project, on.blob).await.unwrap();
        body.next().await.unwrap().unwrap();
        standing.push(body);
    }
    assert!(on.read(0).await.unwrap() == on.bytes);
    assert!(standing.remove(0).collect().await.is_ok());
}

#[tokio::test]
async fn an_upload_goes_on_with_what_was_not_stored() {
    let part = PART_BYTES as usize;
    let on = On::new(3 * part + 1000);
    assert_eq!(on.kept().await, 0);
    assert!(matches!(on.send(0, 2 * part + 500).await, Err(Error::BrokenOff { .. })));
    // Whole parts are kept, and nothing is visible of them.
    assert_eq!(on.kept().await, 2 * PART_BYTES);
    assert_eq!(on.store.blobs(&on.project).await.unwrap(), []);
    // Another project knows nothing of it.
    let other = Project::new("other").unwrap();
    assert!(on.store.kept(&other, &[on.blob.digest]).await.is_empty());
    // Elsewhere it cannot go on, and trying so does no harm.
    for start in [1, part, 2 * part + 500] {
        let error = on.send(start, on.bytes.len()).await.unwrap_err();
        assert!(matches!(error, Error::Gone { .. }) && error.retry(), "{error}");
    }
    assert!(matches!(on.send(2 * part, 3 * part + 1).await, Err(Error::BrokenOff { .. })));
    assert_eq!(on.kept().await, 3 * PART_BYTES);
    assert_eq!(on.send(3 * part, on.bytes.len()).await.unwrap(), Put::Stored);
    assert_eq!((on.kept().await, on.faults.unfinished()), (0, 0));
    on.store.verify(&on.project, on.blob).await.unwrap();
}

#[tokio::test]
async fn a_wrong_start_is_found_at_the_end_and_not_kept() {
    let part = PART_BYTES as usize;
    let on = On::new(2 * part);
    let mut wrong = on.bytes.to_vec();
    wrong[100] ^= 1;
    let start = stream::iter([Ok(Bytes::from(wrong).slice(..part)), Err(std::io::Error::other("gone"))]).boxed();
    on.store.put(&on.project, on.blob, start).await.unwrap_err();
    assert_eq!(on.kept().await, PART_BYTES);
    assert!(matches!(on.send(part, 2 * part).await, Err(Error::Mismatch { .. })));
    assert_eq!((on.kept().await, on.faults.unfinished()), (0, 0));
    assert_eq!(on.send(0, 2 * part).await.unwrap(), Put::Stored);
}

#[tokio::test]
async fn a_put_that_is_dropped_is_kept_too() {
    let part = PART_BYTES as usize;
    let on = On::new(2 * part + 9);
    let hanging = stream::iter([Ok::<_, Error>(on.bytes.slice(..part + 5))]).chain(stream::pending()).boxed();
    tokio::select! {
        put = on.store.put(&on.project, on.blob, hanging) => panic!("ended: {put:?}"),
        () = tokio::time::sleep(std::time::Duration::from_secs(2)) => {}
    }
    assert_eq!(on.kept().await, PART_BYTES);
    assert_eq!(on.send(part, on.bytes.len()).await.unwrap(), Put::Stored);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_left_of_uploads_that_nobody_goes_on_with() {
    let part = PART_BYTES as usize;
    let on = On::new(2 * part);
    on.send(0, 1000).await.unwrap_err();
    tokio::task::yield_now().await;
    assert_eq!(on.faults.unfinished(), 0, "there was nothing worth to be kept");
    on.send(0, part + 1).await.unwrap_err();
    assert_eq!((on.kept().await, on.faults.unfinished()), (PART_BYTES, 1));
    // Of two of the same blob the farther one is kept.
    let on = On::new(3 * part);
    on.send(0, 2 * part + 1).await.unwrap_err();
    on.send(0, part + 2).await.unwrap_err();
    assert_eq!(on.kept().await, 2 * PART_BYTES);
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!(on.faults.unfinished(), 1);
    on.store.abort_unfinished(0).await.unwrap();
    assert_eq!(on.kept().await, 2 * PART_BYTES);
    tokio::time::sleep(std::time::Duration::from_secs(16 * 60)).await;
    assert_eq!(on.store.abort_unfinished(0).await.unwrap(), 0);
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!((on.kept().await, on.faults.unfinished()), (0, 0));
    // Parts that cannot be stored take the upload with them.
    on.faults.full(true);
    assert!(matches!(on.send(0, on.bytes.len()).await, Err(Error::Full { .. })));
    assert_eq!((on.kept().await, on.faults.unfinished()), (0, 0));
}

#[tokio::test]
async fn a_lost_answer_is_no_failure() {
    for len in [9 * MIB, 20 * MIB] {
        let on = On::new(len);
        on.faults.lose_answers(1);
        assert_eq!(on.send(0, len).await.unwrap(), Put::Stored);
        on.store.verify(&on.project, on.blob).await.unwrap();
    }
    let on = On::stored(100).await;
    let file = File { path: "a".into(), size_bytes: 100, digest: on.blob.digest };
    let manifest = Manifest::new(Kind::Report, vec![file], Causes::default()).unwrap();
    on.faults.lose_answers(1);
    on.store.put_manifest(&on.project, &manifest).await.unwrap();
    assert_eq!(on.store.manifest(&on.project, &manifest.digest()).await.unwrap(), manifest);
}
