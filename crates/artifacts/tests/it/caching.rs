//! The node's cache: filled once, whole or not at all, mended when it is damaged.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use attune_artifacts::{BlobStore, Bundle, Cache, Causes, Error, Manifest, Source, Unpack};
use attune_spec::id::{Digest, Project};
use futures::future::join_all;

use crate::support::{model_folder, named, project, tree};

/// A store that counts its pulls and can be made to break off or lie.
struct Counting {
    store: BlobStore,
    pulls: AtomicUsize,
    /// Fail after the manifest in the first so many pulls.
    failures: AtomicUsize,
}

#[async_trait]
impl Source for Counting {
    async fn pull(&self, project: &Project, digest: &Digest, into: &mut Unpack) -> Result<(), Error> {
        self.pulls.fetch_add(1, Ordering::SeqCst);
        tokio::task::yield_now().await;
        if self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
            let manifest = self.store.manifest(project, digest).await?;
            into.begin(manifest.into()).await?;
            let source = std::io::Error::from(std::io::ErrorKind::ConnectionReset).into();
            return Err(Error::BrokenOff { what: "the artifact".into(), source });
        }
        self.store.pull(project, digest, into).await
    }
}

/// A source with one model in it, below `dir`.
async fn source(dir: &Path) -> (Counting, Manifest) {
    let folder = dir.join("model");
    model_folder(&folder);
    let store = BlobStore::open("memory://").await.unwrap();
    let bundle = Bundle::read(&folder, None).await.unwrap();
    let manifest = bundle.push(&store, &Project::default(), Causes::default()).await.unwrap();
    (Counting { store, pulls: AtomicUsize::new(0), failures: AtomicUsize::new(0) }, manifest)
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_want_one_artifact_fetch_it_once() {
    let dir = tempfile::tempdir().unwrap();
    let (source, manifest) = source(dir.path()).await;
    let cache = Cache::open(dir.path().join("cache")).await.unwrap();
    let (project, digest) = (Project::default(), manifest.digest());
    assert!(cache.get(&project, &digest).await.unwrap().is_none());
    let all = join_all((0..12).map(|_| cache.fetch(&project, &digest, &source))).await;
    assert_eq!(source.pulls.load(Ordering::SeqCst), 1);
    for cached in all {
        let cached = cached.unwrap();
        assert_eq!(**cached.manifest(), manifest);
        for file in manifest.files() {
            let path = cached.dir().join(&file.path);
            assert_eq!(named(&fs::read(&path).unwrap()), file.blob());
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o222, 0, "{} is writable", file.path);
        }
        cached.verify().await.unwrap();
    }
    // The next process finds it without asking anybody.
    drop(cache);
    let cache = Cache::open(dir.path().join("cache")).await.unwrap();
    cache.fetch(&project, &digest, &source).await.unwrap();
    assert_eq!(source.pulls.load(Ordering::SeqCst), 1);
    cache.remove(&project, &digest).await.unwrap();
    cache.remove(&project, &digest).await.unwrap();
    assert!(cache.get(&project, &digest).await.unwrap().is_none());
}

#[tokio::test]
async fn a_fetch_that_breaks_off_leaves_nothing_and_can_be_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let (source, manifest) = source(dir.path()).await;
    let root = dir.path().join("cache");
    let cache = Cache::open(&root).await.unwrap();
    let (project, digest) = (Project::default(), manifest.digest());
    source.failures.store(1, Ordering::SeqCst);
    assert!(matches!(cache.fetch(&project, &digest, &source).await, Err(Error::BrokenOff { .. })));
    assert!(
        !tree(&root).iter().any(|path| path.contains("config.json") || path.starts_with("default")),
        "{:?}",
        tree(&root)
    );
    cache.fetch(&project, &digest, &source).await.unwrap();
    // Another project's artifact of the same name is not this one's.
    assert!(matches!(cache.fetch(&self::project("other"), &digest, &source).await, Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn a_damaged_entry_is_found_and_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let (source, manifest) = source(dir.path()).await;
    let cache = Cache::open(dir.path().join("cache")).await.unwrap();
    let (project, digest) = (Project::default(), manifest.digest());
    type Damage = fn(&Path);
    let writable = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    let damages: [(&str, Damage); 4] = [
        ("a file is cut", |entry| {
            let path = entry.join("files/config.json");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            fs::write(path, "{").unwrap();
        }),
        ("a file is gone", |entry| fs::remove_file(entry.join("files/tokenizer.json")).unwrap()),
        ("the manifest is another's", |entry| fs::write(entry.join("manifest.json"), "{}").unwrap()),
        ("a file became a link", |entry| {
            let path = entry.join("files/config.json");
            fs::remove_file(&path).unwrap();
            std::os::unix::fs::symlink("tokenizer.json", path).unwrap();
        }),
    ];
    for (i, (name, damage)) in damages.into_iter().enumerate() {
        let cached = cache.fetch(&project, &digest, &source).await.unwrap();
        assert_eq!(source.pulls.load(Ordering::SeqCst), i + 1, "{name}");
        damage(cached.dir().parent().unwrap());
        assert!(cache.get(&project, &digest).await.unwrap().is_none(), "{name}");
    }
    // A flipped bit keeps the length; whoever must know reads everything.
    let cached = cache.fetch(&project, &digest, &source).await.unwrap();
    let path = cached.dir().join("model-00001-of-00002.safetensors");
    writable(&path);
    let mut content = fs::read(&path).unwrap();
    *content.last_mut().unwrap() ^= 1;
    fs::write(&path, content).unwrap();
    let error = cached.verify().await.unwrap_err();
    assert!(matches!(&error, Error::Corrupt { what, .. } if what.contains("model-00001-of-00002")), "{error}");
}

#[tokio::test]
async fn two_caches_in_one_folder_do_not_disturb_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let (source, manifest) = source(dir.path()).await;
    let root = dir.path().join("cache");
    // What a process that was killed left behind.
    fs::create_dir_all(root.join(".filling/dead/half")).unwrap();
    fs::write(root.join(".filling/dead/owner"), "").unwrap();
    fs::write(root.join(".filling/dead/half/x"), "x").unwrap();
    let one = Cache::open(&root).await.unwrap();
    assert!(!root.join(".filling/dead").try_exists().unwrap());
    let two = Cache::open(&root).await.unwrap();
    let (project, digest) = (Project::default(), manifest.digest());
    let (a, b) = tokio::join!(one.fetch(&project, &digest, &source), two.fetch(&project, &digest, &source));
    let (a, b) = (a.unwrap(), b.unwrap());
    assert_eq!(a.dir(), b.dir());
    a.verify().await.unwrap();
    drop(one);
    b.verify().await.unwrap();
    two.remove(&project, &digest).await.unwrap();
    two.fetch(&project, &digest, &source).await.unwrap();
}
