//! What a store does when the disk, the connection or the sender misbehaves (F22, F26, F32–F35, A29, A30).

use std::sync::Arc;

use attune_spec::id::Project;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::{ObjectStore, ObjectStoreExt as _};

use super::testing::{Damage, Faulty};
use super::{BlobStore, Put};
use crate::error::{Error, Result};
use crate::manifest::{BlobRef, File, Kind, Manifest};
use crate::{Causes, hash};

/// A store over `inner` that fails on request.
fn faulty<S: ObjectStore>(inner: S) -> (BlobStore, Arc<Faulty<S>>) {
    let faults = Arc::new(Faulty::new(inner));
    (BlobStore::over(faults.clone(), "s3://bucket/artifacts"), faults)
}

fn project() -> Project {
    Project::default()
}

fn numbered(len: usize) -> Bytes {
    (0..len).map(|i| (i % 251) as u8).collect::<Vec<_>>().into()
}

fn named(bytes: &Bytes) -> BlobRef {
    BlobRef { digest: hash::bytes(bytes), size_bytes: bytes.len() as u64 }
}

fn body(bytes: &Bytes) -> impl futures::Stream<Item = Result<Bytes>> + Send + Unpin + use<> {
    stream::iter(vec![Ok(bytes.clone())])
}

#[tokio::test]
async fn every_bit_flip_of_a_body_is_found() {
    let (store, faults) = faulty(InMemory::new());
    let bytes = numbered(3000);
    let blob = store.put_bytes(&project(), bytes.clone()).await.unwrap();
    for damage in (0..bytes.len()).step_by(97).chain([bytes.len() - 1]).map(Damage::Flip) {
        faults.damage(damage, 1);
        let mut seen = 0;
        let mut stream = store.blob(&project(), blob).await.unwrap();
        let error = loop {
            match stream.next().await {
                Some(Ok(piece)) => seen += piece.len(),
                Some(Err(error)) => break error,
                None => panic!("{damage:?} was not found"),
            }
        };
        assert!(seen < bytes.len(), "{damage:?}: all bytes were given out before the check");
        assert!(stream.next().await.is_none(), "{damage:?}: the stream goes on after its error");
        let Error::Corrupt { what, place, expected, .. } = &error else { panic!("{damage:?}: {error}") };
        assert_eq!((what, place.as_str()), (&format!("blob {}", blob.digest), "s3://bucket/artifacts"));
        assert_eq!(*expected, blob.to_string());
        // A corrupt blob counts as missing, so that the next push mends it, until a read finds it whole.
        assert!(!store.has(&project(), blob).await.unwrap(), "{damage:?}");
        store.verify(&project(), blob).await.unwrap();
        assert!(store.has(&project(), blob).await.unwrap(), "{damage:?}");
    }
}

#[tokio::test]
async fn a_read_that_comes_out_wrong_is_repeated_before_it_fails() {
    let (store, faults) = faulty(InMemory::new());
    let bytes = numbered(2500);
    let blob = store.put_bytes(&project(), bytes.clone()).await.unwrap();
    faults.damage(Damage::Flip(2499), 2);
    assert_eq!(store.bytes(&project(), blob).await.unwrap(), bytes);
    faults.damage(Damage::Flip(2499), 3);
    assert!(matches!(store.bytes(&project(), blob).await, Err(Error::Corrupt { .. })));

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out");
    faults.damage(Damage::Flip(7), 3);
    assert!(matches!(store.read_to_file(&project(), blob, &path).await, Err(Error::Corrupt { .. })));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a failed read left a file");
    store.read_to_file(&project(), blob, &path).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

#[tokio::test]
async fn corrupt_bytes_are_mended_by_the_next_push() {
    let (store, faults) = faulty(InMemory::new());
    let bytes = numbered(100);
    let blob = store.put_bytes(&project(), bytes.clone()).await.unwrap();
    faults.damage(Damage::Flip(0), 3);
    store.bytes(&project(), blob).await.unwrap_err();
    assert_eq!(store.missing(&project(), &[blob]).await.unwrap(), [blob]);
    assert_eq!(store.put(&project(), blob, body(&bytes)).await.unwrap(), Put::Stored);
    assert_eq!(store.missing(&project(), &[blob]).await.unwrap(), []);
}

#[tokio::test]
async fn a_full_store_is_named_and_shows_nothing_half_written() {
    let (store, faults) = faulty(InMemory::new());
    for bytes in [numbered(10), numbered(20 << 20)] {
        let blob = named(&bytes);
        faults.full(true);
        let error = store.put(&project(), blob, body(&bytes)).await.unwrap_err();
        assert!(matches!(&error, Error::Full { place, .. } if place == "s3://bucket/artifacts"), "{error}");
        assert!(error.to_string().starts_with("s3://bucket/artifacts is full; free some space there"), "{error}");
        assert!(!error.retry());
        assert!(!store.has(&project(), blob).await.unwrap());
        assert_eq!(store.blobs(&project()).await.unwrap(), []);
        faults.full(false);
        assert_eq!(store.put(&project(), blob, body(&bytes)).await.unwrap(), Put::Stored);
        store.delete_blob(&project(), &blob.digest).await.unwrap();
    }
    let file = File { path: "a".into(), size_bytes: 1, digest: hash::bytes(b"a") };
    let manifest = Manifest::new(Kind::Report, vec![file], Causes::default()).unwrap();
    store.put_bytes(&project(), Bytes::from_static(b"a")).await.unwrap();
    faults.full(true);
    assert!(matches!(store.put_manifest(&project(), &manifest).await, Err(Error::Full { .. })));
    faults.full(false);
    assert!(!store.has_manifest(&project(), &manifest.digest()).await.unwrap());
}

#[tokio::test]
async fn what_is_there_is_not_sent_again() {
    let (store, faults) = faulty(InMemory::new());
    let bytes = numbered(9 << 20);
    let blob = store.put_bytes(&project(), bytes.clone()).await.unwrap();
    let puts = faults.puts();
    assert_eq!(store.put(&project(), blob, body(&bytes)).await.unwrap(), Put::Present);
    assert_eq!(faults.puts(), puts);
}

#[tokio::test]
async fn a_corrupt_manifest_object_is_found_and_mended_by_the_next_put() {
    let folder = tempfile::tempdir().unwrap();
    let objects = Arc::new(LocalFileSystem::new_with_prefix(folder.path()).unwrap());
    let store = BlobStore::over(objects.clone(), "the folder");
    let blob = store.put_bytes(&project(), Bytes::from_static(b"x")).await.unwrap();
    let file = File { path: "x".into(), size_bytes: 1, digest: blob.digest };
    let manifest = Manifest::new(Kind::Report, vec![file], Causes::default()).unwrap();
    store.put_manifest(&project(), &manifest).await.unwrap();
    store.put_manifest(&project(), &manifest).await.unwrap();
    let digest = manifest.digest();
    let hex = digest.hex();
    let key = object_store::path::Path::from(format!("projects/default/manifests/{}/{hex}", &hex[..2]));
    // All 1-bit damages are other bytes, and so is a longer, a shorter and a huge object.
    let whole = manifest.bytes().to_vec();
    let flipped = (0..whole.len()).map(|i| {
        let mut bytes = whole.clone();
        bytes[i] ^= 1 << (i % 8);
        bytes
    });
    let others =
        [whole[1..].to_vec(), [whole.as_slice(), b" "].concat(), vec![b'{'; crate::manifest::MANIFEST_BYTES_MAX + 1]];
    for bytes in flipped.chain(others) {
        objects.put(&key, bytes.into()).await.unwrap();
        assert!(matches!(store.manifest(&project(), &digest).await, Err(Error::Corrupt { .. })));
    }
    store.put_manifest(&project(), &manifest).await.unwrap();
    assert_eq!(store.manifest(&project(), &digest).await.unwrap(), manifest);
}
