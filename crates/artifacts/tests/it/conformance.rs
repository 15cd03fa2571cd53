//! What every store must do, one test per promise and store. S3 joins when `ATTUNE_TEST_S3` names a bucket with a prefix
//! (`tests/services/s3.sh` starts a server and sets it); without it those tests say aloud that they were skipped.

use attune_artifacts::{BlobStore, Causes, Error, Kind, Manifest, Put, manifest::File};
use attune_spec::id::Project;
use bytes::Bytes;
use futures::future::join_all;
use futures::stream::{self, StreamExt as _};

use crate::support::{body, bytes, named, project};

/// An opened store and what keeps it alive.
struct Backend {
    store: BlobStore,
    /// Tests share a server, so each has projects of its own.
    project: Project,
    _folder: Option<tempfile::TempDir>,
}

impl Backend {
    async fn open(location: &str, folder: Option<tempfile::TempDir>) -> Self {
        let store = BlobStore::open(location).await.unwrap();
        Self { store, project: project(&format!("test-{}", uuid::Uuid::now_v7().simple())), _folder: folder }
    }

    async fn memory() -> Option<Self> {
        Some(Self::open("memory://", None).await)
    }

    async fn folder() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let location = format!("file://{}", folder.path().display());
        Some(Self::open(&location, Some(folder)).await)
    }

    async fn s3() -> Option<Self> {
        Self::bucket("").await
    }

    /// A part of the bucket whose server fails, loses answers and cuts bodies.
    async fn flaky_s3() -> Option<Self> {
        Self::bucket("/flaky").await
    }

    async fn bucket(below: &str) -> Option<Self> {
        match std::env::var("ATTUNE_TEST_S3") {
            Ok(location) => Some(Self::open(&format!("{location}{below}"), None).await),
            Err(_) => {
                println!("skipped: ATTUNE_TEST_S3 is not set; tests/services/s3.sh sets it");
                None
            }
        }
    }
}

macro_rules! on_every_store {
    ($($promise:ident,)*) => {
        on_every_store!(@store memory $($promise,)*);
        on_every_store!(@store folder $($promise,)*);
        on_every_store!(@store s3 $($promise,)*);
        on_every_store!(@store flaky_s3 $($promise,)*);
    };
    (@store $store:ident $($promise:ident,)*) => {
        mod $store {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $promise() {
                    if let Some(backend) = super::Backend::$store().await {
                        super::$promise(&backend).await;
                    }
                }
            )*
        }
    };
}

on_every_store! {
    bytes_come_back_as_they_went_in,
    wrong_bytes_are_refused_and_never_visible,
    a_sender_that_gives_up_leaves_nothing,
    a_put_that_is_dropped_leaves_nothing,
    equal_puts_at_once_make_one_object,
    a_digest_of_one_project_says_nothing_in_another,
    missing_names_each_blob_once_in_order,
    a_manifest_waits_for_its_blobs,
    equal_manifests_at_once_make_one_object,
    deleting_is_repeatable_and_hits_nothing_else,
    an_upload_that_broke_off_goes_on,
    a_read_begins_anywhere,
}

async fn an_upload_that_broke_off_goes_on(on: &Backend) {
    let (store, project) = (&on.store, &on.project);
    let all = bytes(21, 26 << 20);
    let blob = named(&all);
    let mut start = 0;
    for upto in [10 << 20, 20 << 20] {
        let broken = stream::iter([Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset))]);
        let some = body(&all.slice(start..upto), 1 << 20).map(|piece| piece.map_err(std::io::Error::other));
        let error = store.put_from(project, blob, start as u64, some.chain(broken).boxed()).await.unwrap_err();
        assert!(matches!(error, Error::BrokenOff { .. }), "{error}");
        start = store.kept(project, &[blob.digest]).await[&blob.digest] as usize;
        assert_eq!(start, upto >> 23 << 23, "whole parts are kept");
    }
    assert_eq!(store.blobs(project).await.unwrap(), []);
    let rest = body(&all.slice(start..), 1 << 20);
    assert_eq!(store.put_from(project, blob, start as u64, rest).await.unwrap(), Put::Stored);
    store.verify(project, blob).await.unwrap();
    assert!(store.kept(project, &[blob.digest]).await.is_empty());
}

async fn a_read_begins_anywhere(on: &Backend) {
    let (store, project) = (&on.store, &on.project);
    for len in [5000, 11 << 20] {
        let all = bytes(22, len);
        let blob = store.put_bytes(project, all.clone()).await.unwrap();
        for start in [0, 1, len / 2, len - 1, len] {
            let read = store.blob_from(project, blob, start as u64).await.unwrap().collect().await.unwrap();
            assert!(read == all.slice(start..), "{start} of {len}");
        }
    }
}

/// What only a bucket needs: nobody else ends what a killed process began there.
mod sweeps_of_s3 {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn old_uploads_are_ended() {
        // A part of the bucket of its own: it ends everybody's.
        let part = format!("/swept-{}", uuid::Uuid::now_v7().simple());
        let Some(on) = Backend::bucket(&part).await else { return };
        let (store, project, all) = (&on.store, &on.project, bytes(31, 20 << 20));
        let blob = named(&all);
        let broken = stream::iter([Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset))]);
        let some = body(&all.slice(..9 << 20), 1 << 20).map(|piece| piece.map_err(std::io::Error::other));
        store.put(project, blob, some.chain(broken).boxed()).await.unwrap_err();
        let start = store.kept(project, &[blob.digest]).await[&blob.digest];
        // Another process looks, and takes nothing that may go on; and everything once it is old.
        let other = BlobStore::open(store.place()).await.unwrap();
        assert_eq!(other.abort_unfinished(0).await.unwrap(), 0);
        assert_eq!(other.abort_unfinished(i64::MAX).await.unwrap(), 1);
        assert_eq!(other.abort_unfinished(i64::MAX).await.unwrap(), 0);
        // Whoever wants to go on fails in a way that may be repeated, and then begins anew.
        let rest = body(&all.slice(start as usize..), 1 << 20);
        let error = store.put_from(project, blob, start, rest).await.unwrap_err();
        assert!(error.retry(), "{error}");
        assert!(store.kept(project, &[blob.digest]).await.is_empty());
        store.put(project, blob, body(&all, 1 << 20)).await.unwrap();
        store.verify(project, blob).await.unwrap();
    }
}

async fn bytes_come_back_as_they_went_in(on: &Backend) {
    let (store, project) = (&on.store, &on.project);
    // Around the sizes of pieces and parts: nothing, one byte, one request, just over it, several uneven parts.
    for (len, piece) in
        [(0, 1), (1, 1), (70_000, 999), (8 << 20, 1 << 20), ((8 << 20) + 1, 3 << 20), (25_000_001, 77_777)]
    {
        let sent = bytes(len as u64, len);
        let blob = named(&sent);
        assert!(!store.has(project, blob).await.unwrap(), "{len}");
        assert_eq!(store.put(project, blob, body(&sent, piece)).await.unwrap(), Put::Stored, "{len}");
        assert!(store.has(project, blob).await.unwrap(), "{len}");
        assert_eq!(store.put(project, blob, body(&sent, piece)).await.unwrap(), Put::Present, "{len}");
        assert!(store.bytes(project, blob).await.unwrap() == sent, "{len}: other bytes came back");
        store.verify(project, blob).await.unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, "what was there before").unwrap();
    let sent = bytes(1, 3_000_000);
    let blob = store.put_bytes(project, sent.clone()).await.unwrap();
    store.read_to_file(project, blob, &path).await.unwrap();
    assert!(std::fs::read(&path).unwrap() == sent);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

async fn wrong_bytes_are_refused_and_never_visible(on: &Backend) {
    let (store, project) = (&on.store, &on.project);
    for len in [5_000, 18 << 20] {
        let right = bytes(2, len);
        let blob = named(&right);
        let mut flipped = right.to_vec();
        flipped[len / 2] ^= 1;
        let longer = [&right[..], b"!"].concat();
        for wrong in [flipped, right[..len - 1].to_vec(), longer, vec![]] {
            let error = store.put(project, blob, body(&wrong.into(), 100_000)).await.unwrap_err();
            assert!(
                matches!(&error, Error::Mismatch { what, .. } if *what == format!("blob {}", blob.digest)),
                "{error}"
            );
            assert!(error.retry());
            assert!(!store.has(project, blob).await.unwrap());
            assert!(matches!(store.blob(project, blob).await, Err(Error::NotFound { .. })));
        }
        // The right digest with a wrong length is another blob, and there is none.
        let mut long = blob;
        long.size_bytes += 1;
        assert!(matches!(store.put(project, long, body(&right, 100_000)).await, Err(Error::Mismatch { .. })));
        store.put(project, blob, body(&right, 100_000)).await.unwrap();
        assert!(!store.has(project, long).await.unwrap());
        assert!(matches!(store.bytes(project, long).await, Err(Error::Corrupt { .. })));
        // That it was asked for by a wrong length does not spoil it for those who know the right one.
        assert!(store.bytes(project, blob).await.unwrap() == right);
        assert!(store.has(project, blob).await.unwrap());
        store.delete_blob(project, &blob.digest).await.unwrap();
    }
    assert_eq!(store.blobs(project).await.unwrap(), []);
}

async fn a_sender_that_gives_up_leaves_nothing(on: &Backend) {
    let (store, project) = (&on.store, &on.project);
    let all = bytes(4, 20 << 20);
    let blob = named(&all);
    for sent in [0, 1000, 19 << 20] {
        let start = body(&all.slice(..sent), 1 << 20).map(|piece| piece.map_err(std::io::Error::other));
        let broken = start.chain(stream::iter([Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset))]));
        let error = store.put(project, blob, broken.boxed()).await.unwrap_err();
        assert!(matches!(error, Error::BrokenOff { .. }), "{error}");
        assert!(error.retry());
        assert!(!store.has(project, blob).await.unwrap());
    }
    assert_eq!(store.blobs(project).await.unwrap(), []);
}

async fn a_put_that_is_dropped_leaves_nothing(on: &Backend) {
    let (store, project) = (&on.store, &on.project);
    let all = bytes(5, 30 << 20);
    let blob = named(&all);
    let (sent, mut reached) = tokio::sync::oneshot::channel();
    let mut sent = Some(sent);
    // Most of it is sent, then the sender hangs.
    let start = body(&all.slice(..26 << 20), 1 << 20);
    let hanging = start.chain(stream::poll_fn(move |_| {
        if let Some(sent) = sent.take() {
            let _ = sent.send(());
        }
        std::task::Poll::<Option<Result<Bytes, Error>>>::Pending
    }));
    tokio::select! {
        put = store.put(project, blob, hanging.boxed()) => panic!("ended: {put:?}"),
        _ = &mut reached => {}
    }
    assert!(!store.has(project, blob).await.unwrap());
    assert_eq!(store.blobs(project).await.unwrap(), []);
    store.put(project, blob, body(&all, 1 << 20)).await.unwrap();
    assert_eq!(store.blobs(project).await.unwrap(), [blob]);
    store.verify(project, blob).await.unwrap();
}

async fn equal_puts_at_once_make_one_object(on: &Backend) {
    let (store, project) = (&on.store, &on.project);
    for len in [10_000, 17 << 20] {
        let all = bytes(6, len);
        let blob = named(&all);
        let puts = (0..6_usize).map(|i| {
            // One of the six is a liar who comes at the same time.
            let sent = if i == 3 { bytes(7, len) } else { all.clone() };
            async move { store.put(project, blob, body(&sent, 1 << 20)).await }
        });
        let results = join_all(puts).await;
        let stored = results.iter().enumerate().filter(|(i, _)| *i != 3);
        assert!(stored.clone().all(|(_, result)| result.is_ok()), "{results:?}");
        // The liar is told so, unless somebody was first and nothing of it was read.
        assert!(matches!(&results[3], Err(Error::Mismatch { .. }) | Ok(Put::Present)), "{:?}", results[3]);
        assert_eq!(store.blobs(project).await.unwrap(), [blob]);
        store.verify(project, blob).await.unwrap();
        store.delete_blob(project, &blob.digest).await.unwrap();
    }
}

async fn a_digest_of_one_project_says_nothing_in_another(on: &Backend) {
    let (store, mine) = (&on.store, &on.project);
    let theirs = project(&format!("{mine}-x"));
    let blob = store.put_bytes(&theirs, bytes(8, 2000)).await.unwrap();
    let manifest = manifest_of(&[("a", blob)]);
    store.put_manifest(&theirs, &manifest).await.unwrap();
    assert!(!store.has(mine, blob).await.unwrap());
    assert_eq!(store.missing(mine, &[blob]).await.unwrap(), [blob]);
    assert!(matches!(store.bytes(mine, blob).await, Err(Error::NotFound { .. })));
    assert!(matches!(store.manifest(mine, &manifest.digest()).await, Err(Error::NotFound { .. })));
    assert!(matches!(store.put_manifest(mine, &manifest).await, Err(Error::Refused { .. })));
    assert_eq!(store.blobs(mine).await.unwrap(), []);
    store.delete_blob(mine, &blob.digest).await.unwrap();
    store.verify(&theirs, blob).await.unwrap();
}

async fn missing_names_each_blob_once_in_order(on: &Backend) {
    let (store, project) = (&on.store, &on.project);
    let blobs: Vec<_> = (0..40).map(|i| named(&bytes(100 + i, 50))).collect();
    for i in (0..40).step_by(3) {
        store.put_bytes(project, bytes(100 + i, 50)).await.unwrap();
    }
    let asked: Vec<_> = blobs.iter().rev().chain(&blobs).copied().collect();
    let expected: Vec<_> = (0..40).rev().filter(|i| i % 3 != 0).map(|i| blobs[i]).collect();
    assert_eq!(store.missing(project, &asked).await.unwrap(), expected);
    let digests = |blobs: &[attune_artifacts::BlobRef]| blobs.iter().map(|blob| blob.digest).collect::<Vec<_>>();
    assert_eq!(store.missing_digests(project, &digests(&asked)).await.unwrap(), digests(&expected));
}

fn manifest_of(files: &[(&str, attune_artifacts::BlobRef)]) -> Manifest {
    let file = |(path, blob): &(&str, attune_artifacts::BlobRef)| File {
        path: (*path).to_owned(),
        size_bytes: blob.size_bytes,
        digest: blob.digest,
    };
    Manifest::new(Kind::Report, files.iter().map(file).collect(), Causes::default()).unwrap()
}

async fn a_manifest_waits_for_its_blobs(on: &Backend) {
    let (store, project) = (&on.store, &on.project);
    let (here, gone) = (bytes(10, 100), bytes(11, 100));
    let manifest = manifest_of(&[("a/here", named(&here)), ("b/gone", named(&gone))]);
    store.put_bytes(project, here).await.unwrap();
    let error = store.put_manifest(project, &manifest).await.unwrap_err();
    let Error::Refused { faults, .. } = &error else { panic!("{error}") };
    assert_eq!(faults.len(), 1);
    assert_eq!(faults[0].path.as_str(), "files[1].digest");
    assert!(faults[0].message.contains("the bytes of \"b/gone\", which are not stored"), "{error}");
    assert!(!store.has_manifest(project, &manifest.digest()).await.unwrap());
    store.put_bytes(project, gone).await.unwrap();
    store.put_manifest(project, &manifest).await.unwrap();
    assert!(store.has_manifest(project, &manifest.digest()).await.unwrap());
    assert_eq!(store.manifest(project, &manifest.digest()).await.unwrap(), manifest);
    assert_eq!(store.manifests(project).await.unwrap(), [manifest.digest()]);
}

async fn equal_manifests_at_once_make_one_object(on: &Backend) {
    let (store, project) = (&on.store, &on.project);
    let blob = store.put_bytes(project, bytes(12, 10)).await.unwrap();
    let manifest = manifest_of(&[("x", blob)]);
    for result in join_all((0..8).map(|_| store.put_manifest(project, &manifest))).await {
        result.unwrap();
    }
    assert_eq!(store.manifests(project).await.unwrap(), [manifest.digest()]);
    assert_eq!(store.manifest(project, &manifest.digest()).await.unwrap(), manifest);
}

async fn deleting_is_repeatable_and_hits_nothing_else(on: &Backend) {
    let (store, project) = (&on.store, &on.project);
    let one = store.put_bytes(project, bytes(13, 10)).await.unwrap();
    let two = store.put_bytes(project, bytes(14, 10)).await.unwrap();
    let manifest = manifest_of(&[("x", two)]);
    store.put_manifest(project, &manifest).await.unwrap();
    for _ in 0..2 {
        store.delete_blob(project, &one.digest).await.unwrap();
        assert_eq!(store.blobs(project).await.unwrap(), [two]);
    }
    store.delete_manifest(project, &manifest.digest()).await.unwrap();
    store.delete_manifest(project, &manifest.digest()).await.unwrap();
    assert!(matches!(store.manifest(project, &manifest.digest()).await, Err(Error::NotFound { .. })));
    store.verify(project, two).await.unwrap();
}
