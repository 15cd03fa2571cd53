//! Jobs: created, looked at, steered.

use std::sync::Arc;

use attune_artifacts::canonical;
use attune_proto::convert::id::field;
use attune_proto::v1::job_service_server::JobService;
use attune_proto::v1::{self, JobState};
use attune_proto::words::state_words;
use attune_scheduler_core::placement::Blocked;
use attune_scheduler_core::{Answer, Input, JobKey};
use attune_spec::Fault;
use attune_spec::id::{JobId, Project, Step};
use attune_spec::job::JobSpec;
use attune_store::job::{Filter, Job, Order, State};
use attune_store::metric;
use serde_json::json;
use tonic::{Request, Response, Status};

use super::{Answers, invalid, known, page_size, page_token, watch};
use crate::admit::{self, Admitted};
use crate::clock;
use crate::context::Context;
use crate::front::Submission;
use crate::guard::{Caller, received};
use crate::ledger::Extra;
use crate::{forecast, relay, stages, status, view};

/// Longest request id.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct Jobs {
    pub(crate) context: Arc<Context>,
}

/// The job that a request names.
fn key(caller: &Caller, project: &str, job: &str) -> Result<JobKey, Status> {
    let project = caller.project(project)?;
    let job = field::<JobId>("job_id", job).map_err(invalid)?;
    caller.concerns(&job);
    Ok(JobKey::new(project, job))
}

fn request_id(text: &str) -> Result<String, Status> {
    let fault = |message: String| Err(invalid(Fault::new("request_id", message)));
    match text.len() {
        0 => fault("is missing; expected a text that names this request".to_owned()),
        1..=REQUEST_ID_BYTES_MAX => Ok(text.to_owned()),
        long => fault(format!("is {long} bytes long; at most {REQUEST_ID_BYTES_MAX} are allowed")),
    }
}

impl Jobs {
    async fn row(&self, key: &JobKey) -> Result<Job, Status> {
        self.context.store.job(&key.project, &key.job).await.map_err(status::store)
    }

    /// A job as it is now; a queued one with what it waits for, which the one knows that leads.
    async fn now(&self, key: &JobKey) -> Result<v1::Job, Status> {
        let row = self.row(key).await?;
        let mut job = self.show(&row)?;
        job.stages = stages::shown(&self.context, &row).await?;
        if job.state() == JobState::Queued
            && self.context.replica.other().is_none()
            && let Some(blocked) = self.context.front.blocked(key.clone()).await?
        {
            job.message = format!("{}; {}", job.message, waits_for(blocked));
        }
        Ok(job)
    }

    fn show(&self, row: &Job) -> Result<v1::Job, Status> {
        view::job(row, &self.context.backoff).map_err(|error| status::unreadable(&error))
    }

    /// Steers a job. One that the core has forgotten is final, and is refused with its state.
    async fn steer(&self, caller: &Caller, key: &JobKey, input: Input, wish: &str) -> Result<v1::Job, Status> {
        let row = self.row(key).await?;
        match self.context.front.step_for(caller, input, Extra::default()).await? {
            Answer::Done | Answer::Repeated => self.now(key).await,
            Answer::Refused(attune_scheduler_core::Refusal::UnknownJob { .. }) => {
                let message = format!("job {key} has {}; {wish}", row.state);
                Err(attune_proto::Class::IllegalState.status(message))
            }
            Answer::Refused(refusal) => Err(status::refusal(&refusal)),
        }
    }

    async fn submit(
        &self,
        caller: &Caller,
        admitted: Admitted,
        key: JobKey,
        id: attune_store::job::Request,
        retry_of: Option<JobId>,
    ) -> Result<v1::Job, Status> {
        let request = admit::request(&admitted, None);
        let job = Box::new(admit::new_job(admitted, key.clone(), None, retry_of)?);
        let submission = Submission { job, request, id: Some(id), record: caller.record() };
        let stored = self.context.front.submit(submission).await?;
        // Another one is what the same request made before.
        if stored.job == key.job {
            caller.is_recorded();
        }
        self.show(&stored)
    }

    /// The job that an earlier call with this request id made.
    async fn made_before(&self, project: &Project, id: &attune_store::job::Request) -> Result<Option<v1::Job>, Status> {
        let row = self.context.store.job_of_request(project, id).await.map_err(status::store)?;
        row.map(|row| self.show(&row)).transpose()
    }
}

fn waits_for(blocked: Blocked) -> &'static str {
    match blocked {
        Blocked::NoWorkers => "no worker is connected that takes new work",
        Blocked::NoSuchWorker => "no worker has as many devices of the kind, and the labels, that it asks for",
        Blocked::TooFewWorkers => "fewer workers than it asks for have such devices",
        Blocked::OverQuota => "with it the project would have more devices than it may at a time",
        Blocked::Occupied => "other jobs occupy the devices",
        Blocked::Behind => "free devices are kept for a job that goes first",
        Blocked::Gathering => "it waits a moment for other jobs to share a process with",
    }
}

#[tonic::async_trait]
impl JobService for Jobs {
    async fn create_job(
        &self,
        request: Request<v1::CreateJobRequest>,
    ) -> Result<Response<v1::CreateJobResponse>, Status> {
        let (caller, request) = received(request)?;
        let project = caller.project(&request.project)?;
        if request.validate_only {
            let spec = admit::read(&project, request.spec.as_ref())?;
            let admitted = admit::admit(&self.context, &project, spec).await?;
            let forecast = forecast::of(&admitted);
            return Ok(Response::new(v1::CreateJobResponse { job: None, forecast }));
        }
        let id = request_id(&request.request_id)?;
        let spec = admit::read(&project, request.spec.as_ref())?;
        let id = attune_store::job::Request { id, body: canonical::digest(&json!({"create": spec})) };
        // Before the specification is looked at again: a tag may have moved since.
        if let Some(job) = self.made_before(&project, &id).await? {
            return Ok(Response::new(v1::CreateJobResponse { job: Some(job), forecast: None }));
        }
        let admitted = admit::admit(&self.context, &project, spec).await?;
        let forecast = forecast::of(&admitted);
        let key = JobKey::new(project, clock::job_id());
        caller.concerns(&key.job);
        let job = self.submit(&caller, admitted, key, id, None).await?;
        caller.concerns(&job.job_id);
        Ok(Response::new(v1::CreateJobResponse { job: Some(job), forecast }))
    }

    async fn get_job(&self, request: Request<v1::GetJobRequest>) -> Result<Response<v1::GetJobResponse>, Status> {
        let metadata = request.metadata().clone();
        let (caller, request) = received(request)?;
        let mut job = self.now(&key(&caller, &request.project, &request.job_id)?).await?;
        if job.state() == JobState::Queued
            && let Some(lead) = self.context.replica.other()
        {
            if let Ok(lead) = lead
                && let Some(answer) = relay::job(&lead, &metadata, caller.peer(), request).await
            {
                return Ok(Response::new(answer));
            }
            job.message = format!("{}; no scheduler leads that would say what it waits for", job.message);
        }
        Ok(Response::new(v1::GetJobResponse { job: Some(job) }))
    }

    async fn list_jobs(&self, request: Request<v1::ListJobsRequest>) -> Result<Response<v1::ListJobsResponse>, Status> {
        let (caller, request) = received(request)?;
        let project = caller.project(&request.project)?;
        let mut states = Vec::with_capacity(request.states.len());
        for state in &request.states {
            let state: JobState = known(*state, "states")?;
            states.extend(state_words(state).and_then(|words| words.attune.parse::<State>().ok()));
        }
        let filter = Filter {
            states,
            kind: None,
            name: Some(request.spec_name).filter(|name| !name.is_empty()),
            parent: match request.parent_job_id.as_str() {
                "" => None,
                parent => Some(field("parent_job_id", parent).map_err(invalid)?),
            },
            labels: request.labels,
            order: match known(request.order_by, "order_by")? {
                v1::JobOrder::Unspecified | v1::JobOrder::CreateTimeDesc => Order::Newest,
                v1::JobOrder::CreateTimeAsc => Order::Oldest,
            },
        };
        let rows = page_size(request.page_size, 100, 1000)?;
        let page = self.context.store.jobs(&project, &filter, page_token(&request.page_token), rows).await;
        let page = page.map_err(status::store)?;
        let jobs = page.items.iter().map(|row| self.show(row)).collect::<Result<_, _>>()?;
        Ok(Response::new(v1::ListJobsResponse { jobs, next_page_token: page.next.unwrap_or_default() }))
    }

    async fn cancel_job(
        &self,
        request: Request<v1::CancelJobRequest>,
    ) -> Result<Response<v1::CancelJobResponse>, Status> {
        let (caller, request) = received(request)?;
        let key = key(&caller, &request.project, &request.job_id)?;
        // Cancelling twice is cancelling once, also when the core has forgotten the job.
        if self.row(&key).await?.state == State::Cancelled {
            return Ok(Response::new(v1::CancelJobResponse { job: Some(self.now(&key).await?) }));
        }
        let job = self.steer(&caller, &key, Input::Cancel { key: key.clone() }, "a final state never changes").await?;
        Ok(Response::new(v1::CancelJobResponse { job: Some(job) }))
    }

    async fn pause_job(&self, request: Request<v1::PauseJobRequest>) -> Result<Response<v1::PauseJobResponse>, Status> {
        let (caller, request) = received(request)?;
        let key = key(&caller, &request.project, &request.job_id)?;
        let job = self.steer(&caller, &key, Input::Pause { key: key.clone() }, "a final state never changes").await?;
        Ok(Response::new(v1::PauseJobResponse { job: Some(job) }))
    }

    async fn resume_job(
        &self,
        request: Request<v1::ResumeJobRequest>,
    ) -> Result<Response<v1::ResumeJobResponse>, Status> {
        let (caller, request) = received(request)?;
        let key = key(&caller, &request.project, &request.job_id)?;
        let job = self.steer(&caller, &key, Input::Resume { key: key.clone() }, "a final state never changes").await?;
        Ok(Response::new(v1::ResumeJobResponse { job: Some(job) }))
    }

    async fn retry_job(&self, request: Request<v1::RetryJobRequest>) -> Result<Response<v1::RetryJobResponse>, Status> {
        let (caller, request) = received(request)?;
        let key = key(&caller, &request.project, &request.job_id)?;
        let id = request_id(&request.request_id)?;
        let id = attune_store::job::Request { id, body: canonical::digest(&json!({"retry": key.job})) };
        if let Some(job) = self.made_before(&key.project, &id).await? {
            return Ok(Response::new(v1::RetryJobResponse { job: Some(job) }));
        }
        let row = self.row(&key).await?;
        let job = match row.state {
            State::Failed | State::Cancelled => {
                // What the first job was pinned to, so that the second does the same.
                let spec: JobSpec = serde_json::from_value(row.resolved)
                    .map_err(|error| status::unreadable(&crate::Error::Restore(error.to_string())))?;
                let admitted = admit::admit(&self.context, &key.project, spec).await?;
                let new = JobKey::new(key.project.clone(), clock::job_id());
                self.submit(&caller, admitted, new, id, Some(key.job)).await?
            }
            State::Succeeded => {
                let message =
                    format!("job {key} has succeeded; only a job that failed or was cancelled is tried again");
                return Err(attune_proto::Class::IllegalState.status(message));
            }
            _ => self.steer(&caller, &key, Input::Retry { key: key.clone() }, "retry it again").await?,
        };
        Ok(Response::new(v1::RetryJobResponse { job: Some(job) }))
    }

    type WatchJobStream = Answers<v1::WatchJobResponse>;

    async fn watch_job(&self, request: Request<v1::WatchJobRequest>) -> Result<Response<Self::WatchJobStream>, Status> {
        let (caller, request) = received(request)?;
        let key = key(&caller, &request.project, &request.job_id)?;
        self.row(&key).await?;
        Ok(Response::new(watch::job(&self.context, key, request.after_sequence)))
    }

    async fn list_metrics(
        &self,
        request: Request<v1::ListMetricsRequest>,
    ) -> Result<Response<v1::ListMetricsResponse>, Status> {
        let (caller, request) = received(request)?;
        let key = key(&caller, &request.project, &request.job_id)?;
        self.row(&key).await?;
        let filter = metric::Filter {
            names: request.names,
            from_step: Step(request.from_step),
            order: match known(request.order_by, "order_by")? {
                v1::MetricOrder::Unspecified | v1::MetricOrder::Sequence => Order::Oldest,
                v1::MetricOrder::SequenceDesc => Order::Newest,
            },
            ..metric::Filter::default()
        };
        let rows = page_size(request.page_size, 1000, 10_000)?;
        let token = page_token(&request.page_token);
        let page = self.context.store.metrics(&key.project, &key.job, &filter, token, rows).await;
        let page = page.map_err(status::store)?;
        let points = page.items.into_iter().map(view::point).collect();
        Ok(Response::new(v1::ListMetricsResponse { points, next_page_token: page.next.unwrap_or_default() }))
    }

    type StreamMetricsStream = Answers<v1::StreamMetricsResponse>;

    async fn stream_metrics(
        &self,
        request: Request<v1::StreamMetricsRequest>,
    ) -> Result<Response<Self::StreamMetricsStream>, Status> {
        let (caller, request) = received(request)?;
        let key = key(&caller, &request.project, &request.job_id)?;
        self.row(&key).await?;
        Ok(Response::new(watch::metrics(&self.context, key, request.names, request.after_sequence)))
    }
}
