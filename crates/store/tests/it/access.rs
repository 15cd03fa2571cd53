//! Cases of the suite about who may ask: tokens, workers, the audit log.

use std::sync::Arc;

use attune_spec::id::{CohortId, Epoch, Name, Project, WorkerId};
use attune_store::attempt::Attempt;
use attune_store::audit::Record;
use attune_store::change::Write;
use attune_store::job::{Input, Order};
use attune_store::token::{Role, Token};
use attune_store::{Error, Store, UtcMs};

use crate::suite::{artifact, digest, finish, id, new_job, project, start};

fn token(id: &str, project: Option<&str>, role: Role) -> Token {
    Token {
        id: id.to_owned(),
        hash: digest(7),
        name: Name::new("anna").unwrap(),
        project: project.map(|project| Project::new(project).unwrap()),
        role,
        creator: "the start".to_owned(),
        created: UtcMs(1000),
        expires: None,
        revoked: None,
        used: None,
    }
}

pub(crate) async fn a_token_is_found_until_it_ends_and_its_secret_nowhere(store: Arc<Store>) {
    assert_eq!(store.token("aa").await.unwrap(), None);
    assert!(!store.has_admin(UtcMs(0)).await.unwrap());
    let admin = Token { expires: Some(UtcMs(5000)), ..token("aa", None, Role::Admin) };
    store.create_token(&admin, None).await.unwrap();
    assert!(matches!(store.create_token(&admin, None).await, Err(Error::Conflict(_))));
    assert_eq!(store.token("aa").await.unwrap(), Some(admin.clone()));
    for (now, is_valid) in [(1000, true), (4999, true), (5000, false)] {
        assert_eq!((admin.is_valid(UtcMs(now)), store.has_admin(UtcMs(now)).await.unwrap()), (is_valid, is_valid));
    }
    // The admin of one project gives out no tokens of others.
    store.create_token(&token("bb", Some("default"), Role::Admin), None).await.unwrap();
    assert!(!store.has_admin(UtcMs(6000)).await.unwrap());

    for (time, used) in [(3000, 3000), (2000, 3000), (4000, 4000)] {
        store.token_used("aa", UtcMs(time)).await.unwrap();
        assert_eq!(store.token("aa").await.unwrap().unwrap().used, Some(UtcMs(used)));
    }
    // The first end counts; one that is not there is nobody's.
    for time in [4500, 4600] {
        store.revoke_token("aa", UtcMs(time), None).await.unwrap();
        let revoked = store.token("aa").await.unwrap().unwrap();
        assert_eq!((revoked.revoked, revoked.is_valid(UtcMs(1))), (Some(UtcMs(4500)), false));
    }
    store.revoke_token("' OR 1=1 --", UtcMs(1), None).await.unwrap();
    assert_eq!(store.token("bb").await.unwrap().unwrap().revoked, None);
    assert!(!store.has_admin(UtcMs(1)).await.unwrap());
}

pub(crate) async fn tokens_are_listed_by_project(store: Arc<Store>) {
    for (id, project) in [("a", Some("default")), ("b", None), ("c", Some("other")), ("d", Some("default"))] {
        store.create_token(&token(id, project, Role::Viewer), None).await.unwrap();
    }
    let ids = async |project: Option<&Project>, page: Option<&str>| {
        let page = store.tokens(project, page, 2).await.unwrap();
        (page.items.iter().map(|token| token.id.clone()).collect::<Vec<_>>().join(""), page.next)
    };
    assert_eq!(ids(None, None).await, ("ab".to_owned(), Some("b".to_owned())));
    assert_eq!(ids(None, Some("b")).await, ("cd".to_owned(), None));
    assert_eq!(ids(Some(&project()), None).await, ("ad".to_owned(), None));
    assert_eq!(ids(Some(&Project::new("nobody").unwrap()), None).await, (String::new(), None));
    let long = "x".repeat(100);
    assert!(matches!(store.tokens(None, Some(&long), 2).await, Err(Error::Invalid(_))));
}

pub(crate) async fn a_worker_id_is_its_first_owners(store: Arc<Store>) {
    let worker = WorkerId::new("w1").unwrap();
    assert_eq!(store.owner(&worker).await.unwrap(), None);
    store.claim_worker(&worker, "token/gpu", UtcMs(1), None).await.unwrap();
    store.claim_worker(&worker, "token/gpu", UtcMs(2), None).await.unwrap();
    let refused = store.claim_worker(&worker, "token/other", UtcMs(3), None).await.unwrap_err();
    assert!(matches!(refused, Error::Conflict(_)), "{refused}");
    assert_eq!(store.owner(&worker).await.unwrap().as_deref(), Some("token/gpu"));
    // Of many who ask at once for one id, one gets it.
    let contested = WorkerId::new("w2").unwrap();
    let mut asks = tokio::task::JoinSet::new();
    for n in 0..20 {
        let (store, worker) = (Arc::clone(&store), contested.clone());
        asks.spawn(async move { store.claim_worker(&worker, &format!("token/{n}"), UtcMs(4), None).await.is_ok() });
    }
    let won = asks.join_all().await.into_iter().filter(|won| *won).count();
    assert_eq!(won, 1);
}

pub(crate) async fn what_a_worker_holds_is_what_its_owner_may_read(store: Arc<Store>) {
    let worker = WorkerId::new("w1").unwrap();
    store.claim_worker(&worker, "token/gpu", UtcMs(1), None).await.unwrap();
    store.claim_worker(&WorkerId::new("w2").unwrap(), "token/other", UtcMs(1), None).await.unwrap();
    for n in [1, 2] {
        store.apply(&[Write::Artifact(Box::new(artifact(n, &[])))]).await.unwrap();
    }
    for (job, input) in [("j-1", 1), ("j-2", 2)] {
        let inputs = vec![Input { role: "base".to_owned(), digest: digest(input) }];
        store.create_job(&attune_store::job::NewJob { inputs, ..new_job(job) }, &[], None).await.unwrap();
    }
    let held = async |owner: &str| {
        let held = store.held(&project(), owner).await.unwrap();
        held.into_iter().map(|held| held.job.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(held("token/gpu").await, [""; 0]);
    start(&store, "j-1", 1).await;
    let attempt = Attempt {
        project: project(),
        job: id("j-1"),
        epoch: Epoch(1),
        cohort: CohortId(1),
        workers: vec![worker],
        outcome: None,
        message: String::new(),
        reported: 0,
        started: UtcMs(2),
        ended: None,
    };
    store.apply(&[Write::Attempt(Box::new(attempt.clone()))]).await.unwrap();
    assert_eq!(held("token/gpu").await, ["j-1"]);
    assert_eq!(held("token/other").await, [""; 0]);
    assert_eq!(store.held(&Project::new("other").unwrap(), "token/gpu").await.unwrap(), []);
    let (one, two) = (id("j-1"), id("j-2"));
    let reads = async |job, input| store.is_input(&project(), &[job], digest(input)).await.unwrap();
    assert!(reads(&one, 1).await && reads(&two, 2).await && !reads(&one, 2).await);
    assert!(!store.is_input(&Project::new("other").unwrap(), &[&one], digest(1)).await.unwrap());
    // What a replaced attempt ran is not its worker's any more, nor what has ended.
    start(&store, "j-1", 2).await;
    assert_eq!(held("token/gpu").await, [""; 0]);
    store.apply(&[Write::Attempt(Box::new(Attempt { epoch: Epoch(2), ..attempt }))]).await.unwrap();
    assert_eq!(held("token/gpu").await, ["j-1"]);
    finish(&store, "j-1").await;
    assert_eq!(held("token/gpu").await, [""; 0]);
}

/// A record of a call.
pub(crate) fn record(n: i64, project: Option<&str>) -> Record {
    Record {
        time: UtcMs(n * 1000),
        caller: "aa".to_owned(),
        name: "anna".to_owned(),
        peer: "127.0.0.1".to_owned(),
        project: project.map(|project| Project::new(project).unwrap()),
        rpc: "JobService/CancelJob".to_owned(),
        target: format!("j-{n}"),
        outcome: "OK".to_owned(),
    }
}

pub(crate) async fn the_audit_log_is_read_backwards_and_forgotten_in_time(store: Arc<Store>) {
    for n in 1..=5 {
        store.append_audit(&record(n, (n != 3).then_some(if n == 4 { "other" } else { "default" }))).await.unwrap();
    }
    let read = async |project: Option<&Project>, order, page: Option<&str>| {
        let page = store.audit(project, order, page, 2).await.unwrap();
        (page.items.iter().map(|found| found.record.target.clone()).collect::<Vec<_>>().join(" "), page.next)
    };
    let (first, next) = read(None, Order::Newest, None).await;
    assert_eq!(first, "j-5 j-4");
    let (second, next) = read(None, Order::Newest, next.as_deref()).await;
    assert_eq!(second, "j-3 j-2");
    assert_eq!(read(None, Order::Newest, next.as_deref()).await, ("j-1".to_owned(), None));
    let (own, next) = read(Some(&project()), Order::Oldest, None).await;
    assert_eq!(own, "j-1 j-2");
    assert_eq!(read(Some(&project()), Order::Oldest, next.as_deref()).await, ("j-5".to_owned(), None));
    assert_eq!(store.audit(None, Order::Newest, None, 1).await.unwrap().items[0].record, record(5, Some("default")));
    for bad in ["x", "-1", "99999999999999999999"] {
        assert!(matches!(store.audit(None, Order::Newest, Some(bad), 2).await, Err(Error::Invalid(_))), "{bad}");
    }
    assert_eq!(store.forget_audit(UtcMs(4000), 2).await.unwrap(), 2);
    assert_eq!(store.forget_audit(UtcMs(4000), 2).await.unwrap(), 1);
    assert_eq!(read(None, Order::Oldest, None).await, ("j-4 j-5".to_owned(), None));
}

/// A record is there with its change, and neither is there without the other.
pub(crate) async fn a_record_is_stored_with_its_change_or_neither_is(store: Arc<Store>) {
    let mut n = 0;
    let mut next = || {
        n += 1;
        record(n, None)
    };
    let targets = async || -> Vec<String> {
        let page = store.audit(None, Order::Oldest, None, 100).await.unwrap();
        page.items.into_iter().map(|found| found.record.target).collect()
    };
    // What takes effect.
    let job = new_job("j-1");
    store.create_job(&job, &[Write::Audit(Box::new(next()))], None).await.unwrap();
    store.create_token(&token("aa", None, Role::Admin), Some(&next())).await.unwrap();
    store.revoke_token("aa", UtcMs(5), Some(&next())).await.unwrap();
    let worker = WorkerId::new("w1").unwrap();
    assert!(store.claim_worker(&worker, "token/gpu", UtcMs(1), Some(&next())).await.unwrap());
    let made = Box::new(artifact(1, &[]));
    store.apply(&[Write::Artifact(made), Write::Audit(Box::new(next()))]).await.unwrap();
    let tag: attune_spec::id::Tag = "a:b".parse().unwrap();
    let moves = Write::Tag {
        project: project(),
        tag: tag.clone(),
        digest: digest(1),
        expected: None,
        job: None,
        now: UtcMs(1),
    };
    store.apply(&[moves, Write::Audit(Box::new(next()))]).await.unwrap();
    store.untag(&project(), &tag, UtcMs(2), Some(&next())).await.unwrap();
    store.delete_artifact(&project(), digest(1), false, UtcMs(3), Some(&next())).await.unwrap();
    let expected: Vec<String> = (1..=8).map(|n| format!("j-{n}")).collect();
    assert_eq!(targets().await, expected);

    // What is refused, before the record or after it.
    let audit = || Write::Audit(Box::new(record(99, None)));
    let counter = |value| Write::Counter { name: "c", value };
    store.apply(&[counter(5)]).await.unwrap();
    assert!(store.apply(&[audit(), counter(4)]).await.is_err());
    assert!(store.create_job(&job, &[audit()], None).await.is_err());
    assert!(store.create_token(&token("aa", None, Role::Admin), Some(&record(99, None))).await.is_err());
    assert!(store.claim_worker(&worker, "token/other", UtcMs(1), Some(&record(99, None))).await.is_err());
    assert!(store.untag(&project(), &tag, UtcMs(2), Some(&record(99, None))).await.is_err());
    assert!(store.delete_artifact(&project(), digest(1), false, UtcMs(3), Some(&record(99, None))).await.is_err());
    // What is so already.
    assert!(!store.claim_worker(&worker, "token/gpu", UtcMs(1), Some(&record(99, None))).await.unwrap());
    assert_eq!(targets().await, expected);
}
