//! Makes the stages of jobs that are recipes, one after the other.
//!
//! What follows is found by the recipe from what is stored, and asked of the desk like anything that a person asks. The desk says
//! when to look; nothing is kept here. A stage's id follows from its job's and its name, so that it cannot be made twice.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use attune_proto::error::{Class, faults, invalid_argument};
use attune_proto::v1;
use attune_scheduler_core::{Answer, Cause, Input, JobKey, Look, Refusal};
use attune_spec::Fault;
use attune_spec::id::{Digest, Project};
use attune_spec::job::JobSpec;
use attune_spec::stages::{self, Made, Next, Outcome, StageSpec};
use attune_store::job::{Filter, Job, Order, Stage, State};
use serde_json::Value;
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
/// What a job's report is to it, and the file in it.
const REPORT: &str = "report";
const REPORT_FILE: &str = "report.json";
/// Largest report that is read.
const REPORT_BYTES_MAX: u64 = 16 << 20;

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
    let mut seen = seen(&rows);
    let mut next = apart(&spec, &seen, stages::next).await?;
    if matches!(next, Ok(Next::Done(_))) && stages::manner(&spec).is_ok_and(|manner| manner.compares_losses) {
        for outcome in &mut seen.done {
            if let Some(report) = outcome.outputs.get(REPORT) {
                outcome.losses = losses(context, &row.project, report).await?;
            }
        }
        next = apart(&spec, &seen, stages::next).await?;
    }
    match next {
        Ok(Next::Wait) => Ok(Some((Look::Wait, Extra::default()))),
        Ok(Next::Done(result)) => {
            let is_it = |stage: &Stage| result.as_ref() == Some(&stage.name);
            let stage = rows.iter().find(|row| row.stage.as_ref().is_some_and(is_it));
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

/// Asks the recipe on a thread of its own: a thousand stages are a thousand job files.
async fn apart<T: Send + 'static>(
    spec: &JobSpec,
    made: &Made,
    ask: impl FnOnce(&JobSpec, &Made) -> T + Send + 'static,
) -> Result<T, Status> {
    let (spec, made) = (spec.clone(), made.clone());
    let asked = tokio::task::spawn_blocking(move || ask(&spec, &made)).await;
    asked.map_err(|error| Class::Internal.status(format!("the stages of a job were not found: {error}")))
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
    let known = apart(&spec, &seen(&rows), |spec, made| stages::known(spec, &made.done)).await?.unwrap_or_default();
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

/// What has become of stages, but for their losses.
fn seen(rows: &[Job]) -> Made {
    let mut made = Made::default();
    for row in rows {
        let Some(Stage { name, .. }) = row.stage.clone() else { continue };
        match row.state {
            State::Succeeded => {
                let outputs = ledger::outputs(&row.outputs).into_iter().map(|output| (output.role, output.digest));
                made.done.push(Outcome { stage: name, outputs: outputs.collect(), losses: BTreeMap::new() });
            }
            State::Failed | State::Cancelled => _ = made.failed.insert(name),
            _ => _ = made.open.insert(name),
        }
    }
    made
}

/// The last loss on each validation set, as a job's report has them; none from a report that cannot be read.
async fn losses(context: &Context, project: &Project, report: &Digest) -> Result<BTreeMap<String, f64>, Status> {
    let read = match admit::file_of(context, project, report, REPORT_FILE, REPORT_BYTES_MAX).await {
        Ok(read) => read,
        Err(error) => match status::artifacts(error, REPORT) {
            gone if Class::of(&gone) == Class::NotFound => Err(gone.message().to_owned()),
            status => return Err(status),
        },
    };
    let value = read.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).map_err(|error| error.to_string()));
    let report = value.unwrap_or_else(|error| {
        tracing::warn!(%error, %report, "the report of a stage was not read: it has no losses");
        Value::Null
    });
    let mut last = BTreeMap::new();
    for measured in report["validation"].as_array().into_iter().flatten() {
        for (set, loss) in measured["loss"].as_object().into_iter().flatten() {
            match loss.as_f64().filter(|loss| loss.is_finite()) {
                Some(loss) => _ = last.insert(set.clone(), loss),
                // What is no number is written as none; one that was better before is not what came out.
                None => _ = last.remove(set),
            }
        }
    }
    Ok(last)
}
