//! The engine against a server that answers like Kubernetes' own: what it asks for, what it makes of what it hears, and what becomes of
//! calls that fail.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use attune_scheduler::providers::{self, Account, Defaults, WorkerProvider};
use attune_scheduler_core::supply::{RequestId, Standing};
use serde_json::{Value, json};

use super::server::{Answer, Api, Fault, Server, failure};
use super::world::{Kind, NAMESPACE, is_deleted, name};

/// A pool of Kubernetes; nothing of `more` need be said.
pub(super) fn pool(kubeconfig: &Path, more: &Value) -> Value {
    let mut kubernetes = json!({
        "kubeconfig": kubeconfig, "context": "test", "namespace": NAMESPACE,
        "image": "registry.internal/attune:0.1.0", "memory": "1500M", "disk": "10Gi",
        "token": {"secret": "attune-worker", "key": "secret"},
    });
    for (name, value) in more.as_object().unwrap() {
        kubernetes[name] = value.clone();
    }
    json!({"name": "test", "max": 2, "server": "https://scheduler.internal:7070", "kubernetes": kubernetes})
}

fn engine(pool: &Value) -> Arc<dyn WorkerProvider> {
    let defaults = Defaults { program: "/attune".into(), server: None, needs_token: true };
    providers::read(&pool.to_string(), &defaults).unwrap().provider
}

/// What the scheduler is allowed, as `attune workers render --rights` has it.
pub(super) fn role() -> String {
    let account = Account { namespace: None, name: "attune".to_owned() };
    engine(&pool("/kubeconfig".as_ref(), &json!({}))).rights(&account).unwrap()
}

/// A server with room for so many Pods, and an engine that asks it.
fn scene(nodes: usize) -> (Server, Arc<dyn WorkerProvider>) {
    let server = Server::start(nodes, &role());
    let engine = engine(&pool(&server.kubeconfig(), &json!({})));
    (server, engine)
}

fn request(number: u32) -> RequestId {
    RequestId(format!("r-{number}").parse().unwrap())
}

async fn standings(engine: &Arc<dyn WorkerProvider>) -> BTreeMap<String, Standing> {
    let listed = engine.list().await.unwrap();
    listed.into_iter().map(|(request, standing)| (request.to_string(), standing)).collect()
}

fn one(standing: Standing) -> BTreeMap<String, Standing> {
    BTreeMap::from([("r-1".to_owned(), standing)])
}

#[tokio::test]
async fn a_request_is_one_job_from_asking_to_its_end() {
    let (server, engine) = scene(0);
    let world = &server.api.world;
    assert_eq!(standings(&engine).await, BTreeMap::new());
    // However often it is asked for.
    for _ in 0..2 {
        engine.ask(&request(1)).await.unwrap();
    }
    let job = world.only(Kind::Job);
    assert_eq!(name(&job), "attune-r-1");
    assert!(!job.to_string().contains("s3cret"), "{job}");
    assert_eq!(standings(&engine).await, one(Standing::Waiting));
    // Another scheduler, or this one after it has started again, finds it.
    let successor = self::engine(&pool(&server.kubeconfig(), &json!({})));
    assert_eq!(standings(&successor).await, one(Standing::Waiting));

    world.change(|state| state.nodes = 1);
    let pod = name(&world.only(Kind::Pod));
    assert_eq!(standings(&engine).await, one(Standing::Running));
    world.hold(&pod, "ImagePullBackOff", "Back-off pulling image");
    assert_eq!(standings(&engine).await, one(Standing::Running));
    world.run(&pod);
    assert_eq!(standings(&engine).await, one(Standing::Running));

    // It is given back: told to end, with all its time, and there until it has ended.
    engine.give_back(&request(1)).await.unwrap();
    let pod = world.only(Kind::Pod);
    assert!(is_deleted(&pod) && is_deleted(&world.only(Kind::Job)));
    assert_eq!(pod["metadata"]["deletionGracePeriodSeconds"], json!(90));
    assert_eq!(standings(&engine).await, one(Standing::Running));
    engine.give_back(&request(1)).await.unwrap();
    world.end(&name(&pod), 0, "Completed", "");
    assert_eq!(standings(&engine).await, BTreeMap::new());
    assert!(world.all(Kind::Job).is_empty() && world.all(Kind::Pod).is_empty());
    // What is gone is none to complain about.
    engine.give_back(&request(1)).await.unwrap();
    engine.withdraw(&request(1)).await.unwrap();
}

#[tokio::test]
async fn a_pod_that_ends_by_itself_ends_its_request_and_is_never_started_again() {
    let (server, engine) = scene(2);
    let world = &server.api.world;
    for (number, status, reason) in [(1, 137, "OOMKilled"), (2, 0, "Completed")] {
        engine.ask(&request(number)).await.unwrap();
        let pods = world.all(Kind::Pod);
        let pod = pods.iter().find(|pod| pod["metadata"]["labels"]["attune.request"] == json!(format!("r-{number}")));
        world.end(&name(pod.unwrap()), status, reason, "");
    }
    assert_eq!(standings(&engine).await, BTreeMap::new());
    // They stay to be looked at, and what follows from a request's name is taken.
    assert_eq!(world.all(Kind::Job).len(), 2);
    engine.ask(&request(1)).await.unwrap();
    assert_eq!((world.all(Kind::Job).len(), world.all(Kind::Pod).len()), (2, 2));
    // A node that is gone takes its Pod with it.
    engine.ask(&request(3)).await.unwrap();
    let pods = world.all(Kind::Pod);
    let lost = pods.iter().find(|pod| pod["metadata"]["labels"]["attune.request"] == json!("r-3")).unwrap();
    world.delete(Kind::Pod, &name(lost), &json!({"gracePeriodSeconds": 0}));
    assert_eq!(standings(&engine).await, BTreeMap::new());
    assert_eq!(world.all(Kind::Job).len(), 3);
}

#[tokio::test]
async fn what_is_withdrawn_ends_at_once_whether_it_waits_runs_hangs_or_has_lost_its_node() {
    let (server, engine) = scene(0);
    let world = &server.api.world;
    engine.ask(&request(1)).await.unwrap();
    engine.withdraw(&request(1)).await.unwrap();
    assert_eq!(standings(&engine).await, BTreeMap::new());
    assert!(world.all(Kind::Pod).is_empty() && world.all(Kind::Job).is_empty());

    world.change(|state| state.nodes = 1);
    engine.ask(&request(2)).await.unwrap();
    world.run(&name(&world.only(Kind::Pod)));
    engine.give_back(&request(2)).await.unwrap();
    // It does not end; now it has a second, not the rest of its time.
    engine.withdraw(&request(2)).await.unwrap();
    let pod = world.only(Kind::Pod);
    assert_eq!(pod["metadata"]["deletionGracePeriodSeconds"], json!(1));
    assert_eq!(standings(&engine).await.len(), 1);
    // Its node does not answer, long after that second.
    let long_ago = json!("2026-01-01T00:00:00Z");
    world.set(Kind::Pod, &name(&pod), "/metadata/deletionTimestamp", long_ago);
    engine.withdraw(&request(2)).await.unwrap();
    assert!(world.all(Kind::Pod).is_empty() && world.all(Kind::Job).is_empty());

    // Somebody deletes the Job and leaves the Pod: it counts, and is told to end.
    for give_back in [true, false] {
        engine.ask(&request(3)).await.unwrap();
        let pod = name(&world.only(Kind::Pod));
        world.run(&pod);
        world.delete(Kind::Job, "attune-r-3", &json!({"propagationPolicy": "Orphan"}));
        assert_eq!(standings(&engine).await, BTreeMap::from([("r-3".to_owned(), Standing::Running)]));
        let told = if give_back { engine.give_back(&request(3)).await } else { engine.withdraw(&request(3)).await };
        told.unwrap();
        assert!(is_deleted(&world.only(Kind::Pod)), "{give_back}");
        world.end(&pod, 0, "Completed", "");
        assert_eq!(standings(&engine).await, BTreeMap::new());
    }
}

#[tokio::test]
async fn a_queue_holds_a_job_back_and_a_quota_its_pod() {
    let (server, engine) = scene(1);
    let world = &server.api.world;
    engine.ask(&request(1)).await.unwrap();
    // Its Pod runs, then a queue takes its place for somebody else, later it is let in again: the same request waits.
    world.run(&name(&world.only(Kind::Pod)));
    world.set(Kind::Job, "attune-r-1", "/spec/suspend", json!(true));
    world.delete(Kind::Pod, &name(&world.only(Kind::Pod)), &json!({"gracePeriodSeconds": 0}));
    assert_eq!(standings(&engine).await, one(Standing::Waiting));
    engine.withdraw(&request(1)).await.unwrap();

    world.change(|state| state.quota = Some(0));
    engine.ask(&request(2)).await.unwrap();
    server.api.calls();
    assert_eq!(standings(&engine).await, BTreeMap::from([("r-2".to_owned(), Standing::Waiting)]));
    assert!(server.api.calls().contains(&("list", "events", String::new())));
    world.change(|state| state.quota = None);
    assert_eq!(standings(&engine).await, BTreeMap::from([("r-2".to_owned(), Standing::Running)]));
}

#[tokio::test]
async fn a_long_list_is_read_to_its_end_and_anew_where_its_rest_has_gone() {
    let (server, engine) = scene(0);
    let world = &server.api.world;
    let expected: BTreeSet<String> = (0..1200).map(|number| format!("r-{number:04}")).collect();
    let object = |kind: Kind, name: &str, pool: &str, request: &str| {
        let labels = json!({"attune.pool": pool, "attune.request": request});
        world.change(|state| {
            state.put(
                kind,
                json!({"metadata": {"name": name, "labels": labels}, "spec": {"suspend": true, "template": {}}}),
            )
        });
    };
    for request in &expected {
        object(Kind::Job, request, "test", request);
    }
    object(Kind::Job, "of-others", "others", "r-9999");
    object(Kind::Job, "odd", "test", "Not A Request");
    assert_eq!(engine.list().await.unwrap().len(), expected.len());
    let lists = |calls: Vec<(&str, &str, String)>| calls.into_iter().filter(|(_, of, _)| *of == "jobs").count();
    assert_eq!(lists(server.api.calls()), 3);
    // What the second part continues is too old when it is asked for.
    server.api.break_next("list", Fault::After(first_part(&server.api)));
    let found = engine.list().await.unwrap();
    assert_eq!(found.keys().map(ToString::to_string).collect::<BTreeSet<_>>(), expected);
    assert_eq!(lists(server.api.calls()), 5);
}

/// A part of a list that cannot be continued.
fn first_part(api: &Api) -> Answer {
    let stale = api.world.revision();
    api.world.change(|state| state.compacted = stale);
    let metadata = json!({"resourceVersion": "1", "continue": format!("{}-500", stale - 1)});
    let suspended = |request: &str| {
        let metadata = json!({"name": request, "labels": {"attune.pool": "test", "attune.request": request}});
        json!({"metadata": metadata, "spec": {"suspend": true, "template": {}}})
    };
    // One that is gone when everything is asked for again.
    Answer::new(
        200,
        &json!({"kind": "JobList", "apiVersion": "batch/v1", "metadata": metadata, "items": [suspended("r-gone")]}),
    )
}

#[tokio::test]
async fn a_job_that_may_have_been_made_is_asked_for_once_more_and_made_once() {
    let (server, engine) = scene(0);
    let broken = failure(500, "InternalError", "etcdserver: request timed out", &json!({}));
    server.api.break_next("create", Fault::After(broken.clone()));
    engine.ask(&request(1)).await.unwrap();
    server.api.break_next("create", Fault::Instead(broken.clone()));
    engine.ask(&request(2)).await.unwrap();
    assert_eq!(server.api.world.all(Kind::Job).len(), 2);
    // Twice is enough: then it is a refusal, and the next list says what became of it.
    server.api.break_next("create", Fault::Instead(broken.clone()));
    server.api.break_next("create", Fault::After(broken));
    let error = engine.ask(&request(3)).await.unwrap_err().to_string();
    assert_eq!(error, "Kubernetes cannot start a worker: the API server answers 500: etcdserver: request timed out");
    assert_eq!(standings(&engine).await.len(), 3);
}

#[tokio::test]
async fn whatever_the_server_refuses_is_said_in_its_words() {
    let (server, engine) = scene(1);
    let status = |code, reason, message| failure(code, reason, message, &json!({}));
    let busy = Answer { retry_after: Some(1), ..status(429, "TooManyRequests", "too many requests") };
    let page = Answer { body: "<html>Bad Gateway</html>".to_owned(), ..Answer::new(502, &json!({})) };
    for (answer, words) in [
        (status(403, "Forbidden", "exceeded quota: jobs"), "does not allow it (403): exceeded quota: jobs"),
        (
            status(404, "NotFound", "namespaces \"tuning\" not found"),
            "no such thing (404): namespaces \"tuning\" not found",
        ),
        (status(409, "Conflict", "the object has been modified"), "(409): the object has been modified"),
        (status(422, "Invalid", "spec.x: Invalid value"), "finds it invalid (422): spec.x: Invalid value"),
        (page, "answers 502: <html>Bad Gateway</html>"),
        (Answer { body: "{".to_owned(), ..Answer::new(200, &json!({})) }, "answer cannot be read: EOF"),
        (busy, "too much to do (429) and asks to be left alone for 1 s: too many requests"),
    ] {
        server.api.break_next("list", Fault::Instead(answer));
        let error = engine.list().await.unwrap_err().to_string();
        assert!(error.starts_with("Kubernetes cannot say what it has: ") && error.contains(words), "{error}");
    }
    // It is left alone for that time, and asked again after it.
    server.api.calls();
    let error = engine.list().await.unwrap_err().to_string();
    assert!(error.contains("left alone for 1 s: that time is not over"), "{error}");
    assert_eq!(server.api.calls(), []);
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    engine.list().await.unwrap();

    // What the server finds wrong with a manifest, by its own rules.
    let card = json!({"card": "example.com/npu", "pod": {"containers": [
        {"name": "worker", "volumeMounts": [{"name": "data", "mountPath": "/data"}]},
    ]}});
    let odd = self::engine(&pool(&server.kubeconfig(), &card));
    let error = odd.ask(&request(1)).await.unwrap_err().to_string();
    let words = "(422): Job.batch \"attune-r-1\" is invalid: spec.template.spec.containers[0].volumeMounts: Not found";
    assert!(error.ends_with(words), "{error}");
    // Rules that were taken away, one by one.
    for (verb, group, kind) in
        [("list", "batch", "jobs"), ("list", "", "pods"), ("create", "batch", "jobs"), ("delete", "batch", "jobs")]
    {
        let before = server.api.rules.lock().unwrap().clone();
        for rule in server.api.rules.lock().unwrap().as_array_mut().unwrap() {
            if rule["resources"] == json!([kind]) {
                rule["verbs"].as_array_mut().unwrap().retain(|has| *has != json!(verb));
            }
        }
        let refused = match verb {
            "list" => engine.list().await.unwrap_err(),
            "create" => engine.ask(&request(2)).await.unwrap_err(),
            _ => engine.withdraw(&request(2)).await.unwrap_err(),
        };
        let words = format!("cannot {verb} resource \"{kind}\" in API group \"{group}\" in the namespace \"tuning\"");
        assert!(refused.to_string().contains(&words), "{refused}");
        *server.api.rules.lock().unwrap() = before;
    }
}

#[tokio::test]
async fn a_server_that_is_away_slow_or_does_not_know_us_is_asked_again() {
    let (mut server, engine) = scene(1);
    engine.ask(&request(1)).await.unwrap();
    server.stop();
    // A connection that is kept open may be found cut off before a new one is refused.
    let error = engine.list().await.unwrap_err().to_string();
    assert!(error.contains("the API server does not answer: "), "{error}");
    assert!(engine.ask(&request(2)).await.is_err() && engine.give_back(&request(1)).await.is_err());
    let error = engine.list().await.unwrap_err().to_string();
    assert!(error.contains("the API server does not answer: ") && error.contains("onnection refused"), "{error}");
    server.come_back();
    assert_eq!(standings(&engine).await, one(Standing::Running));

    // A token that has run out is read again from where it came.
    server.believe_nobody();
    let stale = self::engine(&pool(&server.kubeconfig(), &json!({})));
    for _ in 0..2 {
        let error = stale.list().await.unwrap_err().to_string();
        assert!(error.ends_with("does not know who asks (401): Unauthorized"), "{error}");
    }
    server.believe();
    assert_eq!(standings(&stale).await, one(Standing::Running));

    let named = |kubeconfig: &Path, more: Value| self::engine(&pool(kubeconfig, &more));
    let nowhere = named(&server.folder().join("nothing"), json!({})).list().await.unwrap_err().to_string();
    assert!(nowhere.contains("no way to the API server: failed to read kubeconfig"), "{nowhere}");
    let unknown = named(&server.kubeconfig(), json!({"context": "tset"})).list().await.unwrap_err().to_string();
    assert!(unknown.contains("no way to the API server: failed to load current context: tset"), "{unknown}");

    // Nobody waits for ever. Time goes on by itself where everybody waits.
    server.api.break_next("list", Fault::Late);
    tokio::time::pause();
    let error = engine.list().await.unwrap_err().to_string();
    assert!(error.ends_with("the API server does not answer within 30 s"), "{error}");
}
