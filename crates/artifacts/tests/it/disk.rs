//! Real disks: flipped bits, a process killed in the middle, no room left (F4, F22, F26).

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use attune_artifacts::{BlobStore, Bundle, Cache, Causes, Error, Put, Source as _, Unpack};
use attune_spec::id::Project;
use bytes::Bytes;
use futures::stream::{self, StreamExt as _};

use crate::support::{body, bytes, model_folder, named, tree};

async fn store(at: &Path) -> BlobStore {
    BlobStore::open(at.to_str().unwrap()).await.unwrap()
}

#[tokio::test]
async fn a_bit_flipped_on_the_disk_is_found_and_mended_by_the_next_push() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path()).await;
    let project = Project::default();
    let content = bytes(1, 200_000);
    let blob = store.put_bytes(&project, content.clone()).await.unwrap();
    let hex = blob.digest.hex();
    let path = dir.path().join(format!("projects/default/blobs/{}/{hex}", &hex[..2]));
    for at in [0, 1, 77_777, 199_999] {
        let mut stored = fs::read(&path).unwrap();
        stored[at] ^= 0x10;
        fs::write(&path, stored).unwrap();
        let error = store.verify(&project, blob).await.unwrap_err();
        assert!(matches!(&error, Error::Corrupt { place, .. } if place == store.place()), "{error}");
        assert_eq!(store.put(&project, blob, body(&content, 1000)).await.unwrap(), Put::Stored);
        assert!(fs::read(&path).unwrap() == content);
    }
    // Cut and lengthened files are found by a question alone.
    for len in [0, 199_999, 200_001] {
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len).unwrap();
        assert_eq!(store.missing(&project, &[blob]).await.unwrap(), [blob]);
        assert_eq!(store.put(&project, blob, body(&content, 1000)).await.unwrap(), Put::Stored);
    }
    store.verify(&project, blob).await.unwrap();
}

const ROLE: &str = "ATTUNE_TEST_UPLOAD_TO";

/// The process that runs this test starts itself again as one that uploads and is killed half-way.
#[tokio::test]
async fn a_process_killed_while_it_uploads_leaves_nothing_visible() {
    let all = bytes(2, 24 << 20);
    let (project, blob) = (Project::default(), named(&all));
    if let Some(at) = std::env::var_os(ROLE) {
        // Two parts of three are on the disk when the sender hangs.
        let start = body(&all.slice(..20 << 20), 1 << 20);
        let hang = stream::poll_fn(|_| {
            println!("half-way");
            std::task::Poll::<Option<Result<Bytes, Error>>>::Pending
        });
        store(Path::new(&at)).await.put(&project, blob, start.chain(hang).boxed()).await.unwrap();
        unreachable!("the body has no end");
    }
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["disk::a_process_killed_while_it_uploads_leaves_nothing_visible", "--exact", "--nocapture"])
        .env(ROLE, dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("half-way")), "the child ended early");
    child.kill().unwrap();
    child.wait().unwrap();
    let left: u64 = tree(dir.path())
        .iter()
        .filter(|path| !path.ends_with('/'))
        .map(|path| fs::metadata(dir.path().join(path)).unwrap().len())
        .sum();
    assert!(left > 0, "nothing was on the disk: the test killed too early");
    let store = store(dir.path()).await;
    assert!(!store.has(&project, blob).await.unwrap());
    assert_eq!(store.blobs(&project).await.unwrap(), []);
    assert!(matches!(store.bytes(&project, blob).await, Err(Error::NotFound { .. })));
    // What it wrote takes no room for long.
    let files: Vec<_> = tree(dir.path()).into_iter().filter(|path| !path.ends_with('/')).collect();
    assert_eq!(files, [".writers"]);
    store.put(&project, blob, body(&all, 1 << 20)).await.unwrap();
    store.verify(&project, blob).await.unwrap();
}

#[tokio::test]
async fn a_store_that_is_opened_twice_keeps_its_uploads() {
    let dir = tempfile::tempdir().unwrap();
    let one = store(dir.path()).await;
    let (project, all) = (Project::default(), bytes(7, 24 << 20));
    let (blob, opened) = (named(&all), std::sync::Arc::new(tokio::sync::Notify::new()));
    let (start, rest) = (body(&all.slice(..20 << 20), 1 << 20), body(&all.slice(20 << 20..), 1 << 20));
    let (half_way, wait) = (std::sync::Arc::new(tokio::sync::Notify::new()), opened.clone());
    let signal = half_way.clone();
    let pause = stream::once(async move {
        signal.notify_one();
        wait.notified().await;
        Ok(Bytes::new())
    });
    let put = one.put(&project, blob, start.chain(pause).chain(rest).boxed());
    let other = async {
        half_way.notified().await;
        let two = store(dir.path()).await;
        opened.notify_one();
        two
    };
    let (put, two) = tokio::join!(put, other);
    assert_eq!(put.unwrap(), Put::Stored);
    two.verify(&project, blob).await.unwrap();
}

/// A file system of 1 MiB, unmounted when dropped.
struct Small(PathBuf);

impl Small {
    /// Nothing when this process may not mount, which is said aloud.
    fn mount(at: &Path) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(at).output();
        if mounted.as_ref().is_ok_and(|output| output.status.success()) {
            return Some(Self(at.to_owned()));
        }
        println!("skipped: a tmpfs cannot be mounted here ({mounted:?})");
        None
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_full_disk_under_the_store_is_named_and_shows_nothing_half_written() {
    let dir = tempfile::tempdir().unwrap();
    let Some(small) = Small::mount(&dir.path().join("small")) else { return };
    let store = store(&small.0).await;
    let project = Project::default();
    // In one request and in parts.
    for len in [2 << 20, 20 << 20] {
        let content = bytes(3, len);
        let error = store.put(&project, named(&content), body(&content, 100_000)).await.unwrap_err();
        assert!(
            matches!(&error, Error::Full { place, .. } if Path::new(place) == small.0.canonicalize().unwrap()),
            "{error:?}"
        );
        assert!(!store.has(&project, named(&content)).await.unwrap());
        assert_eq!(store.blobs(&project).await.unwrap(), []);
    }
    // What was written in vain takes no room: there is as much as before.
    let content = bytes(4, 900_000);
    let blob = store.put_bytes(&project, content.clone()).await.unwrap();
    assert_eq!(store.bytes(&project, blob).await.unwrap(), content);
    // When there is room again the same push goes through.
    let more = bytes(5, 500_000);
    assert!(matches!(store.put_bytes(&project, more.clone()).await, Err(Error::Full { .. })));
    store.delete_blob(&project, &blob.digest).await.unwrap();
    store.put_bytes(&project, more).await.unwrap();
}

#[tokio::test]
async fn a_full_disk_under_a_cache_or_a_pull_leaves_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let Some(small) = Small::mount(&dir.path().join("small")) else { return };
    let from = store(&dir.path().join("store")).await;
    let project = Project::default();
    let folder = dir.path().join("model");
    model_folder(&folder);
    let little = Bundle::read(&folder, None).await.unwrap().push(&from, &project, Causes::default()).await.unwrap();
    fs::write(folder.join("big.txt"), bytes(6, 1_500_000)).unwrap();
    let big = Bundle::read(&folder, None).await.unwrap().push(&from, &project, Causes::default()).await.unwrap();

    let cache = Cache::open(small.0.join("cache")).await.unwrap();
    let cached = cache.fetch(&project, &little.digest(), &from).await.unwrap();
    let error = cache.fetch(&project, &big.digest(), &from).await.unwrap_err();
    assert!(matches!(&error, Error::Full { place, .. } if place.starts_with(small.0.to_str().unwrap())), "{error:?}");
    assert!(cache.get(&project, &big.digest()).await.unwrap().is_none());
    cached.verify().await.unwrap();

    let dest = small.0.join("out");
    let mut unpack = Unpack::to(&dest, big.digest()).await.unwrap();
    assert!(matches!(from.pull(&project, &big.digest(), &mut unpack).await, Err(Error::Full { .. })));
    drop(unpack);
    assert!(
        !tree(&small.0).iter().any(|path| path.contains("big.txt") || path.contains("partial")),
        "{:?}",
        tree(&small.0)
    );
}
