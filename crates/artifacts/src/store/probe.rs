//! Trust no environment unproved: before a store is used, it shows that it keeps what it is given, reads it back, and
//! refuses to create what is there, also when several try at once. Silent acceptance of a condition would be worse than
//! its absence.

use futures::future::join_all;
use object_store::path::Path;
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt as _, PutMode, PutPayload};

use crate::error::{Error, Result};

/// Writers that race for one key. Eight is enough to make a store that checks first and writes then fail nearly always.
const WRITERS: usize = 8;

/// Proves the store at `place` or says what it lacks.
pub(super) async fn run(objects: &dyn ObjectStore, place: &str) -> Result<()> {
    let key = Path::from(format!("probes/{}", uuid::Uuid::now_v7().simple()));
    let proved = prove(objects, &key, place).await;
    if let Err(error) = objects.delete(&key).await {
        // A probe that stays behind is a few bytes; the proof stands without its removal.
        tracing::warn!(place, %error, "probe object not removed");
    }
    proved
}

async fn prove(objects: &dyn ObjectStore, key: &Path, place: &str) -> Result<()> {
    let unusable = |reason: String| Error::Unusable { place: place.to_owned(), reason };
    let body = |i: usize| PutPayload::from(format!("probe {i}"));
    let results = join_all((0..WRITERS).map(|i| objects.put_opts(key, body(i), PutMode::Create.into()))).await;
    let mut winners = Vec::new();
    for (i, result) in results.into_iter().enumerate() {
        match result {
            Ok(_) => winners.push(i),
            Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => {}
            Err(error) => return Err(Error::from_store(place, "creating a probe object", error)),
        }
    }
    let &[winner] = winners.as_slice() else {
        return Err(unusable(format!(
            "{} of {WRITERS} writers created the same object; a store that honours `If-None-Match: *` lets one win",
            winners.len()
        )));
    };
    match objects.put_opts(key, body(WRITERS), PutMode::Create.into()).await {
        Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => {}
        Ok(_) => return Err(unusable("it created an object that was already there".into())),
        Err(error) => return Err(Error::from_store(place, "creating a probe object again", error)),
    }
    let reading = |error| Error::from_store(place, "reading a probe object back", error);
    let found = objects.get(key).await.map_err(reading)?.bytes().await.map_err(reading)?;
    if found != format!("probe {winner}") {
        return Err(unusable("a probe object was read back with other bytes than were written".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;
    use crate::store::testing::Faulty;

    #[tokio::test]
    async fn an_honest_store_passes_and_is_left_clean() {
        let store = InMemory::new();
        run(&store, "memory://").await.unwrap();
        assert!(store.list_with_delimiter(None).await.unwrap().common_prefixes.is_empty());
    }

    #[tokio::test]
    async fn a_store_that_ignores_conditions_is_refused() {
        let store = Faulty::new(InMemory::new());
        store.ignore_conditions(true);
        let error = run(&store, "s3://b").await.unwrap_err();
        assert!(matches!(&error, Error::Unusable { reason, .. } if reason.contains("8 of 8 writers")), "{error}");
    }
}
