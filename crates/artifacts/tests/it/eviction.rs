//! A cache with a bound: what was used longest ago goes, what is in use stays.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use attune_artifacts::{BlobStore, Cache, Cached, Causes, Error, Kind, Manifest, Source, Unpack, manifest::File};
use attune_spec::id::{Digest, Project};
use futures::future::join_all;
use proptest::prelude::*;

use crate::support::{bytes, tree};

/// Artifacts of one file each, in memory, whose pulls are counted.
struct Artifacts {
    store: BlobStore,
    made: Vec<Manifest>,
    pulls: AtomicUsize,
}

#[async_trait]
impl Source for Artifacts {
    async fn pull(&self, project: &Project, digest: &Digest, into: &mut Unpack) -> Result<(), Error> {
        self.pulls.fetch_add(1, Ordering::SeqCst);
        tokio::task::yield_now().await;
        self.store.pull(project, digest, into).await
    }
}

impl Artifacts {
    async fn new(sizes: &[usize]) -> Self {
        let store = BlobStore::open("memory://").await.unwrap();
        let mut made = Vec::new();
        for (i, size) in sizes.iter().enumerate() {
            let blob = store.put_bytes(&Project::default(), bytes(i as u64, *size)).await.unwrap();
            let file = File { path: "file".into(), size_bytes: blob.size_bytes, digest: blob.digest };
            let manifest = Manifest::new(Kind::Report, vec![file], Causes::default()).unwrap();
            store.put_manifest(&Project::default(), &manifest).await.unwrap();
            made.push(manifest);
        }
        Self { store, made, pulls: AtomicUsize::new(0) }
    }

    async fn fetch(&self, cache: &Cache, i: usize) -> Cached {
        cache.fetch(&Project::default(), &self.made[i].digest(), self).await.unwrap()
    }

    async fn has(&self, cache: &Cache, i: usize) -> bool {
        cache.get(&Project::default(), &self.made[i].digest()).await.unwrap().is_some()
    }

    /// Bytes of an entry.
    fn size(&self, i: usize) -> u64 {
        self.made[i].size_bytes() + self.made[i].bytes().len() as u64
    }

    fn entry(&self, root: &Path, i: usize) -> std::path::PathBuf {
        root.join("default").join(self.made[i].digest().hex())
    }
}

/// The bytes of all entries, and of nothing else: what was half there is gone.
fn total(root: &Path) -> u64 {
    let files = tree(root).into_iter().filter(|path| !path.ends_with('/') && !path.starts_with(".filling"));
    files.map(|path| fs::metadata(root.join(path)).unwrap().len()).sum()
}

/// Makes an entry one that was used so many seconds ago.
fn age(entry: &Path, seconds: u64) {
    let manifest = fs::File::open(entry.join("manifest.json")).unwrap();
    manifest.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 - seconds)).unwrap();
}

#[tokio::test]
async fn what_was_used_longest_ago_goes_first() {
    let dir = tempfile::tempdir().unwrap();
    let from = Artifacts::new(&[1000, 1000, 1000, 1000]).await;
    let bound = 3 * from.size(0) + 50;
    let cache = Cache::bounded(dir.path(), Some(bound)).await.unwrap();
    for (i, seconds) in [(0, 30), (1, 20), (2, 10)] {
        from.fetch(&cache, i).await;
        age(&from.entry(dir.path(), i), seconds);
    }
    // The oldest is used again, so the one after it goes.
    assert!(from.has(&cache, 0).await);
    from.fetch(&cache, 3).await;
    let there: Vec<bool> = join_all((0..4).map(|i| from.has(&cache, i))).await;
    assert_eq!(there, [true, false, true, true]);
    assert!(total(dir.path()) <= bound);
    // The order outlives the process, and a lower bound is kept as soon as somebody looks.
    drop(cache);
    for (i, seconds) in [(0, 1), (2, 2), (3, 3)] {
        age(&from.entry(dir.path(), i), seconds);
    }
    let cache = Cache::bounded(dir.path(), Some(from.size(0) + 50)).await.unwrap();
    assert!(cache.trim().await.unwrap() >= 2 * from.size(0) - 50);
    let there: Vec<bool> = join_all((0..4).map(|i| from.has(&cache, i))).await;
    assert_eq!(there, [true, false, false, false]);
}

#[tokio::test]
async fn what_is_in_use_stays_and_goes_when_it_is_let_go() {
    let dir = tempfile::tempdir().unwrap();
    let from = Artifacts::new(&[1000, 1000, 5000]).await;
    let cache = Cache::bounded(dir.path(), Some(1200)).await.unwrap();
    let held = from.fetch(&cache, 0).await;
    let also = held.clone();
    drop(held);
    // Another process that holds one is asked by the same lock.
    let elsewhere = Cache::open(dir.path()).await.unwrap();
    let theirs = from.fetch(&elsewhere, 1).await;
    // One that is larger than the bound comes all the same.
    let large = from.fetch(&cache, 2).await;
    for cached in [&also, &theirs, &large] {
        cached.verify().await.unwrap();
    }
    assert_eq!(cache.trim().await.unwrap(), 0);
    drop((also, theirs));
    cache.trim().await.unwrap();
    assert_eq!([from.has(&cache, 0).await, from.has(&cache, 1).await], [false, false]);
    large.verify().await.unwrap();
    drop(large);
    cache.trim().await.unwrap();
    assert_eq!(total(dir.path()), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_at_once_get_each_artifact_whole_and_once() {
    let dir = tempfile::tempdir().unwrap();
    let from = Arc::new(Artifacts::new(&[20_000; 8]).await);
    let cache = Cache::bounded(dir.path(), Some(3 * from.size(0) + 100)).await.unwrap();
    // Everybody wants the same: one pull.
    join_all((0..16).map(|_| from.fetch(&cache, 0))).await;
    assert_eq!(from.pulls.load(Ordering::SeqCst), 1);
    // Everybody wants something, holds it a little, reads all of it, and more goes than stays.
    let tasks = (0..12).map(|who: usize| {
        let (from, cache) = (Arc::clone(&from), cache.clone());
        async move {
            for round in 0..25 {
                let i = (who * 7 + round * 3) % 8;
                let cached = from.fetch(&cache, i).await;
                tokio::task::yield_now().await;
                cached.verify().await.unwrap();
            }
        }
    });
    let mut set = tokio::task::JoinSet::new();
    tasks.for_each(|task| drop(set.spawn(task)));
    while let Some(done) = set.join_next().await {
        done.unwrap();
    }
    cache.trim().await.unwrap();
    assert!(total(dir.path()) <= 3 * from.size(0) + 100);
    let filling = tree(dir.path()).into_iter().filter(|path| path.starts_with(".filling") && path.ends_with("file"));
    assert_eq!(filling.count(), 0, "something half-filled is left");
}

#[derive(Debug, Clone)]
enum Act {
    Fetch(usize),
    Hold(usize),
    Release(usize),
    Trim,
    Reopen,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => (0..6_usize).prop_map(Act::Fetch),
        3 => (0..6_usize).prop_map(Act::Hold),
        2 => (0..6_usize).prop_map(Act::Release),
        1 => Just(Act::Trim),
        1 => Just(Act::Reopen),
    ];
    prop::collection::vec(act, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// After every fetch there is no more than the bound, or than what is held and what just came; what is held is whole.
    #[test]
    fn the_bound_is_kept_but_for_what_is_held(acts in acts(), bound in 200_u64..9000) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let from = Artifacts::new(&[10, 500, 900, 1500, 2500, 4000]).await;
            let mut cache = Cache::bounded(dir.path(), Some(bound)).await.unwrap();
            let (mut held, mut known) = (BTreeMap::new(), 0);
            for act in acts {
                let held_bytes = |held: &BTreeMap<usize, Cached>| held.keys().map(|i| from.size(*i)).sum::<u64>();
                match act {
                    Act::Fetch(i) => {
                        let came = from.fetch(&cache, i).await;
                        let others: u64 = held.keys().filter(|j| **j != i).map(|j| from.size(*j)).sum();
                        if from.pulls.load(Ordering::SeqCst) > known {
                            prop_assert!(total(dir.path()) <= bound.max(others + from.size(i)), "{act:?}");
                        }
                        came.verify().await.unwrap();
                    }
                    Act::Hold(i) => drop(held.insert(i, from.fetch(&cache, i).await)),
                    Act::Release(i) => drop(held.remove(&i)),
                    Act::Trim => {}
                    Act::Reopen => cache = Cache::bounded(dir.path(), Some(bound)).await.unwrap(),
                }
                known = from.pulls.load(Ordering::SeqCst);
                cache.trim().await.unwrap();
                prop_assert!(total(dir.path()) <= bound.max(held_bytes(&held)), "{act:?}: {}", total(dir.path()));
                for cached in held.values() {
                    cached.verify().await.unwrap();
                }
            }
            Ok(())
        })?;
    }
}
