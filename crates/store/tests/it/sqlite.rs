//! The suite over SQLite, and what only a database file can do.

use std::sync::Arc;

use attune_store::{Database, Error, Store, UtcMs};

use crate::suite;

async fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("attune.db").into()).await.unwrap();
    (folder, store)
}

macro_rules! suite {
    ($($case:ident),* $(,)?) => {
        $(
            #[tokio::test]
            async fn $case() {
                let (_folder, store) = open().await;
                suite::$case(Arc::new(store)).await;
            }
        )*
    };
}

crate::suite::cases!(suite);

#[tokio::test]
async fn everything_is_there_after_reopening() {
    let folder = tempfile::tempdir().unwrap();
    suite::everything_is_there_after_reopening(&folder.path().join("deep/attune.db").into()).await;
}

#[tokio::test]
async fn a_dropped_store_loses_no_acknowledged_change() {
    // No close: the log is not folded in, as after a kill.
    let folder = tempfile::tempdir().unwrap();
    let path: Database = folder.path().join("attune.db").into();
    let store = Store::open(&path).await.unwrap();
    store.create_job(&suite::new_job("j-1"), &[], None).await.unwrap();
    let copy: Database = folder.path().join("copy.db").into();
    for suffix in ["", "-wal"] {
        let from = format!("{path}{suffix}");
        std::fs::copy(from, format!("{copy}{suffix}")).unwrap();
    }
    let recovered = Store::open(&copy).await.unwrap();
    let job = suite::new_job("j-1");
    assert_eq!(recovered.job(&job.project, &job.job).await.unwrap().spec, job.spec);
}

#[tokio::test]
async fn a_log_that_is_torn_anywhere_keeps_what_was_acknowledged_before() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("attune.db");
    let store = Store::open(&path.clone().into()).await.unwrap();
    let log = folder.path().join("attune.db-wal");
    // After each acknowledged change: how long the log is.
    let mut acknowledged = Vec::new();
    for job in ["j-1", "j-2", "j-3", "j-4"] {
        store.create_job(&suite::new_job(job), &[], None).await.unwrap();
        acknowledged.push((std::fs::metadata(&log).unwrap().len(), job));
    }
    let (database, whole) = (std::fs::read(&path).unwrap(), std::fs::read(&log).unwrap());
    let first = acknowledged[0].0;
    let last = whole.len() as u64;
    let edges = acknowledged.iter().flat_map(|(end, _)| [end - 1, *end, end + 1]);
    let cuts = (first..last).step_by(1511).chain(edges).filter(|cut| *cut <= last);
    for (number, cut) in cuts.enumerate() {
        // What was not written yet when the power went is missing, or is anything.
        for tail in [0, 3000] {
            let torn = folder.path().join(format!("torn-{number}-{tail}.db"));
            std::fs::write(&torn, &database).unwrap();
            let mut left = whole[..cut as usize].to_vec();
            left.resize(left.len() + tail, 0xa5);
            std::fs::write(folder.path().join(format!("torn-{number}-{tail}.db-wal")), left).unwrap();
            let found = Store::open(&torn.into()).await.unwrap();
            for (end, job) in &acknowledged {
                let job = suite::new_job(job);
                let stored = found.job(&job.project, &job.job).await;
                assert_eq!(stored.is_ok(), *end <= cut, "{cut} of {last} bytes, {end}: {stored:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_second_scheduler_is_kept_out_until_the_first_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path: Database = folder.path().join("attune.db").into();
    let first = Store::open(&path).await.unwrap();
    let refused = Store::open(&path).await.unwrap_err();
    assert!(matches!(refused, Error::Locked { .. }), "{refused}");
    assert!(refused.to_string().contains("in use by another scheduler"), "{refused}");
    first.close().await;
    drop(first);
    Store::open(&path).await.unwrap();
}

#[tokio::test]
async fn a_file_that_is_no_database_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("attune.db");
    std::fs::write(&path, "this is not a database, but it is long enough to have a header of its own".repeat(4))
        .unwrap();
    let refused = Store::open(&path.into()).await.unwrap_err();
    assert!(matches!(refused, Error::Corrupt(_)), "{refused:?}");
}

#[tokio::test]
async fn times_are_stored_as_given() {
    let (_folder, store) = open().await;
    let job = suite::new_job("j-1");
    let stored = store.create_job(&job, &[], None).await.unwrap().job;
    assert_eq!(
        (stored.created, stored.updated, stored.started, stored.finished),
        (UtcMs(1000), UtcMs(1000), None, None)
    );
}
