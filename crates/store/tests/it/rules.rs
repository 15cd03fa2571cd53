//! Cases of the suite about what projects may have and how long jobs may take.

use std::sync::Arc;

use attune_spec::id::{CohortId, Epoch, Project, WorkerId};
use attune_store::attempt::Attempt;
use attune_store::change::Write;
use attune_store::job::{NewJob, Overdue};
use attune_store::{Store, UtcMs};
use serde_json::{Value, json};

use crate::suite::{artifact, finish, id, new_job, project, start};

fn rule(kind: &'static str, name: &str, value: Option<Value>) -> Write {
    Write::Rule { kind, name: name.to_owned(), value }
}

pub(crate) async fn what_is_said_of_projects_and_workers_comes_back(store: Arc<Store>) {
    assert!(store.unfinished().await.unwrap().rules.is_empty());
    let said = [
        rule("policy", "red", Some(json!({"weight": 1}))),
        rule("cordon", "w-2", Some(json!(true))),
        rule("policy", "red", Some(json!({"weight": 2}))),
        rule("cordon", "w-1", Some(json!(true))),
        rule("cordon", "w-1", None),
        rule("cordon", "nobody", None),
    ];
    store.apply(&said).await.unwrap();
    let rules = store.unfinished().await.unwrap().rules;
    let expected = [("cordon", "w-2", json!(true)), ("policy", "red", json!({"weight": 2}))];
    assert_eq!(rules, expected.map(|(kind, name, value)| (kind.to_owned(), name.to_owned(), value)));
}

fn attempt(job: &str, epoch: u64, started: i64, ended: Option<i64>) -> Write {
    Write::Attempt(Box::new(Attempt {
        project: project(),
        job: id(job),
        epoch: Epoch(epoch),
        cohort: CohortId(epoch),
        workers: vec![WorkerId::new("w-1").unwrap()],
        outcome: ended.map(|_| "failed".to_owned()),
        message: String::new(),
        reported: 0,
        started: UtcMs(started),
        ended: ended.map(UtcMs),
    }))
}

pub(crate) async fn jobs_whose_time_is_over_are_found(store: Arc<Store>) {
    for (job, run_limit_ms, deadline) in
        [("j-1", None, None), ("j-2", None, Some(5000)), ("j-3", Some(1000), None), ("j-4", Some(10), Some(4000))]
    {
        let job = NewJob { run_limit_ms, deadline: deadline.map(UtcMs), ..new_job(job) };
        store.create_job(&job, &[], None).await.unwrap();
    }
    let overdue = |now: i64| {
        let store = Arc::clone(&store);
        async move {
            let found = store.overdue(UtcMs(now), UtcMs(now)).await.unwrap();
            found.into_iter().map(|(_, job, limit)| (job.to_string(), limit)).collect::<Vec<_>>()
        }
    };
    let of = |job: &str, limit| (job.to_owned(), limit);
    assert_eq!(overdue(3999).await, []);
    assert_eq!(overdue(4000).await, [of("j-4", Overdue::Deadline)]);
    assert_eq!(overdue(5000).await, [of("j-2", Overdue::Deadline), of("j-4", Overdue::Deadline)]);
    // Of attempts that have ended what they took counts, and of one that goes on what it has taken so far.
    start(&store, "j-3", 1).await;
    store.apply(&[attempt("j-3", 1, 6000, Some(6400))]).await.unwrap();
    start(&store, "j-3", 2).await;
    store.apply(&[attempt("j-3", 2, 9000, None)]).await.unwrap();
    finish(&store, "j-2").await;
    finish(&store, "j-4").await;
    assert_eq!(overdue(9599).await, []);
    assert_eq!(overdue(9600).await, [of("j-3", Overdue::RunTime)]);
}

pub(crate) async fn files_that_several_artifacts_have_are_kept_once(store: Arc<Store>) {
    assert_eq!(store.kept_bytes(&project()).await.unwrap(), 0);
    for n in [1, 2] {
        store.apply(&[Write::Artifact(Box::new(artifact(n, &[])))]).await.unwrap();
    }
    // Ten bytes of each, and twenty that both have.
    assert_eq!(store.kept_bytes(&project()).await.unwrap(), 40);
    assert_eq!(store.kept_bytes(&Project::new("other").unwrap()).await.unwrap(), 0);
}
