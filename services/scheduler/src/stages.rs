//! Makes the stages of jobs that are recipes, one after the other.
//!
//! What follows is found by the recipe from what is stored, and asked of the desk like anything that a person asks. The desk says
//! when to look; nothing is kept here. A stage's id follows from its job's and its name, so that it cannot be made twice.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use attune_proto::error::{Class, faults, invalid_argument};
use attune_proto::v1;
use attune_scheduler_core::{Answer, Cause, Input, JobKey, Look, Refusal};
use attune_spec::Fault;
use attune_spec::job::JobSpec;
use attune_spec::stages::{self, Next, Outcome, StageSpec};
use attune_store::job::{Filter, Job, Order, Stage, State};
use tokio::sync::Notify;
use tonic::Status;

use crate::admit;
use crate::context::Context;
use crate::front::Submission;
use crate::ledger::{self, Extra};
use crate::{log, status, view};

/// The wait before a job is looked at again whose stage could not be made for a reason that passes.
const AGAIN: Duration = Duration::from_secs(1);
/// Rows that are read at once.
const ROWS: u32 = 500;

/// Looks at the jobs that are due, until the desk is gone.
pub(crate) async fn follow(context: Arc<Context>, due: Arc<Notify>) {
    loop {
        due.notified().await;
        let Ok(keys) = context.front.due().await else { return };
        let mut is_left = false;
        for key in keys {
            if let Err(error) = Box::pin(advance(&context, &key)).await {
                tracing::warn!(%error, %key, "the next stage of a job was not made; it is tried again");
                is_left = true;
            }
        }
        if is_left {
            tokio::time::sleep(AGAIN).await;
            due.notify_one();
        }
    }
}

/// Makes what stages can be made, and says what is to be said then.
async fn advance(context: &Context, key: &JobKey) -> Result<(), Status> {
    loop {
        let row = context.store.job(&key.project, &key.job).await.map_err(status::store)?;
        if row.state.is_final() {
            return Ok(());
        }
        // More may follow from what was made.
        let Some((look, extra)) = Box::pin(look(context, key, &row)).await? else { continue };
        let input = Input::Looked { key: key.clone(), version: row.version, look };
        match context.front.step_with(input, extra).await? {
            Answer::Refused(Refusal::JobChanged { .. }) => {}
            Answer::Refused(refusal) => return Err(status::refusal(&refusal)),
            Answer::Done | Answer::Repeated => return Ok(()),
        }
    }
}

/// What is seen of a job's stages; nothing if some were made.
async fn look(context: &Context, key: &JobKey, row: &Job) -> Result<Option<(Look, Extra)>, Status> {
    let spec = spec(row)?;
    let rows = made(context, row).await?;
    let (done, open) = (outcomes(&rows), open(&rows));
    match stages::next(&spec, &done, &open) {
        Ok(Next::Wait) => Ok(Some((Look::Wait, Extra::default()))),
        Ok(Next::Done(result)) => {
            let stage = rows.iter().find(|row| row.stage.as_ref().is_some_and(|stage| stage.name == result));
            let outputs = stage.map(|row| ledger::outputs(&row.outputs)).unwrap_or_default();
            let tags = ledger::tags(row, &outputs);
            Ok(Some((Look::Done, Extra { outputs, tags, ..Extra::default() })))
        }
        Ok(Next::Make(next)) => {
            for stage in next {
                if let Some(failure) = make(context, key, stage).await? {
                    return Ok(Some((Look::Broken(Cause::SpecFault), failure)));
                }
            }
            Ok(None)
        }
        Err(found) => Ok(Some((Look::Broken(Cause::SpecFault), broken("the next stage", &found)))),
    }
}

/// Makes a stage; or says why that can never be.
async fn make(context: &Context, parent: &JobKey, stage: StageSpec) -> Result<Option<Extra>, Status> {
    fail::fail_point!("scheduler::before_stage", |what| Err(status::store(crate::planted::failure(what.as_deref()))));
    let StageSpec { name, job, .. } = stage;
    let admitted = match admit::admit(context, &parent.project, job).await {
        Ok(admitted) => admitted,
        Err(status) if Class::of(&status) == Class::Invalid => {
            return Ok(Some(broken(&format!("stage {name}"), &faults(&status))));
        }
        Err(status) => return Err(status),
    };
    let id = ledger::stage_id(&parent.job, &name)
        .map_err(|error| invalid_argument(&[Fault::new("recipe", error.to_string())]))?;
    let key = JobKey::new(parent.project.clone(), id);
    let stage = Stage { parent: parent.job.clone(), name };
    let request = admit::request(&admitted, Some(&stage));
    let job = Box::new(admit::new_job(admitted, key, Some(stage), None)?);
    context.front.submit(Submission { job, request, id: None, record: None }).await?;
    Ok(None)
}

fn broken(what: &str, faults: &[Fault]) -> Extra {
    let fault = |fault: &Fault| v1::FieldFault { path: fault.path.as_str().to_owned(), message: fault.message.clone() };
    let told: Vec<String> = faults.iter().map(ToString::to_string).collect();
    let failure = v1::Failure {
        message: format!("{what} cannot be made: {}", told.join("; ")),
        faults: faults.iter().map(fault).collect(),
        ..log::failure_of(Cause::SpecFault)
    };
    Extra { failure: Some(failure), ..Extra::default() }
}

/// The stages of a job as it is shown: those that are known now, and their jobs where they are made; none of another job.
pub(crate) async fn shown(context: &Context, row: &Job) -> Result<Vec<v1::JobStage>, Status> {
    let spec = spec(row)?;
    if spec.recipe.is_none() {
        return Ok(Vec::new());
    }
    let rows = made(context, row).await?;
    let known = stages::known(&spec, &outcomes(&rows)).unwrap_or_default();
    let show = |stage: StageSpec| {
        let job = rows.iter().find(|row| row.stage.as_ref().is_some_and(|own| own.name == stage.name));
        v1::JobStage {
            job_id: job.map(|row| row.job.to_string()).unwrap_or_default(),
            state: job.map_or(0, |row| view::state(row.state) as i32),
            after: stage.awaits().iter().map(ToString::to_string).collect(),
            name: stage.name.to_string(),
        }
    };
    Ok(known.into_iter().map(show).collect())
}

fn spec(row: &Job) -> Result<JobSpec, Status> {
    let unreadable = |error: serde_json::Error| crate::Error::Restore(format!("job {}: {error}", row.job));
    serde_json::from_value(row.resolved.clone()).map_err(|error| status::unreadable(&unreadable(error)))
}

/// The rows of the stages that were made.
async fn made(context: &Context, parent: &Job) -> Result<Vec<Job>, Status> {
    let filter = Filter { parent: Some(parent.job.clone()), order: Order::Oldest, ..Filter::default() };
    let (mut rows, mut token) = (Vec::new(), None);
    loop {
        let page = context.store.jobs(&parent.project, &filter, token.as_deref(), ROWS).await.map_err(status::store)?;
        rows.extend(page.items);
        token = page.next;
        if token.is_none() {
            return Ok(rows);
        }
    }
}

/// What has succeeded.
fn outcomes(rows: &[Job]) -> Vec<Outcome> {
    let succeeded = rows.iter().filter(|row| row.state == State::Succeeded);
    let outcome = |row: &Job| {
        let outputs = ledger::outputs(&row.outputs).into_iter().map(|output| (output.role, output.digest)).collect();
        Some(Outcome { stage: row.stage.as_ref()?.name.clone(), outputs })
    };
    succeeded.filter_map(outcome).collect()
}

/// What was made and has not succeeded.
fn open(rows: &[Job]) -> BTreeSet<attune_spec::id::Name> {
    let open = rows.iter().filter(|row| row.state != State::Succeeded);
    open.filter_map(|row| Some(row.stage.as_ref()?.name.clone())).collect()
}
