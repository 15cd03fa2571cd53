//! Uploads whose senders broke off, kept for a while so that whoever comes again sends the rest only.
//!
//! They are kept in memory, as far as the store has taken them in whole parts: a process that ends forgets them, and their
//! parts are removed as those of any unfinished upload.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use attune_spec::id::{Digest, Project};
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::Instant;

use super::upload::{Parts, Upload};
use crate::BlobRef;

/// How long an upload waits for its sender: longer than a scheduler takes to fail over, or a worker to give up.
const KEPT_FOR: Duration = Duration::from_secs(15 * 60);
/// Most uploads that are kept; the oldest goes first.
const UPLOADS_MAX: usize = 256;

/// The uploads that wait.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    kept: Mutex<BTreeMap<(Project, BlobRef), Kept>>,
}

#[derive(Debug)]
struct Kept {
    since: Instant,
    /// Locked while its last parts are stored; nothing is in it when they could not be.
    upload: Arc<AsyncMutex<Option<Upload>>>,
}

impl Shelf {
    /// Keeps an upload with `parts` on their way. Outside of a runtime, as when a process ends, it is let go.
    pub(super) fn keep(self: &Arc<Self>, project: &Project, blob: BlobRef, upload: Upload, parts: Parts) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if upload.at() == 0 {
            runtime.spawn(upload.abort());
            return;
        }
        self.expire();
        let slot = Arc::new(AsyncMutex::new(None));
        let mut held = Arc::clone(&slot).try_lock_owned().expect("nobody else knows it yet");
        let (key, kept) = ((project.clone(), blob), Kept { since: Instant::now(), upload: slot });
        let older = self.lock().insert(key, kept);
        runtime.spawn(async move {
            let older = match older {
                Some(older) => older.upload.lock().await.take(),
                None => None,
            };
            let newer = settled(upload, parts).await;
            // Two senders of one blob may have broken off: the rest is shortest from where the farther one was.
            let at = |upload: &Option<Upload>| upload.as_ref().map_or(0, Upload::at);
            let (kept, ended) = if at(&older) > at(&newer) { (older, newer) } else { (newer, older) };
            tracing::debug!(%blob, at = at(&kept), "an upload broke off and is kept");
            *held = kept;
            drop(held);
            if let Some(ended) = ended {
                ended.abort().await;
            }
        });
    }

    /// Hands out the upload that goes on at `start`.
    pub(super) async fn take(&self, project: &Project, blob: BlobRef, start: u64) -> Option<Upload> {
        let slot = self.lock().get(&(project.clone(), blob)).map(|kept| Arc::clone(&kept.upload))?;
        let taken = slot.lock().await.take_if(|upload| upload.at() == start)?;
        let mut all = self.lock();
        if all.get(&(project.clone(), blob)).is_some_and(|kept| Arc::ptr_eq(&kept.upload, &slot)) {
            all.remove(&(project.clone(), blob));
        }
        Some(taken)
    }

    /// How many bytes are kept of those of these blobs of which there are any.
    pub(super) async fn kept(&self, project: &Project, digests: &[Digest]) -> BTreeMap<Digest, u64> {
        let asked: BTreeSet<_> = digests.iter().collect();
        let slots: Vec<_> = {
            let all = self.lock();
            let found = all.iter().filter(|((of, blob), _)| of == project && asked.contains(&blob.digest));
            found.map(|((_, blob), kept)| (blob.digest, Arc::clone(&kept.upload))).collect()
        };
        let mut kept = BTreeMap::new();
        for (digest, slot) in slots {
            if let Some(upload) = &*slot.lock().await {
                kept.insert(digest, upload.at());
            }
        }
        kept
    }

    /// Ends those for which nobody has come.
    pub(super) fn expire(&self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let mut all = self.lock();
        let mut ended: Vec<Kept> =
            all.extract_if(.., |_, kept| kept.since.elapsed() > KEPT_FOR).map(|(_, kept)| kept).collect();
        while all.len() >= UPLOADS_MAX {
            let oldest = all.iter().min_by_key(|(_, kept)| kept.since).map(|(key, _)| key.clone());
            ended.extend(oldest.and_then(|key| all.remove(&key)));
        }
        drop(all);
        for kept in ended {
            runtime.spawn(kept.end());
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(Project, BlobRef), Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The upload once its parts are stored; nothing if they could not be.
async fn settled(upload: Upload, mut parts: Parts) -> Option<Upload> {
    while let Some(stored) = parts.join_next().await {
        if !matches!(stored, Ok(Ok(()))) {
            parts.abort_all();
            upload.abort().await;
            return None;
        }
    }
    Some(upload)
}

impl Kept {
    async fn end(self) {
        let upload = self.upload.lock().await.take();
        if let Some(upload) = upload {
            upload.abort().await;
        }
    }
}
