//! The suite over PostgreSQL, and what only a server can do. Skipped unless `ATTUNE_TEST_POSTGRES` names one on which databases may be
//! made, as `tests/services/postgres.sh` sets it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use attune_store::{Database, Error, Store};
use sqlx::{Connection as _, Executor as _, PgConnection};

use crate::suite;

/// A database of its own; none, with the reason, where there is no server.
async fn fresh() -> Option<Database> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let Ok(server) = std::env::var("ATTUNE_TEST_POSTGRES") else {
        eprintln!("skipped: ATTUNE_TEST_POSTGRES names no server (tests/services/postgres.sh starts one)");
        return None;
    };
    let name = format!("t_{}_{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let mut connection = PgConnection::connect(&server).await.unwrap();
    connection.execute(sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"))).await.unwrap();
    connection.close().await.unwrap();
    Some(of(&server, &name))
}

/// The URL with another database's name.
fn of(server: &str, name: &str) -> Database {
    let (head, query) = server.split_once('?').unwrap_or((server, ""));
    let (place, _) = head.rsplit_once('/').unwrap();
    format!("{place}/{name}?{query}").parse().unwrap()
}

async fn direct(database: &Database) -> PgConnection {
    let Database::Postgres(url) = database else { unreachable!() };
    PgConnection::connect(url).await.unwrap()
}

macro_rules! suite {
    ($($case:ident),* $(,)?) => {
        $(
            #[tokio::test]
            async fn $case() {
                let Some(database) = fresh().await else { return };
                let store = Store::open(&database).await.unwrap();
                suite::$case(Arc::new(store)).await;
            }
        )*
    };
}

crate::suite::cases!(suite);

#[tokio::test]
async fn everything_is_there_after_reopening() {
    let Some(database) = fresh().await else { return };
    suite::everything_is_there_after_reopening(&database).await;
}

#[tokio::test]
async fn a_second_scheduler_is_kept_out_until_the_first_is_gone() {
    let Some(database) = fresh().await else { return };
    let first = Store::open(&database).await.unwrap();
    let refused = Store::open(&database).await.unwrap_err();
    assert!(matches!(refused, Error::Locked { .. }), "{refused}");
    assert!(refused.to_string().contains("postgres://attune@") && refused.to_string().contains("in use by another"));
    first.close().await;
    Store::open(&database).await.unwrap();
}

/// A scheduler that was stopped while another took over writes nothing when it goes on.
#[tokio::test]
async fn who_lost_the_lock_without_noticing_writes_nothing() {
    let Some(database) = fresh().await else { return };
    let first = Store::open(&database).await.unwrap();
    first.create_job(&suite::new_job("j-1"), &[], None).await.unwrap();
    // The server ends the connection that holds the lock, as it does when it starts anew.
    let mut server = direct(&database).await;
    server
        .execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())")
        .await
        .unwrap();
    // While nobody else leads, nothing is lost.
    first.create_job(&suite::new_job("j-2"), &[], None).await.unwrap();
    let second = loop {
        match Store::open(&database).await {
            Err(Error::Locked { .. }) => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
            opened => break opened.unwrap(),
        }
    };
    let refused = first.create_job(&suite::new_job("j-3"), &[], None).await.unwrap_err();
    assert!(matches!(refused, Error::Replaced { own: 1, current: 2 }) && !refused.is_retryable(), "{refused}");
    assert_eq!(
        refused.to_string(),
        "another scheduler leads since term 2; this one led in term 1, and writes nothing any more"
    );
    second.create_job(&suite::new_job("j-3"), &[], None).await.unwrap();
    let project = suite::project();
    assert_eq!(second.last_event(&project).await.unwrap().0, 3);
    assert!(matches!(first.may_write().await, Err(Error::Replaced { .. })));
    // It may still look.
    assert_eq!(first.last_event(&project).await.unwrap().0, 3);
}

/// Connections that the server ended are replaced; what it refuses for a while can be tried again.
#[tokio::test]
async fn a_server_that_ends_connections_is_only_unavailable() {
    let Some(database) = fresh().await else { return };
    let store = Store::open(&database).await.unwrap();
    store.create_job(&suite::new_job("j-1"), &[], None).await.unwrap();
    let mut server = direct(&database).await;
    for round in 2..6 {
        server
            .execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
            .await
            .unwrap();
        // The first call may find that its connection is gone.
        let mut tries = 0;
        let job = suite::new_job(&format!("j-{round}"));
        while let Err(error) = store.create_job(&job, &[], None).await {
            tries += 1;
            assert!(error.is_retryable() && tries < 10, "{error}");
        }
        while let Err(error) = store.job(&job.project, &job.job).await {
            tries += 1;
            assert!(error.is_retryable() && tries < 10, "{error}");
        }
    }
    assert_eq!(store.last_event(&suite::project()).await.unwrap().0, 5);
}

#[tokio::test]
async fn a_newer_schema_and_a_server_that_is_not_there_are_refused() {
    let Some(database) = fresh().await else { return };
    Store::open(&database).await.unwrap().close().await;
    let mut server = direct(&database).await;
    server
        .execute("INSERT INTO schema_steps (step, sql) SELECT MAX(step) + 1, 'later' FROM schema_steps")
        .await
        .unwrap();
    let newer = Store::open(&database).await.unwrap_err();
    assert!(matches!(newer, Error::Schema(_)), "{newer}");
    let nobody: Database = "postgres://anna:s3cret@127.0.0.1:1/attune".parse().unwrap();
    let away = Store::open(&nobody).await.unwrap_err();
    assert!(matches!(away, Error::Unavailable(_)), "{away}");
    assert!(
        away.to_string().contains("postgres://anna@127.0.0.1:1/attune") && !away.to_string().contains("s3cret"),
        "{away}"
    );
    let Database::Postgres(url) = &database else { unreachable!() };
    let missing = Store::open(&of(url, "missing")).await.unwrap_err();
    assert!(missing.to_string().contains("database \"missing\" does not exist"), "{missing}");
}

/// A store that follows sees what the one that leads commits, changes nothing, and leads when that is gone.
#[tokio::test]
async fn who_follows_reads_and_leads_when_nobody_else_does() {
    let Some(database) = fresh().await else { return };
    let early = Store::follow(&database).await.unwrap_err();
    assert!(matches!(early, Error::Behind { lacking: 4 }) && !early.is_retryable(), "{early}");
    let leader = Store::open(&database).await.unwrap();
    leader.announce("http://one:7070", "word").await.unwrap();
    let follower = Store::follow(&database).await.unwrap();
    assert!(leader.leads() && !follower.leads() && !follower.lead().await.unwrap());
    let announced = follower.announced().await.unwrap().unwrap();
    assert_eq!((announced.term, announced.url.as_str(), announced.word.as_str()), (1, "http://one:7070", "word"));

    let job = suite::new_job("j-1");
    leader.create_job(&job, &[], None).await.unwrap();
    assert_eq!(follower.job(&job.project, &job.job).await.unwrap().job, job.job);
    let moved = follower.moved(&job.project, &[job.job.clone(), suite::id("j-9")]).await.unwrap();
    assert_eq!(moved, [attune_store::Moved { job: job.job.clone(), events: 1, metrics: 0 }]);
    for refused in [
        follower.create_job(&suite::new_job("j-2"), &[], None).await.map(drop).unwrap_err(),
        follower.announce("http://two:7070", "").await.unwrap_err(),
        follower.may_write().await.unwrap_err(),
    ] {
        assert!(matches!(refused, Error::Follows), "{refused}");
    }

    // One that ends in good order is nobody's leader any more.
    leader.close().await;
    assert_eq!(follower.announced().await.unwrap().unwrap().url, "");
    assert!(follower.lead().await.unwrap() && follower.leads() && follower.lead().await.unwrap());
    follower.create_job(&suite::new_job("j-2"), &[], None).await.unwrap();
    assert_eq!(follower.announced().await.unwrap().unwrap().term, 2);
    assert!(matches!(Store::open(&database).await, Err(Error::Locked { .. })));
}

/// What is no state a follower writes as well, in turn with who leads.
#[tokio::test]
async fn who_follows_writes_refusals_down() {
    let Some(database) = fresh().await else { return };
    let leader = Store::open(&database).await.unwrap();
    let follower = Store::follow(&database).await.unwrap();
    let mut writes = tokio::task::JoinSet::new();
    for n in 0..20 {
        let store = if n % 2 == 0 { leader.clone() } else { follower.clone() };
        writes.spawn(async move { store.append_audit(&crate::access::record(n, None)).await });
    }
    assert!(writes.join_all().await.into_iter().all(|done| done.is_ok()));
    let found = follower.audit(None, attune_store::job::Order::Oldest, None, 100).await.unwrap().items;
    assert_eq!(found.len(), 20);
    assert_eq!(follower.n_revoked().await.unwrap(), 0);
}

/// A follower that does not know what a newer one has made of the database reads no further.
#[tokio::test]
async fn who_follows_an_unknown_schema_says_so() {
    let Some(database) = fresh().await else { return };
    let leader = Store::open(&database).await.unwrap();
    let follower = Store::follow(&database).await.unwrap();
    let mut server = direct(&database).await;
    server
        .execute("INSERT INTO schema_steps (step, sql) SELECT MAX(step) + 1, 'later' FROM schema_steps")
        .await
        .unwrap();
    assert!(matches!(follower.announced().await, Err(Error::Schema(_))));
    assert!(matches!(Store::follow(&database).await, Err(Error::Schema(_))));
    leader.close().await;
    assert!(matches!(follower.lead().await, Err(Error::Schema(_))) && !follower.leads());
}
