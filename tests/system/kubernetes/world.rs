//! What a cluster has: Jobs, Pods and events of one namespace, as JSON, and the controllers that act on them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard};

use serde_json::{Value, json};

use super::server::{Answer, Query, failure};

pub(super) const NAMESPACE: &str = "tuning";

/// A kind of object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Job,
    Pod,
    Event,
}

impl Kind {
    pub(super) const fn group(self) -> &'static str {
        if matches!(self, Self::Job) { "batch" } else { "" }
    }

    pub(super) const fn resource(self) -> &'static str {
        match self {
            Self::Job => "jobs",
            Self::Pod => "pods",
            Self::Event => "events",
        }
    }

    const fn list(self) -> (&'static str, &'static str) {
        match self {
            Self::Job => ("batch/v1", "JobList"),
            Self::Pod => ("v1", "PodList"),
            Self::Event => ("v1", "EventList"),
        }
    }
}

/// All that there is.
#[derive(Debug, Default)]
pub(super) struct State {
    objects: BTreeMap<(Kind, String), Value>,
    /// Counts all changes.
    revision: u64,
    /// Tokens for the rest of a list are worth nothing if they are from before.
    pub(super) compacted: u64,
    /// How many Pods may have a node.
    pub(super) nodes: usize,
    /// How many Pods there may be.
    pub(super) quota: Option<usize>,
    /// Jobs whose Pod has been made.
    begun: BTreeSet<String>,
    /// The most Jobs that had not ended at once.
    pub(super) jobs_max: usize,
}

/// A cluster.
#[derive(Debug, Default)]
pub(super) struct World {
    state: Mutex<State>,
}

fn text<'o>(object: &'o Value, pointer: &str) -> &'o str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

pub(super) fn name(object: &Value) -> String {
    text(object, "/metadata/name").to_owned()
}

pub(super) fn is_over(pod: &Value) -> bool {
    ["Succeeded", "Failed"].contains(&text(pod, "/status/phase"))
}

pub(super) fn is_deleted(object: &Value) -> bool {
    object["metadata"]["deletionTimestamp"].is_string()
}

pub(super) fn is_ended(job: &Value) -> bool {
    job["status"]["conditions"].is_array()
}

/// The time in `seconds` from now.
fn at(seconds: i64) -> String {
    let now = jiff::Timestamp::now().as_second();
    jiff::Timestamp::from_second(now + seconds).unwrap().to_string()
}

impl World {
    pub(super) fn new(nodes: usize) -> Self {
        Self { state: Mutex::new(State { nodes, ..State::default() }) }
    }

    /// Changes something, and lets the controllers act on it.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock().unwrap();
        let done = change(&mut state);
        state.reconcile();
        done
    }

    fn look(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// All objects of a kind.
    pub(super) fn all(&self, kind: Kind) -> Vec<Value> {
        self.look().of(kind).cloned().collect()
    }

    /// The one object of a kind.
    pub(super) fn only(&self, kind: Kind) -> Value {
        let all = self.all(kind);
        assert_eq!(all.len(), 1, "{all:#?}");
        all.into_iter().next().unwrap()
    }

    pub(super) fn jobs_max(&self) -> usize {
        self.look().jobs_max
    }

    /// A Pod's containers run.
    pub(super) fn run(&self, pod: &str) {
        self.change(|state| state.set_status(pod, "Running", &json!({"running": {}})));
    }

    /// A Pod's containers have ended, its status is so.
    pub(super) fn end(&self, pod: &str, exit_status: i32, reason: &str, message: &str) {
        self.change(|state| {
            let phase = if exit_status == 0 { "Succeeded" } else { "Failed" };
            let end = json!({"exitCode": exit_status, "reason": reason, "message": message});
            state.set_status(pod, phase, &json!({"terminated": end}));
            // A node takes away what was to be deleted, once it has ended.
            if state.objects.get(&(Kind::Pod, pod.to_owned())).is_some_and(is_deleted) {
                state.remove(Kind::Pod, pod);
            }
        });
    }

    /// Sets what a Pod's container waits for.
    pub(super) fn hold(&self, pod: &str, reason: &str, message: &str) {
        let state = json!({"waiting": {"reason": reason, "message": message}});
        self.change(|world| world.set_status(pod, "Pending", &state));
    }

    /// Sets a part of an object.
    pub(super) fn set(&self, kind: Kind, name: &str, pointer: &str, value: Value) {
        self.change(|state| {
            let object = state.objects.get_mut(&(kind, name.to_owned())).unwrap();
            let (parent, field) = pointer.rsplit_once('/').unwrap();
            object.pointer_mut(parent).unwrap()[field] = value;
        });
    }

    /// `POST` of a Job.
    pub(super) fn create(&self, job: &Value) -> Answer {
        let name = name(job);
        let causes = super::server::invalid(job);
        if !causes.is_empty() {
            let listed: Vec<String> =
                causes.iter().map(|cause| format!("{}: {}", text(cause, "/field"), text(cause, "/message"))).collect();
            let message = format!("Job.batch {name:?} is invalid: {}", listed.join(", "));
            return failure(
                422,
                "Invalid",
                &message,
                &json!({"name": name, "group": "batch", "kind": "Job", "causes": causes}),
            );
        }
        self.change(|state| {
            if state.objects.contains_key(&(Kind::Job, name.clone())) {
                let message = format!("jobs.batch {name:?} already exists");
                return failure(
                    409,
                    "AlreadyExists",
                    &message,
                    &json!({"name": name, "group": "batch", "kind": "jobs"}),
                );
            }
            let mut job = job.clone();
            let uid = format!("uid-{}", state.revision);
            job["metadata"]["uid"] = json!(uid);
            job["metadata"]["creationTimestamp"] = json!(at(0));
            job["status"] = json!({});
            for label in ["batch.kubernetes.io/job-name", "job-name"] {
                job["spec"]["template"]["metadata"]["labels"][label] = json!(name);
            }
            job["spec"]["selector"] = json!({"matchLabels": {"batch.kubernetes.io/controller-uid": uid}});
            state.put(Kind::Job, job.clone());
            state.jobs_max = state.jobs_max.max(state.of(Kind::Job).filter(|job| !is_ended(job)).count());
            Answer::new(201, &job)
        })
    }

    /// `DELETE` of an object.
    pub(super) fn delete(&self, kind: Kind, name: &str, options: &Value) -> Answer {
        self.change(|state| {
            let Some(object) = state.objects.get(&(kind, name.to_owned())).cloned() else {
                let message =
                    format!("{} {name:?} not found", if kind == Kind::Job { "jobs.batch" } else { kind.resource() });
                return failure(
                    404,
                    "NotFound",
                    &message,
                    &json!({"name": name, "group": kind.group(), "kind": kind.resource()}),
                );
            };
            match kind {
                Kind::Pod => state.delete_pod(name, options["gracePeriodSeconds"].as_i64()),
                Kind::Job | Kind::Event => state.delete_job(&object, text(options, "/propagationPolicy")),
            }
            Answer::new(200, &object)
        })
    }

    /// `GET` of all objects of a kind that the query selects.
    pub(super) fn list(&self, kind: Kind, query: &Query) -> Answer {
        let state = self.look();
        let (labels, fields) = (query.terms("labelSelector"), query.terms("fieldSelector"));
        let fits = |object: &Value| {
            let has = |(name, value): &(String, String)| object["metadata"]["labels"][name] == json!(value);
            let is = |(path, value): &(String, String)| text(object, &format!("/{}", path.replace('.', "/"))) == value;
            labels.iter().all(has) && fields.iter().all(is)
        };
        let all: Vec<&Value> = state.of(kind).filter(|object| fits(object)).collect();
        let first: usize = match query.get("continue").map(|token| token.split_once('-').unwrap()) {
            Some((revision, _)) if revision.parse::<u64>().unwrap() < state.compacted => {
                return failure(
                    410,
                    "Expired",
                    "The provided continue parameter is too old to display a consistent list result.",
                    &json!({}),
                );
            }
            Some((_, first)) => first.parse().unwrap(),
            None => 0,
        };
        let limit = query.get("limit").map_or(usize::MAX, |limit| limit.parse().unwrap());
        let rest = all.len().saturating_sub(first.saturating_add(limit));
        let mut metadata = json!({"resourceVersion": state.revision.to_string()});
        if rest > 0 {
            metadata["continue"] = json!(format!("{}-{}", state.revision, first + limit));
            metadata["remainingItemCount"] = json!(rest);
        }
        let items: Vec<&Value> = all.into_iter().skip(first).take(limit).collect();
        let (version, list) = kind.list();
        Answer::new(200, &json!({"apiVersion": version, "kind": list, "metadata": metadata, "items": items}))
    }

    /// The number of the last change.
    pub(super) fn revision(&self) -> u64 {
        self.look().revision
    }
}

impl State {
    fn of(&self, kind: Kind) -> impl Iterator<Item = &Value> {
        self.objects.iter().filter(move |((of, _), _)| *of == kind).map(|(_, object)| object)
    }

    pub(super) fn put(&mut self, kind: Kind, mut object: Value) {
        self.revision += 1;
        object["metadata"]["namespace"] = json!(NAMESPACE);
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        self.objects.insert((kind, name(&object)), object);
    }

    fn remove(&mut self, kind: Kind, name: &str) {
        self.revision += 1;
        self.objects.remove(&(kind, name.to_owned()));
    }

    fn set_status(&mut self, pod: &str, phase: &str, container: &Value) {
        let mut pod = self.objects[&(Kind::Pod, pod.to_owned())].clone();
        let named = pod["spec"]["containers"][0]["name"].clone();
        pod["status"]["phase"] = json!(phase);
        let status =
            json!({"name": named, "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": container});
        pod["status"]["containerStatuses"] = json!([status]);
        self.put(Kind::Pod, pod);
    }

    /// Its node is told, and has so many seconds; without a node or a second it is gone at once.
    fn delete_pod(&mut self, name: &str, grace: Option<i64>) {
        let Some(mut pod) = self.objects.get(&(Kind::Pod, name.to_owned())).cloned() else { return };
        let grace = grace.or_else(|| pod["spec"]["terminationGracePeriodSeconds"].as_i64()).unwrap_or(30);
        if grace == 0 || is_over(&pod) || !pod["spec"]["nodeName"].is_string() {
            return self.remove(Kind::Pod, name);
        }
        let before = pod["metadata"]["deletionGracePeriodSeconds"].as_i64();
        // What was said before can only become shorter.
        if before.is_none_or(|before| grace < before) {
            pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
            pod["metadata"]["deletionTimestamp"] = json!(at(grace));
            self.put(Kind::Pod, pod);
        }
    }

    fn delete_job(&mut self, job: &Value, propagation: &str) {
        match propagation {
            "Foreground" => {
                let mut job = job.clone();
                job["metadata"]["deletionTimestamp"] = json!(at(0));
                job["metadata"]["finalizers"] = json!(["foregroundDeletion"]);
                self.put(Kind::Job, job);
            }
            "Orphan" => {
                for mut pod in self.pods_of(job) {
                    pod["metadata"].as_object_mut().unwrap().remove("ownerReferences");
                    self.put(Kind::Pod, pod);
                }
                self.remove(Kind::Job, &name(job));
            }
            _ => self.remove(Kind::Job, &name(job)),
        }
    }

    fn pods_of(&self, job: &Value) -> Vec<Value> {
        let uid = &job["metadata"]["uid"];
        self.of(Kind::Pod).filter(|pod| pod["metadata"]["ownerReferences"][0]["uid"] == *uid).cloned().collect()
    }

    /// What the controllers of Jobs, Pods' places and garbage do until nothing is left to do.
    fn reconcile(&mut self) {
        loop {
            let before = self.revision;
            for job in self.of(Kind::Job).cloned().collect::<Vec<_>>() {
                self.follow(&job);
            }
            let jobs: BTreeSet<String> = self.of(Kind::Job).map(|job| text(job, "/metadata/uid").to_owned()).collect();
            for pod in self.of(Kind::Pod).cloned().collect::<Vec<_>>() {
                let owner = text(&pod, "/metadata/ownerReferences/0/uid");
                if !owner.is_empty() && !jobs.contains(owner) && !is_deleted(&pod) {
                    self.delete_pod(&name(&pod), None);
                } else {
                    self.place(&pod);
                }
            }
            if self.revision == before {
                return;
            }
        }
    }

    /// The Job controller, and the part of garbage collection that deletes what belongs to a Job before it.
    fn follow(&mut self, job: &Value) {
        let (job_name, uid) = (name(job), text(job, "/metadata/uid").to_owned());
        let pods = self.pods_of(job);
        if is_deleted(job) {
            if pods.is_empty() {
                return self.remove(Kind::Job, &job_name);
            }
            for pod in pods.iter().filter(|pod| !is_deleted(pod)) {
                self.delete_pod(&name(pod), None);
            }
            return;
        }
        if is_ended(job) || job["spec"]["suspend"] == json!(true) {
            return;
        }
        if self.begun.contains(&uid) {
            if pods.iter().all(is_over) {
                let is_good = pods.iter().any(|pod| text(pod, "/status/phase") == "Succeeded");
                let mut job = job.clone();
                job["status"]["conditions"] = json!([if is_good {
                    json!({"type": "Complete", "status": "True", "reason": "CompletionsReached"})
                } else {
                    let message = "Job has reached the specified backoff limit";
                    json!({"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": message})
                }]);
                self.put(Kind::Job, job);
            }
            return;
        }
        if self.quota.is_some_and(|quota| self.of(Kind::Pod).count() >= quota) {
            let event = format!("{job_name}.failed");
            if !self.objects.contains_key(&(Kind::Event, event.clone())) {
                let message = format!("Error creating: pods \"{job_name}-x\" is forbidden: exceeded quota: cards");
                self.put(
                    Kind::Event,
                    json!({
                        "metadata": {"name": event}, "involvedObject": {"kind": "Job", "name": job_name},
                        "reason": "FailedCreate", "message": message, "lastTimestamp": at(0), "type": "Warning",
                    }),
                );
            }
            return;
        }
        let mut metadata = job["spec"]["template"]["metadata"].clone();
        metadata["name"] = json!(format!("{job_name}-{:05}", self.revision % 100_000));
        metadata["uid"] = json!(format!("{uid}-pod"));
        metadata["creationTimestamp"] = json!(at(0));
        metadata["ownerReferences"] = json!([{
            "apiVersion": "batch/v1", "kind": "Job", "name": job_name, "uid": uid, "controller": true, "blockOwnerDeletion": true,
        }]);
        self.put(
            Kind::Pod,
            json!({"metadata": metadata, "spec": job["spec"]["template"]["spec"], "status": {"phase": "Pending"}}),
        );
        self.begun.insert(uid);
    }

    /// Gives a Pod a node if there is room, and says so if there is none.
    fn place(&mut self, pod: &Value) {
        if pod["spec"]["nodeName"].is_string() || is_deleted(pod) {
            return;
        }
        let placed = self.of(Kind::Pod).filter(|pod| pod["spec"]["nodeName"].is_string() && !is_over(pod)).count();
        let mut pod = pod.clone();
        let condition = if placed < self.nodes {
            pod["spec"]["nodeName"] = json!("node-1");
            json!({"type": "PodScheduled", "status": "True"})
        } else {
            let message = format!("0/{} nodes are available: {} Insufficient cpu.", self.nodes, self.nodes);
            json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message})
        };
        if pod["status"]["conditions"] != json!([condition]) {
            pod["status"]["conditions"] = json!([condition]);
            self.put(Kind::Pod, pod);
        }
    }
}
