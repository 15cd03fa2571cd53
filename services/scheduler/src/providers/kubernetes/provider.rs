//! The engine.

use std::collections::BTreeMap;
use std::time::Duration;

use attune_scheduler_core::supply::{Pool, REQUEST_LABEL, RequestId, Standing};
use attune_store::UtcMs;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, PropagationPolicy};
use tokio::sync::Mutex;

use super::super::launch::Launch;
use super::super::{ProviderError, WorkerProvider};
use super::api::{Api, Refusal};
use super::settings::Settings;
use super::standing::{Seen, has_no_pod, seen, sentence};
use super::{manifest, rights};
use crate::clock::Clock;

const ENGINE: &str = "Kubernetes";
/// Seconds that a worker has which is ended at once: none would take the Pod out of the list before its node has ended it.
const AT_ONCE: u32 = 1;
/// How long after its time a Pod that does not end is taken for one whose node is gone; clocks differ by less.
const NODE_GONE: Duration = Duration::from_secs(30);

/// The workers of a pool.
#[derive(Debug)]
pub(in super::super) struct Kubernetes {
    pool: Pool,
    launch: Launch,
    settings: Settings,
    api: Api,
    /// The requests that had not ended when the server was asked last, and what was said of each.
    told: Mutex<BTreeMap<RequestId, Option<String>>>,
}

/// What the server has of one request.
#[derive(Default)]
struct Found<'o> {
    job: Option<&'o Job>,
    pods: Vec<&'o Pod>,
}

impl Kubernetes {
    pub(in super::super) fn new(pool: Pool, launch: Launch, settings: Settings) -> Self {
        let api = Api::new(settings.kubeconfig.clone(), settings.context.clone(), settings.namespace.clone());
        let launch = manifest::with_files(launch, &settings);
        Self { pool, launch, settings, api, told: Mutex::default() }
    }

    fn job(&self, request: &RequestId) -> Job {
        manifest::job(&self.pool, &self.launch, &self.settings, request)
    }

    /// Deletes a Job, which goes when its Pods have gone: until then it is listed.
    async fn delete_job(&self, request: &RequestId) -> Result<(), Refusal> {
        let how = DeleteParams { propagation_policy: Some(PropagationPolicy::Foreground), ..DeleteParams::default() };
        self.api.delete::<Job>(&manifest::name(request), &how).await
    }

    async fn pods(&self, request: &RequestId) -> Result<Vec<Pod>, Refusal> {
        self.api.list(Some(&manifest::request_selector(request)), None).await
    }

    /// Why no Pod of this Job could be made: a quota, or what else is asked before one is.
    async fn hindrance(&self, job: &Job) -> Option<String> {
        let name = job.metadata.name.as_deref()?;
        let fields = format!("involvedObject.kind=Job,involvedObject.name={name},reason=FailedCreate");
        match self.api.list::<Event>(None, Some(&fields)).await {
            Ok(events) => {
                let last = events.into_iter().max_by_key(|event| event.last_timestamp.as_ref().map(|time| time.0))?;
                Some(sentence("no Pod could be made", last.message.as_deref()))
            }
            Err(refusal) => {
                tracing::debug!(pool = %self.pool.name, %refusal, "nobody says why a Job has no Pod");
                None
            }
        }
    }

    /// Says what has changed with a request.
    fn tell(&self, request: &RequestId, why: Option<&str>, before: Option<&Option<String>>) {
        match why {
            Some(why) if before.and_then(Option::as_deref) != Some(why) => {
                tracing::warn!(pool = %self.pool.name, %request, why, "a worker does not start yet");
            }
            Some(_) | None => {}
        }
    }
}

fn failed(doing: &'static str) -> impl Fn(Refusal) -> ProviderError {
    move |refusal| ProviderError { engine: ENGINE, doing, why: refusal.to_string() }
}

/// The request that an object belongs to.
fn request(metadata: &ObjectMeta) -> Option<RequestId> {
    Some(RequestId(metadata.labels.as_ref()?.get(REQUEST_LABEL)?.parse().ok()?))
}

#[tonic::async_trait]
impl WorkerProvider for Kubernetes {
    async fn list(&self) -> Result<BTreeMap<RequestId, Standing>, ProviderError> {
        let failed = failed("say what it has");
        let selector = manifest::pool_selector(&self.pool);
        let jobs: Vec<Job> = self.api.list(Some(&selector), None).await.map_err(&failed)?;
        let pods: Vec<Pod> = self.api.list(Some(&selector), None).await.map_err(&failed)?;
        let mut all: BTreeMap<RequestId, Found<'_>> = BTreeMap::new();
        for job in &jobs {
            if let Some(request) = request(&job.metadata) {
                all.entry(request).or_default().job = Some(job);
            }
        }
        for pod in &pods {
            if let Some(request) = request(&pod.metadata) {
                all.entry(request).or_default().pods.push(pod);
            }
        }
        let mut told = self.told.lock().await;
        let (mut standings, mut open) = (BTreeMap::new(), BTreeMap::new());
        // One question a turn: what hinders one Job hinders the others.
        let mut may_ask = true;
        for (request, Found { job, pods }) in all {
            let before = told.get(&request);
            match seen(job, &pods) {
                Some(Seen::Open { standing, mut why }) => {
                    let lasts = before.is_some() && has_no_pod(job, &pods);
                    if let Some(job) = job.filter(|_| lasts) {
                        why = if std::mem::take(&mut may_ask) {
                            self.hindrance(job).await
                        } else {
                            before.cloned().flatten()
                        };
                    }
                    self.tell(&request, why.as_deref(), before);
                    standings.insert(request.clone(), standing);
                    open.insert(request, why);
                }
                Some(Seen::Ended { is_good: true, why }) if before.is_some() => {
                    tracing::info!(pool = %self.pool.name, %request, why, "a worker has ended");
                }
                Some(Seen::Ended { is_good: false, why }) if before.is_some() => {
                    tracing::warn!(pool = %self.pool.name, %request, why, "a worker has ended");
                }
                Some(Seen::Ended { .. }) | None => {}
            }
        }
        *told = open;
        Ok(standings)
    }

    async fn ask(&self, request: &RequestId) -> Result<(), ProviderError> {
        let job = self.job(request);
        let mut asked = self.api.create(&job).await;
        if asked.as_ref().is_err_and(Refusal::is_unsure) {
            // It may be there: its name is the same, so asking once more makes no second one.
            asked = self.api.create(&job).await;
        }
        match asked {
            Ok(()) | Err(Refusal::AlreadyExists(_)) => {
                self.told.lock().await.insert(request.clone(), None);
                Ok(())
            }
            Err(refusal) => Err(failed("start a worker")(refusal)),
        }
    }

    async fn give_back(&self, request: &RequestId) -> Result<(), ProviderError> {
        let failed = failed("tell a worker to end");
        self.delete_job(request).await.map_err(&failed)?;
        // A Pod whose Job somebody has deleted from above it is told by nobody else.
        for pod in self.pods(request).await.map_err(&failed)? {
            let has_owner = pod.metadata.owner_references.as_ref().is_some_and(|owners| !owners.is_empty());
            if let Some(name) = pod.metadata.name.as_ref().filter(|_| !has_owner) {
                self.api.delete::<Pod>(name, &DeleteParams::default()).await.map_err(&failed)?;
            }
        }
        Ok(())
    }

    async fn withdraw(&self, request: &RequestId) -> Result<(), ProviderError> {
        let failed = failed("end a worker");
        self.delete_job(request).await.map_err(&failed)?;
        for pod in self.pods(request).await.map_err(&failed)? {
            let Some(name) = &pod.metadata.name else { continue };
            let UtcMs(now) = Clock::utc();
            let late = i64::try_from(NODE_GONE.as_millis()).unwrap_or(i64::MAX);
            let deleted = pod.metadata.deletion_timestamp.as_ref();
            let is_node_gone = deleted.is_some_and(|time| time.0.as_millisecond().saturating_add(late) < now);
            let grace_period_seconds = Some(if is_node_gone { 0 } else { AT_ONCE });
            let how = DeleteParams { grace_period_seconds, ..DeleteParams::default() };
            self.api.delete::<Pod>(name, &how).await.map_err(&failed)?;
        }
        Ok(())
    }

    fn rendered(&self, request: &RequestId) -> String {
        rights::yaml(&self.job(request))
    }

    fn rights(&self, account: &super::super::Account) -> Option<String> {
        Some(rights::rendered(&self.settings.namespace, account))
    }
}
