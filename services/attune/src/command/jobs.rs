//! `attune jobs`: looks at jobs, steers and follows them.

use std::collections::BTreeMap;
use std::time::Duration;

use attune_proto::convert::time::span;
use attune_proto::v1::{self, job_event::Event};
use attune_proto::words::state_words;
use attune_proto::{Class, Client, Retry};

use crate::print::{Column, FAILED, Failure, Out, Progress, Table, note};
use crate::remote::{Server, block_on};
use crate::words;

/// Longest time for which a server that went away is waited for while a job is followed.
const SERVER_PATIENCE: Duration = Duration::from_secs(120);
/// Silence after which a job that is followed is asked what it waits for.
const WAITING_NOTE_AFTER: Duration = Duration::from_secs(2);
/// Wait before the next try to reach it.
const SERVER_WAIT: Duration = Duration::from_millis(500);

/// Looks at jobs, steers and follows them.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Examples:
  attune jobs list --state running
  attune jobs watch JOB
  attune jobs metrics JOB --name train/loss --json")]
pub(crate) enum Command {
    /// Lists jobs, newest first.
    List(List),
    /// Shows one job: state, reason, progress, results.
    Get(One),
    /// Follows a job to its end; the exit status is 1 if it does not succeed.
    Watch(One),
    /// Lists what has happened to a job.
    Events(One),
    /// Shows what a job's training process wrote to its log.
    Logs(One),
    /// Lists what was measured.
    Metrics(Metrics),
    /// Ends a job without a result.
    Cancel(One),
    /// Lets a job write a checkpoint and give its devices back.
    Pause(One),
    /// Lets a paused job go on.
    Resume(One),
    /// Tries again: at once if the job waits for its next attempt, as a new job if it has ended.
    Retry(One),
}

/// Which jobs are listed.
#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// Only jobs in this state; may be given several times.
    #[arg(long = "state", value_name = "STATE", value_parser = parse_state)]
    states: Vec<v1::JobState>,
    /// Only jobs of this name.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Only jobs with this label; may be given several times.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// Only stages of this job.
    #[arg(long, value_name = "JOB")]
    parent: Option<String>,
    /// The most jobs that are listed.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u32,
}

/// Which job.
#[derive(Debug, clap::Args)]
pub(crate) struct One {
    /// Id of the job.
    #[arg(value_name = "JOB")]
    job: String,
}

/// Which measurements.
#[derive(Debug, clap::Args)]
pub(crate) struct Metrics {
    /// Id of the job.
    #[arg(value_name = "JOB")]
    job: String,
    /// Only this metric, such as train/loss; may be given several times.
    #[arg(long = "name", value_name = "NAME")]
    names: Vec<String>,
    /// Goes on until the job has ended.
    #[arg(long)]
    follow: bool,
}

fn parse_state(text: &str) -> Result<v1::JobState, String> {
    attune_proto::words::state(text).ok_or_else(|| {
        let known = attune_proto::words::STATES.into_iter().filter_map(state_words).map(|words| words.attune);
        format!("expected one of {}", known.collect::<Vec<_>>().join(", "))
    })
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE, such as team=search")?;
    Ok((key.to_owned(), value.to_owned()))
}

pub(super) fn run(command: &Command, server: &Server, out: &mut Out) -> Result<(), Failure> {
    block_on(async {
        let client = server.connect().await?;
        match command {
            Command::List(arguments) => list(&client, arguments, out).await,
            Command::Get(one) => show(&get(&client, &one.job).await?, out),
            Command::Watch(one) => follow(&client, &one.job, out).await,
            Command::Events(one) => events(&client, &one.job, out, |_| true).await,
            Command::Logs(one) => {
                events(&client, &one.job, out, |event| {
                    matches!(event.event, Some(Event::Note(_) | Event::AttemptFailed(_)))
                })
                .await
            }
            Command::Metrics(arguments) => metrics(&client, arguments, out).await,
            Command::Cancel(one) => show(&steer(&client, &one.job, Steer::Cancel).await?, out),
            Command::Pause(one) => show(&steer(&client, &one.job, Steer::Pause).await?, out),
            Command::Resume(one) => show(&steer(&client, &one.job, Steer::Resume).await?, out),
            Command::Retry(one) => show(&steer(&client, &one.job, Steer::Retry).await?, out),
        }
    })
}

async fn list(client: &Client, arguments: &List, out: &mut Out) -> Result<(), Failure> {
    let (mut jobs, mut page_token) = (Vec::new(), String::new());
    let wanted = arguments.limit as usize;
    while jobs.len() < wanted {
        let asked = v1::ListJobsRequest {
            project: client.project().to_string(),
            states: arguments.states.iter().map(|state| *state as i32).collect(),
            spec_name: arguments.name.clone().unwrap_or_default(),
            labels: arguments.labels.iter().cloned().collect(),
            page_size: u32::try_from(wanted - jobs.len()).unwrap_or(u32::MAX).min(1000),
            page_token: page_token.clone(),
            order_by: 0,
            parent_job_id: arguments.parent.clone().unwrap_or_default(),
        };
        let ask = || {
            let (mut service, asked) = (client.jobs(), client.request(asked.clone()));
            async move { service.list_jobs(asked).await }
        };
        let page = client.retrying(ask).await?;
        jobs.extend(page.jobs);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    if out.is_json() {
        return out.document(&jobs.iter().map(words::job).collect::<Vec<_>>());
    }
    let mut table = Table::new([
        Column::left("JOB"),
        Column::left("NAME"),
        Column::left("STATE"),
        Column::right("STEP"),
        Column::left("CREATED"),
        Column::left("WHY"),
    ]);
    for job in &jobs {
        let step = job.progress.as_ref().map(|progress| format!("{}/{}", progress.step, progress.total_steps));
        table.row([
            job.job_id.clone(),
            job.spec.as_ref().map(|spec| spec.name.clone()).unwrap_or_default(),
            words::state(job.state, job.stop_purpose),
            step.unwrap_or_default(),
            words::time(job.create_time.as_ref()).unwrap_or_default(),
            why(job),
        ]);
    }
    out.table(&table)
}

fn why(job: &v1::Job) -> String {
    if job.message.is_empty() {
        words::word::<v1::JobReason>(job.reason).replace('_', " ")
    } else {
        job.message.clone()
    }
}

pub(super) async fn get(client: &Client, job: &str) -> Result<v1::Job, Failure> {
    let asked = v1::GetJobRequest { project: client.project().to_string(), job_id: job.to_owned() };
    let ask = || {
        let (mut service, asked) = (client.jobs(), client.request(asked.clone()));
        async move { service.get_job(asked).await }
    };
    client.retrying(ask).await?.job.ok_or_else(|| Failure::failed("the server's answer holds no job"))
}

#[derive(Debug, Clone, Copy)]
enum Steer {
    Cancel,
    Pause,
    Resume,
    Retry,
}

async fn steer(client: &Client, job: &str, what: Steer) -> Result<v1::Job, Failure> {
    let (project, job_id) = (client.project().to_string(), job.to_owned());
    let request_id = uuid::Uuid::now_v7().to_string();
    let ask = || {
        let (mut service, project, job_id) = (client.jobs(), project.clone(), job_id.clone());
        let request_id = request_id.clone();
        async move {
            let job = match what {
                Steer::Cancel => service.cancel_job(v1::CancelJobRequest { project, job_id }).await?.into_inner().job,
                Steer::Pause => service.pause_job(v1::PauseJobRequest { project, job_id }).await?.into_inner().job,
                Steer::Resume => service.resume_job(v1::ResumeJobRequest { project, job_id }).await?.into_inner().job,
                Steer::Retry => {
                    service.retry_job(v1::RetryJobRequest { project, job_id, request_id }).await?.into_inner().job
                }
            };
            Ok(tonic::Response::new(job))
        }
    };
    client.retrying(ask).await?.ok_or_else(|| Failure::failed("the server's answer holds no job"))
}

fn show(job: &v1::Job, out: &mut Out) -> Result<(), Failure> {
    if out.is_json() {
        return out.document(&words::job(job));
    }
    let mut facts: Vec<(&str, String)> = vec![("job", job.job_id.clone())];
    facts.extend(job.spec.as_ref().map(|spec| ("name", spec.name.clone())));
    facts.push(("state", words::state(job.state, job.stop_purpose)));
    facts.push(("because", why(job)));
    if let Some(progress) = &job.progress {
        let speed = format!("{:.0} tokens/s", progress.tokens_per_second);
        facts.push((
            "step",
            format!("{} of {}, {} tokens, {speed}", progress.step, progress.total_steps, progress.tokens),
        ));
    }
    if job.stage.is_empty() {
        facts.extend(job.stages.iter().map(|stage| ("stage", words::stage_line(stage))));
    } else {
        facts.push(("stage", format!("{} of {}", job.stage, job.parent_job_id)));
    }
    facts.push(("attempts", format!("{} failed, epoch {}", job.failed_attempts, job.epoch)));
    if let Some(failure) = &job.failure {
        facts.push(("failure", words::failure_line(failure)));
        facts.extend(failure.faults.iter().map(|fault| ("", format!("`{}` {}", fault.path, fault.message))));
        facts.extend(failure.last_log_lines.iter().map(|line| ("", line.clone())));
    }
    for (name, value) in [("checkpoint", &job.checkpoint), ("worker", &job.worker_id)] {
        if !value.is_empty() {
            facts.push((name, value.clone()));
        }
    }
    facts.extend(job.outputs.iter().map(|output| ("output", format!("{} {}", output.role, output.digest))));
    let times = [("created", &job.create_time), ("started", &job.start_time), ("ended", &job.end_time)];
    facts.extend(times.into_iter().filter_map(|(name, at)| Some((name, words::time(at.as_ref())?))));
    for (name, text) in facts {
        out.line(format!("{name:<11} {text}").trim_end())?;
    }
    Ok(())
}

/// What has happened so far.
async fn events(
    client: &Client,
    job: &str,
    out: &mut Out,
    wanted: impl Fn(&v1::JobEvent) -> bool,
) -> Result<(), Failure> {
    let last = get(client, job).await?.sequence;
    let asked =
        v1::WatchJobRequest { project: client.project().to_string(), job_id: job.to_owned(), after_sequence: 0 };
    let mut stream = client.jobs().watch_job(asked).await?.into_inner();
    while let Some(message) = stream.message().await? {
        let Some(event) = message.event else { continue };
        if wanted(&event) {
            if out.is_json() {
                out.record(&words::event(&event))?;
            } else if let Some(line) = words::event_line(&event) {
                out.line(&line)?;
            }
        }
        if event.sequence >= last {
            break;
        }
    }
    Ok(())
}

async fn metrics(client: &Client, arguments: &Metrics, out: &mut Out) -> Result<(), Failure> {
    let project = client.project().to_string();
    let print = |point: &v1::MetricPoint, out: &mut Out| {
        if out.is_json() {
            out.record(&words::metric(point))
        } else {
            out.line(&format!("{:>8}  {:<28} {}", point.step, point.name, point.value))
        }
    };
    if arguments.follow {
        let asked = v1::StreamMetricsRequest {
            project,
            job_id: arguments.job.clone(),
            names: arguments.names.clone(),
            after_sequence: 0,
        };
        let mut stream = client.jobs().stream_metrics(asked).await?.into_inner();
        while let Some(message) = stream.message().await? {
            for point in &message.points {
                print(point, out)?;
            }
            out.flush()?;
        }
        return Ok(());
    }
    for point in all_metrics(client, &arguments.job, &arguments.names).await? {
        print(&point, out)?;
    }
    Ok(())
}

/// Every point of these metrics (all if none is named), as they came.
pub(super) async fn all_metrics(client: &Client, job: &str, names: &[String]) -> Result<Vec<v1::MetricPoint>, Failure> {
    let (mut points, mut page_token) = (Vec::new(), String::new());
    loop {
        let asked = v1::ListMetricsRequest {
            project: client.project().to_string(),
            job_id: job.to_owned(),
            names: names.to_vec(),
            page_size: 10_000,
            page_token: page_token.clone(),
            ..Default::default()
        };
        let ask = || {
            let (mut service, asked) = (client.jobs(), client.request(asked.clone()));
            async move { service.list_metrics(asked).await }
        };
        let page = client.retrying(ask).await?;
        points.extend(page.points);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(points);
        }
    }
}

/// Follows a job to its end and tells how it ended: validation loss before and after, and its results.
pub(super) async fn follow(client: &Client, job: &str, out: &mut Out) -> Result<(), Failure> {
    let json = out.is_json();
    let ended = follow_to_end(client, job, &mut json.then_some(&mut *out)).await;
    if json {
        out.document(&words::job(&get(client, job).await?))?;
        return ended;
    }
    ended?;
    for (set, (before, after)) in validation(client, job).await? {
        out.line(&format!("validation loss of {set}: {before:.4} before, {after:.4} after"))?;
    }
    for output in get(client, job).await?.outputs {
        out.line(&format!("{}: {}", output.role, output.digest))?;
    }
    Ok(())
}

/// Follows a job to its end: events go to `records` as JSON, or to standard error for people. A server that goes away is
/// waited for: what happened meanwhile comes when it is back.
pub(super) async fn follow_to_end(client: &Client, job: &str, records: &mut Option<&mut Out>) -> Result<(), Failure> {
    let mut bar: Option<Progress> = None;
    let mut after = 0;
    let mut give_up = None;
    loop {
        let watched = watch(client, job, &mut after, &mut bar, records).await;
        match watched {
            Ok(()) => break,
            Err(Broken::Output(failure)) => return Err(failure),
            Err(Broken::Server(status)) => {
                let now = tokio::time::Instant::now();
                let latest = *give_up.get_or_insert(now + SERVER_PATIENCE);
                if Class::of(&status).row().retry == Retry::Never || now >= latest {
                    let hint = format!("the job goes on without you: attune jobs watch {job}");
                    return Err(Failure::from(status).with_hint(hint));
                }
                tokio::time::sleep(SERVER_WAIT).await;
            }
            Err(Broken::Heard(status)) => {
                give_up = None;
                tracing::debug!(%status, "the server's stream broke off");
                tokio::time::sleep(SERVER_WAIT).await;
            }
        }
    }
    drop(bar);
    end(&get(client, job).await?)
}

/// Why a job is not being followed any more.
enum Broken {
    /// The server cannot be reached or refuses.
    Server(tonic::Status),
    /// The server could be heard, then broke off.
    Heard(tonic::Status),
    /// Nobody reads.
    Output(Failure),
}

async fn watch(
    client: &Client,
    job: &str,
    after: &mut u64,
    bar: &mut Option<Progress>,
    records: &mut Option<&mut Out>,
) -> Result<(), Broken> {
    let asked =
        v1::WatchJobRequest { project: client.project().to_string(), job_id: job.to_owned(), after_sequence: *after };
    let mut stream = client.jobs().watch_job(asked).await.map_err(Broken::Server)?.into_inner();
    let mut is_final = false;
    let mut told = None;
    loop {
        let message = match tokio::time::timeout(WAITING_NOTE_AFTER, stream.message()).await {
            Ok(Ok(Some(message))) => message,
            Ok(Ok(None)) => break,
            Ok(Err(status)) => return Err(Broken::Heard(status)),
            Err(_) => {
                if records.is_none() {
                    tell_what_it_waits_for(client, job, &mut told).await;
                }
                continue;
            }
        };
        let Some(event) = message.event else { continue };
        *after = event.sequence;
        if let Some(Event::StateChange(change)) = &event.event {
            is_final = state_words(change.to()).is_some_and(|words| words.is_final);
        }
        if let Some(out) = records {
            out.record(&words::event(&event)).map_err(Broken::Output)?;
        } else if let Some(Event::Progress(progress)) = &event.event {
            let shown = bar.get_or_insert_with(|| Progress::new("training", progress.total_steps));
            let left = span(progress.eta.as_ref()).map(|eta| format!(", {} left", words::seconds(eta.as_secs())));
            let speed = format!("{:.0} tokens/s{}", progress.tokens_per_second, left.unwrap_or_default());
            shown.at(progress.step, &speed);
        } else if let Some(line) = words::event_line(&event) {
            match bar {
                Some(bar) => bar.above(&line),
                None => note(&line),
            }
        }
        if is_final {
            return Ok(());
        }
    }
    Err(Broken::Heard(Class::Unavailable.status("the stream ended before the job")))
}

/// Says what a job that does not run waits for, once for each reason.
async fn tell_what_it_waits_for(client: &Client, job: &str, told: &mut Option<String>) {
    let Ok(job) = get(client, job).await else { return };
    let waits = matches!(job.state(), v1::JobState::Waiting | v1::JobState::Queued);
    let reason = Some(why(&job)).filter(|_| waits);
    if let Some(reason) = reason.filter(|reason| told.as_ref() != Some(reason)) {
        note(&format!("{}: {reason}", words::state(job.state, 0)));
        *told = Some(reason);
    }
}

/// Why a job has no result, if it has none.
pub(super) fn end(job: &v1::Job) -> Result<(), Failure> {
    if job.state() == v1::JobState::Succeeded {
        return Ok(());
    }
    let mut message = format!("job {} is {}", job.job_id, words::state(job.state, 0));
    // A cancelled job may have had failures, but they are not why it ended.
    if let Some(failure) = job.failure.as_ref().filter(|_| job.state() == v1::JobState::Failed) {
        message.push_str(&format!(": {}", words::failure_line(failure)));
        for line in &failure.last_log_lines {
            message.push_str(&format!("\n  {line}"));
        }
    }
    Err(Failure { status: FAILED, ..Failure::failed(message) })
}

/// The first and last validation loss of each set.
pub(super) async fn validation(client: &Client, job: &str) -> Result<BTreeMap<String, (f64, f64)>, Failure> {
    let mut found = BTreeMap::new();
    for point in all_metrics(client, job, &[]).await? {
        let set = point.name.strip_prefix("eval/").and_then(|rest| rest.strip_suffix("/loss"));
        if let Some(set) = set {
            found.entry(set.to_owned()).or_insert((point.value, point.value)).1 = point.value;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_says_a_failure_only_where_it_is_why_the_job_ended() {
        let failure = v1::Failure { message: "the worker is lost".to_owned(), ..Default::default() };
        let job = |state: v1::JobState| v1::Job {
            job_id: "j-1".to_owned(),
            state: state as i32,
            failure: Some(failure.clone()),
            ..Default::default()
        };
        let said = |state| end(&job(state)).map_err(|failure| failure.message);
        assert_eq!(said(v1::JobState::Succeeded), Ok(()));
        assert_eq!(said(v1::JobState::Cancelled), Err("job j-1 is cancelled".to_owned()));
        let failed = said(v1::JobState::Failed).unwrap_err();
        assert!(failed.starts_with("job j-1 is failed: the worker is lost"), "{failed}");
    }
}
