//! The suite over SQLite, and what only a database file can do.

use std::sync::Arc;

use attune_spec::id::Seq;
use attune_store::{Error, Store, UtcMs};

use crate::suite;

async fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("attune.db")).await.unwrap();
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

suite!(
    a_job_is_created_read_and_listed,
    the_same_request_makes_one_job,
    a_thousand_creates_with_one_request_id_make_one_job,
    events_have_no_gaps_under_concurrency,
    a_change_compares_the_version_and_final_states_stay,
    a_change_that_fails_half_way_leaves_nothing,
    only_the_current_epoch_writes,
    unfinished_work_comes_back_whole,
    a_retried_attempts_metrics_replace_the_lost_ones,
    metrics_are_paged_and_filtered,
    projects_do_not_see_each_other,
    an_artifact_becomes_visible_with_lineage_tags_and_events,
    tags_move_and_leave_a_trail,
    deletion_spares_what_is_needed,
    old_checkpoints_go_unless_somebody_needs_them,
    lineage_is_followed_both_ways,
    artifacts_are_paged_and_filtered,
    page_tokens_are_checked,
    counters_only_grow,
);

#[tokio::test]
async fn everything_is_there_after_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/attune.db");
    let store = Store::open(&path).await.unwrap();
    let job = suite::new_job("j-1");
    store.create_job(&job, &[], Some(&suite::request("r", 1))).await.unwrap();
    store.close().await;
    drop(store);

    let store = Store::open(&path).await.unwrap();
    assert_eq!(store.job(&job.project, &job.job).await.unwrap().spec, job.spec);
    let again = store.create_job(&suite::new_job("j-2"), &[], Some(&suite::request("r", 1))).await.unwrap();
    assert!(!again.is_new);
    assert_eq!(store.last_event(&job.project).await.unwrap(), Seq(1));
}

#[tokio::test]
async fn a_dropped_store_loses_no_acknowledged_change() {
    // No close: the log is not folded in, as after a kill.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("attune.db");
    let store = Store::open(&path).await.unwrap();
    store.create_job(&suite::new_job("j-1"), &[], None).await.unwrap();
    let copy = folder.path().join("copy.db");
    for suffix in ["", "-wal"] {
        let from = format!("{}{suffix}", path.display());
        std::fs::copy(from, format!("{}{suffix}", copy.display())).unwrap();
    }
    let recovered = Store::open(&copy).await.unwrap();
    let job = suite::new_job("j-1");
    assert_eq!(recovered.job(&job.project, &job.job).await.unwrap().spec, job.spec);
}

#[tokio::test]
async fn a_second_scheduler_is_kept_out_until_the_first_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("attune.db");
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
    let refused = Store::open(&path).await.unwrap_err();
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
