//! What every backend must do. Each case takes a freshly opened, empty store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use attune_spec::id::{CohortId, Digest, Epoch, JobId, Project, Seq, Step, Tag, Tokens, WorkerId};
use attune_store::artifact::{Cause, Direction, Edge, File, Filter as ArtifactFilter, Maker, NewArtifact};
use attune_store::attempt::{Attempt, Cohort};
use attune_store::change::Write;
use attune_store::event::NewEvent;
use attune_store::job::{Filter, Input, JobChange, NewJob, Order, Request, State, Stop};
use attune_store::metric::{Filter as MetricFilter, NewPoint};
use attune_store::{Database, Error, Store, UtcMs};
use serde_json::json;

/// Hands the name of every case to a macro, which makes a test of each.
macro_rules! cases {
    ($make:ident) => {
        $make!(
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
            events_of_old_jobs_are_forgotten_but_for_their_end,
            a_token_is_found_until_it_ends_and_its_secret_nowhere,
            tokens_are_listed_by_project,
            a_worker_id_is_its_first_owners,
            what_a_worker_holds_is_what_its_owner_may_read,
            the_audit_log_is_read_backwards_and_forgotten_in_time,
            a_record_is_stored_with_its_change_or_neither_is,
            what_is_said_of_projects_and_workers_comes_back,
            jobs_whose_time_is_over_are_found,
            files_that_several_artifacts_have_are_kept_once,
        );
    };
}
pub(crate) use cases;

pub(crate) use crate::access::{
    a_record_is_stored_with_its_change_or_neither_is, a_token_is_found_until_it_ends_and_its_secret_nowhere,
    a_worker_id_is_its_first_owners, the_audit_log_is_read_backwards_and_forgotten_in_time,
    tokens_are_listed_by_project, what_a_worker_holds_is_what_its_owner_may_read,
};

pub(crate) use crate::rules::{
    files_that_several_artifacts_have_are_kept_once, jobs_whose_time_is_over_are_found,
    what_is_said_of_projects_and_workers_comes_back,
};

pub(crate) fn project() -> Project {
    Project::default()
}

pub(crate) fn id(text: &str) -> JobId {
    JobId::new(text).unwrap()
}

pub(crate) fn digest(n: u8) -> Digest {
    Digest::from_bytes([n; 32])
}

fn tag(text: &str) -> Tag {
    text.parse().unwrap()
}

pub(crate) fn request(id: &str, body: u8) -> Request {
    Request { id: id.to_owned(), body: digest(body) }
}

pub(crate) fn new_job(job: &str) -> NewJob {
    NewJob {
        project: project(),
        job: id(job),
        version: 1,
        name: "debian-helper".to_owned(),
        kind: "tune".to_owned(),
        spec: json!({"version": 1, "name": "debian-helper"}),
        resolved: json!({"version": 1, "name": "debian-helper", "seed": 7}),
        state: State::Queued,
        reason: "queued".to_owned(),
        message: String::new(),
        priority: 0,
        labels: BTreeMap::from([("team".to_owned(), "docs".to_owned())]),
        inputs: Vec::new(),
        core: json!({"order": 1}),
        retry_of: None,
        stage: None,
        run_limit_ms: None,
        deadline: None,
        now: UtcMs(1000),
    }
}

fn event(job: &str, kind: &str) -> NewEvent {
    NewEvent {
        project: project(),
        job: Some(id(job)),
        epoch: None,
        kind: kind.to_owned(),
        data: json!({}),
        time: UtcMs(2000),
    }
}

fn change(job: &str, version: u64, state: State, epoch: u64) -> JobChange {
    JobChange {
        project: project(),
        job: id(job),
        version,
        state,
        stop: (state == State::Stopping).then_some(Stop::Cancel),
        reason: "because".to_owned(),
        message: "because of a test".to_owned(),
        epoch: Epoch(epoch),
        attempts: u32::try_from(epoch).unwrap(),
        core: json!({"order": 2}),
        failure: None,
        outputs: None,
        event: event(job, "job.state"),
        now: UtcMs(2000),
    }
}

fn write(change: JobChange) -> Write {
    Write::Job(Box::new(change))
}

pub(crate) async fn start(store: &Store, job: &str, epoch: u64) {
    let version = store.job(&project(), &id(job)).await.unwrap().version;
    store.apply(&[write(change(job, version, State::Starting, epoch))]).await.unwrap();
}

pub(crate) async fn finish(store: &Store, job: &str) {
    let stored = store.job(&project(), &id(job)).await.unwrap();
    store.apply(&[write(change(job, stored.version, State::Succeeded, stored.epoch.0))]).await.unwrap();
}

pub(crate) fn artifact(n: u8, causes: &[u8]) -> NewArtifact {
    NewArtifact {
        project: project(),
        digest: digest(n),
        kind: "adapter".to_owned(),
        size_bytes: 30,
        files: vec![
            File { path: "adapter_config.json".to_owned(), blob: digest(n.wrapping_add(100)), size_bytes: 10 },
            File { path: "adapter_model.safetensors".to_owned(), blob: digest(200), size_bytes: 20 },
        ],
        causes: causes.iter().map(|&n| Cause { role: "base".to_owned(), digest: digest(n) }).collect(),
        maker: None,
        tags: Vec::new(),
        now: UtcMs(3000 + i64::from(n)),
    }
}

fn made_by(mut artifact: NewArtifact, job: &str, epoch: u64) -> NewArtifact {
    artifact.maker = Some(Maker { job: id(job), epoch: Epoch(epoch), record: json!({"worker": "w1"}) });
    artifact
}

async fn kinds(store: &Store) -> Vec<String> {
    let events = store.events(&project(), None, Seq(0), 10_000).await.unwrap();
    assert!(events.iter().map(|e| e.seq.0).eq(1..=events.len() as u64), "the log has a gap");
    events.into_iter().map(|event| event.event.kind).collect()
}

pub(crate) async fn a_job_is_created_read_and_listed(store: Arc<Store>) {
    for job in ["j-1", "j-2", "j-3"] {
        let created = store.create_job(&new_job(job), &[], None).await.unwrap();
        assert!(created.is_new);
        assert_eq!(created.events.len(), 1);
        assert_eq!(created.events[0].event.kind, "job.created");
    }
    assert_eq!(store.last_job().await.unwrap(), Some(id("j-3")));
    let stored = store.job(&project(), &id("j-2")).await.unwrap();
    assert_eq!((stored.version, stored.epoch, stored.state), (1, Epoch(0), State::Queued));
    assert_eq!(stored.labels, new_job("j-2").labels);
    assert_eq!(stored.spec, new_job("j-2").spec);
    assert_eq!(stored.outputs, json!([]));

    let taken = store.create_job(&new_job("j-2"), &[], None).await.unwrap_err();
    assert!(matches!(taken, Error::Conflict(_)), "{taken}");
    let absent = store.job(&project(), &id("j-9")).await.unwrap_err();
    assert!(matches!(absent, Error::NotFound { .. }), "{absent}");

    let names = |page: &attune_store::job::Page<attune_store::job::Job>| -> Vec<String> {
        page.items.iter().map(|job| job.job.to_string()).collect()
    };
    let first = store.jobs(&project(), &Filter::default(), None, 2).await.unwrap();
    assert_eq!(names(&first), ["j-3", "j-2"]);
    let second = store.jobs(&project(), &Filter::default(), first.next.as_deref(), 2).await.unwrap();
    assert_eq!((names(&second), second.next), (vec!["j-1".to_owned()], None));

    let oldest = Filter { order: Order::Oldest, ..Filter::default() };
    let first = store.jobs(&project(), &oldest, None, 2).await.unwrap();
    assert_eq!(names(&first), ["j-1", "j-2"]);
    assert_eq!(names(&store.jobs(&project(), &oldest, first.next.as_deref(), 2).await.unwrap()), ["j-3"]);

    start(&store, "j-2", 1).await;
    assert_eq!(store.job(&project(), &id("j-2")).await.unwrap().last_event, Seq(4));
    let running = Filter { states: vec![State::Starting, State::Running], ..Filter::default() };
    assert_eq!(names(&store.jobs(&project(), &running, None, 10).await.unwrap()), ["j-2"]);
    for (filter, expected) in [
        (Filter { labels: BTreeMap::from([("team".to_owned(), "docs".to_owned())]), ..Filter::default() }, 3),
        (Filter { labels: BTreeMap::from([("team".to_owned(), "web".to_owned())]), ..Filter::default() }, 0),
        (Filter { kind: Some("merge".to_owned()), ..Filter::default() }, 0),
        (Filter { name: Some("debian-helper".to_owned()), kind: Some("tune".to_owned()), ..Filter::default() }, 3),
        (Filter { name: Some("' OR 1=1 --".to_owned()), ..Filter::default() }, 0),
        (Filter { parent: Some(id("j-1")), ..Filter::default() }, 0),
    ] {
        assert_eq!(store.jobs(&project(), &filter, None, 10).await.unwrap().items.len(), expected, "{filter:?}");
    }
}

pub(crate) async fn the_same_request_makes_one_job(store: Arc<Store>) {
    let first = store.create_job(&new_job("j-1"), &[], Some(&request("r", 1))).await.unwrap();
    let again = store.create_job(&new_job("j-2"), &[], Some(&request("r", 1))).await.unwrap();
    assert!(first.is_new && !again.is_new);
    assert_eq!(again.job, first.job);
    assert!(again.events.is_empty());
    let other = store.create_job(&new_job("j-3"), &[], Some(&request("r", 2))).await.unwrap_err();
    assert!(matches!(other, Error::RequestReused { .. }), "{other}");
    assert_eq!(store.jobs(&project(), &Filter::default(), None, 10).await.unwrap().items.len(), 1);
    let found = store.job_of_request(&project(), &request("r", 1)).await.unwrap().unwrap();
    assert_eq!(found.job, id("j-1"));
    assert!(store.job_of_request(&project(), &request("s", 1)).await.unwrap().is_none());

    // Another project's ids are its own.
    let mut elsewhere = new_job("j-1");
    elsewhere.project = Project::new("other").unwrap();
    assert!(store.create_job(&elsewhere, &[], Some(&request("r", 2))).await.unwrap().is_new);
}

pub(crate) async fn a_thousand_creates_with_one_request_id_make_one_job(store: Arc<Store>) {
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..1000 {
        let store = Arc::clone(&store);
        calls.spawn(async move {
            store.create_job(&new_job(&format!("j-{n}")), &[], Some(&request("r", 1))).await.unwrap()
        });
    }
    let made = calls.join_all().await;
    assert_eq!(made.iter().filter(|created| created.is_new).count(), 1);
    let ids: BTreeSet<&JobId> = made.iter().map(|created| &created.job.job).collect();
    assert_eq!(ids.len(), 1);
    assert_eq!(store.jobs(&project(), &Filter::default(), None, 10).await.unwrap().items.len(), 1);
    assert_eq!(kinds(&store).await, ["job.created"]);
}

pub(crate) async fn events_have_no_gaps_under_concurrency(store: Arc<Store>) {
    store.create_job(&new_job("j-1"), &[], None).await.unwrap();
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..200 {
        let store = Arc::clone(&store);
        calls.spawn(async move {
            if n % 4 == 0 {
                // Refused after its event was numbered: the number must be given out again.
                let absent = Write::Progress {
                    project: project(),
                    job: id("j-9"),
                    epoch: Epoch(1),
                    progress: json!({}),
                    now: UtcMs(0),
                };
                store.apply(&[Write::Event(event("j-1", "log")), absent]).await.unwrap_err();
            } else {
                store.apply(&[Write::Event(event("j-1", "log")), Write::Event(event("j-1", "log"))]).await.unwrap();
            }
        });
    }
    calls.join_all().await;
    assert_eq!(kinds(&store).await.len(), 1 + 150 * 2);
    let tail = store.events(&project(), Some(&id("j-1")), Seq(299), 10).await.unwrap();
    assert_eq!(tail.iter().map(|event| event.seq).collect::<Vec<_>>(), [Seq(300), Seq(301)]);
    assert_eq!(store.events(&project(), Some(&id("j-2")), Seq(0), 10).await.unwrap(), []);
    assert_eq!(store.events(&project(), None, Seq(u64::MAX), 10).await.unwrap(), []);
    assert_eq!(store.last_event(&project()).await.unwrap(), Seq(301));
}

pub(crate) async fn a_change_compares_the_version_and_final_states_stay(store: Arc<Store>) {
    store.create_job(&new_job("j-1"), &[], None).await.unwrap();
    store.apply(&[write(change("j-1", 1, State::Starting, 1))]).await.unwrap();
    let stale = store.apply(&[write(change("j-1", 1, State::Running, 1))]).await.unwrap_err();
    assert!(matches!(stale, Error::Conflict(_)), "{stale}");
    let older = store.apply(&[write(change("j-1", 2, State::Running, 0))]).await.unwrap_err();
    assert!(matches!(older, Error::StaleEpoch { .. }), "{older}");

    // Two transitions in one change count up by themselves.
    let both = [write(change("j-1", 2, State::Running, 1)), write(change("j-1", 3, State::Stopping, 1))];
    assert_eq!(store.apply(&both).await.unwrap().events.len(), 2);
    let stopping = store.job(&project(), &id("j-1")).await.unwrap();
    assert_eq!((stopping.state, stopping.stop, stopping.version), (State::Stopping, Some(Stop::Cancel), 4));
    assert_eq!((stopping.started, stopping.finished), (Some(UtcMs(2000)), None));

    let mut end = change("j-1", 4, State::Failed, 1);
    end.failure = Some(json!({"signal": 9}));
    end.outputs = Some(json!([{"digest": digest(1).to_string()}]));
    store.apply(&[write(end)]).await.unwrap();
    let failed = store.job(&project(), &id("j-1")).await.unwrap();
    assert_eq!((failed.failure, failed.finished), (Some(json!({"signal": 9})), Some(UtcMs(2000))));
    assert_eq!(failed.outputs, json!([{"digest": digest(1).to_string()}]));
    for state in State::ALL {
        let refused = store.apply(&[write(change("j-1", 5, *state, 2))]).await.unwrap_err();
        assert!(matches!(refused, Error::Conflict(_)), "{state}: {refused}");
    }
    assert_eq!(kinds(&store).await.len(), 5);
}

pub(crate) async fn a_change_that_fails_half_way_leaves_nothing(store: Arc<Store>) {
    store.create_job(&new_job("j-1"), &[], None).await.unwrap();
    let before = store.job(&project(), &id("j-1")).await.unwrap();
    let halves = [
        write(change("j-1", 1, State::Starting, 1)),
        Write::Artifact(Box::new(made_by(artifact(1, &[]), "j-1", 1))),
        Write::Counter { name: "cohort", value: 5 },
        write(change("j-1", 1, State::Running, 1)),
    ];
    store.apply(&halves).await.unwrap_err();
    assert_eq!(store.job(&project(), &id("j-1")).await.unwrap(), before);
    assert!(matches!(store.artifact(&project(), digest(1)).await, Err(Error::NotFound { .. })));
    assert!(store.unfinished().await.unwrap().counters.is_empty());
    assert_eq!(kinds(&store).await, ["job.created"]);

    // The caller goes away in the middle: the call is dropped at every await in turn, until one run completes.
    for polls in 0..1000 {
        let writes = [write(change("j-1", 1, State::Starting, 1)), Write::Counter { name: "cohort", value: 5 }];
        let mut call = Box::pin(store.apply(&writes));
        let done = poll_times(&mut call, polls).await;
        drop(call);
        // A change that was already being committed may end while we look: both are read from one moment.
        let (job, counters) = loop {
            let job = store.job(&project(), &id("j-1")).await.unwrap();
            let counters = store.unfinished().await.unwrap().counters;
            if store.job(&project(), &id("j-1")).await.unwrap().version == job.version {
                break (job, counters);
            }
        };
        // All or nothing, whichever it was.
        assert_eq!(job.version == 2, !counters.is_empty(), "half a change after {polls} polls");
        assert_eq!(kinds(&store).await.len(), if job.version == 2 { 2 } else { 1 });
        if done || job.version == 2 {
            return;
        }
    }
    panic!("the change never completed");
}

/// Polls a future `polls` times, giving the database time in between; whether it completed.
async fn poll_times<T>(future: &mut std::pin::Pin<Box<impl Future<Output = T>>>, polls: usize) -> bool {
    for _ in 0..polls {
        let done = std::future::poll_fn(|cx| std::task::Poll::Ready(future.as_mut().poll(cx).is_ready())).await;
        if done {
            return true;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    false
}

pub(crate) async fn only_the_current_epoch_writes(store: Arc<Store>) {
    store.create_job(&new_job("j-1"), &[], None).await.unwrap();
    start(&store, "j-1", 1).await;
    start(&store, "j-1", 2).await;
    for (epoch, good) in [(0, false), (1, false), (2, true), (3, false), (u64::MAX, false)] {
        let progress = Write::Progress {
            project: project(),
            job: id("j-1"),
            epoch: Epoch(epoch),
            progress: json!({"step": epoch}),
            now: UtcMs(1),
        };
        let commit = Write::Artifact(Box::new(made_by(artifact(1, &[]), "j-1", epoch)));
        let metrics = Write::Metrics { project: project(), job: id("j-1"), epoch: Epoch(epoch), points: vec![] };
        for write in [progress, metrics, commit] {
            let result = store.apply(std::slice::from_ref(&write)).await;
            match result {
                Ok(_) => assert!(good, "epoch {epoch} wrote {write:?}"),
                Err(error) => assert!(!good && matches!(error, Error::StaleEpoch { .. }), "{epoch}: {error}"),
            }
        }
    }
    assert_eq!(store.job(&project(), &id("j-1")).await.unwrap().progress, Some(json!({"step": 2})));
    finish(&store, "j-1").await;
    let late = store.commit_artifact(made_by(artifact(2, &[]), "j-1", 2)).await.unwrap_err();
    assert!(late.to_string().contains("the job has succeeded"), "{late}");
    assert!(store.artifact(&project(), digest(2)).await.is_err());
}

pub(crate) async fn unfinished_work_comes_back_whole(store: Arc<Store>) {
    for job in ["j-1", "j-2", "j-3"] {
        store.create_job(&new_job(job), &[], None).await.unwrap();
    }
    let attempt = Attempt {
        project: project(),
        job: id("j-2"),
        epoch: Epoch(1),
        cohort: CohortId(7),
        workers: vec![WorkerId::new("w1").unwrap(), WorkerId::new("w2").unwrap()],
        outcome: None,
        message: String::new(),
        reported: 0,
        started: UtcMs(2000),
        ended: None,
    };
    let cohort = Cohort {
        cohort: CohortId(7),
        project: project(),
        core: json!({"members": ["w1", "w2"]}),
        created: UtcMs(2000),
        ended: None,
    };
    store
        .apply(&[
            write(change("j-2", 1, State::Starting, 1)),
            Write::Attempt(Box::new(attempt.clone())),
            Write::Cohort(Box::new(cohort.clone())),
            Write::Counter { name: "cohort", value: 7 },
        ])
        .await
        .unwrap();
    finish(&store, "j-3").await;

    let all = store.unfinished().await.unwrap();
    assert_eq!(all.jobs.iter().map(|job| job.job.as_str()).collect::<Vec<_>>(), ["j-1", "j-2"]);
    assert_eq!(all.jobs[1].core, json!({"order": 2}));
    assert_eq!(all.attempts, std::slice::from_ref(&attempt));
    assert_eq!(all.cohorts, std::slice::from_ref(&cohort));
    assert_eq!(all.counters, BTreeMap::from([("cohort".to_owned(), 7)]));

    let reported = |number| Write::Reported { project: project(), job: id("j-2"), epoch: Epoch(1), number };
    store.apply(&[reported(4), reported(3)]).await.unwrap();
    assert_eq!(store.unfinished().await.unwrap().attempts[0].reported, 4);

    let ended = Attempt { outcome: Some("lost".to_owned()), ended: Some(UtcMs(2500)), ..attempt };
    let closed = Cohort { ended: Some(UtcMs(2500)), ..cohort };
    store.apply(&[Write::Attempt(Box::new(ended.clone())), Write::Cohort(Box::new(closed))]).await.unwrap();
    let all = store.unfinished().await.unwrap();
    assert!(all.attempts.is_empty() && all.cohorts.is_empty());
    assert_eq!(store.attempts(&project(), &id("j-2")).await.unwrap(), [Attempt { reported: 4, ..ended }]);
}

fn points(name: &str, steps: std::ops::RangeInclusive<u64>, value: f64) -> Vec<NewPoint> {
    steps
        .map(|step| NewPoint {
            name: name.to_owned(),
            step: Step(step),
            value,
            tokens: Tokens(step * 100),
            time: UtcMs(1),
        })
        .collect()
}

async fn append(store: &Store, epoch: u64, points: Vec<NewPoint>) {
    let write = Write::Metrics { project: project(), job: id("j-1"), epoch: Epoch(epoch), points };
    store.apply(&[write]).await.unwrap();
}

pub(crate) async fn a_retried_attempts_metrics_replace_the_lost_ones(store: Arc<Store>) {
    store.create_job(&new_job("j-1"), &[], None).await.unwrap();
    start(&store, "j-1", 1).await;
    append(&store, 1, points("train/loss", 1..=9, 1.0)).await;
    start(&store, "j-1", 2).await;
    // The second attempt resumed at the checkpoint of step 5.
    append(&store, 2, points("train/loss", 6..=7, 2.0)).await;
    // Sent again, its acknowledgement was lost.
    append(&store, 2, points("train/loss", 6..=7, 2.5)).await;
    let oldest = MetricFilter { order: Order::Oldest, ..MetricFilter::default() };
    let listed = store.metrics(&project(), &id("j-1"), &oldest, None, 100).await.unwrap();
    let numbers: Vec<u64> = listed.items.iter().map(|point| point.seq.0).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 10, 11]);
    let steps: Vec<_> = listed.items.iter().map(|p| (p.point.step.0, p.epoch.0, p.point.value)).collect();
    assert_eq!(steps, [(1, 1, 1.0), (2, 1, 1.0), (3, 1, 1.0), (4, 1, 1.0), (5, 1, 1.0), (6, 2, 2.0), (7, 2, 2.0)]);
}

pub(crate) async fn metrics_are_paged_and_filtered(store: Arc<Store>) {
    store.create_job(&new_job("j-1"), &[], None).await.unwrap();
    start(&store, "j-1", 1).await;
    append(&store, 1, points("train/loss", 1..=5, 1.0)).await;
    append(&store, 1, points("data/a.b/loss", 1..=5, f64::NAN)).await;
    for order in [Order::Oldest, Order::Newest] {
        let filter = MetricFilter { order, ..MetricFilter::default() };
        let (mut page, mut seen) = (None, Vec::new());
        loop {
            let found = store.metrics(&project(), &id("j-1"), &filter, page.as_deref(), 3).await.unwrap();
            assert!(found.items.len() <= 3);
            seen.extend(found.items.into_iter().map(|p| p.seq.0));
            page = found.next;
            if page.is_none() {
                break;
            }
        }
        if order == Order::Newest {
            seen.reverse();
        }
        assert_eq!(seen, (1..=10).collect::<Vec<_>>());
    }
    let filter = MetricFilter {
        names: vec!["data/a.b/loss".to_owned()],
        from_step: Step(2),
        after: Seq(8),
        order: Order::Oldest,
    };
    let found = store.metrics(&project(), &id("j-1"), &filter, None, 100).await.unwrap().items;
    assert_eq!(found.iter().map(|p| p.point.step.0).collect::<Vec<_>>(), [4, 5]);
    assert!(found.iter().all(|p| p.point.value.is_nan()));
}

pub(crate) async fn projects_do_not_see_each_other(store: Arc<Store>) {
    let other = Project::new("other").unwrap();
    store.create_job(&new_job("j-1"), &[], None).await.unwrap();
    start(&store, "j-1", 1).await;
    append(&store, 1, points("train/loss", 1..=5, 1.0)).await;
    let mut mine = artifact(1, &[]);
    mine.tags = vec![tag("a")];
    store.commit_artifact(mine).await.unwrap();

    assert!(matches!(store.job(&other, &id("j-1")).await, Err(Error::NotFound { .. })));
    assert!(store.jobs(&other, &Filter::default(), None, 10).await.unwrap().items.is_empty());
    assert!(store.events(&other, None, Seq(0), 10).await.unwrap().is_empty());
    let metrics = store.metrics(&other, &id("j-1"), &MetricFilter::default(), None, 10).await.unwrap();
    assert!(metrics.items.is_empty());
    assert!(matches!(store.artifact(&other, digest(1)).await, Err(Error::NotFound { .. })));
    assert!(matches!(store.resolve_tag(&other, &tag("a")).await, Err(Error::NotFound { .. })));
    assert!(matches!(
        store.delete_artifact(&other, digest(1), true, UtcMs(1), None).await,
        Err(Error::NotFound { .. })
    ));
    let theirs = NewJob { project: other.clone(), inputs: vec![input("base", 1)], ..new_job("j-1") };
    assert!(matches!(store.create_job(&theirs, &[], None).await, Err(Error::NotFound { .. })));
    assert_eq!(store.last_event(&other).await.unwrap(), Seq(0));
}

fn input(role: &str, n: u8) -> Input {
    Input { role: role.to_owned(), digest: digest(n) }
}

pub(crate) async fn an_artifact_becomes_visible_with_lineage_tags_and_events(store: Arc<Store>) {
    store.create_job(&new_job("j-1"), &[], None).await.unwrap();
    start(&store, "j-1", 1).await;
    store.commit_artifact(artifact(1, &[])).await.unwrap();
    let mut made = made_by(artifact(2, &[1]), "j-1", 1);
    made.tags = vec![tag("helper"), tag("helper:v1")];
    let applied = store.commit_artifact(made.clone()).await.unwrap();
    let seen: Vec<_> = applied.events.iter().map(|event| event.event.kind.as_str()).collect();
    assert_eq!(seen, ["artifact.committed", "tag.moved", "tag.moved"]);
    // A repeat (its answer was lost) has no second effect.
    assert!(store.commit_artifact(made.clone()).await.unwrap().events.is_empty());

    let stored = store.artifact(&project(), digest(2)).await.unwrap();
    assert_eq!((stored.kind.as_str(), stored.size_bytes, stored.created), ("adapter", 30, UtcMs(3002)));
    assert_eq!(stored.tags, [tag("helper:latest"), tag("helper:v1")]);
    assert_eq!(stored.commits.len(), 1);
    assert_eq!(stored.commits[0].maker, made.maker.clone().unwrap());
    assert_eq!(store.artifact_files(&project(), digest(2)).await.unwrap(), made.files);
    assert_eq!(store.resolve_tag(&project(), &tag("helper")).await.unwrap(), digest(2));

    // Another job that makes the same bytes is on record too.
    store.create_job(&new_job("j-2"), &[], None).await.unwrap();
    start(&store, "j-2", 1).await;
    store.commit_artifact(made_by(artifact(2, &[1]), "j-2", 1)).await.unwrap();
    let commits = store.artifact(&project(), digest(2)).await.unwrap().commits;
    assert_eq!(commits.iter().map(|commit| commit.maker.job.as_str()).collect::<Vec<_>>(), ["j-1", "j-2"]);
}

pub(crate) async fn tags_move_and_leave_a_trail(store: Arc<Store>) {
    store.commit_artifact(artifact(1, &[])).await.unwrap();
    store.commit_artifact(artifact(2, &[])).await.unwrap();
    let to = |n: u8, expected: Option<u8>| Write::Tag {
        project: project(),
        tag: tag("a:b"),
        digest: digest(n),
        expected: expected.map(digest),
        job: None,
        now: UtcMs(1),
    };
    let unexpected = store.apply(&[to(1, Some(2))]).await.unwrap_err();
    assert!(matches!(unexpected, Error::Conflict(_)), "{unexpected}");
    for (n, expected) in [(1, None), (2, Some(1)), (2, Some(2))] {
        store.apply(&[to(n, expected)]).await.unwrap();
    }
    assert!(matches!(store.apply(&[to(1, Some(1))]).await, Err(Error::Conflict(_))));
    assert_eq!(store.resolve_tag(&project(), &tag("a:b")).await.unwrap(), digest(2));
    assert!(matches!(store.apply(&[to(9, None)]).await, Err(Error::NotFound { .. })));
    assert_eq!(store.tags(&project()).await.unwrap(), [(tag("a:b"), digest(2))]);
    store.untag(&project(), &tag("a:b"), UtcMs(2), None).await.unwrap();
    assert!(matches!(store.untag(&project(), &tag("a:b"), UtcMs(2), None).await, Err(Error::NotFound { .. })));
    let moves: Vec<_> = store
        .events(&project(), None, Seq(2), 10)
        .await
        .unwrap()
        .into_iter()
        .map(|event| (event.event.kind, event.event.data["from"].clone()))
        .collect();
    assert_eq!(
        moves,
        [
            ("tag.moved".to_owned(), json!(null)),
            ("tag.moved".to_owned(), json!(digest(1).to_string())),
            ("tag.removed".to_owned(), json!(digest(2).to_string())),
        ]
    );
}

pub(crate) async fn deletion_spares_what_is_needed(store: Arc<Store>) {
    store.commit_artifact(artifact(1, &[])).await.unwrap();
    let mut tagged = artifact(2, &[1]);
    tagged.tags = vec![tag("a")];
    store.commit_artifact(tagged).await.unwrap();
    let job = NewJob { inputs: vec![input("base", 1)], ..new_job("j-1") };
    store.create_job(&job, &[], None).await.unwrap();
    start(&store, "j-1", 1).await;
    store.commit_artifact(made_by(artifact(3, &[1]), "j-1", 1)).await.unwrap();

    for n in [1, 3] {
        let used = store.delete_artifact(&project(), digest(n), true, UtcMs(1), None).await.unwrap_err();
        assert!(used.to_string().contains("\"j-1\", which has not ended"), "{used}");
    }
    let tagged = store.delete_artifact(&project(), digest(2), false, UtcMs(1), None).await.unwrap_err();
    assert!(matches!(&tagged, Error::InUse(text) if text.contains("a:latest")), "{tagged}");
    let (deleted, applied) = store.delete_artifact(&project(), digest(2), true, UtcMs(1), None).await.unwrap();
    // The blob that 1 and 3 hold too is no orphan.
    assert_eq!(deleted.orphans, [digest(102)]);
    assert_eq!(deleted.tags, [tag("a")]);
    let seen: Vec<_> = applied.events.iter().map(|event| event.event.kind.as_str()).collect();
    assert_eq!(seen, ["tag.removed", "artifact.deleted"]);
    assert!(matches!(store.artifact(&project(), digest(2)).await, Err(Error::NotFound { .. })));

    finish(&store, "j-1").await;
    let made = store.delete_artifact(&project(), digest(1), false, UtcMs(1), None).await.unwrap_err();
    assert!(matches!(&made, Error::InUse(text) if text.contains("was made from")), "{made}");
    store.delete_artifact(&project(), digest(1), true, UtcMs(1), None).await.unwrap();
    // What was made from it still says so.
    let edges = store.lineage(&project(), digest(3), Direction::Causes, 5).await.unwrap().edges;
    assert_eq!(edges.iter().map(|edge| edge.cause).collect::<Vec<_>>(), [digest(1)]);
    let (last, _) = store.delete_artifact(&project(), digest(3), false, UtcMs(1), None).await.unwrap();
    assert_eq!(last.orphans, [digest(103), digest(200)]);
}

pub(crate) async fn old_checkpoints_go_unless_somebody_needs_them(store: Arc<Store>) {
    store.create_job(&new_job("j-1"), &[], None).await.unwrap();
    store.create_job(&new_job("j-2"), &[], None).await.unwrap();
    start(&store, "j-1", 1).await;
    start(&store, "j-2", 1).await;
    // 1 is plain, 2 is tagged, 3 was made by another job too, 4 is an input, 5 was made by another job only.
    for n in 1..=4 {
        store.commit_artifact(made_by(artifact(n, &[]), "j-1", 1)).await.unwrap();
    }
    let write = Write::Tag {
        project: project(),
        tag: tag("keep"),
        digest: digest(2),
        expected: None,
        job: None,
        now: UtcMs(1),
    };
    store.apply(&[write]).await.unwrap();
    for n in [3, 5] {
        store.commit_artifact(made_by(artifact(n, &[]), "j-2", 1)).await.unwrap();
    }
    let user = NewJob { inputs: vec![input("continue_from", 4)], ..new_job("j-3") };
    store.create_job(&user, &[], None).await.unwrap();
    let before = store.last_event(&project()).await.unwrap();
    let old: Vec<Digest> = [1, 2, 3, 4, 5, 99].into_iter().map(digest).collect();
    let pruned = store.prune_checkpoints(&project(), &id("j-1"), &old, UtcMs(1)).await.unwrap();
    assert_eq!((pruned.artifacts, pruned.orphans.clone()), (vec![digest(1)], vec![digest(101)]));
    let seen = store.events(&project(), Some(&id("j-1")), before, 10).await.unwrap();
    assert_eq!(seen.iter().map(|event| event.event.kind.as_str()).collect::<Vec<_>>(), ["artifact.deleted"]);
    let asked = [digest(101), digest(102), digest(200), digest(77)];
    assert_eq!(store.unreferenced(&project(), &asked).await.unwrap(), [digest(101), digest(77)]);
}

pub(crate) async fn lineage_is_followed_both_ways(store: Arc<Store>) {
    // 1 and 2 make 3; 3 makes 4; 4 and 1 make 5.
    for (n, causes) in [(1, &[][..]), (2, &[]), (3, &[1, 2]), (4, &[3]), (5, &[1, 4])] {
        store.commit_artifact(artifact(n, causes)).await.unwrap();
    }
    let edges = |of: u8, direction, depth| {
        let store = Arc::clone(&store);
        async move {
            let found = store.lineage(&project(), digest(of), direction, depth).await.unwrap();
            assert_eq!(found.is_cut, depth == 1, "{found:?}");
            let edge = |edge: &Edge| (edge.depth, edge.artifact.as_bytes()[0], edge.cause.as_bytes()[0]);
            found.edges.iter().map(edge).collect::<Vec<_>>()
        }
    };
    assert_eq!(edges(5, Direction::Causes, 1).await, [(1, 5, 1), (1, 5, 4)]);
    assert_eq!(edges(5, Direction::Causes, 9).await, [(1, 5, 1), (1, 5, 4), (2, 4, 3), (3, 3, 1), (3, 3, 2)]);
    assert_eq!(edges(1, Direction::Effects, 9).await, [(1, 3, 1), (1, 5, 1), (2, 4, 3), (3, 5, 4)]);
    assert_eq!(edges(2, Direction::Causes, 9).await, []);
    let absent = store.lineage(&project(), digest(9), Direction::Causes, 1).await.unwrap_err();
    assert!(matches!(absent, Error::NotFound { .. }), "{absent}");
}

pub(crate) async fn artifacts_are_paged_and_filtered(store: Arc<Store>) {
    for n in 1..=5 {
        let mut new = artifact(n, &[]);
        if n == 2 {
            "dataset".clone_into(&mut new.kind);
            new.tags = vec![tag("set:v1")];
        }
        // Two of the same moment: the digest decides their order.
        new.now = UtcMs(if n == 3 { 2 } else { i64::from(n) });
        store.commit_artifact(new).await.unwrap();
    }
    for (order, expected) in [(Order::Newest, [5, 4, 3, 2, 1]), (Order::Oldest, [1, 2, 3, 4, 5])] {
        let filter = ArtifactFilter { order, ..ArtifactFilter::default() };
        let (mut page, mut seen) = (None, Vec::new());
        loop {
            let found = store.artifacts(&project(), &filter, page.as_deref(), 2).await.unwrap();
            assert!(found.items.iter().all(|artifact| artifact.n_files == 2));
            seen.extend(found.items.iter().map(|artifact| artifact.digest.as_bytes()[0]));
            page = found.next;
            if page.is_none() {
                break;
            }
        }
        assert_eq!(seen, expected);
    }
    for (filter, expected) in [
        (ArtifactFilter { kinds: vec!["dataset".to_owned()], ..Default::default() }, 1),
        (ArtifactFilter { without_kinds: vec!["dataset".to_owned()], ..Default::default() }, 4),
        (ArtifactFilter { tag_name: Some("set".to_owned()), ..Default::default() }, 1),
        (ArtifactFilter { tag_name: Some("se".to_owned()), ..Default::default() }, 0),
        (ArtifactFilter { job: Some(id("j-1")), ..Default::default() }, 0),
    ] {
        assert_eq!(store.artifacts(&project(), &filter, None, 9).await.unwrap().items.len(), expected, "{filter:?}");
    }
}

pub(crate) async fn page_tokens_are_checked(store: Arc<Store>) {
    for token in ["", "a/b", "'; DROP TABLE jobs; --", "1.zz", ".", "x.y"] {
        let artifacts = store.artifacts(&project(), &ArtifactFilter::default(), Some(token), 9).await;
        assert!(matches!(artifacts, Err(Error::Invalid(_))), "{token:?}");
    }
    for token in ["", "a/b", "J-1"] {
        let jobs = store.jobs(&project(), &Filter::default(), Some(token), 9).await;
        assert!(matches!(jobs, Err(Error::Invalid(_))), "{token:?}");
    }
    for token in ["", "x", "-1", "1.train/loss"] {
        let metrics = store.metrics(&project(), &id("j-1"), &MetricFilter::default(), Some(token), 9).await;
        assert!(matches!(metrics, Err(Error::Invalid(_))), "{token:?}");
    }
}

pub(crate) async fn counters_only_grow(store: Arc<Store>) {
    for (value, good) in [(3, true), (3, true), (2, false), (9, true)] {
        let result = store.apply(&[Write::Counter { name: "cohort", value }]).await;
        assert_eq!(result.is_ok(), good, "{value}: {result:?}");
    }
    assert_eq!(store.unfinished().await.unwrap().counters["cohort"], 9);
}

pub(crate) async fn events_of_old_jobs_are_forgotten_but_for_their_end(store: Arc<Store>) {
    for job in ["j-1", "j-2", "j-3"] {
        store.create_job(&new_job(job), &[], None).await.unwrap();
        for _ in 0..3 {
            store.apply(&[Write::Event(event(job, "job.progress"))]).await.unwrap();
        }
    }
    // One has ended, one ends later, one goes on.
    finish(&store, "j-1").await;
    finish(&store, "j-2").await;
    let finished = |job: &'static str| {
        let store = Arc::clone(&store);
        async move { store.job(&project(), &id(job)).await.unwrap().finished.unwrap() }
    };
    let last = store.last_event(&project()).await.unwrap();
    assert_eq!(store.projects().await.unwrap(), [project()]);
    let before = UtcMs(finished("j-1").await.0 + 1);
    // As many at a time as are asked for, and never what is left of a job's end.
    let of = |job: &'static str| {
        let store = Arc::clone(&store);
        async move { store.events(&project(), Some(&id(job)), Seq(0), 100).await.unwrap() }
    };
    let (of_one, of_three) = (of("j-1").await, of("j-3").await);
    assert_eq!(store.forget_events(&project(), before, 1, 2).await.unwrap(), 2);
    let more = store.forget_events(&project(), before, 1, 100).await.unwrap();
    let is_both = finished("j-2").await < before;
    let expected = if is_both { 2 * (of_one.len() - 1) } else { of_one.len() - 1 };
    assert_eq!(more as usize + 2, expected);
    assert_eq!(store.forget_events(&project(), before, 1, 100).await.unwrap(), 0);
    assert_eq!(of("j-1").await, of_one[of_one.len() - 1..]);
    assert_eq!(of("j-3").await, of_three, "it goes on");
    // Numbers go on.
    assert_eq!(store.last_event(&project()).await.unwrap(), last);
    let next = store.apply(&[Write::Event(event("j-3", "job.progress"))]).await.unwrap();
    assert_eq!(next.events[0].seq, Seq(last.0 + 1));
    store.may_write().await.unwrap();
}

pub(crate) async fn everything_is_there_after_reopening(database: &Database) {
    let store = Store::open(database).await.unwrap();
    let job = new_job("j-1");
    store.create_job(&job, &[], Some(&request("r", 1))).await.unwrap();
    store.close().await;
    drop(store);

    let store = Store::open(database).await.unwrap();
    assert_eq!(store.job(&job.project, &job.job).await.unwrap().spec, job.spec);
    let again = store.create_job(&new_job("j-2"), &[], Some(&request("r", 1))).await.unwrap();
    assert!(!again.is_new);
    assert_eq!(store.last_event(&job.project).await.unwrap(), Seq(1));
}
