//! Artifacts on a node's disk: filled once, checked while filled, reused until removed.
//!
//! An entry is `<root>/<project>/<64 digits>/` with the manifest beside a folder `files`; it appears by one rename, so
//! what is there is complete. Its files are read-only. A fill works in `<root>/.filling/<process>/`, which the next
//! process that opens the cache removes if its owner is gone.
//!
//! With a bound, what was used longest ago goes when there is to be room for something new. Whoever has a [`Cached`] holds
//! a shared lock of its entry, in this process or another, and an entry that somebody holds is not removed: what is in use
//! goes before the bound, which is exceeded then. A lock ends with its process, so nothing is held for ever.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use attune_spec::id::{Digest, Project};
use tokio::sync::Mutex as AsyncMutex;

use crate::error::{Error, Result};
use crate::eviction;
use crate::hash;
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::unpack::{Source, Unpack, blocking, sync_folder};

pub(crate) const FILES: &str = "files";
pub(crate) const MANIFEST: &str = "manifest.json";
pub(crate) const FILLING: &str = ".filling";

/// A node-local cache. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Cache {
    inner: Arc<Inner>,
}

type Key = (Project, Digest);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    filling: PathBuf,
    /// Bytes that all entries may have together.
    bytes_max: Option<u64>,
    /// Bytes of what is being filled, which count as if they were there. Held while room is made.
    reserved: Mutex<u64>,
    /// One lock per entry that is being fetched.
    fetching: Mutex<BTreeMap<Key, Weak<AsyncMutex<()>>>>,
    /// Held while this process lives; tells other processes that `filling` has an owner.
    _owner: fs::File,
}

/// An artifact in the cache, which is not evicted while this or a clone of it lives.
#[derive(Debug, Clone)]
pub struct Cached {
    dir: PathBuf,
    manifest: Arc<Manifest>,
    /// The entry's shared lock.
    held: Arc<fs::File>,
}

impl Cached {
    /// The folder with the artifact's files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The artifact's manifest.
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// Reads every file and says whether it still is what the manifest says.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the file; [`Error::Io`].
    pub async fn verify(&self) -> Result<()> {
        let this = self.clone();
        blocking(move || {
            for file in this.manifest.files() {
                let path = this.dir.join(&file.path);
                let found = hash::file(&path)?;
                if found != file.blob() {
                    return Err(Error::Corrupt {
                        what: format!("file {:?}", file.path),
                        place: this.dir.display().to_string(),
                        expected: file.blob().to_string(),
                        found: found.to_string(),
                    });
                }
            }
            Ok(())
        })
        .await
    }
}

impl Cache {
    /// Opens the cache in the folder `root` (made if absent) and removes what dead processes left half-filled.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Full`].
    pub async fn open(root: impl Into<PathBuf>) -> Result<Self> {
        Self::bounded(root, None).await
    }

    /// The same, with a bound on the bytes of all entries together. What is there beyond it goes with the next fetch, or
    /// [`Cache::trim`].
    ///
    /// # Errors
    /// As [`Cache::open`].
    pub async fn bounded(root: impl Into<PathBuf>, bytes_max: Option<u64>) -> Result<Self> {
        let root = root.into();
        blocking(move || {
            let all = root.join(FILLING);
            fs::create_dir_all(&all).map_err(|e| Error::io("create the folder", &all, e))?;
            let root = root.canonicalize().map_err(|e| Error::io("open", &root, e))?;
            let all = root.join(FILLING);
            // Taken by everyone who opens, so that nobody's folder is swept between its making and its locking.
            let door = lock_file(&all.join("door"))?;
            door.lock().map_err(|e| Error::io("lock", &all.join("door"), e))?;
            sweep(&all);
            let filling = all.join(uuid::Uuid::now_v7().simple().to_string());
            fs::create_dir(&filling).map_err(|e| Error::io("create the folder", &filling, e))?;
            let owner = lock_file(&filling.join("owner"))?;
            owner.lock().map_err(|e| Error::io("lock", &filling.join("owner"), e))?;
            let (reserved, fetching) = (Mutex::default(), Mutex::default());
            let inner = Inner { root, filling, bytes_max, reserved, fetching, _owner: owner };
            Ok(Self { inner: Arc::new(inner) })
        })
        .await
    }

    /// The artifact, if the cache has it whole: the manifest is read and checked, the files by their lengths.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk fails; a damaged entry is removed and counts as absent.
    pub async fn get(&self, project: &Project, digest: &Digest) -> Result<Option<Cached>> {
        let entry = self.entry(project, digest);
        let (digest, grave) = (*digest, self.staging());
        blocking(move || match load(&entry, &digest) {
            Ok(cached) => {
                eviction::touch(&cached.held);
                Ok(Some(cached))
            }
            Err(error) => {
                match fs::rename(&entry, &grave) {
                    Ok(()) => tracing::warn!(%error, entry = %entry.display(), "damaged cache entry removed"),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(e) => return Err(Error::io("remove", &entry, e)),
                }
                fs::remove_dir_all(&grave).map_err(|e| Error::io("remove", &grave, e))?;
                Ok(None)
            }
        })
        .await
    }

    /// The artifact, from `source` if the cache does not have it. Concurrent calls for one artifact do the work once;
    /// what comes is checked in full before it is shown.
    ///
    /// # Errors
    /// What `source` and [`Unpack`] report; nothing is left in the cache then.
    pub async fn fetch(&self, project: &Project, digest: &Digest, source: &dyn Source) -> Result<Cached> {
        let lock = self.lock(project, digest);
        let _held = lock.lock().await;
        if let Some(cached) = self.get(project, digest).await? {
            return Ok(cached);
        }
        let (staging, entry, name) = (self.staging(), self.entry(project, digest), *digest);
        let (dest, room) = (entry.clone(), self.clone());
        let mut unpack = blocking(move || Unpack::staged(staging, FILES, dest, name, true)).await?.into_room(room);
        source.pull(project, digest, &mut unpack).await?;
        unpack.complete().await?;
        let published = blocking(move || publish(&unpack, &entry)).await?;
        match published {
            Some(cached) => Ok(cached),
            // Another process was first.
            None => self.get(project, digest).await?.ok_or_else(|| Error::NotFound {
                what: format!("artifact {digest}"),
                place: self.inner.root.display().to_string(),
            }),
        }
    }

    /// Removes what was used longest ago, and is not in use, until the bound is kept. How many bytes went.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub async fn trim(&self) -> Result<u64> {
        self.make_room(0).await.map(|(_, bytes)| bytes)
    }

    /// Makes room for `size_bytes` that will come, and counts them until the answer is dropped.
    pub(crate) async fn make_room(&self, size_bytes: u64) -> Result<(Reserved, u64)> {
        let this = self.clone();
        blocking(move || {
            let inner = &this.inner;
            let mut reserved = inner.reserved.lock().unwrap_or_else(PoisonError::into_inner);
            let wanted = reserved.saturating_add(size_bytes);
            let evicted = match inner.bytes_max {
                Some(max) => eviction::evict(&inner.root, max.saturating_sub(wanted), || this.staging())?,
                None => 0,
            };
            *reserved = wanted;
            drop(reserved);
            Ok((Reserved { cache: this, size_bytes }, evicted))
        })
        .await
    }

    /// Forgets an artifact; one that is not there counts as removed. Processes that have its files open keep them.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub async fn remove(&self, project: &Project, digest: &Digest) -> Result<()> {
        let (entry, grave) = (self.entry(project, digest), self.staging());
        blocking(move || match fs::rename(&entry, &grave) {
            Ok(()) => fs::remove_dir_all(&grave).map_err(|e| Error::io("remove", &grave, e)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::io("remove", &entry, e)),
        })
        .await
    }

    fn entry(&self, project: &Project, digest: &Digest) -> PathBuf {
        self.inner.root.join(project.as_str()).join(digest.hex())
    }

    /// A fresh name in this process's own folder.
    fn staging(&self) -> PathBuf {
        self.inner.filling.join(uuid::Uuid::now_v7().simple().to_string())
    }

    fn lock(&self, project: &Project, digest: &Digest) -> Arc<AsyncMutex<()>> {
        let mut fetching = self.inner.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        fetching.retain(|_, lock| lock.strong_count() > 0);
        let key = (project.clone(), *digest);
        if let Some(lock) = fetching.get(&key).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::default();
        fetching.insert(key, Arc::downgrade(&lock));
        lock
    }
}

/// Room that was made for what is being filled.
#[derive(Debug)]
pub(crate) struct Reserved {
    cache: Cache,
    size_bytes: u64,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut reserved = self.cache.inner.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        *reserved = reserved.saturating_sub(self.size_bytes);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Best effort: the next opener sweeps what is left.
        let _ = fs::remove_dir_all(&self.filling);
    }
}

/// Adds the manifest to a complete staging folder and moves it to its name; nothing where somebody else was first.
fn publish(unpack: &Unpack, entry: &Path) -> Result<Option<Cached>> {
    let staging = unpack.staging();
    let manifest = unpack.manifest().expect("a complete unpack has its manifest").clone();
    let marker = staging.join(MANIFEST);
    fs::write(&marker, manifest.bytes()).map_err(|e| Error::io("write", &marker, e))?;
    // Held before anybody can see it: nobody evicts it between here and its first use.
    let held = hold(&marker)?;
    sync_folder(staging)?;
    if let Some(parent) = entry.parent() {
        fs::create_dir_all(parent).map_err(|e| Error::io("create the folder", parent, e))?;
    }
    match fs::rename(staging, entry) {
        Ok(()) => Ok(Some(Cached { dir: entry.join(FILES), manifest, held: Arc::new(held) })),
        // Another process was first; its entry is as good as ours.
        Err(e) if matches!(e.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => Ok(None),
        Err(e) => Err(Error::io("move the artifact to", entry, e)),
    }
}

/// Opens the manifest of an entry and takes its shared lock.
fn hold(marker: &Path) -> Result<fs::File> {
    let failed = |doing| move |e| Error::io(doing, marker, e);
    loop {
        let file = fs::File::open(marker).map_err(failed("read"))?;
        match file.lock_shared() {
            Ok(()) => {}
            // Where the file system has no locks nothing is ever evicted.
            Err(e) if e.kind() == io::ErrorKind::Unsupported => return Ok(file),
            Err(e) => return Err(failed("lock")(e)),
        }
        // While this waited it may have been evicted, and another have come in its place.
        let there = fs::symlink_metadata(marker).map_err(failed("read"))?;
        let held = file.metadata().map_err(failed("read"))?;
        if (there.dev(), there.ino()) == (held.dev(), held.ino()) {
            return Ok(file);
        }
    }
}

/// Reads an entry and checks it cheaply.
fn load(entry: &Path, digest: &Digest) -> Result<Cached> {
    let damaged = |what: String, expected: String, found: String| Error::Corrupt {
        what,
        place: entry.display().to_string(),
        expected,
        found,
    };
    let marker = entry.join(MANIFEST);
    // Who was about to remove it has done so by now, or finds it in use.
    let held = hold(&marker)?;
    let size = fs::symlink_metadata(&marker).map_err(|e| Error::io("read", &marker, e))?.len();
    if size > MANIFEST_BYTES_MAX as u64 {
        return Err(damaged("the manifest".into(), digest.to_string(), format!("{size} bytes")));
    }
    let bytes = fs::read(&marker).map_err(|e| Error::io("read", &marker, e))?;
    if hash::bytes(&bytes) != *digest {
        return Err(damaged("the manifest".into(), digest.to_string(), hash::bytes(&bytes).to_string()));
    }
    let manifest = Manifest::parse(&bytes)?;
    let dir = entry.join(FILES);
    for file in manifest.files() {
        let path = dir.join(&file.path);
        let found = fs::symlink_metadata(&path).map_err(|e| Error::io("read", &path, e))?;
        if !found.is_file() || found.len() != file.size_bytes {
            let what = format!("file {:?}", file.path);
            return Err(damaged(what, format!("{} bytes", file.size_bytes), format!("{} bytes", found.len())));
        }
    }
    Ok(Cached { dir, manifest: Arc::new(manifest), held: Arc::new(held) })
}

fn lock_file(path: &Path) -> Result<fs::File> {
    let mut options = fs::OpenOptions::new();
    options.create(true).truncate(false).write(true);
    options.open(path).map_err(|e| Error::io("open", path, e))
}

/// Removes the folders in `all` whose owner is gone. What cannot be removed stays for the next time.
fn sweep(all: &Path) {
    let Ok(entries) = fs::read_dir(all) else { return };
    for folder in entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()) {
        let orphan = match fs::File::open(folder.join("owner")) {
            Ok(owner) => owner.try_lock().is_ok(),
            Err(e) => e.kind() == io::ErrorKind::NotFound,
        };
        if orphan && let Err(error) = fs::remove_dir_all(&folder) {
            tracing::warn!(%error, folder = %folder.display(), "left-over of a dead process not removed");
        }
    }
}
