//! `attune submit`: a job file becomes a job.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use attune_artifacts::{Causes, Kind};
use attune_proto::convert::job;
use attune_proto::convert::time::span;
use attune_proto::{Client, v1};
use attune_spec::FieldPath;
use attune_worker::transfer::{self, PushError};
use serde_json::{Value, json};

use super::jobs;
use crate::job_file::{self, Assignment, JobFile, JobFileArguments};
use crate::print::{Failure, Out, note};
use crate::remote::{Server, block_on};
use crate::words;

/// Submits a job file and prints the job's id.
#[derive(Debug, clap::Args)]
#[command(after_help = "Paths in the job file are pushed first and replaced by the digests of what they hold.
Examples:
  attune submit job.yaml --watch
  attune submit job.yaml --set tune.steps=50 --set tune.adapter.rank=8
  attune submit job.yaml --dry-run")]
pub(crate) struct Arguments {
    #[command(flatten)]
    job: JobFileArguments,
    /// Follows the job to its end; the exit status is 1 if it does not succeed.
    #[arg(long)]
    watch: bool,
    /// Checks the job and says what it will cost; inputs are pushed, no job is made.
    #[arg(long, conflicts_with = "watch")]
    dry_run: bool,
    /// Leaves paths as they are: they lie on the server, below its --data-root.
    #[arg(long)]
    server_paths: bool,
    /// A text of your own for this submission; the same text again gives the same job instead of a second one.
    #[arg(long, value_name = "TEXT")]
    request_id: Option<String>,
}

pub(super) fn run(arguments: &Arguments, server: &Server, out: &mut Out) -> Result<(), Failure> {
    let prepared = Prepared::read(&arguments.job.file, &arguments.job.set, arguments.server_paths)?;
    block_on(async {
        let client = server.connect().await?;
        let request_id = arguments.request_id.clone().unwrap_or_else(|| uuid::Uuid::now_v7().to_string());
        let answer = prepared.create(&client, request_id, arguments.dry_run).await?;
        if arguments.dry_run {
            return forecast(answer.forecast.as_ref(), out);
        }
        let job = answer.job.ok_or_else(|| Failure::failed("the server's answer holds no job"))?;
        if !arguments.watch {
            return if out.is_json() { out.document(&words::job(&job)) } else { out.line(&job.job_id) };
        }
        if !out.is_json() {
            out.line(&job.job_id)?;
            out.flush()?;
        }
        jobs::follow(&client, &job.job_id, out).await
    })
}

/// A job file that has passed all checks that need no server.
#[derive(Debug, Clone)]
pub(super) struct Prepared {
    name: String,
    file: JobFile,
    found: Local,
    /// Whether inputs that the server has already are spoken of.
    tells: bool,
}

impl Prepared {
    /// Reads and checks a job file, and the paths in it unless they are the server's.
    pub(super) fn read(file: &str, set: &[Assignment], server_paths: bool) -> Result<Self, Failure> {
        let name = file.to_owned();
        let file = job_file::read(&name, set)?;
        if let Some(faults) = file.site_faults()?
            && !faults.is_empty()
        {
            return Err(Failure::invalid(&name, faults));
        }
        let found = if server_paths { Local::new() } else { local(&file, &name)? };
        Ok(Self { name, file, found, tells: true })
    }

    /// The same, silent about inputs that the server has already.
    pub(super) fn quietly(self) -> Self {
        Self { tells: false, ..self }
    }

    /// What the job file says: no defaults, paths as they were written.
    pub(super) fn written(&self) -> &Value {
        &self.file.written
    }

    /// Pushes what the paths hold and creates the job, or lets the server only check it.
    pub(super) async fn create(
        mut self,
        client: &Client,
        request_id: String,
        validate_only: bool,
    ) -> Result<v1::CreateJobResponse, Failure> {
        push(client, &mut self.file, &self.found, self.tells).await?;
        let spec = job::to_message(&self.file.spec).map_err(|faults| Failure::invalid(&self.name, faults))?;
        let request =
            v1::CreateJobRequest { project: client.project().to_string(), request_id, spec: Some(spec), validate_only };
        let ask = || {
            let (mut jobs, request) = (client.jobs(), client.request(request.clone()));
            async move { jobs.create_job(request).await }
        };
        // A specification is large, and is held while the answer is waited for.
        Ok(Box::pin(client.retrying(ask)).await?)
    }
}

/// A path of the job file and what it must hold.
type Local = BTreeMap<PathBuf, Kind>;

/// Every path of the job file, checked to be there.
fn local(file: &JobFile, name: &str) -> Result<Local, Failure> {
    let faults = file.absent();
    if !faults.is_empty() {
        return Err(Failure::invalid(name, faults));
    }
    let paths = file.spec.references().into_iter();
    Ok(paths.filter_map(|(field, reference)| Some((file.local(&reference)?, kind(&field)))).collect())
}

/// What the reference in this field must hold.
fn kind(field: &FieldPath) -> Kind {
    match field.as_str().rsplit('.').next() {
        Some("base") => Kind::Model,
        Some("source") => Kind::Dataset,
        _ => Kind::Adapter,
    }
}

/// Pushes what the job file's paths hold and puts digests in their place.
async fn push(client: &Client, file: &mut JobFile, found: &Local, tells: bool) -> Result<(), Failure> {
    let mut digests = BTreeMap::new();
    for (path, kind) in found {
        let pushed = transfer::push(client, path, Some(*kind), Causes::default(), None, Vec::new());
        let pushed = pushed.await.map_err(|error| cannot_push(path, error))?;
        let (digest, size) = (pushed.digest, words::bytes(pushed.artifact.size_bytes));
        let verb = if pushed.created { "pushed" } else { "there already:" };
        if tells || pushed.created {
            note(&format!("{verb} {} ({size}) {}", path.display(), words::short(&digest.to_string())));
        }
        for hidden in pushed.skipped {
            note(&format!("left out {}: hidden", path.join(hidden).display()));
        }
        digests.insert(path.clone(), digest);
    }
    file.replace_paths(&digests);
    Ok(())
}

/// What went wrong with a push of `path`.
pub(super) fn cannot_push(path: &Path, error: PushError) -> Failure {
    match error {
        PushError::Local(attune_artifacts::Error::Refused { faults, .. }) => {
            Failure::invalid(&path.display().to_string(), faults)
        }
        PushError::Local(attune_artifacts::Error::NotFound { .. }) => {
            Failure::usage(format!("{}: there is no such file or folder", path.display()))
        }
        PushError::Local(error) => Failure::usage(format!("{}: {error}", path.display())),
        PushError::Server(status) => Failure::from(status),
        other => Failure::failed(other.to_string()),
    }
}

fn forecast(forecast: Option<&v1::Forecast>, out: &mut Out) -> Result<(), Failure> {
    let duration = forecast.and_then(|forecast| span(forecast.duration.as_ref()));
    if out.is_json() {
        let forecast = forecast.map(|forecast| {
            json!({
                "trainable_parameters": forecast.trainable_parameters,
                "total_parameters": forecast.total_parameters,
                "memory_bytes": forecast.memory_bytes,
                "steps": forecast.steps,
                "tokens": forecast.tokens,
                "flops": forecast.flops,
                "seconds": duration.map(|duration| duration.as_secs()),
            })
        });
        return out.document(&json!({"valid": true, "forecast": forecast}));
    }
    out.line("the job is valid")?;
    let Some(forecast) = forecast else { return out.line("its cost is not known") };
    let known = |value: u64, text: String| if value == 0 { "known once the data is read".to_owned() } else { text };
    let share = 100.0 * forecast.trainable_parameters as f64 / (forecast.total_parameters.max(1)) as f64;
    out.line(&format!(
        "parameters  {} of {} train ({share:.2} %)",
        forecast.trainable_parameters, forecast.total_parameters
    ))?;
    let memory = format!("{} at the peak of a process", words::bytes(forecast.memory_bytes));
    out.line(&format!("memory      {}", known(forecast.memory_bytes, memory)))?;
    out.line(&format!("steps       {}", known(forecast.steps, forecast.steps.to_string())))?;
    out.line(&format!("tokens      {}", known(forecast.tokens, forecast.tokens.to_string())))?;
    let time = duration.map_or_else(|| "known once it runs".to_owned(), |duration| words::seconds(duration.as_secs()));
    out.line(&format!("time        {time}"))
}
