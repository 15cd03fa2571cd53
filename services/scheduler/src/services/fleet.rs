//! The fleet: its workers, and what projects may have of it.

use std::num::NonZeroU32;
use std::sync::Arc;

use attune_proto::Class;
use attune_proto::convert::id::field;
use attune_proto::v1;
use attune_proto::v1::fleet_service_server::FleetService;
use attune_scheduler_core::{Answer, Device, Input, Policy};
use attune_spec::Fault;
use attune_spec::id::{Project, WorkerId};
use tonic::{Request, Response, Status};

use super::{invalid, page_size};
use crate::context::Context;
use crate::front::{Seen, Standing};
use crate::guard::{Caller, received};
use crate::ledger::Extra;
use crate::status;

/// Workers or projects of a page.
const PAGE_ROWS: u32 = 1000;
const PAGE_ROWS_MAX: u32 = 10_000;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct FleetDesk {
    pub(crate) context: Arc<Context>,
}

impl FleetDesk {
    /// A step that people ask for.
    async fn step(&self, caller: &Caller, input: Input) -> Result<(), Status> {
        match self.context.front.step_for(caller, input, Extra::default()).await? {
            Answer::Done | Answer::Repeated => Ok(()),
            Answer::Refused(refusal) => Err(status::refusal(&refusal)),
        }
    }

    async fn cordon(&self, caller: &Caller, worker: &str, on: bool, drains: bool) -> Result<(), Status> {
        caller.concerns(&worker);
        for_all_projects(caller)?;
        let worker: WorkerId = field("worker_id", worker).map_err(invalid)?;
        let input = Input::Cordon { worker: worker.clone(), on, drains };
        match self.context.front.step_for(caller, input, Extra::default()).await? {
            Answer::Done | Answer::Repeated => Ok(()),
            Answer::Refused(_) => Err(Class::NotFound.status(format!("no worker {worker} is known"))),
        }
    }

    async fn standing(&self, project: &Project) -> Result<v1::ProjectUsage, Status> {
        self.shown(project, self.context.front.project(project).await?).await
    }

    async fn shown(&self, project: &Project, standing: Standing) -> Result<v1::ProjectUsage, Status> {
        let Standing { policy, usage, n_queued } = standing;
        let Policy { weight, max_cpu, max_cuda, max_queued, max_bytes } = policy;
        Ok(v1::ProjectUsage {
            project: project.to_string(),
            policy: Some(v1::ProjectPolicy { weight: Some(weight.get()), max_cpu, max_cuda, max_queued, max_bytes }),
            cpu: usage.devices().n_cpu,
            cuda: usage.devices().n_cuda,
            queued: n_queued,
            bytes: self.context.store.kept_bytes(project).await.map_err(status::store)?,
        })
    }
}

/// Refuses whoever has a say in some projects only.
fn for_all_projects(caller: &Caller) -> Result<(), Status> {
    match caller.scope() {
        None => Ok(()),
        Some(scope) => {
            let message = format!("this is for admins of all projects; the credential reaches project {scope} alone");
            Err(Class::PermissionDenied.status(message))
        }
    }
}

/// The project that a list is about; none for all.
fn only(caller: &Caller, project: &str) -> Result<Option<Project>, Status> {
    if project.is_empty() && caller.scope().is_none() { Ok(None) } else { caller.project(project).map(Some) }
}

/// Some of what is sorted by name, from behind the one that the token names, and the token of what comes after.
fn page<T>(all: Vec<T>, rows: u32, token: &str, name: impl Fn(&T) -> &str) -> (Vec<T>, String) {
    let mut rest = all.into_iter().filter(|item| name(item) > token);
    let page: Vec<T> = rest.by_ref().take(rows as usize).collect();
    let next = rest.next().and_then(|_| page.last()).map(|last| name(last).to_owned());
    (page, next.unwrap_or_default())
}

fn worker(seen: Seen) -> v1::Worker {
    let Seen { worker, is_cordoned, jobs } = seen;
    let free = worker.free();
    let device = |(kind, device): (v1::DeviceKind, Device)| v1::DeviceCount {
        kind: kind as i32,
        total: worker.devices.of(device),
        free: free.of(device),
    };
    let kinds = [(v1::DeviceKind::Cpu, Device::Cpu), (v1::DeviceKind::Cuda, Device::Cuda)];
    v1::Worker {
        worker_id: worker.id.to_string(),
        connected: worker.connected,
        draining: worker.draining,
        cordoned: is_cordoned,
        devices: kinds.into_iter().map(device).filter(|device| device.total > 0).collect(),
        labels: worker.labels.clone(),
        jobs: jobs.iter().map(ToString::to_string).collect(),
    }
}

fn policy(message: Option<v1::ProjectPolicy>) -> Result<Policy, Status> {
    let missing = || invalid(Fault::new("policy", "is missing; expected all that the project may have"));
    let v1::ProjectPolicy { weight, max_cpu, max_cuda, max_queued, max_bytes } = message.ok_or_else(missing)?;
    let weight = NonZeroU32::new(weight.unwrap_or(1))
        .ok_or_else(|| invalid(Fault::new("policy.weight", "is 0; expected 1 or more")))?;
    Ok(Policy { weight, max_cpu, max_cuda, max_queued, max_bytes })
}

#[tonic::async_trait]
impl FleetService for FleetDesk {
    async fn list_workers(
        &self,
        request: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        let (caller, request) = received(request)?;
        let v1::ListWorkersRequest { project, page_size: asked, page_token } = request;
        let (rows, only) = (page_size(asked, PAGE_ROWS, PAGE_ROWS_MAX)?, only(&caller, &project)?);
        let mut all = self.context.front.workers().await?;
        for seen in &mut all {
            seen.jobs.retain(|job| only.as_ref().is_none_or(|only| job.project == *only));
        }
        let (page, next_page_token) = page(all, rows, &page_token, |seen| seen.worker.id.as_str());
        Ok(Response::new(v1::ListWorkersResponse { workers: page.into_iter().map(worker).collect(), next_page_token }))
    }

    async fn cordon_worker(
        &self,
        request: Request<v1::CordonWorkerRequest>,
    ) -> Result<Response<v1::CordonWorkerResponse>, Status> {
        let (caller, v1::CordonWorkerRequest { worker_id, drain }) = received(request)?;
        self.cordon(&caller, &worker_id, true, drain).await?;
        Ok(Response::new(v1::CordonWorkerResponse {}))
    }

    async fn uncordon_worker(
        &self,
        request: Request<v1::UncordonWorkerRequest>,
    ) -> Result<Response<v1::UncordonWorkerResponse>, Status> {
        let (caller, v1::UncordonWorkerRequest { worker_id }) = received(request)?;
        self.cordon(&caller, &worker_id, false, false).await?;
        Ok(Response::new(v1::UncordonWorkerResponse {}))
    }

    async fn list_projects(
        &self,
        request: Request<v1::ListProjectsRequest>,
    ) -> Result<Response<v1::ListProjectsResponse>, Status> {
        let (caller, request) = received(request)?;
        let v1::ListProjectsRequest { project, page_size: asked, page_token } = request;
        let (rows, only) = (page_size(asked, PAGE_ROWS, PAGE_ROWS_MAX)?, only(&caller, &project)?);
        let mut projects = self.context.front.projects().await?;
        // Those whose jobs have all ended keep artifacts.
        for project in self.context.store.projects().await.map_err(status::store)? {
            projects.entry(project).or_default();
        }
        projects.retain(|project, _| only.as_ref().is_none_or(|only| project == only));
        let all = projects.into_iter().collect();
        let (page, next_page_token) = page(all, rows, &page_token, |(project, _)| project.as_str());
        let mut shown = Vec::with_capacity(page.len());
        for (project, standing) in page {
            shown.push(self.shown(&project, standing).await?);
        }
        Ok(Response::new(v1::ListProjectsResponse { projects: shown, next_page_token }))
    }

    async fn get_project(
        &self,
        request: Request<v1::GetProjectRequest>,
    ) -> Result<Response<v1::GetProjectResponse>, Status> {
        let (caller, request) = received(request)?;
        let project = caller.project(&request.project)?;
        Ok(Response::new(v1::GetProjectResponse { project: Some(self.standing(&project).await?) }))
    }

    async fn set_project_policy(
        &self,
        request: Request<v1::SetProjectPolicyRequest>,
    ) -> Result<Response<v1::SetProjectPolicyResponse>, Status> {
        let (caller, v1::SetProjectPolicyRequest { project: name, policy: asked }) = received(request)?;
        for_all_projects(&caller)?;
        let (project, policy) = (caller.project(&name)?, policy(asked)?);
        caller.concerns(&project);
        let policy = Some(policy).filter(|policy| *policy != Policy::default());
        self.step(&caller, Input::SetPolicy { project: project.clone(), policy }).await?;
        Ok(Response::new(v1::SetProjectPolicyResponse { project: Some(self.standing(&project).await?) }))
    }
}
