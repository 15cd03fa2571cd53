//! What Jobs and Pods say of a request: whether it waits, runs or has ended, and why.

use attune_scheduler_core::supply::Standing;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod, PodStatus};

/// What of a message is passed on, in characters.
const SAID_MAX: usize = 300;
/// Why a container waits that is about to start.
const STARTING: [&str; 2] = ["ContainerCreating", "PodInitializing"];

/// How it stands with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seen {
    /// It has not ended.
    Open {
        standing: Standing,
        /// Why its worker does not run yet, where somebody may want to know.
        why: Option<String>,
    },
    /// It has ended, and so.
    Ended { is_good: bool, why: String },
}

impl Seen {
    const fn open(standing: Standing) -> Self {
        Self::Open { standing, why: None }
    }
}

/// Whether a request's Pod is still to be made, of which neither its Job nor a Pod says why.
pub(super) fn has_no_pod(job: Option<&Job>, pods: &[&Pod]) -> bool {
    pods.is_empty() && job.is_some_and(|job| !is_deleted(job) && ending(job).is_none() && !is_suspended(job))
}

/// How a request stands of which there is this Job, these Pods, or both.
///
/// As long as a Pod may run, it counts as running; so does what is being deleted. A Pod that has a node is started: its image
/// comes there, or its Secret is missing, and `start` bounds that. One without a node waits in line.
pub(super) fn seen(job: Option<&Job>, pods: &[&Pod]) -> Option<Seen> {
    if let Some(pod) = pods.iter().find(|pod| !is_over(pod)) {
        return Some(open(pod));
    }
    let Some(job) = job else {
        // A Pod that has ended and whose Job is gone.
        return pods.first().map(|pod| ended(pod, None));
    };
    if is_deleted(job) {
        return Some(Seen::open(Standing::Running));
    }
    if let Some(end) = ending(job) {
        // Several only where somebody else had the Job go on: the last one tells the end.
        let last = pods.iter().max_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0));
        return Some(last.map_or_else(|| end.clone(), |pod| ended(pod, Some(end.clone()))));
    }
    if is_suspended(job) {
        let why = "it is suspended, by a queue or by somebody".to_owned();
        return Some(Seen::Open { standing: Standing::Waiting, why: Some(why) });
    }
    // Its Pod has ended, and the Job is about to; or the Pod is about to be made.
    Some(Seen::open(if pods.is_empty() { Standing::Waiting } else { Standing::Running }))
}

fn is_deleted(job: &Job) -> bool {
    job.metadata.deletion_timestamp.is_some()
}

fn is_suspended(job: &Job) -> bool {
    job.spec.as_ref().is_some_and(|spec| spec.suspend == Some(true))
}

fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The end of a Job, if it has come.
fn ending(job: &Job) -> Option<Seen> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    let end = conditions
        .iter()
        .find(|found| found.status == "True" && ["Complete", "Failed"].contains(&found.type_.as_str()))?;
    let is_good = end.type_ == "Complete";
    Some(Seen::Ended { is_good, why: sentence(end.reason.as_deref().unwrap_or(&end.type_), end.message.as_deref()) })
}

/// `Reason: message`, cut to what a line of a log bears.
pub(super) fn sentence(reason: &str, message: Option<&str>) -> String {
    let message = message.map(str::trim).filter(|message| !message.is_empty());
    let text = message.map_or_else(|| reason.to_owned(), |message| format!("{reason}: {message}"));
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(SAID_MAX).collect()
}

/// A Pod that may run.
fn open(pod: &Pod) -> Seen {
    let status = pod.status.as_ref();
    let condition = |name: &str| {
        let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
        conditions.iter().find(|condition| condition.type_ == name)
    };
    let has_node = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
    let standing =
        if has_node || pod.metadata.deletion_timestamp.is_some() { Standing::Running } else { Standing::Waiting };
    let unplaced = condition("PodScheduled").filter(|condition| condition.status == "False");
    let why = if let Some(condition) = unplaced {
        Some(sentence(condition.reason.as_deref().unwrap_or("not scheduled"), condition.message.as_deref()))
    } else {
        status.and_then(held)
    };
    Seen::Open { standing, why }
}

fn containers(status: &PodStatus) -> impl Iterator<Item = (&ContainerStatus, &ContainerState)> {
    let lists = [&status.init_container_statuses, &status.container_statuses];
    let all = lists.into_iter().flat_map(|list| list.as_deref().unwrap_or_default());
    all.filter_map(|container| Some((container, container.state.as_ref()?)))
}

/// Why a container does not start, where it is not about to.
fn held(status: &PodStatus) -> Option<String> {
    containers(status).find_map(|(container, state)| {
        let waiting = state.waiting.as_ref()?;
        let reason = waiting.reason.as_deref().filter(|reason| !STARTING.contains(reason))?;
        Some(format!("container {}: {}", container.name, sentence(reason, waiting.message.as_deref())))
    })
}

/// A Pod that has ended; `end` is what its Job says, which knows less.
fn ended(pod: &Pod, end: Option<Seen>) -> Seen {
    let Some(status) = &pod.status else { return end.unwrap_or_else(unknown) };
    let is_good = status.phase.as_deref() == Some("Succeeded");
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let disruption = conditions.iter().find(|found| found.type_ == "DisruptionTarget" && found.status == "True");
    let why = if is_good {
        "Completed".to_owned()
    } else if let Some(found) = disruption {
        // Who ended it says more than how its container ended.
        sentence(found.reason.as_deref().unwrap_or("DisruptionTarget"), found.message.as_deref())
    } else if let Some(reason) = &status.reason {
        sentence(reason, status.message.as_deref())
    } else if let Some(why) = containers(status).find_map(|(container, state)| failure(container, state)) {
        why
    } else {
        return end.unwrap_or_else(unknown);
    };
    Seen::Ended { is_good, why }
}

fn unknown() -> Seen {
    Seen::Ended { is_good: false, why: "nobody says how".to_owned() }
}

fn failure(container: &ContainerStatus, state: &ContainerState) -> Option<String> {
    let end = state.terminated.as_ref().filter(|end| end.exit_code != 0)?;
    let reason = end.reason.as_deref().unwrap_or("Error");
    // The last line of a log says what the ones before it led to.
    let last = end.message.as_deref().and_then(|message| message.trim().lines().next_back());
    let how = end.signal.map_or_else(|| format!("exit status {}", end.exit_code), |signal| format!("signal {signal}"));
    Some(format!("container {}, {how}, {}", container.name, sentence(reason, last)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn job(value: Value) -> Job {
        serde_json::from_value(value).unwrap()
    }

    fn pod(value: Value) -> Pod {
        serde_json::from_value(value).unwrap()
    }

    /// One that has a node, in `phase`, with one container in `state`.
    fn pod_in(phase: &str, state: &Value) -> Pod {
        let container =
            json!({"name": "worker", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state});
        pod(
            json!({"spec": {"containers": [], "nodeName": "n1"}, "status": {"phase": phase, "containerStatuses": [container]}}),
        )
    }

    fn waits(why: Option<&str>) -> Option<Seen> {
        Some(Seen::Open { standing: Standing::Waiting, why: why.map(str::to_owned) })
    }

    fn runs(why: Option<&str>) -> Option<Seen> {
        Some(Seen::Open { standing: Standing::Running, why: why.map(str::to_owned) })
    }

    fn ends(is_good: bool, why: &str) -> Option<Seen> {
        Some(Seen::Ended { is_good, why: why.to_owned() })
    }

    fn failed() -> Job {
        let condition = json!({"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "Job has reached the specified backoff limit"});
        job(json!({"status": {"conditions": [condition]}}))
    }

    #[test]
    fn what_waits_says_why() {
        let new = job(json!({}));
        assert_eq!(seen(Some(&new), &[]), waits(None));
        assert!(has_no_pod(Some(&new), &[]));
        let held_back = job(json!({"spec": {"suspend": true, "template": {}}}));
        assert_eq!(seen(Some(&held_back), &[]), waits(Some("it is suspended, by a queue or by somebody")));
        assert!(!has_no_pod(Some(&held_back), &[]) && !has_no_pod(None, &[]) && !has_no_pod(Some(&failed()), &[]));
        let condition = json!({
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/3 nodes are available:\n 3 Insufficient nvidia.com/gpu. ",
        });
        let unplaced = pod(json!({"status": {"phase": "Pending", "conditions": [condition]}}));
        let why = "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.";
        assert_eq!(seen(Some(&new), &[&unplaced]), waits(Some(why)));
    }

    #[test]
    fn what_has_a_node_counts_as_started() {
        let new = job(json!({}));
        let starting = pod_in("Pending", &json!({"waiting": {"reason": "ContainerCreating"}}));
        assert_eq!(seen(Some(&new), &[&starting]), runs(None));
        let no_image = pod_in(
            "Pending",
            &json!({"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image \"x\""}}),
        );
        let why = "container worker: ImagePullBackOff: Back-off pulling image \"x\"";
        assert_eq!(seen(Some(&new), &[&no_image]), runs(Some(why)));
        let running = pod_in("Running", &json!({"running": {}}));
        assert_eq!(seen(Some(&new), &[&running]), runs(None));
        // Whatever becomes of its Job, a Pod that may run counts; and so does what is being deleted.
        assert_eq!(seen(None, &[&running]), runs(None));
        assert_eq!(seen(Some(&failed()), &[&running]), runs(None));
        let deleted = job(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}));
        assert_eq!(seen(Some(&deleted), &[]), runs(None));
        let leaving =
            pod(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}, "status": {"phase": "Pending"}}));
        assert_eq!(seen(Some(&deleted), &[&leaving]), runs(None));
        // The Pod has ended and the Job does not know yet.
        let over = pod_in("Failed", &json!({"terminated": {"exitCode": 1}}));
        assert_eq!(seen(Some(&new), &[&over]), runs(None));
        assert_eq!(seen(None, &[]), None);
    }

    #[test]
    fn what_has_ended_says_why() {
        let end = |pod: &Pod| seen(Some(&failed()), &[pod]);
        let out_of_memory = pod_in("Failed", &json!({"terminated": {"exitCode": 137, "reason": "OOMKilled"}}));
        assert_eq!(end(&out_of_memory), ends(false, "container worker, exit status 137, OOMKilled"));
        let log = "connecting\nerror: the token is not valid\n";
        let wrong = pod_in("Failed", &json!({"terminated": {"exitCode": 1, "reason": "Error", "message": log}}));
        assert_eq!(end(&wrong), ends(false, "container worker, exit status 1, Error: error: the token is not valid"));
        let evicted = pod(
            json!({"status": {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}}),
        );
        assert_eq!(end(&evicted), ends(false, "Evicted: The node was low on resource: memory."));
        let late = pod(
            json!({"status": {"phase": "Failed", "reason": "DeadlineExceeded", "message": "Pod was active on the node longer than the specified deadline"}}),
        );
        assert_eq!(
            end(&late),
            ends(false, "DeadlineExceeded: Pod was active on the node longer than the specified deadline")
        );
        let condition = json!({"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "default-scheduler: preempting to accommodate a higher priority pod"});
        let mut preempted = pod_in("Failed", &json!({"terminated": {"exitCode": 143}}));
        preempted.status.as_mut().unwrap().conditions = Some(vec![serde_json::from_value(condition).unwrap()]);
        let why = "PreemptionByScheduler: default-scheduler: preempting to accommodate a higher priority pod";
        assert_eq!(end(&preempted), ends(false, why));
        // Its Pod is gone with its node, so the Job's word is the only one.
        let why = "BackoffLimitExceeded: Job has reached the specified backoff limit";
        assert_eq!(seen(Some(&failed()), &[]), ends(false, why));
        let done = job(json!({"status": {"conditions": [{"type": "Complete", "status": "True"}]}}));
        assert_eq!(seen(Some(&done), &[&pod(json!({"status": {"phase": "Succeeded"}}))]), ends(true, "Completed"));
    }
}
