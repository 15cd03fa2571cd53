//! Wakes whoever watches a job when something about it was stored.
//!
//! A wake carries nothing: watchers read the log from where they are, so one that is missed is made up by the next, and
//! several at once are one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use attune_scheduler_core::JobKey;
use tokio::sync::watch;

/// Cheap to clone; clones are the same hub.
#[derive(Debug, Clone, Default)]
pub(crate) struct Hub {
    watched: Arc<Mutex<BTreeMap<JobKey, watch::Sender<()>>>>,
}

impl Hub {
    /// Subscribes to a job. Whatever is stored after this call wakes the receiver.
    pub(crate) fn watch(&self, key: &JobKey) -> watch::Receiver<()> {
        let mut watched = self.lock();
        watched.entry(key.clone()).or_insert_with(|| watch::channel(()).0).subscribe()
    }

    /// The jobs that somebody watches.
    pub(crate) fn watched(&self) -> Vec<JobKey> {
        let mut watched = self.lock();
        watched.retain(|_, sender| sender.receiver_count() > 0);
        watched.keys().cloned().collect()
    }

    /// Wakes the watchers of a job.
    pub(crate) fn wake(&self, key: &JobKey) {
        let mut watched = self.lock();
        let Some(sender) = watched.get(key) else { return };
        if sender.send(()).is_err() {
            watched.remove(key);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<JobKey, watch::Sender<()>>> {
        // Inserting and removing cannot leave the map half written.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attune_spec::id::{JobId, Project};

    #[tokio::test]
    async fn watchers_are_woken_and_forgotten() {
        let hub = Hub::default();
        let key = JobKey::new(Project::default(), JobId::new("j-1").unwrap());
        hub.wake(&key);
        let (mut first, mut second) = (hub.watch(&key), hub.watch(&key));
        assert_eq!(hub.watched(), std::slice::from_ref(&key));
        hub.wake(&key);
        hub.wake(&key);
        first.changed().await.unwrap();
        second.changed().await.unwrap();
        assert!(!first.has_changed().unwrap());
        drop((first, second));
        hub.wake(&key);
        assert!(hub.lock().is_empty());
        drop(hub.watch(&key));
        assert!(hub.watched().is_empty() && hub.lock().is_empty());
    }
}
